//! The rules as text for the `-restore` commands.

use std::net::IpAddr;

use super::{
    super::{Confined, Notes},
    Kind,
    chains::Chains,
    class::{HEARD, SERVED},
    counts::{BEHIND, mac_of, target_of},
    state::State,
};
use crate::{Mac, NetConfig};

/// What the rules of one network depend on.
#[derive(Debug)]
pub(super) struct Text {
    pub(super) config: NetConfig,
    /// Name of the first bridge.
    pub(super) bridge: String,
}

/// A rule in a chain that others have rules in: table, chain, rule.
pub(super) type Shared = (&'static str, String, String);

/// A hook of ours: table, the chain of the host that leads to it, our chain.
type Hook = (&'static str, &'static str, String);

impl Text {
    pub(super) fn new(config: NetConfig) -> Self {
        Self { config, bridge: config.instance.bridge_name() }
    }

    pub(super) fn bridge(&self) -> &str {
        &self.bridge
    }

    /// The bridges: the first, and all that follow it.
    pub(super) fn bridges(&self) -> [String; 2] {
        [self.bridge.clone(), format!("{}.+", self.bridge)]
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

    pub(super) fn gateway_mac(&self) -> Mac {
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
    pub(super) fn port_of<'c>(&self, chain: &'c str) -> Option<&'c str> {
        let link = chain.strip_suffix(SERVED).or_else(|| chain.strip_suffix(HEARD)).unwrap_or(chain);
        let number = link.strip_prefix(&self.bridge)?.strip_prefix('-')?;
        (!number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit())).then_some(link)
    }

    /// Table of the chains of ports.
    pub(super) const fn port_table(kind: Kind) -> &'static str {
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
        shared.extend(BEHIND.map(|reason| ("filter", self.counting(reason))));
        shared.push(("filter", self.name("served")));
        shared.push(("filter", self.name("told")));
        if self.config.internet {
            shared.extend(["out", "in", "near"].map(|part| ("filter", self.name(part))));
            shared.push(("nat", self.name("masq")));
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
            let own = self.still_counted(kind, link, self.port_rules(kind, port.identity), state);
            change.chain(Self::port_table(kind), link, &own);
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
                    target_of(rule).and_then(|target| self.port_of(target)).is_some_and(link)
                } else if let Some(mac) = mac_of(rule) {
                    self.owner_of(mac).is_some_and(address)
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
