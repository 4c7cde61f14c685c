//! A network whose longest packet is shorter than usual, and ways that are
//! narrower still: whoever sends too much is told so, in both families.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use qvd_core::NetPolicy;
use rustix::{
    io::Errno,
    net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery},
};

use super::{
    internet::{OUTSIDE, OUTSIDE6, Outside, wait_for_bridge},
    world::{Desktop, PATIENCE, config, on_a_host},
};
use crate::{Backend, Error, NetConfig, Network, links, netlink::Netlink, network::find};

const MTU: u16 = 1400;
/// Of the way out.
const NARROW: u16 = 1300;
/// Headers of IPv4 and of IPv6, with UDP's.
const HEADERS: [usize; 2] = [28, 48];

fn mtu(link: &str) -> u32 {
    find(&mut Netlink::route().unwrap(), link).unwrap().unwrap().mtu_octets
}

/// A socket that lets nobody cut its packets, connected to `to`.
fn whole(to: IpAddr) -> UdpSocket {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).unwrap();
    match to {
        IpAddr::V4(_) => sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DO).unwrap(),
        IpAddr::V6(_) => sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::DO).unwrap(),
    }
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.connect(SocketAddr::new(to, 4000)).unwrap();
    socket
}

/// Sends packets of so many octets until one is refused for its length, or, if
/// they are to `pass`, until one is not: what was told of others is told late.
fn comes_to(pass: bool, socket: &UdpSocket, octets: usize, headers: usize) -> bool {
    const TRIES: u32 = 1000;
    (0..TRIES).any(|_| {
        let refused = match socket.send(&vec![0; octets - headers]) {
            Err(error) => error.raw_os_error() == Some(Errno::MSGSIZE.raw_os_error()),
            Ok(_) => false,
        };
        if refused == pass {
            std::thread::sleep(PATIENCE / TRIES);
        }
        refused != pass
    })
}

#[test]
fn who_sends_too_much_is_told_what_the_way_takes() {
    for backend in Backend::ALL {
        on_a_host(|| {
            let outside = Outside::new();
            let config = NetConfig { internet: true, backend, mtu_octets: MTU, ..config() };
            let network = Network::open(config).unwrap();
            let desktop = Desktop::with(&network, 7, NetPolicy { routed: true, ..NetPolicy::internet() });
            wait_for_bridge(&network, &desktop);
            assert_eq!([&network.bridge_name(), desktop.port.link()].map(mtu), [u32::from(MTU); 2]);
            assert_eq!(desktop.inside(|| mtu("eth0")), u32::from(MTU));
            for (to, headers) in [OUTSIDE.into(), OUTSIDE6.into()].into_iter().zip(HEADERS) {
                let here = desktop.inside(|| whole(to));
                // Longer than its own link's packets: nobody has to tell it.
                assert!(comes_to(false, &here, usize::from(MTU) + 1, headers));
                assert!(comes_to(true, &here, usize::from(MTU), headers), "{backend}: {to}");
            }
            // What comes from outside is longer than the desktop's link takes.
            let there = outside.udp();
            let here = desktop.inside(|| whole(OUTSIDE.into()));
            here.send(b"hello").unwrap();
            let mut packet = vec![0; 2048];
            let from = loop {
                let (length, from) = there.recv_from(&mut packet).unwrap();
                if length == 5 {
                    break from;
                }
            };
            sockopt::set_ip_mtu_discover(&there, Ipv4PathMtuDiscovery::DO).unwrap();
            there.connect(from).unwrap();
            assert!(comes_to(false, &there, usize::from(MTU) + 50, HEADERS[0]), "{backend}");
            // And the way out is narrower.
            let mut route = Netlink::route().unwrap();
            let uplink = find(&mut route, "uplink").unwrap().unwrap().index;
            route.batch(vec![links::set_mtu(uplink, NARROW)]).unwrap();
            for (to, headers) in [OUTSIDE.into(), OUTSIDE6.into()].into_iter().zip(HEADERS) {
                let here = desktop.inside(|| whole(to));
                assert!(comes_to(false, &here, usize::from(NARROW) + 1, headers), "{backend}: {to}");
                assert!(comes_to(true, &here, usize::from(NARROW), headers), "{backend}: {to}");
            }
        });
    }
}

#[test]
fn an_mtu_that_no_link_has_is_refused() {
    for mtu_octets in [0, 576, 1279, 65522] {
        let refused = Network::open(NetConfig { mtu_octets, ..config() }).unwrap_err();
        assert!(matches!(refused, Error::Invalid(_)) && refused.to_string().contains("MTU"), "{refused}");
    }
}
