//! The file system for `/dev`.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use qvd_sys::mount::{FsContext, Restrictions, restrict};
use rustix::{
    fs::{AtFlags, FileType, Mode, makedev, mkdirat, mknodat, symlinkat},
    io::Errno,
};

use super::CONSOLE;
use crate::devices::Node;

/// Devices without a host behind them. Nodes work because the file system
/// belongs to the host's user namespace; nobody inside may change it, as it is
/// read-only and its owner has no id there.
/// `console` makes a place for one.
pub(super) fn make_dev(more: &[Node], console: bool) -> io::Result<OwnedFd> {
    let fs = FsContext::open("tmpfs").map_err(io::Error::other)?;
    // Those below, with room for directories and devices.
    let inodes = (32 + 2 * more.len()).to_string();
    for (key, value) in [("mode", "755"), ("size", "64k"), ("nr_inodes", &inodes)] {
        fs.set(key, value).map_err(io::Error::other)?;
    }
    let limited = Restrictions { nosuid: true, noexec: true, ..Restrictions::default() };
    let dev = fs.mount(limited).map_err(io::Error::other)?;
    // Source: Linux `Documentation/admin-guide/devices.txt`.
    let nodes = [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
    let nodes = nodes.map(|(name, major, minor)| Node::new(name, major, minor));
    for Node { path, major, minor } in nodes.iter().chain(more) {
        if let Some((dir, _)) = path.split_once('/') {
            match mkdirat(&dev, dir, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {
                    rustix::fs::chmodat(&dev, dir, Mode::from_raw_mode(0o755), AtFlags::empty())?
                }
                Err(error) => return Err(error.into()),
            }
        }
        mknodat(&dev, path, FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(*major, *minor))?;
        // The mode of mknod(2) is cut by the umask of whoever embeds us.
        rustix::fs::chmodat(&dev, path, Mode::from_raw_mode(0o666), AtFlags::empty())?;
    }
    let links = [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
    ];
    for (name, target) in links {
        symlinkat(target, &dev, name)?;
    }
    for name in ["pts", "shm", "mqueue"] {
        mkdirat(&dev, name, Mode::from_raw_mode(0o755))?;
    }
    if console {
        mknodat(&dev, CONSOLE, FileType::RegularFile, Mode::from_raw_mode(0o600), 0)?;
    }
    restrict(dev.as_fd(), Restrictions { read_only: true, ..limited }, None)?;
    Ok(dev)
}
