//! A root and a plain directory, given the same operations: each answers as the
//! other, and both end up the same.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner},
};
use qvd_core::RootPolicy;
use rustix::{
    fs::{CWD, OFlags, RenameFlags, XattrFlags, lgetxattr, lremovexattr, lsetxattr, renameat_with},
    io::Errno,
};

use super::{
    Effort,
    bench::{Bench, id, mount},
    cases::Listed,
    manifest::{Detail, Manifest},
    report::{Checked, Failure, Seen, Step},
};
use crate::Deviation;

pub(super) const CASES: &[Listed] = &[("random-operations", None, random)];

/// Names that operations work on: few, so that they meet one another. The first
/// are what the base has.
const NAMES: [&str; 14] = [
    "a", "b", "c", "l", "d", "d/f", "d/e", "d/e/g", // of the base
    "x", "y", "d/x", "d/e/x", "y/x", "x/d",
];

/// What is done to both.
#[derive(Debug, Clone)]
enum Op {
    Create(u8),
    Exclusive(u8),
    Write { name: u8, at: u16, byte: u8, len: u8 },
    Append { name: u8, byte: u8 },
    Truncate { name: u8, len: u16 },
    Read(u8),
    Rename { from: u8, to: u8, flags: RenameKind },
    Link { from: u8, to: u8 },
    Symlink { to: u8, name: u8 },
    Unlink(u8),
    Mkdir(u8),
    Rmdir(u8),
    Chmod { name: u8, mode: u16 },
    Chown { name: u8, id: u16 },
    SetXattr { name: u8, value: u8 },
    RemoveXattr(u8),
    GetXattr(u8),
    List(u8),
    Open { slot: u8, name: u8 },
    WriteOpen { slot: u8, at: u16, byte: u8 },
    ReadOpen(u8),
    Close(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RenameKind {
    Plain,
    NoReplace,
    Exchange,
}

fn op() -> impl Strategy<Value = Op> {
    let name = || 0..u8::try_from(NAMES.len()).unwrap_or(1);
    let slot = || 0..3_u8;
    let kind = prop_oneof![
        4 => Just(RenameKind::Plain),
        1 => Just(RenameKind::NoReplace),
        1 => Just(RenameKind::Exchange)
    ];
    prop_oneof![
        2 => name().prop_map(Op::Create),
        1 => name().prop_map(Op::Exclusive),
        3 => (name(), 0..9000_u16, any::<u8>(), any::<u8>()).prop_map(|(name, at, byte, len)| Op::Write { name, at, byte, len }),
        1 => (name(), any::<u8>()).prop_map(|(name, byte)| Op::Append { name, byte }),
        2 => (name(), 0..9000_u16).prop_map(|(name, len)| Op::Truncate { name, len }),
        1 => name().prop_map(Op::Read),
        5 => (name(), name(), kind).prop_map(|(from, to, flags)| Op::Rename { from, to, flags }),
        3 => (name(), name()).prop_map(|(from, to)| Op::Link { from, to }),
        1 => (name(), name()).prop_map(|(to, name)| Op::Symlink { to, name }),
        3 => name().prop_map(Op::Unlink),
        2 => name().prop_map(Op::Mkdir),
        2 => name().prop_map(Op::Rmdir),
        1 => (name(), 0..0o10000_u16).prop_map(|(name, mode)| Op::Chmod { name, mode }),
        1 => (name(), any::<u16>()).prop_map(|(name, id)| Op::Chown { name, id }),
        1 => (name(), any::<u8>()).prop_map(|(name, value)| Op::SetXattr { name, value }),
        1 => name().prop_map(Op::RemoveXattr),
        1 => name().prop_map(Op::GetXattr),
        2 => name().prop_map(Op::List),
        2 => (slot(), name()).prop_map(|(slot, name)| Op::Open { slot, name }),
        2 => (slot(), 0..9000_u16, any::<u8>()).prop_map(|(slot, at, byte)| Op::WriteOpen { slot, at, byte }),
        1 => slot().prop_map(Op::ReadOpen),
        1 => slot().prop_map(Op::Close),
    ]
}

/// One side: a directory, and the files that are open in it.
struct Side {
    at: PathBuf,
    open: [Option<File>; 3],
}

/// What an operation came to: the error's number, or what was read.
type Answer = Result<Vec<u8>, i32>;

fn answer<T>(result: io::Result<T>, read: impl FnOnce(T) -> Vec<u8>) -> Answer {
    result.map(read).map_err(|error| error.raw_os_error().unwrap_or(-1))
}

fn done<T>(result: io::Result<T>) -> Answer {
    answer(result, |_| Vec::new())
}

impl Side {
    fn new(at: PathBuf) -> Self {
        Self { at, open: [const { None }; 3] }
    }

    fn path(&self, name: u8) -> PathBuf {
        self.at.join(NAMES.get(usize::from(name)).unwrap_or(&"a"))
    }

    fn file(&self, name: u8, options: &mut fs::OpenOptions) -> io::Result<File> {
        // A link may lead to itself or to a directory; no fifo is among them.
        options.mode(0o644).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(self.path(name))
    }

    fn slot(&self, slot: u8) -> io::Result<&File> {
        self.open.get(usize::from(slot)).and_then(Option::as_ref).ok_or_else(|| Errno::BADF.into())
    }

    fn apply(&mut self, op: &Op) -> Answer {
        match *op {
            Op::Create(name) => done(self.file(name, File::options().write(true).create(true).truncate(true))),
            Op::Exclusive(name) => done(self.file(name, File::options().write(true).create_new(true))),
            Op::Write { name, at, byte, len } => {
                let file = self.file(name, File::options().write(true));
                done(file.and_then(|file| file.write_all_at(&vec![byte; len.into()], at.into())))
            }
            Op::Append { name, byte } => {
                let file = self.file(name, File::options().append(true));
                done(file.and_then(|mut file| io::Write::write_all(&mut file, &[byte; 3])))
            }
            Op::Truncate { name, len } => {
                done(self.file(name, File::options().write(true)).and_then(|file| file.set_len(len.into())))
            }
            Op::Read(name) => answer(fs::read(self.path(name)), |bytes| bytes),
            Op::Rename { from, to, flags } => {
                let flags = match flags {
                    RenameKind::Plain => RenameFlags::empty(),
                    RenameKind::NoReplace => RenameFlags::NOREPLACE,
                    RenameKind::Exchange => RenameFlags::EXCHANGE,
                };
                done(renameat_with(CWD, self.path(from), CWD, self.path(to), flags).map_err(io::Error::from))
            }
            Op::Link { from, to } => done(fs::hard_link(self.path(from), self.path(to))),
            Op::Symlink { to, name } => {
                let target = NAMES.get(usize::from(to)).and_then(|path| path.rsplit('/').next()).unwrap_or("a");
                done(symlink(target, self.path(name)))
            }
            Op::Unlink(name) => done(fs::remove_file(self.path(name))),
            Op::Mkdir(name) => done(fs::create_dir(self.path(name))),
            Op::Rmdir(name) => done(fs::remove_dir(self.path(name))),
            Op::Chmod { name, mode } => {
                done(fs::set_permissions(self.path(name), fs::Permissions::from_mode(mode.into())))
            }
            Op::Chown { name, id } => done(std::os::unix::fs::lchown(self.path(name), Some(id.into()), None)),
            Op::SetXattr { name, value } => {
                done(lsetxattr(self.path(name), "user.model", &[value], XattrFlags::empty()).map_err(io::Error::from))
            }
            Op::RemoveXattr(name) => done(lremovexattr(self.path(name), "user.model").map_err(io::Error::from)),
            Op::GetXattr(name) => {
                let mut value = vec![0; 16];
                let len = lgetxattr(self.path(name), "user.model", &mut value);
                answer(len.map_err(io::Error::from), |len| value.get(..len).unwrap_or_default().to_vec())
            }
            Op::List(name) => {
                let names = fs::read_dir(self.path(name)).and_then(|entries| {
                    entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<Vec<_>>>()
                });
                answer(names, |mut names| {
                    names.sort();
                    format!("{names:?}").into_bytes()
                })
            }
            Op::Open { slot, name } => {
                let opened = self.file(name, File::options().read(true).write(true));
                let place = self.open.get_mut(usize::from(slot));
                answer(opened.map(|file| place.map(|place| *place = Some(file))), |_| Vec::new())
            }
            Op::WriteOpen { slot, at, byte } => {
                done(self.slot(slot).and_then(|file| file.write_all_at(&[byte; 5], at.into())))
            }
            Op::ReadOpen(slot) => {
                let mut bytes = vec![0; 20_000];
                let len = self.slot(slot).and_then(|file| file.read_at(&mut bytes, 0));
                answer(len, |len| bytes.get(..len).unwrap_or_default().to_vec())
            }
            Op::Close(slot) => {
                let open = self.open.get_mut(usize::from(slot)).and_then(Option::take);
                Ok(vec![u8::from(open.is_some())])
            }
        }
    }
}

/// Operations that a declared deviation makes end differently.
fn left_out(bench: &Bench, op: &Op, plain: &Side) -> bool {
    let is_dir = |name: u8| fs::symlink_metadata(plain.path(name)).is_ok_and(|meta| meta.is_dir());
    match *op {
        Op::Rename { from, to, flags } => {
            let exchanged = flags == RenameKind::Exchange;
            (exchanged && bench.deviates(Deviation::NoExchange))
                || (bench.deviates(Deviation::NoDirectoryRename) && (is_dir(from) || (exchanged && is_dir(to))))
        }
        Op::SetXattr { .. } | Op::RemoveXattr(_) | Op::GetXattr(_) => bench.deviates(Deviation::NoXattrs),
        _ => false,
    }
}

fn random(bench: &Bench) -> Checked {
    let (cases, most) = match bench.effort {
        Effort::Quick => (40, 40),
        Effort::Thorough => (600, 80),
    };
    // The same sequences each time: what failed once fails until it is mended.
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 300, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let failed = runner.run(&vec(op(), 1..most), |ops| {
        compare(bench, &ops)
            .map_err(|failure| TestCaseError::fail(format!("{}\u{1f}{}", failure.expected, failure.seen)))
    });
    match failed {
        Ok(()) => Ok(Seen::Plain),
        Err(TestError::Fail(reason, ops)) => {
            let (expected, seen) = reason.message().split_once('\u{1f}').unwrap_or((reason.message(), ""));
            Err(Failure::new(format!("{expected}, after {ops:?}"), seen))
        }
        Err(TestError::Abort(reason)) => Err(Failure::new("random operations can be made", reason.message())),
    }
}

fn compare(bench: &Bench, ops: &[Op]) -> Result<(), Failure> {
    let plain = bench.site.dir("plain");
    match fs::remove_dir_all(&plain) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).step("the plain directory can be removed")?
        }
        _ => {}
    }
    copy_small(bench.site.small.dir(), &plain).step("the base can be copied to a plain directory")?;
    let mut root = super::bench::create(&*bench.backend, &bench.site.small, &id("model"), RootPolicy::Volatile)?;
    let tree = mount(&*root)?;
    if bench.deviates(Deviation::BrokenHardLinks) {
        for at in [tree.path("var/c"), plain.join("c")] {
            fs::remove_file(at).step("a link of the base can be removed")?;
        }
    }
    let compared = (|| {
        let (mut one, mut other) = (Side::new(plain.clone()), Side::new(tree.path("var")));
        for op in ops {
            if left_out(bench, op, &one) {
                continue;
            }
            let (expected, seen) = (one.apply(op), other.apply(op));
            if expected != seen {
                return Err(Failure::new(format!("{op:?} answers {}", text(&expected)), text(&seen)));
            }
        }
        Manifest::of(&plain, Detail::Plain)?
            .expect("both are the same", &Manifest::of(&tree.path("var"), Detail::Plain)?)
    })();
    drop(tree);
    let closed = root.close().step("it can be closed");
    compared.and(closed)
}

fn text(answer: &Answer) -> String {
    match answer {
        Ok(bytes) if bytes.len() > 200 => format!("{} bytes", bytes.len()),
        Ok(bytes) => format!("{:?}", String::from_utf8_lossy(bytes)),
        Err(error) => io::Error::from_raw_os_error(*error).to_string(),
    }
}

/// Copies what operations work on, as the base has it.
fn copy_small(base: &Path, to: &Path) -> io::Result<()> {
    use std::os::fd::AsFd;
    fs::create_dir(to)?;
    let (from, into) = (crate::fsio::open_dir(&base.join("var"))?, crate::fsio::open_dir(to)?);
    crate::copytree::copy_tree(base, from.as_fd(), into.as_fd(), crate::copytree::Content::Copied)
        .map_err(io::Error::other)
}
