//! Who says that a multicast router is behind it hears every group, from a bridge or a
//! switch that looks for routers: no desktop can say so.

use std::net::Ipv4Addr;

use netlink_packet_core::{DecodeError, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoBridge, InfoData, InfoKind, LinkAttribute, LinkInfo, LinkMessage},
};

use super::{
    frames::{self, IPV4, IPV6, Ip, ethernet, ipv4},
    vectors::{ALL_NODES, Cast, Named, group_mac, ipv6, summed},
    world::{Seen, World, on_a_host},
};
use crate::{
    Mac,
    attributes::{attribute, attributes},
    links::Request,
    netlink::Netlink,
    network::find,
    rules::Protection::{self, *},
};

const IGMP: u8 = 2;
const PIM: u8 = 103;
const ALERT4: &[u8] = &[0x94, 4, 0, 0];

/// A packet to a group of the link, behind `options`.
fn to_group(cast: &Cast, last: u8, protocol: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let group = Ipv4Addr::new(224, 0, 0, last);
    let mut payload = payload.to_vec();
    let sum = frames::checksum(&payload);
    payload[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut packet = ipv4(cast.own.ip, group, Ip { protocol, options, ..Ip::default() }, &payload);
    // It lives for one hop, and what is sent behind it is padding.
    let length = u16::try_from(packet.len()).unwrap();
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    packet[8] = 1;
    packet[10..12].copy_from_slice(&[0, 0]);
    let sum = frames::checksum(&packet[..20 + options.len()]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    ethernet(Mac::of_group(group.into()).octets(), cast.own.mac, IPV4, &packet)
}

/// What routers say, all from the desktop's own addresses: queries of groups (RFC 2236,
/// RFC 3376, RFC 3810), that there is one (RFC 4286), PIM (RFC 7761), DVMRP (RFC 1075).
pub(super) fn claims(cast: &Cast) -> Vec<Named> {
    let query2 = [0x11, 100, 0, 0, 0, 0, 0, 0];
    let query3 = [0x11, 100, 0, 0, 0, 0, 0, 0, 2, 125, 0, 0];
    let hello = [0x20, 0, 0, 0, 0, 1, 0, 2, 0, 105];
    let router6 = [151, 20, 0, 0, 0, 125, 0, 2];
    let (own, pim6) = (cast.own6.link_local, "ff02::d".parse().unwrap());
    let snoopers6 = "ff02::6a".parse().unwrap();
    let query6 = [&[130, 0, 0, 0, 0, 100, 0, 0][..], &[0; 16], &[2, 125, 0, 0]].concat();
    let summed6 = |to, payload: &[u8], next, at| summed(own, to, next, 1, payload, at)[40..].to_vec();
    // Behind the router alert; the sum knows nothing of that.
    let alert = [58, 0, 5, 2, 0, 0, 1, 0];
    let six = |to: std::net::Ipv6Addr, packet: &[u8]| ethernet(group_mac(to), cast.own6.mac, IPV6, packet);
    let behind =
        |to, message: &[u8]| six(to, &ipv6(own, to, 0, 1, &[&alert[..], &summed6(to, message, 58, 2)].concat()));
    vec![
        ("general query of groups".into(), to_group(cast, 1, IGMP, &[], &query2)),
        ("general query of groups, third version".into(), to_group(cast, 1, IGMP, ALERT4, &query3)),
        ("advertisement of a multicast router".into(), to_group(cast, 106, IGMP, &[], &[0x30, 20, 0, 0, 0, 125, 0, 2])),
        ("pim hello".into(), to_group(cast, 13, PIM, &[], &hello)),
        ("dvmrp probe".into(), to_group(cast, 4, IGMP, &[], &[0x13, 1, 0, 0, 0, 14, 255, 3])),
        ("general query of groups of ipv6".into(), behind(ALL_NODES, &query6)),
        ("advertisement of a multicast router of ipv6".into(), behind(snoopers6, &router6)),
        ("pim hello over ipv6".into(), six(pim6, &summed(own, pim6, PIM, 1, &hello, 2))),
    ]
}

/// A question for a bridge's groups and routers. Source: Linux
/// `include/uapi/linux/rtnetlink.h`, `RTM_GETMDB`.
#[derive(Debug, Clone)]
struct Groups;

/// Length of `struct br_port_msg`. Source: Linux `include/uapi/linux/if_bridge.h`.
const PORT_MESSAGE: usize = 8;

impl NetlinkSerializable for Groups {
    fn message_type(&self) -> u16 {
        86
    }
    fn buffer_len(&self) -> usize {
        PORT_MESSAGE
    }
    fn serialize(&self, buffer: &mut [u8]) {
        // AF_BRIDGE.
        buffer[0] = 7;
    }
}

impl NetlinkDeserializable for Groups {
    type Error = DecodeError;
    fn deserialize(_: &NetlinkHeader, _: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self)
    }
}

/// Indices of the ports that bridges take for those of routers. Source: as above,
/// `MDBA_ROUTER` and `MDBA_ROUTER_PORT`.
fn router_ports() -> Vec<u32> {
    let answers = Netlink::route().unwrap().dump_raw(Groups).unwrap();
    let routers = answers.iter().filter_map(|answer| attribute(&answer[PORT_MESSAGE..], 2));
    let ports = routers.flat_map(|ports| attributes(ports).filter(|(kind, _)| *kind == 1));
    ports.map(|(_, port)| u32::from_ne_bytes(*port.first_chunk().unwrap())).collect()
}

/// Has a bridge look for routers, as ours does not.
fn snoop(bridge: &str) {
    let mut route = Netlink::route().unwrap();
    let mut message = LinkMessage::default();
    message.header.index = find(&mut route, bridge).unwrap().unwrap().index;
    let data = InfoData::Bridge(vec![InfoBridge::MulticastSnooping(true)]);
    message.attributes = vec![LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge), LinkInfo::Data(data)])];
    route.batch(vec![Request::new(RouteNetlinkMessage::NewLink(message), 0)]).unwrap();
}

/// Also where somebody has the bridge look for them: the rules stand before that. Without
/// those that stop such a claim, the bridge believes it.
#[test]
fn no_port_is_taken_for_a_routers() {
    const FOUR: &[Protection] = &[ToGateway, Destinations, Protocols];
    const ROWS: &[(&str, &[Protection])] = &[
        ("general query of groups", FOUR),
        ("general query of groups, third version", &[ToGateway, Destinations, Protocols, Options]),
        ("advertisement of a multicast router", FOUR),
        ("pim hello", FOUR),
        ("general query of groups of ipv6", &[ToGateway, Destinations6, NextHeaders]),
        ("advertisement of a multicast router of ipv6", &[ToGateway, Destinations6, NextHeaders]),
    ];
    on_a_host(|| {
        let mut world = World::new(&[], true);
        snoop(&world.network.bridge_name());
        for (name, frame) in claims(&world.cast()) {
            let seen = world.send(&frame);
            assert_eq!((seen, router_ports()), (Seen::default(), Vec::new()), "{name}");
        }
    });
    for &(name, without) in ROWS {
        on_a_host(|| {
            let mut world = World::new(without, true);
            snoop(&world.network.bridge_name());
            let (_, frame) = claims(&world.cast()).into_iter().find(|(known, _)| known == name).unwrap();
            let port = find(&mut Netlink::route().unwrap(), world.a.port.link()).unwrap().unwrap().index;
            // A bridge that has just begun to look takes itself for who asks, for a moment.
            let believed = (0..100).any(|_| {
                world.send(&frame);
                router_ports() == [port]
            });
            assert!(believed, "{name}, without {without:?}");
        });
        // And by itself a bridge of ours looks for none.
        on_a_host(|| {
            let mut world = World::new(without, true);
            let (_, frame) = claims(&world.cast()).into_iter().find(|(known, _)| known == name).unwrap();
            world.send(&frame);
            assert_eq!(router_ports(), [], "{name}, without {without:?}");
        });
    }
}
