//! What keeps a port to its identity and policy, behind one trait: nf_tables,
//! or the older ebtables and iptables.

mod fingerprint;
mod iptables;
mod nft;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    os::fd::BorrowedFd,
};

use serde::{Deserialize, Serialize};

use crate::{DropReason, Error, Mac, NetConfig, access::Access, drops::Counted, identity::Identity, rules::Rules};

/// What filters the frames of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Backend {
    /// Sets of nf_tables over netlink: a frame costs the same at any number of
    /// desktops, and adding one takes microseconds.
    #[default]
    Nft,
    /// ebtables and iptables by their `-restore` commands, for hosts without
    /// `nft`: chains per port, so that costs grow with their number.
    /// [`Backend::gaps`] names what it cannot stop.
    Iptables,
}

impl Backend {
    /// Every one, the best first.
    pub const ALL: [Self; 2] = [Self::Nft, Self::Iptables];

    /// Its name, as settings and `qvd doctor` have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Iptables => "iptables",
        }
    }

    /// What it cannot stop, or stops later than at the port.
    #[must_use]
    pub const fn gaps(self) -> &'static [&'static str] {
        match self {
            Self::Nft => &[],
            Self::Iptables => iptables::GAPS,
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Backend {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|backend| backend.name() == text)
            .ok_or_else(|| Error::Invalid(format!("`{}` is no back end: nft or iptables", text.escape_default())))
    }
}

/// Which of the host's forwarding settings this network has switched on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Notes {
    pub(crate) ipv4: bool,
    pub(crate) ipv6: bool,
}

/// A port, as its rules have it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Confined<'a> {
    pub(crate) identity: &'a Identity,
    /// Index of its link; zero of one that was never made.
    pub(crate) index: u32,
    /// What it may reach.
    pub(crate) access: &'a Access,
}

/// One way to filter. Implementations serialise what they must.
pub(crate) trait Filter: fmt::Debug + Send + Sync {
    /// Loads the rules that do not depend on ports, or replaces those of an
    /// earlier process and keeps its ports.
    fn establish(&self, rules: &Rules<'_>) -> Result<(), Error>;

    /// What [`Filter::establish`] noted.
    fn notes(&self) -> Result<Notes, Error>;

    /// What differs from what [`Filter::establish`] has loaded, if anything.
    fn differs(&self) -> Result<Option<String>, Error>;

    /// Lets ports send as themselves, all at once. What an earlier process gave
    /// to these links or addresses beyond that is taken back first.
    fn add(&self, ports: &[Confined<'_>]) -> Result<(), Error>;

    /// Takes that back. What is not there is removed.
    fn remove(&self, ports: &[Confined<'_>]) -> Result<(), Error>;

    /// What the kernel does not show of the rules of the first port that lacks
    /// something.
    fn missing(&self, ports: &[Confined<'_>]) -> Result<Option<(usize, String)>, Error>;

    /// [`Filter::add`] and [`Filter::missing`], for who wants both.
    fn confine(&self, ports: &[Confined<'_>]) -> Result<Option<(usize, String)>, Error> {
        self.add(ports)?;
        self.missing(ports)
    }

    /// Removes the rules of all ports but `kept`. Returns their addresses.
    fn sweep(&self, kept: &BTreeSet<String>) -> Result<Vec<IpAddr>, Error>;

    /// Removes every rule of the network.
    fn close(&self) -> Result<(), Error>;

    /// What was dropped of a port, by reason, as far as it is counted.
    fn drops(&self, identity: &Identity) -> Result<BTreeMap<DropReason, u64>, Error>;

    /// The same, maybe of a moment ago where asking takes long: for who asks about one port
    /// after the other.
    fn recent_drops(&self, identity: &Identity) -> Result<BTreeMap<DropReason, u64>, Error> {
        self.drops(identity)
    }

    /// Forgets what was dropped of a MAC's owner behind the bridge, for whoever has it next.
    fn forget_drops(&self, mac: Mac) -> Result<(), Error>;

    /// The same of all.
    fn all_drops(&self) -> Result<Counted, Error>;

    /// Requests sent to the kernel, as far as they are counted.
    fn requests_sent(&self) -> u64;
}

/// Opens the filter of a network in the calling thread's namespace, which is
/// `netns`.
pub(crate) fn open(config: &NetConfig, netns: BorrowedFd<'_>) -> Result<Box<dyn Filter>, Error> {
    Ok(match config.backend {
        Backend::Nft => Box::new(nft::Nft::open(*config, netns)?),
        Backend::Iptables => Box::new(iptables::Iptables::open(*config, netns)?),
    })
}
