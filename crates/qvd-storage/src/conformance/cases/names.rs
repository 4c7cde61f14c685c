//! What names do: renaming, removing and making anew what the base has.

use rustix::{
    fs::{CWD, Mode, OFlags, RenameFlags, mkdirat, openat, renameat_with},
    io::Errno,
};
use std::{
    fs::{self, File},
    io::{Read, Seek, Write},
    os::fd::{AsFd, OwnedFd},
};

use super::{
    super::{
        base::{DEPTH, LONGEST_NAME_BYTES, TEXT},
        bench::Bench,
        report::{Checked, Failure, Seen, Step, equal, hold, refused},
        tree::Tree,
    },
    Listed,
};
use crate::Deviation;

pub(super) const CASES: &[Listed] = &[
    ("rename-directory-of-base", Some(Deviation::NoDirectoryRename), rename_directory),
    ("rename-new-directory", None, rename_new_directory),
    ("rename-open-file", None, rename_open_file),
    ("rename-over-base-file", None, rename_over),
    ("rename-refused", None, rename_refused),
    ("exchange-names", Some(Deviation::NoExchange), exchange),
    ("long-names", None, long_names),
    ("deep-tree", None, deep_tree),
    ("removed-base-file", None, whiteout),
    ("remade-base-directory", None, opaque),
    ("listings", None, listings),
];

fn rename(tree: &Tree, from: &str, to: &str, flags: RenameFlags) -> Result<(), Errno> {
    renameat_with(CWD, tree.path(from), CWD, tree.path(to), flags)
}

fn rename_directory(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        match rename(tree, "var/dir", "var/moved", RenameFlags::empty()) {
            Err(Errno::XDEV) => {
                tree.expect("var/dir/sub/c", TEXT)?;
                tree.expect_absent("var/moved")?;
                return Ok(Seen::Deviates("renaming a directory of the base says EXDEV".to_owned()));
            }
            done => done.step("a directory of the base can be renamed")?,
        }
        tree.expect_absent("var/dir")?;
        tree.expect_names("var/moved", &["a", "b", "sub"])?;
        tree.expect("var/moved/sub/c", TEXT)?;
        tree.write("var/moved/sub/new", "x")?;
        // The old name is free, and nothing of the base shows through it.
        tree.mkdir("var/dir")?;
        tree.expect_names("var/dir", &[])?;
        // Into another directory, over an empty one of the base, and back.
        tree.rename("var/moved", "var/empty")?;
        tree.expect_names("var/empty/sub", &["c", "new"])?;
        tree.rename("var/empty", "var/full/inner")?;
        tree.expect("var/full/inner/a", TEXT)?;
        tree.expect_absent("var/empty")?;
        Ok(Seen::Plain)
    })
}

fn rename_new_directory(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        tree.mkdir("var/new")?;
        tree.write("var/new/f", "x")?;
        tree.rename("var/new", "var/empty")?;
        tree.expect("var/empty/f", "x")?;
        tree.rename("var/empty/f", "var/dir/f")?;
        tree.rename("var/dir/a", "var/empty/a")?;
        tree.expect("var/empty/a", TEXT)?;
        tree.expect_names("var/dir", &["b", "f", "sub"])?;
        Ok(Seen::Plain)
    })
}

fn rename_open_file(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let mut file = tree.open("var/file", OFlags::RDWR)?;
        tree.rename("var/file", "var/dir/renamed")?;
        file.seek(std::io::SeekFrom::End(0)).and_then(|_| file.write_all(b"more")).step("it can be written still")?;
        tree.expect("var/dir/renamed", &format!("{TEXT}more"))?;
        tree.expect_absent("var/file")?;
        // Made anew, the old name is another file.
        tree.write("var/file", "new")?;
        tree.expect("var/dir/renamed", &format!("{TEXT}more"))?;
        Ok(Seen::Plain)
    })
}

fn rename_over(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let mut old = tree.open("var/file", OFlags::RDONLY)?;
        // As editors and package managers save.
        tree.write("var/file.new", "saved")?;
        tree.rename("var/file.new", "var/file")?;
        tree.expect("var/file", "saved")?;
        tree.expect_absent("var/file.new")?;
        let mut text = String::new();
        old.read_to_string(&mut text).step("who has it open can read it")?;
        equal("who opened it before reads", &*text, TEXT)?;
        tree.rename("var/dir/a", "var/other")?;
        tree.expect("var/other", TEXT)?;
        tree.expect_names("var/dir", &["b", "sub"])?;
        Ok(Seen::Plain)
    })
}

fn rename_refused(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let none = RenameFlags::empty();
        tree.mkdir("var/new")?;
        let full = [Errno::NOTEMPTY, Errno::EXIST];
        refused("a directory over one with files of the base", rename(tree, "var/new", "var/full", none), &full)?;
        refused("a directory over a file", rename(tree, "var/new", "var/file", none), &[Errno::NOTDIR])?;
        refused("a file over a directory", rename(tree, "var/file", "var/new", none), &[Errno::ISDIR])?;
        refused("a directory into itself", rename(tree, "var/new", "var/new/inner", none), &[Errno::INVAL])?;
        let over = rename(tree, "var/file", "var/other", RenameFlags::NOREPLACE);
        refused("a file over another with RENAME_NOREPLACE", over, &[Errno::EXIST])?;
        rename(tree, "var/file", "var/free", RenameFlags::NOREPLACE).step("RENAME_NOREPLACE to a free name")?;
        tree.expect("var/free", TEXT)?;
        Ok(Seen::Plain)
    })
}

fn exchange(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        tree.write("var/new", "new")?;
        match rename(tree, "var/file", "var/new", RenameFlags::EXCHANGE) {
            Err(error @ (Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP)) => {
                return Ok(Seen::Deviates(format!("RENAME_EXCHANGE says {error}")));
            }
            done => done.step("two names can be exchanged")?,
        }
        tree.expect("var/file", "new")?;
        tree.expect("var/new", TEXT)?;
        rename(tree, "var/other", "var/full/x", RenameFlags::EXCHANGE).step("files of the base can be exchanged")?;
        tree.expect("var/full/x", TEXT)?;
        Ok(Seen::Plain)
    })
}

fn long_names(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let base = format!("var/{}", bench.site.base.long_name);
        tree.expect(&base, TEXT)?;
        tree.write(&base, "changed")?;
        tree.expect(&base, "changed")?;
        let longest = format!("var/{}", "m".repeat(LONGEST_NAME_BYTES));
        tree.rename(&base, &longest)?;
        tree.expect(&longest, "changed")?;
        tree.remove(&longest)?;
        tree.expect_absent(&base)?;
        tree.mkdir(&base)?;
        let longer = tree.path(format!("var/{}", "n".repeat(LONGEST_NAME_BYTES + 1)));
        let made = mkdirat(CWD, longer, Mode::RWXU);
        refused("a name of 256 bytes", made, &[Errno::NAMETOOLONG])?;
        Ok(Seen::Plain)
    })
}

fn deep_tree(bench: &Bench) -> Checked {
    /// Directories made below the base's, so that no path leads there in one step.
    const MORE: usize = 250;
    const NAME: &str = "a-directory-with-a-longer-name";
    bench.with_tree(|tree| {
        let deep = (0..DEPTH).fold("var/deep".to_owned(), |path, _| path + "/d");
        tree.expect(&format!("{deep}/bottom"), TEXT)?;
        tree.write(&format!("{deep}/bottom"), "changed")?;
        tree.expect(&format!("{deep}/bottom"), "changed")?;
        let mut at: OwnedFd = tree.open(&deep, OFlags::DIRECTORY)?.into();
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        for depth in 0..MORE {
            let step = || format!("directories can be {} deep", DEPTH + depth);
            mkdirat(&at, NAME, Mode::RWXU).step(step())?;
            at = openat(&at, NAME, flags, Mode::empty()).step(step())?;
        }
        let create = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
        let file = openat(&at, "f", create, Mode::RUSR).step("a file can be made at the bottom")?;
        File::from(file).write_all(b"deep").step("a file can be written at the bottom")?;
        for depth in 0..MORE {
            at = openat(&at, "..", flags, Mode::empty()).step("the way up is there")?;
            if depth == 0 {
                let text = openat(&at, format!("{NAME}/f"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
                let text =
                    text.map_err(std::io::Error::from).and_then(|file| std::io::read_to_string(File::from(file)));
                equal("the file at the bottom holds", text.step("it can be read")?, "deep".to_owned())?;
            }
        }
        let names = rustix::fs::Dir::read_from(at.as_fd()).step("the directory can be listed")?;
        equal("so many names with . and ..", names.count(), 4)?;
        // Descriptor by descriptor: no path is long enough.
        tree.remove_all(&deep)?;
        tree.expect_absent(&deep)?;
        Ok(Seen::Plain)
    })
}

fn whiteout(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        tree.remove("var/dir/a")?;
        tree.expect_absent("var/dir/a")?;
        tree.expect_names("var/dir", &["b", "sub"])?;
        let removed = rustix::fs::unlink(tree.path("var/dir/a"));
        refused("to remove it again", removed, &[Errno::NOENT])?;
        drop(tree.open("var/dir/a", OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL)?);
        tree.expect("var/dir/a", "")?;
        // The other way round, a directory in a file's place.
        tree.remove("var/file")?;
        tree.mkdir("var/file")?;
        tree.write("var/file/inner", "x")?;
        tree.expect_names("var/file", &["inner"])?;
        tree.remove("var/link")?;
        tree.write("var/link", "no link")?;
        hold("the new one is a file", tree.stat("var/link")?.is_file(), "something else")?;
        let full = fs::remove_dir(tree.path("var/full"));
        let full = full.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO));
        refused("to remove a directory with files of the base", full, &[Errno::NOTEMPTY, Errno::EXIST])?;
        Ok(Seen::Plain)
    })
}

fn opaque(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        tree.remove_all("var/dir")?;
        tree.expect_absent("var/dir")?;
        tree.mkdir("var/dir")?;
        tree.expect_names("var/dir", &[])?;
        tree.mkdir("var/dir/sub")?;
        tree.expect_names("var/dir/sub", &[])?;
        tree.expect_absent("var/dir/sub/c")?;
        tree.remove_all("var/opaque")?;
        tree.mkdir("var/opaque")?;
        tree.expect_names("var/opaque", &[])?;
        tree.remove("var/full/x")?;
        fs::remove_dir(tree.path("var/full")).step("a directory whose files are removed can be removed")?;
        tree.expect_absent("var/full")?;
        Ok(Seen::Plain)
    })
}

fn listings(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let numbers: Vec<String> = (0..40).map(|number| number.to_string()).collect();
        let all: Vec<&str> = numbers.iter().map(String::as_str).collect();
        tree.expect_names("var/many", &all)?;
        tree.write("var/many/7", "changed")?;
        tree.write("var/many/new", "x")?;
        tree.remove("var/many/8")?;
        let now: Vec<&str> = all.iter().copied().filter(|&name| name != "8").chain(["new"]).collect();
        tree.expect_names("var/many", &now)?;
        // Removed while it is listed, as `rm -r` does.
        for entry in fs::read_dir(tree.path("var/many")).step("it can be listed")? {
            let entry = entry.step("it can be listed")?;
            let kind = entry.file_type().step("it says what each is")?;
            hold("each is listed as a file", kind.is_file(), format!("{kind:?}"))?;
            fs::remove_file(entry.path()).step("each can be removed meanwhile")?;
        }
        tree.expect_names("var/many", &[])?;
        let (first, again) = (tree.names("var")?, tree.names("var")?);
        hold("a listing is the same twice", first == again, "it is not")?;
        let kinds = [("link", "symlink"), ("fifo", "fifo"), ("socket", "socket"), ("dir", "dir")];
        for entry in fs::read_dir(tree.path("var")).step("it can be listed")? {
            let entry = entry.step("it can be listed")?;
            let (name, kind) = (entry.file_name(), entry.file_type().step("it says what each is")?);
            let listed = kinds.iter().find(|(listed, _)| name == *listed);
            let there = fs::symlink_metadata(entry.path()).step("what is listed is there")?.file_type();
            if listed.is_some() && kind != there {
                return Err(Failure::new(format!("{name:?} is listed as {there:?}"), format!("{kind:?}")));
            }
        }
        Ok(Seen::Plain)
    })
}
