//! What a policy lets through behind the port: packets from real desktops to
//! the outside, to neighbours and to the host, with both back ends, decided
//! alike by the kernel and by the reference.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    num::NonZeroU32,
    time::Duration,
};

use proptest::{
    collection::vec,
    prelude::*,
    sample::select,
    test_runner::{Config, TestCaseError, TestRunner},
};
use qvd_core::{NameServers, Neighbours, NetPolicy};
use qvd_sys::{
    netns,
    packet::{ETHERTYPE_ALL, PacketSocket},
};
use qvd_testkit::privileged;

use super::{
    NEEDS,
    frames::{self, Station},
    internet::{NAMES, OUTSIDE, OUTSIDE6, Outside, wait_for_bridge},
    vectors,
    world::{Desktop, INSTANCE, PATIENCE, config, desktop, heard_before, on_a_host, one_processor, subnet},
};
use crate::{Backend, DropReason, Error, Mac, NetConfig, Network, PortSpec};

/// Another host there.
const FAR: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
const FAR6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 9);
/// Where a program of the host listens.
const PROGRAM_PORT: u16 = 4000;

fn with_names(backend: Backend) -> NetConfig {
    NetConfig { internet: true, name_server: Some(NAMES), backend, ..config() }
}

/// A host with an uplink, and two desktops.
struct Site {
    network: Network,
    a: Desktop,
    b: Desktop,
    from_a: PacketSocket,
    at_b: PacketSocket,
    bridge: PacketSocket,
    uplink: PacketSocket,
    at_outside: PacketSocket,
    program: UdpSocket,
    outside: Outside,
    sent: u32,
}

fn attach(network: &Network, number: u32, policy: NetPolicy) -> Desktop {
    let netns = netns::create().unwrap();
    let spec = PortSpec { desktop: desktop(number), netns: std::os::fd::AsFd::as_fd(&netns), address: None, policy };
    let port = network.attach(&spec).unwrap();
    Desktop { netns, port }
}

impl Site {
    fn new(config: NetConfig, of_a: NetPolicy, of_b: NetPolicy) -> Self {
        one_processor();
        let outside = Outside::new();
        let network = Network::open(config).unwrap();
        let (a, b) = (attach(&network, 7, of_a), attach(&network, 8, of_b));
        wait_for_bridge(&network, &a);
        wait_for_bridge(&network, &b);
        let program = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PROGRAM_PORT)).unwrap();
        program.set_nonblocking(true).unwrap();
        Self {
            from_a: a.socket(),
            at_b: b.socket(),
            bridge: PacketSocket::open(&network.bridge_name(), ETHERTYPE_ALL).unwrap(),
            uplink: PacketSocket::open("uplink", ETHERTYPE_ALL).unwrap(),
            at_outside: outside.socket(),
            program,
            outside,
            network,
            a,
            b,
            sent: 0,
        }
    }

    /// Gives the first desktop another policy.
    fn change(&mut self, policy: &NetPolicy) {
        let (id, address) = (self.a.port.desktop(), self.a.port.address());
        self.a.port.close().unwrap();
        self.a = attach(&self.network, id.number(), policy.clone());
        assert_eq!(self.a.port.address(), address);
        wait_for_bridge(&self.network, &self.a);
        self.from_a = self.a.socket();
    }

    fn gateway(&self) -> Station {
        Station::new(Mac::of(INSTANCE, subnet().gateway()), subnet().gateway())
    }

    fn mark(&mut self) -> [u8; 12] {
        self.sent += 1;
        let mut mark = *b"qvd-mark....";
        mark[8..].copy_from_slice(&self.sent.to_be_bytes());
        mark
    }

    /// A packet of the first desktop.
    fn frame(&mut self, to: IpAddr, protocol: u8, port: u16) -> (Vec<u8>, [u8; 12]) {
        let (own, gateway, mark) = (self.a.station(), self.gateway(), self.mark());
        // A flow of its own each time, which no other has prepared.
        let from = 20_000 + u16::try_from(self.sent % 40_000).unwrap();
        let head = match protocol {
            6 => [
                from.to_be_bytes(),
                port.to_be_bytes(),
                [0; 2],
                [1; 2],
                [0; 2],
                [0; 2],
                [0x50, 2],
                [4, 0],
                [0; 2],
                [0; 2],
            ]
            .concat(),
            17 => [from, port, 20, 0].map(u16::to_be_bytes).concat(),
            _ => vec![if to.is_ipv4() { 8 } else { 128 }, 0, 0, 0, 0, 1, 0, 1],
        };
        let frame = match to {
            IpAddr::V4(to) => {
                let packet = frames::ipv4(own.ip, to, frames::Ip { protocol, ..frames::Ip::default() }, &head);
                frames::ethernet(gateway.mac, own.mac, frames::IPV4, &[packet, mark.to_vec()].concat())
            }
            IpAddr::V6(to) => {
                let (protocol, at) = match protocol {
                    6 => (6, 16),
                    17 => (17, 6),
                    _ => (58, 2),
                };
                let payload = [head, mark.to_vec()].concat();
                let packet = vectors::summed(self.a.port.ipv6().unwrap(), to, protocol, 64, &payload, at);
                frames::ethernet(gateway.mac, own.mac, frames::IPV6, &packet)
            }
        };
        (frame, mark)
    }

    /// Whether a packet of the first desktop gets to anybody.
    fn arrives(&mut self, frame: &[u8], mark: &[u8; 12]) -> bool {
        let (own, gateway) = (self.a.station(), self.gateway());
        self.from_a.send(frame).unwrap();
        let control = self.mark();
        let arp = |to: [u8; 6], from: Station, target| {
            frames::ethernet(to, from.mac, frames::ARP, &frames::arp(1, from, target))
        };
        self.from_a.send(&[&arp(frames::BROADCAST, own, gateway.ip)[..], &control].concat()).unwrap();
        heard_before(&self.bridge, mark, &control);
        self.uplink.send(&[&[0xff; 60][..], &control].concat()).unwrap();
        let outside = heard_before(&self.at_outside, mark, &control);
        self.bridge.send(&[&arp(self.b.station().mac, gateway, self.b.station().ip)[..], &control].concat()).unwrap();
        let neighbour = heard_before(&self.at_b, mark, &control);
        let (mut packet, mut program) = ([0; 2048], false);
        while let Ok(length) = self.program.recv(&mut packet) {
            program |= packet[..length] == mark[..];
        }
        outside || neighbour || program
    }

    fn reaches(&mut self, to: impl Into<IpAddr>, protocol: u8, port: u16) -> bool {
        let (frame, mark) = self.frame(to.into(), protocol, port);
        let arrives = self.arrives(&frame, &mark);
        let decision = self.a.port.explain(&frame);
        assert_eq!(decision.arrives, arrives, "{:?}: {decision}", self.a.port.policy());
        arrives
    }
}

fn limited(destinations: &[&str]) -> NetPolicy {
    NetPolicy {
        destinations: destinations.iter().map(|word| word.parse().unwrap()).collect(),
        ..NetPolicy::host_only()
    }
}

/// Every kind of policy, with what it lets through and what it does not.
#[test]
fn a_policy_lets_through_what_it_names() {
    privileged(NEEDS, || {
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
    });
}

/// What a policy does not let through is counted for the reason.
#[test]
fn what_a_policy_stops_is_counted() {
    privileged(NEEDS, || {
        on_a_host(|| {
            let ours = NetPolicy { names: NameServers::Ours, ..limited(&["203.0.113.9"]) };
            let mut site = Site::new(with_names(Backend::Nft), ours.clone(), NetPolicy::host_only());
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
                assert_eq!(count(&site.a.port.drops().unwrap()), count(&before) + 1, "{reason}");
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
                assert!(site.a.port.drops().unwrap().contains_key(&reason), "{reason}");
            }
        });
    });
}

/// Who is routed is seen with its own address, everybody else with the host's.
#[test]
fn who_is_routed_keeps_its_address() {
    privileged(NEEDS, || {
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
    });
}

/// Beyond so many connections no further one begins.
#[test]
fn connections_are_limited() {
    const MOST: u32 = 5;
    privileged(NEEDS, || {
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
    });
}

/// A thousand octets in a second: of four hundred packets that come at once
/// only about the allowance passes, either way.
#[test]
fn rates_are_limited_either_way() {
    const PACKETS: u32 = 400;
    privileged(NEEDS, || {
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
    });
}

/// What a network has not is refused, and by name.
#[test]
fn a_policy_that_cannot_be_kept_is_refused() {
    privileged(NEEDS, || {
        on_a_host(|| {
            let network = Network::open(NetConfig { internet: true, ..config() }).unwrap();
            let netns = netns::create().unwrap();
            let refused = |policy| {
                let netns = std::os::fd::AsFd::as_fd(&netns);
                let spec = PortSpec { desktop: desktop(7), netns, address: None, policy };
                let error = network.attach(&spec).unwrap_err();
                assert!(matches!(error, Error::Invalid(_)), "{error}");
                error.to_string()
            };
            let ours = NetPolicy { names: NameServers::Ours, ..NetPolicy::internet() };
            assert!(refused(ours).contains("name server"));
            assert!(refused(NetPolicy::none()).contains("no port"));
        });
    });
}

/// Rules of policies are watched and put back like all others, and removed with
/// their ports.
#[test]
fn rules_of_a_policy_are_put_back() {
    privileged(NEEDS, || {
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
    });
}

fn policies() -> impl Strategy<Value = NetPolicy> {
    let words = vec![
        "198.51.100.0/24",
        "198.51.100.2 udp 443",
        "203.0.113.0/28 tcp 1-1024",
        "203.0.113.9 udp 53",
        "0.0.0.0/0 tcp 443",
        "10.66.0.0/16",
        "2001:db8:1::/64",
        "2001:db8::/32 udp 400-500",
        "2001:db8:9::9 tcp 443",
        "198.51.100.53 udp 53",
    ];
    let neighbours = vec![Neighbours::None, Neighbours::Tenant, Neighbours::Group("lab".to_owned())];
    let services = vec!["udp 4000", "udp 3000-5000", "tcp 4000", "udp 53"];
    (
        vec(select(words), 0..4),
        vec(select(services), 0..3),
        select(neighbours),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(destinations, services, neighbours, internet, ours, routed)| NetPolicy {
            internet,
            services: services.iter().map(|word| word.parse().unwrap()).collect(),
            neighbours,
            names: if ours { NameServers::Ours } else { NameServers::Any },
            routed,
            ..limited(&destinations)
        })
}

/// Random policies, random packets: the kernel and the reference agree.
#[test]
fn policies_are_kept_as_the_reference_understands_them() {
    const CASES: u32 = 60;
    privileged(NEEDS, || {
        on_a_host(|| {
            let tenant = NetPolicy { neighbours: Neighbours::Tenant, ..NetPolicy::host_only() };
            let site = Site::new(with_names(Backend::Nft), NetPolicy::host_only(), tenant);
            let (near, near6) = (site.b.port.address(), site.b.port.ipv6().unwrap());
            let hosts: Vec<IpAddr> = vec![
                OUTSIDE.into(),
                FAR.into(),
                NAMES.into(),
                near.into(),
                near6.into(),
                OUTSIDE6.into(),
                FAR6.into(),
                Ipv4Addr::new(10, 66, 0, 99).into(),
            ];
            let ports = vec![53_u16, 400, 443, 853, PROGRAM_PORT];
            let packets = vec((select(hosts), select(vec![1_u8, 6, 17]), select(ports)), 40);
            let site = std::cell::RefCell::new(site);
            let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
            let outcome = TestRunner::new(config).run(&(policies(), packets), |(policy, packets)| {
                let site = &mut *site.borrow_mut();
                site.change(&policy);
                let to_host = [(subnet().gateway().into(), 17, PROGRAM_PORT), (subnet().gateway().into(), 17, 53)];
                for (to, protocol, port) in packets.into_iter().chain(to_host) {
                    // A program that is not there hears nothing.
                    let (frame, mark) = site.frame(to, protocol, port);
                    let arrives = site.arrives(&frame, &mark);
                    let decision = site.a.port.explain(&frame);
                    let unheard = to == IpAddr::V4(subnet().gateway()) && port == 53 && !arrives;
                    if decision.arrives != arrives && !unheard {
                        return Err(TestCaseError::fail(format!("{to} {protocol} {port}: {arrives}, {decision}")));
                    }
                }
                Ok(())
            });
            outcome.unwrap_or_else(|error| panic!("{error}"));
        });
    });
}
