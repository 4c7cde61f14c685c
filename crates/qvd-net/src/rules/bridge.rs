//! The *bridge* family: what leaves a port at all, decided where it enters.

use super::{GROUPS, GROUPS6, IDENTITY, IDENTITY6, LINK, Lines, Protection, REPORTERS, Rules, SET_MAX, WAY, WAY6};

/// Groups of IPv6 that a host of ours takes part in or is asked by: all nodes,
/// all routers, listener reports, DHCP.
const OF_THE_LINK6: &str = "33:33:00:00:00:01, 33:33:00:00:00:02, 33:33:00:00:00:16, 33:33:00:01:00:02";

/// Those that solicitations go to (RFC 4291, 2.7.1), in a frame and in a packet.
pub(super) const SOLICITED_MAC: &str = "ether daddr & ff:ff:ff:00:00:00 == 33:33:ff:00:00:00";
pub(super) const SOLICITED: &str = "ip6 daddr ff02::1:ff00:0/104";

/// Whether the sender's MAC is the port's: in words of the set of links, which
/// knows no types.
const OWN_MAC: &str = "iifname . @ll,48,48 @link";

/// A header of hop-by-hop options that holds a router alert for listener
/// discovery and is followed by ICMPv6 (RFC 2711, RFC 3810).
const ROUTER_ALERT: &str = "@nh,320,64 0x3a00050200000100";

/// The same as an option of IPv4, which ends the header (RFC 2113).
const ROUTER_ALERT4: &str = "@nh,160,32 0x94040000";

/// Where reports of groups go (RFC 3376, 4.2.14).
const REPORTS_MAC: &str = "01:00:5e:00:00:16";

use crate::DropReason::{
    Arp, Destination, Dhcp, Ethertype, Fragment, NeighbourMessage, Option, Protocol, SourceAddress, SourceMac,
};

impl Rules<'_> {
    pub(super) fn bridge(&self) -> String {
        let ports = self.ports();
        let set = |name, key| format!("set {name} {{ {key}; size {SET_MAX}; }}");
        let mut lines = Lines::default();
        // Fields that have no name in `nft` of every age are told by place.
        lines.push(set(WAY, "typeof iif . @ll,0,112 . @nh,96,32"));
        lines.push(set(WAY6, "typeof iif . @ll,0,112 . @nh,64,128"));
        lines.push(set(IDENTITY, "type ifname . ether_addr . ipv4_addr"));
        lines.push(set(IDENTITY6, "typeof iifname . ether saddr . @nh,64,128"));
        lines.push(set(LINK, "typeof iifname . @th,208,48"));
        lines.push(set(GROUPS, "type ifname . ether_addr . ipv4_addr"));
        lines.push(set(GROUPS6, "type ifname . ether_addr . ipv6_addr"));
        lines.push(set(REPORTERS, "type ifname"));

        self.dropped(&mut lines, "iifname", "ifname");

        lines.base_chain("from_port", "prerouting priority -300; policy drop");
        self.ways(&mut lines);
        lines.push(format!("iifname != {ports} accept"));
        let ip6 = if self.subnet6.is_some() { ", ip6 : goto from_port_ip6" } else { "" };
        lines.push(format!("ether type vmap {{ ip : goto from_port_ip, arp : goto from_port_arp{ip6} }}"));
        lines.when(!self.on(Protection::Ethertype), "ether type != { ip, arp, ip6 } accept");
        lines.push(Ethertype.verdict());
        lines.end();

        self.internet4(&mut lines);
        self.address_resolution(&mut lines);
        if self.subnet6.is_some() {
            self.internet6(&mut lines);
            self.neighbour_discovery(&mut lines);
        }

        lines.base_chain("to_host", "input priority -300; policy accept");
        if self.on(Protection::Multicast) {
            // Almost all, and quicker to tell than where it comes from.
            lines.push(format!("ether daddr {} accept", self.gateway_mac()));
            lines.push(format!("iifname != {ports} accept"));
            lines.push(format!("ether daddr {{ ff:ff:ff:ff:ff:ff, {OF_THE_LINK6} }} accept"));
            lines.push(format!("{SOLICITED_MAC} accept"));
            lines.push(format!("iifname . ether daddr . ip daddr @{GROUPS} accept"));
            lines.push(format!("iifname . ether daddr . ip6 daddr @{GROUPS6} accept"));
            lines.push(format!("iifname @{REPORTERS} ether daddr {REPORTS_MAC} accept"));
            lines.push(Destination.verdict());
        }
        lines.end();

        // `forward` is a word of nft.
        lines.base_chain("to_neighbour", "forward priority -300; policy accept");
        lines.when(self.on(Protection::Neighbours), format!("iifname {ports} {}", Destination.verdict()));
        lines.when(self.on(Protection::Neighbours), format!("oifname {ports} drop"));
        lines.end();
        lines.0
    }

    /// Packets of a port to the gateway: told by one look, before anything else.
    fn ways(&self, lines: &mut Lines) {
        let (ports, gateway) = (self.ports(), self.gateway_mac());
        let whoever = |ethertype| format!("iifname {ports} ether type {ethertype} ether daddr {gateway}");
        let known = |protection, look: &str, ethertype| {
            if self.on(protection) { look.to_owned() } else { whoever(ethertype) }
        };
        let own = known(Protection::Identity, "iif . @ll,0,112 . @nh,96,32 @way", "ip");
        lines.push(format!("{own} goto from_port_way"));
        if self.subnet6.is_some() {
            let own = known(Protection::Identity6, "iif . @ll,0,112 . @nh,64,128 @way6", "ip6");
            lines.push(format!("{own} goto from_port_way6"));
        }
    }

    fn internet4(&self, lines: &mut Lines) {
        let broadcast = self.subnet.broadcast();
        // The length of the header in 32-bit words; more fragments, or an offset.
        let (other_header, fragment) = ("@nh,4,4 != 5", "ip frag-off & 0x3fff != 0");
        lines.chain("from_port_way");
        lines.when(self.on(Protection::Options), format!("{other_header} {}", Option.verdict()));
        lines.when(self.on(Protection::Fragments), format!("{fragment} {}", Fragment.verdict()));
        if self.on(Protection::Destinations) {
            let end = Destination.verdict();
            // The first octet: this network, loopback, groups and what is reserved.
            let groups = (224..=255).map(|octet| format!(", {octet}")).collect::<String>();
            lines.push(format!("@nh,128,8 {{ 0, 127{groups} }} {end}"));
            lines.push(format!("ip daddr & 255.255.0.0 == 169.254.0.0 {end}"));
            lines.push(format!("ip daddr {broadcast} {end}"));
        }
        // `meta l4proto` and ports are known of whole packets alone: of a
        // length that is true, with a header that is there.
        lines.push(if self.on(Protection::DhcpServer) { "udp sport != 67 accept" } else { "meta l4proto udp accept" });
        lines.push(if self.on(Protection::Protocols) {
            "meta l4proto { icmp, tcp } accept"
        } else {
            "meta l4proto != udp accept"
        });
        lines.push(Protocol.verdict());
        lines.end();

        lines.chain("from_port_ip");
        let known = self.part(Protection::Identity, "iifname . ether saddr . ip saddr @identity ");
        // Tests want to see where a packet to anybody comes.
        let beside = if self.on(Protection::ToGateway) { "from_port_beside" } else { "from_port_way" };
        // No address is the sender of who asks for one (RFC 2131).
        lines.push(format!("ip saddr 0.0.0.0 {OWN_MAC} ether daddr ff:ff:ff:ff:ff:ff goto from_port_beside"));
        lines.push(format!("{known}goto {beside}"));
        lines.push(format!("{OWN_MAC} {}", SourceAddress.verdict()));
        lines.push(SourceMac.verdict());
        lines.end();

        // Not to the gateway.
        lines.chain("from_port_beside");
        lines.when(self.on(Protection::Options), format!("{other_header} goto from_port_report"));
        lines.when(self.on(Protection::Fragments), format!("{fragment} {}", Fragment.verdict()));
        lines.push("ether daddr ff:ff:ff:ff:ff:ff ip daddr 255.255.255.255 goto from_port_dhcp");
        let member = self.part(Protection::Groups, "iifname . ether daddr . ip daddr @groups");
        lines.push(format!("{member} udp sport != 67 accept"));
        lines.push(Destination.verdict());
        lines.end();

        // The one packet with an option: that the sender is in a group.
        let report = self.part(Protection::IgmpReport, "iifname @reporters @th,0,8 0x22");
        lines.chain("from_port_report");
        lines.push(format!(
            "@nh,4,4 6 ip frag-off & 0x3fff 0 ip ttl 1 ip length >= 32 {ROUTER_ALERT4} ether daddr {REPORTS_MAC} \
             ip daddr 224.0.0.22 meta l4proto igmp {report} accept"
        ));
        lines.push(Option.verdict());
        lines.end();

        lines.chain("from_port_dhcp");
        lines.push(format!(
            "{} {} {} accept",
            if self.on(Protection::DhcpPorts) { "udp sport 68 udp dport 67" } else { "meta l4proto udp" },
            // A request over Ethernet; of the hardware address that follows.
            self.part(Protection::DhcpQuestion, "@th,64,24 0x010106"),
            self.part(Protection::DhcpSelf, "iifname . @th,288,48 @link"),
        ));
        lines.push(Dhcp.verdict());
        lines.end();
    }

    fn address_resolution(&self, lines: &mut Lines) {
        lines.chain("from_port_arp");
        let whole = self.part(Protection::ArpWhole, "arp daddr ip != 0.0.0.0");
        let arp = format!("arp htype 1 arp ptype ip arp operation {{ request, reply }} {whole}");
        if self.on(Protection::ArpIdentity) {
            // The MAC that it tells is the port's as well. No address is the sender
            // of who asks whether one is in use (RFC 5227).
            let told = "iifname . @nh,64,48 @link";
            lines.push(format!("{arp} iifname . ether saddr . arp saddr ip @identity {told} accept"));
            lines.push(format!("{arp} arp saddr ip 0.0.0.0 {OWN_MAC} {told} accept"));
        } else {
            lines.push(format!("{arp} accept"));
        }
        lines.push(format!("{OWN_MAC} {}", Arp.verdict()));
        lines.push(SourceMac.verdict());
        lines.end();
    }

    fn internet6(&self, lines: &mut Lines) {
        // The kernel looks where a header would be, also behind the length that
        // the packet claims. The protocol is named twice: in the first header, so
        // that it is not behind others, and as found in a packet whose length is
        // true.
        let eight = self.part(Protection::Length6, "ip6 length >= 8");
        let twenty = self.part(Protection::Length6, "ip6 length >= 20");
        lines.chain("from_port_way6");
        if self.on(Protection::Destinations6) {
            lines.push(format!("@nh,192,8 0xff {}", Destination.verdict()));
            // Nobody, the host itself, and IPv4 in disguise.
            lines.push(format!("@nh,192,32 0 {}", Destination.verdict()));
        }
        lines.push(format!("ip6 nexthdr tcp {twenty} meta l4proto tcp accept"));
        let no_server = self.part(Protection::Dhcp6Server, "udp sport != 547");
        lines.push(format!("ip6 nexthdr udp {eight} {no_server} accept"));
        lines.push("ip6 nexthdr icmpv6 goto from_port_icmp6");
        lines.when(!self.on(Protection::NextHeaders), "ip6 nexthdr != { icmpv6, udp, tcp } accept");
        lines.push(format!("ip6 nexthdr 44 {}", Fragment.verdict()));
        lines.push(format!("ip6 nexthdr != {{ udp, tcp }} {}", Option.verdict()));
        lines.push(Protocol.verdict());
        lines.end();

        lines.chain("from_port_icmp6");
        let kinds = "icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem, \
                     echo-request, echo-reply }";
        let kinds = if self.on(Protection::Icmp6Kinds) { kinds } else { "meta l4proto icmpv6" };
        lines.push(format!("{eight} {kinds} accept"));
        lines.push("jump from_port_nd");
        lines.push(format!("icmpv6 type 133-137 {}", NeighbourMessage.verdict()));
        lines.push(Protocol.verdict());
        lines.end();

        lines.chain("from_port_ip6");
        let known = self.part(Protection::Identity6, "iifname . ether saddr . @nh,64,128 @identity6 ");
        let beside = if self.on(Protection::ToGateway) { "from_port_beside6" } else { "from_port_way6" };
        lines.push(format!("ip6 saddr :: {OWN_MAC} goto from_port_probe"));
        lines.push(format!("{known}goto {beside}"));
        lines.push(format!("{OWN_MAC} {}", SourceAddress.verdict()));
        lines.push(SourceMac.verdict());
        lines.end();

        // Not to the gateway, or from the link's own address.
        let (gateway, report) = (self.gateway_mac(), self.report6());
        lines.chain("from_port_beside6");
        lines.push("ip6 nexthdr icmpv6 jump from_port_nd");
        lines.push(format!("ip6 saddr fe80::/10 ether daddr {gateway} goto from_port_way6"));
        lines.push(format!("ip6 saddr fe80::/10 {report} accept"));
        lines.push(format!(
            "ip6 nexthdr udp {eight} ip6 saddr fe80::/10 ether daddr 33:33:00:01:00:02 ip6 daddr ff02::1:2 \
             udp sport 546 udp dport 547 accept",
        ));
        let member = self.part(Protection::Groups, "iifname . ether daddr . ip6 daddr @groups6");
        lines.push(format!("ip6 nexthdr udp {eight} {member} udp sport != 547 accept"));
        lines.push(format!("icmpv6 type 133-137 {}", NeighbourMessage.verdict()));
        lines.push(Destination.verdict());
        lines.end();
    }

    /// The one report of groups behind an option.
    fn report6(&self) -> String {
        format!(
            "ip6 nexthdr 0 ip6 hoplimit 1 ether daddr 33:33:00:00:00:16 ip6 daddr ff02::16 {ROUTER_ALERT} {} \
             meta l4proto icmpv6 {}",
            self.part(Protection::Length6, "ip6 length >= 16"),
            self.part(Protection::MldReport, "@th,0,8 143"),
        )
    }

    /// Neighbour messages, each in the one form that a host sends it.
    fn neighbour_discovery(&self, lines: &mut Lines) {
        let gateway = self.gateway_mac();
        let near = self.part(Protection::NdNear, "ip6 hoplimit 255");
        let own_target = self.part(Protection::NdTarget, "iifname . ether saddr . @th,64,128 @identity6");
        let own_link = |place| match place {
            Place::BehindTarget => self.part(Protection::NdLink, "iifname . @th,208,48 @link"),
            Place::BehindReserved => self.part(Protection::NdLink, "iifname . @th,80,48 @link"),
        };
        let length = |octets| if self.on(Protection::NdWhole) { format!("ip6 length {octets}") } else { String::new() };
        let (bare, with_option) = (length(24), length(32));

        lines.chain("from_port_nd");
        lines.push(format!("icmpv6 type nd-neighbor-solicit {near} {SOLICITED_MAC} {SOLICITED} goto from_port_ask"));
        lines.push(format!(
            "icmpv6 type nd-neighbor-solicit {near} ether daddr {gateway} ip6 daddr != ff00::/8 goto from_port_ask"
        ));
        // To the gateway, or to all: neither from a router.
        let no_router = self.part(Protection::NdNoRouter, "@th,32,1 0");
        let told = format!("@th,192,16 0x0201 {}", own_link(Place::BehindTarget));
        let advert = format!("icmpv6 type nd-neighbor-advert {near} {with_option} {no_router} {own_target} {told}");
        lines.push(format!("{advert} ether daddr {gateway} ip6 daddr != ff00::/8 accept"));
        lines.push(format!("{advert} ether daddr 33:33:00:00:00:01 ip6 daddr ff02::1 accept"));
        let routers = "ether daddr 33:33:00:00:00:02 ip6 daddr ff02::2";
        let solicit = format!("icmpv6 type nd-router-solicit {near} {routers}");
        lines.push(format!("{solicit} ip6 length 8 accept"));
        lines.push(format!("{solicit} {} @th,64,16 0x0101 {} accept", length(16), own_link(Place::BehindReserved)));
        lines.end();

        lines.chain("from_port_ask");
        lines.push("ip6 length 24 accept");
        lines.push(format!("{with_option} @th,192,16 0x0101 {} accept", own_link(Place::BehindTarget)));
        lines.end();

        // Who has no address yet: whether one is in use, with a nonce or without
        // (RFC 7527), and what RFC 4861 and RFC 3810 let it ask and report.
        lines.chain("from_port_probe");
        let probe = format!("icmpv6 type nd-neighbor-solicit {near} {SOLICITED_MAC} {SOLICITED} {own_target}");
        lines.push(format!("{probe} {bare} accept"));
        lines.push(format!("{probe} {with_option} @th,192,16 0x0e01 accept"));
        lines.push(format!("icmpv6 type nd-router-solicit {near} {routers} ip6 length 8 accept"));
        lines.push(format!("{} accept", self.report6()));
        lines.push(format!("ip6 nexthdr icmpv6 {}", NeighbourMessage.verdict()));
        lines.push(SourceAddress.verdict());
        lines.end();
    }
}

/// Where an option of neighbour discovery stands.
#[derive(Clone, Copy)]
enum Place {
    BehindTarget,
    BehindReserved,
}
