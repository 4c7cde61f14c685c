//! ebtables and iptables, through their `-restore` commands: the way of hosts
//! without `nft`.
//!
//! ebtables looks at a frame where it enters the bridge: whose it is, to whom,
//! and ARP as a whole. What it has no words for (fragments, options, messages
//! of neighbour discovery, DHCP) iptables looks at a moment later, still at the
//! port, because the bridge is told to show it what it bridges. Each port has a
//! chain of its own in either; each step is one transaction per program.

mod chains;
mod class;
mod counts;
mod fixed;
mod ports;
mod state;
mod text;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use qvd_sys::netns;

use self::{chains::Chains, state::State, text::Text};
use super::{Confined, Filter, Notes};
use crate::{DropReason, Error, Mac, NetConfig, drops::Counted, identity::Identity, program::Program, rules::Rules};

/// What this back end cannot stop, in words for `qvd doctor`.
pub(super) const GAPS: &[&str] = &[
    "fragments are put together before they are looked at where connection tracking is in use: whole packets pass",
    "a port that lost its bridge can still resolve addresses of the host",
    "each frame costs more with each desktop, and so does adding one",
    "a limit of what is sent counts each family of addresses apart",
    "what is dropped is counted since the port was made and not told; for the reason that a frame meets first, and not where \
     it is cut before its port numbers",
    "one desktop's rules are three transactions, one per program, and not one",
];

/// The three programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Ebtables,
    Iptables,
    Ip6tables,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Ebtables, Self::Iptables, Self::Ip6tables];

    const fn restore(self) -> (Program, &'static [&'static str]) {
        match self {
            Self::Ebtables => (Program { name: "ebtables-restore", package: "ebtables" }, &["--noflush"]),
            // Another program may be at it: wait, but not for ever.
            Self::Iptables => (Program { name: "iptables-restore", package: "iptables" }, &["--noflush", "-w", "10"]),
            Self::Ip6tables => (Program { name: "ip6tables-restore", package: "iptables" }, &["--noflush", "-w", "10"]),
        }
    }

    const fn save(self) -> Program {
        match self {
            Self::Ebtables => Program { name: "ebtables-save", package: "ebtables" },
            Self::Iptables => Program { name: "iptables-save", package: "iptables" },
            Self::Ip6tables => Program { name: "ip6tables-save", package: "iptables" },
        }
    }
}

/// How long counts are recent. The programs show the rules of all ports, whatever they
/// are asked.
const RECENT: Duration = Duration::from_secs(1);

/// What was counted of one port.
fn of_one(all: &Counted, identity: &Identity) -> BTreeMap<DropReason, u64> {
    let mac = identity.mac.to_string();
    let own = all.iter().filter(|((who, _), _)| *who == identity.link || *who == mac);
    own.filter_map(|((_, mark), &count)| Some((DropReason::of_mark(*mark)?, count))).collect()
}

#[derive(Debug)]
pub(super) struct Iptables {
    text: Text,
    netns: OwnedFd,
    /// One change at a time: each begins with a look at what is there.
    turn: Mutex<()>,
    runs: AtomicU64,
    recent: Mutex<Option<(Instant, Counted)>>,
}

impl Iptables {
    pub(super) fn open(config: NetConfig, netns: BorrowedFd<'_>) -> Result<Self, Error> {
        let name = config.instance.bridge_name();
        let netns = netns.try_clone_to_owned().map_err(Error::io("keep the network namespace of", name))?;
        Ok(Self {
            text: Text::new(config),
            netns,
            turn: Mutex::default(),
            runs: AtomicU64::default(),
            recent: Mutex::default(),
        })
    }

    /// The programs there are for this network.
    fn kinds(&self) -> impl Iterator<Item = Kind> {
        let ipv6 = self.text.has_ipv6();
        Kind::ALL.into_iter().filter(move |&kind| ipv6 || kind != Kind::Ip6tables)
    }

    fn run(&self, program: Program, args: &[&str], input: &str) -> Result<String, Error> {
        self.runs.fetch_add(1, Ordering::Relaxed);
        let name = self.text.bridge();
        netns::in_netns(self.netns.as_fd(), || crate::program::run(program, args, name, input))
            .map_err(Error::io("enter the network namespace of", name))?
    }

    fn state(&self, kind: Kind) -> Result<State, Error> {
        Ok(State::parse(&self.run(kind.save(), &["-c"], "")?))
    }

    /// Carries out `change` of what is there with each program.
    fn change(&self, change: impl Fn(Kind, &State) -> Chains) -> Result<(), Error> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        for kind in self.kinds() {
            let text = change(kind, &self.state(kind)?).render();
            if !text.is_empty() {
                let (program, args) = kind.restore();
                self.run(program, args, &text)?;
            }
        }
        Ok(())
    }
}

impl Filter for Iptables {
    fn establish(&self, rules: &Rules<'_>) -> Result<(), Error> {
        let notes = Notes { ipv4: rules.forwarding_was_off, ipv6: rules.forwarding6_was_off };
        self.change(|kind, state| self.text.base(kind, notes, state))
    }

    fn notes(&self) -> Result<Notes, Error> {
        let state = self.state(Kind::Iptables)?;
        let noted = |chain: String| state.has_chain("raw", &chain);
        Ok(Notes { ipv4: noted(self.text.note4()), ipv6: noted(self.text.note6()) })
    }

    fn differs(&self) -> Result<Option<String>, Error> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        for kind in self.kinds() {
            let differs = self.text.base_missing(kind, &self.state(kind)?);
            if differs.is_some() {
                return Ok(differs);
            }
        }
        Ok(None)
    }

    fn add(&self, ports: &[Confined<'_>]) -> Result<(), Error> {
        self.change(|kind, state| self.text.add(kind, ports, state))
    }

    fn remove(&self, ports: &[Confined<'_>]) -> Result<(), Error> {
        let links: BTreeSet<_> = ports.iter().map(|port| &*port.identity.link).collect();
        let addresses: BTreeSet<_> = ports.iter().flat_map(|port| port.identity.addresses()).collect();
        let gone = |link: &str| links.contains(link);
        self.change(|kind, state| self.text.remove(kind, &gone, &|address| addresses.contains(&address), state))
    }

    fn missing(&self, ports: &[Confined<'_>]) -> Result<Option<(usize, String)>, Error> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        for kind in self.kinds() {
            let state = self.state(kind)?;
            for (place, port) in ports.iter().enumerate() {
                if let Some(lacks) = self.text.missing(kind, port, &state) {
                    return Ok(Some((place, lacks)));
                }
            }
        }
        Ok(None)
    }

    fn sweep(&self, kept: &BTreeSet<String>) -> Result<Vec<IpAddr>, Error> {
        let state = self.state(Kind::Ebtables)?;
        let ports = self.text.ports(&state);
        let kept_addresses: BTreeSet<_> =
            ports.iter().filter(|(link, _)| kept.contains(link)).flat_map(|(_, addresses)| addresses.clone()).collect();
        let swept = ports.into_iter().filter(|(link, _)| !kept.contains(link)).flat_map(|(_, addresses)| addresses);
        let swept = swept.collect();
        let stale = |link: &str| !kept.contains(link);
        let stale_address = |address| !kept_addresses.contains(&address);
        self.change(|kind, state| self.text.remove(kind, &stale, &stale_address, state))?;
        Ok(swept)
    }

    fn close(&self) -> Result<(), Error> {
        self.change(|kind, state| self.text.close(kind, state))
    }

    fn drops(&self, identity: &Identity) -> Result<BTreeMap<DropReason, u64>, Error> {
        Ok(of_one(&self.all_drops()?, identity))
    }

    fn recent_drops(&self, identity: &Identity) -> Result<BTreeMap<DropReason, u64>, Error> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let all = match recent.take() {
            Some((at, all)) if at.elapsed() < RECENT => recent.insert((at, all)),
            _ => recent.insert((Instant::now(), self.all_drops()?)),
        };
        Ok(of_one(&all.1, identity))
    }

    fn forget_drops(&self, mac: Mac) -> Result<(), Error> {
        self.change(|kind, state| match kind {
            Kind::Ebtables => Chains::new(kind),
            Kind::Iptables | Kind::Ip6tables => self.text.forget(mac, state),
        })
    }

    fn all_drops(&self) -> Result<Counted, Error> {
        let mut all = Counted::new();
        for kind in self.kinds() {
            self.text.count(kind, &self.state(kind)?, &mut all);
        }
        Ok(all)
    }

    fn requests_sent(&self) -> u64 {
        self.runs.load(Ordering::Relaxed)
    }
}
