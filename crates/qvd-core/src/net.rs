//! What a desktop may reach, in plain terms: what recipes, flavours, desktops
//! and tenants say, and what the network is told.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU32,
    str::FromStr,
};

use serde::{Deserialize, Serialize, de};

pub use self::addresses::{ExtraAddresses, MulticastGroup};

/// Written in recipes and policies as it prints.
macro_rules! as_text {
    ($($type:ty),+) => {$(
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    )+};
}

use as_text;

mod addresses;

/// What a desktop may reach.
///
/// ```
/// # fn main() -> Result<(), qvd_core::NetWordError> {
/// use qvd_core::NetPolicy;
/// let policy = NetPolicy {
///     destinations: vec!["192.0.2.7 tcp 443".parse()?, "2001:db8::/32".parse()?],
///     neighbours: "group:lab".parse()?,
///     ..NetPolicy::host_only()
/// };
/// assert!(!policy.internet && policy.port);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct NetPolicy {
    /// Whether it gets a port on the bridge at all. Without one it has the
    /// loopback interface only; its display works all the same.
    pub port: bool,
    /// Whether the host routes it to other networks, whichever they are.
    pub internet: bool,
    /// Where it may go without that: these, and nowhere else.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub destinations: Vec<Destination>,
    /// What it may use of the host itself, at the gateway's addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<Service>,
    /// Which other desktops it may talk with; they must allow the same.
    #[serde(skip_serializing_if = "Neighbours::is_none")]
    pub neighbours: Neighbours,
    /// Most it may send to others, in thousands of bits per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub up_kbit_s: Option<NonZeroU32>,
    /// Most it is sent, in thousands of bits per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub down_kbit_s: Option<NonZeroU32>,
    /// Most connections it may have at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<NonZeroU32>,
    /// Whom it may ask for names.
    #[serde(skip_serializing_if = "NameServers::is_any")]
    pub names: NameServers,
    /// Whether others see its own address, and not the host's.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub routed: bool,
    /// Multicast groups that it may send to and hear: at the host, which may
    /// route them further. Neighbours it reaches by no group.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub multicast: Vec<MulticastGroup>,
    /// Addresses that it may send from beside its own, outside of the network's
    /// subnets. Others see them as they are.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<ExtraAddresses>,
}

impl NetPolicy {
    const fn plain(port: bool, internet: bool) -> Self {
        Self {
            port,
            internet,
            destinations: Vec::new(),
            services: Vec::new(),
            neighbours: Neighbours::None,
            up_kbit_s: None,
            down_kbit_s: None,
            connections: None,
            names: NameServers::Any,
            routed: false,
            multicast: Vec::new(),
            addresses: Vec::new(),
        }
    }

    /// No port.
    #[must_use]
    pub const fn none() -> Self {
        Self::plain(false, false)
    }

    /// A port that reaches the gateway and nothing else.
    #[must_use]
    pub const fn host_only() -> Self {
        Self::plain(true, false)
    }

    /// A port, and the way to other networks.
    #[must_use]
    pub const fn internet() -> Self {
        Self::plain(true, true)
    }

    /// Everything that can be allowed: what a tenant without limits allows.
    #[must_use]
    pub fn unlimited() -> Self {
        Self { routed: true, ..Self::internet() }
    }

    /// As much of this as `ceiling` allows too: a tenant's limits, or a host's,
    /// over what a flavour or a desktop says.
    ///
    /// A ceiling that allows `internet` and has no destinations of its own allows
    /// all of them, and so with services, groups and further addresses.
    #[must_use]
    pub fn within(&self, ceiling: &Self) -> Self {
        let least = |a: Option<NonZeroU32>, b: Option<NonZeroU32>| match (a, b) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        let internet = self.internet && ceiling.internet;
        let allowed = |wanted: &Destination| {
            ceiling.internet || ceiling.destinations.iter().any(|allowed| allowed.covers(wanted))
        };
        let mut destinations: Vec<_> = self.destinations.iter().copied().filter(allowed).collect();
        if self.internet && !internet {
            // All of what the ceiling has.
            destinations.extend_from_slice(&ceiling.destinations);
        }
        let all_services = ceiling.internet && ceiling.services.is_empty();
        let served = |wanted: &&Service| all_services || ceiling.services.iter().any(|allowed| allowed.covers(wanted));
        let services = self.services.iter().filter(served).copied().collect();
        let all_neighbours = ceiling.internet && ceiling.neighbours.is_none();
        let neighbours =
            if all_neighbours || ceiling.neighbours == Neighbours::Tenant || ceiling.neighbours == self.neighbours {
                self.neighbours.clone()
            } else {
                Neighbours::None
            };
        let all_groups = ceiling.internet && ceiling.multicast.is_empty();
        let multicast = self.multicast.iter().filter(|group| all_groups || ceiling.multicast.contains(group));
        let all_addresses = ceiling.internet && ceiling.addresses.is_empty();
        let addresses = self
            .addresses
            .iter()
            .filter(|wanted| all_addresses || ceiling.addresses.iter().any(|allowed| allowed.covers(wanted)));
        Self {
            port: self.port && ceiling.port,
            internet,
            destinations,
            services,
            neighbours,
            up_kbit_s: least(self.up_kbit_s, ceiling.up_kbit_s),
            down_kbit_s: least(self.down_kbit_s, ceiling.down_kbit_s),
            connections: least(self.connections, ceiling.connections),
            names: if ceiling.names.is_any() { self.names } else { NameServers::Ours },
            routed: self.routed && ceiling.routed,
            multicast: multicast.copied().collect(),
            addresses: addresses.copied().collect(),
        }
    }
}

impl NetPolicy {
    /// What it allows, in a line for a person.
    #[must_use]
    pub fn summary(&self) -> String {
        if !self.port {
            return "none".to_owned();
        }
        let list = |words: Vec<String>| words.join(", ");
        let mut words = vec![if self.internet { "internet" } else { "isolated" }.to_owned()];
        if !self.destinations.is_empty() {
            words.push(format!("to {}", list(self.destinations.iter().map(ToString::to_string).collect())));
        }
        if !self.services.is_empty() {
            words.push(format!("services {}", list(self.services.iter().map(ToString::to_string).collect())));
        }
        if !self.neighbours.is_none() {
            words.push(format!("neighbours {}", self.neighbours));
        }
        let limits = [
            (self.up_kbit_s, "up", "kbit/s"),
            (self.down_kbit_s, "down", "kbit/s"),
            (self.connections, "at most", "connections"),
        ];
        words.extend(limits.iter().filter_map(|(most, what, unit)| most.map(|most| format!("{what} {most} {unit}"))));
        words.extend((!self.names.is_any()).then(|| "names of the site's servers".to_owned()));
        for (what, some) in [
            ("groups", self.multicast.iter().map(ToString::to_string).collect::<Vec<_>>()),
            ("also as", self.addresses.iter().map(ToString::to_string).collect()),
        ] {
            words.extend((!some.is_empty()).then(|| format!("{what} {}", list(some))));
        }
        words.extend(self.routed.then(|| "routed".to_owned()));
        words.join("; ")
    }
}

/// Why a word of a policy is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {wanted}")]
pub struct NetWordError {
    text: String,
    wanted: &'static str,
}

impl NetWordError {
    fn new(text: &str, wanted: &'static str) -> Self {
        Self { text: text.chars().take(64).flat_map(char::escape_default).collect(), wanted }
    }
}

/// What carries ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// Ports of a transport, written `tcp 443` or `udp 4000-4010`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Service {
    transport: Transport,
    first: u16,
    last: u16,
}

impl Service {
    const WANTED: &'static str = "a service: write `tcp 443` or `udp 4000-4010`";

    /// What carries it.
    #[must_use]
    pub const fn transport(self) -> Transport {
        self.transport
    }

    /// First and last of its ports.
    #[must_use]
    pub const fn ports(self) -> (u16, u16) {
        (self.first, self.last)
    }

    /// Whether all of `other` is in it.
    #[must_use]
    pub fn covers(self, other: &Self) -> bool {
        self.transport == other.transport && self.first <= other.first && other.last <= self.last
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { transport, first, last } = self;
        if first == last { write!(f, "{transport} {first}") } else { write!(f, "{transport} {first}-{last}") }
    }
}

impl FromStr for Service {
    type Err = NetWordError;
    fn from_str(text: &str) -> Result<Self, NetWordError> {
        let parsed = || {
            let (transport, ports) = text.split_once(' ')?;
            let transport = [Transport::Tcp, Transport::Udp].into_iter().find(|t| t.to_string() == transport)?;
            let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
            let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
            (first > 0 && first <= last).then_some(Self { transport, first, last })
        };
        parsed().ok_or_else(|| NetWordError::new(text, Self::WANTED))
    }
}

/// Other hosts, and of them all or one service: `192.0.2.0/24`, `192.0.2.7 tcp 443`,
/// `2001:db8::/32 udp 4000-4010`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Destination {
    base: IpAddr,
    prefix_len: u8,
    service: Option<Service>,
}

impl Destination {
    const WANTED: &'static str =
        "a destination: write `192.0.2.0/24`, `192.0.2.7 tcp 443` or `2001:db8::/32 udp 4000-4010`";

    /// Their first address, and how many bits all share.
    #[must_use]
    pub const fn prefix(self) -> (IpAddr, u8) {
        (self.base, self.prefix_len)
    }

    /// The service; none means all that there is.
    #[must_use]
    pub const fn service(self) -> Option<Service> {
        self.service
    }

    /// Whether `address` is one of the hosts.
    #[must_use]
    pub fn contains(self, address: IpAddr) -> bool {
        match (self.base, address) {
            (IpAddr::V4(base), IpAddr::V4(address)) => {
                (base.to_bits() ^ address.to_bits()) & mask4(self.prefix_len) == 0
            }
            (IpAddr::V6(base), IpAddr::V6(address)) => {
                (base.to_bits() ^ address.to_bits()) & mask6(self.prefix_len) == 0
            }
            _ => false,
        }
    }

    /// Whether all of `other` is in it.
    #[must_use]
    pub fn covers(self, other: &Self) -> bool {
        let hosts = self.prefix_len <= other.prefix_len && self.contains(other.base);
        let service = match (self.service, other.service) {
            (None, _) => true,
            (Some(own), Some(other)) => own.covers(&other),
            (Some(_), None) => false,
        };
        hosts && service
    }
}

fn mask4(prefix_len: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix_len)).unwrap_or(0)
}

fn mask6(prefix_len: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(prefix_len)).unwrap_or(0)
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix_len)?;
        self.service.map_or(Ok(()), |service| write!(f, " {service}"))
    }
}

impl FromStr for Destination {
    type Err = NetWordError;
    fn from_str(text: &str) -> Result<Self, NetWordError> {
        let parsed = || {
            let (hosts, service) = text.split_once(' ').map_or((text, None), |(hosts, service)| (hosts, Some(service)));
            let (base, length) = hosts.split_once('/').map_or((hosts, None), |(base, length)| (base, Some(length)));
            let base: IpAddr = base.parse().ok()?;
            let whole = if base.is_ipv4() { 32 } else { 128 };
            let prefix_len = length.map_or(Some(whole), |length| length.parse().ok()).filter(|&bits| bits <= whole)?;
            let first = match base {
                IpAddr::V4(base) => IpAddr::V4(Ipv4Addr::from_bits(base.to_bits() & mask4(prefix_len))),
                IpAddr::V6(base) => IpAddr::V6(Ipv6Addr::from_bits(base.to_bits() & mask6(prefix_len))),
            };
            let service = service.map(str::parse).transpose().ok()?;
            // A host's own address with a shorter prefix is more often a slip.
            (first == base).then_some(Self { base, prefix_len, service })
        };
        parsed().ok_or_else(|| NetWordError::new(text, Self::WANTED))
    }
}

/// Which other desktops of the same network one may talk with: `none`, `tenant`
/// or `group:lab`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Neighbours {
    /// Nobody.
    #[default]
    None,
    /// All that say the same.
    Tenant,
    /// Those of a group, by its name.
    Group(String),
}

impl Neighbours {
    const WANTED: &'static str = "a kind of neighbours: write `none`, `tenant`, or `group:` and a name of at most 32 \
                                  small letters, digits and dashes";

    /// Whether there are none.
    #[must_use]
    pub const fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }
}

impl fmt::Display for Neighbours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Tenant => f.write_str("tenant"),
            Self::Group(name) => write!(f, "group:{name}"),
        }
    }
}

impl FromStr for Neighbours {
    type Err = NetWordError;
    fn from_str(text: &str) -> Result<Self, NetWordError> {
        let named = |name: &&str| {
            let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
            (1..=32).contains(&name.len()) && name.bytes().all(plain)
        };
        match text {
            "none" => Ok(Self::None),
            "tenant" => Ok(Self::Tenant),
            _ => {
                let name = text.strip_prefix("group:").filter(named);
                name.map(|name| Self::Group(name.to_owned())).ok_or_else(|| NetWordError::new(text, Self::WANTED))
            }
        }
    }
}

/// Whom a desktop may ask for names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum NameServers {
    /// Whomever it reaches.
    #[default]
    Any,
    /// The site's servers and the gateway, which passes questions on to them.
    Ours,
}

impl NameServers {
    /// Whether anybody may be asked.
    #[must_use]
    pub const fn is_any(&self) -> bool {
        matches!(self, Self::Any)
    }
}

as_text!(Service, Destination, Neighbours);

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn destinations<const N: usize>(words: [&str; N]) -> Vec<Destination> {
        words.map(|word| word.parse().unwrap()).into()
    }

    #[test]
    fn words_are_what_they_print() {
        for word in ["192.0.2.0/24", "192.0.2.7/32 tcp 443", "2001:db8::/32 udp 4000-4010", "0.0.0.0/0", "::/0"] {
            assert_eq!(word.parse::<Destination>().unwrap().to_string(), word);
        }
        for word in ["none", "tenant", "group:lab-3"] {
            assert_eq!(word.parse::<Neighbours>().unwrap().to_string(), word);
        }
        for bad in
            ["", "192.0.2.1/24", "192.0.2.0/33", "192.0.2.0/24 tcp", "::1 icmp 3", "::1 tcp 5-4", "::1 tcp 0", "a b"]
        {
            assert!(bad.parse::<Destination>().is_err(), "{bad}");
        }
        for bad in ["", "group:", "group:A", "group:a b", "all"] {
            assert!(bad.parse::<Neighbours>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_ceiling_takes_away_and_gives_nothing() {
        let wanted = NetPolicy {
            destinations: destinations(["192.0.2.7 tcp 443", "198.51.100.0/24"]),
            services: vec!["tcp 631".parse().unwrap()],
            neighbours: Neighbours::Tenant,
            connections: NonZeroU32::new(50),
            routed: true,
            ..NetPolicy::host_only()
        };
        assert_eq!(wanted.within(&NetPolicy::unlimited()), wanted);
        let ceiling = NetPolicy {
            destinations: destinations(["192.0.2.0/24 tcp 1-1024"]),
            names: NameServers::Ours,
            connections: NonZeroU32::new(10),
            ..NetPolicy::host_only()
        };
        let left = wanted.within(&ceiling);
        assert_eq!(left.destinations, destinations(["192.0.2.7 tcp 443"]));
        assert!(left.services.is_empty() && left.neighbours.is_none() && !left.routed);
        assert_eq!((left.connections, left.names), (NonZeroU32::new(10), NameServers::Ours));
        // Who may go everywhere may go where the ceiling lets one.
        let left = NetPolicy::internet().within(&ceiling);
        assert_eq!((left.internet, left.destinations), (false, ceiling.destinations));
        assert!(!wanted.within(&NetPolicy::default()).port);
    }

    #[test]
    fn a_ceiling_names_groups_and_addresses() {
        let wanted = NetPolicy {
            multicast: vec!["239.1.2.3".parse().unwrap(), "ff15::42".parse().unwrap()],
            addresses: vec!["192.0.2.8/31".parse().unwrap(), "192.0.2.12".parse().unwrap()],
            ..NetPolicy::host_only()
        };
        assert_eq!(wanted.within(&NetPolicy::unlimited()), wanted);
        let bare = wanted.within(&NetPolicy::host_only());
        assert!(bare.multicast.is_empty() && bare.addresses.is_empty());
        let ceiling = NetPolicy {
            multicast: vec!["ff15::42".parse().unwrap()],
            addresses: vec!["192.0.2.8/30".parse().unwrap()],
            ..NetPolicy::host_only()
        };
        let left = wanted.within(&ceiling);
        assert_eq!((left.multicast, left.addresses), (ceiling.multicast, vec!["192.0.2.8/31".parse().unwrap()]));
    }
}
