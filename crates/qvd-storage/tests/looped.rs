//! Roots with a file system of their own, on loop devices.
#![allow(clippy::unwrap_used)]

mod scratch;

use std::{
    fs,
    os::{fd::AsFd, unix::fs::MetadataExt},
};

use qvd_core::{Bytes, RootPolicy};
use qvd_storage::{Capability, ErrorKind, Looped, Place, Quota, RootBackend, RootOptions};
use qvd_testkit::{Census, Need, Scope, privileged};
use scratch::{base, fill, id, kept, path, read, userns, volatile};

const NEEDS: &[Need] = &[
    Need::Root,
    Need::LoopDevices,
    Need::UserNamespaces,
    Need::Filesystem("ext4"),
    Need::Filesystem("overlay"),
    Need::Program("mkfs.ext4"),
];

/// Runs `test` in a directory, and demands that no loop device stays.
fn in_place(test: impl FnOnce(&std::path::Path, &Looped)) {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let census = Census::take(&Scope::marked([dir.path().file_name().unwrap().to_str().unwrap()]));
        test(dir.path(), &Looped::new(Place::open(&dir.path().join("store")).unwrap()));
        census.assert_unchanged();
    });
}

fn limited(bytes: Bytes, inodes: Option<u64>) -> RootOptions {
    RootOptions { quota: Quota { bytes: Some(bytes), inodes }, ..volatile() }
}

#[test]
fn roots_are_apart_kept_or_forgotten_and_noticed_when_used() {
    in_place(|at, backend| {
        let capabilities = backend.capabilities().unwrap();
        for capability in [Capability::Roots, Capability::IdMapped, Capability::QuotaBytes, Capability::QuotaInodes] {
            assert!(capabilities.get(capability).is_yes(), "{capabilities:?}");
        }
        let base = base(at);
        let mut one = backend.create(&base, &id("one"), &kept()).unwrap();
        let mut other = backend.create(&base, &id("other"), &volatile()).unwrap();
        let userns = userns();
        let mapped = one.mount(Some(userns.as_fd())).unwrap();
        assert_eq!(fs::metadata(path(&mapped, "home/mine")).unwrap().uid(), qvd_core::UidRange::FIRST + 1000);
        drop(mapped);
        let (mine, theirs) = (one.mount(None).unwrap(), other.mount(None).unwrap());
        fs::write(path(&theirs, "etc/f"), "changed").unwrap();
        fs::write(path(&mine, "etc/new"), "kept").unwrap();
        assert_eq!((read(&mine, "etc/f").as_str(), read(&theirs, "etc/f").as_str()), ("from the image", "changed"));
        assert_eq!(fs::read_to_string(at.join("base/etc/f")).unwrap(), "from the image");
        for refused in [backend.remove(&id("one")), one.mount(None).map(drop), other.close()] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Busy);
        }
        drop((mine, theirs));
        assert_eq!(read(&other.mount(None).unwrap(), "etc/f"), "from the image", "a volatile one begins anew");
        other.close().unwrap();
        one.close().unwrap();
        assert_eq!(backend.roots().unwrap(), [(id("one"), RootPolicy::Persistent)]);
        let again = backend.create(&base, &id("one"), &kept()).unwrap();
        assert_eq!(read(&again.mount(None).unwrap(), "etc/new"), "kept");
        backend.remove(&id("one")).unwrap();
        backend.remove(&id("one")).unwrap();
        assert_eq!(backend.roots().unwrap(), []);
    });
}

#[test]
fn limits_in_bytes_and_files_are_hard() {
    in_place(|at, backend| {
        let base = base(at);
        let options = limited(Bytes::mib(16), Some(64));
        let mut root = backend.create(&base, &id("one"), &options).unwrap();
        for _ in 0..2 {
            let mount = root.mount(None).unwrap();
            let (written, error) = fill(&path(&mount, "big"), 64 << 20);
            assert_eq!(error, Some(28), "ENOSPC after {written} bytes");
            assert!((8 << 20..16 << 20).contains(&written), "{written}");
            fs::remove_file(path(&mount, "big")).unwrap();
            let made = (0..200).take_while(|n| fs::write(path(&mount, &format!("f{n}")), "").is_ok()).count();
            assert!((40..=80).contains(&made), "{made} files");
        }
        root.close().unwrap();
        let error = backend.create(&base, &id("two"), &limited(Bytes::mib(1), None)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("at least 4MiB"), "{error}");
        assert_eq!(backend.roots().unwrap(), []);
    });
}

#[test]
fn a_disk_takes_no_more_than_is_written() {
    in_place(|at, backend| {
        let root = backend.create(&base(at), &id("one"), &limited(Bytes::gib(4), None)).unwrap();
        let mount = root.mount(None).unwrap();
        fs::write(path(&mount, "f"), vec![1; 1 << 20]).unwrap();
        let disk = fs::metadata(at.join("store/roots/one/disk")).unwrap();
        assert_eq!(disk.len(), 4 << 30);
        assert!(disk.blocks() * 512 < 64 << 20, "{} blocks", disk.blocks());
        drop(mount);
        backend.remove(&id("one")).unwrap();
    });
}

#[test]
fn another_size_is_refused_for_what_is_kept() {
    in_place(|at, backend| {
        let base = base(at);
        let small = RootOptions { policy: RootPolicy::Persistent, ..limited(Bytes::mib(16), None) };
        drop(backend.create(&base, &id("one"), &small).unwrap());
        let large = RootOptions { policy: RootPolicy::Persistent, ..limited(Bytes::mib(32), None) };
        assert_eq!(backend.create(&base, &id("one"), &large).unwrap_err().kind(), ErrorKind::Unsupported);
        drop(backend.create(&base, &id("one"), &small).unwrap());
        backend.remove(&id("one")).unwrap();
    });
}
