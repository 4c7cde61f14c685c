//! Chains that ports of one policy share: made when the first of them comes, so
//! that each further one is some elements, and a packet meets the rules of its
//! own policy alone.

use std::collections::BTreeMap;

use qvd_core::{Service, Transport};

use super::bridge::{SOLICITED, SOLICITED_MAC};
use super::{GROUPS, GROUPS6, Lines, NEAR, NEAR6, Protection, REPORTERS, Rules, SET_MAX, table_name};
use crate::{
    DropReason,
    access::{Access, burst_bytes, bytes_per_s},
};

/// Chain of what the host sends to ports that are in groups.
const MEMBERS_CHAIN: &str = "to_member";

impl Rules<'_> {
    /// Text that makes or replaces the chains of a policy; empty if it has none.
    pub(crate) fn class(&self, access: &Access) -> String {
        let (table, class) = (table_name(self.instance), access.class());
        let mut sets = Lines::default();
        let mut chains = Lines::default();
        if access.is_particular() {
            chains.chain(&access.outward_chain());
            self.outward(access, class, &mut sets, &mut chains);
            chains.end();
        }
        if access.is_served() {
            chains.chain(&access.served_chain());
            for &service in &access.policy.services {
                let ports = ports(service);
                chains.push(format!("ip daddr {} {ports} accept", self.subnet.gateway()));
                if let Some(subnet6) = self.subnet6 {
                    let gateway6 = subnet6.gateway(self.subnet);
                    let link_local = self.gateway_mac().link_local();
                    chains.push(format!("ip6 daddr {{ {gateway6}, {link_local} }} {ports} accept"));
                }
            }
            chains.push(DropReason::Host.verdict());
            chains.end();
        }
        let mut text = if access.takes_part() { self.members(&table) } else { String::new() };
        if chains.0.is_empty() {
            return text;
        }
        let named = |what: &str, name: &str| format!("{what} inet {table} {name}\n");
        for (has, chain) in
            [(access.is_particular(), access.outward_chain()), (access.is_served(), access.served_chain())]
        {
            if has {
                text.push_str(&named("add chain", &chain));
                text.push_str(&named("flush chain", &chain));
            }
        }
        text.push_str(&format!("table inet {table} {{\n{}{}}}\n", sets.0, chains.0));
        text
    }

    /// What the host sends to groups comes to their members alone: the bridge
    /// floods what its own host sends, whatever the ports' flags (Linux
    /// `net/bridge/br_forward.c`, `br_flood`). Here, because hosts whose desktops
    /// are in no group need not look at what they send.
    fn members(&self, table: &str) -> String {
        let mut lines = Lines::default();
        lines.base_chain(MEMBERS_CHAIN, "output priority -300; policy accept");
        lines.push(format!("oifname != {} accept", self.ports()));
        lines.push("ether daddr & 01:00:00:00:00:00 == 00:00:00:00:00:00 accept");
        lines.push(format!("oifname . ether daddr . ip daddr @{GROUPS} accept"));
        lines.push(format!("oifname . ether daddr . ip6 daddr @{GROUPS6} accept"));
        // Who routes groups asks for their members.
        lines.push(format!("oifname @{REPORTERS} ether daddr 01:00:5e:00:00:01 ip protocol igmp accept"));
        // Questions of the link itself are for all.
        lines.push("ether daddr 33:33:00:00:00:01 ip6 daddr ff02::1 accept");
        lines.push(format!("{SOLICITED_MAC} {SOLICITED} accept"));
        lines.when(self.on(Protection::Members), "drop");
        lines.end();
        let add = format!("add chain bridge {table} {MEMBERS_CHAIN} {{ type filter hook output priority -300; }}");
        format!("{add}\nflush chain bridge {table} {MEMBERS_CHAIN}\ntable bridge {table} {{\n{}}}\n", lines.0)
    }

    fn outward(&self, access: &Access, class: &str, sets: &mut Lines, chain: &mut Lines) {
        let policy = &access.policy;
        // Keyed by MAC, which is the port's own: one budget for both families.
        let of_sender =
            |name: &str| format!("set {name}-{class} {{ type ether_addr; flags dynamic; size {SET_MAX}; }}");
        if let Some(rate) = policy.up_kbit_s {
            sets.push(of_sender("sent"));
            let (rate, burst) = (bytes_per_s(rate), burst_bytes(rate));
            let over = format!("limit rate over {rate} bytes/second burst {burst} bytes");
            chain.push(format!("add @sent-{class} {{ ether saddr {over} }} {}", DropReason::Rate.verdict()));
        }
        if let Some(most) = policy.connections {
            sets.push(of_sender("connected"));
            let over = format!("add @connected-{class} {{ ether saddr ct count over {most} }}");
            chain.push(format!("ct state new {over} {}", DropReason::Connections.verdict()));
        }
        if !policy.names.is_any() {
            for server in self.name_servers() {
                let family = if server.is_ipv4() { "ip" } else { "ip6" };
                chain.push(format!("{family} daddr {server} meta l4proto {{ tcp, udp }} th dport 53 accept"));
            }
            // In clear, and over TLS and QUIC (RFC 7858, RFC 9250).
            chain.push(format!("meta l4proto {{ tcp, udp }} th dport {{ 53, 853 }} {}", DropReason::Names.verdict()));
        }
        let back = format!("oifgroup {}", self.bridges_group());
        if let Some(group) = access.group() {
            // The mark stays on what never leaves these bridges.
            let near = format!("{back} meta mark set {group:#x}");
            chain.push(format!("{near} meta mark . ip daddr @{NEAR} accept"));
            chain.push(format!("{near} meta mark . ip6 daddr @{NEAR6} accept"));
        }
        chain.push(format!("{back} {}", DropReason::Neighbour.verdict()));
        chain.push(super::CLAMP);
        if policy.internet {
            return;
        }
        // What is said about a connection that was let out.
        chain.push("ct state related accept");
        let mut by_service = BTreeMap::<_, (Vec<String>, Vec<String>)>::new();
        for destination in &policy.destinations {
            let (base, length) = destination.prefix();
            let (four, six) = by_service.entry(destination.service()).or_default();
            if base.is_ipv4() { four } else { six }.push(format!("{base}/{length}"));
        }
        for (number, (service, (four, six))) in by_service.into_iter().enumerate() {
            for (family, kind, set, hosts) in [("ip", "ipv4_addr", "to", four), ("ip6", "ipv6_addr", "to6", six)] {
                if hosts.is_empty() {
                    continue;
                }
                let (set, ports) = (format!("{set}-{number}-{class}"), service.map(ports).unwrap_or_default());
                let hosts = hosts.join(", ");
                sets.push(format!(
                    "set {set} {{ type {kind}; flags interval; auto-merge; elements = {{ {hosts} }}; }}"
                ));
                chain.push(format!("{family} daddr @{set} {ports} accept"));
            }
        }
        chain.push(DropReason::Policy.verdict());
    }
}

fn ports(service: Service) -> String {
    let (first, last) = service.ports();
    let transport = match service.transport() {
        Transport::Udp => "udp",
        _ => "tcp",
    };
    format!("{transport} dport {first}-{last}")
}
