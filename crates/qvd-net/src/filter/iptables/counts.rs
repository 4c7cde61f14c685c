//! Why frames were dropped, by the counters of rules: at the port the chain of the
//! port that led to a chain of the reason, behind it a rule of the port's MAC.

use std::{collections::BTreeMap, net::Ipv4Addr};

use super::{Kind, chains::Chains, state::State, text::Text};
use crate::{DropReason, Mac, drops::Counted};

/// Reasons behind the bridge.
pub(super) const BEHIND: [DropReason; 6] = [
    DropReason::Policy,
    DropReason::Neighbour,
    DropReason::Host,
    DropReason::Rate,
    DropReason::Connections,
    DropReason::Names,
];

/// Where a rule leads to: the programs show that last.
pub(super) fn target_of(rule: &str) -> Option<&str> {
    rule.rsplit(' ').next()
}

/// The MAC that a rule counts the packets of.
pub(super) fn mac_of(rule: &str) -> Option<Mac> {
    let (_, rest) = rule.split_once("--mac-source ")?;
    rest.split(' ').next()?.to_ascii_lowercase().parse().ok()
}

impl Text {
    /// The chain of what is dropped for a reason.
    pub(super) fn dropped(&self, reason: DropReason) -> String {
        format!("{}{}", self.name("d-"), reason.word())
    }

    /// The chain that counts whose it is, behind the bridge.
    pub(super) fn counting(&self, reason: DropReason) -> String {
        format!("{}{}", self.name("w-"), reason.word())
    }

    fn reason_of(&self, chain: &str) -> Option<DropReason> {
        let word = ["d-", "w-"].iter().find_map(|kind| chain.strip_prefix(&self.name(kind)))?;
        DropReason::ALL.into_iter().find(|reason| reason.word() == word)
    }

    /// The chains that drop.
    pub(super) fn ends(&self, kind: Kind) -> Vec<(&'static str, String, Vec<String>)> {
        use DropReason::{
            Arp, Destination, Dhcp, Ethertype, Fragment, NeighbourMessage, Option, Protocol, SourceAddress, SourceMac,
        };
        let at_port: &[DropReason] = match kind {
            Kind::Ebtables => &[SourceMac, SourceAddress, Ethertype, Arp, Dhcp, Destination],
            Kind::Iptables => &[Option, Fragment, Dhcp, Destination, Protocol],
            Kind::Ip6tables => &[NeighbourMessage, Option, Fragment, Destination, Protocol],
        };
        let drop = || "-j DROP".to_owned();
        let mut ends: Vec<_> =
            at_port.iter().map(|&reason| (Self::port_table(kind), self.dropped(reason), vec![drop()])).collect();
        if kind != Kind::Ebtables {
            let behind = |reason| vec![format!("-j {}", self.counting(reason)), drop()];
            ends.extend(BEHIND.map(|reason| ("filter", self.dropped(reason), behind(reason))));
        }
        ends
    }

    /// The desktop's address that a MAC is of.
    pub(super) fn owner_of(&self, mac: Mac) -> Option<std::net::IpAddr> {
        let ([first, ..], [.., b, c, d]) = (self.config.subnet.gateway().octets(), mac.octets());
        let owner = Ipv4Addr::new(first, b, c, d);
        (Mac::of(self.config.instance, owner) == mac).then_some(owner.into())
    }

    /// What was dropped as `kind` has counted it, of each link, or of each MAC behind the bridge.
    pub(super) fn count(&self, kind: Kind, state: &State, counted: &mut Counted) {
        for (chain, rule, packets) in state.counts(Self::port_table(kind)).filter(|(.., packets)| *packets > 0) {
            let reason = target_of(rule).and_then(|target| self.reason_of(target));
            if let Some((link, reason)) = self.port_of(chain).zip(reason) {
                *counted.entry((link.to_owned(), reason.mark())).or_default() += packets;
            }
        }
        for (chain, rule, packets) in state.counts("filter").filter(|(.., packets)| *packets > 0) {
            if let Some((mac, reason)) = mac_of(rule).zip(self.reason_of(chain)) {
                *counted.entry((mac.to_string(), reason.mark())).or_default() += packets;
            }
        }
    }

    /// Rules that take the place of a port's, and go on counting.
    pub(super) fn still_counted(&self, kind: Kind, link: &str, mut rules: Vec<String>, state: &State) -> Vec<String> {
        let mut before = BTreeMap::<&str, u64>::new();
        for (chain, rule, packets) in state.counts(Self::port_table(kind)) {
            if chain == link
                && packets > 0
                && let Some(target) = target_of(rule).filter(|target| self.reason_of(target).is_some())
            {
                *before.entry(target).or_default() += packets;
            }
        }
        for (target, packets) in before {
            if let Some(rule) = rules.iter_mut().find(|rule| target_of(rule) == Some(target)) {
                rule.push_str(&format!(" -c {packets} 0"));
            }
        }
        rules
    }

    /// Counts of a MAC that begin anew.
    pub(super) fn forget(&self, mac: Mac, state: &State) -> Chains {
        let mut change = Chains::new(Kind::Iptables);
        let of_mac = |(_, rule, packets): &(&str, &str, u64)| *packets > 0 && mac_of(rule) == Some(mac);
        for (chain, rule, _) in state.counts("filter").filter(of_mac) {
            if self.reason_of(chain).is_some() {
                change.line("filter", &format!("-D {chain} {rule}"));
                change.line("filter", &format!("-A {chain} {rule}"));
            }
        }
        change
    }
}
