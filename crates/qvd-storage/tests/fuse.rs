//! Roots that programs serve over FUSE.
#![allow(clippy::unwrap_used, clippy::panic)]

mod scratch;

use std::{
    fs,
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt, chown},
    },
    path::Path,
};

use qvd_core::{RootPolicy, UidRange};
use qvd_storage::{Capability, Error, ErrorKind, Fuse, Place, Root, RootBackend};
use qvd_sys::process::Process;
use qvd_testkit::{Census, Need, Scope, privileged};
use rustix::process::Signal;
use scratch::{base, id, kept, path, read, userns, volatile};

const NEEDS: &[Need] = &[
    Need::Root,
    Need::UserNamespaces,
    Need::Filesystem("fuse"),
    Need::Program("fuse-overlayfs"),
    Need::Program("unionfs-fuse"),
];

/// Runs `test` in a directory with each program, and demands that no process stays.
fn in_place(test: impl Fn(&Path, &Fuse)) {
    privileged(NEEDS, || {
        for make in [Fuse::overlay, Fuse::unionfs] {
            let dir = tempfile::tempdir().unwrap();
            let census = Census::take(&Scope::marked([dir.path().file_name().unwrap().to_str().unwrap()]));
            let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
            test(dir.path(), &make(Place::open(&dir.path().join("store")).unwrap()));
            assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap(), mounts);
            census.assert_unchanged();
        }
    });
}

/// The process that serves the root `one`.
fn server(at: &Path) -> (u32, String) {
    let note = fs::read(at.join("store/roots/one/server.json")).unwrap();
    let note: serde_json::Value = serde_json::from_slice(&note).unwrap();
    (note["pid"].as_u64().unwrap().try_into().unwrap(), note["program"].as_str().unwrap().to_owned())
}

fn kill(pid: u32) {
    Process::open(pid).unwrap().signal(Signal::KILL).unwrap();
}

/// Waits until the death of a root's program is known.
fn death(root: &dyn Root) -> Error {
    for _ in 0..2000 {
        if let Err(error) = root.check() {
            return error;
        }
        std::thread::park_timeout(std::time::Duration::from_millis(5));
    }
    panic!("nobody noticed");
}

#[test]
fn roots_are_apart_kept_or_forgotten_and_noticed_when_used() {
    in_place(|at, backend| {
        let capabilities = backend.capabilities().unwrap();
        assert!(capabilities.works(), "{capabilities:?}");
        assert!(!capabilities.get(Capability::SharedMmaps).is_yes());
        let base = base(at);
        let mut one = backend.create(&base, &id("one"), &kept()).unwrap();
        let mut other = backend.create(&base, &id("other"), &volatile()).unwrap();
        let (mine, theirs) = (one.mount(None).unwrap(), other.mount(None).unwrap());
        fs::write(path(&theirs, "etc/f"), "changed").unwrap();
        fs::write(path(&mine, "etc/new"), "kept").unwrap();
        fs::remove_file(path(&mine, "usr/bin/tool")).unwrap();
        assert_eq!((read(&mine, "etc/f").as_str(), read(&theirs, "etc/f").as_str()), ("from the image", "changed"));
        assert_eq!(fs::read_to_string(at.join("base/etc/f")).unwrap(), "from the image");
        for refused in [backend.remove(&id("one")), one.mount(None).map(drop), other.close()] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Busy);
        }
        drop((mine, theirs));
        assert_eq!(read(&other.mount(None).unwrap(), "etc/f"), "from the image", "a volatile one begins anew");
        other.close().unwrap();
        one.check().unwrap();
        one.close().unwrap();
        assert_eq!(backend.roots().unwrap(), [(id("one"), RootPolicy::Persistent)]);
        let again = backend.create(&base, &id("one"), &kept()).unwrap();
        let mount = again.mount(None).unwrap();
        assert_eq!(read(&mount, "etc/new"), "kept");
        assert!(!path(&mount, "usr/bin/tool").exists());
        drop(mount);
        backend.remove(&id("one")).unwrap();
        backend.remove(&id("one")).unwrap();
        assert_eq!(backend.roots().unwrap(), []);
    });
}

#[test]
fn owners_are_shifted_and_the_program_is_nobody_on_the_host() {
    in_place(|at, backend| {
        assert!(backend.capabilities().unwrap().get(Capability::IdMapped).is_yes());
        let (base, userns) = (base(at), userns());
        let mut root = backend.create(&base, &id("one"), &volatile()).unwrap();
        let mount = root.mount(Some(userns.as_fd())).unwrap();
        let first = UidRange::FIRST;
        assert_eq!(fs::metadata(path(&mount, "home/mine")).unwrap().uid(), first + 1000);
        fs::write(path(&mount, "home/mine"), "written").unwrap();
        chown(path(&mount, "etc/f"), Some(first + 7), Some(first + 8)).unwrap();
        let upper = at.join("store/roots/one/files/upper");
        assert_eq!(fs::metadata(upper.join("home/mine")).unwrap().uid(), 1000, "on disk nothing is shifted");
        let owned = fs::metadata(upper.join("etc/f")).unwrap();
        assert_eq!((owned.uid(), owned.gid()), (7, 8));
        let status = fs::read_to_string(format!("/proc/{}/status", server(at).0)).unwrap();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        assert_eq!(field("Uid:"), [first.to_string().as_str(); 4].join("\t"));
        assert_eq!(field("NoNewPrivs:"), "1");
        // What the kernel lets it see of the host.
        let seen = fs::read_dir(format!("/proc/{}/root", server(at).0)).unwrap();
        let mut seen: Vec<_> = seen.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        seen.retain(|name| !name.starts_with("lib"));
        seen.sort();
        assert_eq!(seen, ["base", "dev", "files", "mnt", "proc", "usr"]);
        drop(mount);
        root.close().unwrap();
    });
}

#[test]
fn a_dead_program_is_noticed_and_named_and_nobody_hangs() {
    in_place(|at, backend| {
        let base = base(at);
        let mut root = backend.create(&base, &id("one"), &kept()).unwrap();
        let mount = root.mount(None).unwrap();
        fs::write(path(&mount, "etc/new"), "kept").unwrap();
        root.check().unwrap();
        let (pid, program) = server(at);
        kill(pid);
        let said = death(root.as_ref()).to_string();
        assert_eq!(said, format!("root one is dead: {program} (process {pid}) was killed by signal 9"));
        // ENOTCONN, also for who opens something new.
        assert_eq!(fs::read(path(&mount, "etc/f")).unwrap_err().raw_os_error(), Some(107));
        // The dead mount is in nobody's way.
        let again = root.mount(None).unwrap();
        assert_eq!(read(&again, "etc/new"), "kept");
        root.check().unwrap();
        drop((mount, again));
        root.close().unwrap();
        backend.remove(&id("one")).unwrap();
    });
}

#[test]
fn a_program_outlives_its_starter_and_is_found_again() {
    in_place(|at, backend| {
        let base = base(at);
        let first = backend.create(&base, &id("one"), &volatile()).unwrap();
        let mount = first.mount(None).unwrap();
        drop(first);
        // What a process that was started anew knows.
        let place = || Place::open(&at.join("store")).unwrap();
        let later = if backend.name() == "fuse" { Fuse::overlay(place()) } else { Fuse::unionfs(place()) };
        let mut found = later.create(&base, &id("one"), &volatile()).unwrap();
        assert_eq!(found.mount(None).unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!(later.remove(&id("one")).unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!(read(&mount, "etc/f"), "from the image");
        drop(mount);
        found.close().unwrap();
        assert_eq!(later.roots().unwrap(), []);
    });
}

#[test]
fn a_program_that_dies_is_named_to_processes_that_did_not_start_it() {
    in_place(|at, backend| {
        let base = base(at);
        let place = || Place::open(&at.join("store")).unwrap();
        let other = || if backend.name() == "fuse" { Fuse::overlay(place()) } else { Fuse::unionfs(place()) };
        let first = backend.create(&base, &id("one"), &kept()).unwrap();
        let mount = first.mount(None).unwrap();
        fs::write(path(&mount, "etc/new"), "kept").unwrap();
        let (pid, program) = server(at);
        // One that watches when it happens, and one that comes later.
        let watching = other();
        let watched = watching.create(&base, &id("one"), &kept()).unwrap();
        watched.check().unwrap();
        kill(pid);
        let said = death(watched.as_ref()).to_string();
        assert_eq!(said, format!("root one is dead: {program} (process {pid}) was killed by signal 9"));
        assert!(matches!(death(first.as_ref()), Error::ServerDied { .. }));
        let later = other();
        let mut found = later.create(&base, &id("one"), &kept()).unwrap();
        let said = found.check().unwrap_err().to_string();
        assert_eq!(said, format!("root one is dead: {program} (process {pid}) ended while nobody watched it"));
        // It can be mounted again beside the dead mount, and is as it was.
        let again = found.mount(None).unwrap();
        found.check().unwrap();
        assert_eq!(read(&again, "etc/new"), "kept");
        drop((mount, again));
        found.close().unwrap();
        found.check().unwrap();
        backend.remove(&id("one")).unwrap();
    });
}

#[test]
fn a_program_that_hangs_is_ended_with_its_last_mount() {
    in_place(|at, backend| {
        let root = backend.create(&base(at), &id("one"), &kept()).unwrap();
        let mount = root.mount(None).unwrap();
        let (pid, _) = server(at);
        Process::open(pid).unwrap().signal(Signal::STOP).unwrap();
        drop(mount);
        backend.remove(&id("one")).unwrap();
        assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
    });
}
