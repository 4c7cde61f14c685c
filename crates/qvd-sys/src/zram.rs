//! Swap in compressed memory.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Write},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// Reading it makes a device and gives its number.
const ADD: &str = "/sys/class/zram-control/hot_add";
const REMOVE: &str = "/sys/class/zram-control/hot_remove";

// Source: Linux `include/linux/swap.h`.
const SWAP_FLAG_PREFER: i32 = 0x8000;
/// Before any swap on a disk, which has a negative number if nobody gave it one.
const PRIORITY: i32 = 100;

/// A device of compressed memory that is used as swap, until it is closed.
///
/// Dropping it leaves it: what was swapped out is in there.
#[derive(Debug)]
#[must_use = "the swap stays until it is closed"]
pub struct ZramSwap {
    number: u32,
    closed: bool,
}

/// What a device holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZramUse {
    /// Bytes of pages that are in there.
    pub stored_bytes: u64,
    /// Bytes of memory that these take, compressed, the device's own included.
    pub used_bytes: u64,
}

impl ZramSwap {
    /// Makes a device that takes up to `bytes` of pages, and swaps to it. It
    /// takes memory only for what is in there. Compresses by `lz4` where the
    /// kernel has it, since pages are read back while somebody waits.
    ///
    /// # Errors
    /// `NotFound` when the kernel has no zram, `PermissionDenied` without
    /// `CAP_SYS_ADMIN`. Nothing is left then.
    pub fn open(bytes: u64) -> io::Result<Self> {
        let number = fs::read_to_string(ADD)?.trim().parse().map_err(io::Error::other)?;
        let mut swap = Self { number, closed: false };
        swap.set_up(bytes).inspect_err(|_| {
            // It was never swapped to.
            let _removed = swap.remove();
        })?;
        Ok(swap)
    }

    /// The device of this number, if it is swapped to: one that an earlier
    /// process made.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn find(number: u32) -> io::Result<Option<Self>> {
        let swap = Self { number, closed: false };
        let device = swap.device();
        let swaps = fs::read_to_string("/proc/swaps")?;
        let ours = |line: &str| line.split_whitespace().next().is_some_and(|name| Path::new(name) == device);
        Ok(swaps.lines().any(ours).then_some(swap))
    }

    /// What the kernel counts it as.
    #[must_use]
    pub const fn number(&self) -> u32 {
        self.number
    }

    fn set_up(&mut self, bytes: u64) -> io::Result<()> {
        let algorithms = fs::read_to_string(self.attribute("comp_algorithm"))?;
        if algorithms.split_whitespace().any(|name| name.trim_matches(['[', ']']) == "lz4") {
            fs::write(self.attribute("comp_algorithm"), "lz4")?;
        }
        fs::write(self.attribute("disksize"), bytes.to_string())?;
        let page = rustix::param::page_size();
        let pages = u32::try_from(bytes / page as u64).map_err(io::Error::other)?;
        File::options().write(true).open(self.device())?.write_all(&header(page, pages))?;
        let path = c_path(&self.device())?;
        // SAFETY: a path that lives as long as the call, and a number.
        match unsafe { libc::swapon(path.as_ptr(), SWAP_FLAG_PREFER | PRIORITY) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> PathBuf {
        PathBuf::from(format!("/dev/zram{}", self.number))
    }

    /// What it holds.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn usage(&self) -> io::Result<ZramUse> {
        // Source: Linux `Documentation/admin-guide/blockdev/zram.rst`, `mm_stat`.
        let text = fs::read_to_string(self.attribute("mm_stat"))?;
        let mut fields = text.split_whitespace().map(str::parse::<u64>);
        match (fields.next(), fields.nth(1)) {
            (Some(Ok(stored_bytes)), Some(Ok(used_bytes))) => Ok(ZramUse { stored_bytes, used_bytes }),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Reads everything back into memory and removes the device. Idempotent.
    ///
    /// # Errors
    /// There is not enough memory for what it holds; it goes on then.
    pub fn close(&mut self) -> io::Result<()> {
        if self.closed {
            return Ok(());
        }
        let path = c_path(&self.device())?;
        // SAFETY: a path that lives as long as the call.
        if unsafe { libc::swapoff(path.as_ptr()) } != 0 {
            let error = io::Error::last_os_error();
            // EINVAL: it is no swap any more.
            if error.raw_os_error() != Some(libc::EINVAL) {
                return Err(error);
            }
        }
        self.remove()?;
        self.closed = true;
        Ok(())
    }

    fn remove(&self) -> io::Result<()> {
        fs::write(self.attribute("reset"), "1")?;
        fs::write(REMOVE, self.number.to_string())
    }

    fn attribute(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/sys/block/zram{}/{name}", self.number))
    }
}

/// The first page of swap: version, last page, no bad ones, and the mark.
/// Source: Linux `include/linux/swap.h`, `union swap_header`.
fn header(page_bytes: usize, pages: u32) -> Vec<u8> {
    const INFO_AT: usize = 1024;
    const MARK: &[u8] = b"SWAPSPACE2";
    let mut header = vec![0; page_bytes];
    let info: Vec<u8> = [1, pages.saturating_sub(1), 0].into_iter().flat_map(u32::to_ne_bytes).collect();
    for (place, byte) in header.iter_mut().skip(INFO_AT).zip(info) {
        *place = byte;
    }
    for (place, byte) in header.iter_mut().rev().zip(MARK.iter().rev()) {
        *place = *byte;
    }
    header
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Whether this host swaps to anything.
///
/// # Errors
/// The kernel does not say.
pub fn has_swap() -> io::Result<bool> {
    Ok(fs::read_to_string("/proc/swaps")?.lines().nth(1).is_some())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_its_mark_at_the_end() {
        let header = header(4096, 256);
        assert_eq!(header.len(), 4096);
        assert_eq!(header[1024..1036], [[1, 0, 0, 0], 255_u32.to_ne_bytes(), [0; 4]].concat());
        assert_eq!(&header[4086..], b"SWAPSPACE2");
    }
}
