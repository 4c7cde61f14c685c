//! A specification as libvirt's XML: a pure function.
//!
//! Source of every element: libvirt.org/formatdomain.html. Whatever is defined
//! is held against libvirt's schema, so that a word that it does not know is an error
//! and not ignored.

use std::path::Path;

use qvd_virt::vm::{Accel, BaseDevice, Boot, Devices, DiskFormat, Memory, VmSpec};

use crate::{Error, Files, node::Node};

/// What runs the domain, as the connection says.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// QEMU, by the accelerator that the specification names.
    Qemu,
    /// Something else, by libvirt's name for it: `test`, `xen`.
    Other(String),
}

/// What libvirt cannot do as it is asked, by name.
fn exclude(spec: &VmSpec) -> Result<(), Error> {
    let refuse = |what: &str, reason| Err(Error::Invalid { what: what.to_owned(), reason });
    if spec.incoming || !matches!(spec.memory, Memory::Anonymous) {
        return refuse("a template, or a clone of one", "libvirt starts machines with memory of their own only");
    }
    if spec.base.as_ref().is_some_and(|base| base.device == BaseDevice::Pmem) {
        let reason = "libvirt maps it for writing, and all guests would share what one writes; give it as a disk";
        return refuse("a base that is memory", reason);
    }
    Ok(())
}

/// The domain `name` that `spec` is, of the files that it names.
///
/// # Errors
/// [`Error::Invalid`] says what libvirt cannot do; [`Error::Spec`] what nobody can.
pub fn domain_xml(name: &str, kind: &Kind, spec: &VmSpec, files: &Files) -> Result<String, Error> {
    spec.check().map_err(|source| Error::Spec { id: spec.id, source })?;
    exclude(spec)?;
    let qemu = *kind == Kind::Qemu;
    let accel = match (kind, spec.accel) {
        (Kind::Other(name), _) => name,
        (_, Accel::Kvm) => "kvm",
        _ => "qemu",
    };
    let emulated = spec.devices == Devices::Emulated;
    let mut domain = Node::new("domain").with("type", accel);
    domain.text_child("name", name);
    domain.push(Node::new("memory").with("unit", "b").text(spec.limits.memory.get()));
    domain.push(Node::new("vcpu").text(spec.processors()));
    if qemu {
        // Not with those of anybody's: a page that is shared can be told by timing.
        domain.push(Node::new("memoryBacking").child(Node::new("nosharepages")));
        domain.push(quota(spec));
        domain.push(Node::new("genid"));
    }
    domain.push(os(spec, qemu, files)?);
    domain.push(features(spec, qemu));
    if qemu {
        let cpu = if spec.accel == Accel::Kvm { "host-passthrough" } else { "maximum" };
        domain.push(Node::new("cpu").with("mode", cpu));
    }
    domain.push(Node::new("clock").with("offset", if emulated { "localtime" } else { "utc" }));
    let ours = matches!(spec.boot, Boot::Kernel { .. });
    domain.text_child("on_poweroff", "destroy");
    domain.text_child("on_reboot", if ours { "destroy" } else { "restart" });
    domain.text_child("on_crash", "destroy");
    domain.push(devices(spec, qemu, files)?);
    if qemu {
        // Each machine's QEMU is a user of its own.
        let label = Node::new("label").text(format!("+{0}:+{0}", spec.ids.base()));
        let own = Node::new("seclabel").with("type", "static").with("model", "dac").with("relabel", "yes");
        domain.push(own.child(label));
    }
    domain.write()
}

/// Processor time as a part of a tenth of a second.
fn quota(spec: &VmSpec) -> Node {
    let (period_us, share) = (100_000, u64::from(spec.limits.cpu.0));
    let mut quota = Node::new("cputune");
    quota.text_child("global_period", period_us);
    quota.text_child("global_quota", share * period_us / 1000);
    quota
}

fn text(path: &Path) -> Result<String, Error> {
    let reason = "libvirt takes names of UTF-8 without control characters only";
    let text = path.to_str().filter(|text| !text.chars().any(char::is_control));
    Ok(text.ok_or_else(|| Error::Invalid { what: format!("file {path:?}"), reason })?.to_owned())
}

fn os(spec: &VmSpec, qemu: bool, files: &Files) -> Result<Node, Error> {
    let mut os = Node::new("os");
    let mut kind = Node::new("type").with("arch", "x86_64");
    if qemu {
        kind = kind.with("machine", "q35");
    }
    os.push(kind.text("hvm"));
    let missing = || Error::Invalid { what: "files of a domain".to_owned(), reason: "they are of another machine" };
    match &spec.boot {
        Boot::Kernel { parameters, .. } => {
            let (kernel, initramfs) = files.boot.as_ref().ok_or_else(missing)?;
            os.text_child("kernel", text(kernel)?);
            os.text_child("initrd", text(initramfs)?);
            os.text_child("cmdline", parameters);
        }
        Boot::Uefi { .. } => {
            let (code, variables) = files.boot.as_ref().ok_or_else(missing)?;
            os.push(Node::new("loader").with("readonly", "yes").with("type", "pflash").text(text(code)?));
            os.text_child("nvram", text(variables)?);
        }
        _ => {}
    }
    Ok(os)
}

fn features(spec: &VmSpec, qemu: bool) -> Node {
    let mut features = Node::new("features").child(Node::new("acpi")).child(Node::new("apic"));
    if qemu && spec.accel == Accel::Tcg {
        let cache = Node::new("tb-cache").with("unit", "MiB").text(spec.translated().get() >> 20);
        features.push(Node::new("tcg").child(cache));
    }
    if qemu && spec.accel == Accel::Kvm && spec.devices == Devices::Emulated {
        // With them Windows asks the hypervisor instead of spinning.
        let on = |name| Node::new(name).with("state", "on");
        let spin = on("spinlocks").with("retries", "8191");
        features.push(Node::new("hyperv").child(on("relaxed")).child(on("vapic")).child(spin));
    }
    features
}

fn devices(spec: &VmSpec, qemu: bool, files: &Files) -> Result<Node, Error> {
    let emulated = spec.devices == Devices::Emulated;
    let foreign = !matches!(spec.boot, Boot::Kernel { .. });
    let mut devices = Node::new("devices");
    for (index, (disk, (file, backing))) in spec.disks.iter().zip(&files.disks).enumerate() {
        let (format, behind) = match &disk.format {
            DiskFormat::Qcow2 { backing } => ("qcow2", backing.as_ref().map(|backing| backing.qcow2)),
            _ => ("raw", None),
        };
        let mut node = Node::new("disk").with("type", "file").with("device", "disk");
        node.push(
            Node::new("driver")
                .with("name", "qemu")
                .with("type", format)
                .with("discard", "unmap")
                .with("error_policy", "enospace"),
        );
        node.push(Node::new("source").with("file", text(file)?));
        if format == "qcow2" {
            // What is said here is all: what the header says is not followed.
            node.push(match (behind, backing) {
                (Some(qcow2), Some(file)) => Node::new("backingStore")
                    .with("type", "file")
                    .child(Node::new("format").with("type", if qcow2 { "qcow2" } else { "raw" }))
                    .child(shared(file, qemu)?)
                    .child(Node::new("backingStore")),
                _ => Node::new("backingStore"),
            });
        }
        node.push(target(index, emulated));
        node.text_child("serial", &disk.serial);
        if foreign && index == 0 {
            node.push(Node::new("boot").with("order", 1));
        }
        devices.push(node);
    }
    if let Some(base) = &files.base {
        let mut node = Node::new("disk").with("type", "file").with("device", "disk");
        node.push(Node::new("driver").with("name", "qemu").with("type", "raw"));
        node.push(shared(base, qemu)?);
        node.push(target(spec.disks.len(), emulated));
        node.push(Node::new("readonly"));
        node.text_child("serial", "qvd-base");
        devices.push(node);
    }
    for (nic, tap) in spec.nics.iter().zip(&files.taps) {
        // A port of ours, with the rules that are on it; libvirt's networks and filters have no part in it.
        let mut node = Node::new("interface").with("type", "ethernet");
        let mac = nic.mac.map(|byte| format!("{byte:02x}")).join(":");
        node.push(Node::new("mac").with("address", mac));
        node.push(Node::new("target").with("dev", tap).with("managed", "no"));
        node.push(Node::new("model").with("type", if emulated { "e1000" } else { "virtio" }));
        node.push(Node::new("rom").with("enabled", "no"));
        devices.push(node);
    }
    let usb = if emulated { "qemu-xhci" } else { "none" };
    devices.push(Node::new("controller").with("type", "usb").with("model", usb));
    if emulated {
        devices.push(Node::new("input").with("type", "tablet").with("bus", "usb"));
    }
    let socket = |name: &str| {
        let path = text(&spec.dir.join(name))?;
        Ok::<_, Error>(Node::new("source").with("mode", "bind").with("path", path))
    };
    devices.push(Node::new("serial").with("type", "unix").child(socket("console.sock")?));
    let port = Node::new("target").with("type", "virtio").with("name", VmSpec::LINK_PORT);
    devices.push(Node::new("channel").with("type", "unix").child(socket("link.sock")?).child(port));
    let screen = if spec.screen { "vga" } else { "none" };
    devices.push(Node::new("video").child(Node::new("model").with("type", screen)));
    let balloon = Node::new("memballoon").with("model", "virtio");
    devices.push(if qemu { balloon.with("autodeflate", "on").with("freePageReporting", "on") } else { balloon });
    if qemu {
        devices.push(Node::new("rng").with("model", "virtio").child(Node::new("backend").with("model", "builtin")));
    }
    Ok(devices)
}

/// A file that others read as well: libvirt does not give it to this domain's user.
fn shared(path: &Path, qemu: bool) -> Result<Node, Error> {
    let source = Node::new("source").with("file", text(path)?);
    let keep = Node::new("seclabel").with("model", "dac").with("relabel", "no");
    Ok(if qemu { source.child(keep) } else { source })
}

fn target(index: usize, emulated: bool) -> Node {
    let letter = char::from(b'a'.saturating_add(u8::try_from(index).unwrap_or(25).min(25)));
    let (dev, bus) = if emulated { ("sd", "sata") } else { ("vd", "virtio") };
    Node::new("target").with("dev", format!("{dev}{letter}")).with("bus", bus)
}

#[cfg(test)]
mod tests;
