//! Frames, made by hand: what a hostile desktop sends is what nobody's
//! library would.

use std::net::Ipv4Addr;

use crate::Mac;

pub(crate) const ARP: u16 = 0x0806;
pub(crate) const IPV4: u16 = 0x0800;
pub(crate) const IPV6: u16 = 0x86dd;
pub(crate) const BROADCAST: [u8; 6] = [0xff; 6];
const ICMP: u8 = 1;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// Who sends.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Station {
    pub(crate) mac: [u8; 6],
    pub(crate) ip: Ipv4Addr,
}

impl Station {
    pub(crate) fn new(mac: Mac, ip: Ipv4Addr) -> Self {
        Self { mac: mac.octets(), ip }
    }
}

pub(crate) fn ethernet(to: [u8; 6], from: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &ethertype.to_be_bytes(), payload].concat()
}

/// Puts a tag before the ethertype.
pub(crate) fn tagged(frame: &[u8], protocol: u16, tag: u16) -> Vec<u8> {
    let (addresses, rest) = frame.split_at(12);
    [addresses, &protocol.to_be_bytes(), &tag.to_be_bytes(), rest].concat()
}

pub(crate) fn arp(operation: u16, sender: Station, target: Ipv4Addr) -> Vec<u8> {
    [&[0, 1, 8, 0, 6, 4][..], &operation.to_be_bytes(), &sender.mac, &sender.ip.octets(), &[0; 6], &target.octets()]
        .concat()
}

/// What an IPv4 packet is beside its addresses and payload.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ip<'a> {
    pub(crate) protocol: u8,
    /// Flags and offset of a fragment.
    pub(crate) fragment: u16,
    pub(crate) options: &'a [u8],
}

pub(crate) fn ipv4(from: Ipv4Addr, to: Ipv4Addr, ip: Ip<'_>, payload: &[u8]) -> Vec<u8> {
    let header_len = 20 + ip.options.len();
    // Room for the mark that `World` appends.
    let total = u16::try_from(header_len + payload.len() + super::world::MARK_LEN).unwrap();
    let mut header = vec![0x40 | u8::try_from(header_len / 4).unwrap(), 0];
    header.extend(total.to_be_bytes());
    header.extend([0x12, 0x34]);
    header.extend(ip.fragment.to_be_bytes());
    header.extend([64, ip.protocol, 0, 0]);
    header.extend(from.octets());
    header.extend(to.octets());
    header.extend(ip.options);
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [header, payload.to_vec()].concat()
}

pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// Sets the checksum of a TCP segment: of a wrong one it is no part of a connection.
pub(crate) fn sum_segment(from: Ipv4Addr, to: Ipv4Addr, head: &mut [u8], payload: &[u8]) {
    let length = u16::try_from(head.len() + payload.len()).unwrap().to_be_bytes();
    let sum = checksum(&[&from.octets()[..], &to.octets(), &[0, 6], &length, head, payload].concat());
    head[16..18].copy_from_slice(&sum.to_be_bytes());
}

/// An echo request that `mark` completes.
pub(crate) fn echo_request(from: Ipv4Addr, to: Ipv4Addr, mark: &[u8; super::world::MARK_LEN]) -> Vec<u8> {
    let mut header = [8, 0, 0, 0, 0, 1, 0, 1];
    let sum = checksum(&[&header[..], mark].concat());
    header[2..4].copy_from_slice(&sum.to_be_bytes());
    [ipv4(from, to, Ip { protocol: ICMP, ..Ip::default() }, &header), mark.to_vec()].concat()
}

pub(crate) fn udp(from: Ipv4Addr, to: Ipv4Addr, ports: (u16, u16)) -> Vec<u8> {
    ipv4(from, to, Ip { protocol: UDP, ..Ip::default() }, &udp_header(ports))
}

pub(crate) fn udp_header((from, to): (u16, u16)) -> Vec<u8> {
    let length = u16::try_from(8 + super::world::MARK_LEN).unwrap();
    // No checksum.
    [from, to, length, 0].map(u16::to_be_bytes).concat()
}

pub(crate) fn icmp(from: Ipv4Addr, to: Ipv4Addr, kind: u8, code: u8) -> Vec<u8> {
    ipv4(from, to, Ip { protocol: ICMP, ..Ip::default() }, &[kind, code, 0, 0, 0, 0, 0, 0])
}

pub(crate) fn ipv6(next: u8, to: [u8; 16], payload: &[u8]) -> Vec<u8> {
    let from = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0x50, 0, 0, 0xff, 0xfe, 0, 0, 1];
    let length = u16::try_from(payload.len() + super::world::MARK_LEN).unwrap();
    [&[0x60, 0, 0, 0][..], &length.to_be_bytes(), &[next, 255], &from, &to, payload].concat()
}

/// Every frame kind of the measured matrix, under its name there. `own` sends
/// them; `other` is its neighbour.
pub(crate) fn hostile(
    own: Station,
    other: Station,
    gateway: Station,
    broadcast: Ipv4Addr,
) -> Vec<(&'static str, Vec<u8>)> {
    let all_nodes = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let to_gateway = |ethertype, payload: Vec<u8>| ethernet(gateway.mac, own.mac, ethertype, &payload);
    let to_all = |ethertype, payload: Vec<u8>| ethernet(BROADCAST, own.mac, ethertype, &payload);
    let v6 = |payload: Vec<u8>| ethernet([0x33, 0x33, 0, 0, 0, 1], own.mac, IPV6, &payload);
    let icmp6 = |kind: u8| v6(ipv6(ICMPV6, all_nodes, &[kind, 0, 0, 0, 0, 0, 0, 0]));
    let plain = udp(own.ip, gateway.ip, (5000, 6000));
    let protocol = |protocol| Ip { protocol, ..Ip::default() };
    let lsrr = Ip { options: &[131, 7, 4, 10, 0, 0, 1, 0], ..protocol(UDP) };
    let fragment = |fragment| Ip { fragment, ..protocol(UDP) };
    let group = |last| Ipv4Addr::new(224, 0, 0, last);
    let group_mac = |last| [1, 0, 0x5e, 0, 0, last];
    let request = arp(1, own, gateway.ip);
    vec![
        ("mac spoof", ethernet(gateway.mac, [0x52, 9, 9, 9, 9, 9], IPV4, &plain)),
        ("arp claims gateway", to_all(ARP, arp(2, Station { ip: gateway.ip, ..own }, own.ip))),
        ("gratuitous arp for neighbour", to_all(ARP, arp(1, Station { ip: other.ip, ..own }, other.ip))),
        ("arp sender mac mismatch", to_all(ARP, arp(1, Station { ip: own.ip, ..other }, gateway.ip))),
        ("rarp", to_all(0x8035, arp(3, own, gateway.ip))),
        ("ipv4 source spoof", to_gateway(IPV4, udp(other.ip, gateway.ip, (5000, 6000)))),
        ("spoofed icmp error", to_gateway(IPV4, icmp(gateway.ip, other.ip, 3, 1))),
        ("ipv4 options", to_gateway(IPV4, ipv4(own.ip, gateway.ip, lsrr, &udp_header((5000, 6000))))),
        ("first fragment", to_gateway(IPV4, ipv4(own.ip, gateway.ip, fragment(0x2000), &udp_header((5000, 6000))))),
        ("later fragment", to_gateway(IPV4, ipv4(own.ip, gateway.ip, fragment(1), &[0; 8]))),
        ("dhcp server, broadcast", to_all(IPV4, udp(own.ip, Ipv4Addr::BROADCAST, (67, 68)))),
        ("dhcp server, unicast", to_gateway(IPV4, udp(own.ip, gateway.ip, (67, 68)))),
        ("other ip protocol", to_gateway(IPV4, ipv4(own.ip, gateway.ip, protocol(47), &[0; 8]))),
        ("ipv6 source spoof", v6(ipv6(UDP, all_nodes, &udp_header((5000, 6000))))),
        ("dhcpv6 server", v6(ipv6(UDP, all_nodes, &udp_header((547, 546))))),
        ("router advertisement", icmp6(134)),
        ("router advertisement behind options", v6(ipv6(60, all_nodes, &[ICMPV6, 0, 1, 4, 0, 0, 0, 0, 134, 0, 0, 0]))),
        ("router advertisement in a fragment", v6(ipv6(44, all_nodes, &[60, 0, 0, 1, 0, 0, 0, 9, ICMPV6, 0, 1, 4]))),
        ("neighbour advertisement", icmp6(136)),
        ("neighbour solicitation", icmp6(135)),
        ("icmpv6 redirect", icmp6(137)),
        ("ipv6 routing header", v6(ipv6(43, all_nodes, &[UDP, 2, 0, 1, 0, 0, 0, 0]))),
        ("mld query", v6(ipv6(0, all_nodes, &[ICMPV6, 0, 5, 2, 0, 0, 1, 0, 130, 0, 0, 0]))),
        ("802.1q ip spoof", tagged(&to_gateway(IPV4, udp(other.ip, gateway.ip, (5000, 6000))), 0x8100, 7)),
        ("802.1q own address", tagged(&to_gateway(IPV4, plain.clone()), 0x8100, 7)),
        ("priority-tagged arp", tagged(&to_all(ARP, request.clone()), 0x8100, 0x2000)),
        ("q-in-q", tagged(&tagged(&to_gateway(IPV4, plain.clone()), 0x8100, 7), 0x88a8, 8)),
        // The length of an 802.3 frame stands where others have the ethertype.
        ("stp bpdu", ethernet([1, 0x80, 0xc2, 0, 0, 0], own.mac, 0x26, &[0x42, 0x42, 3, 0, 0, 0, 0, 0])),
        ("pppoe", to_all(0x8863, vec![0x11, 9, 0, 0, 0, 0])),
        ("eapol", ethernet([1, 0x80, 0xc2, 0, 0, 3], own.mac, 0x888e, &[1, 1, 0, 0])),
        (
            "ip to reserved multicast",
            ethernet([1, 0x80, 0xc2, 0, 0, 3], own.mac, IPV4, &udp(own.ip, gateway.ip, (5000, 4000))),
        ),
        ("igmp query", ethernet(group_mac(1), own.mac, IPV4, &ipv4(own.ip, group(1), protocol(2), &[0x11, 0, 0, 0]))),
        ("mdns answer", ethernet(group_mac(251), own.mac, IPV4, &udp(own.ip, group(251), (5353, 5353)))),
        ("multicast in a unicast frame", to_gateway(IPV4, udp(own.ip, group(251), (5353, 5353)))),
        ("ipv4 broadcast", to_all(IPV4, udp(own.ip, Ipv4Addr::BROADCAST, (5000, 6000)))),
        ("subnet broadcast", to_gateway(IPV4, udp(own.ip, broadcast, (5000, 6000)))),
        ("unicast to neighbour", ethernet(other.mac, own.mac, IPV4, &udp(own.ip, other.ip, (5000, 6000)))),
        ("arp to neighbour", ethernet(other.mac, own.mac, ARP, &arp(1, own, other.ip))),
        ("unknown ethertype", to_all(0x88b5, vec![0; 8])),
    ]
}
