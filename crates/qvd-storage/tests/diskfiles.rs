//! Disks that are files: made, kept, forgotten, noticed when used, as QEMU sees them.
#![allow(clippy::unwrap_used)]

mod qemu;

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

use qemu::{Holder, img, info, io};
use qvd_core::{Bytes, RootPolicy};
use qvd_storage::{
    BaseDisk, DiskBackend, DiskBackends, DiskCapability, DiskFormat, DiskId, DiskOptions, ErrorKind, Place,
};
use qvd_testkit::{Need, privileged};

const NEEDS: &[Need] = &[Need::Program("qemu-img"), Need::Program("qemu-io")];

fn id(name: &str) -> DiskId {
    name.parse().unwrap()
}

/// A raw disk of 8 MiB with a byte here and there, and a qcow2 file of the same.
fn bases(dir: &Path) -> (BaseDisk, BaseDisk) {
    let raw = dir.join("base.raw");
    let file = File::create(&raw).unwrap();
    file.set_len(8 << 20).unwrap();
    file.write_all_at(&[7; 4096], 0).unwrap();
    file.write_all_at(&[9; 4096], 5 << 20).unwrap();
    let qcow2 = dir.join("base.qcow2");
    img(&["convert", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), qcow2.to_str().unwrap()]);
    let digest = |n: &str| format!("sha256:{}", n.repeat(64)).parse().unwrap();
    (BaseDisk::new(digest("1"), raw, DiskFormat::Raw), BaseDisk::new(digest("2"), qcow2, DiskFormat::Qcow2))
}

/// Runs `test` with every back end that works here.
fn with_each(test: impl Fn(&Path, &dyn DiskBackend)) {
    privileged(NEEDS, || {
        for name in DiskBackends::built_in().names() {
            let dir = tempfile::tempdir().unwrap();
            let place = Place::for_disks(&dir.path().join("store")).unwrap();
            let backend = DiskBackends::built_in().make(name, place).unwrap();
            if backend.capabilities().unwrap().works() {
                test(dir.path(), backend.as_ref());
            } else {
                assert!(["lvm", "reflink"].contains(&name), "every other works everywhere, and {name} not");
            }
        }
    });
}

#[test]
fn disks_are_apart_kept_or_forgotten_and_noticed_when_used() {
    with_each(|dir, backend| {
        let (raw, qcow2) = bases(dir);
        for base in [raw, qcow2] {
            let before = fs::read(base.path()).unwrap();
            let mut kept = backend.create(&base, &id("kept"), &RootPolicy::Persistent.into()).unwrap();
            let mut other = backend.create(&base, &id("other"), &RootPolicy::Volatile.into()).unwrap();
            let (one, two) = (kept.attach().unwrap(), other.attach().unwrap());
            assert_eq!(one.size, Bytes::mib(8));
            io(&one, &["read -P 7 0 4k", "read -P 9 5M 4k", "read -P 0 1M 1M", "write -P 1 0 4k", "write -P 2 7M 64k"]);
            io(&two, &["read -P 7 0 4k", "write -P 3 0 4k"]);
            io(&one, &["read -P 1 0 4k", "read -P 9 5M 4k", "read -P 2 7M 64k"]);

            let holder = Holder::of(&two);
            for refused in [backend.remove(&id("other")), other.attach().map(drop), other.close()] {
                assert_eq!(refused.unwrap_err().kind(), ErrorKind::Busy);
            }
            drop(holder);
            io(&other.attach().unwrap(), &["read -P 7 0 4k"]);

            kept.close().unwrap();
            other.close().unwrap();
            other.close().unwrap();
            assert_eq!(backend.disks().unwrap(), [(id("kept"), RootPolicy::Persistent)]);
            let again = backend.create(&base, &id("kept"), &RootPolicy::Persistent.into()).unwrap();
            io(&again.attach().unwrap(), &["read -P 1 0 4k"]);
            let report = again.check().unwrap();
            assert_eq!((report.errors, report.leaks, report.size), (0, 0, Bytes::mib(8)), "{report:?}");
            backend.remove(&id("kept")).unwrap();
            backend.remove(&id("kept")).unwrap();
            assert_eq!(backend.disks().unwrap(), []);
            assert!(fs::read(base.path()).unwrap() == before, "the base is as it was");
        }
    });
}

#[test]
fn sizes_are_as_asked_for_and_never_smaller_than_the_base() {
    with_each(|dir, backend| {
        let (base, _) = bases(dir);
        let sized = |bytes| DiskOptions { policy: RootPolicy::Persistent, size: Some(Bytes::new(bytes)) };
        let disk = backend.create(&base, &id("one"), &sized(1 << 40)).unwrap();
        let device = disk.attach().unwrap();
        assert_eq!(info(&device)["virtual-size"], 1_u64 << 40);
        io(&device, &["read -P 7 0 4k", "read -P 0 1023G 1M", "write -P 5 1023G 1M", "read -P 5 1023G 1M"]);
        assert!(fs::metadata(&device.path).unwrap().blocks() * 512 < 16 << 20);
        for wrong in [4 << 20, (8 << 20) + 1] {
            let error = backend.create(&base, &id("two"), &sized(wrong)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        }
        let error = backend.create(&base, &id("one"), &sized(1 << 41)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert_eq!(backend.disks().unwrap().len(), 1);
        assert_eq!(fs::read_dir(dir.join("store/disks")).unwrap().count(), 1, "nothing half made is left");
    });
}

#[test]
fn a_kept_disk_grows_and_keeps_its_content() {
    with_each(|dir, backend| {
        let (raw, qcow2) = bases(dir);
        for base in [raw, qcow2] {
            let disk = backend.create(&base, &id("one"), &RootPolicy::Persistent.into()).unwrap();
            io(&disk.attach().unwrap(), &["write -P 1 7M 1M"]);
            disk.resize(Bytes::mib(20)).unwrap();
            io(
                &disk.attach().unwrap(),
                &["read -P 7 0 4k", "read -P 1 7M 1M", "read -P 0 8M 12M", "write -P 2 19M 1M"],
            );
            let report = disk.check().unwrap();
            assert_eq!((report.errors, report.leaks, report.size), (0, 0, Bytes::mib(20)), "{report:?}");
            let error = disk.resize(Bytes::mib(10)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            let holder = Holder::of(&disk.attach().unwrap());
            assert_eq!(disk.resize(Bytes::mib(40)).unwrap_err().kind(), ErrorKind::Busy);
            drop(holder);
            backend.remove(&id("one")).unwrap();
        }
    });
}

#[test]
fn another_base_is_refused_for_what_is_kept() {
    with_each(|dir, backend| {
        let (raw, qcow2) = bases(dir);
        drop(backend.create(&raw, &id("one"), &RootPolicy::Persistent.into()).unwrap());
        let error = backend.create(&qcow2, &id("one"), &RootPolicy::Persistent.into()).unwrap_err();
        assert!(error.to_string().contains("was made on image sha256:1111"), "{error}");
        // A volatile one has nothing that could be lost.
        drop(backend.create(&qcow2, &id("one"), &RootPolicy::Volatile.into()).unwrap());
        assert_eq!(backend.disks().unwrap(), [(id("one"), RootPolicy::Volatile)]);
    });
}

#[test]
fn a_qcow2_disk_is_made_as_qemu_would_make_it() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let (base, _) = bases(dir.path());
        let backend = DiskBackends::built_in().make("qcow2", Place::for_disks(dir.path()).unwrap()).unwrap();
        let capabilities = backend.capabilities().unwrap();
        for capability in [
            DiskCapability::Thin,
            DiskCapability::ConstantCreate,
            DiskCapability::NoticedUse,
            DiskCapability::Resize,
            DiskCapability::Commit,
            DiskCapability::Rebase,
        ] {
            assert!(capabilities.get(capability).is_yes(), "{capabilities:?}");
        }
        for size in [8 << 20, (8 << 20) + 512, 1 << 30, 600 << 30, 64 << 40] {
            let options = DiskOptions { policy: RootPolicy::Volatile, size: Some(Bytes::new(size)) };
            let mut disk = backend.create(&base, &id("one"), &options).unwrap();
            let device = disk.attach().unwrap();
            let about = info(&device);
            assert_eq!(about["virtual-size"], size);
            assert_eq!(about["backing-filename-format"], "raw");
            assert_eq!(about["full-backing-filename"], base.path().to_str().unwrap());
            assert_eq!(qemu::check(&device), (0, 0));
            disk.close().unwrap();
        }
    });
}
