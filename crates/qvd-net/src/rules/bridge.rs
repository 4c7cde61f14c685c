//! The *bridge* family: what leaves a port at all, decided where it enters.

use super::{
    ARP_IDENTITY, GROUPS, GROUPS6, IDENTITY, IDENTITY6, LINK, Lines, Protection, REPORTERS, Rules, SET_MAX, TARGET,
};

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
        lines.push(set(IDENTITY, "type ifname . ether_addr . ipv4_addr"));
        lines.push(set(ARP_IDENTITY, "type ifname . ether_addr . ether_addr . ipv4_addr"));
        lines.push(set(IDENTITY6, "type ifname . ether_addr . ipv6_addr"));
        // Fields that have no name in `nft` of every age are told by place.
        lines.push(set(TARGET, "typeof iifname . ether saddr . @th,64,128"));
        lines.push(set(LINK, "typeof iifname . @th,208,48"));
        lines.push(set(GROUPS, "type ifname . ether_addr . ipv4_addr"));
        lines.push(set(GROUPS6, "type ifname . ether_addr . ipv6_addr"));
        lines.push(set(REPORTERS, "type ifname"));

        self.dropped(&mut lines, "iifname", "ifname");

        lines.base_chain("from_port", "prerouting priority -300; policy drop");
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
            lines.push(format!("iifname != {ports} accept"));
            lines.push(format!("ether daddr {{ {}, ff:ff:ff:ff:ff:ff, {OF_THE_LINK6} }} accept", self.gateway_mac()));
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

    fn internet4(&self, lines: &mut Lines) {
        let (gateway, broadcast) = (self.gateway_mac(), self.subnet.broadcast());
        lines.chain("from_port_ip");
        let known = self.part(Protection::Identity, "iifname . ether saddr . ip saddr @identity ");
        lines.push(format!("{known}goto from_port_known"));
        lines.push(format!("{OWN_MAC} {}", SourceAddress.verdict()));
        lines.push(SourceMac.verdict());
        lines.end();

        lines.chain("from_port_known");
        // The length of the header in 32-bit words.
        lines.when(self.on(Protection::Options), "@nh,4,4 != 5 goto from_port_report");
        // More fragments, or an offset.
        lines.when(self.on(Protection::Fragments), format!("ip frag-off & 0x3fff != 0 {}", Fragment.verdict()));
        // What is no question there is to be dropped, unless tests want to see it.
        let ask = if self.on(Protection::ToGateway) { "goto" } else { "jump" };
        lines.push(format!("ether daddr ff:ff:ff:ff:ff:ff ip daddr 255.255.255.255 {ask} from_port_dhcp"));
        lines.push(format!("ip saddr 0.0.0.0 {}", SourceAddress.verdict()));
        lines.when(self.on(Protection::ToGateway), format!("ether daddr != {gateway} goto from_port_group"));
        lines.when(
            self.on(Protection::Destinations),
            format!(
                "ip daddr {{ 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, {broadcast}, 224.0.0.0-255.255.255.255 }} {}",
                Destination.verdict()
            ),
        );
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

        let member = self.part(Protection::Groups, "iifname . ether daddr . ip daddr @groups");
        lines.chain("from_port_group");
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
        lines.when(self.on(Protection::ToGateway), Dhcp.verdict());
        lines.end();
    }

    fn address_resolution(&self, lines: &mut Lines) {
        lines.chain("from_port_arp");
        lines.push(format!(
            "arp htype 1 arp ptype ip arp operation {{ request, reply }} {} {} accept",
            self.part(Protection::ArpWhole, "arp daddr ip != 0.0.0.0"),
            self.part(Protection::ArpIdentity, "iifname . ether saddr . arp saddr ether . arp saddr ip @arp_identity"),
        ));
        lines.push(format!("{OWN_MAC} {}", Arp.verdict()));
        lines.push(SourceMac.verdict());
        lines.end();
    }

    fn internet6(&self, lines: &mut Lines) {
        let gateway = self.gateway_mac();
        lines.chain("from_port_ip6");
        let known = self.part(Protection::Identity6, "iifname . ether saddr . ip6 saddr @identity6 ");
        lines.push(format!("{known}goto from_port_known6"));
        lines.push(format!("{OWN_MAC} {}", SourceAddress.verdict()));
        lines.push(SourceMac.verdict());
        lines.end();

        lines.chain("from_port_known6");
        lines.push("ip6 nexthdr icmpv6 jump from_port_nd");
        lines.push(format!(
            "ip6 nexthdr 0 ip6 hoplimit 1 ip6 saddr {{ ::, fe80::/10 }} ether daddr 33:33:00:00:00:16 ip6 daddr ff02::16 \
             {ROUTER_ALERT} {} meta l4proto icmpv6 {} accept",
            self.part(Protection::Length6, "ip6 length >= 16"),
            self.part(Protection::MldReport, "@th,0,8 143"),
        ));
        lines.push(format!("ip6 saddr :: {}", SourceAddress.verdict()));
        // The kernel looks where a header would be, also behind the length that
        // the packet claims.
        let eight = self.part(Protection::Length6, "ip6 length >= 8");
        lines.push(format!(
            "ip6 nexthdr udp {eight} ip6 saddr fe80::/10 ether daddr 33:33:00:01:00:02 ip6 daddr ff02::1:2 \
             udp sport 546 udp dport 547 accept",
        ));
        lines.when(self.on(Protection::ToGateway), format!("ether daddr != {gateway} goto from_port_group6"));
        lines.when(self.on(Protection::Destinations6), {
            format!("ip6 daddr {{ ::/96, ::ffff:0:0/96, ff00::/8 }} {}", Destination.verdict())
        });
        // The protocol is named twice: in the first header, so that it is not
        // behind others, and as found in a packet whose length is true.
        let kinds = "icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem, \
                     echo-request, echo-reply }";
        let kinds = if self.on(Protection::Icmp6Kinds) { kinds } else { "meta l4proto icmpv6" };
        lines.push(format!("ip6 nexthdr icmpv6 {eight} {kinds} accept"));
        lines
            .push(format!("ip6 nexthdr udp {eight} {} accept", self.part(Protection::Dhcp6Server, "udp sport != 547")));
        let twenty = self.part(Protection::Length6, "ip6 length >= 20");
        lines.push(format!("ip6 nexthdr tcp {twenty} meta l4proto tcp accept"));
        lines.when(!self.on(Protection::NextHeaders), "ip6 nexthdr != { icmpv6, udp, tcp } accept");
        lines.push(format!("ip6 nexthdr 44 {}", Fragment.verdict()));
        lines.push(format!("ip6 nexthdr != {{ icmpv6, udp, tcp }} {}", Option.verdict()));
        lines.push(format!("icmpv6 type 133-137 {}", NeighbourMessage.verdict()));
        lines.push(Protocol.verdict());
        lines.end();

        let member = self.part(Protection::Groups, "iifname . ether daddr . ip6 daddr @groups6");
        lines.chain("from_port_group6");
        lines.push(format!("ip6 nexthdr udp {eight} {member} udp sport != 547 accept"));
        lines.push(format!("icmpv6 type 133-137 {}", NeighbourMessage.verdict()));
        lines.push(Destination.verdict());
        lines.end();
    }

    /// Neighbour messages, each in the one form that a host sends it.
    fn neighbour_discovery(&self, lines: &mut Lines) {
        let gateway = self.gateway_mac();
        let near = self.part(Protection::NdNear, "ip6 hoplimit 255");
        let own_target = self.part(Protection::NdTarget, "iifname . ether saddr . @th,64,128 @target");
        let own_link = |place| match place {
            Place::BehindTarget => self.part(Protection::NdLink, "iifname . @th,208,48 @link"),
            Place::BehindReserved => self.part(Protection::NdLink, "iifname . @th,80,48 @link"),
        };
        let length = |octets| if self.on(Protection::NdWhole) { format!("ip6 length {octets}") } else { String::new() };
        let (bare, with_option) = (length(24), length(32));

        lines.chain("from_port_nd");
        lines.push("ip6 saddr :: goto from_port_probe");
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

        // Whether an address is in use, with a nonce or without (RFC 7527).
        lines.chain("from_port_probe");
        let probe = format!("icmpv6 type nd-neighbor-solicit {near} {SOLICITED_MAC} {SOLICITED} {own_target}");
        lines.push(format!("{probe} {bare} accept"));
        lines.push(format!("{probe} {with_option} @th,192,16 0x0e01 accept"));
        lines.push(format!("icmpv6 type nd-router-solicit {near} {routers} ip6 length 8 accept"));
        lines.push(NeighbourMessage.verdict());
        lines.end();
    }
}

/// Where an option of neighbour discovery stands.
#[derive(Clone, Copy)]
enum Place {
    BehindTarget,
    BehindReserved,
}
