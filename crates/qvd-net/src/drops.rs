//! Why frames were dropped, counted per port and reason, and told now and then.

mod sample;
mod watch;

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

pub(crate) use self::watch::{Counted, has_log, log_group};
pub use self::{
    sample::{Sample, samples_of},
    watch::{DropReport, DropWatch, Dropped},
};
use crate::{Error, Port};

/// Why a frame of a desktop was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DropReason {
    /// The source MAC is not the port's.
    SourceMac,
    /// The source address is not the port's.
    SourceAddress,
    /// It is tagged, or neither IPv4, IPv6 nor ARP.
    Ethertype,
    /// ARP in another's name, or of another form.
    Arp,
    /// A neighbour message about another, of another form, or of a router.
    NeighbourMessage,
    /// An option of IPv4, or a header of extension of IPv6.
    Option,
    /// A fragment.
    Fragment,
    /// A group, all, or a neighbour's MAC.
    Destination,
    /// Another protocol, another message of ICMPv6, a server of DHCP, or cut.
    Protocol,
    /// DHCP that is no question for itself.
    Dhcp,
    /// The policy names no such destination.
    Policy,
    /// Another desktop that is none of its group.
    Neighbour,
    /// The host itself, of which the policy names no such service.
    Host,
    /// More than its rate.
    Rate,
    /// More connections than it may have.
    Connections,
    /// A name server that is not the site's.
    Names,
}

impl DropReason {
    /// Every one.
    pub const ALL: [Self; 16] = [
        Self::SourceMac,
        Self::SourceAddress,
        Self::Ethertype,
        Self::Arp,
        Self::NeighbourMessage,
        Self::Option,
        Self::Fragment,
        Self::Destination,
        Self::Protocol,
        Self::Dhcp,
        Self::Policy,
        Self::Neighbour,
        Self::Host,
        Self::Rate,
        Self::Connections,
        Self::Names,
    ];

    /// One word for it, as chains are called.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::SourceMac => "source_mac",
            Self::SourceAddress => "source_address",
            Self::Ethertype => "ethertype",
            Self::Arp => "arp",
            Self::NeighbourMessage => "neighbour_message",
            Self::Option => "option",
            Self::Fragment => "fragment",
            Self::Destination => "destination",
            Self::Protocol => "protocol",
            Self::Dhcp => "dhcp",
            Self::Policy => "policy",
            Self::Neighbour => "neighbour",
            Self::Host => "host",
            Self::Rate => "rate",
            Self::Connections => "connections",
            Self::Names => "names",
        }
    }

    /// What rules mark a packet with before they drop it.
    pub(crate) const fn mark(self) -> u32 {
        // A unit-only enum's place; none is zero, which is no mark.
        self as u32 + 1
    }

    pub(crate) fn of_mark(mark: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.mark() == mark)
    }

    /// Whether it is decided behind the bridge, where ports are known by MAC.
    pub(crate) const fn is_behind_bridge(self) -> bool {
        matches!(self, Self::Policy | Self::Neighbour | Self::Host | Self::Rate | Self::Connections | Self::Names)
    }

    /// The end of a rule that drops for this reason.
    pub(crate) fn verdict(self) -> String {
        format!("meta mark set {} goto {DROPPED}", self.mark())
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SourceMac => "the source MAC is not the port's",
            Self::SourceAddress => "the source address is not the port's",
            Self::Ethertype => "neither IPv4, IPv6 nor ARP, or tagged",
            Self::Arp => "ARP that is not for itself",
            Self::NeighbourMessage => "a neighbour message that is not for itself",
            Self::Option => "options or extension headers",
            Self::Fragment => "fragments",
            Self::Destination => "to others than the gateway",
            Self::Protocol => "another protocol or message, or cut",
            Self::Dhcp => "DHCP that is no question for itself",
            Self::Policy => "the policy names no such destination",
            Self::Neighbour => "another desktop that is none of its group",
            Self::Host => "a service of the host that the policy does not name",
            Self::Rate => "beyond its rate",
            Self::Connections => "beyond its number of connections",
            Self::Names => "another name server than the site's",
        })
    }
}

/// Chain that counts, tells and drops; and the set that it counts in.
pub(crate) const DROPPED: &str = "dropped";
/// Set of what was told of lately.
pub(crate) const SAMPLED: &str = "sampled";

impl Port {
    /// How many frames of the desktop were dropped, by reason, since the network
    /// was made: also by earlier processes. One question to the kernel, whatever
    /// the number of ports; with iptables, one to each program, and since the port
    /// was made ([`crate::Backend::gaps`]).
    ///
    /// # Errors
    /// The kernel did not say.
    pub fn drops(&self) -> Result<BTreeMap<DropReason, u64>, Error> {
        self.filter().drops(self.identity())
    }
}
