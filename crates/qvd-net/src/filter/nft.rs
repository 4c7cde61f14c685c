//! Rules loaded once by `nft`; ports are elements of sets, over netlink.

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{Confined, Filter, Notes, fingerprint::fingerprint};
use crate::{
    Error, NetConfig, TeardownErrors,
    elements::{self, Element, Family},
    identity::{Identity, v4_of_element},
    netlink::Netlink,
    program,
    rules::{self, Rules},
};

#[derive(Debug)]
pub(super) struct Nft {
    config: NetConfig,
    table: String,
    netfilter: Mutex<Netlink>,
    /// What an earlier process left in the sets. Whoever takes over one of
    /// these names or addresses first takes back what it does not mean to give.
    inherited: Mutex<Vec<Element>>,
    /// The rules as the kernel showed them when they had been loaded.
    loaded: Mutex<Vec<u8>>,
}

/// Also after a panic elsewhere: each call leaves these whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Nft {
    pub(super) fn open(config: NetConfig) -> Result<Self, Error> {
        let name = config.instance.bridge_name();
        let netfilter = Netlink::netfilter().map_err(Error::io("open netfilter netlink for", name))?;
        let table = rules::table_name(config.instance);
        Ok(Self {
            config,
            table,
            netfilter: Mutex::new(netfilter),
            inherited: Mutex::default(),
            loaded: Mutex::default(),
        })
    }

    fn netfilter(&self) -> MutexGuard<'_, Netlink> {
        lock(&self.netfilter)
    }

    fn shown(&self) -> Result<Vec<u8>, Error> {
        fingerprint(&mut self.netfilter(), &self.table).map_err(Error::netlink("read back the rules of", &self.table))
    }

    /// Every element of our sets.
    fn every_element(&self) -> Result<Vec<Element>, Error> {
        let mut every = Vec::new();
        let mut netfilter = self.netfilter();
        for (family, set) in rules::PORT_SETS.into_iter().chain(rules::ADDRESS_SETS) {
            let keys = elements::all(&mut netfilter, &self.table, family, set);
            let keys = keys.map_err(Error::netlink("list the rules of", &self.table))?.unwrap_or_default();
            every.extend(keys.into_iter().map(|key| Element::new(family, set, key)));
        }
        Ok(every)
    }

    /// Removes what an earlier process gave this link or this address beyond
    /// `wanted`: another identity, a way out.
    fn take_back(&self, identity: &Identity, wanted: &[Element]) -> Result<(), Error> {
        let mut inherited = lock(&self.inherited);
        let own = identity.elements(true);
        let concerns = |element: &Element| {
            if rules::ADDRESS_SETS.contains(&(element.family, element.set)) {
                return v4_of_element(&self.config, element) == Some(identity.ipv4);
            }
            // Of this link, or of another that had this MAC and address.
            let behind_port = |element: &Element| element.key.get(16..).map(<[u8]>::to_vec);
            rules::port_of_key(&element.key) == Some(&*identity.link)
                || own.iter().any(|own| own.set == element.set && behind_port(own) == behind_port(element))
        };
        let surplus: Vec<_> =
            inherited.iter().filter(|element| concerns(element) && !wanted.contains(element)).cloned().collect();
        if !surplus.is_empty() {
            elements::remove(&mut self.netfilter(), &self.table, &surplus)
                .map_err(Error::netlink("take back the rules of", &*identity.link))?;
        }
        inherited.retain(|element| !concerns(element));
        Ok(())
    }
}

impl Filter for Nft {
    fn establish(&self, rules: &Rules<'_>) -> Result<(), Error> {
        program::run(program::NFT, &["-f", "-"], &self.table, &rules.render())?;
        *lock(&self.inherited) = self.every_element()?;
        *lock(&self.loaded) = self.shown()?;
        Ok(())
    }

    fn differs(&self) -> Result<Option<String>, Error> {
        let shown = self.shown()?;
        let differs = if shown.is_empty() {
            Some("its rules are gone")
        } else {
            (shown != *lock(&self.loaded)).then_some("its rules are not those that were loaded")
        };
        Ok(differs.map(str::to_owned))
    }

    fn notes(&self) -> Result<Notes, Error> {
        let noted = |note| {
            let noted = elements::all(&mut self.netfilter(), &self.table, Family::Inet, note);
            noted.map(|noted| noted.is_some()).map_err(Error::netlink("list the rules of", &self.table))
        };
        Ok(Notes { ipv4: noted(rules::FORWARDING_WAS_OFF)?, ipv6: noted(rules::FORWARDING6_WAS_OFF)? })
    }

    fn add(&self, ports: &[Confined<'_>]) -> Result<(), Error> {
        let mut all = Vec::new();
        for port in ports {
            let elements = port.identity.elements(port.internet);
            self.take_back(port.identity, &elements)?;
            all.extend(elements);
        }
        let of = ports.first().map_or(&*self.table, |port| &*port.identity.link);
        elements::add(&mut self.netfilter(), &self.table, &all).map_err(Error::netlink("add the rules of", of))
    }

    fn remove(&self, ports: &[Confined<'_>]) -> Result<(), Error> {
        let all: Vec<_> = ports.iter().flat_map(|port| port.identity.elements(port.internet)).collect();
        let of = ports.first().map_or(&*self.table, |port| &*port.identity.link);
        elements::remove(&mut self.netfilter(), &self.table, &all).map_err(Error::netlink("remove the rules of", of))
    }

    fn missing(&self, ports: &[Confined<'_>]) -> Result<Option<(usize, String)>, Error> {
        let (mut places, mut all) = (Vec::new(), Vec::new());
        for (place, port) in ports.iter().enumerate() {
            all.extend(port.identity.elements(port.internet));
            places.resize(all.len(), place);
        }
        let of = ports.first().map_or(&*self.table, |port| &*port.identity.link);
        let missing = elements::missing(&mut self.netfilter(), &self.table, &all);
        let missing = missing.map_err(Error::netlink("read back the rules of", of))?;
        let lacks = missing.and_then(|at| Some((*places.get(at)?, all.get(at)?.set)));
        Ok(lacks.map(|(place, set)| (place, format!("set {set} lacks its element"))))
    }

    fn sweep(&self, kept: &BTreeSet<String>) -> Result<Vec<Ipv4Addr>, Error> {
        let every = self.every_element()?;
        let of_port = |element: &Element| rules::PORT_SETS.contains(&(element.family, element.set));
        let is_kept = |element: &Element| rules::port_of_key(&element.key).is_some_and(|port| kept.contains(port));
        let address = |element: &Element| v4_of_element(&self.config, element).filter(|a| !a.is_unspecified());
        let identities = |element: &&Element| element.set == rules::IDENTITY;
        let kept_addresses: BTreeSet<_> =
            every.iter().filter(identities).filter(|element| is_kept(element)).filter_map(address).collect();
        let stale: Vec<_> = every
            .into_iter()
            .filter(|element| {
                if of_port(element) {
                    !is_kept(element)
                } else {
                    address(element).is_none_or(|address| !kept_addresses.contains(&address))
                }
            })
            .collect();
        // A thousand ports' worth would not fit in one send.
        for stale in stale.chunks(256) {
            let removed = elements::remove(&mut self.netfilter(), &self.table, stale);
            removed.map_err(Error::netlink("remove elements of", &self.table))?;
        }
        Ok(stale.iter().filter(identities).filter_map(address).collect())
    }

    fn close(&self) -> Result<(), Error> {
        let mut errors = Vec::new();
        for family in [Family::Bridge, Family::Arp, Family::Inet] {
            let removed = elements::remove_table(&mut self.netfilter(), &self.table, family);
            errors.extend(removed.map_err(Error::netlink("remove the rules of", &self.table)).err());
        }
        TeardownErrors::into_result(errors)
    }

    fn requests_sent(&self) -> u64 {
        self.netfilter().sent()
    }
}
