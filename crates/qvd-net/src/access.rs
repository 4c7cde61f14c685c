//! What a port may reach beyond itself, and what ports of the same policy have
//! in common.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    num::NonZeroU32,
    sync::Arc,
};

use qvd_core::{DesktopId, NameServers, Neighbours, NetPolicy};

use crate::{Error, NetConfig};

/// Most multicast groups of a desktop.
const GROUPS_MAX: usize = 64;

/// Most addresses of a desktop beside its own.
const EXTRA_MAX: usize = 64;

/// A policy, as rules know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) policy: Arc<NetPolicy>,
    /// Stands in the names of what ports of this policy share.
    class: String,
}

impl Access {
    /// Whom it asks for names, in each family.
    pub(crate) fn name_servers(&self, config: &NetConfig) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
        if self.goes_out() { config.names_at_gateway() } else { (None, None) }
    }

    /// # Errors
    /// The policy gives no port, or asks for what the network has not.
    pub(crate) fn of(config: &NetConfig, desktop: DesktopId, policy: &NetPolicy) -> Result<Self, Error> {
        if !policy.port {
            return Err(Error::Invalid(format!("the policy of desktop {desktop} gives it no port")));
        }
        let bridge = config.instance.bridge_name();
        let access = Self { policy: Arc::new(policy.clone()), class: class(policy) };
        if (policy.internet || access.is_particular()) && !config.internet {
            return Err(Error::Invalid(format!("desktop {desktop} wants a way out and network {bridge} has none")));
        }
        if policy.names == NameServers::Ours && config.name_servers().next().is_none() {
            let what = format!("desktop {desktop} may ask only our name servers and network {bridge} knows none");
            return Err(Error::Invalid(what));
        }
        let groups = policy.multicast.len();
        if groups > GROUPS_MAX {
            return Err(Error::Invalid(format!(
                "desktop {desktop} wants {groups} multicast groups, at most {GROUPS_MAX} can be"
            )));
        }
        let mut extra = policy.addresses.iter().flat_map(|some| some.iter());
        if extra.by_ref().nth(EXTRA_MAX).is_some() {
            let what = format!("desktop {desktop} wants more than {EXTRA_MAX} further addresses");
            return Err(Error::Invalid(what));
        }
        let mut extra = policy.addresses.iter().flat_map(|some| some.iter());
        if let Some(address) = extra.find(|&address| config.contains(address)) {
            let what = format!(
                "desktop {desktop} cannot have {address} besides its own: network {bridge} gives its addresses away by itself"
            );
            return Err(Error::Invalid(what));
        }
        Ok(access)
    }

    /// Whether it goes everywhere, and nothing more is to be said.
    pub(crate) fn is_free(&self) -> bool {
        self.policy.internet && !self.is_particular()
    }

    /// Whether where it goes has a chain of its own.
    pub(crate) fn is_particular(&self) -> bool {
        let policy = &self.policy;
        !policy.destinations.is_empty()
            || !policy.neighbours.is_none()
            || !policy.names.is_any()
            || policy.up_kbit_s.is_some()
            || policy.connections.is_some()
    }

    /// Whether the host serves it anything.
    pub(crate) fn is_served(&self) -> bool {
        !self.policy.services.is_empty()
    }

    /// Whether it takes part in multicast groups.
    pub(crate) fn takes_part(&self) -> bool {
        !self.policy.multicast.is_empty()
    }

    /// Whether ports of this policy share anything.
    pub(crate) fn has_rules(&self) -> bool {
        self.is_particular() || self.is_served() || self.takes_part()
    }

    /// Whether anything of it is routed.
    pub(crate) fn goes_out(&self) -> bool {
        self.policy.internet || self.is_particular()
    }

    pub(crate) fn outward_chain(&self) -> String {
        format!("out-{}", self.class)
    }

    pub(crate) fn served_chain(&self) -> String {
        format!("served-{}", self.class)
    }

    pub(crate) fn class(&self) -> &str {
        &self.class
    }

    /// The number of its group of neighbours.
    pub(crate) fn group(&self) -> Option<u32> {
        // Never zero, which is what packets are marked with that nobody marked.
        let number = |name: &str| u32::try_from(hash(name.as_bytes()) & 0xffff_ffff).unwrap_or_default() | 1;
        match &self.policy.neighbours {
            Neighbours::Tenant => Some(number("tenant")),
            Neighbours::Group(name) => Some(number(&format!("group:{name}"))),
            _ => None,
        }
    }
}

/// A name for all policies that make the same rules.
fn class(policy: &NetPolicy) -> String {
    use std::fmt::Write as _;
    let mut text = format!(
        "{} {} {:?} {:?} {:?}",
        policy.internet, policy.neighbours, policy.names, policy.up_kbit_s, policy.connections
    );
    for destination in &policy.destinations {
        let _infallible = write!(text, ";{destination}");
    }
    for service in &policy.services {
        let _infallible = write!(text, "!{service}");
    }
    if !policy.multicast.is_empty() {
        text.push('*');
    }
    format!("{:016x}", hash(text.as_bytes()))
}

/// FNV-1a of 64 bits: the same in each process, as names have to be. Policies
/// are an administrator's, so nobody looks for two of one number.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, &byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Bytes in a second.
pub(crate) fn bytes_per_s(kbit_s: NonZeroU32) -> u64 {
    u64::from(kbit_s.get()) * 1000 / 8
}

/// What may come at once: one packet as large as the kernel joins them, and an
/// eighth of a second beyond.
pub(crate) fn burst_bytes(kbit_s: NonZeroU32) -> u64 {
    (128 << 10) + bytes_per_s(kbit_s) / 8
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_other_rules_has_another_name() {
        let plain = NetPolicy::host_only();
        let others = [
            NetPolicy::internet(),
            NetPolicy { destinations: vec!["192.0.2.0/24".parse().unwrap()], ..plain.clone() },
            NetPolicy { destinations: vec!["192.0.2.0/24 tcp 1".parse().unwrap()], ..plain.clone() },
            NetPolicy { services: vec!["tcp 1".parse().unwrap()], ..plain.clone() },
            NetPolicy { neighbours: Neighbours::Tenant, ..plain.clone() },
            NetPolicy { neighbours: Neighbours::Group("tenant".to_owned()), ..plain.clone() },
            NetPolicy { names: NameServers::Ours, ..plain.clone() },
            NetPolicy { up_kbit_s: NonZeroU32::new(1), ..plain.clone() },
            NetPolicy { connections: NonZeroU32::new(1), ..plain.clone() },
            NetPolicy { multicast: vec!["239.1.2.3".parse().unwrap()], ..plain.clone() },
        ];
        let mut names: Vec<_> = others.iter().chain([&plain]).map(class).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), others.len() + 1);
    }
}
