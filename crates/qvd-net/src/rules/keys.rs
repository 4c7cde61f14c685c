//! Keys of the sets. Each part is padded to whole 32-bit registers (Linux
//! `include/uapi/linux/netfilter/nf_tables.h`, `NFT_REG32_SIZE`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::Mac;

fn port_key(link: &str) -> [u8; 16] {
    let mut key = [0; 16];
    // An interface's name has at most 15 bytes; `Instance::link_name` sees to it.
    for (to, from) in key.iter_mut().zip(link.bytes()) {
        *to = from;
    }
    key
}

fn mac_key(mac: Mac) -> [u8; 8] {
    let [a, b, c, d, e, f] = mac.octets();
    [a, b, c, d, e, f, 0, 0]
}

/// Key of [`IDENTITY`](super::IDENTITY).
pub(crate) fn identity_key(link: &str, mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    [&port_key(link)[..], &mac_key(mac), &address.octets()].concat()
}

/// Key of [`IDENTITY6`](super::IDENTITY6).
pub(crate) fn identity6_key(link: &str, mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    [&port_key(link)[..], &mac_key(mac), &address.octets()].concat()
}

/// An Ethernet header behind a link's index, which is of the host's own order.
fn header_key(index: u32, gateway: Mac, own: Mac, ethertype: u16) -> Vec<u8> {
    let header = [&gateway.octets()[..], &own.octets(), &ethertype.to_be_bytes(), &[0, 0]];
    [&index.to_ne_bytes()[..], &header.concat()].concat()
}

/// Key of [`WAY`](super::WAY).
pub(crate) fn way_key(index: u32, gateway: Mac, own: Mac, address: Ipv4Addr) -> Vec<u8> {
    [header_key(index, gateway, own, 0x0800), address.octets().to_vec()].concat()
}

/// Key of [`WAY6`](super::WAY6).
pub(crate) fn way6_key(index: u32, gateway: Mac, own: Mac, address: Ipv6Addr) -> Vec<u8> {
    [header_key(index, gateway, own, 0x86dd), address.octets().to_vec()].concat()
}

/// The desktop's MAC in a key of these.
pub(crate) fn mac_of_way_key(key: &[u8]) -> Option<Mac> {
    mac_of_key(key.get(10..)?)
}

/// Key of [`LINK`](super::LINK).
pub(crate) fn link_key(link: &str, mac: Mac) -> Vec<u8> {
    [&port_key(link)[..], &mac_key(mac)].concat()
}

/// Key of a set of addresses.
pub(crate) fn address_key(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// Key of [`NEAR`](super::NEAR): marks are numbers of the host's own order.
pub(crate) fn near_key(group: u32, address: IpAddr) -> Vec<u8> {
    [&group.to_ne_bytes()[..], &address_key(address)].concat()
}

/// Key of [`REPORTERS`](super::REPORTERS).
pub(crate) fn reporter_key(link: &str) -> Vec<u8> {
    port_key(link).to_vec()
}

/// Key of [`TOLD`](super::TOLD) and [`TOLD6`](super::TOLD6).
pub(crate) fn told_key(group: IpAddr, from: IpAddr) -> Vec<u8> {
    [address_key(group), address_key(from)].concat()
}

/// Key of what was dropped of a port, by reason.
pub(crate) fn dropped_key(link: &str, mark: u32) -> Vec<u8> {
    [&port_key(link)[..], &mark.to_ne_bytes()].concat()
}

/// The same behind the bridge.
pub(crate) fn dropped_behind_key(mac: Mac, mark: u32) -> Vec<u8> {
    [&mac_key(mac)[..], &mark.to_ne_bytes()].concat()
}

/// Mark that such a key ends with.
pub(crate) fn mark_of_key(key: &[u8]) -> Option<u32> {
    key.last_chunk().map(|&mark| u32::from_ne_bytes(mark))
}

/// MAC that a key begins with.
pub(crate) fn mac_of_key(key: &[u8]) -> Option<Mac> {
    key.first_chunk().map(|&octets| Mac::of_octets(octets))
}

/// Name of the port that a key begins with.
pub(crate) fn port_of_key(key: &[u8]) -> Option<&str> {
    let name = key.get(..16)?;
    std::str::from_utf8(name.split(|&b| b == 0).next()?).ok()
}

/// Address that a key of [`IDENTITY`](super::IDENTITY) or of addresses ends with.
pub(crate) fn v4_of_key(key: &[u8]) -> Option<Ipv4Addr> {
    key.last_chunk::<4>().map(|&octets| octets.into())
}

/// The same of IPv6.
pub(crate) fn v6_of_key(key: &[u8]) -> Option<Ipv6Addr> {
    key.last_chunk::<16>().map(|&octets| octets.into())
}

#[cfg(test)]
mod tests {
    use qvd_core::Instance;

    use super::*;

    #[test]
    fn a_key_names_its_port_and_address() {
        let instance = Instance::new(0x1a2b);
        let address = Ipv4Addr::new(10, 66, 0, 9);
        let mac = Mac::of(instance, address);
        let key = identity_key("qvd1a2b-7", mac, address);
        assert_eq!(key.len(), 28);
        assert_eq!(port_of_key(&key), Some("qvd1a2b-7"));
        assert_eq!(v4_of_key(&key), Some(address));
        let way = way_key(7, Mac::of(instance, Ipv4Addr::new(10, 66, 0, 1)), mac, address);
        assert_eq!((way.len(), mac_of_way_key(&way)), (24, Some(mac)));
        let key = identity6_key("qvd1a2b-7", mac, mac.link_local());
        assert_eq!((key.len(), v6_of_key(&key)), (40, Some(mac.link_local())));
        assert_eq!(link_key("qvd1a2b-7", mac).len(), 24);
    }
}
