//! Routes of multicast packets, as a multicast router has them.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// What a router's socket is told. Source: Linux `include/uapi/linux/mroute.h` and
/// `mroute6.h`, `MRT_INIT`, `MRT_ADD_VIF`, `MRT_ADD_MFC`; the same numbers in both.
const INIT: libc::c_int = 200;
const ADD_LINK: libc::c_int = 202;
const ADD_ROUTE: libc::c_int = 204;

/// A link is told by its index. Source: as above, `VIFF_USE_IFINDEX`.
const BY_INDEX: u8 = 8;

/// Routes what `from` sends to `group` and comes in by the first of two links, told by
/// their indices, out by the second: in the calling thread's network namespace, as long as
/// the descriptor is open.
///
/// # Errors
/// The kernel cannot, somebody else routes multicast packets there, or the addresses are
/// of two families.
pub fn route([enters, leaves]: [u32; 2], from: IpAddr, group: IpAddr) -> io::Result<OwnedFd> {
    match (from, group) {
        (IpAddr::V4(from), IpAddr::V4(group)) => route4([enters, leaves], from, group),
        (IpAddr::V6(from), IpAddr::V6(group)) => route6([enters, leaves], from, group),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "the addresses are of two families")),
    }
}

fn route4(links: [u32; 2], from: Ipv4Addr, group: Ipv4Addr) -> io::Result<OwnedFd> {
    let router = socket(libc::AF_INET, libc::IPPROTO_IGMP)?;
    let tell = |option, value: &[u8]| tell(&router, libc::IPPROTO_IP, option, value);
    tell(INIT, &1_u32.to_ne_bytes())?;
    for (number, link) in (0_u16..).zip(links) {
        // `struct vifctl`: number, flags, least TTL, no limit, the index, no tunnel.
        tell(
            ADD_LINK,
            &[&number.to_ne_bytes()[..], &[BY_INDEX, 1, 0, 0, 0, 0], &link.to_ne_bytes(), &[0; 4]].concat(),
        )?;
    }
    // `struct mfcctl`: whence, whither, the first link, least TTLs (none leaves by the others), counts.
    let mut ttls = [0; 32];
    ttls[1] = 1;
    tell(ADD_ROUTE, &[&from.octets()[..], &group.octets(), &0_u16.to_ne_bytes(), &ttls, &[0; 18]].concat())?;
    Ok(router)
}

fn route6(links: [u32; 2], from: Ipv6Addr, group: Ipv6Addr) -> io::Result<OwnedFd> {
    let router = socket(libc::AF_INET6, libc::IPPROTO_ICMPV6)?;
    let tell = |option, value: &[u8]| tell(&router, libc::IPPROTO_IPV6, option, value);
    tell(INIT, &1_u32.to_ne_bytes())?;
    for (number, link) in (0_u16..).zip(links) {
        let index = u16::try_from(link).map_err(io::Error::other)?;
        // `struct mif6ctl`: number, flags, least hop limit, the index, room, no limit.
        tell(ADD_LINK, &[&number.to_ne_bytes()[..], &[0, 1], &index.to_ne_bytes(), &[0; 6]].concat())?;
    }
    // `struct sockaddr_in6`: family, port and flow, the address, no scope.
    let family = libc::sa_family_t::try_from(libc::AF_INET6).map_err(io::Error::other)?.to_ne_bytes();
    let address = |address: Ipv6Addr| [&family[..], &[0; 6], &address.octets(), &[0; 4]].concat();
    // `struct mf6cctl`: whence, whither, the first link, room, a bit for each that it leaves by.
    let leaves = [&2_u32.to_ne_bytes()[..], &[0; 28]].concat();
    tell(ADD_ROUTE, &[address(from), address(group), vec![0; 4], leaves].concat())?;
    Ok(router)
}

fn socket(family: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: takes integers alone.
    let made = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was just made, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

fn tell(router: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &[u8]) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads as many octets as it is told, which outlive the call.
    let told = unsafe { libc::setsockopt(router.as_raw_fd(), level, option, value.as_ptr().cast(), length) };
    if told == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
