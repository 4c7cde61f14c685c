//! QEMU's command line, from a specification: a pure function, so that what a
//! template was made with can be compared.

use qvd_core::DesktopId;
use serde_json::{Value, json};

use super::spec::{Accel, BaseDevice, Boot, Devices, DiskFormat, Memory, VmSpec};

/// Bytes of the guest's console that are kept.
pub(crate) const CONSOLE_BYTES: u32 = 64 * 1024;

/// A disk that cannot grow stops the machine instead of failing in the guest, whose
/// file system would not recover; any other failure is the guest's to hear of.
pub(super) const WHEN_WRITING_FAILS: &str = "enospc";
/// See [`WHEN_WRITING_FAILS`].
pub(super) const WHEN_READING_FAILS: &str = "report";

/// What a descriptor is for; its number inside comes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Numbers {
    pub(crate) control: u8,
    pub(crate) link: u8,
    next: u8,
}

impl Numbers {
    /// Behind standard input, output and error.
    pub(crate) const FIRST: Self = Self { control: 3, link: 4, next: 5 };

    fn take(&mut self) -> u8 {
        let number = self.next;
        self.next += 1;
        number
    }
}

/// Arguments of a machine, its name not included, and the descriptors that
/// they mean in the order of their numbers, after control and link.
pub(crate) fn arguments(spec: &VmSpec) -> Vec<String> {
    let mut numbers = Numbers::FIRST;
    let mut line = Line::default();
    common(&mut line, spec);
    boot(&mut line, spec, &mut numbers);
    memory(&mut line, spec, &mut numbers);
    devices(&mut line, spec);
    base(&mut line, spec, &mut numbers);
    for (index, disk) in spec.disks.iter().enumerate() {
        let file = numbers.take();
        let node = format!("disk{index}");
        line.descriptor_set(file);
        let backing = match &disk.format {
            DiskFormat::Qcow2 { backing: Some(backing) } => {
                let number = numbers.take();
                line.descriptor_set(number);
                let driver = if backing.qcow2 { "qcow2" } else { "raw" };
                let mut node = json!({ "driver": driver, "file": file_node(number, true), "read-only": true });
                if backing.qcow2 {
                    node["backing"] = Value::Null;
                }
                node
            }
            _ => Value::Null,
        };
        let mut block = json!({ "node-name": node, "file": file_node(file, false), "discard": "unmap" });
        match disk.format {
            DiskFormat::Raw => block["driver"] = json!("raw"),
            DiskFormat::Qcow2 { .. } => {
                block["driver"] = json!("qcow2");
                // Whatever the header says, nothing else is opened.
                block["backing"] = backing;
            }
        }
        line.add("-blockdev", block.to_string());
        let boot = if index == 0 { ",bootindex=1" } else { "" };
        let device = match spec.devices {
            Devices::Virtio => "virtio-blk-pci".to_owned(),
            Devices::Emulated => format!("ide-hd,bus=ide.{index}"),
        };
        let serial = &disk.serial;
        let failing = format!("werror={WHEN_WRITING_FAILS},rerror={WHEN_READING_FAILS}");
        line.add("-device", format!("{device},id={node}-dev,drive={node},serial={serial},{failing}{boot}"));
    }
    for (index, nic) in spec.nics.iter().enumerate() {
        let tap = numbers.take();
        line.add("-netdev", format!("tap,id=net{index},fd={tap}"));
        let device = if spec.devices == Devices::Virtio { "virtio-net-pci" } else { "e1000" };
        line.add("-device", format!("{device},id=nic{index},netdev=net{index},mac={},romfile=", mac(&nic.mac)));
    }
    if spec.incoming {
        line.add("-incoming", "defer");
    }
    line.0
}

/// As QEMU writes it.
pub(crate) fn mac(bytes: &[u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

/// Name of a machine's process.
fn name(id: DesktopId) -> String {
    format!("desktop-{id}")
}

fn common(line: &mut Line, spec: &VmSpec) {
    line.add("-name", name(spec.id));
    // Nothing of the host's configuration, and no device that is not named here.
    for flag in ["-no-user-config", "-nodefaults", "-S"] {
        line.flag(flag);
    }
    line.add("-display", "none");
    line.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    let kernel = matches!(spec.boot, Boot::Kernel { .. });
    let disk = if kernel { ",sata=off,smbus=off" } else { "" };
    let graphics = if spec.screen { "" } else { ",graphics=off" };
    line.add(
        "-machine",
        format!("q35,memory-backend=ram0,usb=off,vmport=off,dump-guest-core=off,mem-merge=off{disk}{graphics}"),
    );
    match spec.accel {
        Accel::Kvm => {
            line.add("-accel", "kvm");
            // With them Windows asks the hypervisor instead of spinning.
            let hints = ",hv-relaxed,hv-vapic,hv-time,hv-spinlocks=0x1fff";
            line.add("-cpu", format!("host{}", if spec.devices == Devices::Virtio { "" } else { hints }));
        }
        Accel::Tcg => {
            line.add("-accel", format!("tcg,tb-size={}", spec.translated().get() >> 20));
            line.add("-cpu", "max");
        }
    }
    line.add("-smp", spec.processors().to_string());
    let reboot = if kernel { "shutdown" } else { "reset" };
    line.add("-action", format!("reboot={reboot},panic=shutdown"));
    let clock = if spec.devices == Devices::Virtio { "utc" } else { "localtime" };
    line.add("-rtc", format!("base={clock}"));
    let Numbers { control, link, .. } = Numbers::FIRST;
    line.add("-chardev", format!("socket,id=control,fd={control},server=on,wait=off"));
    line.add("-mon", "chardev=control,mode=control");
    line.add("-chardev", format!("ringbuf,id=console,size={CONSOLE_BYTES}"));
    line.add("-serial", "chardev:console");
    line.add("-device", "virtio-serial-pci,id=serial0,max_ports=2");
    line.add("-chardev", format!("socket,id=link,fd={link},server=on,wait=off"));
    line.add("-device", format!("virtserialport,bus=serial0.0,nr=1,chardev=link,id=link0,name={}", VmSpec::LINK_PORT));
}

fn boot(line: &mut Line, spec: &VmSpec, numbers: &mut Numbers) {
    match &spec.boot {
        Boot::Kernel { parameters, .. } => {
            line.add("-kernel", path(numbers.take()));
            line.add("-initrd", path(numbers.take()));
            line.add("-append", parameters.clone());
        }
        Boot::Bios => {}
        Boot::Uefi { .. } => {
            for (unit, read_only) in [(0, true), (1, false)] {
                let number = numbers.take();
                line.descriptor_set(number);
                let node = json!({
                    "driver": "raw", "node-name": format!("flash{unit}"), "read-only": read_only,
                    "file": file_node(number, read_only),
                });
                line.add("-blockdev", node.to_string());
                line.add("-machine", format!("pflash{unit}=flash{unit}"));
            }
        }
    }
}

fn memory(line: &mut Line, spec: &VmSpec, numbers: &mut Numbers) {
    let size = spec.limits.memory.get();
    // QEMU allows the kernel to merge a guest's pages with anybody's unless it
    // is told otherwise: `Vm::allow_merging` is for one tenant's.
    let object = match spec.memory {
        Memory::Anonymous => format!("memory-backend-ram,id=ram0,size={size},merge=off"),
        Memory::Saved(_) | Memory::Cloned(_) => {
            let share = if matches!(spec.memory, Memory::Saved(_)) { "on" } else { "off" };
            format!("memory-backend-file,id=ram0,size={size},merge=off,share={share},mem-path={}", path(numbers.take()))
        }
    };
    line.add("-object", object);
    // Room for the base, which is memory to the guest, aligned to 1 GiB.
    let pmem = spec.base.as_ref().filter(|base| base.device == BaseDevice::Pmem);
    match pmem.map(|base| (size + base.size.get()).next_multiple_of(1 << 30) + (1 << 30)) {
        Some(most) => line.add("-m", format!("{size}B,maxmem={most}B")),
        None => line.add("-m", format!("{size}B")),
    }
}

fn devices(line: &mut Line, spec: &VmSpec) {
    line.add("-object", "rng-builtin,id=rng0");
    line.add("-device", "virtio-rng-pci,id=rng-dev,rng=rng0");
    // Tells a guest that it is a clone now, so that it reseeds.
    line.add("-device", "vmgenid,id=generation0,guid=auto");
    // Where a device is plugged in while the machine runs.
    for (index, chassis) in ["slot0", "slot1"].into_iter().zip(1..) {
        line.add("-device", format!("pcie-root-port,id={index},bus=pcie.0,chassis={chassis},slot={chassis}"));
    }
    if !spec.memory.is_file() {
        line.add("-device", "virtio-balloon-pci,id=balloon0,deflate-on-oom=on,free-page-reporting=on");
    }
    if spec.screen {
        line.add("-device", "VGA,id=screen0");
    }
    if spec.devices == Devices::Emulated {
        // A mouse would be wherever the guest believes it to be.
        line.add("-device", "qemu-xhci,id=usb0");
        line.add("-device", "usb-tablet,id=tablet0,bus=usb0.0");
    }
}

fn base(line: &mut Line, spec: &VmSpec, numbers: &mut Numbers) {
    let Some(base) = &spec.base else { return };
    let number = numbers.take();
    match base.device {
        BaseDevice::Pmem => {
            let (size, file) = (base.size.get(), path(number));
            line.add(
                "-object",
                format!("memory-backend-file,id=base0,size={size},merge=off,share=on,readonly=on,mem-path={file}"),
            );
            line.add("-device", "virtio-pmem-pci,id=base-dev,memdev=base0");
        }
        BaseDevice::Block => {
            line.descriptor_set(number);
            let node = json!({
                "driver": "raw", "node-name": "base0", "read-only": true, "file": file_node(number, true),
            });
            line.add("-blockdev", node.to_string());
            line.add("-device", "virtio-blk-pci,id=base-dev,drive=base0,serial=qvd-base");
        }
    }
}

/// A descriptor as a file's name: QEMU opens it anew, with its own rights.
fn path(number: u8) -> String {
    format!("/proc/self/fd/{number}")
}

/// A descriptor as a block node, used as it is.
fn file_node(number: u8, read_only: bool) -> Value {
    json!({
        "driver": "file", "filename": format!("/dev/fdset/{number}"), "read-only": read_only, "locking": "off",
    })
}

#[derive(Debug, Default)]
struct Line(Vec<String>);

impl Line {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.to_owned());
    }

    fn add(&mut self, name: &str, value: impl Into<String>) {
        self.0.push(name.to_owned());
        self.0.push(value.into());
    }

    fn descriptor_set(&mut self, number: u8) {
        self.add("-add-fd", format!("fd={number},set={number}"));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{fs::File, os::fd::OwnedFd, path::PathBuf};

    use qvd_core::{Bytes, UidRange};

    use super::*;
    use crate::vm::{BackingSpec, BaseSpec, DiskSpec, NicSpec};

    fn fd() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn spec() -> VmSpec {
        let boot = Boot::Kernel { kernel: fd(), initramfs: fd(), parameters: "quiet".to_owned() };
        let ids = UidRange::of_slot(1).unwrap();
        VmSpec::new(DesktopId::new(7).unwrap(), ids, boot, PathBuf::from("/run/x"))
    }

    fn has(spec: &VmSpec, name: &str, value: &str) -> bool {
        arguments(spec).windows(2).any(|pair| pair[0] == name && pair[1].contains(value))
    }

    #[test]
    fn nothing_listens_but_on_descriptors_and_nothing_is_spawned() {
        let line = arguments(&spec()).join(" ");
        assert!(!line.contains("tcp:") && !line.contains("host=") && !line.contains("path="), "{line}");
        assert!(line.contains("spawn=deny") && line.contains("elevateprivileges=deny"));
    }

    #[test]
    fn each_descriptor_has_a_number_of_its_own() {
        let mut spec = spec();
        spec.memory = Memory::Saved(fd());
        spec.base = Some(BaseSpec { file: fd(), size: Bytes::mib(64), device: BaseDevice::Pmem });
        let backing = Some(Box::new(BackingSpec { file: fd(), qcow2: false }));
        spec.disks.push(DiskSpec { serial: "root".to_owned(), file: fd(), format: DiskFormat::Qcow2 { backing } });
        spec.nics.push(NicSpec { tap: fd(), mac: [2, 0, 0, 0, 0, 1] });
        for (name, value) in [
            ("-kernel", "/fd/5"),
            ("-initrd", "/fd/6"),
            ("-object", "share=on,mem-path=/proc/self/fd/7"),
            ("-object", "readonly=on,mem-path=/proc/self/fd/8"),
            ("-add-fd", "fd=9,set=9"),
            ("-add-fd", "fd=10,set=10"),
            ("-netdev", "fd=11"),
        ] {
            assert!(has(&spec, name, value), "{name} {value}: {:?}", arguments(&spec));
        }
    }

    #[test]
    fn a_disk_opens_what_the_specification_names_and_never_what_its_header_says() {
        let mut spec = spec();
        let format = DiskFormat::Qcow2 { backing: None };
        spec.disks.push(DiskSpec { serial: "root".to_owned(), file: fd(), format });
        assert!(has(&spec, "-blockdev", r#""backing":null"#));
    }

    #[test]
    fn nobody_shares_pages_unless_allowed_to() {
        let mut spec = spec();
        spec.base = Some(BaseSpec { file: fd(), size: Bytes::mib(64), device: BaseDevice::Pmem });
        for memory in [Memory::Anonymous, Memory::Saved(fd()), Memory::Cloned(fd())] {
            spec.memory = memory;
            let line = arguments(&spec).join(" ");
            assert_eq!(line.matches("memory-backend-").count(), line.matches(",merge=off").count(), "{line}");
            assert!(line.contains(",mem-merge=off"), "{line}");
        }
    }

    #[test]
    fn what_was_translated_has_an_eighth_of_the_guests_memory_within_bounds() {
        for (memory, translated) in [(64, 16), (128, 16), (256, 32), (512, 64), (8192, 64)] {
            let mut spec = spec();
            spec.limits.memory = Bytes::mib(memory);
            let line = arguments(&spec);
            assert!(line.contains(&format!("tcg,tb-size={translated}")), "{memory}: {line:?}");
        }
        let mut clone = spec();
        clone.limits.memory = Bytes::mib(512);
        clone.memory = Memory::Cloned(fd());
        assert!(has(&clone, "-accel", "tb-size=32"));
        clone.limits.memory = Bytes::mib(128);
        assert!(has(&clone, "-accel", "tb-size=12"));
    }

    #[test]
    fn a_template_has_no_balloon() {
        let mut spec = spec();
        assert!(has(&spec, "-device", "virtio-balloon-pci"));
        spec.memory = Memory::Saved(fd());
        assert!(!has(&spec, "-device", "virtio-balloon-pci"));
    }
}
