use std::{collections::BTreeSet, net::Ipv4Addr, os::fd::AsFd};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{RouteNetlinkMessage, link::LinkFlags};
use netlink_sys::{Socket, protocols};
use qvd_core::{NetPolicy, Support};
use qvd_sys::{
    netns,
    packet::{ETHERTYPE_ALL, PacketSocket},
};
use qvd_testkit::privileged;

use super::{
    NEEDS, frames,
    world::{Desktop, PATIENCE, config, connected, desktop, holds, on_a_host, subnet},
};
use crate::{
    Error, NetConfig, Network, PortSpec,
    elements::{self, Family},
    links,
    netlink::Netlink,
    rules, sysctl,
};

pub(super) const POLICY: NetPolicy = NetPolicy::host_only();

fn link_names() -> Vec<String> {
    let all = Netlink::route().unwrap().dump(links::every_link()).unwrap();
    let mut names: Vec<_> = all.iter().filter_map(links::facts).map(|link| link.name).collect();
    names.sort();
    names
}

/// Elements of all sets of ports, and of all sets of addresses; `None` without
/// the table.
fn element_counts() -> Option<[usize; 2]> {
    let mut netlink = Netlink::netfilter().unwrap();
    let table = rules::table_name(super::world::INSTANCE);
    let mut count = |sets: &[(Family, &str)]| {
        sets.iter()
            .map(|&(family, set)| elements::all(&mut netlink, &table, family, set).unwrap().map(|all| all.len()))
            .sum::<Option<usize>>()
    };
    Some([count(&rules::PORT_SETS)? + count(&rules::WAY_SETS)?, count(&rules::ADDRESS_SETS)?])
}

/// What a port has: one MAC, one address of IPv4 and two of IPv6 as senders, and those
/// that are not the link's own as senders to the gateway.
const OF_PORT: usize = 6;

fn reaches_gateway(network: &Network, desktop: &Desktop) {
    let bridge = PacketSocket::open(&network.bridge_name(), ETHERTYPE_ALL).unwrap();
    let own = desktop.station();
    let request = frames::arp(1, own, subnet().gateway());
    connected(&desktop.socket(), &frames::ethernet(frames::BROADCAST, own.mac, frames::ARP, &request), &bridge);
}

#[test]
fn a_closed_network_leaves_nothing() {
    on_a_host(|| {
        let before = (link_names(), sysctl::read("ipv4/ip_forward").unwrap());
        let mut network = Network::open(NetConfig { internet: true, ..config() }).unwrap();
        let mut first = Desktop::new(&network, 7, true);
        assert_eq!(element_counts(), Some([OF_PORT, 2]));
        first.port.close().unwrap();
        first.port.close().unwrap();
        assert_eq!(element_counts(), Some([0, 0]));
        assert_eq!(link_names(), ["lo", "qvd7e57"]);
        // The same number, address and name again, in a namespace of its own.
        let address = first.port.address();
        let second = Desktop::new(&network, 7, false);
        assert_eq!(second.port.address(), address);
        reaches_gateway(&network, &second);
        network.close().unwrap();
        network.close().unwrap();
        assert_eq!(element_counts(), None);
        assert_eq!((link_names(), sysctl::read("ipv4/ip_forward").unwrap()), before);
    });
}

/// What was not confined is not opened: no link, no address taken.
#[test]
fn a_port_without_its_rules_is_never_raised() {
    on_a_host(|| {
        let network = Network::open(config()).unwrap();
        let table = rules::table_name(config().instance);
        elements::remove_table(&mut Netlink::netfilter().unwrap(), &table, Family::Bridge).unwrap();
        let netns = netns::create().unwrap();
        let spec = PortSpec { desktop: desktop(7), netns: netns.as_fd(), address: None, policy: POLICY };
        let error = network.attach(&spec).unwrap_err();
        assert!(error.to_string().contains("rules"), "{error}");
        assert_eq!(link_names(), ["lo", "qvd7e57"]);
        // It was never let go of half-way: the address is free again.
        let again = Network::open(config()).unwrap();
        drop(again.attach(&spec).unwrap());
        network.attach(&spec).unwrap().close().unwrap();
    });
}

/// The gateway answers to an echo request, and the host's other addresses do
/// not, neither to it nor to ARP.
#[test]
fn only_the_gateway_answers() {
    on_a_host(|| {
        let elsewhere = Ipv4Addr::new(192, 0, 2, 1);
        Netlink::route().unwrap().batch(vec![links::add_address(links::LOOPBACK, elsewhere, 32)]).unwrap();
        let network = Network::open(config()).unwrap();
        let desktop = Desktop::new(&network, 7, false);
        reaches_gateway(&network, &desktop);
        let (own, gateway) = (desktop.station(), subnet().gateway());
        let gateway_mac = crate::Mac::of(config().instance, gateway).octets();
        let socket = desktop.socket();
        let echo = |to, mark| {
            let packet = frames::echo_request(own.ip, to, mark);
            socket.send(&frames::ethernet(gateway_mac, own.mac, frames::IPV4, &packet)).unwrap();
        };
        let request = frames::arp(1, own, elsewhere);
        socket.send(&frames::ethernet(frames::BROADCAST, own.mac, frames::ARP, &request)).unwrap();
        echo(elsewhere, b"qvd-mark0001");
        echo(gateway, b"qvd-mark0002");
        loop {
            let frame = socket.receive(PATIENCE).unwrap().expect("the gateway did not answer");
            // What the desktop itself sent is heard as well.
            if frame[6..12] == own.mac {
                continue;
            }
            assert!(!holds(&frame, b"qvd-mark0001") && !holds(&frame, &[192, 0, 2, 1]), "{frame:02x?}");
            if holds(&frame, b"qvd-mark0002") {
                break;
            }
        }
    });
}

/// Rules that somebody else took away are missed, and put back.
#[test]
fn lost_rules_are_noticed() {
    on_a_host(|| {
        let network = Network::open(config()).unwrap();
        let desktop = Desktop::new(&network, 7, false);
        desktop.port.verify().unwrap();
        let table = rules::table_name(config().instance);
        elements::remove_table(&mut Netlink::netfilter().unwrap(), &table, Family::Bridge).unwrap();
        assert!(matches!(desktop.port.verify(), Err(Error::NotConfined { .. })));
        let (address, id) = (desktop.port.address(), desktop.port.desktop());
        desktop.port.leave();
        let network = Network::open(config()).unwrap();
        network.adopt(id, address, &POLICY).unwrap().verify().unwrap();
    });
}

/// A process was killed: one of its desktops runs on, one is gone.
#[test]
fn what_a_killed_process_left_is_adopted_or_swept() {
    on_a_host(|| {
        let network = Network::open(config()).unwrap();
        let (kept, lost) = (Desktop::new(&network, 7, false), Desktop::new(&network, 8, false));
        let station = kept.station();
        kept.port.leave();
        lost.port.leave();
        drop(network);

        let mut network = Network::open(config()).unwrap();
        assert_eq!(element_counts(), Some([2 * OF_PORT, 0]));
        let port = network.adopt(desktop(7), station.ip, &POLICY).unwrap();
        let kept = Desktop { netns: kept.netns, port };
        assert!(matches!(network.adopt(desktop(9), "10.66.0.99".parse().unwrap(), &POLICY), Err(Error::NoPort(_))));
        assert_eq!(network.sweep(&BTreeSet::new()).unwrap(), 1);
        assert_eq!(element_counts(), Some([OF_PORT, 0]));
        assert_eq!(link_names(), ["lo", "qvd7e57", "qvd7e57-7"]);
        reaches_gateway(&network, &kept);
        // A start that was killed half-way left a link of that name.
        kept.port.leave();
        let again = Desktop::new(&network, 7, false);
        reaches_gateway(&network, &again);
        network.close().unwrap();
    });
}

/// A link or an address of an earlier process does not pass on what it was
/// allowed: neither its other address nor its way out.
#[test]
fn nothing_is_inherited_unasked() {
    on_a_host(|| {
        let out = NetConfig { internet: true, ..config() };
        let network = Network::open(out).unwrap();
        let attached = [Desktop::new(&network, 7, true), Desktop::new(&network, 8, true)];
        let [first, second] = attached.map(|desktop| {
            let (address, netns) = (desktop.port.address(), desktop.netns);
            desktop.port.leave();
            (address, netns)
        });
        drop(network);
        let mut network = Network::open(out).unwrap();
        assert_eq!(element_counts(), Some([2 * OF_PORT, 4]));
        // The first comes back without a way out, the second's number with another address.
        let _first = network.adopt(desktop(7), first.0, &POLICY).unwrap();
        let netns = netns::create().unwrap();
        let address = Some("10.66.9.9".parse().unwrap());
        let spec = PortSpec { desktop: desktop(8), netns: netns.as_fd(), address, policy: POLICY };
        let _second = network.attach(&spec).unwrap();
        // Only the second's old address is still let out, for nobody.
        assert_eq!(element_counts(), Some([2 * OF_PORT, 2]));
        network.sweep(&BTreeSet::new()).unwrap();
        assert_eq!(element_counts(), Some([2 * OF_PORT, 0]));
        network.close().unwrap();
        drop(second);
    });
}

/// From the first moment that a port is up, it is confined: seen by somebody
/// who listens to what the kernel tells of links.
#[test]
fn a_port_is_raised_last() {
    on_a_host(|| {
        let network = Network::open(config()).unwrap();
        let mut listener = Socket::new(protocols::NETLINK_ROUTE).unwrap();
        listener.bind_auto().unwrap();
        // Source: Linux `include/uapi/linux/rtnetlink.h`, `RTNLGRP_LINK`.
        listener.add_membership(1).unwrap();
        let attached = Desktop::new(&network, 7, false);
        let mut states = Vec::new();
        loop {
            let (datagram, _) = listener.recv_from_full().unwrap();
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&datagram).unwrap();
            let NetlinkPayload::InnerMessage(answer) = message.payload else { continue };
            let RouteNetlinkMessage::NewLink(shown) = &answer else { continue };
            let up = shown.header.flags.contains(LinkFlags::Up);
            let Some(link) = links::facts(&answer).filter(|link| link.name == attached.port.link()) else {
                continue;
            };
            states.push((up, links::port_flags().iter().all(|flag| link.port.contains(flag))));
            if up {
                break;
            }
        }
        assert_eq!(states.first(), Some(&(false, false)), "{states:?}");
        assert_eq!(states.last(), Some(&(true, true)), "{states:?}");
    });
}

#[test]
fn bad_requests_name_what_is_wrong() {
    on_a_host(|| {
        let network = Network::open(NetConfig { subnet: "10.66.0.0/28".parse().unwrap(), ..config() }).unwrap();
        let all: Vec<_> = (1..=13).map(|number| Desktop::new(&network, number, false)).collect();
        let netns = netns::create().unwrap();
        let attach = |number, address: Option<&str>, policy| {
            let address = address.map(|text| text.parse().unwrap());
            let spec = PortSpec { desktop: desktop(number), netns: netns.as_fd(), address, policy };
            network.attach(&spec).unwrap_err().to_string()
        };
        assert_eq!(attach(14, None, POLICY), "no address is left in subnet 10.66.0.0/28");
        let taken = all[2].port.address().to_string();
        assert_eq!(attach(14, Some(&taken), POLICY), format!("address {taken} is taken by desktop 3"));
        assert_eq!(
            attach(14, Some("10.67.0.2"), POLICY),
            "address 10.67.0.2 is not one for desktops of subnet 10.66.0.0/28"
        );
        assert_eq!(attach(3, None, POLICY), "desktop 3 has a port already");
        let out = NetPolicy::internet();
        assert_eq!(attach(14, None, out), "desktop 14 wants a way out and network qvd7e57 has none");
    });
}

#[test]
fn a_subnet_that_the_host_uses_is_refused() {
    on_a_host(|| {
        let mut route = Netlink::route().unwrap();
        route.batch(vec![links::add_address(links::LOOPBACK, Ipv4Addr::new(10, 66, 3, 4), 24)]).unwrap();
        let error = Network::open(config()).unwrap_err();
        assert_eq!(error.to_string(), "subnet 10.66.0.0/16 clashes with address 10.66.3.4/24 on lo: choose another");
        assert_eq!((link_names(), element_counts()), (vec!["lo".to_owned()], None));
    });
    on_a_host(|| {
        let taken = "fd51:5644:7e57::77".parse::<std::net::Ipv6Addr>().unwrap();
        Netlink::route().unwrap().batch(vec![links::add_address(links::LOOPBACK, taken, 128)]).unwrap();
        let error = Network::open(config()).unwrap_err().to_string();
        assert_eq!(
            error,
            "subnet fd51:5644:7e57::/64 clashes with address fd51:5644:7e57::77 of the host: choose another"
        );
    });
}

#[test]
fn this_host_can() {
    privileged(NEEDS, || {
        let answers = crate::probe();
        assert!(answers.iter().all(|(_, support)| *support == Support::Yes), "{answers:?}");
    });
}

/// Tables of a version whose sets were of other types give way at once, and what
/// runs on them is confined and heard as soon as it is adopted.
#[test]
fn tables_of_another_version_are_replaced() {
    const OLDER: &str = "table bridge qvd-7e57 {
        set identity { type ipv4_addr; size 7; elements = { 10.66.0.8 }; }
        map link { type ipv4_addr : verdict; }
        chain from_port { type filter hook prerouting priority 0; policy drop;
            ip saddr @identity accept
        }
        chain of_then {
            accept
        }
    }
    table inet qvd-7e57 { set forwarding_was_off { type mark; }
        set internet { type ipv6_addr; flags interval; }
    }";
    on_a_host(|| {
        let network = Network::open(config()).unwrap();
        let first = Desktop::new(&network, 7, false);
        let (id, address) = (first.port.desktop(), first.port.address());
        first.port.leave();
        drop(network);
        let table = rules::table_name(config().instance);
        let mut netlink = Netlink::netfilter().unwrap();
        for family in [Family::Bridge, Family::Inet, Family::Arp] {
            elements::remove_table(&mut netlink, &table, family).unwrap();
        }
        crate::program::run(crate::program::NFT, &["-f", "-"], &table, OLDER).unwrap();
        sysctl::write("ipv4/ip_forward", "1").unwrap();

        let mut network = Network::open(config()).unwrap();
        assert_eq!(element_counts(), Some([0, 0]), "something of the older version is let through");
        let port = network.adopt(id, address, &POLICY).unwrap();
        port.verify().unwrap();
        let again = Desktop { port, netns: first.netns };
        reaches_gateway(&network, &again);
        network.close().unwrap();
        assert_eq!(element_counts(), None);
        // The note that forwarding had been off is the older version's too.
        assert_eq!(sysctl::read("ipv4/ip_forward").unwrap(), "0");
    });
}
