//! The *inet* and *arp* families: what of a desktop's packets the host takes
//! for itself, and what it routes.

use super::{FORWARDING_WAS_OFF, FORWARDING6_WAS_OFF, INTERNET, INTERNET6, Lines, Protection, Rules, SET_MAX};

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
        let (bridge, ports) = (self.bridge_link(), self.ports());
        let mut lines = Lines::default();
        lines.push(format!("set {INTERNET} {{ type ipv4_addr; size {SET_MAX}; }}"));
        lines.push(format!("set {INTERNET6} {{ type ipv6_addr; size {SET_MAX}; }}"));
        lines.when(self.forwarding_was_off, format!("set {FORWARDING_WAS_OFF} {{ type mark; }}"));
        lines.when(self.forwarding6_was_off, format!("set {FORWARDING6_WAS_OFF} {{ type mark; }}"));

        self.host(&mut lines);

        lines.base_chain("routed", "forward priority -10; policy accept");
        lines.when(self.on(Protection::PortAlone), format!("iifname {ports} drop"));
        lines.when(self.on(Protection::Hairpin), format!("iifname {bridge} oifname {bridge} drop"));
        lines.push(format!("iifname {bridge} goto outward"));
        lines.push(format!("oifname {bridge} goto inward"));
        lines.end();

        lines.chain("outward");
        if self.on(Protection::Outward) {
            lines.push(format!("ip saddr != @{INTERNET} drop"));
            lines.push(format!("ip6 saddr != @{INTERNET6} drop"));
        }
        // Uplinks narrower than a desktop's link are common (tunnels, clouds)
        // and so are routers that drop the ICMP that says so.
        lines.push("tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu");
        lines.push(if self.internet { "meta nfproto { ipv4, ipv6 } accept" } else { "drop" });
        lines.push("drop");
        lines.end();

        lines.chain("inward");
        if self.internet {
            lines.push(format!("ct state established,related ip daddr @{INTERNET} accept"));
            lines.push(format!("ct state established,related ip6 daddr @{INTERNET6} accept"));
        }
        lines.when(self.on(Protection::Inward), "drop");
        lines.end();

        if self.internet {
            lines.push("chain masquerade_out {\ntype nat hook postrouting priority 100; policy accept;");
            lines.push(format!("ip saddr @{INTERNET} oifname != {bridge} masquerade"));
            lines.push(format!("ip6 saddr @{INTERNET6} oifname != {bridge} masquerade"));
            lines.end();
        }
        lines.0
    }

    fn host(&self, lines: &mut Lines) {
        let (bridge, ports) = (self.bridge_link(), self.ports());
        let gateway = self.subnet.gateway();
        lines.base_chain("to_host", "input priority -10; policy accept");
        lines.when(self.on(Protection::PortAlone), format!("iifname {ports} drop"));
        lines.push(format!("iifname != {bridge} accept"));
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
        lines.when(self.on(Protection::Host), "drop");
        lines.end();
    }
}
