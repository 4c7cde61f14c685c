//! What is changed about a machine while its guest runs, as the guest sees it.

use std::{
    fs::{self, File},
    os::{fd::OwnedFd, unix::fs::FileExt as _},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use qvd_core::Bytes;
use qvd_sys::{netns, tap};
use qvd_virt::{
    Error,
    vm::{DiskFormat, DiskSpec, NicSpec, QmpError, Slot, StoppedBy, VmState},
};

use crate::{
    bed::SOON,
    guest::{Guest, Guests, with_guests},
};

/// Waits inside until `test` is true.
fn until(guest: &Guest, test: &str) {
    guest.sh(&format!("n=0; until {test}; do sleep 0.1; n=$((n+1)); [ $n -lt 600 ] || exit 1; done"));
}

fn qemu_img(guests: &Guests<'_>, arguments: &[&str]) -> String {
    let mut command = Command::new("qemu-img");
    let output = command.args(arguments).current_dir(guests.path("")).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "{arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn disk(guests: &Guests<'_>, name: &str, format: DiskFormat) -> DiskSpec {
    let file: OwnedFd = File::options().read(true).write(true).open(guests.path(name)).unwrap().into();
    DiskSpec { serial: name.to_owned(), file, format }
}

/// The guest's name of the disk with this serial number.
fn dev(serial: &str) -> String {
    format!("d=$(grep -lx {serial} /sys/block/*/serial); d=${{d#/sys/block/}}; d=/dev/${{d%/serial}}")
}

#[test]
fn disks_and_interfaces_come_and_go_while_the_guest_runs() {
    with_guests(|guests| {
        let raw = File::create(guests.path("plugged")).unwrap();
        raw.set_len(8 << 20).unwrap();
        raw.write_all_at(b"from the host", 0).unwrap();
        qemu_img(guests, &["create", "-q", "-f", "qcow2", "own", "16M"]);
        let mut spec = guests.spec(1);
        spec.screen = true;
        spec.disks.push(disk(guests, "own", DiskFormat::Qcow2 { backing: None }));
        let vm = guests.bed.qemu.start(spec).unwrap();
        let mut guest = guests.boot(vm);

        a_disk(guests, &mut guest);
        an_interface(&mut guest);
        its_own_disk(&mut guest);
        what_is_seen(&mut guest);
        its_memory(&mut guest);
        let mut guest = a_pause_and_an_adoption(guests, guest);

        assert_eq!(guest.stop(), StoppedBy::Guest);
        guest.close();
        let kept = qemu_img(guests, &["snapshot", "-l", "own"]);
        assert!(kept.contains("before") && !kept.contains("forgotten"), "{kept}");
        qemu_img(guests, &["snapshot", "-a", "before", "own"]);
        qemu_img(guests, &["convert", "-O", "raw", "own", "own.raw"]);
        assert!(fs::read(guests.path("own.raw")).unwrap().starts_with(b"first"));
    });
}

fn a_disk(guests: &Guests<'_>, guest: &mut Guest) {
    guest.vm.plug_disk(Slot::First, &disk(guests, "plugged", DiskFormat::Raw)).unwrap();
    until(guest, "grep -qx plugged /sys/block/*/serial");
    let read = guest.sh(&format!("{}; head -c 13 $d; echo -n 'from the guest' >$d; sync", dev("plugged")));
    assert_eq!(read, "from the host");

    // A place that is taken is refused, and what was begun is undone: the other
    // one takes it.
    let another = guests.path("another");
    let overlay = || {
        let file = File::open(guests.path("plugged")).unwrap().into();
        DiskFormat::Qcow2 { backing: Some(Box::new(qvd_virt::vm::BackingSpec { file, qcow2: false })) }
    };
    File::create(&another).unwrap().set_len(4 << 20).unwrap();
    for _ in 0..2 {
        let error = guest.vm.plug_disk(Slot::First, &disk(guests, "another", DiskFormat::Raw)).unwrap_err();
        assert!(matches!(&error, Error::Qmp { source: QmpError::Refused { .. }, .. }), "{error:?}");
    }
    // So is what is no image, with all that was begun for what is behind it.
    for _ in 0..2 {
        let error = guest.vm.plug_disk(Slot::Second, &disk(guests, "another", overlay())).unwrap_err();
        assert!(matches!(&error, Error::Qmp { source: QmpError::Refused { .. }, .. }), "{error:?}");
    }
    guest.vm.plug_disk(Slot::Second, &disk(guests, "another", DiskFormat::Raw)).unwrap();
    until(guest, "grep -qx another /sys/block/*/serial");

    for (slot, name) in [(Slot::First, "plugged"), (Slot::Second, "another")] {
        guest.vm.unplug(slot, SOON).unwrap();
        until(guest, &format!("! grep -qx {name} /sys/block/*/serial 2>/dev/null"));
    }
    let written = fs::read(guests.path("plugged")).unwrap();
    assert!(written.starts_with(b"from the guest"), "{:?}", &written[..20]);
    assert!(guest.vm.unplug(Slot::First, SOON).is_err(), "there is nothing any more");
}

fn an_interface(guest: &mut Guest) {
    let net = netns::create().unwrap();
    let tap = || netns::in_netns(std::os::fd::AsFd::as_fd(&net), || tap::create("plug0", false)).unwrap().unwrap();
    let nic = NicSpec { tap: tap(), mac: [2, 0, 0, 0, 0, 7] };
    guest.vm.plug_nic(Slot::First, &nic).unwrap();
    until(guest, "grep -qx 02:00:00:00:00:07 /sys/class/net/*/address");
    guest.vm.unplug(Slot::First, SOON).unwrap();
    until(guest, "! grep -qx 02:00:00:00:00:07 /sys/class/net/*/address");
    // QEMU let go of it as well: the link can be made again.
    drop(nic);
    let nic = NicSpec { tap: tap(), mac: [2, 0, 0, 0, 0, 8] };
    guest.vm.plug_nic(Slot::First, &nic).unwrap();
    until(guest, "grep -qx 02:00:00:00:00:08 /sys/class/net/*/address");
}

fn its_own_disk(guest: &mut Guest) {
    guest.sh(&format!("{}; echo -n first >$d; sync", dev("own")));
    guest.vm.snapshot("before").unwrap();
    guest.vm.snapshot("forgotten").unwrap();
    assert!(guest.vm.snapshot("before").is_err(), "the name is taken");
    assert!(matches!(guest.vm.snapshot("../x").unwrap_err(), Error::Invalid { .. }));
    guest.vm.forget_snapshot("forgotten").unwrap();
    guest.sh(&format!("{}; echo -n later >$d; sync", dev("own")));

    guest.vm.forget_snapshot("before").unwrap();
    // A qcow2 image with snapshots cannot be made longer in every version.
    guest.vm.grow_disk(0, Bytes::mib(24)).unwrap();
    until(guest, &format!("{{ {}; grep -qx 49152 /sys/block/${{d#/dev/}}/size; }}", dev("own")));
    assert!(guest.vm.grow_disk(7, Bytes::mib(24)).is_err());
    guest.sh(&format!("{}; echo -n first >$d; sync", dev("own")));
    guest.vm.snapshot("before").unwrap();
    guest.sh(&format!("{}; echo -n later >$d; sync", dev("own")));
}

fn what_is_seen(guest: &mut Guest) {
    let picture = guest.vm.screenshot().unwrap();
    assert!(picture.width >= 640 && picture.height >= 350, "{} x {}", picture.width, picture.height);
    assert!(picture.rgb.iter().any(|&byte| byte != 0), "it shows something");
    assert_eq!(guest.vm.screenshot().unwrap().width, picture.width, "a second time");

    drop(guest.vm.console().unwrap());
    guest.sh("echo a word on the console >/dev/console");
    let deadline = Instant::now() + SOON;
    let mut said = String::new();
    while !said.contains("a word on the console") {
        assert!(Instant::now() < deadline, "{said}");
        said.push_str(&guest.vm.console().unwrap());
    }
}

fn its_memory(guest: &mut Guest) {
    guest.vm.report_use(Duration::from_secs(1)).unwrap();
    let deadline = Instant::now() + SOON;
    let seen = loop {
        if let Some(seen) = guest.vm.guest_use().unwrap() {
            break seen;
        }
        assert!(Instant::now() < deadline, "its driver says nothing");
        guest.vm.watch(Duration::from_millis(100)).unwrap();
    };
    assert!(seen.total > Bytes::mib(64) && seen.total < Bytes::mib(128), "{seen:?}");
    assert!(seen.used() < Bytes::mib(96), "{seen:?}");

    guest.vm.balloon(Bytes::mib(112)).unwrap();
    while guest.vm.memory_left().unwrap() > Bytes::mib(113) {
        assert!(Instant::now() < deadline, "{:?}", guest.vm.memory_left());
        guest.vm.watch(Duration::from_millis(50)).unwrap();
    }
    guest.vm.balloon(Bytes::mib(128)).unwrap();

    assert!(!guest.vm.may_merge().unwrap() && !advised(guest.vm.pid()));
    guest.vm.allow_merging(true).unwrap();
    assert!(guest.vm.may_merge().unwrap());
    assert!(advised(guest.vm.pid()), "the kernel may merge it");
    guest.vm.allow_merging(false).unwrap();
    assert!(!advised(guest.vm.pid()));
}

/// Whether a mapping of the process is marked as mergeable.
fn advised(pid: u32) -> bool {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    maps.lines().filter_map(|line| line.strip_prefix("VmFlags:")).any(|flags| flags.split(' ').any(|flag| flag == "mg"))
}

fn a_pause_and_an_adoption(guests: &Guests<'_>, mut guest: Guest) -> Guest {
    guest.sh("echo before >/run/mark");
    guest.vm.pause().unwrap();
    assert_eq!(guest.vm.state(), VmState::Paused);
    // What is plugged in meanwhile is found when it goes on.
    guest.vm.plug_disk(Slot::Second, &disk(guests, "another", DiskFormat::Raw)).unwrap();
    guest.vm.resume().unwrap();
    assert_eq!(guest.vm.state(), VmState::Running);
    until(&guest, "grep -qx another /sys/block/*/serial");

    // The node dies: the guest does not notice, and whoever comes next drives
    // it and talks to its init.
    let guest = guest.adopted(guests);
    assert_eq!(guest.vm.state(), VmState::Running);
    assert_eq!(guest.sh("cat /run/mark"), "before");
    assert!(guest.stats().memory.unwrap().total > 64 << 20);
    guest
}
