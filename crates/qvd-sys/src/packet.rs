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
        Self::open_filtered(name, ethertype, &[])
    }

    /// As [`PacketSocket::open`], for those frames alone that `filter` accepts;
    /// the kernel copies no others. An empty filter accepts all.
    ///
    /// # Errors
    /// As [`PacketSocket::open`], or the filter is no program that ends.
    pub fn open_filtered(name: &str, ethertype: u16, filter: &[Instruction]) -> io::Result<Self> {
        let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no memory is passed. Protocol 0 receives nothing before the bind.
        let fd = unsafe { libc::socket(libc::AF_PACKET, flags, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just made it, and nobody else knows of it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // Before the bind, so that nothing comes in unfiltered.
        if !filter.is_empty() {
            attach(&socket, filter)?;
        }
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

/// One instruction of a filter: what classic BPF needs to look at a frame.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct Instruction(libc::sock_filter);

/// Codes of instructions, each of the parts that the kernel's header names.
///
/// Source: Linux `include/uapi/linux/bpf_common.h`.
mod code {
    /// `BPF_LD | BPF_B | BPF_ABS`
    pub(super) const LOAD_OCTET: u16 = 0x30;
    /// `BPF_LD | BPF_H | BPF_ABS`
    pub(super) const LOAD_TWO_OCTETS: u16 = 0x28;
    /// `BPF_JMP | BPF_JEQ | BPF_K`
    pub(super) const JUMP_IF_EQUAL: u16 = 0x15;
    /// `BPF_RET | BPF_K`
    pub(super) const RETURN: u16 = 0x06;
}

impl Instruction {
    /// Ends the program: the whole frame is passed on.
    pub const ACCEPT: Self = Self::new(code::RETURN, 0, 0, u32::MAX);
    /// Ends the program: the frame is not passed on.
    pub const REJECT: Self = Self::new(code::RETURN, 0, 0, 0);

    const fn new(code: u16, jt: u8, jf: u8, k: u32) -> Self {
        Self(libc::sock_filter { code, jt, jf, k })
    }

    /// Looks at the octet that `offset` others precede. A frame that ends
    /// before is rejected.
    #[must_use]
    pub const fn load_octet(offset: u32) -> Self {
        Self::new(code::LOAD_OCTET, 0, 0, offset)
    }

    /// Looks at two octets as a number. A frame that ends before is rejected.
    #[must_use]
    pub const fn load_two_octets(offset: u32) -> Self {
        Self::new(code::LOAD_TWO_OCTETS, 0, 0, offset)
    }

    /// Skips `count` instructions unless what was looked at is `value`.
    #[must_use]
    pub const fn skip_unless(value: u32, count: u8) -> Self {
        Self::new(code::JUMP_IF_EQUAL, 0, count, value)
    }
}

fn attach(socket: &OwnedFd, filter: &[Instruction]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?,
        // The kernel copies the program and writes nothing to it.
        filter: filter.as_ptr().cast_mut().cast(),
    };
    let length = libc::socklen_t::try_from(mem::size_of_val(&program)).map_err(io::Error::other)?;
    let (level, name, value) = (libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, (&raw const program).cast());
    // SAFETY: `program` and the instructions it points to outlive the call, `length` is its size and `len` their
    // number; `Instruction` is laid out as `sock_filter`.
    let attached = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value, length) };
    if attached == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
