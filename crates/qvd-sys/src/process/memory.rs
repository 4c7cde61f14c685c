//! Asking the kernel to take memory back from a process that rests.

use std::{
    fs, io,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};

/// Ranges given to one call. Source: Linux `include/uapi/linux/uio.h`, `UIO_MAXIOV`.
const RANGES_MAX: usize = 1024;

/// Largest list of mappings read, in bytes: `vm.max_map_count` is 65530 by
/// default, and a line about a hundred bytes.
const MAPS_MAX_BYTES: u64 = 16 << 20;

/// Asks for every page of a process that nothing else uses: pages of files are
/// dropped and read again when needed, others go to swap if there is some. A
/// page that several processes map stays. Returns how many bytes were asked
/// for; a process that has ended has none.
///
/// # Errors
/// The kernel is older than 5.10, or this process may not (`CAP_SYS_NICE`).
pub fn page_out(pid: u32) -> io::Result<u64> {
    let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let pidfd = match pidfd_open(number, PidfdFlags::empty()) {
        Err(Errno::SRCH) => return Ok(0),
        opened => opened?,
    };
    // Read after the pidfd was opened, and used only with it: should the number
    // have come to mean another process in between, that one is asked instead,
    // which costs it time and nothing else.
    let maps = match fs::File::open(format!("/proc/{pid}/maps")) {
        Ok(file) => io::read_to_string(io::Read::take(file, MAPS_MAX_BYTES))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let ranges: Vec<_> = maps.lines().filter_map(range).collect();
    let mut asked = 0;
    for some in ranges.chunks(RANGES_MAX) {
        asked += advise(pidfd.as_fd(), some)?;
    }
    Ok(asked)
}

/// The addresses of a line of `/proc/PID/maps`, unless the kernel itself made
/// the mapping (`[vdso]`, `[vvar]`, `[vsyscall]`).
fn range(line: &str) -> Option<Range<usize>> {
    let (addresses, rest) = line.split_once(' ')?;
    if rest.contains("[v") {
        return None;
    }
    let (start, end) = addresses.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    Some(address(start)?..address(end)?)
}

fn advise(pidfd: BorrowedFd<'_>, ranges: &[Range<usize>]) -> io::Result<u64> {
    let mut asked = 0;
    let mut left: Vec<libc::iovec> = ranges
        .iter()
        .map(|range| libc::iovec { iov_base: range.start as *mut libc::c_void, iov_len: range.len() })
        .collect();
    while !left.is_empty() {
        // SAFETY: the vector holds `left.len()` initialised entries; their
        // addresses are the other process's and are not touched by this one.
        let done = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                pidfd.as_raw_fd(),
                left.as_ptr(),
                left.len(),
                libc::MADV_PAGEOUT,
                0_u32,
            )
        };
        if done < 0 {
            match Errno::from_io_error(&io::Error::last_os_error()) {
                Some(Errno::SRCH) => return Ok(asked),
                // The first of them was unmapped meanwhile, or cannot be
                // paged out, as locked memory cannot.
                Some(Errno::NOMEM | Errno::INVAL | Errno::FAULT) => drop(left.remove(0)),
                Some(Errno::INTR | Errno::AGAIN) => {}
                _ => return Err(io::Error::last_os_error()),
            }
            continue;
        }
        let mut done = usize::try_from(done).unwrap_or_default();
        asked += done as u64;
        // It stops at the first range that it cannot do; that one is left out.
        let whole = left.iter().take_while(|range| {
            let fits = done >= range.iov_len;
            done -= if fits { range.iov_len } else { 0 };
            fits
        });
        let whole = whole.count();
        left.drain(..(whole + 1).min(left.len()));
    }
    Ok(asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_of_the_kernel_are_left_out() {
        assert_eq!(range("1000-3000 rw-p 00000000 00:00 0 [heap]"), Some(0x1000..0x3000));
        assert_eq!(range("7fff1000-7fff3000 r-xp 00000000 00:00 0 [vdso]"), None);
        assert_eq!(range(""), None);
        assert_eq!(range("nonsense"), None);
    }

    #[test]
    fn a_process_that_ended_has_nothing() {
        // Above `PID_MAX_LIMIT` (4 Mi, Linux `include/linux/threads.h`).
        assert_eq!(page_out(i32::MAX.cast_unsigned()).ok(), Some(0));
    }
}
