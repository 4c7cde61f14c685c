#![allow(clippy::unwrap_used)]

use std::{
    fs::File,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use qvd_core::{Bytes, DesktopId, UidRange};
use qvd_virt::vm::{BackingSpec, BaseSpec, DiskSpec, NicSpec};

use super::*;

fn fd() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn spec() -> (VmSpec, Files) {
    let boot = Boot::Kernel { kernel: fd(), initramfs: fd(), parameters: "quiet".to_owned() };
    let ids = UidRange::of_slot(3).unwrap();
    let mut spec = VmSpec::new(DesktopId::new(7).unwrap(), ids, boot, PathBuf::from("/run/x"));
    spec.limits.memory = Bytes::mib(256);
    let files = Files { boot: Some(("/k".into(), "/i".into())), ..Files::default() };
    (spec, files)
}

fn xml(spec: &VmSpec, files: &Files) -> String {
    domain_xml("qvd0001-7", &Kind::Qemu, spec, files).unwrap()
}

#[test]
fn names_cannot_say_more_than_names() {
    let (mut spec, mut files) = spec();
    let evil = "/x/'/><disk type='block' a=\"&";
    spec.disks.push(DiskSpec { serial: "root".to_owned(), file: fd(), format: DiskFormat::Raw });
    files.disks.push((evil.into(), None));
    let xml = xml(&spec, &files);
    assert_eq!(xml.matches("<disk ").count(), 1, "{xml}");
    assert!(xml.contains("/x/&apos;/&gt;&lt;disk type=&apos;block&apos; a=&quot;&amp;"), "{xml}");

    files.disks[0].0 = "/x\ny".into();
    let error = domain_xml("n", &Kind::Qemu, &spec, &files).unwrap_err().to_string();
    assert!(error.contains("control characters"), "{error}");
}

#[test]
fn a_disk_says_all_of_what_is_behind_it() {
    let (mut spec, mut files) = spec();
    let backing = |qcow2| Some(Box::new(BackingSpec { file: fd(), qcow2 }));
    for (serial, backing) in [("alone", None), ("raw", backing(false)), ("qcow2", backing(true))] {
        let format = DiskFormat::Qcow2 { backing };
        spec.disks.push(DiskSpec { serial: serial.to_owned(), file: fd(), format });
    }
    let base = Some(PathBuf::from("/base"));
    files.disks = vec![("/a".into(), None), ("/b".into(), base.clone()), ("/c".into(), base)];
    let xml = xml(&spec, &files);
    // Each chain has an end, so that libvirt does not look into headers for one.
    assert_eq!(xml.matches("<backingStore/>").count(), 3, "{xml}");
    assert_eq!(xml.matches("<format type=\"raw\"/>").count(), 1, "{xml}");
    assert_eq!(xml.matches("<format type=\"qcow2\"/>").count(), 1, "{xml}");
    assert_eq!(xml.matches("relabel=\"no\"").count(), 2, "what is shared stays its owner's: {xml}");
}

#[test]
fn an_interface_is_a_port_of_ours_and_a_machine_a_user_of_its_own() {
    let (mut spec, mut files) = spec();
    spec.nics.push(NicSpec { tap: fd(), mac: [2, 0, 0, 0, 0, 10] });
    files.taps.push("qvd0001-7".to_owned());
    let xml = xml(&spec, &files);
    assert!(xml.contains("<target dev=\"qvd0001-7\" managed=\"no\"/>"), "{xml}");
    assert!(xml.contains("02:00:00:00:00:0a"), "{xml}");
    for theirs in ["type=\"network\"", "filterref", "type=\"bridge\"", "tcp"] {
        assert!(!xml.contains(theirs), "{theirs}: {xml}");
    }
    let base = spec.ids.base();
    assert!(xml.contains(&format!("<label>+{base}:+{base}</label>")), "{xml}");
    assert!(xml.contains("<nosharepages/>"), "{xml}");
}

#[test]
fn what_libvirt_cannot_do_is_refused_by_name() {
    let (mut clone, files) = spec();
    clone.memory = Memory::Cloned(fd());
    clone.incoming = true;
    let (mut mapped, _) = spec();
    mapped.base = Some(BaseSpec { file: fd(), size: Bytes::mib(64), device: BaseDevice::Pmem });
    for (spec, word) in [(clone, "template"), (mapped, "base that is memory")] {
        let error = domain_xml("n", &Kind::Qemu, &spec, &files).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    let (mut small, files) = spec();
    small.limits.memory = Bytes::mib(1);
    assert!(matches!(domain_xml("n", &Kind::Qemu, &small, &files), Err(Error::Spec { .. })));
}

#[test]
fn a_foreign_system_has_the_devices_that_it_knows() {
    let (mut spec, mut files) = spec();
    spec.boot = Boot::Uefi { code: fd(), variables: fd() };
    spec.devices = Devices::Emulated;
    spec.accel = Accel::Kvm;
    spec.screen = true;
    spec.disks.push(DiskSpec { serial: "root".to_owned(), file: fd(), format: DiskFormat::Raw });
    files.disks.push((Path::new("/d").to_owned(), None));
    let xml = xml(&spec, &files);
    for part in [
        "bus=\"sata\"",
        "type=\"tablet\"",
        "offset=\"localtime\"",
        "<hyperv>",
        "pflash",
        "<nvram>/i</nvram>",
        "\"vga\"",
    ] {
        assert!(xml.contains(part), "{part}: {xml}");
    }
}
