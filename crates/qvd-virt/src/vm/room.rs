//! How much room a machine's disks have to grow.

use std::{fs, io, path::Path};

use qvd_core::Bytes;

use super::Vm;
use crate::{Error, error::io_error};

impl Vm {
    /// What is free on the file systems of the files that QEMU may write, on the one
    /// with the least; `None` when there is no such file, as for disks that are devices of
    /// the host. A machine that is [`VmState::Full`](super::VmState::Full) can go on once there is more.
    ///
    /// # Errors
    /// It has ended.
    pub fn room(&self) -> Result<Option<Bytes>, Error> {
        let process = format!("/proc/{}", self.pid());
        least_room(Path::new(&process)).map_err(io_error(format!("look at the disks of desktop {}", self.id())))
    }
}

fn least_room(process: &Path) -> io::Result<Option<Bytes>> {
    let mut least: Option<u64> = None;
    for entry in fs::read_dir(process.join("fd"))? {
        let number = entry?.file_name();
        // Closed again meanwhile, perhaps.
        let (file, info) = (process.join("fd").join(&number), process.join("fdinfo").join(&number));
        let (Ok(about), Ok(info)) = (fs::metadata(&file), fs::read_to_string(info)) else { continue };
        if !about.is_file() || !is_writable(&info) {
            continue;
        }
        let space = rustix::fs::statvfs(&file)?;
        // Memory files are on a file system without a size.
        if space.f_blocks > 0 {
            let free = space.f_bavail.saturating_mul(space.f_frsize);
            least = Some(least.map_or(free, |least| least.min(free)));
        }
    }
    Ok(least.map(Bytes::new))
}

/// Whether a descriptor may be written to. Source: proc(5), `fdinfo`: `flags` is octal, and its
/// last two bits are 0 for reading only (Linux `include/uapi/asm-generic/fcntl.h`).
fn is_writable(info: &str) -> bool {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok()).is_some_and(|flags| flags & 3 != 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn files_that_may_be_written_count_and_no_others() {
        assert!(is_writable("pos:\t0\nflags:\t0100002\nmnt_id:\t1\n"));
        assert!(is_writable("flags:\t0100001\n"));
        assert!(!is_writable("pos:\t0\nflags:\t0100000\n"));
        assert!(!is_writable("no such line\n"));

        let _file = tempfile::NamedTempFile::new().unwrap();
        assert!(least_room(Path::new("/proc/self")).unwrap().is_some());
    }
}
