//! What a port's policy lets it reach, as rules of chains of its own in the
//! table `filter`.

use std::net::IpAddr;

use qvd_core::{NetPolicy, Service, Transport};

use super::{
    super::Confined,
    Kind,
    fixed::BETWEEN,
    text::{Shared, Text},
};
use crate::{
    DropReason, Mac,
    access::{burst_bytes, bytes_per_s},
    identity::{Identity, REPORTS},
};

/// Marks the chain of what the host serves a port, behind the name of its link.
pub(super) const SERVED: &str = "s";

/// The same of what a port hears of groups.
pub(super) const HEARD: &str = "g";

fn ports(service: Service) -> String {
    let (first, last) = service.ports();
    let transport = match service.transport() {
        Transport::Udp => "udp",
        _ => "tcp",
    };
    format!("-p {transport} --dport {first}:{last}")
}

const fn is_of(kind: Kind, address: IpAddr) -> bool {
    address.is_ipv4() == matches!(kind, Kind::Iptables)
}

/// Why packets of who has this policy may be dropped behind the bridge.
fn reasons(policy: &NetPolicy) -> impl Iterator<Item = DropReason> + use<> {
    let some = [
        policy.up_kbit_s.is_some().then_some(DropReason::Rate),
        policy.connections.is_some().then_some(DropReason::Connections),
        (!policy.names.is_any()).then_some(DropReason::Names),
    ];
    [DropReason::Policy, DropReason::Neighbour, DropReason::Host].into_iter().chain(some.into_iter().flatten())
}

impl Text {
    /// Chains of a port in the table `filter`, with their rules.
    pub(super) fn policy_chains(&self, kind: Kind, port: &Confined<'_>) -> Vec<(String, Vec<String>)> {
        let (link, mut chains) = (&port.identity.link, Vec::new());
        if kind == Kind::Ebtables {
            let heard = || (format!("{link}{HEARD}"), Self::heard(port.identity));
            return port.access.takes_part().then(heard).into_iter().collect();
        }
        if port.access.is_particular() {
            chains.push((link.clone(), self.outward(kind, port)));
        }
        if port.access.is_served() {
            let services = port.access.policy.services.iter().map(|&service| ports(service));
            let rule = |ports: String| self.gateways(kind).map(move |to| format!("-d {to} {ports} -j ACCEPT"));
            let rules = services.flat_map(rule).collect();
            chains.push((format!("{link}{SERVED}"), rules));
        }
        chains
    }

    fn outward(&self, kind: Kind, port: &Confined<'_>) -> Vec<String> {
        let (policy, link) = (&port.access.policy, &port.identity.link);
        let whole = if kind == Kind::Iptables { 32 } else { 128 };
        let mut rules = Vec::new();
        if let Some(rate) = policy.up_kbit_s {
            let (rate, burst) = (bytes_per_s(rate), burst_bytes(rate) / 1024);
            rules.push(format!(
                "-m hashlimit --hashlimit-above {rate}b/s --hashlimit-burst {burst}kb --hashlimit-mode srcip \
                 --hashlimit-name {link} -j {}",
                self.dropped(DropReason::Rate)
            ));
        }
        if let Some(most) = policy.connections {
            rules.push(format!(
                "-m conntrack --ctstate NEW -m connlimit --connlimit-above {most} --connlimit-mask {whole} \
                 --connlimit-saddr -j {}",
                self.dropped(DropReason::Connections)
            ));
        }
        let transports = ["tcp", "udp"];
        if !policy.names.is_any() {
            for server in self.name_servers().filter(|&server| is_of(kind, server)) {
                rules.extend(transports.map(|transport| format!("-d {server} -p {transport} --dport 53 -j ACCEPT")));
            }
            for transport in transports {
                let end = self.dropped(DropReason::Names);
                rules.extend([53, 853].map(|port| format!("-p {transport} --dport {port} -j {end}")));
            }
        }
        if let Some(group) = port.access.group() {
            rules.extend(self.bridges().map(|bridge| format!("-o {bridge} -j {}", self.group(group))));
        }
        rules.push(format!("{BETWEEN} -j {}", self.dropped(DropReason::Neighbour)));
        if policy.internet {
            rules.push("-j ACCEPT".to_owned());
            return rules;
        }
        rules.push("-m conntrack --ctstate RELATED -j ACCEPT".to_owned());
        for destination in policy.destinations.iter().filter(|destination| is_of(kind, destination.prefix().0)) {
            let ((base, length), ports) = (destination.prefix(), destination.service().map(ports).unwrap_or_default());
            rules.push(format!("-d {base}/{length} {ports} -j ACCEPT"));
        }
        // All else is dropped where this chain was come from.
        rules
    }

    /// Rules of a port's policy in chains that others have rules in.
    pub(super) fn policy_shared(&self, kind: Kind, port: &Confined<'_>) -> Vec<Shared> {
        let whole = if kind == Kind::Iptables { 32 } else { 128 };
        let shown = |address: IpAddr| format!("{address}/{whole}");
        let (access, identity) = (port.access, port.identity);
        let (link, mut rules) = (&identity.link, Vec::new());
        for routed in identity.routed().filter(|&address| is_of(kind, address)) {
            let address = shown(routed);
            if access.goes_out() {
                let target = if access.is_particular() { link } else { "ACCEPT" };
                rules.push(("filter", self.name("out"), format!("-s {address} -j {target}")));
                rules.push(("filter", self.name("in"), format!("-d {address} -j ACCEPT")));
            }
            if access.goes_out() && !access.policy.routed && !identity.extra.contains(&routed) {
                rules.push(("nat", self.name("masq"), format!("-s {address} -j MASQUERADE")));
            }
            if let Some(group) = access.group() {
                rules.push(("filter", self.name("near"), format!("-s {address} -j {link}")));
                rules.push(("filter", self.group(group), format!("-d {address} -j ACCEPT")));
            }
        }
        rules.extend(reasons(&access.policy).map(|reason| {
            let counted = format!("-m mac --mac-source {} -j RETURN", identity.mac);
            ("filter", self.counting(reason), counted)
        }));
        if access.is_served() {
            for address in identity.addresses().filter(|&address| is_of(kind, address)).map(shown) {
                rules.push(("filter", self.name("served"), format!("-s {address} -j {link}{SERVED}")));
            }
        }
        let groups = identity.groups.iter().copied().chain(identity.reports().then_some(REPORTS.into()));
        for group in groups.filter(|&group| is_of(kind, group)).map(shown) {
            let own = identity.addresses().filter(|&address| is_of(kind, address)).map(shown);
            let told = |own: String| ("filter", self.name("told"), format!("-s {own} -d {group} -j ACCEPT"));
            rules.extend(own.map(told));
        }
        rules
    }

    /// What the host sends to groups that a port takes part in.
    fn heard(identity: &Identity) -> Vec<String> {
        let group = |group: &IpAddr| {
            let (mac, protocol, words) = match group {
                IpAddr::V4(_) => (Mac::of_group(*group), "IPv4", "--ip-dst"),
                IpAddr::V6(_) => (Mac::of_group(*group), "IPv6", "--ip6-dst"),
            };
            format!("-p {protocol} -d {mac} {words} {group} -j ACCEPT")
        };
        let mut rules: Vec<_> = identity.groups.iter().map(group).collect();
        // Who routes groups asks for their members.
        rules.push("-p IPv4 -d 01:00:5e:00:00:01 --ip-proto igmp -j ACCEPT".to_owned());
        rules
    }

    /// The gateway stands for the site's name servers.
    pub(super) fn names(&self, kind: Kind) -> Vec<String> {
        let server = self.name_servers().find(|&server| is_of(kind, server));
        // Not the address of the link: nothing of that is routed.
        let Some((server, gateway)) = server.zip(self.gateways(kind).next()) else { return Vec::new() };
        let to = if server.is_ipv4() { format!("{server}") } else { format!("[{server}]") };
        let rule = |bridge: &str, transport| {
            format!("-i {bridge} -d {gateway} -p {transport} --dport 53 -j DNAT --to-destination {to}")
        };
        self.bridges().iter().flat_map(|bridge| ["tcp", "udp"].map(|transport| rule(bridge, transport))).collect()
    }
}
