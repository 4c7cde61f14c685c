//! Networks of two tenants on one host.

use std::{net::IpAddr, os::fd::AsFd as _};

use qvd_core::{Neighbours, NetPolicy};
use qvd_sys::packet::{ETHERTYPE_ALL, PacketSocket};

use super::{
    frames,
    internet::wait_for_bridge,
    vectors,
    world::{Desktop, INSTANCE, config, desktop, heard_before, on_a_host, one_processor},
};
use crate::{Backend, Mac, NetConfig, Network, PortSpec, Subnet6, rules::Protection};

/// What a desktop sends to an address, with a mark.
fn packet(from: &Desktop, network: &NetConfig, to: IpAddr, mark: &[u8]) -> Vec<u8> {
    let (own, gateway) = (from.port.mac().octets(), Mac::of(network.instance, network.subnet.gateway()).octets());
    match to {
        IpAddr::V4(to) => {
            let packet = frames::udp(from.port.address(), to, (5000, 6000));
            frames::ethernet(gateway, own, frames::IPV4, &[&packet[..], mark].concat())
        }
        IpAddr::V6(to) => {
            let payload = [&vectors::udp6((5000, 6000))[..], mark].concat();
            let packet = vectors::summed(from.port.ipv6().unwrap(), to, 17, 64, &payload, 6);
            frames::ethernet(gateway, own, frames::IPV6, &packet)
        }
    }
}

/// Whoever may go anywhere, and talk with all desktops of its tenant, reaches none of
/// another tenant's, whichever network was there first.
#[test]
fn no_desktop_reaches_another_tenants() {
    let rows = [(Backend::Nft, &[][..]), (Backend::Nft, &[Protection::Inward][..]), (Backend::Iptables, &[])];
    for (backend, without) in rows {
        on_a_host(|| {
            one_processor();
            let lab = NetConfig { internet: true, backend, ..config() };
            let subnet = "10.67.0.0/16".parse().unwrap();
            let (instance, first6) = (INSTANCE.sibling(1), lab.subnet6);
            let law = NetConfig { instance, subnet, subnet6: Some(Subnet6::default_for(instance)), ..lab };
            assert_ne!(law.subnet6, first6);
            let networks = [lab, law].map(|config| Network::open_without(config, without).unwrap());
            let policy = NetPolicy { neighbours: Neighbours::Tenant, ..NetPolicy::internet() };
            let [a, b] = [0, 1].map(|at| {
                let desktop = Desktop::with(&networks[at], 7, policy.clone());
                wait_for_bridge(&networks[at], &desktop);
                desktop
            });
            for (from, of, to, there) in [(&a, &lab, &b, &networks[1]), (&b, &law, &a, &networks[0])] {
                let (from_socket, at_other) = (from.socket(), to.socket());
                let bridge = PacketSocket::open(&there.bridge_name(), ETHERTYPE_ALL).unwrap();
                let addresses = [IpAddr::V4(to.port.address()), IpAddr::V6(to.port.ipv6().unwrap())];
                for (number, address) in (0_u8..).zip(addresses) {
                    let mark = [&b"qvd-mark-of"[..], &[number]].concat();
                    let frame = packet(from, of, address, &mark);
                    let told = from.port.explain(&frame);
                    assert!(told.passes && !told.arrives && told.beyond.contains("another tenant"), "{told}");
                    from_socket.send(&frame).unwrap();
                    let control = [&b"qvd-control"[..], &[number]].concat();
                    let frame = frames::ethernet(to.port.mac().octets(), [2, 0, 0, 0, 0, 1], frames::IPV4, &control);
                    bridge.send(&frame).unwrap();
                    let heard = heard_before(&at_other, &mark, &control);
                    assert_eq!(heard, !without.is_empty(), "{backend}, without {without:?}: {address}");
                }
            }
        });
    }
}

/// An address beside its own is one desktop's, whichever tenant's.
#[test]
fn no_two_tenants_have_the_same_further_address() {
    on_a_host(|| {
        let first = config();
        let instance = INSTANCE.sibling(1);
        let (subnet, subnet6) = ("10.67.0.0/16".parse().unwrap(), Some(Subnet6::default_for(instance)));
        let networks = [first, NetConfig { instance, subnet, subnet6, ..first }].map(|c| Network::open(c).unwrap());
        for word in ["192.0.2.8", "2001:db8:7::9"] {
            let policy = NetPolicy { addresses: vec![word.parse().unwrap()], ..NetPolicy::host_only() };
            let mut has = Desktop::with(&networks[0], 7, policy.clone());
            let netns = qvd_sys::netns::create().unwrap();
            let spec = PortSpec { desktop: desktop(7), netns: netns.as_fd(), address: None, policy };
            let error = networks[1].attach(&spec).unwrap_err().to_string();
            assert_eq!(error, format!("address {word} is somebody else's: the host has a route to it"));
            has.port.close().unwrap();
            networks[1].attach(&spec).unwrap().close().unwrap();
        }
    });
}
