//! Chains that ports of one policy share: made when the first of them comes, so
//! that each further one is some elements, and a packet meets the rules of its
//! own policy alone.

use std::collections::BTreeMap;

use qvd_core::{Service, Transport};

use super::{Lines, NEAR, NEAR6, Rules, SET_MAX, table_name};
use crate::access::{Access, burst_bytes, bytes_per_s};

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
            chains.push("drop");
            chains.end();
        }
        if chains.0.is_empty() {
            return String::new();
        }
        let named = |what: &str, name: &str| format!("{what} inet {table} {name}\n");
        let mut text = String::new();
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

    fn outward(&self, access: &Access, class: &str, sets: &mut Lines, chain: &mut Lines) {
        let policy = &access.policy;
        // Keyed by MAC, which is the port's own: one budget for both families.
        let of_sender =
            |name: &str| format!("set {name}-{class} {{ type ether_addr; flags dynamic; size {SET_MAX}; }}");
        if let Some(rate) = policy.up_kbit_s {
            sets.push(of_sender("sent"));
            let (rate, burst) = (bytes_per_s(rate), burst_bytes(rate));
            let over = format!("limit rate over {rate} bytes/second burst {burst} bytes");
            chain.push(format!("add @sent-{class} {{ ether saddr {over} }} drop"));
        }
        if let Some(most) = policy.connections {
            sets.push(of_sender("connected"));
            chain.push(format!("ct state new add @connected-{class} {{ ether saddr ct count over {most} }} drop"));
        }
        if !policy.names.is_any() {
            for server in self.name_servers() {
                let family = if server.is_ipv4() { "ip" } else { "ip6" };
                chain.push(format!("{family} daddr {server} meta l4proto {{ tcp, udp }} th dport 53 accept"));
            }
            // In clear, and over TLS and QUIC (RFC 7858, RFC 9250).
            chain.push("meta l4proto { tcp, udp } th dport { 53, 853 } drop");
        }
        let bridge = self.bridge_link();
        if let Some(group) = access.group() {
            // The mark stays on what never leaves this bridge.
            let near = format!("oifname {bridge} meta mark set {group:#x}");
            chain.push(format!("{near} meta mark . ip daddr @{NEAR} accept"));
            chain.push(format!("{near} meta mark . ip6 daddr @{NEAR6} accept"));
        }
        chain.push(format!("oifname {bridge} drop"));
        chain.push(super::CLAMP);
        if policy.internet {
            chain.push("accept");
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
        chain.push("drop");
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
