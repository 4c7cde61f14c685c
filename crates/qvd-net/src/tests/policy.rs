//! What a policy lets through behind the port: packets from real desktops to
//! the outside, to neighbours and to the host, with both back ends, decided
//! alike by the kernel and by the reference.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    num::NonZeroU32,
    os::fd::AsFd as _,
    time::Duration,
};

use qvd_core::{NameServers, Neighbours, NetPolicy};
use qvd_sys::{netns, packet::PacketSocket};

use super::{
    frames,
    internet::{NAMES, OUTSIDE, OUTSIDE6, UPLINK, UPLINK6, wait_for_bridge},
    site::{FAR, FAR6, PROGRAM_PORT, Site, limited, with_names},
    world::{PATIENCE, config, desktop, on_a_host, subnet},
};
use crate::{Backend, DropReason, Error, NetConfig, Network, PortSpec};

/// Every kind of policy, with what it lets through and what it does not.
#[test]
fn a_policy_lets_through_what_it_names() {
    for backend in Backend::ALL {
        on_a_host(|| {
            let tenant = NetPolicy { neighbours: Neighbours::Tenant, ..NetPolicy::host_only() };
            let mut site = Site::new(with_names(backend), NetPolicy::host_only(), tenant.clone());
            let (near, gateway) = (site.b.port.address(), subnet().gateway());
            let near6 = site.b.port.ipv6().unwrap();
            assert!(!site.reaches(OUTSIDE, 17, 443) && !site.reaches(OUTSIDE6, 6, 443));
            assert!(!site.reaches(near, 17, 443) && !site.reaches(gateway, 17, PROGRAM_PORT));

            site.change(&NetPolicy::internet());
            assert!(site.reaches(OUTSIDE, 17, 443) && site.reaches(FAR6, 6, 443) && site.reaches(FAR, 17, 53));
            assert!(!site.reaches(near, 17, 443) && !site.reaches(near6, 6, 443));
            assert!(site.reaches(gateway, 17, 53), "the gateway stands for the site's name server");
            // Of the host's own addresses none but the gateway's.
            assert!(!site.reaches(UPLINK, 17, PROGRAM_PORT) && !site.reaches(UPLINK6, 17, PROGRAM_PORT));
            assert!(!site.reaches(UPLINK, 1, 0) && !site.reaches(UPLINK6, 58, 0), "{backend}");

            site.change(&limited(&["198.51.100.0/25 udp 400-443", "203.0.113.9", "2001:db8:1::/48 tcp 443"]));
            assert!(site.reaches(OUTSIDE, 17, 443) && site.reaches(OUTSIDE, 17, 400), "{backend}");
            assert!(!site.reaches(OUTSIDE, 17, 444) && !site.reaches(OUTSIDE, 6, 443), "{backend}");
            assert!(site.reaches(FAR, 1, 0) && site.reaches(FAR, 17, 9) && site.reaches(FAR, 6, 9), "{backend}");
            assert!(!site.reaches(Ipv4Addr::new(203, 0, 113, 8), 17, 443), "{backend}");
            assert!(site.reaches(OUTSIDE6, 6, 443) && !site.reaches(OUTSIDE6, 17, 443), "{backend}");
            assert!(!site.reaches(FAR6, 6, 443) && !site.reaches(near, 17, 443), "{backend}");

            let services = vec![format!("udp {PROGRAM_PORT}").parse().unwrap()];
            site.change(&NetPolicy { services, ..NetPolicy::host_only() });
            assert!(site.reaches(gateway, 17, PROGRAM_PORT), "{backend}");
            assert!(!site.reaches(OUTSIDE, 17, PROGRAM_PORT), "{backend}");

            site.change(&tenant);
            assert!(
                site.reaches(near, 17, 443) && site.reaches(near6, 6, 443) && site.reaches(near, 1, 0),
                "{backend}"
            );
            assert!(!site.reaches(OUTSIDE, 17, 443) && !site.reaches(gateway, 17, PROGRAM_PORT), "{backend}");
            let lab = Neighbours::Group("lab".to_owned());
            site.change(&NetPolicy { neighbours: lab, ..NetPolicy::internet() });
            assert!(!site.reaches(near, 17, 443) && site.reaches(OUTSIDE, 17, 443), "{backend}");

            site.change(&NetPolicy { names: NameServers::Ours, ..NetPolicy::internet() });
            assert!(
                site.reaches(NAMES, 17, 53) && site.reaches(gateway, 17, 53) && site.reaches(FAR, 17, 443),
                "{backend}"
            );
            assert!(
                !site.reaches(FAR, 17, 53) && !site.reaches(FAR6, 6, 853) && !site.reaches(near, 17, 9),
                "{backend}"
            );
            site.network.mend().unwrap();
            site.a.port.verify().unwrap();
        });
    }
}

/// What is part of no connection has no address translated, so it does not get out.
#[test]
fn what_is_of_no_connection_stays_in() {
    for backend in Backend::ALL {
        on_a_host(|| {
            let mut site = Site::new(with_names(backend), NetPolicy::internet(), NetPolicy::host_only());
            for (to, checksum) in [(IpAddr::from(OUTSIDE), 14 + 20 + 16), (IpAddr::from(OUTSIDE6), 14 + 40 + 16)] {
                let (frame, mark) = site.frame(to, 6, 443);
                assert!(site.arrives(&frame, &mark), "{backend}: {to}");
                let (mut frame, mark) = site.frame(to, 6, 443);
                frame[checksum] ^= 1;
                assert!(!site.arrives(&frame, &mark), "{backend}: {to}");
            }
        });
    }
}

/// What a policy does not let through is counted for the reason.
#[test]
fn what_a_policy_stops_is_counted() {
    for backend in Backend::ALL {
        on_a_host(|| {
            let ours = NetPolicy { names: NameServers::Ours, ..limited(&["203.0.113.9"]) };
            let mut site = Site::new(with_names(backend), ours.clone(), NetPolicy::host_only());
            let near = site.b.port.address();
            for (to, port, reason) in [
                (OUTSIDE, 443, DropReason::Policy),
                (near, 443, DropReason::Neighbour),
                (FAR, 53, DropReason::Names),
                (subnet().gateway(), PROGRAM_PORT, DropReason::Host),
            ] {
                let before = site.a.port.drops().unwrap();
                assert!(!site.reaches(to, 17, port));
                let count = |drops: &BTreeMap<DropReason, u64>| drops.get(&reason).copied().unwrap_or_default();
                assert_eq!(count(&site.a.port.drops().unwrap()), count(&before) + 1, "{backend}: {reason}");
            }
            for (policy, reason) in [
                (NetPolicy { connections: NonZeroU32::new(1), ..NetPolicy::internet() }, DropReason::Connections),
                (NetPolicy { up_kbit_s: NonZeroU32::new(1), ..NetPolicy::internet() }, DropReason::Rate),
            ] {
                site.change(&policy);
                // More than may come at once, of many connections.
                for _ in 0..4000 {
                    let (frame, _) = site.frame(OUTSIDE.into(), 17, 443);
                    site.from_a.send(&frame).unwrap();
                }
                assert!(site.a.port.drops().unwrap().contains_key(&reason), "{backend}: {reason}");
            }
        });
    }
}

/// Who is routed is seen with its own address, everybody else with the host's.
#[test]
fn who_is_routed_keeps_its_address() {
    for backend in Backend::ALL {
        on_a_host(|| {
            let mut site = Site::new(with_names(backend), NetPolicy::internet(), NetPolicy::host_only());
            let there = site.outside.udp();
            for routed in [false, true] {
                site.change(&NetPolicy { routed, ..NetPolicy::internet() });
                let (frame, _) = site.frame(OUTSIDE.into(), 17, PROGRAM_PORT);
                // No program of the outside has this host's address resolved yet.
                site.from_a.send(&frame).unwrap();
                let (_, from) = there.recv_from(&mut [0; 64]).unwrap();
                assert_eq!(from.ip() == IpAddr::V4(site.a.port.address()), routed, "{backend}: {from}");
            }
        });
    }
}

/// Beyond so many connections no further one begins.
#[test]
fn connections_are_limited() {
    const MOST: u32 = 5;
    for backend in Backend::ALL {
        on_a_host(|| {
            let policy = NetPolicy { connections: NonZeroU32::new(MOST), ..NetPolicy::internet() };
            let mut site = Site::new(with_names(backend), policy, NetPolicy::internet());
            let mut begun = 0;
            for _ in 0..3 * MOST {
                let (frame, mark) = site.frame(OUTSIDE.into(), 17, 443);
                begun += u32::from(site.arrives(&frame, &mark));
            }
            assert_eq!(begun, MOST, "{backend}");
        });
    }
}

/// A thousand octets in a second: of four hundred packets that come at once
/// only about the allowance passes, either way.
#[test]
fn rates_are_limited_either_way() {
    const PACKETS: u32 = 400;
    for backend in Backend::ALL {
        on_a_host(|| {
            let rate = NonZeroU32::new(8);
            let policy = NetPolicy { up_kbit_s: rate, down_kbit_s: rate, ..NetPolicy::internet() };
            let mut site = Site::new(with_names(backend), policy, NetPolicy::internet());
            let (own, gateway) = (site.a.station(), site.gateway());
            let at_a = site.a.socket();
            let count = |socket: &PacketSocket, control: &[u8]| {
                let mut came = 0;
                while let Some(frame) = socket.receive(PATIENCE).unwrap() {
                    if super::world::holds(&frame, control) {
                        break;
                    }
                    came += u32::from(frame.len() > 1000);
                }
                came
            };
            let long = |from: Ipv4Addr, to: Ipv4Addr| {
                let head = [5000_u16, 443, 1008, 0].map(u16::to_be_bytes).concat();
                let mut packet = frames::ipv4(
                    from,
                    to,
                    frames::Ip { protocol: 17, ..frames::Ip::default() },
                    &[head, vec![0; 988]].concat(),
                );
                packet.extend([0; 12]);
                packet
            };
            let mut up = 0;
            for _ in 0..PACKETS / 50 {
                for _ in 0..50 {
                    let packet = long(own.ip, OUTSIDE);
                    site.from_a.send(&frames::ethernet(gateway.mac, own.mac, frames::IPV4, &packet)).unwrap();
                }
                let control = site.mark();
                site.uplink.send(&[&[0xff; 60][..], &control].concat()).unwrap();
                up += count(&site.at_outside, &control);
            }
            assert!((100..200).contains(&up), "{backend}: {up} of {PACKETS} went out");
            while at_a.receive(Duration::ZERO).unwrap().is_some() {}
            let mut down = 0;
            for _ in 0..PACKETS {
                let packet = long(gateway.ip, own.ip);
                // What waits in the link's queue is this socket's, which is full at some time.
                let _sent = site.bridge.send(&frames::ethernet(own.mac, gateway.mac, frames::IPV4, &packet));
                while let Some(frame) = at_a.receive(Duration::ZERO).unwrap() {
                    down += u32::from(frame.len() > 1000);
                }
            }
            assert!((100..200).contains(&down), "{backend}: {down} of {PACKETS} came in");
        });
    }
}

/// What a network has not is refused, and by name.
#[test]
fn a_policy_that_cannot_be_kept_is_refused() {
    on_a_host(|| {
        let network = Network::open(NetConfig { internet: true, ..config() }).unwrap();
        let netns = netns::create().unwrap();
        let refused = |policy| {
            let netns = netns.as_fd();
            let spec = PortSpec { desktop: desktop(7), netns, address: None, policy };
            let error = network.attach(&spec).unwrap_err();
            assert!(matches!(error, Error::Invalid(_)), "{error}");
            error.to_string()
        };
        let ours = NetPolicy { names: NameServers::Ours, ..NetPolicy::internet() };
        assert!(refused(ours).contains("name server"));
        assert!(refused(NetPolicy::none()).contains("no port"));
    });
}

/// Rules of policies are watched and put back like all others, and removed with
/// their ports.
#[test]
fn rules_of_a_policy_are_put_back() {
    for backend in Backend::ALL {
        on_a_host(|| {
            let policy = limited(&["198.51.100.2 udp 443"]);
            let mut site = Site::new(with_names(backend), policy, NetPolicy::internet());
            let spoil: &[&[&str]] = match backend {
                Backend::Nft => &[&["nft", "flush", "table", "inet", "qvd-7e57"]],
                _ => &[&["iptables", "-F", "qvd7e57-7"], &["iptables", "-A", "qvd7e57-7", "-j", "ACCEPT"]],
            };
            for command in spoil {
                let status = std::process::Command::new(command[0]).args(&command[1..]).status().unwrap();
                assert!(status.success());
            }
            let mended = site.network.mend().unwrap();
            assert_eq!(mended.cut, 2, "{backend}: {mended:?}");
            wait_for_bridge(&site.network, &site.a);
            assert!(site.reaches(OUTSIDE, 17, 443) && !site.reaches(OUTSIDE, 17, 444), "{backend}");
        });
    }
}
