//! The *inet* and *arp* families: what of a desktop's packets the host takes
//! for itself, and what it routes.

use super::{
    ANSWERED, ANSWERED6, CLAMP, FORWARDING_WAS_OFF, FORWARDING6_WAS_OFF, INTERNET, INTERNET6, Lines, NEAR, NEAR6,
    OUTWARD, OUTWARD6, Protection, ROUTED, ROUTED6, Rules, SERVED, SERVED6, SET_MAX, TOLD, TOLD6,
};

use crate::DropReason;

impl Rules<'_> {
    pub(super) fn arp(&self) -> String {
        let ports = self.ports();
        let mut lines = Lines::default();
        lines.base_chain("to_host", "input priority -10; policy accept");
        lines.when(self.on(Protection::PortAlone), format!("iifname {ports} drop"));
        lines.end();
        lines.0
    }

    pub(super) fn inet(&self) -> String {
        let (bridges, ports) = (self.bridges(), self.ports());
        let mut lines = Lines::default();
        lines.push(format!("set {INTERNET} {{ type ipv4_addr; size {SET_MAX}; }}"));
        lines.push(format!("set {INTERNET6} {{ type ipv6_addr; size {SET_MAX}; }}"));
        for (map, key) in
            [(OUTWARD, "ipv4_addr"), (OUTWARD6, "ipv6_addr"), (SERVED, "ipv4_addr"), (SERVED6, "ipv6_addr")]
        {
            lines.push(format!("map {map} {{ type {key} : verdict; size {SET_MAX}; }}"));
        }
        for (set, key) in [
            (ANSWERED, "ipv4_addr"),
            (ANSWERED6, "ipv6_addr"),
            (ROUTED, "ipv4_addr"),
            (ROUTED6, "ipv6_addr"),
            (NEAR, "mark . ipv4_addr"),
            (NEAR6, "mark . ipv6_addr"),
            (TOLD, "ipv4_addr . ipv4_addr"),
            (TOLD6, "ipv6_addr . ipv6_addr"),
        ] {
            lines.push(format!("set {set} {{ type {key}; size {SET_MAX}; }}"));
        }
        lines.when(self.forwarding_was_off, format!("set {FORWARDING_WAS_OFF} {{ type mark; }}"));
        lines.when(self.forwarding6_was_off, format!("set {FORWARDING6_WAS_OFF} {{ type mark; }}"));

        self.dropped(&mut lines, "ether saddr", "ether_addr");

        self.host(&mut lines);

        lines.base_chain("routed", "forward priority -10; policy accept");
        // A group is a number: names of links are among the slowest things to compare.
        let group = self.bridges_group();
        lines.push(format!("iifgroup {group} goto outward"));
        lines.when(self.on(Protection::PortAlone), format!("iifname {ports} drop"));
        bridges.iter().for_each(|bridge| lines.push(format!("iifname {bridge} goto outward")));
        lines.push(format!("oifgroup {group} goto inward"));
        bridges.iter().for_each(|bridge| lines.push(format!("oifname {bridge} goto inward")));
        lines.end();

        lines.chain("outward");
        if self.internet {
            // Of no connection: nothing would translate its address.
            lines.push(format!("ct state invalid {}", DropReason::Policy.verdict()));
            lines.push(format!("ip saddr @{INTERNET} goto outward_free"));
            lines.push(format!("ip6 saddr @{INTERNET6} goto outward_free"));
            lines.push(format!("ip saddr vmap @{OUTWARD}"));
            lines.push(format!("ip6 saddr vmap @{OUTWARD6}"));
        }
        let end = DropReason::Policy.verdict();
        lines.push(if self.on(Protection::Outward) { &*end } else { "goto outward_free" });
        lines.end();

        lines.chain("outward_free");
        let back = format!("oifgroup {} {}", self.bridges_group(), DropReason::Neighbour.verdict());
        lines.when(self.on(Protection::Hairpin), back);
        lines.push(CLAMP);
        lines.when(!self.internet, "drop");
        lines.end();

        lines.chain("inward");
        if self.internet {
            for (family, set) in [("ip", INTERNET), ("ip6", INTERNET6), ("ip", ANSWERED), ("ip6", ANSWERED6)] {
                lines.push(format!("ct state established,related {family} daddr @{set} accept"));
            }
            // Who gets it is decided at each port.
            lines.push("ip daddr 224.0.0.0/4 accept");
            lines.push("ip6 daddr ff00::/8 accept");
        }
        lines.when(self.on(Protection::Inward), "drop");
        lines.end();

        if self.internet {
            self.translation(&mut lines);
        }
        lines.0
    }

    /// Others see the host's address instead of a desktop's, and the gateway
    /// stands for the site's name servers.
    fn translation(&self, lines: &mut Lines) {
        let ([first, others], subnet) = (self.bridges(), self.subnet);
        let beyond = format!("oifname != {first} oifname != {others}");
        lines.push("chain masquerade_out {\ntype nat hook postrouting priority 100; policy accept;");
        lines.push(format!("ip saddr {subnet} ip saddr != @{ROUTED} {beyond} masquerade"));
        if let Some(subnet6) = self.subnet6 {
            lines.push(format!("ip6 saddr {subnet6} ip6 saddr != @{ROUTED6} {beyond} masquerade"));
        }
        lines.end();
        if self.name_servers().next().is_none() {
            return;
        }
        lines.push("chain names {\ntype nat hook prerouting priority -100; policy accept;");
        let question = "meta l4proto { tcp, udp } th dport 53";
        let group = self.bridges_group();
        if let Some(server) = self.name_server {
            lines.push(format!("iifgroup {group} ip daddr {} {question} dnat ip to {server}", subnet.gateway()));
        }
        if let (Some(server), Some(subnet6)) = (self.name_server6, self.subnet6) {
            let gateway = subnet6.gateway(subnet);
            lines.push(format!("iifgroup {group} ip6 daddr {gateway} {question} dnat ip6 to {server}"));
        }
        lines.end();
    }

    fn host(&self, lines: &mut Lines) {
        let ports = self.ports();
        let gateway = self.subnet.gateway();
        lines.base_chain("to_host", "input priority -10; policy accept");
        lines.when(self.on(Protection::PortAlone), format!("iifname {ports} drop"));
        for bridge in self.bridges() {
            lines.push(format!("iifname {bridge} goto of_desktop"));
        }
        lines.end();

        lines.chain("of_desktop");
        // Without a way out nothing here asks for connection tracking, which
        // would be switched on for the whole host.
        lines.when(self.internet, "ct state established,related accept");
        lines.push(format!("ip daddr {gateway} icmp type echo-request accept"));
        if let Some(subnet6) = self.subnet6 {
            let (gateway6, link_local) = (subnet6.gateway(self.subnet), self.gateway_mac().link_local());
            lines.push(format!("ip6 daddr {{ {gateway6}, {link_local} }} icmpv6 type echo-request accept"));
            // Of whom and to whom is decided at the port.
            lines.push("icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept");
        }
        lines.push(format!("ip saddr vmap @{SERVED}"));
        lines.push(format!("ip6 saddr vmap @{SERVED6}"));
        lines.push(format!("ip daddr . ip saddr @{TOLD} accept"));
        lines.push(format!("ip6 daddr . ip6 saddr @{TOLD6} accept"));
        lines.when(self.on(Protection::Host), DropReason::Host.verdict());
        lines.end();
    }
}
