//! More desktops than a bridge has room for: those on further ones are confined
//! and served alike.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::AsFd as _,
    time::Duration,
};

use qvd_core::{Neighbours, NetPolicy};
use qvd_sys::netns;

use super::world::{Desktop, World, config, desktop, on_a_host, subnet};
use crate::{Backend, DropReason, Error, NetConfig, Network, Subnet6, TapSpec, bridges, netlink::Netlink};

fn bridge_names() -> Vec<String> {
    let all = bridges::all(config().instance, &mut Netlink::route().unwrap()).unwrap();
    all.into_iter().map(|link| link.name).collect()
}

#[test]
fn a_desktop_on_the_second_bridge_is_confined_alike() {
    for backend in Backend::ALL {
        on_a_host(|| {
            let mut world = World::on_second_bridge(NetConfig { internet: true, backend, ..config() });
            assert_eq!(world.a.port.bridge_name(), "qvd7e57.1");
            let reached = world.reached_by_hostile();
            assert!(reached.is_empty(), "{backend}: {reached:#?}");
            let stopped = world.stopped_of_honest();
            assert!(stopped.is_empty(), "{backend}: {stopped:?}");
        });
    }
}

/// Whether `text` comes from one to the other within many tries.
fn comes(from: &UdpSocket, to: &UdpSocket, address: IpAddr, tries: u32) -> bool {
    to.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    let port = to.local_addr().unwrap().port();
    (0..tries).any(|_| {
        // Refused once nobody listened.
        let _sent = from.send_to(b"hello", (address, port));
        to.recv(&mut [0; 8]).is_ok()
    })
}

/// The host and desktops of the same group talk across bridges, in both families
/// and after another process took over; others do not, and it is counted.
#[test]
fn bridges_are_one_network() {
    for backend in Backend::ALL {
        on_a_host(|| {
            let config = NetConfig { internet: true, backend, ports_per_bridge: 1, ..config() };
            let policy = NetPolicy {
                neighbours: Neighbours::Tenant,
                services: vec!["udp 4000".parse().unwrap()],
                ..NetPolicy::host_only()
            };
            let first = Network::open(config).unwrap();
            let desktops = [7, 8].map(|number| Desktop::with(&first, number, policy.clone()));
            let stranger = Desktop::new(&first, 9, true);
            assert_eq!(bridge_names(), ["qvd7e57", "qvd7e57.1", "qvd7e57.2"]);
            let [a, b] = desktops.map(|Desktop { netns, port }| {
                let address = port.address();
                port.leave();
                (netns, address)
            });
            drop(first);
            let mut network = Network::open(config).unwrap();
            let [mut port_a, mut port_b] =
                [(7, a.1), (8, b.1)].map(|(number, address)| network.adopt(desktop(number), address, &policy).unwrap());
            assert_eq!((port_a.bridge_name(), port_b.bridge_name()), ("qvd7e57".to_owned(), "qvd7e57.1".to_owned()));
            network.sweep(&BTreeSet::from([desktop(9)])).unwrap();

            let host = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 4000)).unwrap();
            for (netns, port) in [(&a.0, &port_a), (&b.0, &port_b)] {
                port.verify().unwrap();
                for (own, gateway) in [
                    (IpAddr::V4(port.address()), IpAddr::V4(subnet().gateway())),
                    (port.ipv6().unwrap().into(), Subnet6::default_for(config.instance).gateway(subnet()).into()),
                ] {
                    let inside = netns::in_netns(netns.as_fd(), || UdpSocket::bind((own, 4001))).unwrap().unwrap();
                    assert!(comes(&inside, &host, gateway, 500), "{backend}: {own} to the host");
                    assert!(comes(&host, &inside, own, 500), "{backend}: the host to {own}");
                }
            }
            let bind = |netns: &std::os::fd::OwnedFd, address: IpAddr| {
                netns::in_netns(netns.as_fd(), || UdpSocket::bind((address, 5000))).unwrap().unwrap()
            };
            for (of_a, of_b) in [
                (IpAddr::V4(port_a.address()), IpAddr::V4(port_b.address())),
                (port_a.ipv6().unwrap().into(), port_b.ipv6().unwrap().into()),
            ] {
                let (at_a, at_b) = (bind(&a.0, of_a), bind(&b.0, of_b));
                assert!(
                    comes(&at_a, &at_b, of_b, 500) && comes(&at_b, &at_a, of_a, 500),
                    "{backend}: {of_a} and {of_b}"
                );
            }
            let at_b = bind(&b.0, port_b.address().into());
            let of_stranger = bind(&stranger.netns, stranger.port.address().into());
            assert!(!comes(&of_stranger, &at_b, port_b.address().into(), 5));
            let counted = stranger.port.drops().unwrap().contains_key(&DropReason::Neighbour);
            assert!(counted, "{backend}");

            // All are cut and come back together.
            assert_eq!(network.mend().unwrap().differed, None);
            port_b.close().unwrap();
            port_a.close().unwrap();
            stranger.port.leave();
            network.close().unwrap();
            assert!(bridge_names().is_empty());
        });
    }
}

/// A room that is given back is taken again, and none is left when all are full.
#[test]
fn ports_find_room_until_there_is_none() {
    on_a_host(|| {
        let mut network = Network::open(NetConfig { ports_per_bridge: 1, ..config() }).unwrap();
        let policy = NetPolicy::host_only();
        let attach = |network: &Network, number| {
            let spec = TapSpec { desktop: desktop(number), address: None, policy: policy.clone(), header: false };
            network.attach_tap(&spec)
        };
        let mut all: Vec<_> = (1..=16).map(|number| attach(&network, number).unwrap()).collect();
        let error = attach(&network, 17).unwrap_err();
        assert!(matches!(error, Error::NoRoom { .. }), "{error}");
        let (mut port, tap) = all.remove(3);
        let (bridge, address) = (port.bridge_name(), port.address());
        port.close().unwrap();
        drop(tap);
        let (again, tap) = attach(&network, 17).unwrap();
        assert_eq!(again.bridge_name(), bridge);
        assert_ne!(again.address(), address);
        drop(again);
        drop(tap);
        drop(all);
        network.close().unwrap();
        assert!(bridge_names().is_empty());
    });
}

/// More than any bridge of Linux has room for.
#[test]
fn eleven_hundred_ports_stand_side_by_side() {
    const PORTS: u32 = 1100;
    on_a_host(|| {
        let _raised = rustix::process::setrlimit(
            rustix::process::Resource::Nofile,
            rustix::process::Rlimit { current: Some(4096), maximum: Some(4096) },
        );
        let mut network = Network::open(NetConfig { internet: true, ..config() }).unwrap();
        let policy = NetPolicy::internet();
        let all: Vec<_> = (1..=PORTS)
            .map(|number| {
                let spec = TapSpec { desktop: desktop(number), address: None, policy: policy.clone(), header: false };
                network.attach_tap(&spec).unwrap()
            })
            .collect();
        assert_eq!(bridge_names().len(), 5);
        let addresses: BTreeSet<Ipv4Addr> = all.iter().map(|(port, _)| port.address()).collect();
        assert_eq!(addresses.len(), all.len());
        assert_eq!(network.mend().unwrap().differed, None);
        all.last().unwrap().0.verify().unwrap();
        let taps: Vec<_> = all.into_iter().map(|(port, tap)| (port.leave(), tap)).collect();
        network.close().unwrap();
        drop(taps);
        assert!(bridge_names().is_empty());
    });
}
