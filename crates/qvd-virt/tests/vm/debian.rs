//! A whole Debian boots from its disk by both kinds of firmware, says what it finds
//! itself in, hears its power button, and finds again what it wrote.

use std::{
    fs::{self, File},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use qvd_core::{Bytes, DesktopId, MilliCpu};
use qvd_sys::{netns, tap};
use qvd_testkit::{Need, debian_disk, privileged};
use qvd_virt::vm::{
    BackingSpec, Boot, Devices, DiskFormat, DiskSpec, NicSpec, StopLimits, StoppedBy, Vm, VmSpec, VmState,
};

use crate::bed::{Bed, with_bed};

/// A boot takes a minute of a processor by emulation.
const BOOTS_WITHIN: Duration = Duration::from_secs(600);

/// How one machine is made, and what its system calls that.
#[derive(Clone, Copy)]
struct Kind {
    number: u32,
    uefi: bool,
    devices: Devices,
    finds: &'static str,
}

const BIOS_EMULATED: Kind = Kind {
    number: 1,
    uefi: false,
    devices: Devices::Emulated,
    finds: "by BIOS on /dev/sda1, e1000 02:00:00:00:00:01,",
};
const UEFI_VIRTIO: Kind = Kind {
    number: 2,
    uefi: true,
    devices: Devices::Virtio,
    finds: "by UEFI on /dev/vda1, virtio_net 02:00:00:00:00:02,",
};
const BIOS_VIRTIO: Kind = Kind {
    number: 3,
    uefi: false,
    devices: Devices::Virtio,
    finds: "by BIOS on /dev/vda1, virtio_net 02:00:00:00:00:03,",
};
const UEFI_EMULATED: Kind =
    Kind { number: 4, uefi: true, devices: Devices::Emulated, finds: "by UEFI on /dev/sda1, e1000 02:00:00:00:00:04," };

/// An empty overlay on the disk that all tests share.
fn overlay(dir: &Path, number: u32) -> PathBuf {
    let path = dir.join(format!("overlay{number}"));
    let length = fs::metadata(debian_disk().unwrap()).unwrap().len();
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg(length.to_string());
    assert!(create.stdout(Stdio::null()).status().unwrap().success());
    path
}

fn start(bed: &Bed, kind: Kind, overlay: &Path) -> Vm {
    let boot = if kind.uefi { Boot::uefi().unwrap() } else { Boot::Bios };
    let dir = bed.dir.path().join(kind.number.to_string());
    fs::create_dir(&dir).unwrap();
    let mut spec = VmSpec::new(DesktopId::new(kind.number).unwrap(), bed.ids, boot, dir);
    spec.limits.memory = Bytes::mib(384);
    spec.limits.cpu = MilliCpu(1000);
    spec.devices = kind.devices;
    let backing = BackingSpec { file: File::open(debian_disk().unwrap()).unwrap().into(), qcow2: false };
    spec.disks.push(DiskSpec {
        serial: "system".to_owned(),
        file: File::options().read(true).write(true).open(overlay).unwrap().into(),
        format: DiskFormat::Qcow2 { backing: Some(Box::new(backing)) },
    });
    let net = netns::create().unwrap();
    let tap = netns::in_netns(net.as_fd(), || tap::create("tap0", false)).unwrap().unwrap();
    let number = u8::try_from(kind.number).unwrap();
    spec.nics.push(NicSpec { tap, mac: [2, 0, 0, 0, 0, number] });
    let mut vm = bed.qemu.start(spec).unwrap();
    vm.resume().unwrap();
    vm
}

/// Waits until its system says what it finds, `starts` times having been started.
fn says(vm: &mut Vm, finds: &str, starts: u32) {
    let wanted = format!("{finds} start {starts}.");
    let deadline = Instant::now() + BOOTS_WITHIN;
    let mut said = String::new();
    while !said.contains(&wanted) {
        assert!(Instant::now() < deadline && !matches!(vm.state(), VmState::Down(_)), "{wanted}: {said}");
        vm.watch(Duration::from_millis(200)).unwrap();
        said.push_str(&vm.console().unwrap());
    }
}

/// Presses the power button of a machine whose system has nobody to be asked.
fn switch_off(bed: &Bed, vm: &mut Vm) {
    let limits = StopLimits { guest: Duration::ZERO, button: BOOTS_WITHIN };
    assert_eq!(vm.stop(limits, || false).unwrap(), StoppedBy::Button);
    let dir = bed.dir.path().join(vm.id().to_string());
    vm.close().unwrap();
    fs::remove_dir(dir).unwrap();
}

fn with_disk(test: impl FnOnce(&Bed, &Path)) {
    privileged(&[Need::DebianDisk, Need::Program("qemu-img")], || {
        let before = fs::metadata(debian_disk().unwrap()).unwrap().modified().unwrap();
        with_bed(|bed| {
            let work = tempfile::tempdir().unwrap();
            test(bed, work.path());
        });
        assert_eq!(fs::metadata(debian_disk().unwrap()).unwrap().modified().unwrap(), before, "the shared disk");
    });
}

#[test]
fn a_whole_debian_boots_by_bios_and_by_uefi_and_hears_its_power_button() {
    with_disk(|bed, work| {
        let both = [BIOS_EMULATED, UEFI_VIRTIO];
        let mut machines = both.map(|kind| start(bed, kind, &overlay(work, kind.number)));
        for (vm, kind) in machines.iter_mut().zip(both) {
            says(vm, kind.finds, 1);
        }
        for vm in &mut machines {
            switch_off(bed, vm);
        }
    });
}

/// Boots one machine whose system has been started so often, and switches it off.
fn boot_once(bed: &Bed, kind: Kind, overlay: &Path, starts: u32) {
    let mut vm = start(bed, kind, overlay);
    says(&mut vm, kind.finds, starts);
    switch_off(bed, &mut vm);
}

#[test]
#[ignore = "a minute of a processor; a test above has this firmware and these devices, each with another"]
fn a_whole_debian_boots_by_bios_on_virtio() {
    with_disk(|bed, work| boot_once(bed, BIOS_VIRTIO, &overlay(work, 1), 1));
}

#[test]
#[ignore = "a minute of a processor; a test above has this firmware and these devices, each with another"]
fn a_whole_debian_boots_by_uefi_on_emulated_devices() {
    with_disk(|bed, work| boot_once(bed, UEFI_EMULATED, &overlay(work, 1), 1));
}

#[test]
#[ignore = "two boots, a minute of a processor each"]
fn a_debian_finds_what_it_wrote_when_it_boots_by_another_firmware() {
    with_disk(|bed, work| {
        let disk = overlay(work, 1);
        boot_once(bed, BIOS_VIRTIO, &disk, 1);
        boot_once(bed, UEFI_EMULATED, &disk, 2);
    });
}
