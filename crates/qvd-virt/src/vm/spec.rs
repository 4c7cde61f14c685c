//! What a virtual machine is asked to be.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use qvd_core::{Bytes, DesktopId, Limits, Missing, UidRange};
use qvd_sys::process::memory_file;
use serde::{Deserialize, Serialize};

use super::kernel::GuestKernel;
use crate::{Error, error::io_error};

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Accel {
    /// The host's processor, by the kernel.
    Kvm,
    /// QEMU translates them. A tenth of the speed or less, and a buffer for
    /// what was translated in each machine.
    Tcg,
}

/// How a guest gets going.
#[derive(Debug)]
#[non_exhaustive]
pub enum Boot {
    /// A kernel that we hand over, with our init in its initramfs.
    Kernel {
        /// The kernel image.
        kernel: OwnedFd,
        /// Its initramfs.
        initramfs: OwnedFd,
        /// Its parameters.
        parameters: String,
    },
    /// What the first disk has, by a BIOS.
    Bios,
    /// What the first disk has, by UEFI.
    Uefi {
        /// The firmware's code, read only.
        code: OwnedFd,
        /// The firmware's variables, this machine's own.
        variables: OwnedFd,
    },
}

/// Where hosts have the firmware for UEFI, and what its variables begin as:
/// Debian and Ubuntu, Fedora, Arch.
const FIRMWARE: [(&str, &str); 4] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
];

impl Boot {
    /// By UEFI, with the host's firmware and variables that are forgotten with
    /// the machine. The firmware finds a system by its usual place on the disk; for
    /// one that it has to remember give a file of the machine's own.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the host has no such firmware; or it cannot
    /// be read.
    pub fn uefi() -> Result<Self, Error> {
        let found = FIRMWARE.iter().find(|(code, _)| Path::new(code).is_file());
        let missing = Missing::Program("OVMF, the firmware for UEFI (package ovmf)".into());
        let (code, variables) = found.ok_or(Error::Unsupported { op: "boot by UEFI", missing })?;
        let copy = || {
            let to = memory_file(c"qvd-uefi-variables")?;
            io::copy(&mut File::open(variables)?, &mut File::from(to.try_clone()?))?;
            Ok(Self::Uefi { code: File::open(code)?.into(), variables: to })
        };
        copy().map_err(io_error::<io::Error>(format!("read `{code}` and its variables")))
    }
}

/// What a machine's disks, interfaces and pointer are to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Devices {
    /// What was made for virtual machines: fast, and known to every Linux.
    #[default]
    Virtio,
    /// What real machines had (AHCI, e1000, a USB tablet, a clock that keeps the local
    /// time), for systems without drivers for the other: Windows as it comes.
    Emulated,
}

/// How the guest sees the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BaseDevice {
    /// As memory: programs run from the host's page cache, which all guests
    /// of one base share; the guest caches nothing of it.
    Pmem,
    /// As a disk, whose content every guest caches for itself.
    Block,
}

/// What all guests of an image read from.
#[derive(Debug)]
pub struct BaseSpec {
    /// An image of a file system. Everybody may read it, and it has been
    /// opened for reading only.
    pub file: OwnedFd,
    /// Its length; a multiple of 2 MiB for [`BaseDevice::Pmem`].
    pub size: Bytes,
    /// How the guest sees it.
    pub device: BaseDevice,
}

/// What a disk's file holds.
#[derive(Debug)]
#[non_exhaustive]
pub enum DiskFormat {
    /// The disk's bytes.
    Raw,
    /// A qcow2 image. What its header says of a backing file is ignored: the
    /// one given here is used, or none.
    Qcow2 {
        /// The file that it is an overlay on, with its own format.
        backing: Option<Box<BackingSpec>>,
    },
}

/// What a disk is an overlay on.
#[derive(Debug)]
pub struct BackingSpec {
    /// Opened for reading only.
    pub file: OwnedFd,
    /// Whether it is a qcow2 image itself, without a backing file.
    pub qcow2: bool,
}

/// A disk of the machine's own.
#[derive(Debug)]
pub struct DiskSpec {
    /// What the guest finds it by, at most 20 of a-z, 0-9 and `-`.
    pub serial: String,
    /// Opened for reading and writing.
    pub file: OwnedFd,
    /// What it holds.
    pub format: DiskFormat,
}

/// A network interface.
#[derive(Debug)]
pub struct NicSpec {
    /// An attached tap device.
    pub tap: OwnedFd,
    /// Its address for Ethernet.
    pub mac: [u8; 6],
}

/// Where a guest's memory is.
#[derive(Debug)]
#[non_exhaustive]
pub enum Memory {
    /// Nowhere else: the balloon can give it back, and equal pages of several
    /// guests can become one.
    Anonymous,
    /// In a memory file that becomes a template's. What the guest writes is
    /// written there.
    Saved(OwnedFd),
    /// As a template's was, until this guest writes to it.
    Cloned(OwnedFd),
}

impl Memory {
    /// Whether the machine has the devices of a template: no balloon, which a
    /// memory file cannot serve.
    #[must_use]
    pub const fn is_file(&self) -> bool {
        !matches!(self, Self::Anonymous)
    }
}

/// All that is needed to start a virtual machine.
#[derive(Debug)]
#[non_exhaustive]
pub struct VmSpec {
    /// Its number; names its cgroup.
    pub id: DesktopId,
    /// Host ids that QEMU's process runs with.
    pub ids: UidRange,
    /// What it may use. Memory is the guest's; what QEMU needs itself is
    /// added for the cgroup. Processor time is rounded up to whole processors
    /// of the guest.
    pub limits: Limits,
    /// What executes it.
    pub accel: Accel,
    /// How it gets going.
    pub boot: Boot,
    /// Where its memory is.
    pub memory: Memory,
    /// What it reads from.
    pub base: Option<BaseSpec>,
    /// Its own disks.
    pub disks: Vec<DiskSpec>,
    /// Its network interfaces.
    pub nics: Vec<NicSpec>,
    /// Whether it has a screen of its own, for systems that are not ours.
    pub screen: bool,
    /// What its disks and interfaces are to the guest.
    pub devices: Devices,
    /// Directory for its control sockets; nobody but root can enter it.
    pub dir: PathBuf,
    /// Whether it waits for a template's state instead of booting.
    pub incoming: bool,
}

/// Directory of a path's file system that is long enough for our sockets:
/// `sun_path` has 108 bytes, unix(7), and the longest name is `/qmp.sock`.
const MAX_DIR: usize = 90;

/// Disks that q35's own controller has places for.
const MAX_AHCI: usize = 6;

impl VmSpec {
    /// Name of the serial port that our init speaks on.
    pub const LINK_PORT: &str = "org.qvd.link";

    /// Parameters of our own guests' kernel. Without `swiotlb=noforce` it
    /// takes 64 MiB for devices that cannot reach all memory, which ours can; and
    /// programs that do not ask for huge pages would get them, most of them unused.
    pub const PARAMETERS: &str =
        "quiet panic=-1 swiotlb=noforce transparent_hugepage=madvise random.trust_cpu=on console=ttyS0 -- boot";

    /// A machine that boots `kernel` with default limits, no base, no disk
    /// and no network.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn of_kernel(id: DesktopId, ids: UidRange, kernel: &GuestKernel, dir: PathBuf) -> Result<Self, Error> {
        let keep = io_error("keep the guest's kernel");
        let both = kernel.kernel().try_clone_to_owned();
        let (image, initramfs) =
            both.and_then(|image| Ok((image, kernel.initramfs().try_clone_to_owned()?))).map_err(keep)?;
        let boot = Boot::Kernel { kernel: image, initramfs, parameters: Self::PARAMETERS.to_owned() };
        Ok(Self::new(id, ids, boot, dir))
    }

    /// A machine that boots as `boot` says.
    #[must_use]
    pub fn new(id: DesktopId, ids: UidRange, boot: Boot, dir: PathBuf) -> Self {
        Self {
            id,
            ids,
            limits: Limits::default(),
            accel: Accel::Tcg,
            boot,
            memory: Memory::Anonymous,
            base: None,
            disks: Vec::new(),
            nics: Vec::new(),
            screen: false,
            devices: Devices::default(),
            dir,
            incoming: false,
        }
    }

    /// Processors of the guest.
    #[must_use]
    pub fn processors(&self) -> u32 {
        self.limits.cpu.0.div_ceil(1000).clamp(1, 64)
    }

    /// Most memory for instructions that were translated for [`Accel::Tcg`]: an eighth of
    /// the guest's, and of a clone's, which runs no boot, a sixteenth; from 16 MiB, of a clone's
    /// from 12, to 64. QEMU's default of 1 GiB would count as the desktop's. What has no room any
    /// more is translated again when it is needed: a minimal guest does with 16 as fast as
    /// with 64, and with 8 takes twice as long; so does a clone.
    #[must_use]
    pub fn translated(&self) -> Bytes {
        let (part, least) = if matches!(self.memory, Memory::Cloned(_)) { (16, 12) } else { (8, 16) };
        Bytes::mib(((self.limits.memory.get() / part) >> 20).clamp(least, 64))
    }

    /// Everything that can be found wrong without touching the kernel.
    ///
    /// # Errors
    /// [`Error::Invalid`] names it.
    pub fn check(&self) -> Result<(), Error> {
        let refuse = |what: String, reason| Err(Error::Invalid { what, reason });
        let memory = self.limits.memory.get();
        if memory < Self::LEAST_MEMORY.get() || !memory.is_multiple_of(2 << 20) {
            let reason = "a guest needs 64 MiB or more, in steps of 2 MiB";
            return refuse(format!("{} of memory", self.limits.memory), reason);
        }
        if let Some(base) = &self.base
            && base.device == BaseDevice::Pmem
            && !base.size.get().is_multiple_of(2 << 20)
        {
            return refuse(format!("a base of {} bytes", base.size.get()), "as memory it is a multiple of 2 MiB");
        }
        for disk in &self.disks {
            let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            if disk.serial.is_empty() || disk.serial.len() > 20 || !disk.serial.bytes().all(plain) {
                return refuse(format!("disk {:?}", disk.serial), "use 1 to 20 of a-z 0-9 -");
            }
        }
        if self.dir.as_os_str().len() > MAX_DIR || !self.dir.is_absolute() {
            return refuse(format!("directory {:?}", self.dir), "sockets need an absolute path of 90 bytes at most");
        }
        let ours = matches!(self.boot, Boot::Kernel { .. });
        if !ours && self.disks.is_empty() {
            return refuse("a machine without a disk".to_owned(), "there is nothing to boot");
        }
        if self.devices == Devices::Emulated && (ours || self.disks.len() > MAX_AHCI) {
            let reason = "only a foreign system has emulated devices, and six disks at most";
            return refuse("a machine with emulated devices".to_owned(), reason);
        }
        if self.incoming != matches!(self.memory, Memory::Cloned(_)) {
            return refuse("a state without its memory".to_owned(), "a clone needs both of its template");
        }
        Ok(())
    }

    /// The least that a kernel with our init comes up with.
    pub const LEAST_MEMORY: Bytes = Bytes::mib(64);
}
