//! Disks with a history, and disks that were made to do harm.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
    time::SystemTime,
};

use qvd_core::Tag;
use qvd_storage::{
    Error, ImageConfig, Repository,
    repository::{CommitId, Content, Directory, Keep, NewCommit, Wanted, archive::IMPORT_MAX_BYTES},
};
use qvd_testkit::{Need, privileged};

const BLOCK: u64 = 64 << 10;

fn commit(repository: &Repository, from: &Path) -> CommitId {
    let staging = repository.stage().unwrap();
    let disk = staging.import_disk(from, IMPORT_MAX_BYTES).unwrap();
    let new = NewCommit {
        config: ImageConfig::plain("windows".parse().unwrap()),
        author: "ana".to_owned(),
        message: "installed".to_owned(),
        time: SystemTime::now(),
        recipe: None,
        publish: false,
    };
    repository.commit_disk(&staging, disk, new).unwrap()
}

/// A sparse disk with something in some blocks, and an end that is no whole one.
fn raw(at: &Path) -> PathBuf {
    let path = at.join("disk.raw");
    let file = File::create(&path).unwrap();
    file.set_len(1000 * BLOCK + 1234).unwrap();
    for (block, byte) in [(0, 1), (7, 2), (8, 2), (500, 3), (1000, 4)] {
        file.write_all_at(&[byte; 1000], block * BLOCK + 100).unwrap();
    }
    // Written, but nothing that has to be kept.
    file.write_all_at(&vec![0; 2 * BLOCK as usize], 20 * BLOCK).unwrap();
    path
}

fn convert(from: &Path, to: &Path, options: &[&str]) {
    let status = Command::new("qemu-img").args(["convert", "-O", "qcow2"]).args(options).arg(from).arg(to).status();
    assert!(status.unwrap().success());
}

fn objects(repository: &Repository) -> usize {
    let count = |dir: fs::DirEntry| fs::read_dir(dir.path()).unwrap().count();
    fs::read_dir(repository.dir().join("objects")).unwrap().flatten().map(count).sum()
}

#[test]
fn versions_of_a_disk_share_what_did_not_change() {
    let dir = tempfile::tempdir().unwrap();
    let repository = Repository::open(&dir.path().join("here")).unwrap();
    let disk = raw(dir.path());
    let one = commit(&repository, &disk);
    // Two are the same; the list is one more.
    assert_eq!(objects(&repository), 5);
    File::options().write(true).open(&disk).unwrap().write_all_at(b"changed", 500 * BLOCK).unwrap();
    let two = commit(&repository, &disk);
    assert_eq!(objects(&repository), 7);
    let diff = repository.diff(&repository.commit(one).unwrap(), &repository.commit(two).unwrap()).unwrap();
    assert_eq!(diff.blocks.map(|blocks| (blocks.changed, blocks.total)), Some((1, 1001)));

    let there = Repository::open(&dir.path().join("there")).unwrap();
    let wanted = Wanted { flavour: "windows".parse().unwrap(), tag: Some(Tag::head()), force: false };
    let from = Directory::new(Repository::open(repository.dir()).unwrap());
    there.pull(&from, &wanted, "ana", &mut |_| {}).unwrap();
    let written = dir.path().join("written");
    there.materialise(two, &written).unwrap();
    assert_eq!(fs::read(&written).unwrap(), fs::read(&disk).unwrap());
    assert!(fs::metadata(&written).unwrap().blocks() * 512 < 20 * BLOCK, "it is not sparse");
    assert!(matches!(there.materialise(two, &written), Err(Error::Io { .. })));
    assert!(there.fsck(None).unwrap().is_sound());
    assert_eq!(there.gc(&Keep::default(), false).unwrap().objects, 0);
}

#[test]
fn a_qcow2_is_the_disk_that_it_holds() {
    privileged(&[Need::Program("qemu-img")], || {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::open(&dir.path().join("here")).unwrap();
        let disk = raw(dir.path());
        // Version 2 and 3 count in sectors, so the end is a little longer.
        File::options().write(true).open(&disk).unwrap().set_len(1000 * BLOCK + 1536).unwrap();
        let plain = commit(&repository, &disk);
        for options in [
            &["-o", "compat=1.1"][..],
            &["-o", "compat=0.10"],
            &["-c"],
            &["-c", "-o", "compression_type=zstd"],
            &["-o", "cluster_size=512"],
            &["-o", "cluster_size=2M"],
            &["-o", "lazy_refcounts=on"],
        ] {
            let qcow2 = dir.path().join("disk.qcow2");
            convert(&disk, &qcow2, options);
            let found = commit(&repository, &qcow2);
            let content = |id| repository.commit(id).unwrap().content;
            assert_eq!(content(found), content(plain), "{options:?}");
        }
    });
}

fn refused(dir: &Path, disk: &Path) -> String {
    let repository = Repository::open(&dir.join("here")).unwrap();
    let staging = repository.stage().unwrap();
    let error = staging.import_disk(disk, 1 << 30).unwrap_err();
    assert!(matches!(error, Error::Import { .. }), "{error:?}");
    error.to_string()
}

#[test]
fn a_qcow2_that_leads_elsewhere_or_lies_is_refused() {
    privileged(&[Need::Program("qemu-img")], || {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let run = |args: &[&str]| {
            let output = Command::new("qemu-img").current_dir(dir.path()).args(args).output().unwrap();
            assert!(output.status.success(), "{output:?}");
        };
        fs::write(at("secret"), vec![7; 1 << 20]).unwrap();
        run(&["create", "-q", "-f", "qcow2", "-b", "secret", "-F", "raw", "backing"]);
        assert!(refused(dir.path(), &at("backing")).contains("backing file"));
        // A loop: each is the other's.
        run(&["create", "-q", "-f", "qcow2", "one", "1M"]);
        run(&["create", "-q", "-f", "qcow2", "-b", "one", "-F", "qcow2", "two"]);
        run(&["rebase", "-u", "-f", "qcow2", "-b", "two", "-F", "qcow2", "one"]);
        assert!(refused(dir.path(), &at("one")).contains("backing file"));
        run(&["create", "-q", "-f", "qcow2", "-o", "data_file=secret,data_file_raw=on", "outside", "1M"]);
        assert!(refused(dir.path(), &at("outside")).contains("in another file"));

        fs::write(at("plain"), vec![7; 1 << 20]).unwrap();
        run(&["convert", "-O", "qcow2", "plain", "sound"]);
        let sound = fs::read(at("sound")).unwrap();
        let with = |offset: usize, bytes: &[u8]| {
            let mut changed = sound.clone();
            changed[offset..offset + bytes.len()].copy_from_slice(bytes);
            fs::write(at("changed"), changed).unwrap();
            refused(dir.path(), &at("changed"))
        };
        assert!(with(4, &[0, 0, 0, 9]).contains("version 9"));
        assert!(with(20, &[0, 0, 0, 63]).contains("2^63"));
        assert!(with(24, &[0xff; 8]).contains("does not go with"));
        assert!(with(36, &[0xff; 4]).contains("does not go with"));
        assert!(with(40, &[0x7f; 8]).contains("behind the end"));
        assert!(with(32, &[0, 0, 0, 1]).contains("encrypted"));
        assert!(with(72, &[0x80, 0, 0, 0, 0, 0, 0, 0]).contains("features unknown"));
        let l1 = u64::from_be_bytes(sound[40..48].try_into().unwrap()) as usize;
        let l2 = (u64::from_be_bytes(sound[l1..l1 + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00) as usize;
        assert!(with(l1, &[0, 0x7f, 0, 0, 0, 0, 0, 0]).contains("behind the end"));
        assert!(with(l2, &[0, 0x7f, 0, 0, 0, 0, 0, 0]).contains("behind the end"));
        assert!(with(l2, &[0, 0, 0, 0, 0, 0, 0x12, 0]).contains("not where one can be"));
        assert!(with(l2, &[0x7f; 8]).contains("is damaged"));
        // A table that is its own first cluster is only a strange disk.
        fs::write(at("changed"), &sound).unwrap();
        let repository = Repository::open(&at("here")).unwrap();
        let mut own = sound.clone();
        own[l2..l2 + 8].copy_from_slice(&(l2 as u64).to_be_bytes());
        fs::write(at("changed"), own).unwrap();
        let content = repository.stage().unwrap().import_disk(&at("changed"), 1 << 30).unwrap();
        assert!(matches!(content, Content::Disk { size_bytes: 0x10_0000, .. }));
        // Everything points to one cluster: more data than so small a file has.
        run(&["create", "-q", "-f", "qcow2", "bomb", "64G"]);
        let bomb = File::options().read(true).write(true).open(at("bomb")).unwrap();
        let mut table = [0; 8];
        bomb.read_exact_at(&mut table, 40).unwrap();
        let (l1, end) = (u64::from_be_bytes(table), 1 << 20);
        bomb.write_all_at(&vec![9; BLOCK as usize], end).unwrap();
        let entry = |at: u64| (at | 1 << 63).to_be_bytes().repeat(BLOCK as usize / 8);
        bomb.write_all_at(&entry(end), end + BLOCK).unwrap();
        bomb.write_all_at(&entry(end + BLOCK)[..128 * 8], l1).unwrap();
        assert!(refused(dir.path(), &at("bomb")).contains("times its size"));
    });
}
