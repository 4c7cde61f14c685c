//! The rules as text for the `-restore` commands.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::{
    super::{Confined, Notes},
    Kind,
    class::{HEARD, SERVED},
    state::State,
};
use crate::{
    Mac, NetConfig,
    identity::{Identity, REPORTS},
};

/// Lines of one table.
#[derive(Debug, Default)]
struct Table {
    name: &'static str,
    chains: String,
    rules: String,
}

/// A change: of some tables, one after the other.
#[derive(Debug, Default)]
pub(super) struct Chains {
    tables: Vec<Table>,
    policy: &'static str,
}

impl Chains {
    fn new(kind: Kind) -> Self {
        // What stands where iptables has no policy for chains of users.
        Self { tables: Vec::new(), policy: if kind == Kind::Ebtables { "RETURN" } else { "- [0:0]" } }
    }

    fn table(&mut self, name: &'static str) -> &mut Table {
        let place = self.tables.iter().position(|table| table.name == name).unwrap_or_else(|| {
            self.tables.push(Table { name, ..Table::default() });
            self.tables.len() - 1
        });
        // Found or pushed above.
        &mut self.tables[place]
    }

    /// Makes a chain of exactly these rules.
    fn chain(&mut self, table: &'static str, name: &str, rules: &[String]) {
        self.ensure(table, name);
        let table = self.table(table);
        let _infallible = writeln!(table.rules, "-F {name}");
        for rule in rules {
            let _infallible = writeln!(table.rules, "-A {name} {rule}");
        }
    }

    /// Makes a chain, whatever is in it.
    fn ensure(&mut self, table: &'static str, name: &str) {
        let policy = self.policy;
        let _infallible = writeln!(self.table(table).chains, ":{name} {policy}");
    }

    fn line(&mut self, table: &'static str, line: &str) {
        let _infallible = writeln!(self.table(table).rules, "{line}");
    }

    pub(super) fn render(&self) -> String {
        self.tables.iter().map(|table| format!("*{}\n{}{}COMMIT\n", table.name, table.chains, table.rules)).collect()
    }
}

/// What the rules of one network depend on.
#[derive(Debug)]
pub(super) struct Text {
    config: NetConfig,
    bridge: String,
}

/// A rule in a chain that others have rules in: table, chain, rule.
pub(super) type Shared = (&'static str, String, String);

/// A hook of ours: table, the chain of the host that leads to it, our chain.
type Hook = (&'static str, &'static str, String);

fn owned<const N: usize>(rules: [&str; N]) -> Vec<String> {
    rules.map(str::to_owned).into()
}

/// An address in four words, as matches of `u32` from `at` on.
fn words(at: usize, address: Ipv6Addr) -> String {
    let words = address.octets();
    let words = words.chunks(4).map(|word| word.iter().fold(0_u32, |sum, &octet| sum << 8 | u32::from(octet)));
    words.enumerate().map(|(n, word)| format!(" && {}=0x{word:08x}", at + 4 * n)).collect()
}

impl Text {
    pub(super) fn new(config: NetConfig) -> Self {
        Self { config, bridge: config.instance.bridge_name() }
    }

    pub(super) fn bridge(&self) -> &str {
        &self.bridge
    }

    pub(super) const fn has_ipv6(&self) -> bool {
        self.config.subnet6.is_some()
    }

    pub(super) fn name(&self, part: &str) -> String {
        format!("{}-{part}", self.bridge)
    }

    pub(super) fn note4(&self) -> String {
        self.name("fwd4")
    }

    pub(super) fn note6(&self) -> String {
        self.name("fwd6")
    }

    fn gateway_mac(&self) -> Mac {
        Mac::of(self.config.instance, self.config.subnet.gateway())
    }

    /// Chain of the addresses of a group of neighbours.
    pub(super) fn group(&self, number: u32) -> String {
        format!("{}{number:08x}", self.name("g-"))
    }

    pub(super) fn name_servers(&self) -> impl Iterator<Item = IpAddr> {
        self.config.name_servers()
    }

    /// The host's addresses on the bridge, the one that is routed first.
    pub(super) fn gateways(&self, kind: Kind) -> impl Iterator<Item = IpAddr> + use<> {
        let config = self.config;
        let six = config.subnet6.map(|six| [six.gateway(config.subnet), self.gateway_mac().link_local()]);
        let all = [IpAddr::V4(config.subnet.gateway())].into_iter().chain(six.into_iter().flatten().map(IpAddr::V6));
        all.filter(move |gateway| gateway.is_ipv4() == (kind == Kind::Iptables))
    }

    /// The link whose chain it is, if it is a port's.
    fn port_of<'c>(&self, chain: &'c str) -> Option<&'c str> {
        let link = chain.strip_suffix(SERVED).or_else(|| chain.strip_suffix(HEARD)).unwrap_or(chain);
        let number = link.strip_prefix(&self.bridge)?.strip_prefix('-')?;
        (!number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit())).then_some(link)
    }

    /// Table of the chains of ports.
    const fn port_table(kind: Kind) -> &'static str {
        match kind {
            Kind::Ebtables => "nat",
            Kind::Iptables | Kind::Ip6tables => "raw",
        }
    }

    fn hooks(&self, kind: Kind) -> Vec<Hook> {
        let hook = |table, chain, part| (table, chain, self.name(part));
        match kind {
            Kind::Ebtables => vec![
                hook("nat", "PREROUTING", "hook"),
                hook("filter", "INPUT", "host"),
                hook("filter", "FORWARD", "route"),
                hook("filter", "OUTPUT", "to"),
            ],
            Kind::Iptables | Kind::Ip6tables => {
                let mut hooks = vec![
                    hook("raw", "PREROUTING", "hook"),
                    hook("filter", "INPUT", "host"),
                    hook("filter", "FORWARD", "route"),
                ];
                hooks.extend(self.config.internet.then(|| hook("nat", "POSTROUTING", "nat")));
                hooks.extend((!self.names(kind).is_empty()).then(|| hook("nat", "PREROUTING", "names")));
                hooks
            }
        }
    }

    /// Chains that ports have rules in beside their own, and are not emptied.
    fn shared(&self, kind: Kind) -> Vec<(&'static str, String)> {
        let mut shared = vec![(Self::port_table(kind), self.bridge.clone())];
        if kind == Kind::Ebtables {
            shared.push(("filter", self.name("groups")));
            return shared;
        }
        shared.push(("filter", self.name("served")));
        shared.push(("filter", self.name("told")));
        if self.config.internet {
            shared.extend(["out", "in", "near"].map(|part| ("filter", self.name(part))));
            shared.push(("nat", self.name("nat")));
        }
        shared
    }

    /// The same, and the groups that there are.
    fn shared_now(&self, kind: Kind, state: &State) -> Vec<(&'static str, String)> {
        let (mut shared, prefix) = (self.shared(kind), self.name("g-"));
        let groups = state.chains("filter").map(|(chain, _)| chain).filter(|chain| chain.starts_with(&prefix));
        shared.extend(groups.map(|chain| ("filter", chain.to_owned())));
        shared
    }

    /// Chains of the same rules whatever ports there are.
    fn fixed(&self, kind: Kind) -> Vec<(&'static str, String, Vec<String>)> {
        match kind {
            Kind::Ebtables => self.fixed_ebtables(),
            Kind::Iptables => self.fixed_iptables(),
            Kind::Ip6tables => self.fixed_ip6tables(),
        }
    }

    fn fixed_ebtables(&self) -> Vec<(&'static str, String, Vec<String>)> {
        let (bridge, gateway) = (&self.bridge, self.gateway_mac());
        let ports = format!("{bridge}-+");
        let arp = |to: &str, operation| {
            format!(
                "-p ARP -d {to} --arp-htype 1 --arp-ptype 0x0800 --arp-opcode {operation} --arp-ip-dst ! 0.0.0.0 -j ACCEPT"
            )
        };
        let gateway_text = gateway.to_string();
        let all = "ff:ff:ff:ff:ff:ff";
        let mut arps: Vec<_> =
            [all, &*gateway_text].iter().flat_map(|to| [1, 2].map(|operation| arp(to, operation))).collect();
        arps.push("-j DROP".to_owned());
        // What the host sends to groups comes to their members alone.
        let multicast = format!("-o {ports} -d 01:00:00:00:00:00/01:00:00:00:00:00");
        let to = vec![
            format!("{multicast} -j {}", self.name("groups")),
            // Questions of the link itself are for all.
            format!("-o {ports} -p IPv6 -d 33:33:00:00:00:01 --ip6-dst ff02::1 -j ACCEPT"),
            format!("-o {ports} -p IPv6 -d 33:33:ff:00:00:00/ff:ff:ff:00:00:00 --ip6-dst ff02::1:ff00:0/104 -j ACCEPT"),
            format!("{multicast} -j DROP"),
        ];
        let group = |mac: &str, to: &str| format!("-p IPv6 -d {mac} --ip6-dst {to} -j ACCEPT");
        vec![
            ("nat", self.name("hook"), vec![format!("-i {ports} -j {bridge}"), format!("-i {ports} -j DROP")]),
            ("nat", self.name("arp"), arps),
            (
                "nat",
                self.name("ip6"),
                vec![
                    format!("-p IPv6 -d {gateway} --ip6-dst ! ff00::/8 -j ACCEPT"),
                    group("33:33:00:00:00:01", "ff02::1"),
                    group("33:33:00:00:00:02", "ff02::2"),
                    group("33:33:00:00:00:16", "ff02::16"),
                    group("33:33:00:01:00:02", "ff02::1:2"),
                    group("33:33:ff:00:00:00/ff:ff:ff:00:00:00", "ff02::1:ff00:0/104"),
                    "-j DROP".to_owned(),
                ],
            ),
            ("filter", self.name("host"), vec![format!("-i {ports} -d 01:80:c2:00:00:00/ff:ff:ff:ff:ff:f0 -j DROP")]),
            ("filter", self.name("route"), vec![format!("-i {ports} -j DROP"), format!("-o {ports} -j DROP")]),
            ("filter", self.name("to"), to),
        ]
    }

    /// What both families have alike.
    fn fixed_both(&self, kind: Kind, to_host: Vec<String>) -> Vec<(&'static str, String, Vec<String>)> {
        let bridge = &self.bridge;
        let past_bridge = format!("-i {bridge}-+ -j DROP");
        let mut host = vec![past_bridge.clone(), format!("! -i {bridge} -j RETURN")];
        let mut route = vec![past_bridge.clone()];
        route.extend(self.config.internet.then(|| format!("-i {bridge} -o {bridge} -j {}", self.name("near"))));
        route.push(format!("-i {bridge} -o {bridge} -j DROP"));
        if self.config.internet {
            host.push("-m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT".to_owned());
            route.extend([
                // See the rules of nft: narrow uplinks whose routers say nothing.
                format!("-i {bridge} -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu"),
                format!("-i {bridge} -j {}", self.name("out")),
                format!("-o {bridge} -m conntrack --ctstate ESTABLISHED,RELATED -j {}", self.name("in")),
                // Who gets what is for groups is decided at each port.
                format!("-o {bridge} -d {} -j ACCEPT", if kind == Kind::Iptables { "224.0.0.0/4" } else { "ff00::/8" }),
            ]);
        }
        host.extend(to_host);
        host.push(format!("-j {}", self.name("served")));
        host.push(format!("-j {}", self.name("told")));
        host.push("-j DROP".to_owned());
        route.extend([format!("-i {bridge} -j DROP"), format!("-o {bridge} -j DROP")]);
        let names = self.names(kind);
        let names = (!names.is_empty()).then(|| ("nat", self.name("names"), names));
        let fixed = vec![
            (
                "raw",
                self.name("hook"),
                vec![past_bridge, format!("-i {bridge} -j {bridge}"), format!("-i {bridge} -j DROP")],
            ),
            ("filter", self.name("host"), host),
            ("filter", self.name("route"), route),
        ];
        fixed.into_iter().chain(names).collect()
    }

    fn fixed_iptables(&self) -> Vec<(&'static str, String, Vec<String>)> {
        let gateway = self.config.subnet.gateway();
        let mut all = self.fixed_both(Kind::Iptables, vec![format!("-d {gateway} -p icmp --icmp-type 8 -j ACCEPT")]);
        all.push((
            "raw",
            self.name("whole"),
            // Five words of header; no flag or place of a fragment.
            owned(["-m u32 ! --u32 \"0>>24&0xF=5\" -j DROP", "-m u32 ! --u32 \"4&0x3FFF=0\" -j DROP"]),
        ));
        let broadcast = self.config.subnet.broadcast().to_string();
        let nowhere = ["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", &broadcast];
        let mut to: Vec<_> = nowhere.iter().map(|to| format!("-d {to} -j DROP")).collect();
        to.extend(owned(["-p udp ! --sport 67 -j ACCEPT", "-p tcp -j ACCEPT", "-p icmp -j ACCEPT", "-j DROP"]));
        all.push(("raw", self.name("to"), to));
        all
    }

    fn fixed_ip6tables(&self) -> Vec<(&'static str, String, Vec<String>)> {
        let mut host: Vec<_> =
            [135, 136].iter().map(|kind| format!("-p icmpv6 --icmpv6-type {kind} -j ACCEPT")).collect();
        if let Some(subnet6) = self.config.subnet6 {
            for to in [subnet6.gateway(self.config.subnet), self.gateway_mac().link_local()] {
                host.push(format!("-d {to} -p icmpv6 --icmpv6-type 128 -j ACCEPT"));
            }
        }
        let mut all = self.fixed_both(Kind::Ip6tables, host);
        // The word at 4 holds length, first next header and hop limit.
        let to = owned([
            "-d ff00::/8 -j DROP",
            "-d ::/96 -j DROP",
            "-d ::ffff:0:0/96 -j DROP",
            "-p udp ! --sport 547 -m u32 --u32 \"4>>8&0xFF=17 && 4>>16=8:0xFFFF\" -j ACCEPT",
            "-m u32 --u32 \"4>>8&0xFF=6 && 4>>16=20:0xFFFF\" -j ACCEPT",
            "-m u32 --u32 \"4>>8&0xFF=58 && 4>>16=8:0xFFFF && 40>>24=1:4,128:129\" -j ACCEPT",
            "-j DROP",
        ]);
        all.push(("raw", self.name("to"), to));
        all
    }

    fn port_rules(&self, kind: Kind, identity: &Identity) -> Vec<String> {
        match kind {
            Kind::Ebtables => self.port_ebtables(identity),
            Kind::Iptables => self.port_iptables(identity),
            Kind::Ip6tables => self.port_ip6tables(identity),
        }
    }

    fn port_ebtables(&self, identity: &Identity) -> Vec<String> {
        let mac = identity.mac;
        let senders = || identity.addresses4().chain([Ipv4Addr::UNSPECIFIED]);
        let mut rules = vec![format!("-s ! {mac} -j DROP")];
        for sender in senders() {
            rules.push(format!("-p ARP --arp-ip-src {sender} --arp-mac-src {mac} -j {}", self.name("arp")));
        }
        // iptables no longer knows which MAC a packet came to.
        let not_by_gateway = || format!("-p IPv4 -d {} --ip-dst 224.0.0.0/4 -j DROP", self.gateway_mac());
        rules.extend(identity.reports().then(not_by_gateway));
        for own in identity.addresses4() {
            rules.push(format!("-p IPv4 -d {} --ip-src {own} -j ACCEPT", self.gateway_mac()));
        }
        for &group in &identity.groups {
            let (protocol, from, to) = match group {
                IpAddr::V4(_) => ("IPv4", "--ip-src", "--ip-dst"),
                IpAddr::V6(_) => ("IPv6", "--ip6-src", "--ip6-dst"),
            };
            for own in identity.addresses().filter(|own| own.is_ipv4() == group.is_ipv4()) {
                rules.push(format!("-p {protocol} -d {} {from} {own} {to} {group} -j ACCEPT", Mac::of_group(group)));
            }
        }
        for sender in senders().filter(|_| identity.reports()) {
            rules.push(format!(
                "-p IPv4 -d {} --ip-src {sender} --ip-dst {REPORTS} --ip-proto igmp -j ACCEPT",
                Mac::of_group(REPORTS.into())
            ));
        }
        for sender in senders() {
            rules.push(format!(
                "-p IPv4 -d ff:ff:ff:ff:ff:ff --ip-src {sender} --ip-dst 255.255.255.255 --ip-proto udp --ip-sport 68 \
                 --ip-dport 67 -j ACCEPT"
            ));
        }
        for sender in identity.senders6() {
            rules.push(format!("-p IPv6 --ip6-src {sender} -j {}", self.name("ip6")));
        }
        rules.push("-j DROP".to_owned());
        rules
    }

    fn port_iptables(&self, identity: &Identity) -> Vec<String> {
        let [a, b, c, d, e, f] = identity.mac.octets();
        // A request over Ethernet; of the hardware address that follows.
        let question = format!(
            "0>>22&0x3C@8>>8=0x010106 && 0>>22&0x3C@36=0x{a:02x}{b:02x}{c:02x}{d:02x} && 0>>22&0x3C@40>>16=0x{e:02x}{f:02x}"
        );
        let mut rules = Vec::new();
        if identity.reports() {
            // The one packet with an option, a router alert.
            let report = "0>>24=0x46 && 0&0xFFFF=32:0xFFFF && 4&0x3FFF=0 && 20=0x94040000 && 24>>24=0x22";
            rules.push(format!("-d {REPORTS} -p igmp -m ttl --ttl-eq 1 -m u32 --u32 \"{report}\" -j ACCEPT"));
        }
        rules.push(format!("-j {}", self.name("whole")));
        rules.push(format!("-d 255.255.255.255 -p udp --sport 68 --dport 67 -m u32 --u32 \"{question}\" -j ACCEPT"));
        for own in identity.addresses4() {
            for group in identity.groups.iter().filter(|group| group.is_ipv4()) {
                rules.push(format!("-s {own} -d {group} -p udp ! --sport 67 -j ACCEPT"));
            }
            rules.push(format!("-s {own} -g {}", self.name("to")));
        }
        rules.push("-j DROP".to_owned());
        rules
    }

    fn port_ip6tables(&self, identity: &Identity) -> Vec<String> {
        const SOLICITED: &str = "-d ff02::1:ff00:0/104";
        const ONE_HOST: &str = "! -d ff00::/8";
        let [a, b, c, d, e, f] = identity.mac.octets();
        let rule = |what: &str, u32: &str| format!("{what} -m u32 --u32 \"{u32}\" -j ACCEPT");
        let own_link = |at: usize, kind: u8| {
            format!(" && {at}=0x{kind:02x}01{a:02x}{b:02x} && {}=0x{c:02x}{d:02x}{e:02x}{f:02x}", at + 4)
        };
        let targets: Vec<_> = identity.addresses6().collect();
        let link_local = identity.mac.link_local();
        let report = "4>>16=16:0xFFFF && 4&0xFFFF=0x0001 && 40=0x3a000502 && 44=0x00000100 && 48>>24=143";
        let mut rules = vec![
            rule("-s ::/128 -d ff02::16/128", report),
            rule(&format!("-s {link_local}/128 -d ff02::16/128"), report),
        ];
        // Whether an address is in use, with a nonce or without (RFC 7527).
        for &target in &targets {
            let target = words(48, target);
            let who = format!("-s ::/128 {SOLICITED}");
            rules.push(rule(&who, &format!("4=0x00183aff && 40>>24=135{target}")));
            rules.push(rule(&who, &format!("4=0x00203aff && 40>>24=135{target} && 64>>16=0x0e01")));
        }
        let router = "4=0x00083aff && 40>>24=133";
        rules.push(rule("-s ::/128 -d ff02::2/128", router));
        rules.push("-s ::/128 -j DROP".to_owned());
        for to in [SOLICITED, ONE_HOST] {
            rules.push(rule(to, "4=0x00183aff && 40>>24=135"));
            rules.push(rule(to, &format!("4=0x00203aff && 40>>24=135{}", own_link(64, 1))));
        }
        for &target in &targets {
            let told = format!("4=0x00203aff && 40>>24=136 && 44>>31=0{}{}", words(48, target), own_link(64, 2));
            rules.extend([ONE_HOST, "-d ff02::1/128"].map(|to| rule(to, &told)));
        }
        rules.push(rule("-d ff02::2/128", router));
        rules.push(rule("-d ff02::2/128", &format!("4=0x00103aff && 40>>24=133{}", own_link(48, 1))));
        rules.push(rule(
            &format!("-s {link_local}/128 -d ff02::1:2/128 -p udp --sport 546 --dport 547"),
            "4>>16=8:0xFFFF && 4>>8&0xFF=17",
        ));
        for own in targets {
            for group in identity.groups.iter().filter(|group| group.is_ipv6()) {
                let whole = "4>>8&0xFF=17 && 4>>16=8:0xFFFF";
                rules.push(rule(&format!("-s {own}/128 -d {group}/128 -p udp ! --sport 547"), whole));
            }
            rules.push(format!("-s {own}/128 -g {}", self.name("to")));
        }
        rules.push("-j DROP".to_owned());
        rules
    }

    /// Rules of a port in chains that others have rules in.
    fn shared_rules(&self, kind: Kind, port: &Confined<'_>) -> Vec<Shared> {
        let link = &port.identity.link;
        let matched = match kind {
            Kind::Ebtables => format!("-i {link} -j {link}"),
            Kind::Iptables | Kind::Ip6tables => format!("-m physdev --physdev-in {link} -j {link}"),
        };
        let mut rules = vec![(Self::port_table(kind), self.bridge.clone(), matched)];
        if kind != Kind::Ebtables {
            rules.extend(self.policy_shared(kind, port));
        } else if port.access.takes_part() {
            rules.push(("filter", self.name("groups"), format!("-o {link} -j {link}{HEARD}")));
        }
        rules
    }

    pub(super) fn base(&self, kind: Kind, notes: Notes, state: &State) -> Chains {
        let mut change = Chains::new(kind);
        for (table, chain) in self.shared(kind) {
            if !state.has_chain(table, &chain) {
                change.ensure(table, &chain);
            }
        }
        for (table, chain, rules) in self.fixed(kind) {
            change.chain(table, &chain, &rules);
        }
        if kind == Kind::Iptables {
            for (noted, note) in [(notes.ipv4, self.note4()), (notes.ipv6, self.note6())] {
                if noted {
                    change.ensure("raw", &note);
                }
            }
        }
        for (table, from, to) in self.hooks(kind) {
            if !state.has_rule(table, from, &format!("-j {to}")) {
                // First, before what the host itself may accept.
                change.line(table, &format!("-I {from} 1 -j {to}"));
            }
        }
        change
    }

    pub(super) fn add(&self, kind: Kind, ports: &[Confined<'_>], state: &State) -> Chains {
        let mut change = Chains::new(kind);
        for port in ports {
            let wanted = self.shared_rules(kind, port);
            // What an earlier process gave to this link or address beyond that.
            let (link, addresses) = (&port.identity.link, port.identity.addresses().collect::<Vec<_>>());
            let surplus = self.shared_of(kind, &|other| other == link, &|other| addresses.contains(&other), state);
            for (table, chain, rule) in surplus {
                if !wanted.contains(&(table, chain.clone(), rule.clone())) {
                    change.line(table, &format!("-D {chain} {rule}"));
                }
            }
            change.chain(Self::port_table(kind), &port.identity.link, &self.port_rules(kind, port.identity));
            // A group's chain has to be there before a rule leads to it.
            for (table, chain, _) in &wanted {
                if !state.has_chain(table, chain) {
                    change.ensure(table, chain);
                }
            }
            for (chain, rules) in self.policy_chains(kind, port) {
                change.chain("filter", &chain, &rules);
            }
            for (table, chain, rule) in wanted {
                if !state.has_rule(table, &chain, &rule) {
                    change.line(table, &format!("-A {chain} {rule}"));
                }
            }
        }
        change
    }

    /// Rules that some ports have in shared chains, as they are shown.
    fn shared_of(
        &self,
        kind: Kind,
        link: &dyn Fn(&str) -> bool,
        address: &dyn Fn(IpAddr) -> bool,
        state: &State,
    ) -> Vec<Shared> {
        let mut found = Vec::new();
        for (table, chain) in self.shared_now(kind, state) {
            for rule in state.rules(table, &chain) {
                let by_target = [self.bridge.clone(), self.name("served"), self.name("groups")].contains(&chain);
                let concerns = if by_target {
                    rule.rsplit(' ').next().and_then(|target| self.port_of(target)).is_some_and(link)
                } else {
                    Self::address_of(rule).is_some_and(address)
                };
                if concerns {
                    found.push((table, chain.clone(), rule.clone()));
                }
            }
        }
        found
    }

    /// The address of the port that a rule is about: its first.
    fn address_of(rule: &str) -> Option<IpAddr> {
        let mut words = rule.split(' ');
        let is_before = |word: &str| matches!(word, "-s" | "-d" | "--ip-src" | "--ip6-src");
        let address = words.find(|word| is_before(word)).and_then(|_| words.next())?;
        address.split('/').next()?.parse().ok()
    }

    pub(super) fn remove(
        &self,
        kind: Kind,
        link: &dyn Fn(&str) -> bool,
        address: &dyn Fn(IpAddr) -> bool,
        state: &State,
    ) -> Chains {
        let mut change = Chains::new(kind);
        for (table, chain, rule) in self.shared_of(kind, link, address, state) {
            change.line(table, &format!("-D {chain} {rule}"));
        }
        for table in [Self::port_table(kind), "filter"] {
            for (chain, _) in state.chains(table).filter(|(chain, _)| self.port_of(chain).is_some_and(link)) {
                change.line(table, &format!("-F {chain}"));
                change.line(table, &format!("-X {chain}"));
            }
        }
        change
    }

    /// The ports that have chains, each with its addresses.
    pub(super) fn ports(&self, ebtables: &State) -> Vec<(String, Vec<IpAddr>)> {
        let ports = ebtables.chains("nat").filter(|(chain, _)| self.port_of(chain).is_some());
        ports
            .map(|(chain, rules)| {
                let mut addresses: Vec<_> = rules.iter().filter_map(|rule| Self::source_of(rule)).collect();
                addresses.sort();
                addresses.dedup();
                (chain.to_owned(), addresses)
            })
            .collect()
    }

    fn source_of(rule: &str) -> Option<IpAddr> {
        let (_, rest) = rule.split_once("--ip-src ").or_else(|| rule.split_once("--ip6-src "))?;
        let address: IpAddr = rest.split([' ', '/']).next()?.parse().ok()?;
        (!address.is_unspecified()).then_some(address)
    }

    /// What a chain of the host's, or one of ours, lacks.
    pub(super) fn base_missing(&self, kind: Kind, state: &State) -> Option<String> {
        for (table, from, to) in self.hooks(kind) {
            if !state.has_rule(table, from, &format!("-j {to}")) {
                return Some(format!("table {table} has no way from {from} to {to}"));
            }
        }
        self.fixed(kind).into_iter().find_map(|(table, chain, rules)| Self::lacks(table, &chain, &rules, state))
    }

    pub(super) fn missing(&self, kind: Kind, port: &Confined<'_>, state: &State) -> Option<String> {
        let lacking =
            self.shared_rules(kind, port).into_iter().find(|(table, chain, rule)| !state.has_rule(table, chain, rule));
        if let Some((table, chain, _)) = lacking {
            return Some(format!("chain {chain} of table {table} lacks its rule"));
        }
        let own = (Self::port_table(kind), port.identity.link.clone(), self.port_rules(kind, port.identity));
        let policy = self.policy_chains(kind, port).into_iter().map(|(chain, rules)| ("filter", chain, rules));
        std::iter::once(own).chain(policy).find_map(|(table, chain, rules)| Self::lacks(table, &chain, &rules, state))
    }

    /// The programs show rules in words of their own, so they are counted.
    fn lacks(table: &str, chain: &str, rules: &[String], state: &State) -> Option<String> {
        let shown = state.rules(table, chain).len();
        (shown != rules.len())
            .then(|| format!("chain {chain} of table {table} has {shown} rules and not {}", rules.len()))
    }

    /// Nothing is left of the network.
    pub(super) fn close(&self, kind: Kind, state: &State) -> Chains {
        let mut change = Chains::new(kind);
        for (table, from, to) in self.hooks(kind) {
            for rule in state.rules(table, from).iter().filter(|rule| **rule == format!("-j {to}")) {
                change.line(table, &format!("-D {from} {rule}"));
            }
        }
        for table in ["nat", "raw", "filter"] {
            let prefix = format!("{}-", self.bridge);
            let ours =
                || state.chains(table).map(|(chain, _)| chain).filter(|c| *c == self.bridge || c.starts_with(&prefix));
            for step in ["-F", "-X"] {
                for chain in ours() {
                    change.line(table, &format!("{step} {chain}"));
                }
            }
        }
        change
    }
}
