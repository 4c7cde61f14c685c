//! What is changed about a machine while it runs, and what is seen of it.

use std::{
    fs::File,
    io::Read as _,
    os::fd::{AsFd as _, AsRawFd as _},
    time::Duration,
};

use qvd_core::Bytes;
use qvd_sys::process::memory_file;
use serde_json::json;

use super::{
    QmpError, Vm,
    arguments::{WHEN_READING_FAILS, WHEN_WRITING_FAILS, mac},
    command::{
        AddFd, BlockResize, BlockdevAdd, BlockdevDel, DeviceAdd, DeviceDel, GetFd, NetdevAdd, NetdevDel,
        QueryGeneration, QueryNodes, RemoveFd, Screendump, SnapshotDelete, Transaction,
    },
    spec::{DiskFormat, DiskSpec, NicSpec},
};
use crate::{Error, error::io_error};

/// Where something can be plugged in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Slot {
    /// The first place.
    First,
    /// The second place.
    Second,
}

impl Slot {
    const fn name(self) -> &'static str {
        match self {
            Self::First => "slot0",
            Self::Second => "slot1",
        }
    }

    /// Numbers of descriptor sets are the machine's own; those of its start
    /// are small. The next is for what is behind the first.
    const fn set(self) -> u32 {
        match self {
            Self::First => 100,
            Self::Second => 102,
        }
    }
}

/// Set for a picture, see [`Slot::set`].
const PICTURE_SET: u32 = 104;

/// Largest picture that is read, in bytes: 4096 x 4096 pixels and a header.
const MAX_PICTURE: u64 = (4096 * 4096 * 3) + 64;

/// What a screen shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Pixels across.
    pub width: u32,
    /// Pixels down.
    pub height: u32,
    /// Red, green and blue of each, row by row from the top.
    pub rgb: Vec<u8>,
}

impl Vm {
    /// Plugs in a network interface. A guest that runs takes it within a second
    /// or two; one that stands still finds it when it goes on.
    ///
    /// # Errors
    /// The place is taken, or QEMU refuses.
    pub fn plug_nic(&mut self, slot: Slot, nic: &NicSpec) -> Result<(), Error> {
        let name = slot.name();
        self.call_with(&GetFd { fdname: name }, &[nic.tap.as_fd()])?;
        self.call(&NetdevAdd(json!({ "type": "tap", "id": format!("{name}-net"), "fd": name })))?;
        let device = json!({
            "driver": "virtio-net-pci", "id": format!("{name}-dev"), "bus": name, "netdev": format!("{name}-net"),
            "mac": mac(&nic.mac), "romfile": "",
        });
        let added = self.call(&DeviceAdd(device)).map(drop);
        added.inspect_err(|_| drop(self.call(&NetdevDel { id: &format!("{name}-net") })))
    }

    /// Plugs in a disk, with what it is an overlay on.
    ///
    /// # Errors
    /// The place is taken, or QEMU refuses.
    pub fn plug_disk(&mut self, slot: Slot, disk: &DiskSpec) -> Result<(), Error> {
        let (name, set) = (slot.name(), slot.set());
        let node = format!("{name}-disk");
        let file = |set: u32| json!({ "driver": "file", "filename": format!("/dev/fdset/{set}"), "locking": "off" });
        let mut block = json!({ "node-name": node, "discard": "unmap", "file": file(set), "driver": "raw" });
        let mut behind = None;
        if let DiskFormat::Qcow2 { backing } = &disk.format {
            block["driver"] = json!("qcow2");
            // Whatever the header says, nothing else is opened.
            block["backing"] = serde_json::Value::Null;
            if let Some(backing) = backing {
                let mut below = json!({
                    "driver": if backing.qcow2 { "qcow2" } else { "raw" }, "file": file(set + 1), "read-only": true,
                });
                below["file"]["read-only"] = json!(true);
                if backing.qcow2 {
                    below["backing"] = serde_json::Value::Null;
                }
                block["backing"] = below;
                behind = Some(backing.file.as_fd());
            }
        }
        self.call_with(&AddFd { set }, &[disk.file.as_fd()])?;
        let add = || {
            if let Some(file) = behind {
                self.call_with(&AddFd { set: set + 1 }, &[file])?;
            }
            self.call(&BlockdevAdd(block))?;
            let device = json!({
                "driver": "virtio-blk-pci", "id": format!("{name}-dev"), "bus": name, "drive": node,
                "serial": disk.serial, "werror": WHEN_WRITING_FAILS, "rerror": WHEN_READING_FAILS,
            });
            let added = self.call(&DeviceAdd(device)).map(drop);
            added.inspect_err(|_| drop(self.call(&BlockdevDel { node: &node })))
        };
        let added = add();
        added.inspect_err(|_| {
            drop(self.call(&RemoveFd { set }));
            drop(self.call(&RemoveFd { set: set + 1 }));
        })
    }

    /// Unplugs what is in a place: asks the guest to let go of it, and waits
    /// until it has.
    ///
    /// # Errors
    /// There is nothing, or the guest does not let go within `limit`.
    pub fn unplug(&mut self, slot: Slot, limit: Duration) -> Result<(), Error> {
        let name = slot.name();
        let device = format!("{name}-dev");
        self.call(&DeviceDel { id: &device })?;
        let gone = self.await_event(limit, |event| {
            let which = event.data.get("device").and_then(serde_json::Value::as_str);
            (event.name == "DEVICE_DELETED" && which == Some(device.as_str())).then_some(())
        })?;
        if gone.is_none() {
            return Err(Error::Timeout { op: format!("unplug {name} of desktop {}", self.id()), limit });
        }
        // One of the two was never there.
        let net = self.call(&NetdevDel { id: &format!("{name}-net") }).is_ok();
        if !net {
            self.call(&BlockdevDel { node: &format!("{name}-disk") })?;
            self.forget_descriptors(slot.set())?;
            self.forget_descriptors(slot.set() + 1)?;
        }
        Ok(())
    }

    /// Has QEMU close the descriptors of a set. It does so by itself when the
    /// last one to use them closes; that is refused as `not found`.
    fn forget_descriptors(&mut self, set: u32) -> Result<(), Error> {
        match self.call(&RemoveFd { set }) {
            Err(Error::Qmp { source: QmpError::Refused { .. }, .. }) | Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Makes the disk of this number in the specification longer. A guest that
    /// runs notices at once; its file system is its own affair.
    ///
    /// # Errors
    /// There is no such disk, or it would become shorter.
    pub fn grow_disk(&mut self, number: usize, size: Bytes) -> Result<(), Error> {
        self.call(&BlockResize { node: &format!("disk{number}"), size: size.get() }).map(drop)
    }

    /// Keeps what all its own disks hold at this instant under `name`, inside of
    /// their files. `qemu-img snapshot -a` brings it back when the machine is
    /// off. What the guest had not written out yet is not in it.
    ///
    /// # Errors
    /// The name is not 1 to 32 of a-z, 0-9 and `-`, is taken, or a disk is not a qcow2 image.
    pub fn snapshot(&mut self, name: &str) -> Result<(), Error> {
        let disks = self.snapshot_disks(name)?;
        let action = |disk: &String| json!({ "type": "blockdev-snapshot-internal-sync", "data": { "device": disk, "name": name } });
        self.call(&Transaction { actions: disks.iter().map(action).collect() }).map(drop)
    }

    /// Forgets what was kept as `name`.
    ///
    /// # Errors
    /// Nothing was.
    pub fn forget_snapshot(&mut self, name: &str) -> Result<(), Error> {
        for node in self.snapshot_disks(name)? {
            self.call(&SnapshotDelete { node: &node, name })?;
        }
        Ok(())
    }

    /// Nodes of its own disks, by the names that they have from its start.
    fn snapshot_disks(&mut self, name: &str) -> Result<Vec<String>, Error> {
        let refuse = |what: String, reason| Err(Error::Invalid { what, reason });
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if name.is_empty() || name.len() > 32 || !name.bytes().all(plain) {
            return refuse(format!("snapshot {name:?}"), "use 1 to 32 of a-z 0-9 -");
        }
        let nodes = self.call(&QueryNodes { flat: true })?;
        let own = |node: &super::command::BlockNode| {
            let number = node.name.strip_prefix("disk");
            number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
        };
        let disks: Vec<_> = nodes.into_iter().filter(own).collect();
        if disks.is_empty() || disks.iter().any(|disk| disk.driver != "qcow2") {
            let reason = "only disks that are qcow2 images can keep what they held";
            return refuse(format!("a snapshot of desktop {}", self.id()), reason);
        }
        Ok(disks.into_iter().map(|disk| disk.name).collect())
    }

    /// What its screen shows. Only systems that are not ours have one.
    ///
    /// # Errors
    /// It has no screen, or what QEMU wrote is no picture.
    pub fn screenshot(&mut self) -> Result<Picture, Error> {
        let op = || format!("take a picture of desktop {}", self.id());
        let file = memory_file(c"qvd-picture").map_err(io_error(op()))?;
        // QEMU takes a descriptor only for what it was opened for.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let to = File::options().write(true).open(path).map_err(io_error(op()))?;
        let op = op();
        self.call_with(&AddFd { set: PICTURE_SET }, &[to.as_fd()])?;
        let taken = self.call(&Screendump { filename: &format!("/dev/fdset/{PICTURE_SET}") }).map(drop);
        self.forget_descriptors(PICTURE_SET)?;
        taken?;
        let mut bytes = Vec::new();
        let mut file = File::from(file);
        std::io::Seek::rewind(&mut file).map_err(io_error(op.clone()))?;
        file.take(MAX_PICTURE).read_to_end(&mut bytes).map_err(io_error(op.clone()))?;
        picture(&bytes).ok_or(Error::Invalid { what: op, reason: "what QEMU wrote is no picture" })
    }

    /// The number by which the guest learns that it is a clone.
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn generation(&mut self) -> Result<String, Error> {
        Ok(self.call(&QueryGeneration)?.guid)
    }
}

/// Reads a portable pixmap: `P6`, width, height, 255, a blank, and the bytes.
fn picture(bytes: &[u8]) -> Option<Picture> {
    let mut words = Vec::new();
    let mut at = 0;
    while words.len() < 4 {
        let rest = bytes.get(at..)?;
        let length = rest.iter().take(16).position(u8::is_ascii_whitespace)?;
        words.push(std::str::from_utf8(rest.get(..length)?).ok()?);
        at += length + 1;
    }
    let [kind, width, height, depth] = words.as_slice() else { return None };
    let (width, height) = (width.parse::<u32>().ok()?, height.parse::<u32>().ok()?);
    let rgb = bytes.get(at..)?.to_vec();
    let whole = u64::from(width) * u64::from(height) * 3 == rgb.len() as u64;
    (*kind == "P6" && *depth == "255" && whole && width > 0).then_some(Picture { width, height, rgb })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_read_if_it_is_whole() {
        let whole = b"P6\n2 1\n255\nabcdef";
        assert_eq!(picture(whole), Some(Picture { width: 2, height: 1, rgb: b"abcdef".to_vec() }));
        for broken in [&whole[..16], b"P5\n2 1\n255\nabcdef", b"P6\n0 0\n255\n", b"P6\n2", b""] {
            assert_eq!(picture(broken), None);
        }
    }
}
