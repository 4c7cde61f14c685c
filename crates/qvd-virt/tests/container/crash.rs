//! A process that starts and ends a container is killed anywhere in between.

use std::{fs, sync::Arc, time::Duration};

use qvd_sys::process::traced::{self, Counted, End};
use qvd_testkit::privileged;
use qvd_virt::Runtime;

use crate::{bed::Bed, lifecycle::NEEDS};

const LIMIT: Duration = Duration::from_secs(60);
/// More calls than any start and end takes.
const CALLS_MAX: u32 = 1000;

/// Starts a container, finds out how it is confined and ends it.
fn live(bed: &Bed) {
    let runtime = Runtime::new(bed.instance).unwrap();
    let (theirs, _ours) = std::io::pipe().unwrap();
    let mut spec = bed.spec(1, &["/bin/sh", "-c", "read line"]);
    spec.fds.push(qvd_virt::InheritedFd { number: 0, fd: theirs.into() });
    let mut container = runtime.prepare(spec).unwrap().start().unwrap();
    container.enforced().unwrap();
    container.close().unwrap();
}

#[test]
fn whatever_a_killed_process_leaves_is_swept_and_can_be_started_anew() {
    privileged(NEEDS, || {
        let bed = Arc::new(Bed::new());
        let mut points = 0;
        for after in 1..CALLS_MAX {
            let theirs = Arc::clone(&bed);
            let run = traced::run(Some(after), Counted::Lasting, LIMIT, move || {
                live(&theirs);
                0
            });
            let end = run.unwrap().end;
            // What the next process does, which knows of no desktop.
            let runtime = Runtime::new(bed.instance).unwrap();
            runtime.sweep(&[]).unwrap_or_else(|error| panic!("after call {after} ({end:?}): {error}"));
            bed.assert_empty();
            match end {
                End::Killed(_) => points += 1,
                End::Returned(0) => break,
                other => panic!("after call {after}: {other:?}"),
            }
            if after % 8 == 0 {
                bed.sh(1, "true");
            }
        }
        assert!(points > 30, "{points}");
        bed.sh(1, "true");
        assert!(fs::exists(bed.tree.path()).unwrap());
    });
}
