//! Router advertisements (RFC 4861): that addresses are to be had by `DHCPv6`,
//! and whether the gateway is a way out.

use std::net::IpAddr;

use etherparse::{Icmpv6Type, icmpv6::RouterAdvertisementHeader};

use super::{Guest, Site, frame};

/// How long a guest keeps the gateway as its router: three times the pause
/// between two advertisements (RFC 4861, 6.2.1).
const ROUTER_LIFETIME_S: u16 = 1800;

/// An advertisement for `guest`; none when it is to have no IPv6.
pub(super) fn advertisement(site: &Site, guest: &Guest) -> Option<Vec<u8>> {
    guest.ipv6?;
    let header = RouterAdvertisementHeader {
        cur_hop_limit: 64,
        managed_address_config: true,
        other_config: true,
        router_lifetime: if guest.way_out { ROUTER_LIFETIME_S } else { 0 },
    };
    // Reachable time and retransmission timer: as the guest likes.
    let mut payload = vec![0; 8];
    payload.extend(source_link_address(site));
    payload.extend(mtu(site));
    payload.extend(name_servers(site));
    frame::icmp6(site, guest, Icmpv6Type::RouterAdvertisement(header), &payload)
}

/// RFC 4861, 4.6.1. The length counts units of eight octets.
fn source_link_address(site: &Site) -> [u8; 8] {
    let [a, b, c, d, e, f] = site.gateway_mac.octets();
    [1, 1, a, b, c, d, e, f]
}

/// RFC 4861, 4.6.4.
fn mtu(site: &Site) -> [u8; 8] {
    let [a, b] = site.mtu_octets.to_be_bytes();
    [5, 1, 0, 0, 0, 0, a, b]
}

/// RFC 8106, 5.1.
fn name_servers(site: &Site) -> Vec<u8> {
    const MOST: usize = 8;
    let servers: Vec<_> = site
        .name_servers
        .iter()
        .filter_map(|server| match server {
            IpAddr::V6(server) => Some(server.octets()),
            IpAddr::V4(_) => None,
        })
        .take(MOST)
        .collect();
    let Ok(length) = u8::try_from(1 + 2 * servers.len()) else { return Vec::new() };
    if servers.is_empty() {
        return Vec::new();
    }
    [&[25, length, 0, 0][..], &u32::from(ROUTER_LIFETIME_S).to_be_bytes(), &servers.concat()].concat()
}
