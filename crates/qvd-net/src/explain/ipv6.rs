//! The second opinion on IPv6, in the words of RFC 4861, 3810 and 8415.

use std::net::Ipv6Addr;

use super::{Party, Ruled, demand};

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
const ALL_MLDV2_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x16);
const ALL_DHCP_SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);

/// The MAC that a group is sent to (RFC 2464, section 7).
const fn group_mac(group: Ipv6Addr) -> [u8; 6] {
    let [.., a, b, c, d] = group.octets();
    [0x33, 0x33, a, b, c, d]
}

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
    let (first, addresses) = header.split_first_chunk::<8>()?;
    let (from, to) = addresses.split_first_chunk::<16>()?;
    let [version, _, _, _, l0, l1, next, hop_limit] = *first;
    let payload = rest.get(..usize::from(u16::from_be_bytes([l0, l1])))?;
    let to: [u8; 16] = to.try_into().ok()?;
    (version >> 4 == 6).then_some(Packet { next, hop_limit, from: (*from).into(), to: to.into(), payload })
}

/// What becomes of a packet in a frame to `mac`.
pub(super) fn ruled(party: &Party, mac: [u8; 6], bytes: &[u8]) -> Ruled {
    let packet = parse(bytes).ok_or("a packet has a header, and its length is true")?;
    let own = |address: Ipv6Addr| party.has(address.into());
    let nobody = packet.from.is_unspecified();
    demand(nobody || own(packet.from), "the source address is the port's own, or none yet")?;
    let to_gateway = mac == party.gateway_mac && !packet.to.is_multicast();
    let to_group = |group: Ipv6Addr| packet.to == group && mac == group_mac(group);
    // Neither unspecified, loopback nor IPv4 in disguise, nor what is reserved for such.
    let for_one_other_host = to_gateway && packet.to.to_bits() >> 96 != 0;
    let whole = |octets| demand(packet.payload.len() >= octets, "a packet is as long as what it begins with");
    let outward = || {
        demand(!nobody, "nobody without an address speaks")?;
        demand(for_one_other_host, "the destination is one other host, by the gateway")
    };
    match packet.next {
        0 => {
            let by_link = packet.hop_limit == 1 && (nobody || packet.from == party.link_local);
            let report = by_link && to_group(ALL_MLDV2_ROUTERS) && is_report(packet.payload);
            demand(report, "behind hop-by-hop options only a report of groups")?;
            Ok("a report of groups")
        }
        6 => {
            outward()?;
            whole(20)?;
            Ok("TCP to the gateway")
        }
        17 => {
            whole(8)?;
            let ports = packet.payload.first_chunk::<4>().ok_or("UDP has ports")?;
            if packet.from == party.link_local && to_group(ALL_DHCP_SERVERS) && *ports == [2, 0x22, 2, 0x23] {
                return Ok("a question of DHCPv6");
            }
            let no_server = demand(!ports.starts_with(&[2, 0x23]), "no server of DHCPv6");
            if party.groups.contains(&packet.to.into()) && to_group(packet.to) {
                demand(!nobody, "nobody without an address speaks")?;
                no_server?;
                return Ok("UDP to a group of the policy");
            }
            outward()?;
            no_server?;
            Ok("UDP to the gateway")
        }
        58 => {
            let plain = packet.payload.first().is_some_and(|kind| matches!(kind, 1..=4 | 128 | 129));
            if !plain {
                return neighbour(party, &packet, to_gateway, mac, &to_group);
            }
            outward()?;
            whole(8)?;
            Ok("an echo or an error of ICMPv6")
        }
        _ => Err("no headers of extension, and only TCP, UDP and ICMPv6"),
    }
}

fn is_report(payload: &[u8]) -> bool {
    payload.len() >= 16 && payload.starts_with(&[58, 0, 5, 2, 0, 0, 1, 0, 143])
}

fn neighbour(
    party: &Party,
    packet: &Packet<'_>,
    to_gateway: bool,
    mac: [u8; 6],
    to_group: &dyn Fn(Ipv6Addr) -> bool,
) -> Ruled {
    let message = packet.payload;
    let kind = message.first().ok_or("ICMPv6 has a kind")?;
    demand(matches!(kind, 133 | 135 | 136), "of ICMPv6 only echoes, errors and neighbour messages for itself")?;
    demand(packet.hop_limit == 255, "a neighbour message comes from this link")?;
    let nobody = packet.from.is_unspecified();
    // Any group of the kind that solicitations go to.
    let to_solicited =
        packet.to.to_bits() >> 24 == 0x00ff_0200_0000_0000_0000_0000_01ff && mac.starts_with(&[0x33, 0x33, 0xff]);
    let option = |at: usize, kind: u8| {
        let option = message.get(at..).unwrap_or_default();
        option.len() == 8 && option.starts_with(&[kind, 1]) && option.ends_with(&party.mac)
    };
    let target = message.get(8..24).and_then(|target| <[u8; 16]>::try_from(target).ok()).map(Ipv6Addr::from);
    let own_target = target.is_some_and(|target| party.has(target.into()));
    let form = "a neighbour message has one form, with the port's own MAC";
    match kind {
        133 => {
            demand(to_group(ALL_ROUTERS), "a router solicitation goes to the routers")?;
            demand(message.len() == 8 || (!nobody && option(8, 1)), form)?;
            Ok("a router solicitation")
        }
        135 if nobody => {
            demand(own_target, "a probe is about the port's own address")?;
            let nonce = message.len() == 32 && message.get(24..26) == Some(&[14, 1]);
            demand(to_solicited && (message.len() == 24 || nonce), form)?;
            Ok("a probe for its own address")
        }
        135 => {
            demand(to_gateway || to_solicited, "a solicitation goes to the gateway or its group")?;
            demand(message.len() == 24 || option(24, 1), form)?;
            Ok("a neighbour solicitation")
        }
        _ => {
            demand(own_target, "an advertisement is about the port's own address")?;
            demand(!nobody && (to_gateway || to_group(ALL_NODES)), "an advertisement goes to the gateway or to all")?;
            demand(message.get(4).is_some_and(|flags| flags & 0x80 == 0), "it is no router's")?;
            demand(option(24, 2), form)?;
            Ok("a neighbour advertisement for itself")
        }
    }
}
