//! Real machines, by libvirt's QEMU driver inside of the test's process.

use std::{
    fs::{self, File, Permissions},
    io::Write as _,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use qvd_core::{Bytes, DesktopId, Instance, UidRange};
use qvd_guest::Link;
use qvd_libvirt::{DomainRecord, Libvirt, LibvirtVm};
use qvd_sys::tap;
use qvd_testkit::{Census, Need, Scope, bed_directory, privileged};
use qvd_virt::{
    Failure, Machine,
    conformance::{Behaviour, Virtualizer, check},
    vm::{Boot, DiskFormat, DiskSpec, Down, GuestKernel, NicSpec, StopLimits, StoppedBy, VmSpec, VmState},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::hidden::without_kvm;

/// Longer than anything here takes on a busy host without KVM.
const SOON: Duration = Duration::from_secs(150);

const NEEDS: &[Need] = &[Need::Root, Need::Namespaces, Need::Bed, Need::Env("QVD_INIT"), Need::Program("unshare")];

/// What a BIOS boots: it stops the processor for ever.
const WAITS: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];

/// Or switches the machine off. Source: QEMU's firmware puts the ACPI registers of q35
/// at 0x600; of them 4 is PM1 control, and bit 13 of that means off (ACPI 4.8.3.2.1).
const ENDS: &[u8] = &[0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xf4, 0xeb, 0xfd];

/// Writes a sector that the disk's file has no place for yet, then goes on to [`ENDS`].
/// Source: the BIOS's int 13h, function 3: one sector, cylinder 1, head 0, of disk 80h; what is
/// written is this code.
const WRITES: &[u8] = &[
    0x31, 0xc0, 0x8e, 0xc0, 0xbb, 0x00, 0x7c, 0xb8, 0x01, 0x03, 0xb9, 0x01, 0x01, 0xba, 0x80, 0x00, 0xcd, 0x13, 0x73,
    0x03, 0xf4, 0xeb, 0xfd,
];

struct Domains {
    libvirt: Libvirt,
    instance: Instance,
    ids: UidRange,
    kernel: GuestKernel,
    dir: tempfile::TempDir,
}

impl std::fmt::Debug for Domains {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Domains").finish_non_exhaustive()
    }
}

fn with_domains(test: impl FnOnce(&Domains)) {
    let instance = Instance::new(u16::try_from(std::process::id() & 0xffff).unwrap());
    let mark = instance.bridge_name();
    let census = Census::take(&Scope::marked([mark]));
    // QEMU is a user of its own, and has to get to its files.
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o711)).unwrap();
    let root = dir.path().join("libvirt");
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::set_permissions(&root, Permissions::from_mode(0o711)).unwrap();
    // Without it a daemon is wanted that writes logs.
    fs::write(root.join("etc/qemu.conf"), "stdio_handler = \"file\"\n").unwrap();
    let uri = format!("qemu:///embed?root={}", root.display());
    let libvirt = Libvirt::connect(&uri, instance).unwrap();
    let init = std::env::var_os("QVD_INIT").unwrap();
    let kernel = GuestKernel::find(&bed_directory().unwrap(), Path::new(&init)).unwrap();
    let domains = Domains { libvirt, instance, ids: UidRange::of_slot(42_000).unwrap(), kernel, dir };
    test(&domains);
    assert_eq!(domains.left(), Vec::<String>::new());
    assert_eq!(domains.libvirt.sweep(&[]).unwrap(), 0);
    drop(domains);
    census.assert_unchanged();
}

impl Domains {
    fn own(&self, number: u32) -> PathBuf {
        let dir = self.dir.path().join(format!("machine-{number}"));
        fs::create_dir_all(&dir).unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o711)).unwrap();
        dir
    }

    fn spec(&self, number: u32) -> VmSpec {
        let id = DesktopId::new(number).unwrap();
        let mut spec = VmSpec::of_kernel(id, self.ids, &self.kernel, self.own(number)).unwrap();
        spec.limits.memory = Bytes::mib(128);
        spec
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Number of the domain's QEMU, as libvirt keeps it.
    fn pid(&self, id: DesktopId) -> u32 {
        let name = self.libvirt.name(id);
        let path = self.path(&format!("libvirt/run/qemu/{name}.pid"));
        fs::read_to_string(path).unwrap().trim().parse().unwrap()
    }
}

/// A disk that a BIOS boots `code` from, and that has a cylinder: others are not booted.
fn bootable(code: &[u8]) -> Vec<u8> {
    let mut disk = vec![0; 4 << 20];
    disk[..code.len()].copy_from_slice(code);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk
}

impl Virtualizer for Domains {
    fn start(&self, id: DesktopId, behaviour: Behaviour) -> Result<Box<dyn Machine>, Failure> {
        let mut spec = VmSpec::new(id, self.ids, Boot::Bios, self.own(id.number()));
        spec.limits.memory = Bytes::mib(64);
        let path = self.path(&format!("disk-{id}"));
        let mut sector = bootable(if behaviour == Behaviour::Ends { ENDS } else { WAITS });
        let mut format = DiskFormat::Raw;
        if behaviour == Behaviour::Broken {
            // Looks like an image, and is none: QEMU ends when it is started.
            sector = [&b"QFI\xfb\0\0\0\x03"[..], &[0; 96]].concat();
            format = DiskFormat::Qcow2 { backing: None };
        }
        fs::write(&path, sector)?;
        let file = File::options().read(true).write(true).open(path)?.into();
        spec.disks.push(DiskSpec { serial: "root".to_owned(), file, format });
        Ok(Box::new(self.libvirt.start(spec)?))
    }

    fn adopt(&self, record: &Value) -> Result<Option<Box<dyn Machine>>, Failure> {
        let record: DomainRecord = serde_json::from_value(record.clone())?;
        Ok(self.libvirt.adopt(&record)?.map(|vm| Box::new(vm) as Box<dyn Machine>))
    }

    fn sweep(&self) -> Result<(), Failure> {
        self.libvirt.sweep(&[])?;
        // The directory of a domain is its owner's.
        for file in self.left() {
            fs::remove_file(file)?;
        }
        Ok(())
    }

    fn strike(&self, machine: &dyn Machine) -> Result<(), Failure> {
        let pid = i32::try_from(self.pid(machine.id()))?;
        Ok(kill_process(Pid::from_raw(pid).ok_or("it has no number")?, Signal::KILL)?)
    }

    fn left(&self) -> Vec<String> {
        let dirs = fs::read_dir(self.dir.path()).unwrap().map(|dir| dir.unwrap().path());
        let dirs = dirs.filter(|dir| dir.file_name().unwrap().to_string_lossy().starts_with("machine-"));
        let files =
            dirs.flat_map(|dir| fs::read_dir(dir).unwrap().map(|file| file.unwrap().path().display().to_string()));
        files.collect()
    }
}

#[test]
fn domains_keep_the_rules_of_virtualizers() {
    privileged(NEEDS, || {
        without_kvm("qemu::domains_keep_the_rules_of_virtualizers", || {
            with_domains(|domains| {
                let broken = check(domains, SOON);
                assert!(broken.is_empty(), "{broken:#?}");
            });
        });
    });
}

#[test]
fn a_guest_of_libvirt_speaks_with_us_and_has_our_port_and_its_own_user() {
    privileged(NEEDS, || {
        without_kvm("qemu::a_guest_of_libvirt_speaks_with_us_and_has_our_port_and_its_own_user", || {
            with_domains(|domains| {
                let mut spec = domains.spec(1);
                let name = domains.instance.link_name(spec.id);
                let link: OwnedFd = tap::create(&name, true).unwrap();
                tap::keep(link.as_fd()).unwrap();
                spec.nics.push(NicSpec { tap: link, mac: [2, 0, 0, 0, 0, 1] });
                let raw = domains.path("disk");
                File::create(&raw).unwrap().set_len(4 << 20).unwrap();
                fs::set_permissions(&raw, Permissions::from_mode(0o600)).unwrap();
                let file = File::options().read(true).write(true).open(&raw).unwrap().into();
                spec.disks.push(DiskSpec { serial: "own".to_owned(), file, format: DiskFormat::Raw });
                let mut vm = domains.libvirt.start(spec).unwrap();
                assert_eq!(vm.state(), VmState::Waiting);

                let status = fs::read_to_string(format!("/proc/{}/status", domains.pid(vm.id()))).unwrap();
                let own = format!("Uid:\t{0}\t{0}\t{0}\t{0}", domains.ids.base());
                assert!(status.contains(&own), "{status}");
                assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
                assert_eq!(fs::metadata(&raw).unwrap().uid(), domains.ids.base(), "the disk is its own meanwhile");
                let flags = fs::read_to_string(format!("/sys/class/net/{name}/flags")).unwrap();
                assert!(!flags.is_empty(), "the port is attached by its name");

                vm.resume().unwrap();
                // The guest's init has come up and waits for what it is to be.
                drop(Link::connect(&vm.link(), SOON).unwrap());

                // As after a restart of the node.
                let record = vm.detach().unwrap();
                let mut vm = domains.libvirt.adopt(&record).unwrap().unwrap();
                assert_eq!(vm.state(), VmState::Running);
                let limits = StopLimits { guest: Duration::ZERO, button: Duration::ZERO };
                assert_eq!(vm.stop(limits, || false).unwrap(), StoppedBy::Kill);
                assert_eq!(vm.wait(SOON).unwrap(), Some(Down::Host));
                vm.close().unwrap();
                assert_eq!(fs::metadata(&raw).unwrap().uid(), 0, "the disk is as it was");
                assert!(Command::new("ip").args(["link", "del", &name]).status().unwrap().success());
            });
        });
    });
}

/// Waits until a domain is in this state.
fn wait_for(vm: &mut LibvirtVm, state: VmState) {
    let end = Instant::now() + SOON;
    while vm.watch(Duration::from_secs(1)).unwrap() != state {
        assert!(Instant::now() < end, "{:?} is not {state:?}", vm.state());
    }
}

#[test]
fn a_domain_whose_disk_cannot_grow_says_so_and_goes_on_when_there_is_room() {
    privileged(NEEDS, || {
        without_kvm("qemu::a_domain_whose_disk_cannot_grow_says_so_and_goes_on_when_there_is_room", || {
            with_domains(|domains| {
                // Of 64 KiB, and nothing of it is left.
                let small = domains.path("small");
                fs::create_dir(&small).unwrap();
                let mount = ["-t", "tmpfs", "-o", "size=64k,mode=711", "tmpfs"];
                assert!(Command::new("mount").args(mount).arg(&small).status().unwrap().success());
                let (disk, filler) = (small.join("disk"), small.join("filler"));
                let code = bootable(&[WRITES, ENDS].concat());
                let file = File::options().read(true).write(true).create_new(true).open(&disk).unwrap();
                file.write_all_at(&code[..512], 0).unwrap();
                file.set_len(code.len() as u64).unwrap();
                while fs::OpenOptions::new().create(true).append(true).open(&filler).unwrap().write(&[1; 4096]).is_ok()
                {
                }

                let mut spec = VmSpec::new(DesktopId::new(1).unwrap(), domains.ids, Boot::Bios, domains.own(1));
                spec.limits.memory = Bytes::mib(64);
                spec.disks.push(DiskSpec { serial: "root".to_owned(), file: file.into(), format: DiskFormat::Raw });
                let mut vm = domains.libvirt.start(spec).unwrap();
                vm.resume().unwrap();
                wait_for(&mut vm, VmState::Full);
                let record = vm.detach().unwrap();
                let mut vm = domains.libvirt.adopt(&record).unwrap().unwrap();
                assert_eq!(vm.state(), VmState::Full);
                vm.resume().unwrap();
                wait_for(&mut vm, VmState::Full);
                // Once it has written, it switches itself off.
                fs::remove_file(&filler).unwrap();
                vm.resume().unwrap();
                wait_for(&mut vm, VmState::Down(Down::Guest));
                vm.close().unwrap();
                let mut written = [0; 4];
                File::open(&disk).unwrap().read_exact_at(&mut written, 63 * 16 * 512).unwrap();
                assert_eq!(written, WRITES[..4]);
                assert!(Command::new("umount").arg(&small).status().unwrap().success());
            });
        });
    });
}
