//! What starts leave of the process that makes them, whose memory the child shares
//! until it executes: all as it was.

use std::{
    fs, io,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use qvd_testkit::privileged;
use qvd_virt::{ContainerMount, Merging};
use rustix::process::{DumpableBehavior, dumpable_behavior};

use crate::{
    bed::{Bed, SOON},
    lifecycle::NEEDS,
};

/// Of ourselves, what the child changes of itself, or what is kept for a memory.
fn ourselves() -> String {
    let read = |name: &str| fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default();
    // The last is of all that the user runs.
    let changes = ["Vm", "Rss", "State", "Threads", "nonvoluntary", "voluntary", "Hugetlb", "FDSize", "SigQ"];
    let status = read("status");
    let status = status.lines().filter(|line| !changes.iter().any(|name| line.starts_with(name)));
    let merging = read("ksm_stat");
    let merging = merging.lines().filter(|line| line.contains("merg"));
    let (status, merging) = (status.collect::<Vec<_>>().join("\n"), merging.collect::<Vec<_>>().join("\n"));
    let numbers: Vec<_> = read("stat").split_ascii_whitespace().skip(3).take(3).map(str::to_owned).collect();
    let links = |dir: &str| {
        let entries = fs::read_dir(format!("/proc/self/{dir}")).unwrap().map(|entry| entry.unwrap().path());
        let mut links: Vec<_> =
            entries.filter_map(|path| Some(format!("{path:?} {:?}", fs::read_link(&path).ok()?))).collect();
        links.sort();
        links.join("\n")
    };
    let files = ["limits", "oom_score_adj", "cgroup", "uid_map", "personality", "coredump_filter"].map(read);
    let (cwd, root) = (fs::read_link("/proc/self/cwd").unwrap(), fs::read_link("/proc/self/root").unwrap());
    let hostname = rustix::system::uname().nodename().to_owned();
    format!(
        "{status}\n{merging}\nparent, group, session {numbers:?}\n{}\n{}\n{}\n{cwd:?} {root:?} {hostname:?}\n{:?}",
        files.join("\n"),
        links("fd").lines().count(),
        links("ns"),
        dumpable_behavior().unwrap(),
    )
}

/// What is put back is put back a moment after the child is gone or has executed.
fn wait_for(what: &str, so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < SOON, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_parent_is_as_it_was_after_each_kind_of_start() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        bed.sh(1, "true");
        wait_for("the first start is over", || dumpable_behavior().unwrap() == DumpableBehavior::Dumpable);
        let memory: Vec<u32> = (0..1 << 22).collect();
        let before = ourselves();
        let same = |what: &str| {
            wait_for(what, || dumpable_behavior().unwrap() == DumpableBehavior::Dumpable);
            assert_eq!(ourselves(), before, "{what}");
            assert!(memory.iter().zip(0..).all(|(place, number)| *place == number), "{what}");
        };
        bed.sh(1, "cd /tmp; umask 0; exit 0");
        same("a start");

        let prepared = bed.runtime.prepare(bed.spec(1, &["/bin/sh", "-c", "exit 0"])).unwrap();
        wait_for("the child is another user", || dumpable_behavior().unwrap() != DumpableBehavior::Dumpable);
        let score = |pid: &str| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        assert_ne!(score(&prepared.pid().to_string()), score("self"));
        drop(prepared);
        same("a start that was given up");

        let mut spec = bed.spec(1, &["/bin/sh", "-c", "exit 0"]);
        spec.profile.small_pages = true;
        bed.run_spec(spec);
        same("a start with small pages");

        if bed.runtime.can_merge() {
            let mut spec = bed.spec(1, &["/bin/sh", "-c", "exit 0"]);
            spec.profile.merging = Merging::All;
            bed.run_spec(spec);
            same("a start that offers its memory");
        }

        let mut spec = bed.spec(1, &["/bin/sh", "-c", "exit 0"]);
        fs::write(bed.path("file"), "is no program").unwrap();
        spec.program.file = fs::File::open(bed.path("file")).unwrap().into();
        bed.runtime.prepare(spec).unwrap().start().unwrap_err();
        same("a start that failed at its last step");

        let mut spec = bed.spec(1, &["/bin/sh", "-c", "exit 0"]);
        spec.mounts = vec![ContainerMount { target: "/nowhere/at/all".into(), mount: bed.root() }];
        let failed = bed.runtime.prepare(spec).and_then(qvd_virt::Prepared::start);
        drop(failed);
        same("a start with a mount that the image has no place for");
        bed.assert_empty();
    });
}

#[test]
fn threads_of_the_parent_keep_their_own_errors_during_starts() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                let mut looks = 0_u64;
                while !over.load(Ordering::Relaxed) {
                    fs::metadata("/nowhere").unwrap_err();
                    for _ in 0..1000 {
                        let error = io::Error::last_os_error();
                        assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "after {looks}");
                        looks += 1;
                    }
                }
            });
            for _ in 0..20 {
                bed.sh(1, "true");
            }
            over.store(true, Ordering::Relaxed);
            watcher.join().unwrap();
        });
        bed.assert_empty();
    });
}
