//! Small stories of a desktop and what is behind its port, told in words that can be
//! compared: who hears what, as what it arrives, and what is counted.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::AsFd as _,
};

use qvd_core::NetPolicy;
use qvd_sys::{netns, packet::PacketSocket};
use rustix::net::AddressFamily;

use super::{
    frames,
    groups::{GROUP, GROUP6, ROUTER_ALERT, igmp},
    internet::{OUTSIDE, OUTSIDE6, UPLINK, wait_for_bridge},
    mutation::grown,
    site::{FAR6, Site, with_names},
    vectors::{link_option, neighbour_discovery, solicited_node, summed},
    world::{Desktop, INSTANCE, MARK_LEN, PATIENCE, came_before, desktop, heard_before, holds, subnet},
};
use crate::{
    Backend, DropReason, Mac, NetConfig, PortSpec, Subnet6, identity::REPORTS, netlink::Netlink, network::find,
};

/// Where programs of the host listen, in both families.
pub(super) const SERVICE: u16 = 4100;
/// The address of the first desktop of a site.
pub(super) const OWN: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 8);
/// The same of the second.
pub(super) const NEIGHBOUR: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 9);
/// Where a program of the desktop answers.
pub(super) const INSIDE: u16 = 7000;

/// Something that is done and seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Story {
    /// A packet of the desktop's, of a flow of its own.
    Packet(IpAddr, u8, u16),
    /// What answers such a packet from outside.
    Answer(IpAddr),
    /// What the desktop says about such an answer that it has no use for.
    Related(IpAddr),
    /// A packet from outside that nobody asked for.
    Unasked(IpAddr),
    /// The first segment of a connection, that promises to take longer ones than can come.
    Segment(IpAddr),
    /// The last of one that never was.
    Reset(IpAddr),
    /// A question to the gateway that its kernel answers.
    Echo(IpAddr),
    /// A question for the gateway's link address.
    Solicitation,
    /// What says the desktop's own.
    Advertisement,
    /// A question from this address of the host's to a program of the desktop's.
    Asked(IpAddr),
    /// A packet to a group.
    Group(IpAddr),
    /// The same, from the desktop's address of the link.
    GroupOfLink,
    /// A packet from outside to a group that a multicast router of the host's takes in.
    Routed(IpAddr),
    /// A packet of the second desktop's to this address of the first.
    Visit(IpAddr),
    /// What says which groups the desktop is in, to who routes groups.
    Report,
    /// Several connections; how many get out.
    Connections(IpAddr),
    /// Many long packets; whether most get out.
    Burst(IpAddr),
}

impl Story {
    /// Whether it is one of IPv4.
    pub(super) fn is_ipv4(self) -> bool {
        match self {
            Self::Packet(with, ..)
            | Self::Answer(with)
            | Self::Related(with)
            | Self::Unasked(with)
            | Self::Segment(with)
            | Self::Reset(with)
            | Self::Echo(with)
            | Self::Asked(with)
            | Self::Group(with)
            | Self::Routed(with)
            | Self::Visit(with)
            | Self::Connections(with)
            | Self::Burst(with) => with.is_ipv4(),
            Self::Report => true,
            Self::Solicitation | Self::Advertisement | Self::GroupOfLink => false,
        }
    }
}

/// A site with programs that listen.
pub(super) struct Stage {
    pub(super) site: Site,
    at_a: PacketSocket,
    programs: [UdpSocket; 4],
    /// Of both families.
    pub(super) inside: UdpSocket,
    /// The link address of the host's that outside knows.
    uplink: [u8; 6],
}

pub(super) fn gateway6() -> Ipv6Addr {
    Subnet6::default_for(INSTANCE).gateway(subnet())
}

/// The gateway's address of the link.
pub(super) fn gateway_of_link() -> Ipv6Addr {
    Mac::of(INSTANCE, subnet().gateway()).link_local()
}

/// A socket of all that the host gets of a protocol.
fn raw(family: AddressFamily, protocol: u8) -> UdpSocket {
    let protocol = rustix::net::Protocol::from_raw(u32::from(protocol).try_into().unwrap());
    rustix::net::socket(family, rustix::net::SocketType::RAW, Some(protocol)).unwrap().into()
}

impl Stage {
    pub(super) fn new(backend: Backend, policy: NetPolicy, beside: NetPolicy) -> Self {
        let config = NetConfig { name_server6: Some(FAR6), ..with_names(backend) };
        Self::on(Site::new(config, policy, beside))
    }

    pub(super) fn on(site: Site) -> Self {
        let bridge = find(&mut Netlink::route().unwrap(), &site.network.bridge_name()).unwrap().unwrap().index;
        let four = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, SERVICE)).unwrap();
        four.join_multicast_v4(&GROUP, &subnet().gateway()).unwrap();
        let six = rustix::net::socket(AddressFamily::INET6, rustix::net::SocketType::DGRAM, None).unwrap();
        rustix::net::sockopt::set_ipv6_v6only(&six, true).unwrap();
        rustix::net::bind(&six, &std::net::SocketAddr::from((Ipv6Addr::UNSPECIFIED, SERVICE))).unwrap();
        let six = UdpSocket::from(six);
        six.join_multicast_v6(&GROUP6, bridge).unwrap();
        let (reports, messages) = (raw(AddressFamily::INET, 2), raw(AddressFamily::INET6, 58));
        reports.join_multicast_v4(&REPORTS, &subnet().gateway()).unwrap();
        let programs = [four, six, reports, messages];
        programs.iter().for_each(|program| program.set_nonblocking(true).unwrap());
        let inside = site.a.inside(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, INSIDE))).unwrap();
        inside.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!((site.b.port.address(), site.b.port.ipv6()), (NEIGHBOUR, Some(in_ipv6(NEIGHBOUR))));
        let mut stage = Self { at_a: site.a.socket(), site, programs, inside, uplink: [0; 6] };
        let mark = stage.site.mark();
        UdpSocket::bind((UPLINK, 0)).unwrap().send_to(&mark, (OUTSIDE, 9)).unwrap();
        let went = stage.site.passing(&mark).pop().unwrap();
        stage.uplink.copy_from_slice(&went[6..12]);
        stage
    }

    /// Another desktop instead of the first, with its address.
    pub(super) fn replace(&mut self, number: u32) {
        let (address, policy) = (self.site.a.port.address(), self.site.a.port.policy().clone());
        self.site.a.port.close().unwrap();
        let netns = netns::create().unwrap();
        let spec = PortSpec { desktop: desktop(number), netns: netns.as_fd(), address: Some(address), policy };
        let port = self.site.network.attach(&spec).unwrap();
        self.site.a = Desktop { netns, port };
        wait_for_bridge(&self.site.network, &self.site.a);
        (self.site.from_a, self.at_a) = (self.site.a.socket(), self.site.a.socket());
        self.inside = self.site.a.inside(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, INSIDE))).unwrap();
    }

    /// What a story comes to, in words to be compared.
    pub(super) fn tell(&mut self, story: Story) -> String {
        match story {
            Story::Packet(to, protocol, port) => {
                let (frame, mark) = self.site.frame(to, protocol, port);
                self.fate(&frame, &mark)
            }
            Story::Segment(to) => {
                let (frame, mark) = self.segment(to, 0x02);
                self.fate(&frame, &mark)
            }
            Story::Reset(to) => {
                let (frame, mark) = self.segment(to, 0x04);
                self.fate(&frame, &mark)
            }
            Story::Echo(to) => {
                let (frame, mark) = self.echo(to);
                self.fate(&frame, &mark)
            }
            Story::Solicitation => {
                let (own, own6) = (self.site.a.station(), self.site.a.port.ipv6().unwrap());
                let group = solicited_node(gateway6());
                let question = neighbour_discovery(135, gateway6(), &link_option(1, own.mac));
                let packet = summed(own6, group, 58, 255, &question, 2);
                let frame = frames::ethernet(Mac::of_group(group.into()).octets(), own.mac, frames::IPV6, &packet);
                // The answer names the link's address after the one that was asked for.
                self.fate(&frame, &[&gateway6().octets()[..], &[2, 1]].concat())
            }
            Story::Advertisement => {
                let (own, own6) = (self.site.a.station(), self.site.a.port.ipv6().unwrap());
                let answer = neighbour_discovery(136, own6, &link_option(2, own.mac));
                let packet = summed(own6, gateway6(), 58, 255, &answer, 2);
                let frame = frames::ethernet(self.site.gateway().mac, own.mac, frames::IPV6, &packet);
                self.fate(&frame, &[&own6.octets()[..], &[2, 1]].concat())
            }
            Story::Report => {
                let (own, mark) = (self.site.a.station(), self.site.mark());
                let report = [&igmp(own.ip, REPORTS, 1, ROUTER_ALERT, 0x22)[..], &mark].concat();
                let to = Mac::of_group(REPORTS.into()).octets();
                self.fate(&frames::ethernet(to, own.mac, frames::IPV4, &report), &mark)
            }
            Story::Group(group) => {
                let (mut frame, mark) = self.site.frame(group, 17, SERVICE);
                frame[..6].copy_from_slice(&Mac::of_group(group).octets());
                self.fate(&frame, &mark)
            }
            Story::GroupOfLink => {
                let (own, mark) = (self.site.a.station(), self.site.mark());
                let from = self.site.a.port.mac().link_local().into();
                let (ethertype, packet) = datagram((from, 5000), (GROUP6.into(), SERVICE), &mark);
                self.fate(&frames::ethernet(Mac::of_group(GROUP6.into()).octets(), own.mac, ethertype, &packet), &mark)
            }
            Story::Visit(to) => {
                let (other, gateway, mark) = (self.site.b.station(), self.site.gateway(), self.site.mark());
                let from = if to.is_ipv4() { NEIGHBOUR.into() } else { in_ipv6(NEIGHBOUR).into() };
                let (ethertype, packet) = datagram((from, 5000), (to, 443), &mark);
                self.site.at_b.send(&frames::ethernet(gateway.mac, other.mac, ethertype, &packet)).unwrap();
                let _gone = self.site.passing(&mark);
                let control = self.site.mark();
                self.site.host_says(self.site.a.station(), &control);
                format!("came {:?}", came_before(&self.at_a, &mark, &control).first().map(|frame| seen(frame)))
            }
            Story::Answer(to) => self.answered(to).0,
            Story::Related(to) => self.related(to),
            Story::Unasked(from) => {
                let to: IpAddr = match from {
                    IpAddr::V4(_) => self.site.a.station().ip.into(),
                    IpAddr::V6(_) => self.site.a.port.ipv6().unwrap().into(),
                };
                let mark = self.site.mark();
                let packet = datagram((from, 443), (to, 9), &mark);
                self.outside_says(&packet, &mark)
            }
            Story::Routed(group) => self.routed(group),
            Story::Asked(by) => self.asked(by),
            Story::Connections(to) => {
                let begun = (0..6).filter(|_| {
                    let (frame, mark) = self.site.frame(to, 17, 443);
                    self.site.arrives(&frame, &mark)
                });
                format!("{} connections", begun.count())
            }
            Story::Burst(to) => {
                let mut out = 0;
                // No more at once than a socket has room for.
                for _ in 0..8 {
                    let (frame, mark) = self.long(to);
                    (0..50).for_each(|_| self.site.from_a.send(&frame).unwrap());
                    out += self.site.passing(&mark).len();
                }
                format!("most went out: {}", out > 200)
            }
        }
    }

    /// What was dropped, where it takes no time to ask.
    fn counted(&self) -> BTreeMap<DropReason, u64> {
        let is_quick = self.site.network.config().backend == Backend::Nft;
        if is_quick { self.site.a.port.drops().unwrap() } else { BTreeMap::new() }
    }

    /// Sends a packet of the desktop's and looks where it went, what it looks like there,
    /// whether `needle` comes back, and what is counted.
    fn fate(&mut self, frame: &[u8], needle: &[u8]) -> String {
        let before = self.counted();
        self.site.from_a.send(frame).unwrap();
        let outside = self.site.passing(needle).first().map(|frame| seen(frame));
        let (control, own) = (self.site.mark(), self.site.a.station());
        for to in [own, self.site.b.station()] {
            self.site.host_says(to, &control);
        }
        let answered =
            came_before(&self.at_a, needle, &control).iter().any(|frame| frame[..6] == own.mac && !is_notice(frame));
        let neighbour = came_before(&self.site.at_b, needle, &control).first().map(|frame| seen(frame));
        let mut packet = [0; 2048];
        let mut program = false;
        for socket in &self.programs {
            while let Ok(length) = socket.recv(&mut packet) {
                program |= holds(&packet[..length], needle);
            }
        }
        let reasons = grown(&before, self.counted());
        format!("outside {outside:?}, neighbour {neighbour:?}, program {program}, answered {answered}, {reasons:?}")
    }

    /// Sends a packet to the host from outside, and tells whether the desktop gets it.
    pub(super) fn outside_says(&mut self, packet: &(u16, Vec<u8>), mark: &[u8]) -> String {
        let control = self.site.mark();
        let (ethertype, packet) = packet;
        let outside = Mac::of(INSTANCE, OUTSIDE).octets();
        self.site.at_outside.send(&frames::ethernet(self.uplink, outside, *ethertype, packet)).unwrap();
        self.site.at_outside.send(&[&[0xff; 60][..], &control].concat()).unwrap();
        heard_before(&self.site.uplink, mark, &control);
        let own = self.site.a.station();
        self.site.host_says(own, &control);
        let came = came_before(&self.at_a, mark, &control);
        format!("came {}", came.iter().any(|frame| frame[..6] == own.mac))
    }

    /// Who hears what is routed to a group from outside.
    fn routed(&mut self, group: IpAddr) -> String {
        let mut route = Netlink::route().unwrap();
        let links = ["uplink", &*self.site.network.bridge_name()];
        let links = links.map(|link| find(&mut route, link).unwrap().unwrap().index);
        let from: IpAddr = if group.is_ipv4() { OUTSIDE.into() } else { OUTSIDE6.into() };
        let _router = qvd_sys::multicast::route(links, from, group).unwrap();
        let (mark, control) = (self.site.mark(), self.site.mark());
        let (ethertype, packet) = datagram((from, 443), (group, 9), &mark);
        let (to, outside) = (Mac::of_group(group).octets(), Mac::of(INSTANCE, OUTSIDE).octets());
        self.site.at_outside.send(&frames::ethernet(to, outside, ethertype, &packet)).unwrap();
        self.site.at_outside.send(&[&[0xff; 60][..], &control].concat()).unwrap();
        assert!(heard_before(&self.site.uplink, &mark, &control));
        for to in [self.site.a.station(), self.site.b.station()] {
            self.site.host_says(to, &control);
        }
        let [a, b] = [&self.at_a, &self.site.at_b].map(|ear| heard_before(ear, &mark, &control));
        format!("the first hears {a}, the second {b}")
    }

    /// What comes of an answer to a packet that went out, and what was said.
    fn answered(&mut self, to: IpAddr) -> (String, Vec<u8>) {
        let (frame, mark) = self.site.frame(to, 17, 443);
        self.site.from_a.send(&frame).unwrap();
        let Some(went) = self.site.passing(&mark).pop() else {
            return ("nothing went out".to_owned(), frame);
        };
        let mark = self.site.mark();
        let (from, port) = sender(&went);
        let packet = datagram((to, 443), (from, port), &mark);
        (self.outside_says(&packet, &mark), frame)
    }

    /// What comes of an error about an answer to a packet that went out.
    fn related(&mut self, to: IpAddr) -> String {
        let (_, asked) = self.answered(to);
        let (own, gateway, mark) = (self.site.a.station(), self.site.gateway(), self.site.mark());
        let (from, port) = sender(&asked);
        let (ethertype, answer) = datagram((to, 443), (from, port), &mark);
        // Destination unreachable, because of the port, with the packet's beginning
        // (RFC 792; RFC 4443, section 3.1).
        let packet = match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut message = [&[3, 3, 0, 0, 0, 0, 0, 0][..], &answer[..28]].concat();
                let sum = frames::checksum(&[&message[..], &mark].concat());
                message[2..4].copy_from_slice(&sum.to_be_bytes());
                let packet = frames::ipv4(from, to, frames::Ip { protocol: 1, ..frames::Ip::default() }, &message);
                [&packet[..], &mark].concat()
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let message = [&[1, 4, 0, 0, 0, 0, 0, 0][..], &answer[..48], &mark].concat();
                summed(from, to, 58, 64, &message, 2)
            }
            _ => panic!("{from} and {to} are of two families"),
        };
        self.fate(&frames::ethernet(gateway.mac, own.mac, ethertype, &packet), &mark)
    }

    /// Whether the host hears what a program of the desktop's answers.
    fn asked(&mut self, by: IpAddr) -> String {
        let own: IpAddr = match by {
            IpAddr::V4(_) => self.site.a.port.address().into(),
            IpAddr::V6(_) => self.site.a.port.ipv6().unwrap().into(),
        };
        let host = UdpSocket::bind((by, 0)).unwrap();
        host.set_nonblocking(true).unwrap();
        host.send_to(b"question", (own, INSIDE)).unwrap();
        let mut packet = [0; 64];
        let (length, from) = self.inside.recv_from(&mut packet).unwrap();
        self.inside.send_to(&packet[..length], from).unwrap();
        let _gone = self.site.passing(b"no such mark");
        format!("the host hears {}", host.recv(&mut packet).is_ok())
    }

    /// A segment with these flags and the longest MSS that there is, to another host.
    fn segment(&mut self, to: IpAddr, flags: u8) -> (Vec<u8>, [u8; MARK_LEN]) {
        let (own, gateway, mark) = (self.site.a.station(), self.site.gateway(), self.site.mark());
        let ports = [&mark[10..], &[0, 9]].concat();
        let mut head =
            [&ports[..], &[0, 0, 0, 1, 0, 0, 0, 0, 0x60, flags, 4, 0, 0, 0, 0, 0, 2, 4, 0xff, 0xff]].concat();
        let (ethertype, packet) = match to {
            IpAddr::V4(to) => {
                frames::sum_segment(own.ip, to, &mut head, &mark);
                let packet = frames::ipv4(own.ip, to, frames::Ip { protocol: 6, ..frames::Ip::default() }, &head);
                (frames::IPV4, [&packet[..], &mark].concat())
            }
            IpAddr::V6(to) => {
                let own6 = self.site.a.port.ipv6().unwrap();
                (frames::IPV6, summed(own6, to, 6, 64, &[&head[..], &mark].concat(), 16))
            }
        };
        (frames::ethernet(gateway.mac, own.mac, ethertype, &packet), mark)
    }

    /// An echo request of a number of its own: answers to others are let in as such.
    fn echo(&mut self, to: IpAddr) -> (Vec<u8>, [u8; MARK_LEN]) {
        let (own, gateway, mark) = (self.site.a.station(), self.site.gateway(), self.site.mark());
        let message = |kind: u8| [&[kind, 0, 0, 0][..], &mark[10..], &[0, 1], &mark].concat();
        let (ethertype, packet) = match to {
            IpAddr::V4(to) => {
                let mut message = message(8);
                let sum = frames::checksum(&message);
                message[2..4].copy_from_slice(&sum.to_be_bytes());
                let mut packet =
                    frames::ipv4(own.ip, to, frames::Ip { protocol: 1, ..frames::Ip::default() }, &message[..8]);
                packet.extend(mark);
                (frames::IPV4, packet)
            }
            IpAddr::V6(to) => (frames::IPV6, summed(self.site.own6(to), to, 58, 64, &message(128), 2)),
        };
        (frames::ethernet(gateway.mac, own.mac, ethertype, &packet), mark)
    }

    fn long(&mut self, to: IpAddr) -> (Vec<u8>, [u8; MARK_LEN]) {
        let (own, gateway, mark) = (self.site.a.station(), self.site.gateway(), self.site.mark());
        let head = [&[5000_u16, 443, 1008, 0].map(u16::to_be_bytes).concat()[..], &[0; 988]].concat();
        let (ethertype, packet) = match to {
            IpAddr::V4(to) => {
                let packet = frames::ipv4(own.ip, to, frames::Ip { protocol: 17, ..frames::Ip::default() }, &head);
                (frames::IPV4, [&packet[..], &mark].concat())
            }
            IpAddr::V6(to) => {
                let own6 = self.site.a.port.ipv6().unwrap();
                (frames::IPV6, summed(own6, to, 17, 64, &[&head[..], &mark].concat(), 6))
            }
        };
        (frames::ethernet(gateway.mac, own.mac, ethertype, &packet), mark)
    }
}

/// Whether a kernel says by it that a packet went wrong or has a shorter way, which it
/// does only so often.
fn is_notice(frame: &[u8]) -> bool {
    let of =
        |ethertype: u16, next: usize, protocol| frame[12..14] == ethertype.to_be_bytes() && frame[next] == protocol;
    (of(frames::IPV4, 23, 1) && matches!(frame[34], 3 | 5))
        || (of(frames::IPV6, 20, 58) && matches!(frame[54], 1 | 137))
}

/// A datagram that ends with `mark`, behind its ethertype.
pub(super) fn datagram((from, port): (IpAddr, u16), (to, at): (IpAddr, u16), mark: &[u8; MARK_LEN]) -> (u16, Vec<u8>) {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (frames::IPV4, [&frames::udp(from, to, (port, at))[..], mark].concat()),
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let payload = [&frames::udp_header((port, at))[..], mark].concat();
            (frames::IPV6, summed(from, to, 17, 64, &payload, 6))
        }
        _ => panic!("{from} and {to} are of two families"),
    }
}

/// Whom a datagram says it is from.
pub(super) fn sender(frame: &[u8]) -> (IpAddr, u16) {
    let port = |at: usize| u16::from_be_bytes(frame[at..at + 2].try_into().unwrap());
    if frame[12..14] == frames::IPV4.to_be_bytes() {
        let ip: [u8; 4] = frame[26..30].try_into().unwrap();
        return (ip.into(), port(34));
    }
    let ip: [u8; 16] = frame[22..38].try_into().unwrap();
    (ip.into(), port(54))
}

/// What rules may change of a packet: both addresses, and the MSS of a segment that has one.
fn seen(frame: &[u8]) -> (IpAddr, IpAddr, Option<[u8; 2]>) {
    let (from, _) = sender(frame);
    let (to, protocol, head): (IpAddr, u8, usize) = if from.is_ipv6() {
        let to: [u8; 16] = frame[38..54].try_into().unwrap();
        (to.into(), frame[20], 54)
    } else {
        let to: [u8; 4] = frame[30..34].try_into().unwrap();
        (to.into(), frame[23], 34)
    };
    let has_mss = protocol == 6 && frame[head + 12] == 0x60;
    (from, to, has_mss.then(|| [frame[head + 22], frame[head + 23]]))
}

/// The address of IPv6 that goes with one.
pub(super) fn in_ipv6(address: Ipv4Addr) -> Ipv6Addr {
    Subnet6::default_for(INSTANCE).address(subnet(), address)
}
