//! Bytes that nobody can change any more.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, FromRawFd, OwnedFd},
};

use rustix::fs::{SealFlags, fcntl_add_seals};

/// Puts `bytes` into a memory file that can be neither written, grown nor
/// shrunk, and that can be executed. `name` is what `/proc` shows.
///
/// # Errors
/// No memory, or the host forbids executable memory files.
pub fn seal(name: &std::ffi::CStr, bytes: &[u8]) -> io::Result<OwnedFd> {
    let base = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // MFD_EXEC says what older kernels took for granted; they refuse the flag.
    let fd = match create(name, base | libc::MFD_EXEC) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => create(name, base)?,
        other => other?,
    };
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    fcntl_add_seals(file.as_fd(), SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    // A reader that inherits the descriptor starts at the beginning.
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
    Ok(file.into())
}

/// An empty memory file for data, which can be sealed later; `name` is what
/// `/proc` shows.
///
/// # Errors
/// There are no descriptors left.
pub fn memory_file(name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    create(name, libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
}

fn create(name: &std::ffi::CStr, flags: libc::c_uint) -> io::Result<OwnedFd> {
    // SAFETY: `name` is a C string; the call only creates a descriptor.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn what_is_sealed_reads_back_and_cannot_be_changed() {
        let mut file = File::from(seal(c"test", b"content").unwrap());
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
        assert!(file.write_all(b"x").is_err());
        assert!(file.set_len(0).is_err());
    }
}
