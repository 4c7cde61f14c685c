//! Files mapped into memory, to see who shares it.

use std::{fs, io, os::fd::BorrowedFd};

use rustix::{
    mm::{MapFlags, ProtFlags, mmap, munmap},
    param::page_size,
};

/// A file mapped for reading, shared with everybody who maps it.
#[derive(Debug)]
pub struct Mapping {
    address: *mut libc::c_void,
    bytes: usize,
}

impl Mapping {
    /// Maps the first `bytes` bytes of a file.
    ///
    /// # Errors
    /// `EINVAL` for no bytes, `EACCES` when it is not open for reading, `ENODEV`
    /// when its file system cannot.
    pub fn new(file: BorrowedFd<'_>, bytes: usize) -> io::Result<Self> {
        // SAFETY: the kernel chooses an address where nothing is.
        let address = unsafe { mmap(std::ptr::null_mut(), bytes, ProtFlags::READ, MapFlags::SHARED, file, 0) }?;
        Ok(Self { address, bytes })
    }

    /// Reads a byte of each page, so that all of it is in this process's page
    /// tables. A file that was cut short meanwhile kills the process (`SIGBUS`).
    pub fn touch(&self) {
        for offset in (0..self.bytes).step_by(page_size()) {
            // SAFETY: the offset is inside the mapping, which is readable and
            // lives as long as `self`; others may write the file meanwhile,
            // so the value is taken for nothing.
            let _byte = unsafe { self.address.cast::<u8>().add(offset).read_volatile() };
        }
    }

    /// How many of its bytes are in the page cache, in whole pages. Only who
    /// may write the file is told; for others all of them are.
    ///
    /// # Errors
    /// The kernel has no memory to answer with.
    pub fn resident_bytes(&self) -> io::Result<usize> {
        let mut pages = vec![0_u8; self.bytes.div_ceil(page_size())];
        // SAFETY: the range is mapped, and the vector has a byte for each of its pages.
        if unsafe { libc::mincore(self.address, self.bytes, pages.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(pages.iter().filter(|page| **page & 1 != 0).count() * page_size())
    }

    /// This mapping's proportional set size in bytes: each page counts less the
    /// more mappings of it there are. (`Pss` of `/proc/self/smaps`.)
    ///
    /// # Errors
    /// `/proc` cannot be read, or does not tell.
    pub fn pss_bytes(&self) -> io::Result<usize> {
        let smaps = fs::read_to_string("/proc/self/smaps")?;
        let start = format!("{:x}-", self.address as usize);
        let own = smaps.lines().skip_while(|line| !line.starts_with(&start));
        let pss = own.filter_map(|line| line.strip_prefix("Pss:")).next();
        let kibibytes = pss.and_then(|text| text.trim().strip_suffix(" kB")?.parse::<usize>().ok());
        kibibytes.map(|number| number * 1024).ok_or_else(|| io::Error::other("/proc/self/smaps tells no Pss"))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nobody else has the address, and nothing borrows from it.
        let unmapped = unsafe { munmap(self.address, self.bytes) };
        debug_assert!(unmapped.is_ok(), "an address that the kernel gave is aligned: {unmapped:?}");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{io::Write as _, os::fd::AsFd as _};

    use super::*;

    #[test]
    fn two_mappings_of_a_file_share_its_pages() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; 1 << 20]).unwrap();
        let (one, other) = (Mapping::new(file.as_fd(), 1 << 20).unwrap(), Mapping::new(file.as_fd(), 1 << 20).unwrap());
        assert_eq!(one.resident_bytes().unwrap(), 1 << 20, "what was just written is cached");
        one.touch();
        assert_eq!(one.pss_bytes().unwrap(), 1 << 20);
        other.touch();
        assert_eq!((one.pss_bytes().unwrap(), other.pss_bytes().unwrap()), (1 << 19, 1 << 19));
        assert!(Mapping::new(file.as_fd(), 0).is_err());
    }
}
