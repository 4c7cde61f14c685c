//! The second opinion on IPv6, in the words of RFC 4861, 3810 and 8415.

use std::net::Ipv6Addr;

use super::{
    reference::Party,
    vectors::{ALL_DHCP_SERVERS, ALL_MLDV2_ROUTERS, ALL_NODES, ALL_ROUTERS, group_mac, solicited_node},
};

/// A packet as it claims to be: of a length that is true.
struct Packet<'a> {
    next: u8,
    hop_limit: u8,
    from: Ipv6Addr,
    to: Ipv6Addr,
    payload: &'a [u8],
}

fn parse(bytes: &[u8]) -> Option<Packet<'_>> {
    let (header, rest) = bytes.split_first_chunk::<40>()?;
    let address = |at: usize| <[u8; 16]>::try_from(&header[at..at + 16]).map(Ipv6Addr::from).ok();
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    (header[0] >> 4 == 6 && length <= rest.len()).then_some(())?;
    Some(Packet {
        next: header[6],
        hop_limit: header[7],
        from: address(8)?,
        to: address(24)?,
        payload: &rest[..length],
    })
}

/// Whether a packet in a frame to `mac` may come up to the host's bridge.
pub(crate) fn reaches_host(party: &Party, mac: [u8; 6], bytes: &[u8]) -> bool {
    let Some(packet) = parse(bytes) else { return false };
    let to_gateway = mac == party.gateway_mac && !packet.to.is_multicast();
    let to_group = |group: Ipv6Addr| packet.to == group && mac == group_mac(group);
    // Any group of the kind that solicitations go to.
    let to_solicited = packet.to.segments()[..6] == solicited_node(Ipv6Addr::LOCALHOST).segments()[..6]
        && packet.to.octets()[12] == 0xff
        && mac[..3] == [0x33, 0x33, 0xff];
    let nobody = packet.from.is_unspecified();
    if !nobody && packet.from != party.global && packet.from != party.link_local {
        return false;
    }
    let link_local_or_nobody = nobody || packet.from == party.link_local;
    let for_one_other_host = to_gateway && {
        let high = packet.to.to_bits() >> 32;
        // Neither unspecified, loopback nor IPv4 in disguise.
        high != 0 && high != 0xffff
    };
    match packet.next {
        0 => packet.hop_limit == 1 && link_local_or_nobody && to_group(ALL_MLDV2_ROUTERS) && is_report(packet.payload),
        6 => !nobody && for_one_other_host && packet.payload.len() >= 20,
        17 => {
            let ports = packet.payload.first_chunk::<4>();
            let asks = packet.from == party.link_local && to_group(ALL_DHCP_SERVERS);
            let whole = packet.payload.len() >= 8;
            let from_server = ports.is_some_and(|ports| ports[..2] == [2, 0x23]);
            (asks && whole && ports == Some(&[2, 0x22, 2, 0x23]))
                || (!nobody && for_one_other_host && whole && !from_server)
        }
        58 => {
            let kind = packet.payload.first();
            let plain = !nobody
                && packet.payload.len() >= 8
                && for_one_other_host
                && kind.is_some_and(|kind| matches!(kind, 1..=4 | 128 | 129));
            plain || neighbour(party, &packet, to_gateway, to_solicited, &to_group)
        }
        _ => false,
    }
}

fn is_report(payload: &[u8]) -> bool {
    payload.len() >= 16 && payload[..9] == [58, 0, 5, 2, 0, 0, 1, 0, 143]
}

fn neighbour(
    party: &Party,
    packet: &Packet<'_>,
    to_gateway: bool,
    to_solicited: bool,
    to_group: &dyn Fn(Ipv6Addr) -> bool,
) -> bool {
    let message = packet.payload;
    let Some(&kind) = message.first() else { return false };
    if packet.hop_limit != 255 {
        return false;
    }
    let nobody = packet.from.is_unspecified();
    let option = |at: usize, kind: u8| {
        message.len() == at + 8 && message[at..at + 2] == [kind, 1] && message[at + 2..] == party.mac
    };
    let target = message.get(8..24).and_then(|target| <[u8; 16]>::try_from(target).ok()).map(Ipv6Addr::from);
    let own_target = target.is_some_and(|target| target == party.global || target == party.link_local);
    match kind {
        133 => to_group(ALL_ROUTERS) && (message.len() == 8 || (!nobody && option(8, 1))),
        135 if nobody => {
            let nonce = message.len() == 32 && message[24..26] == [14, 1];
            to_solicited && own_target && (message.len() == 24 || nonce)
        }
        135 => (to_gateway || to_solicited) && (message.len() == 24 || option(24, 1)),
        136 => {
            let no_router = message.get(4).is_some_and(|flags| flags & 0x80 == 0);
            !nobody && (to_gateway || to_group(ALL_NODES)) && own_target && no_router && option(24, 2)
        }
        _ => false,
    }
}
