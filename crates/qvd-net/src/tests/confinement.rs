use super::{
    frames, vectors,
    world::{Seen, World, on_a_host, pass_bridged_packets_to_inet},
};
use crate::rules::Protection::{self, *};

/// Every hostile frame kind, from a desktop on a real port: none may be seen
/// by the neighbour, by the host's bridge or by a program of the host.
#[test]
fn no_hostile_frame_leaves_the_port() {
    for (internet, bridged) in [(false, false), (true, false), (true, true)] {
        on_a_host(|| {
            pass_bridged_packets_to_inet(bridged);
            let mut world = World::new(&[], internet);
            let reached = world.reached_by(world.hostile());
            assert!(reached.is_empty(), "internet {internet}: {reached:?}");
        });
    }
}

/// What an honest desktop sends reaches the host, whatever bridged packets pass:
/// resolving and probing addresses, asking for them, talking.
#[test]
fn honest_frames_pass() {
    for internet in [false, true] {
        on_a_host(|| {
            let mut world = World::new(&[], internet);
            let stopped = world.stopped_of_honest();
            assert!(stopped.is_empty(), "{stopped:?}");
        });
    }
}

/// Where a frame arrives once nothing stops it.
#[derive(Debug, Clone, Copy)]
enum Side {
    Host,
    Program,
    Neighbour,
}

impl Side {
    const fn of(self, seen: Seen) -> bool {
        match self {
            Self::Host => seen.host,
            Self::Program => seen.program,
            Self::Neighbour => seen.neighbour,
        }
    }
}

/// Each protection alone stops something: with it the frame does not arrive,
/// without it the frame does. `also` is taken out in both cases, where several
/// protections stop the same.
#[test]
fn each_protection_is_needed() {
    const ROWS: &[(Protection, &[Protection], &str, Side)] = &[
        (Identity, &[PortFlags], "mac spoof", Side::Host),
        (PortFlags, &[Identity], "mac spoof", Side::Host),
        (Identity, &[], "ipv4 source spoof", Side::Host),
        (Identity, &[], "spoofed icmp error", Side::Host),
        (ArpIdentity, &[], "arp claims gateway", Side::Host),
        (ArpIdentity, &[], "gratuitous arp for neighbour", Side::Host),
        (ArpIdentity, &[], "arp sender mac mismatch", Side::Host),
        (Ethertype, &[], "rarp", Side::Host),
        (DhcpPorts, &[], "dhcp question between servers", Side::Host),
        (DhcpQuestion, &[], "dhcp answer from a client's port", Side::Host),
        (DhcpSelf, &[], "dhcp starvation: a client made up", Side::Host),
        (Identity6, &[], "ipv6 source of the neighbour", Side::Host),
        (NdTarget, &[], "advertisement for the neighbour", Side::Host),
        (NdTarget, &[], "denial of the neighbour's address", Side::Host),
        (NdLink, &[], "solicitation with a stolen mac", Side::Host),
        (NdLink, &[], "advertisement with a stolen mac", Side::Host),
        (NdLink, &[], "router solicitation with a stolen mac", Side::Host),
        (NdWhole, &[], "advertisement with a decoy option first", Side::Host),
        (NdWhole, &[], "solicitation with two options", Side::Host),
        (NdNear, &[], "advertisement from afar", Side::Host),
        (NdNoRouter, &[], "advertisement of a router", Side::Host),
        (Icmp6Kinds, &[], "redirect to the host", Side::Host),
        (Icmp6Kinds, &[], "router renumbering", Side::Host),
        (NextHeaders, &[], "udp behind routing", Side::Host),
        (NextHeaders, &[], "first ipv6 fragment", Side::Host),
        (Length6, &[], "ipv6 udp of no length", Side::Host),
        (Destinations6, &[], "ipv6 group in a unicast frame", Side::Host),
        (Dhcp6Server, &[], "dhcpv6 server, unicast", Side::Host),
        (MldReport, &[], "mld query to the routers", Side::Host),
        (ToGateway, &[Neighbours, PortFlags], "ipv6 unicast to the neighbour", Side::Neighbour),
        (Ethertype, &[], "priority-tagged arp", Side::Host),
        (Ethertype, &[], "802.1q ip spoof", Side::Host),
        (Ethertype, &[], "q-in-q", Side::Host),
        (Ethertype, &[], "pppoe", Side::Host),
        (Ethertype, &[Neighbours, PortFlags], "rarp", Side::Neighbour),
        (Ethertype, &[Neighbours, PortFlags], "stp bpdu", Side::Neighbour),
        (ToGateway, &[Neighbours, PortFlags], "unicast to neighbour", Side::Neighbour),
        (Neighbours, &[ToGateway, PortFlags], "unicast to neighbour", Side::Neighbour),
        (PortFlags, &[ToGateway, Neighbours], "unicast to neighbour", Side::Neighbour),
        (Neighbours, &[PortFlags], "arp to neighbour", Side::Neighbour),
        (Options, &[], "ipv4 options", Side::Host),
        (Fragments, &[], "first fragment", Side::Host),
        (Fragments, &[], "later fragment", Side::Host),
        (Destinations, &[], "multicast in a unicast frame", Side::Host),
        (Destinations, &[], "subnet broadcast", Side::Host),
        (Destinations, &[ToGateway, Multicast], "mdns answer", Side::Host),
        (ToGateway, &[Destinations], "ipv4 broadcast", Side::Host),
        (DhcpServer, &[], "dhcp server, unicast", Side::Host),
        (Protocols, &[], "other ip protocol", Side::Host),
        (Protocols, &[ToGateway, Destinations, Multicast], "igmp query", Side::Host),
        (Ethertype, &[Multicast], "eapol", Side::Host),
        (Multicast, &[ReservedGroups], "eapol", Side::Host),
        (ReservedGroups, &[Multicast], "eapol", Side::Host),
        (ReservedGroups, &[], "ip to the nearest bridge", Side::Host),
        (ReservedGroups, &[], "lldp", Side::Host),
        (Multicast, &[PortAlone, ReservedGroups], "ip to reserved multicast", Side::Program),
        (PortAlone, &[Multicast, ReservedGroups], "ip to reserved multicast", Side::Program),
        (PortAlone, &[ReservedGroups], "ip to the nearest bridge", Side::Program),
        (Host, &[], "a service of the host", Side::Program),
        (Groups, &[Multicast], "mdns answer", Side::Host),
        (Groups, &[Multicast], "mdns over ipv6", Side::Host),
        (IgmpReport, &[Multicast], "report of groups by who is in none", Side::Host),
        (Hairpin, &[], "the way over the gateway", Side::Neighbour),
    ];
    let mut wrong = Vec::new();
    for &(protection, also, name, side) in ROWS {
        for stopped in [true, false] {
            let mut without = also.to_vec();
            without.extend((!stopped).then_some(protection));
            on_a_host(|| {
                let mut world = World::new(&without, true);
                let frame = frame(&world, name);
                let arrived = side.of(world.send(&frame));
                if arrived == stopped {
                    wrong.push(format!("{name}: without {without:?} arrived at {side:?}: {arrived}"));
                }
            });
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn frame(world: &World, name: &str) -> Vec<u8> {
    let (own, other, gateway) = (world.a.station(), world.b.station(), world.gateway());
    let ip = |packet: Vec<u8>| frames::ethernet(gateway.mac, own.mac, frames::IPV4, &packet);
    match name {
        "ip to the nearest bridge" => {
            let packet = frames::udp(own.ip, gateway.ip, (5000, 4000));
            frames::ethernet([1, 0x80, 0xc2, 0, 0, 0xe], own.mac, frames::IPV4, &packet)
        }
        "lldp" => frames::ethernet([1, 0x80, 0xc2, 0, 0, 0xe], own.mac, 0x88cc, &[2, 7, 4, 1, 2, 3, 4, 5, 6, 0, 0]),
        "a service of the host" => ip(frames::udp(own.ip, gateway.ip, (5000, 4000))),
        "the way over the gateway" => ip(frames::udp(own.ip, other.ip, (5000, 6000))),
        name => {
            let matrix = world.hostile().into_iter().map(|(name, frame)| (name.to_owned(), frame));
            let mut all = matrix.chain(vectors::hostile(&world.cast()));
            all.find(|(n, _)| *n == name).map(|(_, frame)| frame).unwrap()
        }
    }
}
