//! What may leave a port, decided from what the policy means: an independent
//! second opinion on the rule set. It reads frames as a careful reader of the
//! standards would and knows nothing of tables, sets or hooks.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::frames;

/// Whose port it is, and who is on the other side.
#[derive(Debug, Clone)]
pub(crate) struct Party {
    pub(crate) mac: [u8; 6],
    pub(crate) ipv4: Ipv4Addr,
    pub(crate) gateway_mac: [u8; 6],
    /// The directed broadcast of the subnet.
    pub(crate) broadcast: Ipv4Addr,
    /// Its addresses of IPv6: its own and the link's.
    pub(crate) global: Ipv6Addr,
    pub(crate) link_local: Ipv6Addr,
}

impl Party {
    pub(crate) fn new(cast: &super::vectors::Cast, broadcast: Ipv4Addr) -> Self {
        Self {
            mac: cast.own.mac,
            ipv4: cast.own.ip,
            gateway_mac: cast.gateway.mac,
            broadcast,
            global: cast.own6.global,
            link_local: cast.own6.link_local,
        }
    }
}

/// Whether a frame from the port may come up to the host's bridge. To another
/// port none may.
pub(crate) fn reaches_host(party: &Party, frame: &[u8]) -> bool {
    let Some((to, from, ethertype, payload)) = split(frame) else { return false };
    if from != party.mac {
        return false;
    }
    match ethertype {
        frames::ARP => (to == party.gateway_mac || to == frames::BROADCAST) && arp(party, payload),
        frames::IPV4 => ipv4(party, to, payload),
        frames::IPV6 => super::reference6::reaches_host(party, to, payload),
        _ => false,
    }
}

type Parts<'a> = ([u8; 6], [u8; 6], u16, &'a [u8]);

fn split(frame: &[u8]) -> Option<Parts<'_>> {
    let (to, rest) = frame.split_first_chunk::<6>()?;
    let (from, rest) = rest.split_first_chunk::<6>()?;
    let (ethertype, payload) = rest.split_first_chunk::<2>()?;
    Some((*to, *from, u16::from_be_bytes(*ethertype), payload))
}

fn arp(party: &Party, packet: &[u8]) -> bool {
    let Some(packet) = packet.first_chunk::<28>() else { return false };
    let (head, addresses) = packet.split_at(8);
    let for_ipv4_over_ethernet = head[..4] == [0, 1, 8, 0];
    let operation = u16::from_be_bytes([head[6], head[7]]);
    let sender = Ipv4Addr::new(addresses[6], addresses[7], addresses[8], addresses[9]);
    let about_somebody = addresses[16..20] != [0; 4];
    for_ipv4_over_ethernet
        && about_somebody
        && matches!(operation, 1 | 2)
        && addresses[..6] == party.mac
        && (sender == party.ipv4 || sender.is_unspecified())
}

fn ipv4(party: &Party, mac: [u8; 6], packet: &[u8]) -> bool {
    let Some(header) = packet.first_chunk::<20>() else { return false };
    let address = |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
    let (source, to) = (address(12), address(16));
    let is_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
    // Version 4, five words of header: no options.
    if header[0] != 0x45 || !(source == party.ipv4 || source.is_unspecified()) || is_fragment {
        return false;
    }
    let total_length = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if total_length < 20 || total_length > packet.len() {
        return false;
    }
    if to.is_broadcast() && mac == frames::BROADCAST {
        return header[9] == 17 && dhcp(party, &packet[20..]);
    }
    // Nothing but the gateway is spoken to, and nobody without an address speaks.
    if mac != party.gateway_mac || source.is_unspecified() {
        return false;
    }
    let for_one_other_host = !(to.octets()[0] == 0
        || to.is_loopback()
        || to.is_link_local()
        || to.octets()[0] >= 224
        || to == party.broadcast);
    let speaks_well = match header[9] {
        1 | 6 => true,
        // Anything but a server of DHCP, as far as that can be seen.
        17 => packet.get(20..22).is_some_and(|port| port != [0, 67]),
        _ => false,
    };
    for_one_other_host && speaks_well
}

/// A question of DHCP (RFC 2131) that names who asks. What does not fit into
/// the frame is not there.
fn dhcp(party: &Party, packet: &[u8]) -> bool {
    let Some((ports, message)) = packet.split_first_chunk::<4>() else { return false };
    let Some((_, message)) = message.split_first_chunk::<4>() else { return false };
    *ports == [0, 68, 0, 67] && message.get(..3) == Some(&[1, 1, 6]) && message.get(28..34) == Some(&party.mac)
}

#[test]
fn the_reference_knows_the_plain_cases() {
    let own = frames::Station { mac: [0x52, 1, 1, 1, 1, 1], ip: Ipv4Addr::new(10, 66, 0, 7) };
    let gateway = frames::Station { mac: [0x52, 1, 1, 0, 0, 1], ip: Ipv4Addr::new(10, 66, 0, 1) };
    let party = Party {
        mac: own.mac,
        ipv4: own.ip,
        gateway_mac: gateway.mac,
        broadcast: Ipv4Addr::new(10, 66, 255, 255),
        global: "fd51:5644:1::7".parse().unwrap(),
        link_local: "fe80::5001:1ff:fe01:101".parse().unwrap(),
    };
    let mark = [0; super::world::MARK_LEN];
    let send = |packet: &[u8]| [&frames::ethernet(gateway.mac, own.mac, frames::IPV4, packet)[..], &mark].concat();
    assert!(reaches_host(&party, &send(&frames::udp(own.ip, gateway.ip, (5000, 4000)))));
    assert!(!reaches_host(&party, &send(&frames::udp(own.ip, gateway.ip, (67, 68)))));
    assert!(!reaches_host(&party, &send(&frames::udp(gateway.ip, gateway.ip, (5000, 4000)))));
    assert!(!reaches_host(&party, &[0; 13]));
    let request = frames::ethernet(frames::BROADCAST, own.mac, frames::ARP, &frames::arp(1, own, gateway.ip));
    assert!(reaches_host(&party, &request));
    assert!(!reaches_host(&party, &request[..request.len() - 1]));
}
