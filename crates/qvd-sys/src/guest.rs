//! What the first process of a virtual machine needs of its kernel.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// Mixes `seed` into the kernel's randomness, counts it as such, and has all
/// that is given out from now on depend on it.
///
/// # Errors
/// We are not root, or `seed` is longer than 64 bytes.
pub fn reseed(seed: &[u8]) -> io::Result<()> {
    /// Source: Linux `include/uapi/linux/random.h`, `struct rand_pool_info`:
    /// bits, bytes, and the bytes.
    #[repr(C)]
    struct Pool {
        bits: libc::c_int,
        bytes: libc::c_int,
        content: [u8; 64],
    }
    /// Source: as above, `RNDADDENTROPY` and `RNDRESEEDCRNG`.
    const ADD: libc::c_ulong = 0x4008_5203;
    const RESEED: libc::c_ulong = 0x5207;
    let length = libc::c_int::try_from(seed.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut pool = Pool { bits: length.saturating_mul(8), bytes: length, content: [0; 64] };
    pool.content.get_mut(..seed.len()).ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(seed);
    let random = File::options().write(true).open("/dev/urandom")?;
    // SAFETY: the kernel reads `bytes` bytes behind the two numbers, which are
    // there: at most 64.
    if unsafe { libc::ioctl(random.as_raw_fd(), ADD, &raw const pool) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: this call takes no argument.
    match unsafe { libc::ioctl(random.as_raw_fd(), RESEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives a network interface its only address of IPv4 and brings it up; with
/// `gateway`, everything else is reached through that.
///
/// # Errors
/// There is no such interface, or we are not root.
pub fn set_address(interface: &str, address: Ipv4Addr, prefix: u8, gateway: Option<Ipv4Addr>) -> io::Result<()> {
    let socket = inet_socket()?;
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
    for (call, value) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, Ipv4Addr::from_bits(mask))] {
        let mut request = named(interface)?;
        request.ifr_ifru.ifru_addr = inet(value);
        interface_call(&socket, call, &request)?;
    }
    raise(&socket, interface)?;
    let Some(gateway) = gateway else { return Ok(()) };
    // SAFETY: an all-zero rtentry is a valid value of a plain C struct.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = inet(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = inet(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = inet(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: the kernel reads one `rtentry`.
    unless_there(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) })
}

/// Gives a network interface an address of IPv6, on a link with nobody but `router`, and
/// brings it up; with `way_out`, everything else is reached through that. The link's own
/// address is the kernel's choice. Nobody is asked whether the addresses are another's, and
/// nothing that a router advertises is heeded.
///
/// # Errors
/// There is no such interface, the kernel has no IPv6, or we are not root.
pub fn set_address6(interface: &str, address: Ipv6Addr, router: Ipv6Addr, way_out: bool) -> io::Result<()> {
    /// Source: Linux `include/uapi/linux/ipv6_route.h`, `struct in6_rtmsg`.
    #[repr(C)]
    struct Route {
        to: [u8; 16],
        from: [u8; 16],
        gateway: [u8; 16],
        kind: u32,
        to_length: u16,
        from_length: u16,
        metric: u32,
        info: libc::c_ulong,
        flags: u32,
        interface: libc::c_int,
    }
    for (setting, value) in [("accept_dad", "0"), ("accept_ra", "0")] {
        std::fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/{setting}"), value)?;
    }
    bring_up(interface)?;
    let socket = inet_socket_of(libc::AF_INET6)?;
    let index = rustix::net::netdevice::name_to_index(&socket, interface)?.cast_signed();
    let set = libc::in6_ifreq {
        ifr6_addr: libc::in6_addr { s6_addr: address.octets() },
        ifr6_prefixlen: 128,
        ifr6_ifindex: index,
    };
    // SAFETY: the kernel reads one `in6_ifreq`.
    unless_there(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &raw const set) })?;
    let none = Ipv6Addr::UNSPECIFIED;
    let routes = [(router, 128, none, 0), (none, 0, router, u32::from(libc::RTF_GATEWAY))];
    for (to, to_length, gateway, flags) in routes.into_iter().take(if way_out { 2 } else { 1 }) {
        let route = Route {
            to: to.octets(),
            from: none.octets(),
            gateway: gateway.octets(),
            kind: 0,
            to_length,
            from_length: 0,
            // Source: as above, `IP6_RT_PRIO_USER`.
            metric: 1024,
            info: 0,
            flags: flags | u32::from(libc::RTF_UP),
            interface: index,
        };
        // SAFETY: the kernel reads one `in6_rtmsg`, which `Route` is laid out as.
        unless_there(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) })?;
    }
    Ok(())
}

/// What a call that adds something said; that it is there already is no error.
fn unless_there(answer: libc::c_int) -> io::Result<()> {
    match answer {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            error => Err(error),
        },
    }
}

/// Brings a network interface up as it is.
///
/// # Errors
/// There is no such interface, or we are not root.
pub fn bring_up(interface: &str) -> io::Result<()> {
    raise(&inet_socket()?, interface)
}

fn raise(socket: &OwnedFd, interface: &str) -> io::Result<()> {
    let mut request = named(interface)?;
    // Both flags are small: Linux `include/uapi/linux/if.h`.
    request.ifr_ifru.ifru_flags = 1 | 0x40;
    interface_call(socket, libc::SIOCSIFFLAGS, &request)
}

fn inet_socket() -> io::Result<OwnedFd> {
    inet_socket_of(libc::AF_INET)
}

fn inet_socket_of(family: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: only makes a descriptor.
    let fd = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn named(interface: &str) -> io::Result<libc::ifreq> {
    // SAFETY: an all-zero ifreq is a valid value of a plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    Ok(request)
}

fn interface_call(socket: &OwnedFd, call: libc::c_ulong, request: &libc::ifreq) -> io::Result<()> {
    // SAFETY: the kernel reads one `ifreq`.
    match unsafe { libc::ioctl(socket.as_raw_fd(), call, std::ptr::from_ref(request)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn inet(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: an all-zero sockaddr is a valid value of a plain C struct.
    let mut socket: libc::sockaddr = unsafe { std::mem::zeroed() };
    socket.sa_family = libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default();
    // Source: ip(7), `sockaddr_in`: two bytes of port before the address.
    for (place, byte) in socket.sa_data.iter_mut().skip(2).zip(address.octets()) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    socket
}
