//! What a clone has in common with its template, and what a template cannot have.

use serde::{Deserialize, Serialize};

use super::super::{QemuVersion, VmSpec, arguments::arguments, spec::Boot};
use crate::{Error, error::io_error};

/// What has to be the same for a clone as it was for its template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pins {
    /// Whose it is: memory that is shared can be told apart by time.
    tenant: String,
    pub(super) qemu: QemuVersion,
    /// Machine, processor, devices: all of it.
    arguments: Vec<String>,
    /// The base is mapped, not read: device, number, length and change.
    base: Option<[u64; 4]>,
    memory_bytes: u64,
}

impl Pins {
    pub(super) fn of(spec: &VmSpec, tenant: &str, qemu: QemuVersion) -> Result<Self, Error> {
        let mut list = arguments(spec);
        // Its name is each one's own, and a clone's memory is not shared.
        for at in (0..list.len()).rev() {
            if list.get(at).is_some_and(|flag| flag == "-name" || flag == "-incoming") {
                list.drain(at..(at + 2).min(list.len()));
            }
        }
        for argument in &mut list {
            if argument.contains(",id=ram0,") {
                *argument = argument.replace("share=on", "share=off");
            }
            // How much QEMU keeps of what it translated is no part of the machine.
            if argument.starts_with("tcg,tb-size=") {
                argument.truncate("tcg".len());
            }
        }
        let base = spec.base.as_ref().map(|base| {
            let about = rustix::fs::fstat(&base.file).map_err(io_error("look at the base"))?;
            let changed_ns =
                about.st_mtime.wrapping_mul(1_000_000_000).cast_unsigned().wrapping_add(about.st_mtime_nsec);
            Ok([about.st_dev, about.st_ino, base.size.get(), changed_ns])
        });
        Ok(Self {
            tenant: tenant.to_owned(),
            qemu,
            arguments: list,
            base: base.transpose()?,
            memory_bytes: spec.limits.memory.get(),
        })
    }

    /// What of `wanted` is not as it was, if anything.
    pub(super) fn differs(&self, wanted: &Self) -> Option<&'static str> {
        if self.tenant != wanted.tenant {
            return Some("it is another tenant's, and what is shared can be told by its timing");
        }
        if self.qemu != wanted.qemu {
            return Some("it was made by another version of QEMU; make it again");
        }
        if self.base != wanted.base {
            return Some("its base is another, or was changed; make it again");
        }
        (self != wanted).then_some("it was made for a machine with other memory, processors or devices; make it again")
    }
}

/// What a template cannot have, by name, and why.
pub(super) fn exclude(spec: &VmSpec) -> Result<(), Error> {
    let refuse = |what: &str, reason| Err(Error::Invalid { what: what.to_owned(), reason });
    if !spec.nics.is_empty() {
        return refuse("a template with a network interface", "every clone would have its address; plug it in later");
    }
    if !spec.disks.is_empty() {
        return refuse("a template with a disk of its own", "clones would write to one disk; plug it in later");
    }
    if !matches!(spec.boot, Boot::Kernel { .. }) {
        return refuse("a template of a foreign system", "nobody inside would give its clones other identities");
    }
    if spec.screen {
        return refuse("a template with a screen", "its picture would be every clone's");
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use std::{fs::File, os::fd::OwnedFd};

    use qvd_core::{Bytes, DesktopId, UidRange};

    use super::*;
    use crate::vm::{DiskFormat, DiskSpec, Memory, NicSpec};

    pub(in super::super) fn fd() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    pub(in super::super) fn spec(number: u32) -> VmSpec {
        let boot = Boot::Kernel { kernel: fd(), initramfs: fd(), parameters: "quiet".to_owned() };
        VmSpec::new(DesktopId::new(number).unwrap(), UidRange::of_slot(number).unwrap(), boot, "/run/x".into())
    }

    #[test]
    fn a_clone_is_of_the_same_machine_under_another_name() {
        let mut saved = spec(1);
        saved.memory = Memory::Saved(fd());
        let mut clone = spec(2);
        clone.memory = Memory::Cloned(fd());
        clone.incoming = true;
        let pins = |spec: &VmSpec, tenant| Pins::of(spec, tenant, QemuVersion::none()).unwrap();
        let template = pins(&saved, "school");
        assert_eq!(template.differs(&pins(&clone, "school")), None);
        assert!(template.arguments.contains(&"tcg".to_owned()), "{:?}", template.arguments);
        assert!(template.differs(&pins(&clone, "other")).unwrap().contains("another tenant"));
        let newer = Pins { qemu: QemuVersion { major: 10, ..QemuVersion::none() }, ..pins(&clone, "school") };
        assert!(template.differs(&newer).unwrap().contains("another version of QEMU"));
        clone.limits.memory = Bytes::mib(512);
        assert!(template.differs(&pins(&clone, "school")).unwrap().contains("other memory"));
    }

    #[test]
    fn what_clones_would_share_is_refused_by_name() {
        let mut with_nic = spec(1);
        with_nic.nics.push(NicSpec { tap: fd(), mac: [2, 0, 0, 0, 0, 1] });
        let mut with_disk = spec(1);
        with_disk.disks.push(DiskSpec { serial: "root".to_owned(), file: fd(), format: DiskFormat::Raw });
        let mut foreign = spec(1);
        foreign.boot = Boot::Bios;
        let named = [(with_nic, "network interface"), (with_disk, "disk"), (foreign, "foreign system")];
        for (spec, name) in named {
            let error = exclude(&spec).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
