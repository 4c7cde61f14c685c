//! Rules loaded once by `nft`; ports are elements of sets, over netlink.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use qvd_sys::netns;

use super::{Confined, Filter, Notes, fingerprint::fingerprint};
use crate::{
    DropReason, Error, Mac, NetConfig, TeardownErrors,
    access::Access,
    drops::{self, Counted, DROPPED, SAMPLED},
    elements::{self, Element, Family},
    identity::{Identity, address_of_element},
    netlink::Netlink,
    program,
    rules::{self, Protection, Rules},
};

#[derive(Debug)]
pub(super) struct Nft {
    config: NetConfig,
    /// Where the rules are.
    netns: OwnedFd,
    table: String,
    netfilter: Mutex<Netlink>,
    /// What an earlier process left in the sets. Whoever takes over one of
    /// these names or addresses first takes back what it does not mean to give.
    inherited: Mutex<Vec<Element>>,
    loaded: Mutex<Loaded>,
}

/// What this process has loaded beside elements.
#[derive(Debug, Default)]
struct Loaded {
    /// The rules as the kernel showed them then.
    shown: Vec<u8>,
    /// The policies that have chains, by name.
    classes: BTreeMap<String, Access>,
    /// Left out of the rules. Only tests leave something out.
    without: Vec<Protection>,
}

/// What ports have in the sets.
#[derive(Debug, Default)]
struct PortElements {
    elements: Vec<Element>,
    /// Where those of each port end.
    ends: Vec<usize>,
}

/// Also after a panic elsewhere: each call leaves these whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Nft {
    pub(super) fn open(config: NetConfig, netns: BorrowedFd<'_>) -> Result<Self, Error> {
        let name = config.instance.bridge_name();
        let netns = netns.try_clone_to_owned().map_err(Error::io("keep the network namespace of", &name))?;
        let netfilter = Netlink::netfilter().map_err(Error::io("open netfilter netlink for", name))?;
        let table = rules::table_name(config.instance);
        Ok(Self {
            config,
            netns,
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

    /// What a port has in the sets.
    fn elements(&self, port: &Confined<'_>) -> Vec<Element> {
        let gateway = Mac::of(self.config.instance, self.config.subnet.gateway());
        port.identity.elements(port.access, port.index, gateway)
    }

    /// The elements of some ports, and the places where those of each end.
    fn all_elements(&self, ports: &[Confined<'_>]) -> PortElements {
        let mut all = PortElements::default();
        for port in ports {
            all.elements.extend(self.elements(port));
            all.ends.push(all.elements.len());
        }
        all
    }

    fn put(&self, ports: &[Confined<'_>], all: &PortElements) -> Result<(), Error> {
        let mut begin = 0;
        for (port, &end) in ports.iter().zip(&all.ends) {
            self.take_back(port.identity, all.elements.get(begin..end).unwrap_or_default())?;
            begin = end;
        }
        elements::add(&mut self.netfilter(), &self.table, &all.elements)
            .map_err(Error::netlink("add the rules of", self.of(ports)))
    }

    fn lacking(&self, ports: &[Confined<'_>], all: &PortElements) -> Result<Option<(usize, String)>, Error> {
        let missing = elements::missing(&mut self.netfilter(), &self.table, &all.elements);
        let missing = missing.map_err(Error::netlink("read back the rules of", self.of(ports)))?;
        let lacks = missing.and_then(|at| {
            Some((
                all.ends.partition_point(|&end| end <= at),
                format!("set {} lacks its element", all.elements.get(at)?.set),
            ))
        });
        Ok(lacks)
    }

    /// Whom a message is about.
    fn of<'a>(&'a self, ports: &[Confined<'a>]) -> &'a str {
        ports.first().map_or(&*self.table, |port| &*port.identity.link)
    }

    /// Every element of our sets.
    fn every_element(&self) -> Result<Vec<Element>, Error> {
        let mut every = Vec::new();
        let mut netfilter = self.netfilter();
        for (family, set) in rules::PORT_SETS.into_iter().chain(rules::WAY_SETS).chain(rules::ADDRESS_SETS) {
            let all = elements::every(&mut netfilter, &self.table, family, set);
            every.extend(all.map_err(Error::netlink("list the rules of", &self.table))?);
        }
        Ok(every)
    }

    /// Removes what an earlier process gave this link or this address beyond
    /// `wanted`: another identity, a way out.
    fn take_back(&self, identity: &Identity, wanted: &[Element]) -> Result<(), Error> {
        let mut inherited = lock(&self.inherited);
        if inherited.is_empty() {
            return Ok(());
        }
        let addresses: Vec<_> = identity.addresses().collect();
        let of_link = |element: &Element| rules::port_of_key(&element.key) == Some(&*identity.link);
        let links_own = inherited.iter().filter(|element| element.set == rules::LINK && of_link(element));
        let mut macs: Vec<_> = links_own.filter_map(|element| rules::mac_of_key(element.key.get(16..)?)).collect();
        macs.push(identity.mac);
        let concerns = |element: &Element| {
            if rules::ADDRESS_SETS.contains(&(element.family, element.set)) {
                return address_of_element(element).is_some_and(|address| addresses.contains(&address));
            }
            if rules::WAY_SETS.contains(&(element.family, element.set)) {
                return rules::mac_of_way_key(&element.key).is_some_and(|mac| macs.contains(&mac));
            }
            // Of this link, or of another that had this MAC and address.
            let behind_port = |element: &Element| element.key.get(16..).map(<[u8]>::to_vec);
            of_link(element)
                || wanted.iter().any(|own| own.set == element.set && behind_port(own) == behind_port(element))
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

impl Nft {
    /// What was counted of ports that are gone.
    fn stale_counts(
        &self,
        is_kept: &dyn Fn(&Element) -> bool,
        kept_macs: &BTreeSet<Mac>,
    ) -> Result<Vec<Element>, Error> {
        let mut stale = Vec::new();
        for family in [Family::Bridge, Family::Inet] {
            for set in [DROPPED, SAMPLED] {
                let all = elements::every(&mut self.netfilter(), &self.table, family, set);
                let all = all.map_err(Error::netlink("list the rules of", &self.table))?;
                stale.extend(all.into_iter().filter(|element| match family {
                    Family::Bridge => !is_kept(element),
                    _ => rules::mac_of_key(&element.key).is_none_or(|mac| !kept_macs.contains(&mac)),
                }));
            }
        }
        Ok(stale)
    }

    /// Makes the chains of policies that come for the first time.
    fn load_classes(&self, ports: &[Confined<'_>]) -> Result<(), Error> {
        if ports.iter().all(|port| !port.access.has_rules()) {
            return Ok(());
        }
        // Held until the kernel's answer is known: who compares meanwhile waits.
        let mut loaded = lock(&self.loaded);
        let new: BTreeMap<_, _> = ports
            .iter()
            .filter(|port| !loaded.classes.contains_key(port.access.class()))
            .map(|port| (port.access.class().to_owned(), port.access.clone()))
            .collect();
        let rules = Rules::of(&self.config, Notes::default(), &loaded.without);
        let text: String = new.values().map(|access| rules.class(access)).collect();
        if text.is_empty() {
            return Ok(());
        }
        let netns = self.netns.as_fd();
        netns::in_netns(netns, || program::run(program::NFT, &["-f", "-"], &self.table, &text))
            .map_err(Error::io("enter the network namespace of", &self.table))??;
        loaded.shown = self.shown()?;
        loaded.classes.extend(new);
        Ok(())
    }
}

impl Filter for Nft {
    fn establish(&self, rules: &Rules<'_>) -> Result<(), Error> {
        let mut loaded = lock(&self.loaded);
        let classes = loaded.classes.values().map(|access| rules.class(access));
        // A kernel without this log has no rules that use it either.
        let group = drops::log_group(self.config.instance);
        let log_group = drops::has_log(group).then_some(group);
        let rules = Rules { log_group, ..*rules };
        let classes: String = classes.collect();
        let load = |text: String| program::run(program::NFT, &["-f", "-"], &self.table, &(text + &classes));
        match load(rules.render()) {
            // Sets of another version may be of other types. Ports are cut then until
            // they are adopted.
            Err(error @ Error::Rules { .. }) if !self.shown()?.is_empty() => {
                tracing::warn!(%error, "rules of another version are replaced");
                load(rules.render_anew())?;
            }
            loaded => drop(loaded?),
        }
        loaded.without = rules.without.to_vec();
        *lock(&self.inherited) = self.every_element()?;
        loaded.shown = self.shown()?;
        Ok(())
    }

    fn differs(&self) -> Result<Option<String>, Error> {
        let loaded = lock(&self.loaded);
        let shown = self.shown()?;
        let differs = if shown.is_empty() {
            Some("its rules are gone")
        } else {
            (shown != loaded.shown).then_some("its rules are not those that were loaded")
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
        self.load_classes(ports)?;
        self.put(ports, &self.all_elements(ports))
    }

    fn remove(&self, ports: &[Confined<'_>]) -> Result<(), Error> {
        let all = self.all_elements(ports).elements;
        elements::remove(&mut self.netfilter(), &self.table, &all)
            .map_err(Error::netlink("remove the rules of", self.of(ports)))
    }

    fn missing(&self, ports: &[Confined<'_>]) -> Result<Option<(usize, String)>, Error> {
        self.lacking(ports, &self.all_elements(ports))
    }

    fn confine(&self, ports: &[Confined<'_>]) -> Result<Option<(usize, String)>, Error> {
        self.load_classes(ports)?;
        let all = self.all_elements(ports);
        self.put(ports, &all)?;
        self.lacking(ports, &all)
    }

    fn sweep(&self, kept: &BTreeSet<String>) -> Result<Vec<IpAddr>, Error> {
        let every = self.every_element()?;
        let of_port = |element: &Element| rules::PORT_SETS.contains(&(element.family, element.set));
        let is_kept = |element: &Element| rules::port_of_key(&element.key).is_some_and(|port| kept.contains(port));
        let sender = |element: &Element| match element.set {
            rules::IDENTITY => rules::v4_of_key(&element.key).map(IpAddr::V4).filter(|v4| !v4.is_unspecified()),
            rules::IDENTITY6 => rules::v6_of_key(&element.key).map(IpAddr::V6).filter(|v6| !v6.is_unspecified()),
            _ => None,
        };
        let kept_addresses: BTreeSet<_> = every.iter().filter(|element| is_kept(element)).filter_map(sender).collect();
        // Behind the bridge a port is known by its MAC.
        let kept_macs: BTreeSet<_> = every
            .iter()
            .filter(|element| element.set == rules::IDENTITY && is_kept(element))
            .filter_map(|element| rules::mac_of_key(element.key.get(16..)?))
            .collect();
        let stale: Vec<_> = every
            .into_iter()
            .filter(|element| {
                if of_port(element) {
                    !is_kept(element)
                } else if rules::WAY_SETS.contains(&(element.family, element.set)) {
                    rules::mac_of_way_key(&element.key).is_none_or(|mac| !kept_macs.contains(&mac))
                } else {
                    address_of_element(element).is_none_or(|address| !kept_addresses.contains(&address))
                }
            })
            .collect();
        let mut stale = stale;
        stale.extend(self.stale_counts(&is_kept, &kept_macs)?);
        // A thousand ports' worth would not fit in one send.
        for stale in stale.chunks(256) {
            let removed = elements::remove(&mut self.netfilter(), &self.table, stale);
            removed.map_err(Error::netlink("remove elements of", &self.table))?;
        }
        Ok(stale.iter().filter_map(sender).collect())
    }

    fn close(&self) -> Result<(), Error> {
        let mut errors = Vec::new();
        for family in [Family::Bridge, Family::Arp, Family::Inet] {
            let removed = elements::remove_table(&mut self.netfilter(), &self.table, family);
            errors.extend(removed.map_err(Error::netlink("remove the rules of", &self.table)).err());
        }
        TeardownErrors::into_result(errors)
    }

    fn drops(&self, identity: &Identity) -> Result<BTreeMap<DropReason, u64>, Error> {
        let element = |reason: DropReason| {
            let (family, key) = if reason.is_behind_bridge() {
                (Family::Inet, rules::dropped_behind_key(identity.mac, reason.mark()))
            } else {
                (Family::Bridge, rules::dropped_key(&identity.link, reason.mark()))
            };
            Element::new(family, DROPPED, key)
        };
        let counted = elements::counted(&mut self.netfilter(), &self.table, &DropReason::ALL.map(element));
        let counted = counted.map_err(Error::netlink("count what was dropped of", &*identity.link))?;
        let named = |(key, count): (Vec<u8>, u64)| Some((DropReason::of_mark(rules::mark_of_key(&key)?)?, count));
        Ok(counted.into_iter().filter_map(named).collect())
    }

    fn forget_drops(&self, mac: Mac) -> Result<(), Error> {
        let behind = DropReason::ALL.into_iter().filter(|reason| reason.is_behind_bridge());
        let element =
            |reason: DropReason| Element::new(Family::Inet, DROPPED, rules::dropped_behind_key(mac, reason.mark()));
        let all: Vec<_> = behind.map(element).collect();
        let refused = || Error::netlink("forget what was dropped on", &*self.table);
        let mut netfilter = self.netfilter();
        let counted = elements::counted(&mut netfilter, &self.table, &all).map_err(refused())?;
        let there: Vec<_> = counted.into_iter().map(|(key, _)| Element::new(Family::Inet, DROPPED, key)).collect();
        if there.is_empty() {
            return Ok(());
        }
        elements::remove(&mut netfilter, &self.table, &there).map_err(refused())
    }

    fn all_drops(&self) -> Result<Counted, Error> {
        let mut all = Counted::new();
        for family in [Family::Bridge, Family::Inet] {
            let counted = elements::all_counted(&mut self.netfilter(), &self.table, family, DROPPED);
            let counted = counted.map_err(Error::netlink("count what was dropped on", &self.table))?;
            all.extend(counted.into_iter().filter_map(|(key, count)| {
                let who = match family {
                    Family::Bridge => rules::port_of_key(&key)?.to_owned(),
                    _ => rules::mac_of_key(&key)?.to_string(),
                };
                Some(((who, rules::mark_of_key(&key)?), count))
            }));
        }
        Ok(all)
    }

    fn requests_sent(&self) -> u64 {
        self.netfilter().sent()
    }
}
