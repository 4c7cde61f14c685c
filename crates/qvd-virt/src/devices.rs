//! Which of the host's devices a container has.
//!
//! A container never sees a node of the host's `/dev`: it gets nodes of its own
//! with the same numbers, on a file system that only this container has and
//! nobody inside can change. So nothing has to be shifted, no group of the host
//! has to be known inside, and everybody in the desktop may open them; which is
//! what the policy has decided. Its other file systems forbid devices, and without
//! `CAP_MKNOD` nobody could make one.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use qvd_core::{Device, Missing};
use rustix::fs::{major, minor};

use crate::{Error, error::io_error};

/// A device to make a node for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Node {
    /// Below `/dev`, in a directory at most.
    pub(crate) path: String,
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

impl Node {
    pub(crate) fn new(path: &str, major: u32, minor: u32) -> Self {
        Self { path: path.to_owned(), major, minor }
    }
}

/// Where a kind of devices is: directory below `/dev`, beginning of the names,
/// and major number.
///
/// Source: Linux `Documentation/admin-guide/devices.txt`; `include/drm/drm_file.h`
/// and `drivers/gpu/drm/drm_drv.c` for render nodes.
const fn place(device: Device) -> Option<(&'static str, &'static str, u32)> {
    match device {
        Device::Fuse => Some(("", "fuse", 10)),
        Device::Dri => Some(("dri", "renderD", 226)),
        Device::Sound => Some(("snd", "", 116)),
        Device::Camera => Some(("", "video", 81)),
        _ => None,
    }
}

/// The nodes of the host's `devices`, found anew each time as they come and go.
/// A kind of which there is none is an error: a desktop whose policy promises a
/// camera is not started without one.
pub(crate) fn find(dev: &Path, devices: &BTreeSet<Device>) -> Result<Vec<Node>, Error> {
    let mut nodes = Vec::new();
    for &device in devices {
        let missing =
            || Error::Unsupported { op: "give a desktop its devices", missing: Missing::Device(device.to_string()) };
        let (dir, prefix, major) = place(device).ok_or_else(missing)?;
        let found = list(dev, dir, prefix, major).map_err(io_error(format!("look for devices of kind {device}")))?;
        if found.is_empty() {
            return Err(missing());
        }
        nodes.extend(found);
    }
    nodes.sort();
    Ok(nodes)
}

fn list(dev: &Path, dir: &str, prefix: &str, wanted: u32) -> io::Result<Vec<Node>> {
    let entries = match fs::read_dir(dev.join(dir)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut nodes = Vec::new();
    for entry in entries {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        // Not through links: `/dev` of the host has some, to anywhere.
        let meta = match fs::symlink_metadata(entry.path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            meta => meta?,
        };
        let number = meta.rdev();
        if name.starts_with(prefix) && meta.file_type().is_char_device() && major(number) == wanted {
            let path = if dir.is_empty() { name } else { format!("{dir}/{name}") };
            nodes.push(Node { path, major: wanted, minor: minor(number) });
        }
    }
    // What shares its major with others is one device.
    if prefix == "fuse" {
        nodes.retain(|node| node.path == "fuse");
    }
    Ok(nodes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use qvd_testkit::{Need, privileged};
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

    use super::*;

    #[test]
    fn nodes_are_those_of_the_kind_and_none_is_an_error() {
        privileged(&[Need::Root], || {
            let dev = tempfile::tempdir().unwrap();
            let make = |path: &str, major, minor| {
                let at = dev.path().join(path);
                fs::create_dir_all(at.parent().unwrap()).unwrap();
                mknodat(CWD, &at, FileType::CharacterDevice, Mode::from_raw_mode(0o600), makedev(major, minor))
                    .unwrap();
            };
            make("dri/card0", 226, 0);
            make("dri/renderD128", 226, 128);
            make("snd/controlC0", 116, 2);
            make("video0", 81, 0);
            make("fuse", 10, 229);
            // What bears the name of another kind, and a link.
            make("video1", 1, 1);
            make("kvm", 10, 232);
            std::os::unix::fs::symlink("video0", dev.path().join("video2")).unwrap();
            let found = |devices: &[Device]| find(dev.path(), &devices.iter().copied().collect());
            let all = ["dri/renderD128", "fuse", "snd/controlC0", "video0"];
            let names: Vec<_> = found(&Device::ALL).unwrap().into_iter().map(|node| node.path).collect();
            assert_eq!(names, all);
            assert_eq!(found(&[]).unwrap(), []);
            assert_eq!(found(&[Device::Camera]).unwrap(), [Node::new("video0", 81, 0)]);
            fs::remove_dir_all(dev.path().join("snd")).unwrap();
            let error = found(&[Device::Sound]).unwrap_err();
            assert_eq!(error.to_string(), "cannot give a desktop its devices on this host: device sound is not usable");
        });
    }
}
