//! What the device mapper says of its devices.

use std::{ffi::CStr, fs::File, io, os::fd::AsRawFd};

use rustix::{
    fs::{Mode, OFlags, open},
    io::Errno,
};

/// `struct dm_ioctl`.
/// Source: Linux `include/uapi/linux/dm-ioctl.h`, as all numbers here.
#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; 128],
    uuid: [u8; 129],
    data: [u8; 7],
}

/// A header, and room for one target's status.
#[repr(C, align(8))]
struct Request {
    header: Header,
    payload: [u8; 4096],
}

/// `struct dm_target_spec`, which the target's own words follow.
const SPEC_BYTES: usize = 40;
const SPEC_TYPE: std::ops::Range<usize> = 24..40;

const VERSION: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<Header>(0xfd, 0);
const SUSPEND: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<Header>(0xfd, 6);
const TABLE_STATUS: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<Header>(0xfd, 12);
const SUSPENDED: u32 = 1 << 1;
const BUFFER_FULL: u32 = 1 << 8;
const NO_FLUSH: u32 = 1 << 11;

/// A device, as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// How often it is open: by a mount, a virtual machine, a device on it.
    pub open_count: u32,
    /// Whether whoever uses it has to wait: its table is being changed, or who
    /// did that was killed.
    pub suspended: bool,
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// Kind of its first target.
    pub target: String,
    /// What that target says of itself.
    pub says: String,
}

/// Asks whether there is a device mapper.
///
/// # Errors
/// `ENOENT`, `ENODEV` or `ENXIO` when there is none, `EACCES` without the privilege.
pub fn probe() -> io::Result<()> {
    call(VERSION, "", 0).map(drop)
}

/// Looks at a device; there may be none of that name.
///
/// # Errors
/// As [`probe`].
pub fn status(name: &str) -> io::Result<Option<Status>> {
    match call(TABLE_STATUS, name, NO_FLUSH) {
        Ok(request) => Ok(Some(read(&request))),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Lets go on who waits for a suspended device.
///
/// # Errors
/// As [`probe`]; `ENXIO` when there is no such device.
pub fn resume(name: &str) -> io::Result<()> {
    call(SUSPEND, name, 0).map(drop)
}

fn call(operation: rustix::ioctl::Opcode, name: &str, flags: u32) -> io::Result<Box<Request>> {
    let control = File::from(open("/dev/mapper/control", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?);
    let mut header = Header {
        version: [4, 0, 0],
        data_size: u32::try_from(size_of::<Request>()).map_err(|_| io::ErrorKind::InvalidInput)?,
        data_start: u32::try_from(size_of::<Header>()).map_err(|_| io::ErrorKind::InvalidInput)?,
        target_count: 0,
        open_count: 0,
        flags,
        event_nr: 0,
        padding: 0,
        dev: 0,
        name: [0; 128],
        uuid: [0; 129],
        data: [0; 7],
    };
    // The last byte stays zero.
    let room = header.name.get_mut(..name.len()).filter(|room| room.len() < 128).ok_or(Errno::NAMETOOLONG)?;
    room.copy_from_slice(name.as_bytes());
    let mut request = Box::new(Request { header, payload: [0; 4096] });
    // SAFETY: the kernel reads and writes no more than `data_size` bytes, which
    // is the size of the request; numbers and bytes are valid with any content.
    match unsafe { libc::ioctl(control.as_raw_fd(), libc::Ioctl::from(operation), &raw mut *request) } {
        0 => Ok(request),
        _ => Err(io::Error::last_os_error()),
    }
}

fn read(request: &Request) -> Status {
    let Header { open_count, flags, target_count, data_start, .. } = request.header;
    let mut status = Status {
        open_count: u32::try_from(open_count).unwrap_or(0),
        suspended: flags & SUSPENDED != 0,
        sectors: 0,
        target: String::new(),
        says: String::new(),
    };
    let start = usize::try_from(data_start).ok().and_then(|start| start.checked_sub(size_of::<Header>()));
    let spec = start.and_then(|start| request.payload.get(start..));
    let Some(spec) = spec.filter(|_| target_count > 0 && flags & BUFFER_FULL == 0) else { return status };
    let text = |bytes: &[u8]| CStr::from_bytes_until_nul(bytes).map(|text| text.to_string_lossy().into_owned());
    if let (Some(length), Some(kind), Some(says)) = (spec.get(8..16), spec.get(SPEC_TYPE), spec.get(SPEC_BYTES..)) {
        status.sectors = length.try_into().map_or(0, u64::from_ne_bytes);
        status.target = text(kind).unwrap_or_default();
        status.says = text(says).unwrap_or_default();
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_too_long_is_refused() {
        let long = "x".repeat(128);
        // Without a device mapper that is what is said first.
        assert!(status(&long).is_err());
    }

    #[test]
    fn an_answer_is_read() {
        assert_eq!(size_of::<Header>(), 312);
        let mut request = Request {
            header: Header {
                version: [4, 0, 0],
                data_size: 0,
                data_start: 312,
                target_count: 1,
                open_count: 2,
                flags: SUSPENDED,
                event_nr: 0,
                padding: 0,
                dev: 0,
                name: [0; 128],
                uuid: [0; 129],
                data: [0; 7],
            },
            payload: [0; 4096],
        };
        request.payload[8..16].copy_from_slice(&2048_u64.to_ne_bytes());
        request.payload[24..28].copy_from_slice(b"thin");
        request.payload[40..48].copy_from_slice(b"128 2047");
        let expected = Status {
            open_count: 2,
            suspended: true,
            sectors: 2048,
            target: "thin".to_owned(),
            says: "128 2047".to_owned(),
        };
        assert_eq!(read(&request), expected);
    }
}
