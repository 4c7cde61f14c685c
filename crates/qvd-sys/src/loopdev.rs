//! Loop devices: a file as a block device.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags, fstat, open},
    io::Errno,
};

// Source: Linux `include/uapi/linux/loop.h`.
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const FLAG_READ_ONLY: u32 = 1;
const FLAG_AUTOCLEAR: u32 = 4;
const FLAG_DIRECT_IO: u32 = 16;

/// How often to ask for another device when somebody else takes the free one.
const TRIES: u32 = 64;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const NO_INFO: Info = Info {
    device: 0,
    inode: 0,
    rdevice: 0,
    offset: 0,
    size_limit: 0,
    number: 0,
    encrypt_type: 0,
    encrypt_key_size: 0,
    flags: 0,
    file_name: [0; 64],
    crypt_name: [0; 64],
    encrypt_key: [0; 32],
    init: [0; 2],
};

/// A loop device that goes by itself once nobody has it open or mounted.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    // Never read: while it is open the device stays.
    _device: OwnedFd,
}

impl LoopDevice {
    /// Makes `file` a block device. Direct input and output is used where the
    /// file system of `file` allows it, so that nothing is cached twice.
    ///
    /// # Errors
    /// `ENOENT` or `ENODEV` when the kernel has no loop devices left to give.
    pub fn attach(file: BorrowedFd<'_>, read_only: bool) -> io::Result<Self> {
        let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let control = open("/dev/loop-control", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        for _ in 0..TRIES {
            // SAFETY: the request takes no argument and returns a number.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            if number < 0 {
                return Err(io::Error::last_os_error());
            }
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = open(&path, access | OFlags::CLOEXEC, Mode::empty())?;
            match configure(&device, file, read_only, true) {
                Ok(()) => return Ok(Self { path, _device: device }),
                // Somebody else was quicker.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    match configure(&device, file, read_only, false) {
                        Ok(()) => return Ok(Self { path, _device: device }),
                        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                        Err(error) => return Err(error),
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Err(Errno::BUSY.into())
    }

    /// Its path, for those who take no descriptor.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn configure(device: &OwnedFd, file: BorrowedFd<'_>, read_only: bool, direct: bool) -> io::Result<()> {
    let mut flags = FLAG_AUTOCLEAR;
    flags |= if read_only { FLAG_READ_ONLY } else { 0 };
    flags |= if direct { FLAG_DIRECT_IO } else { 0 };
    let config = Config {
        fd: u32::try_from(file.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?,
        block_size: 0,
        info: Info { flags, ..NO_INFO },
        reserved: [0; 8],
    };
    // SAFETY: the request reads a `struct loop_config`, which outlives the call;
    // the kernel takes a reference of its own to the file.
    match unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether a loop device stands on `file`, whoever made it.
///
/// # Errors
/// The devices cannot be listed or asked.
pub fn in_use(file: &File) -> io::Result<bool> {
    let wanted = fstat(file)?;
    for entry in std::fs::read_dir("/sys/block")? {
        let entry = entry?;
        let name = entry.file_name();
        // The directory `loop` is there only while a file is attached.
        if !name.as_encoded_bytes().starts_with(b"loop") || !entry.path().join("loop").is_dir() {
            continue;
        }
        let device = match open(Path::new("/dev").join(&name), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(device) => device,
            Err(Errno::NOENT | Errno::NXIO | Errno::NODEV) => continue,
            Err(error) => return Err(error.into()),
        };
        let mut info = NO_INFO;
        // SAFETY: the request writes a `struct loop_info64`, which outlives the call.
        if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) } != 0 {
            match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENXIO) => continue,
                error => return Err(error),
            }
        }
        if info.inode == wanted.st_ino && info.device == wanted.st_dev {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_kernel() {
        // Source: Linux `include/uapi/linux/loop.h`.
        assert_eq!(size_of::<Info>(), 232);
        assert_eq!(size_of::<Config>(), 304);
    }
}
