//! Roots never see each other, and never change what they stand on.

use std::{
    io::{copy, sink},
    os::fd::AsFd,
};

use qvd_core::RootPolicy;
use qvd_sys::map::SharedMap;
use rustix::fs::{Advice, OFlags, fadvise};

use super::{
    super::{
        base::{LARGE_BYTES, LIBRARY, TEXT},
        bench::{Bench, id, mount},
        manifest::{Detail, Manifest},
        report::{Checked, Seen, Step, hold},
        tree::Tree,
    },
    Listed,
};
use crate::Capability;

pub(super) const CASES: &[Listed] = &[
    ("base-is-shown-whole", None, shown),
    ("roots-are-apart", None, apart),
    ("memory-is-shared-as-offered", None, shared),
    ("snapshots", None, snapshots),
];

pub(super) const LAST: &[Listed] = &[("base-unchanged", None, unchanged)];

fn shown(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        bench.site.base.shown.expect("a new root shows the base", &Manifest::of(&tree.dir(), Detail::Times)?)?;
        Ok(Seen::Plain)
    })
}

fn apart(bench: &Bench) -> Checked {
    let (one, other) =
        (bench.create(&id("one"), RootPolicy::Volatile)?, bench.create(&id("one-2"), RootPolicy::Volatile)?);
    let (mut one, mut other) = (one, other);
    let (mine, theirs) = (mount(&*one)?, mount(&*other)?);
    mine.write("var/file", "mine")?;
    mine.write("var/new", "mine")?;
    mine.remove("var/other")?;
    mine.chmod("var/dir", 0o700)?;
    mine.remove_all("var/many")?;
    mine.rename("var/dir/a", "var/a")?;
    let now = Manifest::of(&theirs.dir(), Detail::Times)?;
    bench.site.base.shown.expect("another root on the base shows nothing of it", &now)?;
    theirs.write("var/file", "theirs")?;
    theirs.write("var/new", "theirs")?;
    mine.expect("var/file", "mine")?;
    mine.expect("var/new", "mine")?;
    drop(mine);
    one.close().step("it can be closed while the other is used")?;
    theirs.expect("var/new", "theirs")?;
    let third = bench.create(&id("third"), RootPolicy::Volatile)?;
    let mut third = third;
    let fresh = mount(&*third)?;
    fresh.expect("var/file", TEXT)?;
    fresh.expect_absent("var/new")?;
    drop((fresh, theirs));
    third.close().step("it can be closed")?;
    other.close().step("it can be closed")?;
    bench.site.base.expect_unchanged()?;
    Ok(Seen::Plain)
}

/// What one root has read of the base is there for another, and is in memory once when
/// both map it, if that is offered.
fn shared(bench: &Bench) -> Checked {
    if let Some(not_offered) = bench.lacks(Capability::SharedCache) {
        return not_offered;
    }
    let mut one = bench.create(&id("one"), RootPolicy::Volatile)?;
    let mut other = bench.create(&id("one-2"), RootPolicy::Volatile)?;
    let (reads, looks) = (mount(&*one)?, mount(&*other)?);
    let open = |tree: &Tree| {
        let file = tree.open(LIBRARY, OFlags::RDONLY)?;
        // So that nothing is there that was not read by the other; best effort.
        let _dirty = file.sync_all();
        fadvise(&file, 0, None, Advice::DontNeed).step("the kernel takes advice")?;
        Ok(file)
    };
    let (mut read, looked_at) = (open(&reads)?, open(&looks)?);
    let bytes = copy(&mut read, &mut sink()).step(format!("`{LIBRARY}` can be read"))?;
    let map = |file: &std::fs::File| {
        SharedMap::new(file.as_fd(), LARGE_BYTES, false).step(format!("`{LIBRARY}` can be mapped"))
    };
    let (mine, theirs) = (map(&read)?, map(&looked_at)?);
    let resident = theirs.resident_bytes().step("the kernel says what is in memory")?;
    hold(
        "what one root has read is in memory for the other",
        resident >= LARGE_BYTES,
        format!("{resident} of {bytes}"),
    )?;
    if bench.lacks(Capability::SharedMmaps).is_none() {
        let of_mine = || mine.pss_bytes().step("the kernel says what is mapped");
        mine.touch();
        let alone = of_mine()?;
        theirs.touch();
        let both = of_mine()?;
        hold("what both map is in memory once", both <= alone / 4 * 3, format!("{alone} bytes, then {both}"))?;
    }
    drop((mine, theirs, read, looked_at, reads, looks));
    one.close().step("it can be closed")?;
    other.close().step("it can be closed")?;
    Ok(Seen::Plain)
}

fn snapshots(bench: &Bench) -> Checked {
    if let Some(not_offered) = bench.lacks(Capability::Snapshots) {
        return not_offered;
    }
    let Some(snapshots) = bench.backend.snapshots() else {
        return Ok(Seen::NotOffered("no way to ask for one".to_owned()));
    };
    let mut root = bench.create(&id("original"), RootPolicy::Persistent)?;
    let tree = mount(&*root)?;
    tree.write("var/file", "copied")?;
    snapshots.snapshot(&id("original"), &id("copy")).step("a root in use can be copied")?;
    tree.write("var/file", "later")?;
    let mut copy = bench.create(&id("copy"), RootPolicy::Persistent)?;
    let copied = mount(&*copy)?;
    copied.expect("var/file", "copied")?;
    copied.write("var/file", "the copy's")?;
    tree.expect("var/file", "later")?;
    drop((tree, copied));
    root.close().step("it can be closed")?;
    bench.backend.remove(&id("original")).step("the original can be removed")?;
    let copied = mount(&*copy)?;
    copied.expect("var/file", "the copy's")?;
    drop(copied);
    copy.close().step("it can be closed")?;
    Ok(Seen::Plain)
}

fn unchanged(bench: &Bench) -> Checked {
    bench.site.base.expect_unchanged()?;
    bench.site.small.expect_unchanged()?;
    Ok(Seen::Plain)
}
