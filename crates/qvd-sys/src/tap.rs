//! Taps: links whose other end is a descriptor, for virtual machines.

use std::{
    io, mem,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::fs::{Mode, OFlags};

/// Makes the tap `name` in the calling thread's network namespace, down. It
/// lasts as long as the descriptor, or any copy of it, is open.
///
/// With `header` each frame has a `virtio_net_hdr` before it, by which a virtual
/// machine hands over what is longer than a frame, and checksums undone.
///
/// # Errors
/// There is a link of that name, the name is too long, or the host has no taps.
pub fn create(name: &str, header: bool) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let tap = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
    // SAFETY: a structure of integers, for all of which zero is a value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the link's name is too long"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let header = if header { libc::IFF_VNET_HDR } else { 0 };
    let kind = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_TUN_EXCL | header;
    // The kernel reads the flags as 16 bits without a sign.
    let [low, high, ..] = kind.to_le_bytes();
    request.ifr_ifru.ifru_flags = libc::c_short::from_le_bytes([low, high]);
    // SAFETY: the request is of the type that TUNSETIFF takes and outlives the call.
    let made = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    if made == 0 { Ok(tap) } else { Err(io::Error::last_os_error()) }
}

/// Lets a tap last without a descriptor, until its link is removed: whoever is
/// only told its name can attach it then, once the descriptor is closed.
///
/// # Errors
/// The descriptor is no attached tap.
pub fn keep(tap: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: TUNSETPERSIST takes an integer by value and no memory of ours.
    let kept = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETPERSIST, on) };
    if kept == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
