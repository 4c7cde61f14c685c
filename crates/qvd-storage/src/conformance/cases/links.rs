//! Several names for one file, names for names, and the numbers of files.

use std::{
    fs,
    io::Read,
    os::unix::fs::{MetadataExt, symlink},
};

use rustix::fs::OFlags;

use super::{
    super::{
        base::TEXT,
        bench::Bench,
        report::{Checked, Seen, Step, equal, hold},
    },
    Listed,
};
use crate::Deviation;

pub(super) const CASES: &[Listed] = &[
    ("hard-links-of-base", Some(Deviation::BrokenHardLinks), of_base),
    ("hard-links-made-inside", None, made_inside),
    ("symbolic-links", None, symbolic),
    ("inode-numbers", Some(Deviation::ChangingInodes), inodes),
];

fn of_base(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let number = |name: &str| tree.stat(name).map(|meta| (meta.ino(), meta.nlink()));
        equal("both names are one file", number("var/hard-1")?, number("var/hard-2")?)?;
        equal("it has so many names", number("var/hard-1")?.1, 2)?;
        tree.write("var/hard-1", "changed")?;
        if tree.read("var/hard-2")? == TEXT {
            return Ok(Seen::Deviates("what is written by one name does not show by the other".to_owned()));
        }
        tree.expect("var/hard-2", "changed")?;
        equal("both names are one file", number("var/hard-1")?, number("var/hard-2")?)?;
        tree.link("var/hard-2", "var/dir/hard-3")?;
        equal("it has so many names", number("var/hard-1")?.1, 3)?;
        tree.remove("var/hard-1")?;
        tree.expect("var/dir/hard-3", "changed")?;
        equal("it has so many names", number("var/hard-2")?.1, 2)?;
        Ok(Seen::Plain)
    })
}

fn made_inside(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        tree.link("var/file", "var/dir/second")?;
        equal("it has so many names", tree.stat("var/file")?.nlink(), 2)?;
        equal("both are one file", tree.stat("var/file")?.ino(), tree.stat("var/dir/second")?.ino())?;
        tree.write("var/dir/second", "changed")?;
        tree.expect("var/file", "changed")?;
        tree.remove("var/file")?;
        tree.expect("var/dir/second", "changed")?;
        equal("it has so many names", tree.stat("var/dir/second")?.nlink(), 1)?;
        // Package managers keep a second name while they replace the first.
        tree.link("var/other", "var/other.old")?;
        tree.write("var/other.new", "newer")?;
        tree.rename("var/other.new", "var/other")?;
        tree.expect("var/other.old", TEXT)?;
        tree.expect("var/other", "newer")?;
        Ok(Seen::Plain)
    })
}

fn symbolic(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let target = |name: &str| {
            fs::read_link(tree.path(name))
                .step("its target can be read")
                .map(|path| path.to_string_lossy().into_owned())
        };
        equal("the base's link leads to", target("var/link")?, "file".to_owned())?;
        tree.write("var/link", "through the link")?;
        tree.expect("var/file", "through the link")?;
        // One byte less than a path can have with its end.
        let long = "l".repeat(4095);
        // XFS keeps at most 1024 bytes.
        let kept = if symlink(&long, tree.path("var/long")).is_ok() { long } else { "l".repeat(1000) };
        if fs::symlink_metadata(tree.path("var/long")).is_err() {
            symlink(&kept, tree.path("var/long")).step("a link to 1000 bytes can be made")?;
        }
        equal("a long link leads to", target("var/long")?, kept.clone())?;
        tree.rename("var/long", "var/dir/long")?;
        equal("a renamed link leads to", target("var/dir/long")?, kept)?;
        tree.rename("var/link", "var/dir/link")?;
        equal("a renamed link leads to", target("var/dir/link")?, "file".to_owned())?;
        tree.chown("var/dir/link", 7, 8)?;
        let meta = tree.stat("var/dir/link")?;
        equal("the link's owner is", (meta.uid(), meta.gid()), (7, 8))?;
        hold("what it leads to is not given away", tree.stat("var/file")?.uid() == 0, "it is")?;
        Ok(Seen::Plain)
    })
}

fn inodes(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        // A program that remembers a file by its number, as `tail -F` does.
        let mut open = tree.open("var/file", OFlags::RDONLY)?;
        let number = || tree.stat("var/file").map(|meta| (meta.dev(), meta.ino()));
        let before = number()?;
        let opened = open.metadata().step("an open file has metadata")?;
        equal("an open file has the number that its name has", (opened.dev(), opened.ino()), before)?;
        tree.write("var/file", "changed")?;
        open.read_to_end(&mut Vec::new()).step("it can be read")?;
        let after = number()?;
        if after != before {
            return Ok(Seen::Deviates(format!("{before:?} became {after:?} at the first write")));
        }
        let directory = tree.stat("var/dir")?.ino();
        tree.write("var/dir/new", "x")?;
        equal("a directory keeps its number", tree.stat("var/dir")?.ino(), directory)?;
        Ok(Seen::Plain)
    })
}
