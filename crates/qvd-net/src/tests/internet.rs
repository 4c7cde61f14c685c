use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::{AsFd, OwnedFd},
};

use qvd_core::NetPolicy;
use qvd_sys::{
    netns,
    packet::{ETHERTYPE_ALL, PacketSocket},
};

use super::{
    frames,
    world::{self, Desktop, INSTANCE, PATIENCE, config, connected, heard_before, on_a_host},
};
use crate::{Backend, Mac, NetConfig, Network, links, netlink::Netlink, rules::Protection, sysctl};

pub(super) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
/// Another address there.
pub(super) const NAMES: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 53);
pub(super) const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2);
pub(super) const UPLINK6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
pub(super) const UPLINK: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const PORT: u16 = 4000;

/// Another host, on the other side of the host's uplink.
pub(super) struct Outside {
    pub(super) netns: OwnedFd,
}

impl Outside {
    pub(super) fn new() -> Self {
        let netns = netns::create().unwrap();
        let mut route = Netlink::route().unwrap();
        let mac = Mac::of(INSTANCE, OUTSIDE);
        // Bridge 0 is none.
        route
            .batch(vec![links::create_pair("uplink", 0, 0, mac, 1500, netns.as_fd()), links::show_name("uplink")])
            .unwrap();
        let uplink = crate::network::find(&mut route, "uplink").unwrap().unwrap();
        let setup = vec![
            links::add_address(uplink.index, UPLINK, 24),
            links::raise(uplink.index),
            links::add_address(uplink.index, UPLINK6, 64),
            links::know_neighbour(uplink.index, OUTSIDE, mac),
            links::know_neighbour(uplink.index, NAMES, mac),
            links::know_neighbour(uplink.index, OUTSIDE6, mac),
            // Every other host is behind that one.
            links::default_route(uplink.index, OUTSIDE),
            links::default_route(uplink.index, OUTSIDE6),
        ];
        route.batch(setup).unwrap();
        let peer = uplink.peer.unwrap();
        netns::in_netns(netns.as_fd(), || {
            let setup = vec![
                links::raise(links::LOOPBACK),
                links::add_address(peer, OUTSIDE, 24),
                links::raise(peer),
                links::default_route(peer, UPLINK),
            ];
            Netlink::route().unwrap().batch(setup).unwrap();
        })
        .unwrap();
        let outside = Self { netns };
        connected(&outside.socket(), &[0xff; 60], &PacketSocket::open("uplink", ETHERTYPE_ALL).unwrap());
        outside
    }

    pub(super) fn socket(&self) -> PacketSocket {
        netns::in_netns(self.netns.as_fd(), || PacketSocket::open("eth0", ETHERTYPE_ALL)).unwrap().unwrap()
    }

    pub(super) fn udp(&self) -> UdpSocket {
        let socket = netns::in_netns(self.netns.as_fd(), || UdpSocket::bind((OUTSIDE, PORT))).unwrap().unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }
}

pub(super) fn wait_for_bridge(network: &Network, desktop: &Desktop) {
    let (own, gateway) = (desktop.station(), world::subnet().gateway());
    let request = frames::ethernet(frames::BROADCAST, own.mac, frames::ARP, &frames::arp(1, own, gateway));
    let bridge = PacketSocket::open(&network.bridge_name(), ETHERTYPE_ALL).unwrap();
    connected(&desktop.socket(), &request, &bridge);
}

/// A desktop that is let out talks with the outside, which sees the host's
/// address; answers come back.
#[test]
fn a_desktop_that_is_let_out_reaches_the_outside() {
    on_a_host(|| {
        let outside = Outside::new();
        let mut network = Network::open(NetConfig { internet: true, ..config() }).unwrap();
        let mut desktop = Desktop::new(&network, 7, true);
        wait_for_bridge(&network, &desktop);
        let there = outside.udp();
        let here = desktop.inside(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).unwrap();
        here.set_read_timeout(Some(PATIENCE)).unwrap();
        here.send_to(b"hello", (OUTSIDE, PORT)).unwrap();
        let mut buffer = [0; 64];
        let (length, from) = there.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from.ip()), (&b"hello"[..], UPLINK.into()));
        there.send_to(b"welcome", from).unwrap();
        let (length, from) = here.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from.ip()), (&b"welcome"[..], OUTSIDE.into()));
        desktop.port.close().unwrap();
        network.close().unwrap();
        assert_eq!(sysctl::read("ipv4/ip_forward").unwrap(), "0");
    });
}

/// A question for a name, and its answer (RFC 1035, 4.1): an address of IPv6.
fn question(id: u16) -> Vec<u8> {
    [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0], b"\x04name\x04test\0", &[0, 28, 0, 1]].concat()
}

fn answer(question: &[u8], address: Ipv6Addr) -> Vec<u8> {
    let mut answer = [question, &[0xc0, 12, 0, 28, 0, 1, 0, 0, 0, 60, 0, 16], &address.octets()].concat();
    (answer[2], answer[7]) = (0x81, 1);
    answer
}

/// A desktop asks its gateway for names over IPv6, and the site's server answers.
#[test]
fn a_name_is_resolved_over_ipv6() {
    for backend in Backend::ALL {
        on_a_host(|| {
            let outside = Outside::new();
            let config = NetConfig { internet: true, name_server6: Some(OUTSIDE6), backend, ..config() };
            let network = Network::open(config).unwrap();
            let desktop = Desktop::new(&network, 7, true);
            wait_for_bridge(&network, &desktop);
            let server = netns::in_netns(outside.netns.as_fd(), || {
                let mut route = Netlink::route().unwrap();
                let index = crate::network::find(&mut route, "eth0").unwrap().unwrap().index;
                route.batch(vec![links::add_address(index, OUTSIDE6, 64)]).unwrap();
                UdpSocket::bind((OUTSIDE6, 53)).unwrap()
            });
            let server = server.unwrap();
            server.set_read_timeout(Some(PATIENCE / 50)).unwrap();
            let policy = desktop.port.policy();
            let told = network.name_servers(desktop.port.desktop(), policy).unwrap();
            assert_eq!(told, [desktop.port.place().ipv6.unwrap().1]);
            assert_eq!(
                network.name_servers(desktop.port.desktop(), &NetPolicy::host_only()).unwrap(),
                [] as [IpAddr; 0]
            );
            let here = desktop.inside(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))).unwrap();
            here.set_read_timeout(Some(PATIENCE)).unwrap();
            here.connect((told[0], 53)).unwrap();
            let mut buffer = [0; 512];
            // As long as the uplink's address is being probed, nothing goes out in its name.
            let asked = (0..50).find_map(|_| {
                here.send(&question(7)).unwrap();
                server.recv_from(&mut buffer).ok()
            });
            let (length, from) = asked.expect("the server hears nothing");
            assert_eq!(buffer[..length], question(7), "{backend}");
            server.send_to(&answer(&buffer[..length], UPLINK6), from).unwrap();
            let length = here.recv(&mut buffer).unwrap();
            assert_eq!(buffer[..length], answer(&question(7), UPLINK6), "{backend}");
        });
    }
}

/// Without the policy nothing goes out, although the network has a way out;
/// and nothing comes in that nobody asked for.
#[test]
fn nothing_passes_unasked() {
    // Which way, what is taken out, whether the frame arrives then.
    const ROWS: &[(bool, &[Protection], bool)] = &[
        (true, &[], false),
        (true, &[Protection::Outward], true),
        (false, &[], false),
        (false, &[Protection::Inward], true),
    ];
    for &(outward, without, arrives) in ROWS {
        on_a_host(|| {
            let world = Outside::new();
            let network = Network::open_without(NetConfig { internet: true, ..config() }, without).unwrap();
            // The one that is let out is the target of what comes in.
            let desktop = Desktop::new(&network, 7, !outward);
            wait_for_bridge(&network, &desktop);
            let (own, gateway) = (desktop.station(), world::subnet().gateway());
            let gateway_mac = Mac::of(INSTANCE, gateway).octets();
            let (inside, outside) = (desktop.socket(), world.socket());
            let uplink = PacketSocket::open("uplink", ETHERTYPE_ALL).unwrap();
            let bridge = PacketSocket::open(&network.bridge_name(), ETHERTYPE_ALL).unwrap();
            let (mark, control) = (b"qvd-mark0001", b"qvd-mark0002");
            let arrived = if outward {
                let packet = frames::udp(own.ip, OUTSIDE, (5000, PORT));
                let frame = frames::ethernet(gateway_mac, own.mac, frames::IPV4, &packet);
                inside.send(&[&frame[..], mark].concat()).unwrap();
                let request = frames::arp(1, own, gateway);
                let request = frames::ethernet(frames::BROADCAST, own.mac, frames::ARP, &request);
                inside.send(&[&request[..], control].concat()).unwrap();
                heard_before(&bridge, mark, control);
                uplink.send(&[&[0xff; 60][..], control].concat()).unwrap();
                heard_before(&outside, mark, control)
            } else {
                let there = world.udp();
                // Resolves the host's address, so that the next one is sent at once.
                let host = UdpSocket::bind((UPLINK, PORT)).unwrap();
                host.set_read_timeout(Some(PATIENCE)).unwrap();
                there.send_to(b"resolve", (UPLINK, PORT)).unwrap();
                host.recv(&mut [0; 8]).unwrap();
                there.send_to(mark, (own.ip, PORT)).unwrap();
                outside.send(&[&[0xff; 60][..], control].concat()).unwrap();
                assert!(heard_before(&uplink, mark, control));
                let reply = frames::arp(2, frames::Station { mac: gateway_mac, ip: gateway }, own.ip);
                let reply = frames::ethernet(own.mac, gateway_mac, frames::ARP, &reply);
                bridge.send(&[&reply[..], control].concat()).unwrap();
                heard_before(&inside, mark, control)
            };
            assert_eq!(arrived, arrives, "outward {outward}, without {without:?}");
        });
    }
}
