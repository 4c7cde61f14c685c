mod config;
mod forwarding;
mod known;
mod removal;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use netlink_packet_route::link::InfoKind;
use qvd_core::{DesktopId, Instance, NetPolicy};
use qvd_sys::{bpf::Program, netns};

pub use self::config::NetConfig;
pub(crate) use self::known::{find, forget_address, gone, no_ipv6_address, refuse_own, way};
use self::{
    forwarding::{FORWARDING6, forward_ipv6},
    known::refuse_clash,
    removal::{remove, sweep_links},
};
use crate::{
    Error, Mac, Port, PortSpec, TapSpec, TeardownErrors,
    access::Access,
    bridges::{self, Bridges},
    filter::{self, Filter, Notes},
    flows::Flows,
    leases::Leases,
    mend::Record,
    netlink::Netlink,
    pool::Pool,
    responder::{Guest, Responder, Site},
    rules::{Protection, Rules},
    sysctl,
};

/// A bridge, its rule set, and the addresses given out.
///
/// Calls may come from many threads at once; the kernel's own lock on links
/// serialises most of their work anyway. Dropping a network leaves it as it
/// is, for desktops outlive the process that made them: [`Network::open`]
/// takes it over, [`Network::close`] removes it.
#[derive(Debug)]
pub struct Network {
    inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) config: NetConfig,
    /// The first bridge.
    pub(crate) bridge: u32,
    pub(crate) bridges: Mutex<Bridges>,
    /// Where the bridge is: settings below `/proc` are the thread's.
    netns: OwnedFd,
    route: Mutex<Netlink>,
    pub(crate) filter: Box<dyn Filter>,
    /// On a network with a way out, which alone tracks connections.
    flows: Option<Flows>,
    pub(crate) pool: Mutex<Pool>,
    /// The ports that this process has open.
    pub(crate) open: Mutex<BTreeMap<DesktopId, Record>>,
    /// Whether they are cut, because their rules could not be put back.
    pub(crate) cut: Mutex<bool>,
    /// Who tells machines their addresses, by bridge, once there is one.
    responders: Mutex<BTreeMap<u32, Responder>>,
    notes: Notes,
    /// What looks at the frames of machines, once there is one.
    pub(crate) no_giants: OnceLock<Program>,
    pub(crate) without: Vec<Protection>,
}

/// Also after a panic elsewhere: each call leaves these whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Group of an installation's links: `QV` and its number.
pub(crate) fn group(instance: Instance) -> u32 {
    0x5156_0000 | number(instance)
}

/// Group of an installation's bridges, by which rules know them: `QX` and its
/// number.
pub(crate) fn group_of_bridges(instance: Instance) -> u32 {
    0x5158_0000 | number(instance)
}

/// Group of links about to be deleted together: `QW` and the number.
fn trash(instance: Instance) -> u32 {
    0x5157_0000 | number(instance)
}

fn number(instance: Instance) -> u32 {
    u32::from_str_radix(&instance.to_string(), 16).unwrap_or_default()
}

impl Network {
    /// Makes the network in the calling thread's namespace, or takes over the
    /// one that an earlier process left.
    ///
    /// # Errors
    /// [`Error::SubnetClash`] when the host uses the addresses already;
    /// otherwise the host refused a step, and nothing new is left.
    pub fn open(config: NetConfig) -> Result<Self, Error> {
        Self::open_with(config, Leases::default(), &[])
    }

    /// The same, and each desktop gets the address that it had last, which `file`
    /// keeps for it and for nobody else until [`Network::forget`].
    ///
    /// # Errors
    /// As [`Network::open`]; or the file cannot be read, or something else wrote it.
    pub fn open_keeping(config: NetConfig, file: &Path) -> Result<Self, Error> {
        Self::open_with(config, Leases::open(file, config.subnet)?, &[])
    }

    #[cfg(test)]
    pub(crate) fn open_without(config: NetConfig, without: &[Protection]) -> Result<Self, Error> {
        Self::open_with(config, Leases::default(), without)
    }

    fn open_with(config: NetConfig, leases: Leases, without: &[Protection]) -> Result<Self, Error> {
        config.check()?;
        let name = config.instance.bridge_name();
        let io = |op| Error::io(op, name.clone());
        let mut route = Netlink::route().map_err(io("open routing netlink for"))?;
        let netns = netns::current().map_err(io("find the network namespace of"))?;
        let old = find(&mut route, &name)?;
        if let Some(link) = &old
            && link.kind != Some(InfoKind::Bridge)
        {
            return Err(Error::Invalid(format!("link `{name}` exists and is not a bridge")));
        }
        let config = if config.subnet6.is_some() && !sysctl::is_there(FORWARDING6) {
            tracing::warn!(network = name, "this kernel has no IPv6, so neither have the desktops");
            NetConfig { subnet6: None, ..config }
        } else {
            config
        };
        let own: Vec<_> = bridges::all(config.instance, &mut route)?.iter().map(|link| link.index).collect();
        refuse_clash(&mut route, &config, &own)?;
        let filter = filter::open(&config, netns.as_fd())?;
        let flows = config.internet.then(|| Flows::open(&config)).transpose()?;
        let opened = Self::establish(config, without, &mut route, &*filter);
        let (bridges, notes) = opened.inspect_err(|_| {
            if old.is_none() {
                let undone = remove(config, &mut route, &*filter);
                if let Err(error) = undone {
                    tracing::warn!(%error, network = name, "part of a network that could not be opened is left");
                }
            }
        })?;
        let (pool, route) = (Mutex::new(Pool::new(config.subnet, leases)), Mutex::new(route));
        let (open, cut, without) = (Mutex::default(), Mutex::default(), without.to_vec());
        let responders = Mutex::default();
        let (bridge, bridges) = (bridges.first(), Mutex::new(bridges));
        let no_giants = OnceLock::new();
        let inner = Inner {
            config,
            bridge,
            bridges,
            netns,
            route,
            filter,
            flows,
            pool,
            open,
            cut,
            responders,
            notes,
            no_giants,
            without,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    fn establish(
        config: NetConfig,
        without: &[Protection],
        route: &mut Netlink,
        filter: &dyn Filter,
    ) -> Result<(Bridges, Notes), Error> {
        let NetConfig { subnet6, internet, .. } = config;

        // Rules first: from its first moment the bridge is confined. The note
        // that forwarding was off is written before it is switched on.
        let noted = filter.notes()?;
        let is_off = |now: &str| Ok::<_, Error>(internet && sysctl::read(now)? == "0");
        let notes = Notes {
            ipv4: noted.ipv4 || is_off("ipv4/ip_forward")?,
            ipv6: subnet6.is_some() && (noted.ipv6 || is_off(FORWARDING6)?),
        };
        filter.establish(&Rules::of(&config, notes, without))?;

        let bridges = Bridges::open(&config, route, without)?;
        if internet {
            sysctl::write("ipv4/ip_forward", "1")?;
        }
        if notes.ipv6 {
            forward_ipv6()?;
        }
        Ok((bridges, notes))
    }

    pub(crate) const fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// Name of the bridge.
    #[must_use]
    pub fn bridge_name(&self) -> String {
        self.inner.config.instance.bridge_name()
    }

    /// What it was opened with.
    #[must_use]
    pub fn config(&self) -> &NetConfig {
        &self.inner.config
    }

    /// How many requests it has sent to the kernel: what benchmarks count.
    #[must_use]
    pub fn requests_sent(&self) -> u64 {
        lock(&self.inner.route).sent() + self.inner.filter.requests_sent()
    }

    /// Connects a desktop. Its link is raised last, after its rules were read
    /// back: until then, and after any failure, it cannot send.
    ///
    /// # Errors
    /// The address is taken or outside the subnet, all addresses are in use,
    /// the desktop has a port, the policy asks for what this network has not,
    /// or the host refused a step. Nothing is left then.
    pub fn attach(&self, spec: &PortSpec<'_>) -> Result<Port, Error> {
        Port::attach(&self.inner, spec)
    }

    /// Connects a virtual machine by a tap. The descriptor is for whoever runs the
    /// machine; the link lasts until it is closed, here and there.
    ///
    /// # Errors
    /// As [`Network::attach`]; or this host has no taps.
    pub fn attach_tap(&self, spec: &TapSpec) -> Result<(Port, OwnedFd), Error> {
        Port::attach_tap(&self.inner, spec)
    }

    /// Takes over the port that an earlier process made for a desktop, which
    /// still runs. Whatever its confinement lacks is put back.
    ///
    /// # Errors
    /// [`Error::NoPort`] when there is none; otherwise as [`Network::attach`],
    /// and the link is lowered: a port is not left open that is not confined.
    pub fn adopt(&self, desktop: DesktopId, address: Ipv4Addr, policy: &NetPolicy) -> Result<Port, Error> {
        Port::adopt(&self.inner, desktop, address, policy)
    }

    /// Whom a desktop with this policy asks for names, those of IPv6 first: the gateway, which
    /// stands for the site's servers; nobody if it may reach none.
    ///
    /// # Errors
    /// The policy gives no port, or asks for what the network has not.
    pub fn name_servers(&self, desktop: DesktopId, policy: &NetPolicy) -> Result<Vec<IpAddr>, Error> {
        let config = &self.inner.config;
        let (four, six) = Access::of(config, desktop, policy)?.name_servers(config);
        Ok(six.map(IpAddr::V6).into_iter().chain(four.map(IpAddr::V4)).collect())
    }

    /// Keeps no address any more for a desktop that will not come again.
    ///
    /// # Errors
    /// That could not be written; the next process keeps it.
    pub fn forget(&self, desktop: DesktopId) -> Result<(), Error> {
        lock(&self.inner.pool).forget(desktop)
    }

    /// Whether anything of the network of this number is left in the calling thread's
    /// namespace.
    ///
    /// # Errors
    /// The kernel did not say.
    pub fn is_left(instance: Instance) -> Result<bool, Error> {
        let name = instance.bridge_name();
        let mut route = Netlink::route().map_err(Error::io("open routing netlink for", &*name))?;
        Ok(find(&mut route, &name)?.is_some())
    }

    /// Removes the ports and elements of desktops that neither stand in `keep`
    /// nor have a [`Port`] of this network. Returns how many links went.
    ///
    /// # Errors
    /// Something could not be removed; the rest was.
    pub fn sweep(&self, keep: &BTreeSet<DesktopId>) -> Result<usize, Error> {
        let instance = self.inner.config.instance;
        let owned: BTreeSet<_> = lock(&self.inner.pool).desktops().collect();
        let kept: BTreeSet<String> = keep.union(&owned).map(|&desktop| instance.link_name(desktop)).collect();
        let mut errors = Vec::new();
        let addresses = self.inner.filter.sweep(&kept).unwrap_or_else(|error| {
            errors.push(error);
            Vec::new()
        });
        errors.extend(self.inner.flows().and_then(|flows| flows.end(&addresses).err()));
        let mut bridges = lock(&self.inner.bridges);
        let all = bridges.indices();
        let mut route = self.inner.route();
        for address in addresses {
            for &bridge in &all {
                errors.extend(forget_address(&mut route, &self.inner, bridge, address).err());
            }
        }
        let swept = sweep_links(&mut route, instance, &kept).unwrap_or_else(|error| {
            errors.push(error);
            0
        });
        errors.extend(bridges.count(&mut route).err());
        TeardownErrors::into_result(errors)?;
        Ok(swept)
    }

    /// Removes every port, the bridge and the rules, and takes back what was
    /// changed of the host. What is gone is removed.
    ///
    /// # Errors
    /// Something could not be removed; the rest was, and calling again tries
    /// what is left.
    pub fn close(&mut self) -> Result<(), Error> {
        let inner = &self.inner;
        let mut responders = lock(&inner.responders);
        for responder in responders.values_mut() {
            responder.close()?;
        }
        responders.clear();
        drop(responders);
        let closed = netns::in_netns(inner.netns.as_fd(), || remove(inner.config, &mut inner.route(), &*inner.filter));
        closed.map_err(Error::io("enter the network namespace of", self.bridge_name()))??;
        inner.flows().map_or(Ok(()), Flows::end_all)
    }
}

impl Inner {
    pub(crate) fn netns(&self) -> BorrowedFd<'_> {
        self.netns.as_fd()
    }

    /// Tells a machine its addresses from now on, whenever it asks.
    pub(crate) fn answer(&self, bridge: u32, guest: Guest) -> Result<(), Error> {
        let mut responders = lock(&self.responders);
        let responder = match responders.entry(bridge) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(place) => {
                let name = self.bridge_name(bridge);
                let opened = netns::in_netns(self.netns(), || Responder::open(&name, self.site()));
                place.insert(opened.map_err(Error::io("enter the network namespace of", name))??)
            }
        };
        responder.answer(guest);
        Ok(())
    }

    /// And no longer.
    pub(crate) fn forget_guest(&self, mac: Mac) {
        lock(&self.responders).values().for_each(|responder| responder.forget(mac));
    }

    #[cfg(test)]
    pub(crate) fn doom_responders(&self) {
        lock(&self.responders).values().for_each(Responder::doom);
    }

    /// What machines are told alike.
    fn site(&self) -> Site {
        let config = &self.config;
        let gateway_mac = Mac::of(config.instance, config.subnet.gateway());
        let mut site = Site::new(config.subnet, gateway_mac);
        site.mtu_octets = config.mtu_octets;
        site.gateway_ipv6 = config.subnet6.map(|_| gateway_mac.link_local());
        let (four, six) = config.names_at_gateway();
        site.name_servers = four.map(IpAddr::V4).into_iter().chain(six.map(IpAddr::V6)).collect();
        site
    }

    /// Loads the rules that do not depend on ports.
    pub(crate) fn load(&self) -> Result<(), Error> {
        let load = || self.filter.establish(&Rules::of(&self.config, self.notes, &self.without));
        let name = self.config.instance.bridge_name();
        netns::in_netns(self.netns(), load).map_err(Error::io("enter the network namespace of", name))?
    }

    /// What connection tracking holds, if this network asks it.
    pub(crate) fn flows(&self) -> Option<&Flows> {
        self.flows.as_ref().filter(|_| !self.without.contains(&Protection::Flows))
    }

    pub(crate) fn route(&self) -> MutexGuard<'_, Netlink> {
        lock(&self.route)
    }
}
