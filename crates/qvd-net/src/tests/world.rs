//! A host with a network and two desktops, and ears in every place that a
//! frame could reach.

use std::{
    io,
    net::{Ipv4Addr, UdpSocket},
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use qvd_core::{DesktopId, Instance, NetPolicy};
use qvd_sys::{
    netns,
    packet::{ETHERTYPE_ALL, PacketSocket},
};
use qvd_testkit::privileged;
use rustix::{
    io::Errno,
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

use super::{
    NEEDS,
    frames::{self, Station},
    vectors::{self, Cast, Station6},
};
use crate::{NetConfig, Network, Port, PortSpec, Subnet, Subnet6, TapSpec, rules::Protection, sysctl};

pub(crate) const INSTANCE: Instance = Instance::new(0x7e57);

/// Bytes at the end of each frame that tell it from all others.
pub(crate) const MARK_LEN: usize = 12;

/// Longest wait for a frame that has to come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) fn desktop(number: u32) -> DesktopId {
    DesktopId::new(number).unwrap()
}

pub(crate) fn subnet() -> Subnet {
    "10.66.0.0/16".parse().unwrap()
}

pub(crate) fn config() -> NetConfig {
    NetConfig { subnet: subnet(), ..NetConfig::new(INSTANCE) }
}

/// Runs `test` on a thread inside a namespace made for it, where that is allowed:
/// what nearly every test here begins with.
pub(crate) fn on_a_host(test: impl FnOnce() + Send) {
    privileged(NEEDS, || {
        let host = netns::create().unwrap();
        netns::in_netns(host.as_fd(), || {
            crate::loopback_up(host.as_fd()).unwrap();
            pass_bridged_packets_to_inet(false);
            test();
        })
        .unwrap();
    });
}

/// Whether bridged packets pass the host's inet rules as well, as they do where
/// `br_netfilter` is loaded, by Docker for instance. That stops more, so what
/// has to hold without it is tested without it.
pub(crate) fn pass_bridged_packets_to_inet(yes: bool) {
    for family in ["ip", "ip6", "arp"] {
        sysctl::write_if_there(&format!("bridge/bridge-nf-call-{family}tables"), if yes { "1" } else { "0" }).unwrap();
    }
}

/// A desktop: its namespace and its port.
#[derive(Debug)]
pub(crate) struct Desktop {
    pub(crate) netns: OwnedFd,
    pub(crate) port: Port,
}

impl Desktop {
    pub(crate) fn new(network: &Network, number: u32, internet: bool) -> Self {
        Self::with(network, number, NetPolicy { internet, ..NetPolicy::host_only() })
    }

    pub(crate) fn with(network: &Network, number: u32, policy: NetPolicy) -> Self {
        let netns = netns::create().unwrap();
        let spec = PortSpec { desktop: desktop(number), netns: netns.as_fd(), address: None, policy };
        let port = network.attach(&spec).unwrap();
        Self { port, netns }
    }

    pub(crate) fn station(&self) -> Station {
        Station::new(self.port.mac(), self.port.address())
    }

    pub(crate) fn inside<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        netns::in_netns(self.netns.as_fd(), f).unwrap()
    }

    pub(crate) fn socket(&self) -> PacketSocket {
        self.inside(|| PacketSocket::open("eth0", ETHERTYPE_ALL)).unwrap()
    }
}

/// Where a frame was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Seen {
    /// On the bridge as the host has it, or handed up past the bridge.
    pub(crate) host: bool,
    /// By a program of the host.
    pub(crate) program: bool,
    pub(crate) neighbour: bool,
}

/// What a desktop sends by: its own link, or the descriptor of a machine.
#[derive(Debug)]
pub(crate) enum Mouth {
    Link(PacketSocket),
    Tap(OwnedFd),
}

impl Mouth {
    pub(crate) fn send(&self, frame: &[u8]) -> io::Result<()> {
        match self {
            Self::Link(socket) => socket.send(frame),
            Self::Tap(tap) => Ok(rustix::io::write(tap, frame).map(drop)?),
        }
    }
}

/// Two desktops on one host.
pub(crate) struct World {
    pub(crate) network: Network,
    pub(crate) a: Desktop,
    pub(crate) b: Desktop,
    from_a: Mouth,
    at_b: PacketSocket,
    bridge: PacketSocket,
    /// What the bridge hands up on the port itself, by ethertype: sockets for
    /// all ethertypes would hear frames before any filter.
    past_bridge: Vec<PacketSocket>,
    program: UdpSocket,
    next_mark: u32,
}

impl World {
    pub(crate) fn new(without: &[Protection], internet: bool) -> Self {
        Self::with(NetConfig { internet, ..config() }, without)
    }

    /// On a network of this kind; its desktops are let out if any are.
    pub(crate) fn with(config: NetConfig, without: &[Protection]) -> Self {
        let policy = NetPolicy { internet: config.internet, ..NetPolicy::host_only() };
        Self::of(config, policy, without)
    }

    /// The same, whose first desktop has this policy.
    pub(crate) fn of(config: NetConfig, policy: NetPolicy, without: &[Protection]) -> Self {
        one_processor();
        let network = Network::open_without(config, without).unwrap();
        let a = Desktop::with(&network, 7, policy);
        let mouth = Mouth::Link(a.socket());
        Self::around(network, a, mouth)
    }

    /// The same on the second bridge: the first is full.
    pub(crate) fn on_second_bridge(config: NetConfig) -> Self {
        one_processor();
        let network = Network::open(NetConfig { ports_per_bridge: 2, ..config }).unwrap();
        for number in [1, 2] {
            let full = Desktop::new(&network, number, false);
            assert_eq!(full.port.bridge_name(), network.bridge_name());
            full.port.leave();
            std::mem::forget(full.netns);
        }
        let a = Desktop::new(&network, 7, config.internet);
        let mouth = Mouth::Link(a.socket());
        Self::around(network, a, mouth)
    }

    /// The same, whose first desktop is a machine with a tap.
    pub(crate) fn with_tap(config: NetConfig) -> Self {
        Self::of_tap(config, NetPolicy { internet: config.internet, ..NetPolicy::host_only() }, &[])
    }

    /// The same with this policy.
    pub(crate) fn of_tap(config: NetConfig, policy: NetPolicy, without: &[Protection]) -> Self {
        let network = Network::open_without(config, without).unwrap();
        let spec = TapSpec { desktop: desktop(7), address: None, policy, header: false };
        let (port, tap) = network.attach_tap(&spec).unwrap();
        Self::around(network, Desktop { netns: netns::create().unwrap(), port }, Mouth::Tap(tap))
    }

    fn around(network: Network, a: Desktop, from_a: Mouth) -> Self {
        one_processor();
        let b = Desktop::new(&network, 8, network.config().internet);
        let on_port = |ethertype| PacketSocket::open(a.port.link(), ethertype).unwrap();
        let at_b = b.socket();
        let bridge = PacketSocket::open(&a.port.bridge_name(), ETHERTYPE_ALL).unwrap();
        let world = Self {
            from_a,
            at_b,
            bridge,
            // The last is 802.2, as Linux calls frames with a length.
            past_bridge: [frames::IPV4, frames::ARP, frames::IPV6, 0x888e, 0x88cc, 4].map(on_port).into(),
            program: {
                let program = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 4000)).unwrap();
                program.set_nonblocking(true).unwrap();
                program
            },
            next_mark: 0,
            network,
            a,
            b,
        };
        world.connect();
        world
    }

    /// Waits until each end hears the others.
    pub(crate) fn connect(&self) {
        let (own, other, gateway) = (self.a.station(), self.b.station(), self.gateway());
        let arp =
            |to: [u8; 6], from: Station| frames::ethernet(to, from.mac, frames::ARP, &frames::arp(1, from, gateway.ip));
        connected_by(&|frame| self.from_a.send(frame), &arp(frames::BROADCAST, own), &self.bridge);
        connected(&self.at_b, &arp(frames::BROADCAST, other), &self.bridge);
        connected(&self.bridge, &arp(other.mac, gateway), &self.at_b);
        for socket in &self.past_bridge {
            // Each is told once that its link was down.
            let _told = socket.receive(Duration::ZERO);
        }
    }

    /// Whether the frame that controls rest on still comes. Waits a moment only,
    /// and so may say no of a slow machine.
    pub(crate) fn is_heard(&mut self) -> bool {
        let (own, control) = (self.a.station(), self.mark());
        let request = frames::arp(1, own, self.gateway().ip);
        let request = frames::ethernet(frames::BROADCAST, own.mac, frames::ARP, &request);
        self.from_a.send(&[&request[..], &control].concat()).unwrap();
        while let Some(frame) = self.bridge.receive(PATIENCE / 20).unwrap() {
            if holds(&frame, &control) {
                return true;
            }
        }
        false
    }

    /// Whether what the host says still comes. Waits no longer either.
    pub(crate) fn is_told(&mut self) -> bool {
        let (own, gateway, control, at_a) = (self.a.station(), self.gateway(), self.mark(), self.a.socket());
        let reply = frames::ethernet(own.mac, gateway.mac, frames::ARP, &frames::arp(2, gateway, own.ip));
        self.bridge.send(&[&reply[..], &control].concat()).unwrap();
        while let Some(frame) = at_a.receive(PATIENCE / 20).unwrap() {
            if holds(&frame, &control) {
                return true;
            }
        }
        false
    }

    pub(crate) fn gateway(&self) -> Station {
        let ip = subnet().gateway();
        Station::new(crate::Mac::of(INSTANCE, ip), ip)
    }

    pub(crate) fn hostile(&self) -> Vec<(&'static str, Vec<u8>)> {
        frames::hostile(self.a.station(), self.b.station(), self.gateway(), subnet().broadcast())
    }

    pub(crate) fn mark(&mut self) -> [u8; MARK_LEN] {
        self.next_mark += 1;
        let mut mark = *b"qvd-mark....";
        mark[8..].copy_from_slice(&self.next_mark.to_be_bytes());
        mark
    }

    /// The players, as the vectors want them.
    pub(crate) fn cast(&self) -> Cast {
        let six = |station: Station, global| Station6 {
            mac: station.mac,
            link_local: crate::Mac::of(INSTANCE, station.ip).link_local(),
            global,
        };
        let (own, other, gateway) = (self.a.station(), self.b.station(), self.gateway());
        let (own6, other6) = (self.a.port.ipv6().unwrap(), self.b.port.ipv6().unwrap());
        let gateway6 = Subnet6::default_for(INSTANCE).gateway(subnet());
        Cast { own, other, gateway, own6: six(own, own6), other6: six(other, other6), gateway6: six(gateway, gateway6) }
    }

    /// Sends `frame` from the first desktop and finds out where it went.
    pub(crate) fn send(&mut self, frame: &[u8]) -> Seen {
        self.send_marked(frame).1
    }

    /// Those of `vectors` that arrive anywhere when the first desktop sends them.
    pub(crate) fn reached_by<N>(&mut self, vectors: Vec<(N, Vec<u8>)>) -> Vec<(N, Seen)> {
        let sent = vectors.into_iter().map(|(name, frame)| (name, self.send(&frame)));
        sent.filter(|(_, seen)| *seen != Seen::default()).collect()
    }

    /// The same of all hostile ones: the measured matrix, and every further vector.
    pub(crate) fn reached_by_hostile(&mut self) -> Vec<(String, Seen)> {
        let matrix = self.hostile().into_iter().map(|(name, frame)| (name.to_owned(), frame));
        self.reached_by(matrix.chain(vectors::hostile(&self.cast())).collect())
    }

    /// The names of what an honest desktop sends and the host does not hear.
    pub(crate) fn stopped_of_honest(&mut self) -> Vec<String> {
        let honest = vectors::honest(&self.cast()).into_iter();
        honest.filter(|(_, frame)| !self.send(frame).host).map(|(name, _)| name).collect()
    }

    /// As [`World::send`], and what went out with the mark.
    pub(crate) fn send_marked(&mut self, frame: &[u8]) -> (Vec<u8>, Seen) {
        let mark = self.mark();
        let sent = [frame, &mark].concat();
        let seen = self.send_and_listen(&sent, &mark, frame);
        (sent, seen)
    }

    /// Sends `frame` from the first desktop, whatever becomes of it.
    pub(crate) fn send_only(&self, frame: &[u8]) {
        if let Err(error) = self.from_a.send(frame) {
            // What the other end of the link takes no notice of is said to us.
            let refused = [Errno::NOBUFS, Errno::INVAL].map(|errno| Some(errno.raw_os_error()));
            assert!(refused.contains(&error.raw_os_error()), "{error}");
        }
    }

    /// Sends `frame` from the first desktop and finds out where `mark` went.
    pub(crate) fn send_exactly(&mut self, frame: &[u8], mark: &[u8]) -> Seen {
        self.send_and_listen(frame, mark, mark)
    }

    /// Sends a frame as the host, and tells whether the first desktop and the
    /// second hear it.
    pub(crate) fn hears(&mut self, frame: &[u8]) -> [bool; 2] {
        let (mark, gateway, at_a) = (self.mark(), self.gateway(), self.a.socket());
        self.bridge.send(&[frame, &mark].concat()).unwrap();
        let control = self.mark();
        for own in [self.a.station(), self.b.station()] {
            let reply = frames::ethernet(own.mac, gateway.mac, frames::ARP, &frames::arp(2, gateway, own.ip));
            self.bridge.send(&[&reply[..], &control].concat()).unwrap();
        }
        [&at_a, &self.at_b].map(|ear| heard_before(ear, &mark, &control))
    }

    /// The same, also of exactly `bare`: iptables has frames cut to the length
    /// that their packets claim, and so of what is padding.
    fn send_and_listen(&mut self, frame: &[u8], mark: &[u8], bare: &[u8]) -> Seen {
        self.send_only(frame);
        let mut seen = Seen::default();
        // A frame that is allowed goes the same way: without it, silence
        // would prove nothing.
        let control = self.mark();
        let (own, gateway) = (self.a.station(), self.gateway());
        let request = frames::ethernet(frames::BROADCAST, own.mac, frames::ARP, &frames::arp(1, own, gateway.ip));
        self.from_a.send(&[&request[..], &control].concat()).unwrap();
        seen.host |= heard_either_before(&self.bridge, mark, bare, &control);
        for socket in &self.past_bridge {
            while let Some(frame) = socket.receive(Duration::ZERO).unwrap() {
                seen.host |= holds(&frame, mark) || frame == bare;
            }
        }
        let mut packet = [0; 2048];
        while let Ok(length) = self.program.recv(&mut packet) {
            seen.program |= holds(&packet[..length], mark);
        }
        let control = self.mark();
        let frame = frames::ethernet(self.b.station().mac, gateway.mac, frames::ARP, &frames::arp(2, gateway, own.ip));
        self.bridge.send(&[&frame[..], &control].concat()).unwrap();
        seen.neighbour |= heard_either_before(&self.at_b, mark, bare, &control);
        seen
    }
}

pub(crate) fn one_processor() {
    // Frames that one thread sends from one processor are handled in
    // order, so a later one that came proves that an earlier one did not.
    let cpus = sched_getaffinity(None).unwrap();
    let first = (0..CpuSet::MAX_CPU).find(|&cpu| cpus.is_set(cpu)).unwrap();
    let mut one = CpuSet::new();
    one.set(first);
    sched_setaffinity(None, &one).unwrap();
}

/// Waits until what `from` sends comes to `to`: the kernel starts forwarding
/// some time after a link was raised, when it has seen its carrier.
pub(crate) fn connected(from: &PacketSocket, frame: &[u8], to: &PacketSocket) {
    connected_by(&|frame| from.send(frame), frame, to);
}

pub(crate) fn connected_by(send: &dyn Fn(&[u8]) -> io::Result<()>, frame: &[u8], to: &PacketSocket) {
    const TRIES: u32 = 1000;
    let frame = [frame, b"connected?"].concat();
    for _ in 0..TRIES {
        send(&frame).unwrap();
        while let Some(came) = to.receive(PATIENCE / TRIES).unwrap() {
            if holds(&came, b"connected?") {
                return;
            }
        }
    }
    panic!("nothing comes through");
}

pub(crate) fn holds(frame: &[u8], mark: &[u8]) -> bool {
    frame.windows(mark.len()).any(|window| window == mark)
}

/// Frames with `mark` that came before the one with `control`, which has to come.
pub(crate) fn came_before(socket: &PacketSocket, mark: &[u8], control: &[u8]) -> Vec<Vec<u8>> {
    frames_before(socket, |frame| holds(frame, mark), control)
}

/// Whether there were any.
pub(crate) fn heard_before(socket: &PacketSocket, mark: &[u8], control: &[u8]) -> bool {
    !came_before(socket, mark, control).is_empty()
}

fn heard_either_before(socket: &PacketSocket, mark: &[u8], bare: &[u8], control: &[u8]) -> bool {
    !frames_before(socket, |frame| holds(frame, mark) || frame == bare, control).is_empty()
}

fn frames_before(socket: &PacketSocket, wanted: impl Fn(&[u8]) -> bool, control: &[u8]) -> Vec<Vec<u8>> {
    let mut came = Vec::new();
    loop {
        let frame = socket.receive(PATIENCE).unwrap().expect("the control frame did not come");
        let last = holds(&frame, control);
        if wanted(&frame) {
            came.push(frame);
        }
        if last {
            return came;
        }
    }
}
