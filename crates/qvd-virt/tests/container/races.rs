//! Somebody who can write to the root exchanges directories for links while
//! containers start on it.

use std::{
    fs,
    os::{
        fd::AsFd,
        unix::fs::{chown, symlink},
    },
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

use qvd_sys::mount::{clone_dir, in_private_namespace, open_dir_path};
use qvd_testkit::privileged;
use qvd_virt::{ContainerMount, Error};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::{
    bed::{Bed, SOON},
    lifecycle::NEEDS,
};

/// Starts for each directory that is exchanged.
const STARTS: u32 = 25;

#[test]
fn whoever_swaps_directories_for_links_gains_nothing() {
    privileged(NEEDS, || {
        // A mount table that nobody else changes meanwhile.
        in_private_namespace(|| {
            for name in ["home", "dev", "proc", "sys", "tmp"] {
                race(name);
            }
        })
        .unwrap();
    });
}

fn race(name: &str) {
    let table = || fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let bed = Bed::new();
    let victim = tempfile::tempdir().unwrap();
    chown(victim.path(), Some(bed.ids.base()), Some(bed.ids.base())).unwrap();
    let home = tempfile::tempdir().unwrap();
    for dir in ["home", "dev", "proc", "sys", "tmp"] {
        fs::create_dir(bed.path(dir)).unwrap();
        chown(bed.path(dir), Some(bed.ids.base()), Some(bed.ids.base())).unwrap();
    }
    let trap = bed.path("trap");
    symlink(victim.path(), &trap).unwrap();
    let (before, stop, swaps) = (table(), AtomicBool::new(false), AtomicU64::new(0));
    let (mut started, mut refused) = (0, 0);
    thread::scope(|scope| {
        scope.spawn(|| {
            let target = bed.path(name);
            while !stop.load(Ordering::Relaxed) {
                renameat_with(CWD, &target, CWD, &trap, RenameFlags::EXCHANGE).unwrap();
                swaps.fetch_add(1, Ordering::Relaxed);
                thread::yield_now();
            }
        });
        for _ in 0..STARTS {
            // Everything below is missing each time.
            for at in [bed.path("home/user"), bed.path("trap/user")] {
                let _absent = fs::remove_dir(at.join("a")).and_then(|()| fs::remove_dir(at));
            }
            let mut spec = bed.spec(1, &["/bin/sh", "-c", "true"]);
            let mount = clone_dir(open_dir_path(home.path()).unwrap().as_fd()).unwrap();
            spec.mounts.push(ContainerMount { target: PathBuf::from("/home/user/a"), mount });
            match bed.runtime.prepare(spec).and_then(|prepared| prepared.start()) {
                Ok(mut container) => {
                    container.wait(SOON).unwrap().expect("it ends");
                    container.close().unwrap();
                    started += 1;
                }
                Err(Error::Invalid { what, .. }) => {
                    assert!(what.contains(name), "{what}");
                    refused += 1;
                }
                Err(Error::Start { .. } | Error::Io { .. }) => refused += 1,
                Err(other) => panic!("{name}: {other}"),
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(started + refused, STARTS);
    assert!(swaps.into_inner() > u64::from(STARTS), "nobody raced");
    assert_eq!(fs::read_dir(victim.path()).unwrap().count(), 0, "{name}: made something on the host");
    assert_eq!(table(), before, "{name}: mounted something on the host");
    bed.assert_empty();
}
