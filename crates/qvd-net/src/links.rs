//! Requests to routing netlink, and what is read from its answers.

use std::{
    net::IpAddr,
    os::fd::{AsRawFd, BorrowedFd},
};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
    link::{
        AfSpecInet6, AfSpecUnspec, BridgeStpState, In6AddrGenMode, InfoBridge, InfoBridgePort, InfoData, InfoKind,
        InfoPortData, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType},
};

use crate::{Backend, Mac, netlink};

pub(crate) type Request = netlink::Request<RouteNetlinkMessage>;

/// Name of a desktop's link as it sees it.
pub(crate) const INSIDE_NAME: &str = "eth0";

/// Index of the loopback interface: the first of every network namespace.
pub(crate) const LOOPBACK: u32 = 1;

/// What a bridge does for a desktop's port beyond the rules.
pub(crate) fn port_flags() -> Vec<InfoBridgePort> {
    vec![
        // Nothing passes to another isolated port.
        InfoBridgePort::Isolated(true),
        // Source addresses do not move entries about, nor fill the table.
        InfoBridgePort::Learning(false),
        // It gets what is for its own address, by a static entry, and nothing
        // else: no flood grows with the number of ports.
        InfoBridgePort::UnicastFlood(false),
        InfoBridgePort::MulticastFlood(false),
        InfoBridgePort::BroadcastFlood(false),
        // It cannot become part of a spanning tree, let alone its root.
        InfoBridgePort::Guard(true),
        InfoBridgePort::Protect(true),
    ]
}

/// The bridge drops frames of a source without a static entry at the port.
/// Linux before 5.18 does not know it, so it comes on top and is not demanded.
pub(crate) const LOCKED: InfoBridgePort = InfoBridgePort::Locked(true);

fn link(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes;
    message
}

/// Reserved groups whose frames are forwarded, a bit for each last octet: all
/// that can be. Forwarding is where the rules are, and they drop them.
///
/// Source: Linux `net/bridge/br_private.h`, `BR_GROUPFWD_RESTRICTED` is 7.
pub(crate) const RESERVED_GROUPS_TO_RULES: u16 = 0xfff8;

/// Makes the bridge, or gives an existing one these settings.
pub(crate) fn ensure_bridge(
    name: &str,
    mac: Mac,
    group: u32,
    mtu_octets: u16,
    group_forward_mask: u16,
    backend: Backend,
) -> Request {
    let mut settings = vec![
        InfoBridge::StpState(BridgeStpState::Disabled),
        InfoBridge::MulticastSnooping(false),
        InfoBridge::GroupFwdMask(group_forward_mask),
    ];
    if backend == Backend::Iptables {
        // What ebtables cannot look at, iptables does.
        settings.extend([InfoBridge::NfCallIpTables(true), InfoBridge::NfCallIp6Tables(true)]);
    }
    let data = InfoData::Bridge(settings);
    let message = link(
        0,
        vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Address(mac.octets().to_vec()),
            LinkAttribute::Mtu(mtu_octets.into()),
            LinkAttribute::Group(group),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge), LinkInfo::Data(data)]),
        ],
    );
    Request::new(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE)
}

/// Makes a pair of links: `name` here, on the bridge and down; the other end
/// born in `netns`. Moving it there afterwards would cost an RCU grace period.
pub(crate) fn create_pair(
    name: &str,
    bridge: u32,
    group: u32,
    mac: Mac,
    mtu_octets: u16,
    netns: BorrowedFd<'_>,
) -> Request {
    let peer = link(
        0,
        vec![
            LinkAttribute::IfName(INSIDE_NAME.to_owned()),
            LinkAttribute::Address(mac.octets().to_vec()),
            LinkAttribute::Mtu(mtu_octets.into()),
            LinkAttribute::NetNsFd(netns.as_raw_fd()),
        ],
    );
    let message = link(
        0,
        vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Controller(bridge),
            LinkAttribute::Mtu(mtu_octets.into()),
            LinkAttribute::Group(group),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ],
    );
    Request::new(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// Puts a link that exists on the bridge, into the group.
pub(crate) fn place(index: u32, bridge: u32, group: u32, mtu_octets: u16) -> Vec<Request> {
    vec![set_mtu(index, mtu_octets), set(index, LinkAttribute::Controller(bridge)), set_group(index, group)]
}

/// The longest packet of a link.
pub(crate) fn set_mtu(index: u32, mtu_octets: u16) -> Request {
    set(index, LinkAttribute::Mtu(mtu_octets.into()))
}

/// Gives a port of a bridge its flags. A request of its own: in the one that
/// makes the port the kernel ignores them and reports success.
pub(crate) fn set_port_flags(index: u32, flags: Vec<InfoBridgePort>) -> Request {
    let info = vec![
        LinkInfo::PortKind(netlink_packet_route::link::InfoPortKind::Bridge),
        LinkInfo::PortData(InfoPortData::BridgePort(flags)),
    ];
    // NEWLINK on an existing link: SETLINK does not take a port's data.
    Request::new(RouteNetlinkMessage::NewLink(link(index, vec![LinkAttribute::LinkInfo(info)])), 0)
}

/// Makes no IPv6 address for the link by itself.
pub(crate) fn no_ipv6_address(index: u32) -> Request {
    let spec = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    set(index, LinkAttribute::AfSpecUnspec(vec![spec]))
}

pub(crate) fn set_group(index: u32, group: u32) -> Request {
    set(index, LinkAttribute::Group(group))
}

fn set(index: u32, attribute: LinkAttribute) -> Request {
    Request::new(RouteNetlinkMessage::SetLink(link(index, vec![attribute])), 0)
}

pub(crate) fn raise(index: u32) -> Request {
    set_flags(index, LinkFlags::Up)
}

pub(crate) fn lower(index: u32) -> Request {
    set_flags(index, LinkFlags::empty())
}

fn set_flags(index: u32, flags: LinkFlags) -> Request {
    let mut message = link(index, Vec::new());
    message.header.flags = flags;
    message.header.change_mask = LinkFlags::Up;
    Request::new(RouteNetlinkMessage::SetLink(message), 0)
}

pub(crate) fn delete(index: u32) -> Request {
    Request::new(RouteNetlinkMessage::DelLink(link(index, Vec::new())), 0)
}

/// Deletes all links of a group, which takes as long as deleting one.
pub(crate) fn delete_group(group: u32) -> Request {
    Request::new(RouteNetlinkMessage::DelLink(link(0, vec![LinkAttribute::Group(group)])), 0)
}

pub(crate) fn show_name(name: &str) -> Request {
    let message = link(0, vec![LinkAttribute::IfName(name.to_owned())]);
    Request::new(RouteNetlinkMessage::GetLink(message), 0)
}

pub(crate) fn show(index: u32) -> Request {
    Request::new(RouteNetlinkMessage::GetLink(link(index, Vec::new())), 0)
}

/// Sends frames for `mac` to the port, for good.
pub(crate) fn forward_to(port: u32, mac: Mac) -> Request {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = port;
    message.header.state = NeighbourState::Noarp;
    message.header.flags = NeighbourFlags::Controller;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()));
    Request::new(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
}

const fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn neighbour(bridge: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = bridge;
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::Destination(match address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    }));
    message
}

/// Tells the host whose `address` is, so that it never has to ask.
pub(crate) fn know_neighbour(bridge: u32, address: impl Into<IpAddr>, mac: Mac) -> Request {
    let mut message = neighbour(bridge, address.into());
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()));
    Request::new(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
}

pub(crate) fn forget_neighbour(bridge: u32, address: IpAddr) -> Request {
    Request::new(RouteNetlinkMessage::DelNeighbour(neighbour(bridge, address)), 0)
}

fn address(index: u32, address: IpAddr, prefix_len: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address);
    message.header.prefix_len = prefix_len;
    message.header.index = index;
    if address.is_ipv6() {
        // Nobody else can have it: the rules see to that, and looking for
        // duplicates would take a second.
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    message
}

/// Gives a link an address, unless it has it.
pub(crate) fn add_address(index: u32, to: impl Into<IpAddr>, prefix_len: u8) -> Request {
    let message = address(index, to.into(), prefix_len);
    Request::new(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
}

pub(crate) fn remove_address(index: u32, from: IpAddr, prefix_len: u8) -> Request {
    Request::new(RouteNetlinkMessage::DelAddress(address(index, from, prefix_len)), 0)
}

fn route(index: u32, family: AddressFamily) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Oif(index));
    message
}

const fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

/// `to` is behind the link itself.
pub(crate) fn route_to(index: u32, to: impl Into<IpAddr>) -> Request {
    let to = to.into();
    let mut message = route(index, family(to));
    message.header.scope = RouteScope::Link;
    message.header.destination_prefix_length = if to.is_ipv4() { 32 } else { 128 };
    message.attributes.push(RouteAttribute::Destination(route_address(to)));
    Request::new(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// It no longer is.
pub(crate) fn forget_route(index: u32, to: IpAddr) -> Request {
    let mut message = route(index, family(to));
    message.header.scope = RouteScope::Link;
    message.header.destination_prefix_length = if to.is_ipv4() { 32 } else { 128 };
    message.attributes.push(RouteAttribute::Destination(route_address(to)));
    Request::new(RouteNetlinkMessage::DelRoute(message), 0)
}

/// Everything else is behind `gateway`.
pub(crate) fn default_route(index: u32, gateway: impl Into<IpAddr>) -> Request {
    let gateway = gateway.into();
    let mut message = route(index, family(gateway));
    message.attributes.push(RouteAttribute::Gateway(route_address(gateway)));
    Request::new(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Asks where a packet goes that comes `from` somebody behind a bridge.
pub(crate) fn ask_way(bridge: u32, from: IpAddr, to: IpAddr) -> Request {
    let length = if to.is_ipv4() { 32 } else { 128 };
    let mut message = RouteMessage::default();
    message.header.address_family = family(to);
    (message.header.destination_prefix_length, message.header.source_prefix_length) = (length, length);
    message.attributes = vec![
        RouteAttribute::Destination(route_address(to)),
        RouteAttribute::Source(route_address(from)),
        RouteAttribute::Iif(bridge),
    ];
    Request::new(RouteNetlinkMessage::GetRoute(message), 0)
}

/// What kind of route an answer to that describes, and its link.
pub(crate) fn way_facts(answer: &RouteNetlinkMessage) -> Option<(RouteType, Option<u32>)> {
    let RouteNetlinkMessage::NewRoute(message) = answer else { return None };
    let link = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    });
    Some((message.header.kind, link))
}

/// What is wanted of a link's description.
#[derive(Debug, Clone, Default)]
pub(crate) struct LinkFacts {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) group: u32,
    pub(crate) mtu_octets: u32,
    /// Bridge that it is a port of.
    pub(crate) bridge: Option<u32>,
    /// Index of the other end of a pair, in its namespace.
    pub(crate) peer: Option<u32>,
    pub(crate) kind: Option<InfoKind>,
    pub(crate) port: Vec<InfoBridgePort>,
}

/// The link that an answer describes, if it does.
pub(crate) fn facts(answer: &RouteNetlinkMessage) -> Option<LinkFacts> {
    let RouteNetlinkMessage::NewLink(message) = answer else { return None };
    let mut facts = LinkFacts { index: message.header.index, ..LinkFacts::default() };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => facts.name.clone_from(name),
            LinkAttribute::Group(group) => facts.group = *group,
            LinkAttribute::Mtu(octets) => facts.mtu_octets = *octets,
            LinkAttribute::Controller(bridge) => facts.bridge = Some(*bridge),
            LinkAttribute::Link(peer) => facts.peer = Some(*peer),
            LinkAttribute::LinkInfo(info) => {
                for info in info {
                    match info {
                        LinkInfo::Kind(kind) => facts.kind = Some(kind.clone()),
                        LinkInfo::PortData(InfoPortData::BridgePort(flags)) => facts.port.clone_from(flags),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(facts)
}

/// Index, address and prefix that an answer describes, if it does.
pub(crate) fn address_facts(answer: &RouteNetlinkMessage) -> Option<(u32, IpAddr, u8)> {
    let RouteNetlinkMessage::NewAddress(message) = answer else { return None };
    let named = |attribute: &AddressAttribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        // IPv6 has no other end: its own address is under this name.
        AddressAttribute::Address(address) if address.is_ipv6() => Some(*address),
        _ => None,
    };
    Some((message.header.index, message.attributes.iter().find_map(named)?, message.header.prefix_len))
}

/// Link, destination and prefix of a route to other hosts, if an answer
/// describes one. The default route is none: it gives way to any other.
pub(crate) fn route_facts(answer: &RouteNetlinkMessage) -> Option<(Option<u32>, IpAddr, u8)> {
    let RouteNetlinkMessage::NewRoute(message) = answer else { return None };
    let header = &message.header;
    if header.destination_prefix_length == 0 || !matches!(header.kind, RouteType::Unicast) {
        return None;
    }
    let (mut link, mut destination) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Destination(RouteAddress::Inet(to)) => destination = Some(IpAddr::V4(*to)),
            RouteAttribute::Destination(RouteAddress::Inet6(to)) => destination = Some(IpAddr::V6(*to)),
            _ => {}
        }
    }
    Some((link, destination?, header.destination_prefix_length))
}

pub(crate) fn every_link() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetLink(LinkMessage::default())
}

/// Every address of both families.
pub(crate) fn every_address() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetAddress(AddressMessage::default())
}

/// Every route of IPv4 or, if `six`, of IPv6.
pub(crate) fn every_route(six: bool) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = if six { AddressFamily::Inet6 } else { AddressFamily::Inet };
    RouteNetlinkMessage::GetRoute(message)
}
