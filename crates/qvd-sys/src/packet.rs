//! Raw frames on one link: what tests of confinement send and listen to.

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{RecvFlags, SendFlags},
};

/// Every protocol. Source: Linux `include/uapi/linux/if_ether.h`, `ETH_P_ALL`.
pub const ETHERTYPE_ALL: u16 = 3;

/// Longest frame that is received whole.
const FRAME_MAX: usize = 65536;

/// A packet socket bound to one link.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Opens one on the link `name` of the calling thread's network namespace,
    /// for frames of one ethertype (or [`ETHERTYPE_ALL`]).
    ///
    /// # Errors
    /// There is no such link, or this process may not see raw frames.
    pub fn open(name: &str, ethertype: u16) -> io::Result<Self> {
        let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no memory is passed. Protocol 0 receives nothing before the bind.
        let fd = unsafe { libc::socket(libc::AF_PACKET, flags, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just made it, and nobody else knows of it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let index = rustix::net::netdevice::name_to_index(&socket, name)?;
        // SAFETY: a structure of integers, for all of which zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?;
        address.sll_protocol = ethertype.to_be();
        address.sll_ifindex = i32::try_from(index).map_err(io::Error::other)?;
        let length = libc::socklen_t::try_from(mem::size_of_val(&address)).map_err(io::Error::other)?;
        // SAFETY: `address` outlives the call and `length` is its size.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
        if bound == 0 { Ok(Self(socket)) } else { Err(io::Error::last_os_error()) }
    }

    /// Sends a frame that begins with its Ethernet header.
    ///
    /// # Errors
    /// The link is down or gone, or the frame too long for it.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        let sent = rustix::net::send(&self.0, frame, SendFlags::empty())?;
        if sent == frame.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// The next frame; `None` when none has come within `timeout`.
    ///
    /// # Errors
    /// The link is down or gone.
    pub fn receive(&self, timeout: Duration) -> io::Result<Option<Vec<u8>>> {
        let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
        let ready = rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&timeout)))?;
        if ready == 0 {
            return Ok(None);
        }
        let mut frame = vec![0; FRAME_MAX];
        match rustix::net::recv(&self.0, frame.as_mut_slice(), RecvFlags::empty()) {
            Ok((length, _)) => {
                frame.truncate(length);
                Ok(Some(frame))
            }
            Err(Errno::AGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
