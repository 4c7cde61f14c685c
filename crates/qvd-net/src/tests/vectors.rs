//! Hostile frames beyond the measured matrix: what a user who is root inside
//! would try next.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{
    frames::{self, IPV4, IPV6, Ip, Station, arp, ethernet, ipv4, tagged, udp, udp_header},
    world::MARK_LEN,
};

const TCP: u8 = 6;
const UDP: u8 = 17;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const ICMPV6: u8 = 58;
const NO_NEXT: u8 = 59;
const DESTINATION: u8 = 60;
const MOBILITY: u8 = 135;

/// A station's IPv6 side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Station6 {
    pub(crate) mac: [u8; 6],
    pub(crate) link_local: Ipv6Addr,
    pub(crate) global: Ipv6Addr,
}

/// Who plays: the desktop that sends, its neighbour, and the host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cast {
    pub(crate) own: Station,
    pub(crate) other: Station,
    pub(crate) gateway: Station,
    pub(crate) own6: Station6,
    pub(crate) other6: Station6,
    pub(crate) gateway6: Station6,
}

pub(crate) const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
pub(crate) const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
pub(crate) const ALL_MLDV2_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x16);
pub(crate) const ALL_DHCP_SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);

/// The MAC that an IPv6 multicast group is sent to (RFC 2464, section 7).
pub(crate) fn group_mac(group: Ipv6Addr) -> [u8; 6] {
    let [.., a, b, c, d] = group.octets();
    [0x33, 0x33, a, b, c, d]
}

/// The group that a neighbour solicitation for `target` goes to.
pub(crate) fn solicited_node(target: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = target.octets();
    let mut group = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0, 0, 0];
    group[13..].copy_from_slice(&[a, b, c]);
    group.into()
}

/// An IPv6 packet around `payload`. Its length does not count the mark that
/// the world appends: that is padding behind it, as on a real wire.
pub(crate) fn ipv6(from: Ipv6Addr, to: Ipv6Addr, next: u8, hop_limit: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap();
    [&[0x60, 0, 0, 0][..], &length.to_be_bytes(), &[next, hop_limit], &from.octets(), &to.octets(), payload].concat()
}

/// The same with a correct checksum at `at` of an upper-layer payload.
pub(crate) fn summed(from: Ipv6Addr, to: Ipv6Addr, next: u8, hop_limit: u8, payload: &[u8], at: usize) -> Vec<u8> {
    let mut payload = payload.to_vec();
    let length = u32::try_from(payload.len()).unwrap();
    let pseudo = [&from.octets()[..], &to.octets(), &length.to_be_bytes(), &[0, 0, 0, next], &payload].concat();
    let sum = frames::checksum(&pseudo);
    payload[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    ipv6(from, to, next, hop_limit, &payload)
}

/// A neighbour solicitation (135) or advertisement (136).
pub(crate) fn neighbour_discovery(kind: u8, target: Ipv6Addr, options: &[u8]) -> Vec<u8> {
    let flags = if kind == 136 { 0x60 } else { 0 };
    [&[kind, 0, 0, 0, flags, 0, 0, 0][..], &target.octets(), options].concat()
}

/// Option that tells a link-layer address: of the source (1) or target (2).
pub(crate) fn link_option(kind: u8, mac: [u8; 6]) -> Vec<u8> {
    [&[kind, 1][..], &mac].concat()
}

pub(crate) fn udp6(ports: (u16, u16)) -> Vec<u8> {
    let (from, to) = ports;
    [from, to, 8, 0].map(u16::to_be_bytes).concat()
}

/// An extension header of eight octets that is followed by `next`.
fn extension(next: u8) -> Vec<u8> {
    // PadN over what is left.
    vec![next, 0, 1, 4, 0, 0, 0, 0]
}

fn fragment(next: u8, offset_units: u16, more: bool) -> Vec<u8> {
    let field = (offset_units << 3) | u16::from(more);
    [&[next, 0][..], &field.to_be_bytes(), &[0, 0, 0, 7]].concat()
}

pub(crate) type Named = (String, Vec<u8>);

/// Every further vector, each under a name.
pub(crate) fn hostile(cast: &Cast) -> Vec<Named> {
    let routers = super::routers::claims(cast);
    [link_layer(cast), internet4(cast), extension_chains(cast), neighbour_spoofs(cast), internet6(cast), routers]
        .concat()
}

/// Frames that are wrong before any address of a packet is looked at.
fn link_layer(cast: &Cast) -> Vec<Named> {
    let Cast { own, other, gateway, .. } = *cast;
    let plain = udp(own.ip, gateway.ip, (5000, 4000));
    let direct = ethernet(gateway.mac, own.mac, IPV4, &plain);
    let mut all: Vec<Named> = vec![
        ("vlan in vlan, same kind".into(), tagged(&tagged(&direct, 0x8100, 7), 0x8100, 7)),
        ("vlan in vlan, inner tag of the service kind".into(), tagged(&tagged(&direct, 0x88a8, 7), 0x8100, 7)),
        ("three tags".into(), tagged(&tagged(&tagged(&direct, 0x8100, 1), 0x8100, 2), 0x8100, 3)),
        ("old service tag".into(), tagged(&direct, 0x9100, 7)),
        ("tag zero around a spoof".into(), {
            tagged(&ethernet(gateway.mac, own.mac, IPV4, &udp(other.ip, gateway.ip, (5000, 4000))), 0x8100, 0)
        }),
        ("ipv4 in llc/snap".into(), snap(gateway.mac, own.mac, IPV4, &plain)),
        ("arp in llc/snap".into(), snap(frames::BROADCAST, own.mac, frames::ARP, &arp(1, own, gateway.ip))),
        ("spoofed arp in llc/snap".into(), {
            snap(frames::BROADCAST, own.mac, frames::ARP, &arp(2, Station { ip: gateway.ip, ..own }, own.ip))
        }),
        ("raw 802.3 (ipx)".into(), ethernet(frames::BROADCAST, own.mac, 30, &[0xff; 30])),
        ("length field that lies".into(), ethernet(gateway.mac, own.mac, 0x05dc, &plain)),
        ("mpls".into(), ethernet(gateway.mac, own.mac, 0x8847, &[&[0, 0, 0x11, 0x40][..], &plain].concat())),
        ("macsec".into(), ethernet(gateway.mac, own.mac, 0x88e5, &plain)),
        ("loopback test".into(), ethernet(gateway.mac, own.mac, 0x9000, &[0; 8])),
        ("source is a group".into(), ethernet(gateway.mac, [0x53, 0, 0, 0, 0, 1], IPV4, &plain)),
        ("source is everybody".into(), ethernet(gateway.mac, frames::BROADCAST, IPV4, &plain)),
        ("source is nobody".into(), ethernet(gateway.mac, [0; 6], IPV4, &plain)),
        ("source is the gateway".into(), ethernet(gateway.mac, gateway.mac, IPV4, &plain)),
        ("source is the neighbour, with its address".into(), {
            ethernet(gateway.mac, other.mac, IPV4, &udp(other.ip, gateway.ip, (5000, 4000)))
        }),
    ];
    // Reserved for what lies between two bridges (IEEE 802.1D, table 7-10).
    for last in 0..16 {
        let to = [1, 0x80, 0xc2, 0, 0, last];
        for (name, ethertype, payload) in [
            ("ipv4", IPV4, plain.clone()),
            ("arp", frames::ARP, arp(1, own, gateway.ip)),
            ("ipv6", IPV6, ipv6(cast.own6.global, cast.gateway6.global, UDP, 64, &udp6((5000, 4000)))),
            ("slow protocols", 0x8809, vec![1; 8]),
            ("eapol", 0x888e, vec![1, 1, 0, 0]),
            ("bpdu", 0x26, vec![0x42, 0x42, 3, 0, 0, 0, 0, 0]),
            ("unknown", 0x88b5, vec![0; 8]),
        ] {
            all.push((format!("{name} to reserved group {last:02x}"), ethernet(to, own.mac, ethertype, &payload)));
        }
    }
    all
}

fn snap(to: [u8; 6], from: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let header = [&[0xaa, 0xaa, 3, 0, 0, 0][..], &ethertype.to_be_bytes()].concat();
    let length = u16::try_from(header.len() + payload.len() + MARK_LEN).unwrap();
    ethernet(to, from, length, &[&header[..], payload].concat())
}

fn internet4(cast: &Cast) -> Vec<Named> {
    let Cast { own, other, gateway, .. } = *cast;
    let second = Ipv4Addr::from(u32::from(own.ip) + 77);
    let send = |packet: Vec<u8>| ethernet(gateway.mac, own.mac, IPV4, &packet);
    let to_all = |ethertype, payload: &[u8]| ethernet(frames::BROADCAST, own.mac, ethertype, payload);
    let with = |protocol, fragment| Ip { protocol, fragment, ..Ip::default() };
    let dhcp = |from: Ipv4Addr, ports| udp(from, Ipv4Addr::BROADCAST, ports);
    let none = Ipv4Addr::UNSPECIFIED;
    let tcp = [&[0x13, 0x88, 0, 22][..], &[0; 8], &[0x50, 2, 0xff, 0xff, 0, 0, 0, 0]].concat();
    let mut version = udp(own.ip, gateway.ip, (5000, 4000));
    version[0] = 0x65;
    let mut short_header = udp(own.ip, gateway.ip, (5000, 4000));
    short_header[0] = 0x44;
    vec![
        ("a second address".into(), send(udp(second, gateway.ip, (5000, 4000)))),
        ("arp for a second address".into(), to_all(frames::ARP, &arp(1, Station { ip: second, ..own }, gateway.ip))),
        ("arp from a mac made up".into(), {
            let made_up = Station { mac: [2, 1, 2, 3, 4, 5], ..own };
            ethernet(frames::BROADCAST, made_up.mac, frames::ARP, &arp(1, made_up, gateway.ip))
        }),
        (
            "announcement of a second address".into(),
            to_all(frames::ARP, &arp(2, Station { ip: second, ..own }, second)),
        ),
        ("source is nobody".into(), send(udp(none, gateway.ip, (5000, 4000)))),
        ("source is everybody".into(), send(udp(Ipv4Addr::BROADCAST, gateway.ip, (5000, 4000)))),
        ("source is the host itself".into(), send(udp(Ipv4Addr::LOCALHOST, gateway.ip, (5000, 4000)))),
        ("land".into(), send(udp(gateway.ip, gateway.ip, (4000, 4000)))),
        ("to the host itself".into(), send(udp(own.ip, Ipv4Addr::LOCALHOST, (5000, 4000)))),
        ("to the metadata service".into(), send(udp(own.ip, Ipv4Addr::new(169, 254, 169, 254), (5000, 80)))),
        ("to nobody".into(), send(udp(own.ip, none, (5000, 4000)))),
        ("to a reserved address".into(), send(udp(own.ip, Ipv4Addr::new(240, 0, 0, 1), (5000, 4000)))),
        ("tiny first fragment".into(), send(ipv4(own.ip, gateway.ip, with(TCP, 0x2000), &tcp[..8]))),
        ("overlapping fragment".into(), send(ipv4(own.ip, gateway.ip, with(TCP, 1), &tcp[8..]))),
        ("last fragment, far off".into(), send(ipv4(own.ip, gateway.ip, with(UDP, 0x1fff), &[0; 8]))),
        ("igmp in a unicast frame".into(), send(ipv4(own.ip, gateway.ip, with(2, 0), &[0x16, 0, 0, 0, 224, 0, 0, 5]))),
        ("ipv4 in ipv4".into(), send(ipv4(own.ip, gateway.ip, with(4, 0), &udp(other.ip, gateway.ip, (5000, 4000))))),
        ("ipv6 in ipv4".into(), send(ipv4(own.ip, gateway.ip, with(41, 0), &[0x60; 40]))),
        ("sctp".into(), send(ipv4(own.ip, gateway.ip, with(132, 0), &udp_header((5000, 4000))))),
        (
            "vrrp".into(),
            ethernet(
                [1, 0, 0x5e, 0, 0, 18],
                own.mac,
                IPV4,
                &ipv4(own.ip, Ipv4Addr::new(224, 0, 0, 18), with(112, 0), &[0x21, 1, 255, 0]),
            ),
        ),
        ("report of groups by who is in none".into(), {
            let to = Ipv4Addr::new(224, 0, 0, 22);
            let report = super::groups::igmp(own.ip, to, 1, &[0x94, 4, 0, 0], 0x22);
            ethernet([1, 0, 0x5e, 0, 0, 22], own.mac, IPV4, &report)
        }),
        ("ipv4 of version six".into(), send(version)),
        ("header shorter than a header".into(), send(short_header)),
        ("ipv6 ethertype around ipv4".into(), {
            ethernet(gateway.mac, own.mac, IPV6, &udp(own.ip, gateway.ip, (5000, 4000)))
        }),
        ("dhcp offer to everybody, from nobody".into(), to_all(IPV4, &dhcp(none, (67, 68)))),
        ("dhcp request with a stolen mac".into(), {
            ethernet(frames::BROADCAST, other.mac, IPV4, &dhcp(none, (68, 67)))
        }),
        ("dhcp starvation: a mac made up".into(), {
            ethernet(frames::BROADCAST, [2, 1, 2, 3, 4, 5], IPV4, &dhcp(none, (68, 67)))
        }),
        ("dhcp starvation: a client made up".into(), { to_all(IPV4, &dhcp_question([2, 1, 2, 3, 4, 5], 1, (68, 67))) }),
        ("dhcp answer from a client's port".into(), to_all(IPV4, &dhcp_question(own.mac, 2, (68, 67)))),
        ("dhcp question between servers".into(), to_all(IPV4, &dhcp_question(own.mac, 1, (67, 67)))),
        ("dhcp question to one".into(), send(dhcp_question(own.mac, 1, (68, 67)))),
        ("netbios broadcast".into(), to_all(IPV4, &dhcp(own.ip, (137, 137)))),
    ]
}

/// What is to be found behind a chain of headers is not looked for.
fn extension_chains(cast: &Cast) -> Vec<Named> {
    let (own, gateway) = (cast.own6, cast.gateway6);
    let send = |first, payload: &[u8]| {
        ethernet(gateway.mac, own.mac, IPV6, &ipv6(own.global, gateway.global, first, 64, payload))
    };
    let last = udp6((5000, 4000));
    let chain = |kinds: &[u8], last_kind: u8, last: &[u8]| {
        let nexts = kinds.iter().skip(1).copied().chain([last_kind]);
        [nexts.flat_map(extension).collect::<Vec<_>>(), last.to_vec()].concat()
    };
    let advertisement = [134, 0, 0, 0, 64, 0, 0x0e, 0x10];
    let to_all = |first, payload: &[u8]| {
        let packet = ipv6(own.link_local, ALL_NODES, first, 255, payload);
        ethernet(group_mac(ALL_NODES), own.mac, IPV6, &packet)
    };
    let mut all: Vec<Named> = Vec::new();
    for (name, kind) in [
        ("hop-by-hop", HOP_BY_HOP),
        ("destination options", DESTINATION),
        ("routing", ROUTING),
        ("authentication", AUTHENTICATION),
        ("mobility", MOBILITY),
        ("host identity", 139),
        ("shim6", 140),
        ("encryption", 50),
        ("experiment 253", 253),
        ("experiment 254", 254),
        ("unknown protocol", 200),
        ("ipv6 in ipv6", 41),
        ("ipv4 in ipv6", 4),
        ("no next header", NO_NEXT),
    ] {
        all.push((format!("udp behind {name}"), send(kind, &[extension(UDP), last.clone()].concat())));
        let behind = [extension(ICMPV6), advertisement.to_vec()].concat();
        all.push((format!("router advertisement behind {name}"), to_all(kind, &behind)));
    }
    let eight = [DESTINATION; 8];
    all.push(("udp behind eight headers".into(), send(DESTINATION, &chain(&eight, UDP, &last))));
    let two = [HOP_BY_HOP, DESTINATION];
    all.push((
        "router advertisement behind two headers".into(),
        to_all(HOP_BY_HOP, &chain(&two, ICMPV6, &advertisement)),
    ));
    for (name, offset, more) in [("first", 0, true), ("later", 5, true), ("last", 9, false), ("atomic", 0, false)] {
        let parts = |next, rest: &[u8]| [fragment(next, offset, more), rest.to_vec()].concat();
        all.push((format!("{name} ipv6 fragment"), send(FRAGMENT, &parts(UDP, &last))));
        all.push((
            format!("{name} ipv6 fragment of an advertisement"),
            to_all(FRAGMENT, &parts(ICMPV6, &advertisement)),
        ));
        let behind = [extension(FRAGMENT), parts(UDP, &last)].concat();
        all.push((format!("{name} ipv6 fragment behind options"), send(DESTINATION, &behind)));
    }
    all
}

fn neighbour_spoofs(cast: &Cast) -> Vec<Named> {
    let (own, other, gateway) = (cast.own6, cast.other6, cast.gateway6);
    let nd = |from: Ipv6Addr, to: Ipv6Addr, hop_limit, message: &[u8]| {
        let mac = if to.is_multicast() { group_mac(to) } else { gateway.mac };
        ethernet(mac, own.mac, IPV6, &summed(from, to, ICMPV6, hop_limit, message, 2))
    };
    let advert = |target, mac| neighbour_discovery(136, target, &link_option(2, mac));
    let solicit = |target, mac| neighbour_discovery(135, target, &link_option(1, mac));
    let none = Ipv6Addr::UNSPECIFIED;
    let decoy = [link_option(2, own.mac), link_option(2, other.mac)].concat();
    vec![
        ("advertisement for the neighbour".into(), nd(own.global, ALL_NODES, 255, &advert(other.global, own.mac))),
        (
            "advertisement for the gateway".into(),
            nd(own.link_local, ALL_NODES, 255, &advert(gateway.link_local, own.mac)),
        ),
        ("advertisement with a stolen mac".into(), nd(own.global, gateway.global, 255, &advert(own.global, other.mac))),
        ("advertisement without an option".into(), {
            nd(own.global, ALL_NODES, 255, &neighbour_discovery(136, other.global, &[]))
        }),
        ("advertisement with a decoy option first".into(), {
            nd(own.global, gateway.global, 255, &neighbour_discovery(136, own.global, &decoy))
        }),
        ("advertisement from afar".into(), nd(own.global, gateway.global, 64, &advert(own.global, own.mac))),
        ("advertisement from the neighbour's address".into(), {
            nd(other.global, gateway.global, 255, &advert(own.global, own.mac))
        }),
        ("solicitation with a stolen mac".into(), {
            nd(own.global, solicited_node(gateway.global), 255, &solicit(gateway.global, other.mac))
        }),
        ("solicitation with two options".into(), {
            let options = [link_option(1, own.mac), link_option(1, other.mac)].concat();
            nd(own.global, solicited_node(gateway.global), 255, &neighbour_discovery(135, gateway.global, &options))
        }),
        ("solicitation from the neighbour's address".into(), {
            nd(other.global, solicited_node(gateway.global), 255, &solicit(gateway.global, own.mac))
        }),
        ("denial of the neighbour's address".into(), {
            nd(none, solicited_node(other.global), 255, &neighbour_discovery(135, other.global, &[]))
        }),
        ("denial of the gateway's address".into(), {
            nd(none, solicited_node(gateway.global), 255, &neighbour_discovery(135, gateway.global, &[]))
        }),
        (
            "router advertisement to the host".into(),
            nd(own.link_local, gateway.link_local, 255, &[134, 0, 0, 0, 64, 0, 1, 0]),
        ),
        ("router advertisement from the gateway's address".into(), {
            nd(gateway.link_local, ALL_NODES, 255, &[134, 0, 0, 0, 64, 0, 1, 0])
        }),
        ("advertisement of a router".into(), {
            let mut message = advert(own.global, own.mac);
            message[4] |= 0x80;
            nd(own.global, gateway.global, 255, &message)
        }),
        ("advertisement to the routers".into(), nd(own.global, ALL_ROUTERS, 255, &advert(own.global, own.mac))),
        ("solicitation to all nodes".into(), { nd(own.global, ALL_NODES, 255, &solicit(gateway.global, own.mac)) }),
        ("router solicitation with a stolen mac".into(), {
            nd(
                own.link_local,
                ALL_ROUTERS,
                255,
                &[&[133, 0, 0, 0, 0, 0, 0, 0][..], &link_option(1, other.mac)].concat(),
            )
        }),
        ("redirect to the host".into(), {
            nd(own.link_local, gateway.link_local, 255, &[&[137][..], &[0; 39]].concat())
        }),
        ("multicast router advertisement".into(), nd(own.link_local, ALL_NODES, 1, &[151, 1, 0, 0, 0, 0, 0, 0])),
        ("node information query".into(), nd(own.global, gateway.global, 255, &[139, 0, 0, 0, 0, 0, 0, 0])),
        ("home agent discovery".into(), nd(own.global, gateway.global, 255, &[144, 0, 0, 0, 0, 0, 0, 0])),
        ("router renumbering".into(), nd(own.global, gateway.global, 255, &[138, 0, 0, 0, 0, 0, 0, 0])),
        ("mld query without options".into(), nd(own.link_local, ALL_NODES, 1, &[&[130][..], &[0; 23]].concat())),
        ("echo request to all nodes".into(), nd(own.global, ALL_NODES, 64, &[128, 0, 0, 0, 0, 1, 0, 1])),
    ]
}

fn internet6(cast: &Cast) -> Vec<Named> {
    let (own, other, gateway) = (cast.own6, cast.other6, cast.gateway6);
    let payload = udp6((5000, 4000));
    let send = |from, to| ethernet(gateway.mac, own.mac, IPV6, &summed(from, to, UDP, 64, &payload, 6));
    let second = Ipv6Addr::from(u128::from(own.global) + 77);
    let server = udp6((547, 546));
    let group = |group: Ipv6Addr, from, ports| {
        ethernet(group_mac(group), own.mac, IPV6, &summed(from, group, UDP, 1, &udp6(ports), 6))
    };
    vec![
        ("ipv6 source of the neighbour".into(), send(other.global, gateway.global)),
        ("ipv6 link-local source of the neighbour".into(), send(other.link_local, gateway.link_local)),
        ("a second ipv6 address".into(), send(second, gateway.global)),
        ("ipv6 source of the gateway".into(), send(gateway.global, gateway.global)),
        ("ipv6 source is nobody".into(), send(Ipv6Addr::UNSPECIFIED, gateway.global)),
        ("ipv6 source is the host itself".into(), send(Ipv6Addr::LOCALHOST, gateway.global)),
        ("ipv6 source is a group".into(), send(ALL_NODES, gateway.global)),
        ("ipv6 source maps ipv4".into(), send(cast.own.ip.to_ipv6_mapped(), gateway.global)),
        ("ipv6 to the host itself".into(), send(own.global, Ipv6Addr::LOCALHOST)),
        ("ipv6 to a mapped ipv4 address".into(), send(own.global, cast.gateway.ip.to_ipv6_mapped())),
        ("ipv6 group in a unicast frame".into(), send(own.global, ALL_NODES)),
        ("ipv6 unicast to the neighbour".into(), {
            ethernet(other.mac, own.mac, IPV6, &summed(own.global, other.global, UDP, 64, &payload, 6))
        }),
        ("ipv6 with a stolen mac".into(), {
            ethernet(gateway.mac, other.mac, IPV6, &summed(own.global, gateway.global, UDP, 64, &payload, 6))
        }),
        ("dhcpv6 server, unicast".into(), {
            ethernet(gateway.mac, own.mac, IPV6, &summed(own.link_local, gateway.link_local, UDP, 64, &server, 6))
        }),
        ("dhcpv6 relay to all servers".into(), group(ALL_DHCP_SERVERS, own.link_local, (547, 547))),
        ("dhcpv6 request from the neighbour's address".into(), group(ALL_DHCP_SERVERS, other.link_local, (546, 547))),
        ("mdns over ipv6".into(), group(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xfb), own.link_local, (5353, 5353))),
        ("ssdp over ipv6".into(), group(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xc), own.link_local, (1900, 1900))),
        ("site-wide group".into(), group(Ipv6Addr::new(0xff05, 0, 0, 0, 0, 0, 1, 3), own.global, (546, 547))),
        ("ipv6 udp of no length".into(), {
            let mut frame = send(own.global, gateway.global);
            frame[18..20].copy_from_slice(&[0, 0]);
            frame
        }),
        ("mldv1 report".into(), mld(cast, ALL_NODES, 131, own.link_local)),
        ("mld report from the neighbour's address".into(), mld(cast, ALL_MLDV2_ROUTERS, 143, other.link_local)),
        ("mld query behind the right option".into(), mld(cast, ALL_NODES, 130, own.link_local)),
        ("mld query to the routers".into(), mld(cast, ALL_MLDV2_ROUTERS, 130, own.link_local)),
    ]
}

/// A message of multicast listener discovery behind its router alert.
pub(crate) fn mld(cast: &Cast, to: Ipv6Addr, kind: u8, from: Ipv6Addr) -> Vec<u8> {
    let report = [&[kind, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0][..], &solicited_node(cast.own6.global).octets()].concat();
    let length = u32::try_from(report.len()).unwrap();
    let pseudo = [&from.octets()[..], &to.octets(), &length.to_be_bytes(), &[0, 0, 0, ICMPV6], &report].concat();
    let sum = frames::checksum(&pseudo).to_be_bytes();
    let alert = [ICMPV6, 0, 5, 2, 0, 0, 1, 0];
    let payload = [&alert[..], &report[..2], &sum, &report[4..]].concat();
    ethernet(group_mac(to), cast.own6.mac, IPV6, &ipv6(from, to, HOP_BY_HOP, 1, &payload))
}

/// A message of DHCP from nobody to everybody, its operation and client as given.
pub(super) fn dhcp_question(client: [u8; 6], operation: u8, ports: (u16, u16)) -> Vec<u8> {
    dhcp_question_of(Ipv4Addr::UNSPECIFIED, client, operation, ports)
}

fn dhcp_question_of(sender: Ipv4Addr, client: [u8; 6], operation: u8, (from, to): (u16, u16)) -> Vec<u8> {
    let fixed = [&[operation, 1, 6, 0][..], &[7; 4], &[0; 20], &client, &[0; 202], &[99, 130, 83, 99, 53, 1, 1, 255]];
    let message = fixed.concat();
    let length = u16::try_from(8 + message.len() + MARK_LEN).unwrap();
    let header = [from, to, length, 0].map(u16::to_be_bytes).concat();
    let ip = Ip { protocol: UDP, ..Ip::default() };
    ipv4(sender, Ipv4Addr::BROADCAST, ip, &[header, message].concat())
}

/// What an honest desktop has to be able to say, in both families.
pub(crate) fn honest(cast: &Cast) -> Vec<Named> {
    let Cast { own, gateway, own6, gateway6, .. } = *cast;
    let nobody = Station { ip: Ipv4Addr::UNSPECIFIED, ..own };
    let arp_to_all = |sender, target| ethernet(frames::BROADCAST, own.mac, frames::ARP, &arp(1, sender, target));
    let ip = |packet: Vec<u8>| ethernet(gateway.mac, own.mac, IPV4, &packet);
    let tcp = [&[0x13, 0x88, 0, 80][..], &[0; 8], &[0x50, 2, 0xff, 0xff, 0, 0, 0, 0]].concat();
    let with = |protocol| Ip { protocol, ..Ip::default() };
    let far = Ipv4Addr::new(198, 51, 100, 2);
    let far6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
    let ip6 = |from, to: Ipv6Addr, next, hop_limit, payload: &[u8], sum_at| {
        let mac = if to.is_multicast() { group_mac(to) } else { gateway.mac };
        ethernet(mac, own.mac, IPV6, &summed(from, to, next, hop_limit, payload, sum_at))
    };
    let icmp6 = |from, to, hop_limit, message: &[u8]| ip6(from, to, ICMPV6, hop_limit, message, 2);
    let solicit = |target, options: &[u8]| neighbour_discovery(135, target, options);
    let mut advert = neighbour_discovery(136, own6.global, &link_option(2, own.mac));
    advert[4] = 0x60;
    let (global, link_local, none) = (own6.global, own6.link_local, Ipv6Addr::UNSPECIFIED);
    let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
    let (ask, tell) = (link_option(1, own.mac), link_option(2, own.mac));
    let router = [133, 0, 0, 0, 0, 0, 0, 0];
    vec![
        ("arp request".into(), arp_to_all(own, gateway.ip)),
        ("arp announcement".into(), arp_to_all(own, own.ip)),
        ("arp probe".into(), arp_to_all(nobody, own.ip)),
        ("arp request to the gateway".into(), ethernet(gateway.mac, own.mac, frames::ARP, &arp(1, own, gateway.ip))),
        ("arp reply".into(), ethernet(gateway.mac, own.mac, frames::ARP, &arp(2, own, gateway.ip))),
        ("arp reply to all".into(), ethernet(frames::BROADCAST, own.mac, frames::ARP, &arp(2, own, gateway.ip))),
        ("dhcp question".into(), { ethernet(frames::BROADCAST, own.mac, IPV4, &dhcp_question(own.mac, 1, (68, 67))) }),
        ("dhcp renewal".into(), ip(udp(own.ip, gateway.ip, (68, 67)))),
        ("dhcp rebinding".into(), {
            ethernet(frames::BROADCAST, own.mac, IPV4, &dhcp_question_of(own.ip, own.mac, 1, (68, 67)))
        }),
        ("echo request".into(), ip(frames::icmp(own.ip, gateway.ip, 8, 0))),
        ("packet too big".into(), ip(frames::icmp(own.ip, far, 3, 4))),
        ("udp".into(), ip(udp(own.ip, gateway.ip, (5000, 6000)))),
        ("tcp".into(), ip(ipv4(own.ip, far, with(TCP), &tcp))),
        ("probe for the own address".into(), icmp6(none, solicited_node(global), 255, &solicit(global, &[]))),
        ("probe with a nonce".into(), icmp6(none, solicited_node(link_local), 255, &solicit(link_local, &nonce))),
        ("probe for the address of the link".into(), {
            icmp6(none, solicited_node(link_local), 255, &solicit(link_local, &[]))
        }),
        ("probe for the own address with a nonce".into(), {
            icmp6(none, solicited_node(global), 255, &solicit(global, &nonce))
        }),
        ("solicitation".into(), {
            icmp6(global, solicited_node(gateway6.global), 255, &solicit(gateway6.global, &ask))
        }),
        ("solicitation of one known".into(), icmp6(link_local, gateway6.global, 255, &solicit(gateway6.global, &[]))),
        ("solicitation of one known that tells an address".into(), {
            icmp6(global, gateway6.global, 255, &solicit(gateway6.global, &ask))
        }),
        ("solicitation that tells no address".into(), {
            icmp6(global, solicited_node(gateway6.global), 255, &solicit(gateway6.global, &[]))
        }),
        ("advertisement".into(), icmp6(global, gateway6.link_local, 255, &advert)),
        ("advertisement of the own address to all".into(), icmp6(global, ALL_NODES, 255, &advert)),
        ("advertisement of the address of the link".into(), {
            icmp6(link_local, gateway6.link_local, 255, &neighbour_discovery(136, link_local, &tell))
        }),
        ("advertisement to all".into(), {
            icmp6(link_local, ALL_NODES, 255, &neighbour_discovery(136, link_local, &tell))
        }),
        ("router solicitation".into(), icmp6(link_local, ALL_ROUTERS, 255, &[&router[..], &ask].concat())),
        ("router solicitation that tells no address".into(), icmp6(link_local, ALL_ROUTERS, 255, &router)),
        ("router solicitation of nobody".into(), icmp6(none, ALL_ROUTERS, 255, &router)),
        ("mld report".into(), mld(cast, ALL_MLDV2_ROUTERS, 143, link_local)),
        ("mld report of nobody".into(), mld(cast, ALL_MLDV2_ROUTERS, 143, none)),
        ("dhcpv6 question".into(), ip6(link_local, ALL_DHCP_SERVERS, UDP, 1, &udp6((546, 547)), 6)),
        ("ipv6 echo request".into(), icmp6(global, gateway6.global, 64, &[128, 0, 0, 0, 0, 1, 0, 1])),
        ("ipv6 echo request of the link".into(), {
            icmp6(link_local, gateway6.link_local, 64, &[128, 0, 0, 0, 0, 1, 0, 1])
        }),
        ("ipv6 packet too big".into(), icmp6(global, far6, 64, &[2, 0, 0, 0, 0, 0, 5, 0])),
        ("ipv6 udp".into(), ip6(global, far6, UDP, 64, &udp6((5000, 4000)), 6)),
        ("ipv6 tcp".into(), ip6(global, gateway6.global, TCP, 64, &tcp, 16)),
    ]
}
