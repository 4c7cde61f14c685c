//! libvirt's own driver for tests: no machine runs, and all is libvirt's word.

use std::{fs::File, os::fd::OwnedFd, path::Path, time::Duration};

use qvd_core::{Bytes, DesktopId, Instance, UidRange};
use qvd_libvirt::{Error, Kind, Libvirt};
use qvd_virt::vm::{
    BackingSpec, BaseDevice, BaseSpec, Boot, DiskFormat, DiskSpec, Down, StopLimits, StoppedBy, VmSpec, VmState,
};

fn file(path: &Path) -> OwnedFd {
    File::create(path).unwrap().into()
}

fn spec(dir: &Path, number: u32) -> VmSpec {
    let (kernel, initramfs) = (file(&dir.join("k")), file(&dir.join("i")));
    let boot = Boot::Kernel { kernel, initramfs, parameters: "quiet".to_owned() };
    let ids = UidRange::of_slot(1).unwrap();
    let own = dir.join(number.to_string());
    std::fs::create_dir_all(&own).unwrap();
    let mut spec = VmSpec::new(DesktopId::new(number).unwrap(), ids, boot, own);
    let base = file(&dir.join("base"));
    spec.base = Some(BaseSpec { file: base, size: Bytes::mib(2), device: BaseDevice::Block });
    let backing = Some(Box::new(BackingSpec { file: file(&dir.join("behind")), qcow2: false }));
    std::fs::write(dir.join("root"), [&b"QFI\xfb\0\0\0\x03"[..], &[0; 96]].concat()).unwrap();
    let disk = File::open(dir.join("root")).unwrap().into();
    spec.disks.push(DiskSpec { serial: "root".to_owned(), file: disk, format: DiskFormat::Qcow2 { backing } });
    spec
}

#[test]
fn a_domain_is_defined_driven_adopted_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let libvirt = Libvirt::connect("test:///default", Instance::new(7)).unwrap();
    assert_eq!(*libvirt.kind(), Kind::Other("test".to_owned()));
    let mut vm = libvirt.start(spec(dir.path(), 1)).unwrap();
    assert_eq!(vm.watch(Duration::ZERO).unwrap(), VmState::Waiting);
    assert!(matches!(libvirt.start(spec(dir.path(), 1)), Err(Error::Busy(_))));
    vm.resume().unwrap();
    assert_eq!(vm.state(), VmState::Running);
    vm.pause().unwrap();
    assert_eq!(vm.state(), VmState::Paused);
    vm.balloon(Bytes::mib(64)).unwrap();

    let record = vm.detach().unwrap();
    let mut vm = libvirt.adopt(&record).unwrap().unwrap();
    assert_eq!(vm.state(), VmState::Paused);
    // The driver for tests obeys the power button at once.
    let limits = StopLimits { guest: Duration::ZERO, button: Duration::from_secs(20) };
    assert_eq!(vm.stop(limits, || false).unwrap(), StoppedBy::Button);
    assert_eq!(vm.wait(Duration::ZERO).unwrap(), Some(Down::Guest));
    vm.close().unwrap();
    vm.close().unwrap();
    assert!(libvirt.adopt(&record).unwrap().is_none());
    assert_eq!(std::fs::read_dir(dir.path().join("1")).unwrap().count(), 0);
}

#[test]
fn somebody_elses_end_is_heard_without_asking() {
    let dir = tempfile::tempdir().unwrap();
    let libvirt = Libvirt::connect("test:///default", Instance::new(8)).unwrap();
    let vm = libvirt.start(spec(dir.path(), 1)).unwrap();
    let record = vm.detach().unwrap();
    let mut vm = libvirt.adopt(&record).unwrap().unwrap();
    vm.resume().unwrap();
    let mut other = libvirt.adopt(&record).unwrap().unwrap();
    let waiting = std::thread::spawn(move || {
        let down = vm.wait(Duration::from_secs(60)).unwrap();
        (vm, down)
    });
    other.kill().unwrap();
    let (mut vm, down) = waiting.join().unwrap();
    assert_eq!(down, Some(Down::Host));
    vm.close().unwrap();
    drop(other.detach());
}

#[test]
fn what_nobody_owns_is_swept_and_others_are_left() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Libvirt::connect("test:///default", Instance::new(9)).unwrap();
    let theirs = Libvirt::connect("test:///default", Instance::new(10)).unwrap();
    let mut records = Vec::new();
    for number in 1..=3 {
        records.push(ours.start(spec(dir.path(), number)).unwrap().detach().unwrap());
    }
    let mut other = theirs.start(spec(dir.path(), 4)).unwrap();
    let second = DesktopId::new(2).unwrap();
    assert_eq!(ours.sweep(&[second]).unwrap(), 2);
    assert!(ours.adopt(&records[0]).unwrap().is_none() && ours.adopt(&records[2]).unwrap().is_none());
    assert!(other.watch(Duration::ZERO).is_ok(), "another installation's");
    ours.adopt(&records[1]).unwrap().expect("it is kept").close().unwrap();
    other.close().unwrap();
}

#[test]
fn what_libvirt_refuses_is_said_in_its_words_and_leaves_nothing() {
    let error = Libvirt::connect("nonsense:///", Instance::new(11)).unwrap_err();
    let said = qvd_core::causes(&error).join(": ");
    assert!(said.contains("connect to `nonsense:///`: "), "{said}");

    let dir = tempfile::tempdir().unwrap();
    let libvirt = Libvirt::connect("test:///default", Instance::new(11)).unwrap();
    let mut gone = spec(dir.path(), 1);
    std::fs::remove_file(dir.path().join("root")).unwrap();
    let own = gone.dir.clone();
    gone.limits.memory = Bytes::mib(128);
    let error = libvirt.start(gone).unwrap_err().to_string();
    assert!(error.contains("disk \"root\"") && error.contains("has none"), "{error}");
    assert_eq!(std::fs::read_dir(own).unwrap().count(), 0);
}
