//! What is done with whole disks of any back end: parts discarded, changes
//! written to the base, another base put below.
#![allow(clippy::unwrap_used, clippy::panic)]

mod qemu;

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    time::Duration,
};

use qemu::{Holder, check, img, io};
use qvd_core::{Bytes, RootPolicy};
use qvd_storage::{
    BaseDisk, DiskBackend, DiskBackends, DiskFormat, DiskId, Error, ErrorKind, Place, Qcow2, qcow2::Rebase,
};
use qvd_sys::process::traced::{self, Counted, End};
use qvd_testkit::{Need, privileged};

const NEEDS: &[Need] = &[Need::Program("qemu-img"), Need::Program("qemu-io")];
const LIMIT: Duration = Duration::from_secs(60);

fn id(name: &str) -> DiskId {
    name.parse().unwrap()
}

/// A raw disk of 4 MiB that is all `byte`.
fn base(dir: &Path, name: &str, byte: u8) -> BaseDisk {
    let path = dir.join(name);
    fs::write(&path, vec![byte; 4 << 20]).unwrap();
    BaseDisk::new(format!("sha256:{}", format!("{byte:02x}").repeat(32)).parse().unwrap(), path, DiskFormat::Raw)
}

fn qcow2(dir: &Path) -> Qcow2 {
    Qcow2::new(Place::for_disks(&dir.join("store")).unwrap())
}

#[test]
fn discarded_parts_are_zero_and_take_no_space() {
    privileged(NEEDS, || {
        for name in ["copy", "qcow2", "reflink"] {
            let dir = tempfile::tempdir().unwrap();
            let base = base(dir.path(), "base", 7);
            let backend = DiskBackends::built_in();
            let backend = backend.make(name, Place::for_disks(&dir.path().join("store")).unwrap()).unwrap();
            if !backend.capabilities().unwrap().works() {
                assert_eq!(name, "reflink");
                continue;
            }
            let disk = backend.create(&base, &id("1"), &RootPolicy::Persistent.into()).unwrap();
            let device = disk.attach().unwrap();
            io(&device, &["write -P 9 1M 2M"]);
            let before = fs::metadata(&device.path).unwrap().blocks();
            // From the middle of a cluster to the middle of one.
            disk.discard(Bytes::new((1 << 20) + 4096), Bytes::new((2 << 20) - 8192)).unwrap();
            assert!(fs::metadata(&device.path).unwrap().blocks() < before, "{name}");
            io(
                &device,
                &[
                    "read -P 7 0 1M",
                    "read -P 9 1M 4k",
                    "read -P 0 1028k 2040k",
                    "read -P 9 3068k 4k",
                    "read -P 7 3M 1M",
                ],
            );
            for (at, length) in [(4 << 20, 1), (0, (4 << 20) + 1), (u64::MAX, 2)] {
                let error = disk.discard(Bytes::new(at), Bytes::new(length)).unwrap_err();
                assert!(error.to_string().contains("disk 1 has 4194304 bytes"), "{error}");
            }
            disk.discard(Bytes::new(4 << 20), Bytes::new(0)).unwrap();
            let holder = Holder::of(&device);
            assert_eq!(disk.discard(Bytes::new(0), Bytes::new(1)).unwrap_err().kind(), ErrorKind::Busy);
            drop(holder);
            let report = disk.check().unwrap();
            assert_eq!((report.errors, report.leaks), (0, 0), "{report:?}");
            if name == "qcow2" {
                assert_eq!(check(&device), (0, 0));
            } else {
                assert!(disk.on_base().is_none());
            }
        }
    });
}

#[test]
fn a_disk_is_written_to_its_base_if_no_other_stands_on_it() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let (backend, base) = (qcow2(dir.path()), base(dir.path(), "base", 7));
        let disk = backend.create(&base, &id("1"), &RootPolicy::Persistent.into()).unwrap();
        let mut other = backend.create(&base, &id("2"), &RootPolicy::Volatile.into()).unwrap();
        let device = disk.attach().unwrap();
        io(&device, &["write -P 9 1M 64k"]);
        let on_base = disk.on_base().unwrap();
        let error = on_base.commit().unwrap_err();
        assert!(matches!(&error, Error::BaseShared { disk, .. } if *disk == id("2")), "{error}");
        assert_eq!(fs::read(base.path()).unwrap(), vec![7; 4 << 20]);
        other.close().unwrap();
        let holder = Holder::of(&device);
        assert_eq!(on_base.commit().unwrap_err().kind(), ErrorKind::Busy);
        drop(holder);
        on_base.commit().unwrap();
        let written = fs::read(base.path()).unwrap();
        assert!(written[1 << 20..(1 << 20) + (64 << 10)].iter().all(|byte| *byte == 9));
        assert_eq!(written.iter().filter(|byte| **byte == 9).count(), 64 << 10);
        io(&disk.attach().unwrap(), &["read -P 9 1M 64k", "read -P 7 0 1M"]);
        assert!(disk.check().unwrap().used < Bytes::mib(1), "it is empty again");
        assert_eq!(check(&device), (0, 0));
    });
}

#[test]
fn a_disk_that_is_put_on_another_base_is_found_with_that_alone() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let backend = qcow2(dir.path());
        let (one, two) = (base(dir.path(), "one", 7), base(dir.path(), "two", 8));
        let disk = backend.create(&one, &id("1"), &RootPolicy::Persistent.into()).unwrap();
        io(&disk.attach().unwrap(), &["write -P 9 1M 64k"]);
        disk.on_base().unwrap().rebase(&two, Rebase::Safe).unwrap();
        let device = disk.attach().unwrap();
        assert_eq!(device.backing.as_ref(), Some(&two));
        io(&device, &["read -P 9 1M 64k", "read -P 7 0 1M"]);
        assert!(img(&["info", device.path.to_str().unwrap()]).contains(two.path().to_str().unwrap()));
        drop(disk);
        let error = backend.create(&one, &id("1"), &RootPolicy::Persistent.into()).unwrap_err();
        assert!(matches!(error, Error::OtherBaseDisk { .. }), "{error}");
        // The same content at another place, and the old one is gone.
        let moved = BaseDisk::new(two.digest(), dir.path().join("moved"), DiskFormat::Raw);
        fs::rename(two.path(), moved.path()).unwrap();
        let disk = backend.create(&moved, &id("1"), &RootPolicy::Persistent.into()).unwrap();
        assert!(disk.attach().is_err(), "what the disk says is behind it is not there");
        let holder = Holder::of_file(&device.path, "raw");
        assert_eq!(disk.on_base().unwrap().rebase(&moved, Rebase::Unchecked).unwrap_err().kind(), ErrorKind::Busy);
        drop(holder);
        disk.on_base().unwrap().rebase(&moved, Rebase::Unchecked).unwrap();
        io(&disk.attach().unwrap(), &["read -P 9 1M 64k", "read -P 7 0 1M"]);
        assert_eq!(check(&device), (0, 0));
    });
}

#[test]
fn killed_while_it_is_put_on_another_base_a_disk_is_on_one_of_both() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (base(dir.path(), "one", 7), base(dir.path(), "two", 8));
        let kept = RootPolicy::Persistent.into();
        let mut found = [0, 0];
        for after in 1.. {
            drop(qcow2(dir.path()).create(&one, &id("1"), &kept).unwrap());
            let (at, to) = (dir.path().to_path_buf(), two.clone());
            let of = one.clone();
            let run = traced::run(Some(after), Counted::Lasting, LIMIT, move || {
                let disk = qcow2(&at).create(&of, &id("1"), &RootPolicy::Persistent.into()).unwrap();
                disk.on_base().unwrap().rebase(&to, Rebase::Unchecked).unwrap();
                0
            });
            let end = run.unwrap().end;
            let backend = qcow2(dir.path());
            let on: Vec<_> = [&one, &two]
                .into_iter()
                .map(|base| backend.create(base, &id("1"), &kept).map(|disk| (disk, base)))
                .collect();
            let [on_one, on_two] = <[_; 2]>::try_from(on).unwrap();
            let (which, (disk, base)) = match (on_one, on_two) {
                (Ok(one), Err(Error::OtherBaseDisk { .. })) => (0, one),
                (Err(Error::OtherBaseDisk { .. }), Ok(two)) => (1, two),
                both => panic!("after call {after} ({end:?}): {both:?}"),
            };
            found[which] += 1;
            let mut byte = [0];
            File::open(base.path()).unwrap().read_exact_at(&mut byte, 0).unwrap();
            io(&disk.attach().unwrap(), &[&format!("read -P {} 0 64k", byte[0])]);
            drop(disk);
            backend.remove(&id("1")).unwrap();
            match end {
                End::Killed(_) => {}
                End::Returned(0) => break,
                other => panic!("after call {after}: {other:?}"),
            }
        }
        assert!(found.iter().all(|times| *times > 1), "killed on both sides: {found:?}");
    });
}
