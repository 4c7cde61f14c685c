//! Roots as btrfs snapshots, on a btrfs made for the test.
#![allow(clippy::unwrap_used)]

mod scratch;

use std::{fs, io::Seek, os::fd::AsFd, os::unix::fs::MetadataExt, time::Duration};

use qvd_core::{Bytes, RootPolicy};
use qvd_storage::{Btrfs, Capability, Error, ErrorKind, Place, Quota, RootBackend, RootOptions};
use qvd_sys::btrfs;
use qvd_testkit::{Need, privileged};
use scratch::{base, fill, id, kept, on, path, read, userns, volatile};

const NEEDS: &[Need] = &[
    Need::Root,
    Need::LoopDevices,
    Need::UserNamespaces,
    Need::Filesystem("btrfs"),
    Need::Filesystem("overlay"),
    Need::Program("mkfs.btrfs"),
    Need::Program("btrfs"),
];

fn backend(at: &std::path::Path) -> Btrfs {
    Btrfs::new(Place::open(&at.join("store")).unwrap())
}

#[test]
fn roots_are_apart_kept_or_forgotten_and_noticed_when_used() {
    privileged(NEEDS, || {
        on("btrfs", &[], |at| {
            let (backend, base) = (backend(at), base(at));
            let capabilities = backend.capabilities().unwrap();
            assert!(capabilities.works(), "{capabilities:?}");
            assert!(capabilities.get(Capability::IdMapped).is_yes(), "{capabilities:?}");
            assert!(!capabilities.get(Capability::QuotaBytes).is_yes());
            let mut one = backend.create(&base, &id("one"), &kept()).unwrap();
            let other = backend.create(&base, &id("other"), &volatile()).unwrap();
            let userns = userns();
            let (mine, theirs) = (one.mount(Some(userns.as_fd())).unwrap(), other.mount(None).unwrap());
            assert_eq!(read(&mine, "etc/f"), "from the image");
            assert_eq!(fs::metadata(path(&mine, "home/mine")).unwrap().uid(), qvd_core::UidRange::FIRST + 1000);
            fs::write(path(&theirs, "etc/f"), "changed").unwrap();
            assert_eq!(read(&mine, "etc/f"), "from the image");
            assert_eq!(fs::read_to_string(at.join("base/etc/f")).unwrap(), "from the image");
            for refused in [backend.remove(&id("one")), one.mount(None).map(drop), backend.remove(&id("other"))] {
                assert_eq!(refused.unwrap_err().kind(), ErrorKind::Busy);
            }
            drop(theirs);
            let theirs = other.mount(None).unwrap();
            assert_eq!(read(&theirs, "etc/f"), "from the image");
            drop((mine, theirs, other));
            one.close().unwrap();
            let found = [(id("one"), RootPolicy::Persistent), (id("other"), RootPolicy::Volatile)];
            assert_eq!(backend.roots().unwrap(), found);
            for name in ["one", "other", "absent"] {
                backend.remove(&id(name)).unwrap();
            }
            assert_eq!(backend.roots().unwrap(), []);
        });
    });
}

#[test]
fn a_desktop_makes_no_subvolume_and_one_made_outside_does_not_hinder() {
    privileged(NEEDS, || {
        on("btrfs", &[], |at| {
            let (backend, base) = (backend(at), base(at));
            let root = backend.create(&base, &id("one"), &kept()).unwrap();
            let mount = root.mount(None).unwrap();
            let inside = fs::File::open(path(&mount, "etc")).unwrap();
            let error = btrfs::create_subvolume(inside.as_fd(), c"escape").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(25), "ENOTTY");
            drop((inside, mount));
            let below = fs::File::open(at.join("store/roots/one/upper/etc")).unwrap();
            btrfs::create_subvolume(below.as_fd(), c"inner").unwrap();
            let inner = fs::File::open(at.join("store/roots/one/upper/etc/inner")).unwrap();
            btrfs::create_subvolume(inner.as_fd(), c"innermost").unwrap();
            backend.remove(&id("one")).unwrap();
            assert!(!at.join("store/roots/one").exists());
        });
    });
}

#[test]
fn a_quota_holds_once_it_is_switched_on() {
    privileged(NEEDS, || {
        on("btrfs", &[], |at| {
            let (backend, base) = (backend(at), base(at));
            let quota = Quota { bytes: Some(Bytes::mib(8)), inodes: None };
            let options = RootOptions { quota, ..volatile() };
            let error = backend.create(&base, &id("one"), &options).unwrap_err();
            assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains("switched on"), "{error}");
            assert_eq!(backend.roots().unwrap(), []);
            backend.enable_simple_quota().unwrap();
            backend.enable_simple_quota().unwrap();
            assert!(backend.capabilities().unwrap().get(Capability::QuotaBytes).is_yes());
            for _ in 0..2 {
                let mut root = backend.create(&base, &id("one"), &options).unwrap();
                // The second mount is of a snapshot made anew: it has the limit too.
                for _ in 0..2 {
                    let mount = root.mount(None).unwrap();
                    let (written, error) = fill(&path(&mount, "big"), 64 << 20);
                    assert_eq!(error, Some(122), "EDQUOT after {written} bytes");
                    assert!((4 << 20..=8 << 20).contains(&written), "{written}");
                }
                root.close().unwrap();
            }
            let inodes = RootOptions { quota: Quota { inodes: Some(100), ..quota }, ..volatile() };
            assert_eq!(backend.create(&base, &id("one"), &inodes).unwrap_err().kind(), ErrorKind::Unsupported);
        });
    });
}

#[test]
fn a_root_is_copied_and_sent_while_in_use() {
    privileged(NEEDS, || {
        on("btrfs", &[], |at| {
            let (backend, base) = (backend(at), base(at));
            let root = backend.create(&base, &id("one"), &kept()).unwrap();
            let mount = root.mount(None).unwrap();
            fs::write(path(&mount, "etc/f"), "mine").unwrap();
            let snapshots = backend.snapshots().unwrap();
            snapshots.snapshot(&id("one"), &id("copy")).unwrap();
            assert!(matches!(snapshots.snapshot(&id("one"), &id("copy")), Err(Error::RootExists(_))));
            assert!(matches!(snapshots.snapshot(&id("absent"), &id("new")), Err(Error::NoSuchRoot(_))));
            let mut stream = tempfile::tempfile().unwrap();
            backend.send(&id("one"), stream.as_fd()).unwrap();
            stream.rewind().unwrap();
            fs::write(path(&mount, "etc/f"), "later").unwrap();
            let minute = Duration::from_secs(60);
            backend.receive(&base, &id("received"), stream.into(), minute).unwrap();
            for name in ["copy", "received"] {
                let copy = backend.create(&base, &id(name), &kept()).unwrap();
                let mounted = copy.mount(None).unwrap();
                assert_eq!(read(&mounted, "etc/f"), "mine", "{name}");
                // Exclusive like the original.
                assert_eq!(copy.mount(None).unwrap_err().kind(), ErrorKind::Busy);
                fs::write(path(&mounted, "etc/f"), "the copy's").unwrap();
                assert_eq!(read(&mount, "etc/f"), "later");
            }
            let nonsense = tempfile::tempfile().unwrap();
            fs::write(at.join("nonsense"), "no stream").unwrap();
            let error = backend.receive(&base, &id("new"), nonsense.into(), minute).unwrap_err();
            assert!(matches!(error, Error::Program { .. } | Error::Io { .. }), "{error}");
            let error = backend.receive(&base, &id("new"), fs::File::open(at.join("nonsense")).unwrap().into(), minute);
            assert!(matches!(error, Err(Error::Program { .. })), "{error:?}");
            assert_eq!(backend.roots().unwrap().len(), 3);
            let left = fs::read_dir(at.join("store/roots")).unwrap().map(|entry| entry.unwrap().file_name());
            assert_eq!(left.filter(|name| name.as_encoded_bytes().starts_with(b".")).count(), 0);
        });
    });
}

#[test]
fn half_a_base_or_root_is_made_again() {
    privileged(NEEDS, || {
        on("btrfs", &[], |at| {
            let (backend, base) = (backend(at), base(at));
            let bases = at.join("store/roots/BASES");
            fs::create_dir_all(&bases).unwrap();
            let dir = fs::File::open(&bases).unwrap();
            let half = format!("new-{}", base.digest().hex());
            btrfs::create_subvolume(dir.as_fd(), &std::ffi::CString::new(half.clone()).unwrap()).unwrap();
            fs::write(bases.join(&half).join("stray"), "").unwrap();
            let roots = fs::File::open(at.join("store/roots")).unwrap();
            btrfs::create_subvolume(roots.as_fd(), c".new-one").unwrap();
            let root = backend.create(&base, &id("one"), &volatile()).unwrap();
            assert_eq!(read(&root.mount(None).unwrap(), "etc/link"), "from the image");
            assert!(!bases.join(half).exists() && !at.join("store/roots/.new-one").exists());
            let made = fs::File::open(bases.join(base.digest().hex())).unwrap();
            assert!(btrfs::is_read_only(made.as_fd()).unwrap());
        });
    });
}

#[test]
fn another_file_system_is_told_apart() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let backend = backend(dir.path());
        assert!(!backend.capabilities().unwrap().works());
        let error = backend.create(&base(dir.path()), &id("one"), &volatile()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("no btrfs"), "{error}");
        assert_eq!(backend.roots().unwrap(), []);
    });
}
