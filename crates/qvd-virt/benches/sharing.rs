//! What it costs when many guests read the same: eight of them read the same 100 MB
//! of their base, which they have as memory (DAX), and then as a disk.
//!
//! Takes root, the test bed (`target/bed`) and `QVD_INIT`; `QVD_BENCH_GUESTS` sets
//! how many. See docs/vms.md.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, clippy::print_stderr, dead_code, unreachable_pub)]

#[path = "../tests/vm/bed.rs"]
mod bed;
#[path = "../tests/vm/guest.rs"]
mod guest;

use std::{fs::File, os::fd::AsFd as _};

use qvd_core::Bytes;
use qvd_guest::Base;
use qvd_sys::map::SharedMap;
use qvd_virt::vm::BaseDevice;

use crate::guest::{Guest, Guests, with_guests_of};

/// What each reads.
const READ_MIB: u64 = 100;

/// Room for a kernel and for all of that as a guest's own cache.
const MEMORY: Bytes = Bytes::mib(224);

/// What is in use at a moment, in MiB.
#[derive(Debug, Clone, Copy)]
struct Use {
    /// Of the base, in the host's page cache.
    base: u64,
    /// What would be free if the machines ended.
    private: u64,
    /// What the guests' kernels keep of files, all together.
    cached: u64,
}

fn main() {
    let count = std::env::var("QVD_BENCH_GUESTS").ok().and_then(|text| text.parse().ok()).unwrap_or(8);
    with_guests_of(READ_MIB, |guests| {
        println!("{count} guests read the same {READ_MIB} MiB. In MiB, of all together, and what reading added:");
        println!("| base | | in the host's page cache | machines' own | host's memory | guests' page cache |");
        println!("|---|---|---|---|---|---|");
        for (name, device) in [("memory", BaseDevice::Pmem), ("disk", BaseDevice::Block)] {
            measure(guests, count, name, device);
        }
    });
}

fn measure(guests: &Guests<'_>, count: u32, name: &str, device: BaseDevice) {
    let base = File::options().read(true).write(true).open(guests.base()).unwrap();
    base.sync_all().unwrap();
    rustix::fs::fadvise(&base, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let map = SharedMap::new(base.as_fd(), usize::try_from(base.metadata().unwrap().len()).unwrap(), false).unwrap();
    let seen_as = if device == BaseDevice::Pmem { Base::Memory } else { Base::Disk };
    let machines: Vec<_> = (1..=count)
        .map(|number| {
            let mut spec = guests.spec(number);
            spec.limits.memory = MEMORY;
            spec.base.as_mut().unwrap().device = device;
            guests.boot_from(seen_as, guests.bed.qemu.start(spec).unwrap())
        })
        .collect();
    // What runs the reader is read and translated before, so that only the file counts.
    for machine in &machines {
        machine.sh("head -c 1 /root/file | wc -c");
    }
    let before = look(&machines, &map);
    for machine in &machines {
        assert_eq!(machine.sh("cat /root/file | wc -c"), (READ_MIB << 20).to_string());
    }
    let after = look(&machines, &map);
    for (when, seen) in [("before", before), ("after", after)] {
        let Use { base, private, cached } = seen;
        println!("| {name} | {when} | {base} | {private} | {} | {cached} |", base + private);
    }
    let added = |of: fn(Use) -> u64| i128::from(of(after)) - i128::from(of(before));
    println!(
        "| {name} | added | {} | {} | **{}** | **{}** |",
        added(|seen| seen.base),
        added(|seen| seen.private),
        added(|seen| seen.base + seen.private),
        added(|seen| seen.cached),
    );
    machines.into_iter().for_each(Guest::close);
}

fn look(machines: &[Guest], base: &SharedMap) -> Use {
    let private: u64 = machines.iter().map(|machine| machine.vm.host_memory().unwrap().private.get()).sum();
    let cached: u64 = machines.iter().map(|machine| machine.stats().memory.unwrap().cached).sum();
    Use { base: base.resident_bytes().unwrap() as u64 >> 20, private: private >> 20, cached: cached >> 20 }
}
