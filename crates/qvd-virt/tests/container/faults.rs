//! Every system call of a start and of an end fails once, by each error that
//! hosts have: what fails says so, and nothing is left.

use std::{fs, sync::Arc, time::Duration};

use qvd_sys::process::traced::{self, Counted, End};
use qvd_testkit::privileged;
use qvd_virt::{ContainerSpec, Error};

use crate::{
    bed::Bed,
    lifecycle::{NEEDS, whole},
};

const LIMIT: Duration = Duration::from_secs(150);

/// Each error, and after how many calls the next one fails by it: all for one
/// error, and for the others a stride that finds other calls each time.
const ERRORS: [(i32, u32); 5] =
    [(libc::EIO, 1), (libc::ENOMEM, 7), (libc::EPERM, 11), (libc::EMFILE, 13), (libc::ENOSPC, 17)];

/// Starts a container, asks what it is, and ends it; an end that fails is tried
/// again, as its owner would.
fn cycle(bed: &Bed, spec: ContainerSpec) -> Result<(), Error> {
    let prepared = bed.runtime.prepare(spec)?;
    prepared.netns()?;
    let mut container = prepared.start()?;
    container.record()?;
    container.enforced()?;
    let closed = container.close();
    if closed.is_err() {
        container.close().expect("nothing fails the second time");
    }
    closed
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// All of it, in a child that lives on after each failure as a node does.
/// Returns how many calls failed, and how many of these made no difference.
fn fail_every_call(bed: &Bed, errno: i32, stride: u32) -> (u32, u32) {
    let says = std::io::Error::from_raw_os_error(errno).to_string();
    let (mut tried, mut harmless) = (0, 0);
    for passing in (0..).step_by(stride as usize) {
        let (theirs, _ours) = std::io::pipe().unwrap();
        let mut spec = bed.spec(1, &["/bin/sh", "-c", "read line"]);
        spec.fds.push(qvd_virt::InheritedFd { number: 0, fd: theirs.into() });
        let before = descriptors();
        traced::fail_after(passing, errno).unwrap();
        let result = cycle(bed, spec);
        let Some(call) = traced::failed().unwrap() else {
            result.expect("without a failed call nothing fails");
            return (tried, harmless);
        };
        let place = format!("call {passing}, number {call}, failed: {says}");
        tried += 1;
        match result {
            Ok(()) => harmless += 1,
            Err(error) => assert!(whole(&error).contains(&says), "{place}, but one hears: {}", whole(&error)),
        }
        bed.assert_empty();
        // The reading end and nothing else went with the specification.
        assert_eq!(descriptors(), before - BROUGHT, "{place}");
    }
    unreachable!("a start ends")
}

/// Descriptors that a specification brings: root, program, standard input.
const BROUGHT: usize = 3;

#[test]
#[cfg(target_arch = "x86_64")]
fn every_call_fails_once_and_each_time_one_hears_why_and_nothing_is_left() {
    privileged(NEEDS, || {
        let bed = Arc::new(Bed::new());
        // The shared parts are made on the way.
        bed.sh(1, "true");
        for (errno, stride) in ERRORS {
            let theirs = Arc::clone(&bed);
            let run = traced::run(None, Counted::Every, LIMIT, move || {
                let (tried, harmless) = fail_every_call(&theirs, errno, stride);
                eprintln!("errno {errno}: {tried} calls failed, {harmless} of them made no difference");
                assert!(tried > 200 / stride && harmless * 3 < tried, "{tried} failed, {harmless} without effect");
                0
            });
            assert_eq!(run.unwrap().end, End::Returned(0), "errno {errno}");
            bed.assert_empty();
        }
        bed.sh(1, "true");
    });
}
