//! Multicast groups and further addresses: what a policy names passes, and what
//! is beside it does not, with both back ends and as the reference says.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::AsFd as _,
    time::Duration,
};

use qvd_core::NetPolicy;
use qvd_sys::netns;

use super::{
    frames::{self, IPV4, IPV6, Ip, Station, arp, ethernet, ipv4, udp},
    stage::{Stage, Story},
    vectors::{self, ALL_NODES, Cast, Named, link_option, neighbour_discovery, solicited_node, summed, udp6},
    world::{MARK_LEN, PATIENCE, Seen, World, config, desktop, on_a_host, subnet},
};
use crate::{Backend, Mac, NetConfig, Network, PortSpec, links, netlink::Netlink, rules::Protection};

pub(super) const GROUP: Ipv4Addr = Ipv4Addr::new(239, 1, 2, 3);
pub(super) const GROUP6: Ipv6Addr = Ipv6Addr::new(0xff15, 0, 0, 0, 0, 0, 0, 0x42);
const FIRST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 8);
const EXTRA: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 9);
const EXTRA6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 7, 0, 0, 0, 0, 9);

/// In two groups, with three further addresses.
pub(super) fn policy(internet: bool) -> NetPolicy {
    NetPolicy {
        internet,
        multicast: vec![GROUP.to_string().parse().unwrap(), GROUP6.to_string().parse().unwrap()],
        addresses: vec!["192.0.2.8/31".parse().unwrap(), EXTRA6.to_string().parse().unwrap()],
        ..NetPolicy::host_only()
    }
}

/// The option that has routers look at a packet (RFC 2113).
pub(super) const ROUTER_ALERT: &[u8] = &[0x94, 4, 0, 0];

fn group_mac(group: impl Into<IpAddr>) -> [u8; 6] {
    Mac::of_group(group.into()).octets()
}

/// A packet of IGMP, behind `options` and living for `ttl` hops.
pub(super) fn igmp(from: Ipv4Addr, to: Ipv4Addr, ttl: u8, options: &[u8], kind: u8) -> Vec<u8> {
    let [a, b, c, d] = GROUP.octets();
    let record = [kind, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0, a, b, c, d];
    let mut packet = ipv4(from, to, Ip { protocol: 2, options, ..Ip::default() }, &record);
    let header = 20 + options.len();
    packet[8] = ttl;
    packet[10..12].copy_from_slice(&[0, 0]);
    let sum = frames::checksum(&packet[..header]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// Frames of who is in these groups, and whether each passes the port.
pub(super) fn frames_of_groups(cast: &Cast) -> Vec<(String, Vec<u8>, bool)> {
    let Cast { own, gateway, own6, gateway6, .. } = *cast;
    let to4 = |mac: [u8; 6], packet: &[u8]| ethernet(mac, own.mac, IPV4, packet);
    let group4 = |group: Ipv4Addr, ports| to4(group_mac(group), &udp(own.ip, group, ports));
    let six = |mac: [u8; 6], from, to, ports| ethernet(mac, own.mac, IPV6, &summed(from, to, 17, 8, &udp6(ports), 6));
    let reports = Ipv4Addr::new(224, 0, 0, 22);
    let report = |packet: Vec<u8>| to4(group_mac(reports), &packet);
    let send = |from: Ipv4Addr| to4(gateway.mac, &udp(from, gateway.ip, (5000, 6000)));
    let claim =
        |ip: Ipv4Addr| ethernet(frames::BROADCAST, own.mac, frames::ARP, &arp(1, Station { ip, ..own }, gateway.ip));
    let advert = |of: Ipv6Addr, mac: [u8; 6], to| {
        let message = neighbour_discovery(136, of, &link_option(2, own.mac));
        ethernet(mac, own.mac, IPV6, &summed(of, to, 58, 255, &message, 2))
    };
    let to_gateway = |of| advert(of, gateway.mac, gateway6.global);
    let probe = |of: Ipv6Addr, options: &[u8]| {
        let (group, message) = (solicited_node(of), neighbour_discovery(135, of, options));
        ethernet(group_mac(group), own.mac, IPV6, &summed(Ipv6Addr::UNSPECIFIED, group, 58, 255, &message, 2))
    };
    // Thirty-two groups have the same MAC.
    let twin = Ipv4Addr::new(239, 129, 2, 3);
    let other6 = Ipv6Addr::new(0xff15, 0, 0, 0, 0, 0, 0, 0x43);
    let beside6 = Ipv6Addr::new(0x2001, 0xdb8, 7, 0, 0, 0, 0, 8);
    let fragment = ipv4(own.ip, GROUP, Ip { protocol: 17, fragment: 0x2000, ..Ip::default() }, &[0; 16]);
    let tcp = ipv4(
        own.ip,
        GROUP,
        Ip { protocol: 6, ..Ip::default() },
        &[0x13, 0x88, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0],
    );
    [
        ("udp to the group", group4(GROUP, (5000, 6000)), true),
        ("udp to the group from a further address", to4(group_mac(GROUP), &udp(EXTRA, GROUP, (5000, 6000))), true),
        ("udp to the group from the first of them", to4(group_mac(GROUP), &udp(FIRST, GROUP, (5000, 6000))), true),
        ("udp to the group of ipv6", six(group_mac(GROUP6), own6.global, GROUP6, (5000, 6000)), true),
        ("udp to it from the link", six(group_mac(GROUP6), own6.link_local, GROUP6, (5000, 6000)), true),
        ("report of groups", report(igmp(own.ip, reports, 1, ROUTER_ALERT, 0x22)), true),
        ("udp from a further address", send(EXTRA), true),
        ("udp from the first of them", send(FIRST), true),
        ("arp of a further address", claim(EXTRA), true),
        ("ipv6 from a further address", six(gateway.mac, EXTRA6, gateway6.global, (5000, 6000)), true),
        ("advertisement of a further address", to_gateway(EXTRA6), true),
        ("advertisement of it to all", advert(EXTRA6, group_mac(ALL_NODES), ALL_NODES), true),
        ("probe for a further address", probe(EXTRA6, &[]), true),
        ("probe for it with a nonce", probe(EXTRA6, &[14, 1, 1, 2, 3, 4, 5, 6]), true),
        ("udp to the group of ipv6 from it", six(group_mac(GROUP6), EXTRA6, GROUP6, (5000, 6000)), true),
        ("udp to a group of the same mac", group4(twin, (5000, 6000)), false),
        ("udp to the next group", group4(Ipv4Addr::new(239, 1, 2, 4), (5000, 6000)), false),
        (
            "udp to the group in a frame to another",
            to4(group_mac(Ipv4Addr::new(239, 1, 2, 4)), &udp(own.ip, GROUP, (5000, 6000))),
            false,
        ),
        ("udp to the group in a frame to all", to4(frames::BROADCAST, &udp(own.ip, GROUP, (5000, 6000))), false),
        ("udp to the group in a frame to the gateway", to4(gateway.mac, &udp(own.ip, GROUP, (5000, 6000))), false),
        ("dhcp server to the group", group4(GROUP, (67, 68)), false),
        ("fragment to the group", to4(group_mac(GROUP), &fragment), false),
        ("tcp to the group", to4(group_mac(GROUP), &tcp), false),
        (
            "udp to the group from nobody",
            to4(group_mac(GROUP), &udp(Ipv4Addr::UNSPECIFIED, GROUP, (5000, 6000))),
            false,
        ),
        ("udp to the group from the neighbour", to4(group_mac(GROUP), &udp(cast.other.ip, GROUP, (5000, 6000))), false),
        ("udp to another group of ipv6", six(group_mac(other6), own6.global, other6, (5000, 6000)), false),
        ("udp to the group of ipv6 in another frame", six(group_mac(other6), own6.global, GROUP6, (5000, 6000)), false),
        ("dhcpv6 server to the group", six(group_mac(GROUP6), own6.global, GROUP6, (547, 546)), false),
        ("udp to the reports", group4(reports, (5000, 6000)), false),
        ("igmp query with an alert", report(igmp(own.ip, reports, 1, ROUTER_ALERT, 0x11)), false),
        ("report of groups of nobody", report(igmp(Ipv4Addr::UNSPECIFIED, reports, 1, ROUTER_ALERT, 0x22)), false),
        ("report of groups from afar", report(igmp(own.ip, reports, 64, ROUTER_ALERT, 0x22)), false),
        ("report of groups behind another option", report(igmp(own.ip, reports, 1, &[0x44, 4, 5, 0], 0x22)), false),
        ("report of groups without its option", report(igmp(own.ip, reports, 1, &[], 0x22)), false),
        ("report of groups from the neighbour", report(igmp(cast.other.ip, reports, 1, ROUTER_ALERT, 0x22)), false),
        (
            "report of groups to all",
            to4(
                group_mac(Ipv4Addr::new(224, 0, 0, 1)),
                &igmp(own.ip, Ipv4Addr::new(224, 0, 0, 1), 1, ROUTER_ALERT, 0x22),
            ),
            false,
        ),
        ("udp from the address after", send(Ipv4Addr::new(192, 0, 2, 10)), false),
        ("udp from the address before", send(Ipv4Addr::new(192, 0, 2, 7)), false),
        ("arp of the address after", claim(Ipv4Addr::new(192, 0, 2, 10)), false),
        ("ipv6 from the address before", six(gateway.mac, beside6, gateway6.global, (5000, 6000)), false),
        ("advertisement of the address before", to_gateway(beside6), false),
        ("probe for the address before", probe(beside6, &[]), false),
    ]
    .map(|(name, frame, passes)| (name.to_owned(), frame, passes))
    .into()
}

pub(super) fn all_frames(cast: &Cast) -> Vec<(String, Vec<u8>, bool)> {
    let told = |passes: bool| move |(name, frame): Named| (name, frame, passes);
    let hostile = vectors::hostile(cast).into_iter().map(told(false));
    // Who sends it here is in a group.
    let hostile = hostile.filter(|(name, ..)| name != "report of groups by who is in none");
    let honest = vectors::honest(cast).into_iter().map(told(true));
    frames_of_groups(cast).into_iter().chain(hostile).chain(honest).collect()
}

#[test]
fn groups_and_further_addresses_pass_and_no_others() {
    let rows = Backend::ALL.into_iter().flat_map(|backend| [(backend, false), (backend, true)]);
    for (backend, by_tap) in rows {
        on_a_host(|| {
            let config = NetConfig { internet: true, backend, ..config() };
            let mut world =
                if by_tap { World::of_tap(config, policy(true), &[]) } else { World::of(config, policy(true), &[]) };
            let mut wrong = Vec::new();
            for (name, frame, passes) in all_frames(&world.cast()) {
                let (sent, seen) = world.send_marked(&frame);
                let decision = world.a.port.explain(&sent);
                if seen.host != passes || seen.neighbour || decision.passes != passes {
                    wrong.push(format!("{backend}, tap {by_tap}: {name}: {seen:?}, {decision}"));
                }
            }
            assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        });
    }
}

/// A program of the host that joined hears the group, and of another group
/// nothing; the desktop hears what the host sends to its group.
#[test]
fn the_host_and_a_desktop_talk_in_a_group() {
    const PORT: u16 = 4001;
    for (backend, without) in
        [(Backend::Nft, &[][..]), (Backend::Iptables, &[]), (Backend::Nft, &[Protection::Members])]
    {
        on_a_host(|| {
            let mut world = World::of(NetConfig { backend, ..config() }, policy(false), without);
            let (own, other) = (world.a.station(), Ipv4Addr::new(239, 1, 2, 4));
            let program = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap();
            program.set_read_timeout(Some(PATIENCE)).unwrap();
            for group in [GROUP, other] {
                program.join_multicast_v4(&group, &subnet().gateway()).unwrap();
            }
            let say = |group: Ipv4Addr| ethernet(group_mac(group), own.mac, IPV4, &udp(own.ip, group, (5000, PORT)));
            assert_eq!(world.send(&say(other)), Seen::default(), "{backend}");
            assert!(world.send(&say(GROUP)).host, "{backend}");
            let mut packet = [0; 64];
            assert_eq!(program.recv(&mut packet).unwrap(), MARK_LEN, "{backend}");
            program.set_nonblocking(true).unwrap();
            assert!(program.recv(&mut packet).is_err(), "{backend}: of the other group nothing");

            let gateway = world.gateway();
            let from_host =
                |group: Ipv4Addr| ethernet(group_mac(group), gateway.mac, IPV4, &udp(gateway.ip, group, (5000, 6000)));
            let leaks = !without.is_empty();
            assert_eq!(world.hears(&from_host(GROUP)), [true, leaks], "{backend}, without {without:?}");
            assert_eq!(world.hears(&from_host(other)), [leaks, leaks], "{backend}, without {without:?}");
        });
    }
}

/// What the host sends to groups, and whether its member and another desktop
/// are to hear it.
pub(super) fn from_host(world: &World) -> Vec<(String, Vec<u8>, [bool; 2])> {
    let (gateway, Cast { gateway6, own, .. }) = (world.gateway(), world.cast());
    let four = |group: Ipv4Addr, packet: &[u8]| ethernet(group_mac(group), gateway.mac, IPV4, packet);
    let say = |group: Ipv4Addr| four(group, &udp(gateway.ip, group, (5000, 6000)));
    let six = |group: Ipv6Addr| {
        let packet = summed(gateway6.global, group, 17, 8, &udp6((5000, 6000)), 6);
        ethernet(group_mac(group), gateway.mac, IPV6, &packet)
    };
    let all = Ipv4Addr::new(224, 0, 0, 1);
    let asked = solicited_node(world.cast().other6.global);
    let solicitation = neighbour_discovery(135, world.cast().other6.global, &link_option(1, gateway.mac));
    let solicitation = summed(gateway6.global, asked, 58, 255, &solicitation, 2);
    let solicitation = ethernet(group_mac(asked), gateway.mac, IPV6, &solicitation);
    let query6 = vectors::mld(&world.cast(), vectors::ALL_NODES, 130, gateway6.link_local);
    [
        ("to the group", say(GROUP), [true, false]),
        ("to another group", say(Ipv4Addr::new(239, 1, 2, 4)), [false, false]),
        ("to a group of the same mac", say(Ipv4Addr::new(239, 129, 2, 3)), [false, false]),
        ("to the group of ipv6", six(GROUP6), [true, false]),
        ("to another group of ipv6", six(Ipv6Addr::new(0xff15, 0, 0, 0, 0, 0, 0, 0x43)), [false, false]),
        ("a query of groups", four(all, &igmp(gateway.ip, all, 1, &[0x94, 4, 0, 0], 0x11)), [true, false]),
        ("a query of groups of ipv6", query6, [true, true]),
        ("a neighbour's solicitation", solicitation, [true, true]),
        ("to one", ethernet(own.mac, gateway.mac, IPV4, &udp(gateway.ip, own.ip, (5000, 6000))), [true, false]),
    ]
    .map(|(name, frame, heard)| (name.to_owned(), frame, heard))
    .into()
}

/// Each backend lets members hear their groups, and nobody else.
#[test]
fn members_hear_their_groups() {
    for backend in Backend::ALL {
        on_a_host(|| {
            let mut world = World::of(NetConfig { backend, ..config() }, policy(false), &[]);
            for (name, frame, heard) in from_host(&world) {
                assert_eq!(world.hears(&frame), heard, "{backend}: {name}");
            }
        });
    }
}

/// What a multicast router of the host's takes in from outside comes to who is in the
/// group, and to nobody else.
#[test]
fn members_hear_what_is_routed_to_their_groups() {
    for backend in Backend::ALL {
        on_a_host(|| {
            let mut stage = Stage::new(backend, policy(true), NetPolicy::internet());
            for group in [GROUP.into(), GROUP6.into()] {
                let heard = stage.tell(Story::Routed(group));
                assert_eq!(heard, "the first hears true, the second false", "{backend}: {group}");
            }
        });
    }
}

fn routes_to(address: Ipv4Addr) -> usize {
    let all = Netlink::route().unwrap().dump(links::every_route(false)).unwrap();
    all.iter().filter_map(links::route_facts).filter(|&(_, to, bits)| to == address && bits == 32).count()
}

/// What a further address sends is answered, also after the port was adopted;
/// nobody else can have it, and it goes with the port.
#[test]
fn a_further_address_is_the_desktops_alone() {
    const PORT: u16 = 4000;
    for backend in Backend::ALL {
        on_a_host(|| {
            let policy = NetPolicy { services: vec!["udp 4000".parse().unwrap()], ..policy(false) };
            let mut network = Network::open(NetConfig { backend, ..config() }).unwrap();
            let (inside, other) = (netns::create().unwrap(), netns::create().unwrap());
            let spec = |number, netns, policy: &NetPolicy| PortSpec {
                desktop: desktop(number),
                netns,
                address: None,
                policy: policy.clone(),
            };
            let first = network.attach(&spec(7, inside.as_fd(), &policy)).unwrap();
            let address = first.address();
            first.leave();
            network = Network::open(*network.config()).unwrap();
            let mut port = network.adopt(desktop(7), address, &policy).unwrap();
            network.sweep(&std::collections::BTreeSet::new()).unwrap();
            port.verify().unwrap();
            let here = netns::in_netns(inside.as_fd(), || UdpSocket::bind((EXTRA, 0))).unwrap().unwrap();
            let program = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap();
            here.set_read_timeout(Some(PATIENCE / 100)).unwrap();
            program.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
            let mut packet = [0; 8];
            // The bridge forwards some time after the link was raised.
            let from = (0..1000).find_map(|_| {
                here.send_to(b"who", (subnet().gateway(), PORT)).unwrap();
                program.recv_from(&mut packet).ok()
            });
            let (_, from) = from.expect("the host hears nothing");
            assert_eq!(from.ip(), IpAddr::V4(EXTRA), "{backend}");
            program.send_to(b"you", from).unwrap();
            assert_eq!(here.recv(&mut packet).unwrap(), 3, "{backend}");

            let refused = |policy: &NetPolicy| network.attach(&spec(8, other.as_fd(), policy)).unwrap_err().to_string();
            assert_eq!(refused(&policy), "address 192.0.2.8 is taken by desktop 7");
            let with = |word: &str| NetPolicy { addresses: vec![word.parse().unwrap()], ..policy.clone() };
            assert!(refused(&with("10.66.0.77")).contains("gives its addresses away"));
            Netlink::route()
                .unwrap()
                .batch(vec![links::add_address(links::LOOPBACK, Ipv4Addr::new(192, 0, 2, 77), 32)])
                .unwrap();
            assert_eq!(refused(&with("192.0.2.77")), "address 192.0.2.77 is the host's own, and so no desktop's");
            assert_eq!(routes_to(EXTRA), 1);
            port.close().unwrap();
            assert_eq!(routes_to(EXTRA), 0, "{backend}");
            network.attach(&spec(8, other.as_fd(), &policy)).unwrap().leave();
            // Swept away by a process that knows no more than the kernel.
            network = Network::open(*network.config()).unwrap();
            network.sweep(&std::collections::BTreeSet::new()).unwrap();
            assert_eq!(routes_to(EXTRA), 0, "{backend}");
            network.close().unwrap();
        });
    }
}
