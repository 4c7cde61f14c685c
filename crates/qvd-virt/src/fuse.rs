//! Ending file systems that programs of a container serve.
//!
//! Who asks a file system of a program for something, and was heard, waits for the
//! answer whatever signal comes, a kill included. A desktop can make it wait for
//! itself: a process that serves, and asks, never ends by itself, nor does
//! its container. The kernel ends the conversation when it is told so from outside.

use std::{fs, io, os::fd::OwnedFd};

use qvd_sys::mount::{FsContext, Restrictions};
use rustix::fs::{Mode, OFlags, openat};

/// Ends every file system that one of `processes` sees, that a program serves and
/// that the host itself has not mounted: such a one, as of homes, may be others' too,
/// and its server is nobody's inside. Returns how many there were.
///
/// Nothing is opened below any of them: numbers are read from mount tables, and
/// the file to write to is in a file system of the kernel's.
pub(crate) fn abort(processes: &[u32]) -> io::Result<usize> {
    let ours = served("thread-self");
    let mut connections: Vec<u32> = processes.iter().flat_map(|pid| served(&pid.to_string())).collect();
    connections.retain(|connection| !ours.contains(connection));
    connections.sort_unstable();
    connections.dedup();
    if connections.is_empty() {
        return Ok(0);
    }
    let control = control()?;
    for connection in &connections {
        // Source: Linux `Documentation/filesystems/fuse/fuse.rst`, "Control filesystem".
        let file = format!("{connection}/abort");
        match openat(&control, &file, OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
            Ok(file) => drop(rustix::io::write(&file, b"1")?),
            Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(connections.len())
}

fn control() -> io::Result<OwnedFd> {
    let mount = || FsContext::open("fusectl")?.mount(Restrictions::default());
    mount().map_err(io::Error::other)
}

/// Numbers of the conversations behind the mounts that a process sees; none if
/// it has ended.
fn served(pid: &str) -> Vec<u32> {
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    table.lines().filter_map(connection).collect()
}

/// The minor number of the device is that of the conversation (Linux
/// `fs/fuse/inode.c`, `fuse_fill_super_common`).
fn connection(line: &str) -> Option<u32> {
    let (mount, fs) = line.split_once(" - ")?;
    let kind = fs.split(' ').next()?;
    let device = mount.split(' ').nth(2)?;
    (kind == "fuse" || kind.starts_with("fuse.")).then(|| device.strip_prefix("0:")?.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::connection;

    #[test]
    fn conversations_are_told_from_other_mounts() {
        let line = |kind: &str| format!("40 22 0:44 / /mnt/fuse rw,nosuid - {kind} none rw,user_id=0");
        assert_eq!(connection(&line("fuse")), Some(44));
        assert_eq!(connection(&line("fuse.sshfs")), Some(44));
        for other in ["fuseblk", "tmpfs", "fusectl"] {
            assert_eq!(connection(&line(other)), None, "{other}");
        }
    }
}
