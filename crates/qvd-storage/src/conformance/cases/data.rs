//! What is in files: holes, mappings, files without a name, and who sees a
//! change of the base's files that were open before.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{FileExt, MetadataExt},
    },
};

use qvd_sys::map::SharedMap;
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, linkat, open, seek},
    io::Errno,
};

use super::{
    super::{
        base::{ISLAND_AT, LARGE_BYTES, SPARSE_BYTES, TEXT},
        bench::Bench,
        report::{Checked, Seen, Step, equal, hold, refused},
    },
    Listed,
};
use crate::Deviation;

pub(super) const CASES: &[Listed] = &[
    ("sparse-files", None, sparse),
    ("holes-of-base", Some(Deviation::FilledHoles), holes_of_base),
    ("shared-mappings", None, mappings),
    ("mappings-opened-before", Some(Deviation::StaleMaps), stale_maps),
    ("readers-opened-before", Some(Deviation::StaleReaders), stale_readers),
    ("files-without-a-name", Some(Deviation::NoTmpfile), tmpfile),
    ("removed-but-open", None, removed_but_open),
    ("append-and-truncate", None, append_and_truncate),
    ("large-files", None, large),
    ("syncing", None, syncing),
];

/// Bytes that a file takes, in the units of `stat`.
const BLOCK_BYTES: u64 = 512;
/// What a file with one island may take: its block, and what a file system
/// sets aside around it.
const SMALL_BYTES: u64 = 1 << 20;

fn sparse(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let file = tree.open("var/new", OFlags::RDWR | OFlags::CREATE)?;
        file.set_len(SPARSE_BYTES).step("a file can be made longer")?;
        file.write_all_at(b"island", ISLAND_AT).step("it can be written in the middle")?;
        file.sync_all().step("it can be synced")?;
        let meta = file.metadata().step("it has metadata")?;
        equal("its length is", meta.len(), SPARSE_BYTES)?;
        let taken = meta.blocks() * BLOCK_BYTES;
        hold("it takes little space", taken <= SMALL_BYTES, format!("{taken} bytes"))?;
        let data = seek(&file, rustix::fs::SeekFrom::Data(0)).step("its data can be sought")?;
        hold("the data begins at the island", data > 0 && data <= ISLAND_AT, data)?;
        let mut bytes = [1; 4];
        file.read_exact_at(&mut bytes, 1000).step("a hole can be read")?;
        equal("a hole reads as", bytes, [0; 4])?;
        Ok(Seen::Plain)
    })
}

fn holes_of_base(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let file = tree.open("var/sparse", OFlags::RDWR)?;
        file.write_all_at(b"x", 0).step("it can be written")?;
        file.sync_all().step("it can be synced")?;
        let mut island = [0; 6];
        file.read_exact_at(&mut island, ISLAND_AT).step("it can be read")?;
        equal("at the island it holds", &island, b"island")?;
        let meta = file.metadata().step("it has metadata")?;
        equal("its length is", meta.len(), SPARSE_BYTES)?;
        let taken = meta.blocks() * BLOCK_BYTES;
        if taken > SMALL_BYTES {
            return Ok(Seen::Deviates(format!("it takes {taken} bytes after a write of one")));
        }
        Ok(Seen::Plain)
    })
}

fn mappings(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        tree.write("var/new", [0; 4096])?;
        for name in ["var/new", "var/large"] {
            let (one, other) = (tree.open(name, OFlags::RDWR)?, tree.open(name, OFlags::RDWR)?);
            let map = |file: &File| SharedMap::new(file.as_fd(), 4096, true).step(format!("`{name}` can be mapped"));
            let (mine, theirs) = (map(&one)?, map(&other)?);
            hold("a mapping can be written", mine.set(100, 42), "it cannot")?;
            equal("another mapping shows", theirs.byte(100), Some(42))?;
            let mut byte = [0];
            other.read_exact_at(&mut byte, 100).step("it can be read")?;
            equal("a read shows", byte, [42])?;
            one.write_all_at(&[43], 101).step("it can be written")?;
            equal("a mapping shows what is written", theirs.byte(101), Some(43))?;
            mine.sync().step("a mapping can be synced")?;
            drop((mine, theirs, one, other));
            let mut bytes = [0; 2];
            tree.open(name, OFlags::RDONLY)?.read_exact_at(&mut bytes, 100).step("it can be read")?;
            equal("later it holds", bytes, [42, 43])?;
        }
        Ok(Seen::Plain)
    })
}

fn stale_maps(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let file = tree.open("var/large", OFlags::RDONLY)?;
        let map = SharedMap::new(file.as_fd(), 4096, false).step("a file of the base can be mapped")?;
        equal("the mapping shows", map.byte(10), Some(7))?;
        tree.open("var/large", OFlags::WRONLY)?.write_all_at(&[8], 10).step("the file can be written")?;
        let seen = map.byte(10);
        if seen == Some(7) {
            return Ok(Seen::Deviates("it shows what was there before the first write".to_owned()));
        }
        equal("the mapping shows", seen, Some(8))?;
        Ok(Seen::Plain)
    })
}

fn stale_readers(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let mut reader = tree.open("var/file", OFlags::RDONLY)?;
        tree.write("var/file", "changed")?;
        let mut text = String::new();
        reader.read_to_string(&mut text).step("it can be read")?;
        // Some see the new size already.
        if !text.is_empty() && TEXT.starts_with(&text) {
            return Ok(Seen::Deviates("it reads what was there before the first write".to_owned()));
        }
        equal("who opened it before reads", &*text, "changed")?;
        Ok(Seen::Plain)
    })
}

fn tmpfile(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let opened = open(tree.path("var/dir"), flags, Mode::RUSR | Mode::WUSR);
        if let Err(error @ (Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL)) = opened {
            return Ok(Seen::Deviates(format!("O_TMPFILE says {error}")));
        }
        let mut file = File::from(opened.step("a file without a name can be made")?);
        file.write_all(b"unnamed").step("it can be written")?;
        tree.expect_names("var/dir", &["a", "b", "sub"])?;
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        linkat(CWD, &link, CWD, tree.path("var/dir/named"), AtFlags::SYMLINK_FOLLOW).step("it can be given a name")?;
        tree.expect("var/dir/named", "unnamed")?;
        let over = linkat(CWD, link, CWD, tree.path("var/dir/a"), AtFlags::SYMLINK_FOLLOW);
        refused("to give it a name of the base", over, &[Errno::EXIST])?;
        Ok(Seen::Plain)
    })
}

fn removed_but_open(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let mut reader = tree.open("var/other", OFlags::RDONLY)?;
        let mut file = tree.open("var/file", OFlags::RDWR)?;
        tree.remove("var/file")?;
        tree.remove("var/other")?;
        equal("it has so many names", file.metadata().step("it has metadata")?.nlink(), 0)?;
        file.seek(SeekFrom::End(0)).and_then(|_| file.write_all(b"more")).step("it can be written still")?;
        let mut text = String::new();
        file.rewind().and_then(|()| file.read_to_string(&mut text)).step("it can be read still")?;
        equal("it holds", text, format!("{TEXT}more"))?;
        let mut text = String::new();
        reader.read_to_string(&mut text).step("what was open for reading can be read still")?;
        equal("it holds", &*text, TEXT)?;
        tree.write("var/file", "new")?;
        tree.expect("var/file", "new")?;
        Ok(Seen::Plain)
    })
}

fn append_and_truncate(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let mut log = tree.open("var/file", OFlags::WRONLY | OFlags::APPEND)?;
        let mut other = tree.open("var/file", OFlags::WRONLY | OFlags::APPEND)?;
        for text in ["1", "2"] {
            log.write_all(text.as_bytes())
                .and_then(|()| other.write_all(text.as_bytes()))
                .step("it can be added to")?;
        }
        tree.expect("var/file", &format!("{TEXT}1122"))?;
        fs::File::options()
            .write(true)
            .open(tree.path("var/other"))
            .and_then(|file| file.set_len(4))
            .step("it can be cut")?;
        tree.expect("var/other", TEXT.get(..4).unwrap_or_default())?;
        let file = tree.open("var/dir/a", OFlags::RDWR)?;
        file.set_len(20_000).step("it can be made longer")?;
        equal("it is so long", tree.stat("var/dir/a")?.len(), 20_000)?;
        rustix::fs::ftruncate(&file, 3).step("it can be cut while open")?;
        tree.expect("var/dir/a", TEXT.get(..3).unwrap_or_default())?;
        let directory = open(tree.path("var/dir"), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
        refused("to open a directory for writing", directory, &[Errno::ISDIR])?;
        let below = open(tree.path("var/file/x"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        refused("a name below a file", below, &[Errno::NOTDIR])?;
        Ok(Seen::Plain)
    })
}

fn large(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let file = tree.open("var/large", OFlags::RDWR)?;
        file.write_all_at(&[9; 10], 500_000).step("it can be written in the middle")?;
        let mut content = Vec::new();
        (&file).read_to_end(&mut content).step("it can be read")?;
        equal("it is so long", content.len(), LARGE_BYTES)?;
        let as_it_should =
            content.iter().enumerate().all(|(at, &byte)| byte == if (500_000..500_010).contains(&at) { 9 } else { 7 });
        hold("a write in the middle leaves the rest", as_it_should, "it does not")?;
        let copy = tree.open("var/copy", OFlags::RDWR | OFlags::CREATE)?;
        let mut left = LARGE_BYTES;
        let (mut from, mut to) = (0, 0);
        while left > 0 {
            let sent = rustix::fs::copy_file_range(&file, Some(&mut from), &copy, Some(&mut to), left);
            let sent = sent.step("the kernel can copy it")?;
            hold("the kernel copies all of it", sent > 0, "it stops")?;
            left -= sent;
        }
        let mut copied = Vec::new();
        (&copy).read_to_end(&mut copied).step("the copy can be read")?;
        hold("the copy is the same", copied == content, "it is not")?;
        Ok(Seen::Plain)
    })
}

fn syncing(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        let mut file = tree.open("var/file", OFlags::RDWR)?;
        file.write_all(b"x")
            .and_then(|()| file.sync_data())
            .and_then(|()| file.sync_all())
            .step("a file can be synced")?;
        tree.open("var", OFlags::RDONLY)?.sync_all().step("a directory can be synced")?;
        rustix::fs::syncfs(tree.open("var", OFlags::RDONLY)?).step("the file system can be synced")?;
        let space = rustix::fs::fstatvfs(tree.fd()).step("the file system says how large it is")?;
        hold(
            "there is space",
            space.f_blocks > 0 && space.f_bfree > 0,
            format!("{} of {}", space.f_bfree, space.f_blocks),
        )?;
        Ok(Seen::Plain)
    })
}
