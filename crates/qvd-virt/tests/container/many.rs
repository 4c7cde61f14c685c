//! Many starts and ends, several at a time: nothing grows.

use std::{fs, thread};

use qvd_testkit::privileged;
use qvd_virt::Exit;

use crate::{
    bed::{Bed, SOON},
    lifecycle::NEEDS,
};

const THREADS: u32 = 8;

/// What a process has that a leak would add to.
#[derive(Debug)]
struct Holds {
    descriptors: usize,
    threads: usize,
    resident_kib: u64,
}

impl Holds {
    fn now() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        Self {
            descriptors: fs::read_dir("/proc/self/fd").unwrap().count(),
            threads: fs::read_dir("/proc/self/task").unwrap().count(),
            resident_kib: resident.trim().trim_end_matches(" kB").parse().unwrap(),
        }
    }
}

/// Each thread starts and ends its own number again and again.
fn cycle(bed: &Bed, each: u32) {
    thread::scope(|scope| {
        for number in 1..=THREADS {
            scope.spawn(move || {
                for turn in 0..each {
                    let script = format!("exit {}", turn % 7);
                    let spec = bed.spec(number, &["/bin/sh", "-c", &script]);
                    let mut container = bed.runtime.prepare(spec).unwrap().start().unwrap();
                    // Half of them are ended before anybody asks how they ended.
                    if turn % 2 == 0 {
                        let code = i32::try_from(turn % 7).unwrap();
                        assert_eq!(container.wait(SOON).unwrap(), Some(Exit::Code(code)));
                    }
                    container.close().unwrap();
                }
            });
        }
    });
}

fn nothing_grows(cycles: u32) {
    privileged(NEEDS, || {
        let bed = Bed::new();
        cycle(&bed, 5);
        let before = Holds::now();
        cycle(&bed, cycles / THREADS);
        let after = Holds::now();
        assert_eq!(after.descriptors, before.descriptors);
        // A thread that was waited for is listed a moment longer.
        assert!(after.threads <= before.threads + THREADS as usize, "{before:?} became {after:?}");
        // What eight new threads and their allocators may differ by.
        assert!(after.resident_kib < before.resident_kib + 4096, "{before:?} became {after:?}");
        bed.assert_empty();
    });
}

#[test]
fn nothing_grows_with_some_hundred_starts() {
    nothing_grows(320);
}

#[test]
#[ignore = "takes minutes"]
fn nothing_grows_with_ten_thousand_starts() {
    nothing_grows(10_000);
}
