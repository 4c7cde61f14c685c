//! From frames to messages and back, with `etherparse`.

use std::net::{Ipv4Addr, Ipv6Addr};

use etherparse::{EtherType, Icmpv6Slice, IpNumber, Ipv4Slice, Ipv6Slice, PacketBuilder, UdpSlice, icmpv6};

use super::{Guest, Site};

pub(super) const DHCP4_SERVER: u16 = 67;
pub(super) const DHCP4_CLIENT: u16 = 68;
pub(super) const DHCP6_SERVER: u16 = 547;
pub(super) const DHCP6_CLIENT: u16 = 546;

/// Packets from here do not pass a router.
const HOP_LIMIT: u8 = 255;

/// A question, as far as the frame around it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard<'a> {
    Dhcp4(&'a [u8]),
    Dhcp6 { from: Ipv6Addr, message: &'a [u8] },
    RouterSolicitation,
}

/// Who sent `frame` and what it asks, if it is a question at all.
pub(super) fn open(frame: &[u8]) -> Option<([u8; 6], Heard<'_>)> {
    let ethernet = etherparse::Ethernet2Slice::from_slice_without_fcs(frame).ok()?;
    let payload = ethernet.payload_slice();
    let heard = match ethernet.ether_type() {
        EtherType::IPV4 => open4(payload),
        EtherType::IPV6 => open6(payload),
        _ => None,
    }?;
    Some((ethernet.source(), heard))
}

fn open4(packet: &[u8]) -> Option<Heard<'_>> {
    let packet = Ipv4Slice::from_slice(packet).ok()?;
    if packet.is_payload_fragmented() || packet.payload_ip_number() != IpNumber::UDP {
        return None;
    }
    let udp = UdpSlice::from_slice(packet.payload().payload).ok()?;
    let ports = (udp.source_port(), udp.destination_port());
    (ports == (DHCP4_CLIENT, DHCP4_SERVER)).then_some(Heard::Dhcp4(udp.payload()))
}

fn open6(packet: &[u8]) -> Option<Heard<'_>> {
    let packet = Ipv6Slice::from_slice(packet).ok()?;
    let header = packet.header();
    // No extension headers: the payload follows at once.
    if packet.is_payload_fragmented() || header.next_header() != packet.payload().ip_number {
        return None;
    }
    match packet.payload().ip_number {
        IpNumber::UDP => {
            let udp = UdpSlice::from_slice(packet.payload().payload).ok()?;
            let (from, to) = (header.source_addr(), udp.destination_port());
            let is_request = udp.source_port() == DHCP6_CLIENT && to == DHCP6_SERVER && from.is_unicast_link_local();
            is_request.then_some(Heard::Dhcp6 { from, message: udp.payload() })
        }
        IpNumber::IPV6_ICMP => {
            let message = Icmpv6Slice::from_slice(packet.payload().payload).ok()?;
            // On the link (RFC 4861, 6.1.1); the answer goes to the guest
            // whatever else it says.
            let is_solicitation = header.hop_limit() == HOP_LIMIT
                && message.type_u8() == icmpv6::TYPE_ROUTER_SOLICITATION
                && message.is_checksum_valid(header.source(), header.destination());
            is_solicitation.then_some(Heard::RouterSolicitation)
        }
        _ => None,
    }
}

/// A frame of the gateway to `guest` with an answer of `DHCPv4`. Its MAC is the
/// guest's also when the packet is for everybody: nothing is flooded to ports.
pub(super) fn dhcp4(site: &Site, guest: &Guest, to: Ipv4Addr, message: &[u8]) -> Option<Vec<u8>> {
    const TTL: u8 = 64;
    let builder = PacketBuilder::ethernet2(site.gateway_mac.octets(), guest.mac.octets())
        .ipv4(site.subnet.gateway().octets(), to.octets(), TTL)
        .udp(DHCP4_SERVER, DHCP4_CLIENT);
    let mut frame = Vec::with_capacity(builder.size(message.len()));
    builder.write(&mut frame, message).ok()?;
    Some(frame)
}

/// The same with an answer of `DHCPv6`.
pub(super) fn dhcp6(site: &Site, guest: &Guest, to: Ipv6Addr, message: &[u8]) -> Option<Vec<u8>> {
    let builder = PacketBuilder::ethernet2(site.gateway_mac.octets(), guest.mac.octets())
        .ipv6(site.gateway_ipv6?.octets(), to.octets(), HOP_LIMIT)
        .udp(DHCP6_SERVER, DHCP6_CLIENT);
    let mut frame = Vec::with_capacity(builder.size(message.len()));
    builder.write(&mut frame, message).ok()?;
    Some(frame)
}

/// The same with a message of neighbour discovery to all nodes: to the guest's
/// MAC, so that it alone hears it.
pub(super) fn icmp6(site: &Site, guest: &Guest, kind: etherparse::Icmpv6Type, payload: &[u8]) -> Option<Vec<u8>> {
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let builder = PacketBuilder::ethernet2(site.gateway_mac.octets(), guest.mac.octets())
        .ipv6(site.gateway_ipv6?.octets(), ALL_NODES.octets(), HOP_LIMIT)
        .icmpv6(kind);
    let mut frame = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut frame, payload).ok()?;
    Some(frame)
}
