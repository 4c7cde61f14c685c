//! The host's file system fills while a guest writes: its machine stands still, says
//! why, and goes on when there is room.

use std::{
    fs::{self, File},
    io::Write as _,
    os::fd::OwnedFd,
    process::{Command, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use qvd_core::Bytes;
use qvd_sys::mount::{FsContext, Restrictions};
use qvd_virt::{
    Error,
    vm::{DiskFormat, DiskSpec, Slot, StopLimits, StoppedBy, VmState},
};
use rustix::fs::{Mode, OFlags, openat};

use crate::{
    bed::{SOON, wait_for},
    guest::{Guest, Guests, with_guests},
};

/// A file system of 6 MiB that nobody else sees, and in it a disk that may become
/// larger than that, with 4 MiB of something else beside it.
struct Small {
    fs: OwnedFd,
}

impl Small {
    fn new() -> Self {
        let context = FsContext::open("tmpfs").unwrap();
        context.set("size", "6m").unwrap();
        let small = Self { fs: context.mount(Restrictions::default()).unwrap() };
        File::from(small.file("filler")).write_all(&vec![1; 4 << 20]).unwrap();
        small
    }

    fn file(&self, name: &str) -> OwnedFd {
        openat(&self.fs, name, OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC, Mode::from_raw_mode(0o600)).unwrap()
    }

    fn make_room(&self) {
        rustix::fs::ftruncate(self.file("filler"), 0).unwrap();
    }

    /// A disk of 16 MiB, of which there is nothing yet.
    fn disk(&self, guests: &Guests<'_>, name: &str) -> DiskSpec {
        let made = guests.path(name);
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2"]).arg(&made).arg("16M");
        assert!(create.stdout(Stdio::null()).status().unwrap().success());
        let file = self.file(name);
        std::io::copy(&mut File::open(&made).unwrap(), &mut File::from(file.try_clone().unwrap())).unwrap();
        DiskSpec { serial: name.to_owned(), file, format: DiskFormat::Qcow2 { backing: None } }
    }
}

/// Has the guest write 3 MiB to a disk, more than there is room for.
fn write(guest: &Guest, serial: &str) {
    let find = format!("d=$(grep -lx {serial} /sys/block/*/serial); d=${{d#/sys/block/}}; d=/dev/${{d%/serial}}");
    let work = format!("{{ {find}; yes {serial} | head -c 3145728 >$d; sync; echo $d >/run/{serial}; }}");
    guest.sh(&format!("{work} >/dev/null 2>&1 </dev/null &"));
}

/// Waits until all of it is on the disk, and reads it again.
fn written(guest: &Guest, serial: &str) {
    let deadline = Instant::now() + SOON;
    while guest.try_sh(&format!("ls /run/{serial}")).0 != qvd_guest::Exit::Code(0) {
        assert!(Instant::now() < deadline, "{serial} is not written");
        std::thread::sleep(Duration::from_millis(100));
    }
    let lines = 3_145_728 / (serial.len() + 1);
    let read = guest.sh(&format!("head -c 3145728 $(cat /run/{serial}) | grep -cx {serial}"));
    assert_eq!(read, lines.to_string(), "{serial}");
}

#[test]
fn a_machine_whose_disk_cannot_grow_stands_still_and_goes_on_when_there_is_room() {
    with_guests(|guests| {
        let small = Small::new();
        let mut spec = guests.spec(1);
        spec.disks.push(small.disk(guests, "own"));
        let vm = guests.bed.qemu.start(spec).unwrap();
        let mut guest = guests.boot(vm);

        write(&guest, "own");
        wait_for(&mut guest.vm, |state| state == VmState::Full);
        // There still is none: it stands still again, however often it is told to go on.
        for _ in 0..2 {
            guest.vm.resume().unwrap();
            wait_for(&mut guest.vm, |state| state == VmState::Full);
        }
        // Whoever adopts it is told too.
        let mut guest = guest.adopted_asleep(guests);
        assert_eq!(guest.vm.state(), VmState::Full);
        let room = || guest.vm.room().unwrap().unwrap();
        assert!(room() < Bytes::mib(1), "{}", room());
        small.make_room();
        assert!(room() >= Bytes::mib(4), "{}", room());
        guest.vm.resume().unwrap();
        assert_eq!(guest.vm.state(), VmState::Running);
        guest.reconnect();
        written(&guest, "own");
        // Its clock stood still, too, and is set; here to a day that has not come.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let later = now + 86_400;
        guest.set_clock(later * 1_000_000_000);
        let clock: u64 = guest.sh("busybox date +%s").parse().unwrap();
        assert!((later..later + 3600).contains(&clock), "{clock} is not a day after {now}");

        // The same for a disk that is plugged in later, on a file system of its own; and its
        // end is an end, whatever the guest still wanted.
        let other = Small::new();
        guest.vm.plug_disk(Slot::First, &other.disk(guests, "later")).unwrap();
        guest.sh("until grep -qx later /sys/block/*/serial; do sleep 0.1; done");
        write(&guest, "later");
        wait_for(&mut guest.vm, |state| state == VmState::Full);
        let limits = StopLimits { guest: Duration::ZERO, button: Duration::ZERO };
        assert_eq!(guest.vm.stop(limits, || false).unwrap(), StoppedBy::Kill);
        assert!(guest.vm.wait(SOON).unwrap().is_some());
        guest.close();
    });
}

#[test]
fn a_base_that_was_cut_short_is_refused_by_name() {
    with_guests(|guests| {
        let spec = guests.spec(1);
        let base = File::options().write(true).open(guests.base()).unwrap();
        base.set_len(fs::metadata(guests.base()).unwrap().len() / 2).unwrap();
        let error = guests.bed.qemu.start(spec).unwrap_err();
        assert!(matches!(&error, Error::Invalid { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("for desktop 1") && text.contains("shorter than it was"), "{text}");
    });
}
