//! Systems that are not ours boot from their disk, by both kinds of firmware.

use std::{
    fs::{self, File},
    io::Write as _,
    os::{fd::AsFd as _, unix::fs::FileExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use qvd_core::{Bytes, DesktopId};
use qvd_sys::{netns, tap};
use qvd_testkit::{Need, privileged};
use qvd_virt::vm::{Boot, Devices, DiskFormat, DiskSpec, NicSpec, Vm, VmSpec, VmState};

use crate::bed::{Bed, SOON, with_bed};

/// Where the partition begins, in bytes.
const PARTITION: u64 = 1 << 20;
/// Its length: a loader and what it reads.
const LENGTH: u64 = 8 << 20;

/// What the disk's system says of the machine that it finds itself in. It is
/// a loader alone: a kernel takes a BIOS half a minute to read by emulation.
const SYSTEM: &str = "echo \"booted by $grub_platform, beside\"\nlspci\necho all of them.\n";

fn run(program: &str, arguments: &[&str], dir: &Path) {
    let status = Command::new(program).args(arguments).current_dir(dir).stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}");
}

/// A disk with a boot sector for a BIOS and a loader for UEFI, which both read
/// on from its file system.
fn disk(dir: &Path) -> PathBuf {
    fs::write(dir.join("system.cfg"), SYSTEM).unwrap();
    let first = "serial\nterminal_output serial\nconfigfile (hd0,msdos1)/system.cfg\n";
    fs::write(dir.join("grub.cfg"), first).unwrap();
    let image = |format: &str, to: &str, more: &[&str]| {
        let common = ["-O", format, "-o", to, "-c", "grub.cfg", "-p", "/"];
        let modules = ["fat", "part_msdos", "serial", "terminal", "configfile", "echo", "lspci"];
        run("grub-mkimage", &[&common[..], &modules, more].concat(), dir);
    };
    image("i386-pc", "core.img", &["biosdisk"]);
    image("x86_64-efi", "loader.efi", &[]);

    File::create(dir.join("esp")).unwrap().set_len(LENGTH).unwrap();
    run("mkfs.vfat", &["esp"], dir);
    run("mmd", &["-i", "esp", "::EFI", "::EFI/BOOT"], dir);
    run("mcopy", &["-i", "esp", "loader.efi", "::EFI/BOOT/BOOTX64.EFI"], dir);
    run("mcopy", &["-i", "esp", "system.cfg", "::"], dir);

    let mut sector = fs::read("/usr/lib/grub/i386-pc/boot.img").unwrap();
    assert_eq!(sector.len(), 512);
    // Source: UEFI specification 5.2.1: of the first entry the kind of the
    // partition, 0xEF being UEFI's own, its first sector and its length.
    sector[446..510].fill(0);
    sector[450] = 0xef;
    sector[454..458].copy_from_slice(&u32::try_from(PARTITION / 512).unwrap().to_le_bytes());
    sector[458..462].copy_from_slice(&u32::try_from(LENGTH / 512).unwrap().to_le_bytes());
    let path = dir.join("disk");
    let file = File::create(&path).unwrap();
    (&file).write_all(&sector).unwrap();
    // The boot sector reads on where it ends, unless it was told otherwise.
    let core = fs::read(dir.join("core.img")).unwrap();
    assert!(core.len() as u64 + 512 < PARTITION);
    file.write_all_at(&core, 512).unwrap();
    file.write_all_at(&fs::read(dir.join("esp")).unwrap(), PARTITION).unwrap();
    path
}

fn start(bed: &Bed, number: u32, disk: &Path, boot: Boot, devices: Devices) -> Vm {
    let id = DesktopId::new(number).unwrap();
    let mut spec = VmSpec::new(id, bed.ids, boot, bed.dir.path().join(number.to_string()));
    fs::create_dir(&spec.dir).unwrap();
    spec.limits.memory = Bytes::mib(256);
    spec.devices = devices;
    spec.screen = true;
    let file = File::options().read(true).write(true).open(disk).unwrap().into();
    spec.disks.push(DiskSpec { serial: "system".to_owned(), file, format: DiskFormat::Raw });
    let net = netns::create().unwrap();
    let tap = netns::in_netns(net.as_fd(), || tap::create("tap0", false)).unwrap().unwrap();
    spec.nics.push(NicSpec { tap, mac: [2, 0, 0, 0, 0, 1] });
    let mut vm = bed.qemu.start(spec).unwrap();
    vm.resume().unwrap();
    vm
}

#[test]
fn another_system_boots_from_its_disk_by_bios_and_by_uefi() {
    let programs = ["grub-mkimage", "mkfs.vfat", "mcopy"].map(Need::Program);
    privileged(&[&programs[..], &[Need::Path("/usr/lib/grub/i386-pc/boot.img")]].concat(), || {
        with_bed(|bed| {
            let work = tempfile::tempdir().unwrap();
            let first = disk(work.path());
            let second = work.path().join("second");
            fs::copy(&first, &second).unwrap();
            // The ids of Intel's AHCI and e1000, and of virtio's disk and interface.
            let emulated = ["8086:2922", "8086:100e"];
            let virtio = ["1af4:1001", "1af4:1000"];
            let mut both = [
                (start(bed, 1, &first, Boot::Bios, Devices::Emulated), "booted by pc", emulated),
                (start(bed, 2, &second, Boot::uefi().unwrap(), Devices::Virtio), "booted by efi", virtio),
            ];
            for (vm, word, ids) in &mut both {
                let deadline = Instant::now() + SOON;
                let mut said = String::new();
                while !matches!(vm.state(), VmState::Down(_)) {
                    assert!(Instant::now() < deadline, "{word}: {said}");
                    said.push_str(&vm.console().unwrap());
                    if said.contains("all of them.") {
                        break;
                    }
                    vm.watch(Duration::from_millis(50)).unwrap();
                }
                assert!(said.contains(*word), "{said}");
                for id in *ids {
                    assert!(said.contains(id), "{id}: {said}");
                }
                vm.close().unwrap();
            }
            for number in ["1", "2"] {
                fs::remove_dir(bed.dir.path().join(number)).unwrap();
            }
        });
    });
}
