//! Files in memory, shared with everybody who maps them.

use std::{
    fs, io,
    os::fd::{AsRawFd, BorrowedFd},
    ptr::{self, NonNull},
};

use rustix::param::page_size;

/// A shared mapping of the beginning of a file (`MAP_SHARED`).
///
/// Bytes are read and written one at a time, because others may write them
/// meanwhile. Whoever shortens the file below what is mapped ends this process
/// by `SIGBUS` at its next access.
#[derive(Debug)]
pub struct SharedMap {
    at: NonNull<u8>,
    len_bytes: usize,
    writable: bool,
}

// SAFETY: the mapping belongs to the value alone, and each access to it is one
// volatile byte, as other processes might make it at any time.
unsafe impl Send for SharedMap {}

impl SharedMap {
    /// Maps `len_bytes` of a file.
    ///
    /// # Errors
    /// The file is not open for what is asked, or its file system cannot.
    pub fn new(file: BorrowedFd<'_>, len_bytes: usize, writable: bool) -> io::Result<Self> {
        let access = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: the kernel chooses the address, so nothing of ours is covered.
        let at = unsafe { libc::mmap(ptr::null_mut(), len_bytes, access, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let at = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { at, len_bytes, writable })
    }

    /// The byte at this place, if it is mapped.
    #[must_use]
    pub fn byte(&self, at: usize) -> Option<u8> {
        // SAFETY: the place is within the mapping.
        (at < self.len_bytes).then(|| unsafe { self.at.add(at).read_volatile() })
    }

    /// Writes the byte at this place; false if it is not mapped for writing.
    pub fn set(&self, at: usize, value: u8) -> bool {
        let possible = self.writable && at < self.len_bytes;
        if possible {
            // SAFETY: the place is within the mapping, which is writable.
            unsafe { self.at.add(at).write_volatile(value) };
        }
        possible
    }

    /// Reads a byte of each page, so that all of it is in this process's page
    /// tables.
    pub fn touch(&self) {
        for at in (0..self.len_bytes).step_by(page_size()) {
            let _read = self.byte(at);
        }
    }

    /// How many of its bytes are in the page cache, in whole pages. Only who
    /// may write the file is told; for others all of them are.
    ///
    /// # Errors
    /// The kernel has no memory to answer with.
    pub fn resident_bytes(&self) -> io::Result<usize> {
        let mut pages = vec![0_u8; self.len_bytes.div_ceil(page_size())];
        // SAFETY: the range is mapped, and the vector has a byte for each of its pages.
        match unsafe { libc::mincore(self.at.as_ptr().cast(), self.len_bytes, pages.as_mut_ptr()) } {
            0 => Ok(pages.iter().filter(|page| **page & 1 != 0).count() * page_size()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// This mapping's proportional set size in bytes: each page counts less the
    /// more mappings of it there are. (`Pss` of `/proc/self/smaps`.)
    ///
    /// # Errors
    /// `/proc` cannot be read, or does not tell.
    pub fn pss_bytes(&self) -> io::Result<usize> {
        let smaps = fs::read_to_string("/proc/self/smaps")?;
        let start = format!("{:x}-", self.at.as_ptr() as usize);
        let own = smaps.lines().skip_while(|line| !line.starts_with(&start));
        let pss = own.filter_map(|line| line.strip_prefix("Pss:")).next();
        let kibibytes = pss.and_then(|text| text.trim().strip_suffix(" kB")?.parse::<usize>().ok());
        kibibytes.map(|number| number * 1024).ok_or_else(|| io::Error::other("/proc/self/smaps tells no Pss"))
    }

    /// Waits until what was written is in the file.
    ///
    /// # Errors
    /// It could not be written: the disk is full or broken.
    pub fn sync(&self) -> io::Result<()> {
        // SAFETY: the range is this mapping.
        match unsafe { libc::msync(self.at.as_ptr().cast(), self.len_bytes, libc::MS_SYNC) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference leads into it. It can
        // fail only for a range that is none.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len_bytes) };
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        os::fd::AsFd as _,
    };

    use super::*;

    #[test]
    fn what_one_writes_the_others_see() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(2).unwrap();
        let (one, other) =
            (SharedMap::new(file.as_fd(), 2, true).unwrap(), SharedMap::new(file.as_fd(), 2, false).unwrap());
        assert!(one.set(1, 7) && !one.set(2, 7) && !other.set(0, 7));
        assert_eq!((other.byte(0), other.byte(1), other.byte(2)), (Some(0), Some(7), None));
        one.sync().unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, [0, 7]);
    }

    #[test]
    fn two_mappings_of_a_file_share_its_pages() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; 1 << 20]).unwrap();
        let map = || SharedMap::new(file.as_fd(), 1 << 20, false).unwrap();
        let (one, other) = (map(), map());
        assert_eq!(one.resident_bytes().unwrap(), 1 << 20, "what was just written is cached");
        one.touch();
        assert_eq!(one.pss_bytes().unwrap(), 1 << 20);
        other.touch();
        assert_eq!((one.pss_bytes().unwrap(), other.pss_bytes().unwrap()), (1 << 19, 1 << 19));
        assert!(SharedMap::new(file.as_fd(), 0, false).is_err());
    }
}
