//! A host with a way out and two desktops, for what is decided behind the port.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use qvd_core::NetPolicy;
use qvd_sys::packet::{ETHERTYPE_ALL, PacketSocket};

use super::{
    frames::{self, Station},
    internet::{NAMES, OUTSIDE, Outside, wait_for_bridge},
    vectors,
    world::{Desktop, INSTANCE, came_before, config, heard_before, one_processor, subnet},
};
use crate::{Backend, Mac, NetConfig, Network, rules::Protection};

/// Another host there.
pub(super) const FAR: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
pub(super) const FAR6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 9);
/// Where a program of the host listens.
pub(super) const PROGRAM_PORT: u16 = 4000;

pub(super) fn with_names(backend: Backend) -> NetConfig {
    NetConfig { internet: true, name_server: Some(NAMES), backend, ..config() }
}

/// A host with an uplink, and two desktops.
pub(super) struct Site {
    pub(super) network: Network,
    pub(super) a: Desktop,
    pub(super) b: Desktop,
    pub(super) from_a: PacketSocket,
    pub(super) at_b: PacketSocket,
    pub(super) bridge: PacketSocket,
    pub(super) uplink: PacketSocket,
    pub(super) at_outside: PacketSocket,
    program: UdpSocket,
    pub(super) outside: Outside,
    sent: u32,
}

impl Site {
    pub(super) fn new(config: NetConfig, of_a: NetPolicy, of_b: NetPolicy) -> Self {
        Self::without(config, of_a, of_b, &[])
    }

    /// The same, where some of what stops desktops is left out.
    pub(super) fn without(config: NetConfig, of_a: NetPolicy, of_b: NetPolicy, without: &[Protection]) -> Self {
        one_processor();
        let outside = Outside::new();
        let network = Network::open_without(config, without).unwrap();
        let (a, b) = (Desktop::with(&network, 7, of_a), Desktop::with(&network, 8, of_b));
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
    pub(super) fn change(&mut self, policy: &NetPolicy) {
        let (id, address) = (self.a.port.desktop(), self.a.port.address());
        self.a.port.close().unwrap();
        self.a = Desktop::with(&self.network, id.number(), policy.clone());
        assert_eq!(self.a.port.address(), address);
        wait_for_bridge(&self.network, &self.a);
        self.from_a = self.a.socket();
    }

    pub(super) fn gateway(&self) -> Station {
        Station::new(Mac::of(INSTANCE, subnet().gateway()), subnet().gateway())
    }

    pub(super) fn mark(&mut self) -> [u8; 12] {
        self.sent += 1;
        let mut mark = *b"qvd-mark....";
        mark[8..].copy_from_slice(&self.sent.to_be_bytes());
        mark
    }

    /// What the first desktop says `to` from.
    pub(super) fn own6(&self, to: Ipv6Addr) -> Ipv6Addr {
        if to.is_unicast_link_local() { self.a.port.mac().link_local() } else { self.a.port.ipv6().unwrap() }
    }

    /// A packet of the first desktop.
    pub(super) fn frame(&mut self, to: IpAddr, protocol: u8, port: u16) -> (Vec<u8>, [u8; 12]) {
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
                let mut head = head;
                if protocol == 1 {
                    let sum = frames::checksum(&[&head[..], &mark].concat());
                    head[2..4].copy_from_slice(&sum.to_be_bytes());
                } else if protocol == 6 {
                    frames::sum_segment(own.ip, to, &mut head, &mark);
                }
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
                let packet = vectors::summed(self.own6(to), to, protocol, 64, &payload, at);
                frames::ethernet(gateway.mac, own.mac, frames::IPV6, &packet)
            }
        };
        (frame, mark)
    }

    /// Whether a packet of the first desktop gets to anybody.
    pub(super) fn arrives(&mut self, frame: &[u8], mark: &[u8; 12]) -> bool {
        self.from_a.send(frame).unwrap();
        let outside = !self.passing(mark).is_empty();
        let control = self.mark();
        self.host_says(self.b.station(), &control);
        let neighbour = heard_before(&self.at_b, mark, &control);
        let (mut packet, mut program) = ([0; 2048], false);
        while let Ok(length) = self.program.recv(&mut packet) {
            program |= packet[..length] == mark[..];
        }
        outside || neighbour || program
    }

    /// What went out of that with `mark`, once all before it has.
    pub(super) fn passing(&mut self, mark: &[u8]) -> Vec<Vec<u8>> {
        let (control, own, gateway) = (self.mark(), self.a.station(), self.gateway());
        let arp = frames::ethernet(frames::BROADCAST, own.mac, frames::ARP, &frames::arp(1, own, gateway.ip));
        self.from_a.send(&[&arp[..], &control].concat()).unwrap();
        heard_before(&self.bridge, mark, &control);
        self.uplink.send(&[&[0xff; 60][..], &control].concat()).unwrap();
        let mut came = came_before(&self.at_outside, mark, &control);
        // Not what outside says to it.
        came.retain(|frame| frame[6..12] != Mac::of(INSTANCE, OUTSIDE).octets());
        came
    }

    /// A frame of the host's that always comes.
    pub(super) fn host_says(&self, to: Station, control: &[u8]) {
        let gateway = self.gateway();
        let reply = frames::ethernet(to.mac, gateway.mac, frames::ARP, &frames::arp(2, gateway, to.ip));
        self.bridge.send(&[&reply[..], control].concat()).unwrap();
    }

    pub(super) fn reaches(&mut self, to: impl Into<IpAddr>, protocol: u8, port: u16) -> bool {
        let (frame, mark) = self.frame(to.into(), protocol, port);
        let arrives = self.arrives(&frame, &mark);
        let decision = self.a.port.explain(&frame);
        assert_eq!(decision.arrives, arrives, "{:?}: {decision}", self.a.port.policy());
        arrives
    }
}

pub(super) fn limited(destinations: &[&str]) -> NetPolicy {
    NetPolicy {
        destinations: destinations.iter().map(|word| word.parse().unwrap()).collect(),
        ..NetPolicy::host_only()
    }
}
