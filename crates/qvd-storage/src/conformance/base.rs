//! The bases that the cases work on.

use std::{
    fs::{self, File, FileTimes},
    io,
    os::unix::{
        fs::{FileExt, PermissionsExt, lchown, symlink},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use qvd_core::Digest;
use rustix::{
    fs::{CWD, FileType, Mode, XattrFlags, lsetxattr, makedev, mknodat},
    io::Errno,
};

use super::{
    manifest::{Detail, Manifest},
    report::{Failure, Step},
};
use crate::{BaseTree, Layer};

/// What shape the base of a run has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum BaseForm {
    /// A directory.
    #[default]
    Directory,
    /// Three directories above one another, with whiteouts and an opaque one.
    Layers,
    /// An EROFS in a file, made by `mkfs.erofs`. The kernel gives a file of it no
    /// access control list before it was changed in some other way, since EROFS
    /// itself can set none (Linux `fs/overlayfs/inode.c`, `ovl_set_acl`).
    Image,
}

impl BaseForm {
    /// Bytes of the longest name that a base of this form can hold.
    const fn longest_name_bytes(self) -> usize {
        match self {
            Self::Directory | Self::Layers => LONGEST_NAME_BYTES,
            // `mkfs.erofs` refuses one more, up to version 1.5 at least.
            Self::Image => LONGEST_NAME_BYTES - 1,
        }
    }
}

/// What every text file of the base holds.
pub(super) const TEXT: &str = "from the base\n";
/// A name of as many bytes as a name can have.
pub(super) const LONGEST_NAME_BYTES: usize = 255;
/// Directories above one another.
pub(super) const DEPTH: usize = 60;
/// Size of the sparse file, and where its only block with content is.
pub(super) const SPARSE_BYTES: u64 = 8 << 20;
pub(super) const ISLAND_AT: u64 = 4 << 20;
pub(super) const LARGE_BYTES: usize = 1 << 20;
/// A file of that size in a part that no desktop has to be able to write to.
pub(super) const LIBRARY: &str = "usr/part/library";
/// The seconds and nanoseconds of every file's time of modification.
pub(super) const MODIFIED: (i64, i64) = (1_000_000_000, 123_456_789);

/// `security.capability` with `CAP_NET_BIND_SERVICE`, effective.
/// Source: Linux `include/uapi/linux/capability.h`, `struct vfs_cap_data` of revision 2.
pub(super) const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// An access control list that lets the user 1234 read and write.
pub(super) fn acl() -> Vec<u8> {
    // Source: Linux `include/uapi/linux/posix_acl_xattr.h` and `posix_acl.h`:
    // version 2, then tag, permission and id of each entry.
    const NOBODY: u32 = u32::MAX;
    let entries: [(u16, u16, u32); 5] =
        [(1, 6, NOBODY), (2, 6, 1234), (4, 4, NOBODY), (0x10, 6, NOBODY), (0x20, 4, NOBODY)];
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, permission, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permission.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// A base with what is to be seen of it.
#[derive(Debug)]
pub(super) struct Base {
    pub(super) tree: BaseTree,
    /// What a root on it shows.
    pub(super) shown: Manifest,
    /// Its shape.
    pub(super) form: BaseForm,
    /// A name in `var` that is as long as the base's form allows.
    pub(super) long_name: String,
    /// What it consists of, and what is in these, never to change.
    parts: Vec<(PathBuf, Manifest)>,
}

impl Base {
    /// The base that most cases work on, in the new directory `dir`.
    pub(super) fn build(dir: &Path, form: BaseForm) -> Result<Self, Failure> {
        let flat = dir.join("flat");
        let long_name = "n".repeat(form.longest_name_bytes());
        make_dirs(&flat)
            .and_then(|()| fill(&flat, &long_name))
            .step("a base can be made in the directory of the run")?;
        Self::of(dir, &flat, form, long_name)
    }

    /// A base of a few files, for what is done many times.
    pub(super) fn small(dir: &Path) -> Result<Self, Failure> {
        let flat = dir.join("flat");
        let fill = |at: &Path| {
            make_dirs(at)?;
            fs::create_dir_all(at.join("var/d/e"))?;
            for name in ["var/a", "var/b", "var/d/f", "var/d/e/g"] {
                fs::write(at.join(name), TEXT)?;
            }
            fs::hard_link(at.join("var/a"), at.join("var/c"))?;
            symlink("a", at.join("var/l"))?;
            allow_lack(lsetxattr(at.join("var/b"), "user.base", b"1", XattrFlags::empty()))?;
            age(at)
        };
        fill(&flat).step("a base can be made in the directory of the run")?;
        Self::of(dir, &flat, BaseForm::Directory, String::new())
    }

    fn of(dir: &Path, flat: &Path, form: BaseForm, long_name: String) -> Result<Self, Failure> {
        let shown = Manifest::of(flat, Detail::Times)?;
        let layers = match form {
            BaseForm::Directory => vec![Layer::Dir(flat.to_path_buf())],
            BaseForm::Layers => split(dir, flat).step("a base of layers can be made (it needs privileges)")?,
            BaseForm::Image => vec![Layer::Erofs(erofs(dir, flat)?)],
        };
        let parts = layers.iter().map(|layer| {
            let path = layer.path().to_path_buf();
            Manifest::of(&path, Detail::Identity).map(|manifest| (path, manifest))
        });
        let parts = parts.collect::<Result<_, _>>()?;
        Ok(Self { tree: BaseTree::layered(Digest::new(shown.digest()), layers), shown, form, long_name, parts })
    }

    /// Where it is, when it is a directory; otherwise where its uppermost part is.
    pub(super) fn dir(&self) -> &Path {
        self.parts.first().map_or(Path::new(""), |(path, _)| path)
    }

    /// Demands that nothing of it was changed.
    pub(super) fn expect_unchanged(&self) -> Result<(), Failure> {
        self.parts.iter().try_for_each(|(path, before)| {
            before.expect("the base is as it was", &Manifest::of(path, Detail::Identity)?)
        })
    }
}

fn make_dirs(at: &Path) -> io::Result<()> {
    for name in ["etc", "usr/part", "var", "home"] {
        fs::create_dir_all(at.join(name))?;
    }
    fs::set_permissions(at, fs::Permissions::from_mode(0o755))
}

/// Whoever may not do this, or whose file system cannot, does without.
pub(super) fn allow_lack(result: Result<(), Errno>) -> io::Result<()> {
    match result {
        Err(Errno::PERM | Errno::OPNOTSUPP) => Ok(()),
        result => Ok(result?),
    }
}

fn fill(at: &Path, long_name: &str) -> io::Result<()> {
    let var = at.join("var");
    for name in ["etc/motd", "usr/part/file"] {
        fs::write(at.join(name), TEXT)?;
    }
    for dir in ["dir/sub", "empty", "empty-2", "full", "many", "opaque"] {
        fs::create_dir_all(var.join(dir))?;
    }
    let texts =
        ["file", "other", "dir/a", "dir/b", "dir/sub/c", "full/x", "opaque/only", "hard-1", "attributes", "acl"];
    for name in texts.into_iter().chain(["capable", "setuid", "low", "high", "nobody"]) {
        fs::write(var.join(name), TEXT)?;
    }
    for number in 0..40 {
        fs::write(var.join(format!("many/{number}")), "")?;
    }
    fs::hard_link(var.join("hard-1"), var.join("hard-2"))?;
    symlink("file", var.join("link"))?;
    fs::write(var.join(long_name), TEXT)?;
    for large in [var.join("large"), at.join(LIBRARY)] {
        fs::write(large, vec![7; LARGE_BYTES])?;
    }
    let sparse = File::create(var.join("sparse"))?;
    sparse.set_len(SPARSE_BYTES)?;
    sparse.write_all_at(b"island", ISLAND_AT)?;
    let mut deep = var.join("deep");
    (0..DEPTH).for_each(|_| deep.push("d"));
    fs::create_dir_all(&deep)?;
    fs::write(deep.join("bottom"), TEXT)?;
    // A program that runs until its input ends, whatever it is linked with.
    fs::copy("/bin/cat", var.join("cat"))?;
    drop(UnixListener::bind(var.join("socket"))?);
    mknodat(CWD, var.join("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    // The kernel's null device: 1:3.
    let node = mknodat(CWD, var.join("null"), FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, makedev(1, 3));
    allow_lack(node)?;
    for (name, id) in [("low", 0), ("high", 65535), ("nobody", 65534)] {
        lchown(var.join(name), Some(id), Some(id))?;
    }
    fs::set_permissions(var.join("setuid"), fs::Permissions::from_mode(0o4755))?;
    fs::set_permissions(var.join("cat"), fs::Permissions::from_mode(0o755))?;
    let flags = XattrFlags::empty();
    for (name, key, value) in [
        ("attributes", "user.base", b"1".as_slice()),
        ("attributes", "trusted.base", b"2"),
        ("dir", "user.base", b"3"),
        ("acl", "system.posix_acl_access", &acl()),
        ("capable", "security.capability", &CAPABILITY),
    ] {
        allow_lack(lsetxattr(var.join(name), key, value, flags))?;
    }
    age(at)
}

/// Gives everything the same time, long ago, and an earlier one of access.
fn age(at: &Path) -> io::Result<()> {
    let (seconds, nanoseconds) = (MODIFIED.0.unsigned_abs(), u32::try_from(MODIFIED.1).unwrap_or(0));
    let modified = SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds);
    let times = FileTimes::new().set_modified(modified).set_accessed(modified - Duration::from_secs(1000));
    for entry in walkdir::WalkDir::new(at).contents_first(true) {
        let entry = entry?;
        if entry.file_type().is_file() || entry.file_type().is_dir() {
            File::open(entry.path())?.set_times(times)?;
        } else {
            let time = rustix::fs::Timespec { tv_sec: MODIFIED.0, tv_nsec: MODIFIED.1 };
            let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
            rustix::fs::utimensat(CWD, entry.path(), &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
        }
    }
    Ok(())
}

/// Makes of a flat tree three that show as it when they are stacked.
fn split(dir: &Path, flat: &Path) -> io::Result<Vec<Layer>> {
    let (top, middle) = (dir.join("top"), dir.join("middle"));
    for (layer, dirs) in [(&top, ["etc", "var/opaque"]), (&middle, ["etc", "var"])] {
        for name in dirs {
            fs::create_dir_all(layer.join(name))?;
        }
        fs::set_permissions(layer, fs::Permissions::from_mode(0o755))?;
    }
    // Below, there is more than shows.
    fs::write(flat.join("var/hidden"), "")?;
    fs::write(flat.join("var/opaque/under"), "")?;
    fs::write(flat.join("etc/motd"), "an older one")?;
    fs::write(top.join("etc/motd"), TEXT)?;
    fs::rename(flat.join("var/many"), middle.join("var/many"))?;
    fs::rename(flat.join("var/opaque/only"), top.join("var/opaque/only"))?;
    mknodat(CWD, middle.join("var/hidden"), FileType::CharacterDevice, Mode::empty(), 0)?;
    lsetxattr(top.join("var/opaque"), "trusted.overlay.opaque", b"y", XattrFlags::empty())?;
    for layer in [&top, &middle, flat] {
        age(layer)?;
    }
    Ok([top, middle, flat.to_path_buf()].map(Layer::Dir).to_vec())
}

fn erofs(dir: &Path, flat: &Path) -> Result<PathBuf, Failure> {
    let image = dir.join("image");
    let output =
        Command::new("mkfs.erofs").args(["--quiet", "-E", "force-inode-extended"]).arg(&image).arg(flat).output();
    let output = output.step("mkfs.erofs can be run")?;
    if output.status.success() {
        return Ok(image);
    }
    Err(Failure::new("mkfs.erofs makes an image", String::from_utf8_lossy(&output.stderr).trim()))
}
