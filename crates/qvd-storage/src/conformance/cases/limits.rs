//! Limits: they hold, what reaches them is refused cleanly, and room that is
//! made can be used again. Where they cannot hold, they are refused.

use std::{fs::File, io::Write};

use qvd_core::{Bytes, ErrorKind, RootPolicy};
use rustix::{fs::OFlags, io::Errno};

use super::{
    super::{
        base::TEXT,
        bench::{Bench, id, limited, mount},
        report::{Checked, Failure, Seen, Step, equal, hold, said},
        tree::Tree,
    },
    Listed,
};
use crate::{Capability, Quota};

pub(super) const CASES: &[Listed] = &[
    ("limit-in-bytes", None, bytes),
    ("limit-in-inodes", None, inodes),
    ("limits-not-offered-are-refused", None, refused),
];

const LIMIT_BYTES: u64 = 12 << 20;
const LIMIT_INODES: u64 = 100;
const CHUNK_BYTES: usize = 128 << 10;

const IN_BYTES: Quota = Quota { bytes: Some(Bytes::new(LIMIT_BYTES)), inodes: None };
const IN_INODES: Quota = Quota { bytes: None, inodes: Some(LIMIT_INODES) };

/// What a file system says when a limit is reached.
fn is_full(error: &std::io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOSPC | Errno::DQUOT))
}

/// Writes until it is refused; returns how many chunks arrived.
fn fill(tree: &Tree, name: &str, most_bytes: u64) -> Result<u64, Failure> {
    let mut file = tree.open(name, OFlags::WRONLY | OFlags::CREATE)?;
    let mut chunks = 0;
    while chunks * (CHUNK_BYTES as u64) < most_bytes {
        let chunk = vec![u8::try_from(chunks % 251).unwrap_or(0); CHUNK_BYTES];
        match file.write_all(&chunk).and_then(|()| file.sync_data()) {
            Ok(()) => chunks += 1,
            Err(error) if is_full(&error) => return Ok(chunks),
            Err(error) => return Err(Failure::new("a full root says ENOSPC or EDQUOT", said(&error))),
        }
    }
    Err(Failure::new(format!("writing ends at {LIMIT_BYTES} bytes"), format!("{most_bytes} bytes were written")))
}

fn expect_chunks(tree: &Tree, name: &str, chunks: u64) -> Result<(), Failure> {
    let mut file = tree.open(name, OFlags::RDONLY)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    for number in 0..chunks {
        std::io::Read::read_exact(&mut file, &mut chunk).step("what was written before can be read")?;
        let byte = u8::try_from(number % 251).unwrap_or(0);
        hold(
            "what was written before is whole",
            chunk.iter().all(|&seen| seen == byte),
            format!("chunk {number} is not"),
        )?;
    }
    Ok(())
}

fn bytes(bench: &Bench) -> Checked {
    if let Some(not_offered) = bench.lacks(Capability::QuotaBytes) {
        return not_offered;
    }
    let mut root = bench.create(&id("limited"), limited(RootPolicy::Volatile, IN_BYTES))?;
    let mut other = bench.create(&id("other"), limited(RootPolicy::Volatile, IN_BYTES))?;
    let (tree, others) = (mount(&*root)?, mount(&*other)?);
    let chunks = fill(&tree, "var/big", 4 * LIMIT_BYTES)?;
    let written = chunks * CHUNK_BYTES as u64;
    let fair = LIMIT_BYTES / 2..=LIMIT_BYTES;
    hold(format!("between half and all of {LIMIT_BYTES} bytes can be written"), fair.contains(&written), written)?;
    expect_chunks(&tree, "var/big", chunks)?;
    tree.expect("var/dir/a", TEXT)?;
    // The limit is this root's alone.
    others.write("var/file", vec![1; 1 << 20])?;
    tree.remove("var/big")?;
    // Space comes back when the file system has committed the removal.
    bench.site.settle(|| {
        rustix::fs::syncfs(tree.open("var", OFlags::RDONLY)?).step("it can be synced")?;
        let mut again = tree.open("var/again", OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC)?;
        let content = vec![2; 2 << 20];
        again.write_all(&content).and_then(|()| again.sync_all()).step("after removing, there is room again")
    })?;
    equal("it holds what was written", tree.read("var/again")?.len(), 2 << 20)?;
    drop((tree, others));
    root.close().step("a root that was full can be closed")?;
    other.close().step("it can be closed")?;
    bench.site.base.expect_unchanged()?;
    Ok(Seen::Plain)
}

fn inodes(bench: &Bench) -> Checked {
    if let Some(not_offered) = bench.lacks(Capability::QuotaInodes) {
        return not_offered;
    }
    let mut root = bench.create(&id("limited"), limited(RootPolicy::Volatile, IN_INODES))?;
    let tree = mount(&*root)?;
    tree.mkdir("var/new")?;
    let make = |number: u64| File::create(tree.path(format!("var/new/{number}")));
    let mut made = 0;
    loop {
        match make(made) {
            Ok(_) if made > 2 * LIMIT_INODES => {
                return Err(Failure::new(format!("making files ends at {LIMIT_INODES}"), format!("{made} were made")));
            }
            Ok(_) => made += 1,
            Err(error) if is_full(&error) => break,
            Err(error) => return Err(Failure::new("a full root says ENOSPC or EDQUOT", said(&error))),
        }
    }
    // Directories that the back end needs count, and a file system may round up.
    let fair = LIMIT_INODES / 2..=LIMIT_INODES + LIMIT_INODES / 4;
    hold(format!("about {LIMIT_INODES} files can be made"), fair.contains(&made), made)?;
    equal("so many are there", tree.names("var/new")?.len() as u64, made)?;
    tree.expect("var/dir/a", TEXT)?;
    for number in 0..10 {
        tree.remove(&format!("var/new/{number}"))?;
    }
    bench.site.settle(|| {
        rustix::fs::syncfs(tree.open("var", OFlags::RDONLY)?).step("it can be synced")?;
        (0..8).try_for_each(|number| make(number).map(drop).step("after removing, files can be made again"))
    })?;
    drop(tree);
    root.close().step("a root that was full can be closed")?;
    Ok(Seen::Plain)
}

/// A limit that is taken and does not hold is worse than none.
fn refused(bench: &Bench) -> Checked {
    let asked = [(Capability::QuotaBytes, IN_BYTES), (Capability::QuotaInodes, IN_INODES)];
    let mut any = false;
    for (_, quota) in asked.into_iter().filter(|(capability, _)| !bench.capabilities.get(*capability).is_yes()) {
        any = true;
        for policy in [RootPolicy::Volatile, RootPolicy::Persistent] {
            let name = id("limited");
            match bench.backend.create(&bench.site.base.tree, &name, &limited(policy, quota)) {
                Err(error) if error.kind() == ErrorKind::Unsupported => {}
                Err(error) => return Err(Failure::new("the refusal says that this host cannot", said(&error))),
                Ok(_) => {
                    return Err(Failure::new("a limit that would not hold is refused", format!("{quota:?} is taken")));
                }
            }
            equal("nothing is left of it", bench.backend.find(&name).step("it can be asked for")?, None)?;
        }
    }
    if any { Ok(Seen::Plain) } else { Ok(Seen::NotOffered("there is no limit that it refuses".to_owned())) }
}
