use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use netlink_packet_route::link::InfoKind;
use qvd_core::{DesktopId, Instance, NetPolicy};
use qvd_sys::netns;
use rustix::io::Errno;

use crate::{
    Error, Mac, Port, PortSpec, Subnet, Subnet6, TapSpec, TeardownErrors,
    bridges::{self, Bridges},
    filter::{self, Backend, Filter, Notes},
    links::{self, LinkFacts},
    mend::Record,
    netlink::Netlink,
    pool::Pool,
    responder::{Guest, Responder, Site},
    rules::{Protection, Rules},
    sysctl,
};

/// Half of what makes adding a port take half as long again.
const PORTS_PER_BRIDGE: u16 = 256;

/// What a network is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetConfig {
    /// Stands in the names of bridge, links and rules.
    pub instance: Instance,
    /// Addresses of the desktops.
    pub subnet: Subnet,
    /// Addresses of IPv6 beside them; none, and the desktops have no IPv6.
    pub subnet6: Option<Subnet6>,
    /// Whether desktops may be let out to other networks. The host then
    /// forwards packets.
    pub internet: bool,
    /// The site's name server, which the gateway stands for.
    pub name_server: Option<Ipv4Addr>,
    /// The same of IPv6.
    pub name_server6: Option<Ipv6Addr>,
    /// What filters.
    pub backend: Backend,
    /// How many ports are put on a bridge before there is a further one: adding a
    /// port takes longer the more there are. At most 1023; with iptables there is
    /// one bridge, and so many ports at most.
    pub ports_per_bridge: u16,
}

impl NetConfig {
    /// The installation's own subnets, and no way out.
    #[must_use]
    pub fn new(instance: Instance) -> Self {
        let (subnet, subnet6) = (Subnet::default_for(instance), Some(Subnet6::default_for(instance)));
        Self {
            instance,
            subnet,
            subnet6,
            internet: false,
            name_server: None,
            name_server6: None,
            backend: Backend::default(),
            ports_per_bridge: PORTS_PER_BRIDGE,
        }
    }

    /// Whether an address is one of those that the network gives away.
    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.subnet.contains(address),
            IpAddr::V6(address) => self.subnet6.is_some_and(|subnet6| subnet6.contains(address)),
        }
    }

    pub(crate) fn name_servers(&self) -> impl Iterator<Item = IpAddr> {
        self.name_server.map(IpAddr::V4).into_iter().chain(self.name_server6.map(IpAddr::V6))
    }
}

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
    pub(crate) pool: Mutex<Pool>,
    /// The ports that this process has open.
    pub(crate) open: Mutex<BTreeMap<DesktopId, Record>>,
    /// Whether they are cut, because their rules could not be put back.
    pub(crate) cut: Mutex<bool>,
    /// Who tells machines their addresses, by bridge, once there is one.
    responders: Mutex<BTreeMap<u32, Responder>>,
    notes: Notes,
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
        Self::open_without(config, &[])
    }

    pub(crate) fn open_without(config: NetConfig, without: &[Protection]) -> Result<Self, Error> {
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
        refuse_clash(&mut route, config.subnet, &own)?;
        let filter = filter::open(&config, netns.as_fd())?;
        let opened = Self::establish(config, without, &mut route, &*filter);
        let (bridges, notes) = opened.inspect_err(|_| {
            if old.is_none() {
                let undone = remove(config, &mut route, &*filter);
                if let Err(error) = undone {
                    tracing::warn!(%error, network = name, "part of a network that could not be opened is left");
                }
            }
        })?;
        let (pool, route) = (Mutex::new(Pool::new(config.subnet)), Mutex::new(route));
        let (open, cut, without) = (Mutex::default(), Mutex::default(), without.to_vec());
        let responders = Mutex::default();
        let (bridge, bridges) = (bridges.first(), Mutex::new(bridges));
        let inner =
            Inner { config, bridge, bridges, netns, route, filter, pool, open, cut, responders, notes, without };
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
        closed.map_err(Error::io("enter the network namespace of", self.bridge_name()))?
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
        site.gateway_ipv6 = config.subnet6.map(|_| gateway_mac.link_local());
        // The gateway stands for the site's servers.
        let four = config.name_server.map(|_| config.subnet.gateway().into());
        let six = config.name_server6.and(config.subnet6).map(|six| six.gateway(config.subnet).into());
        site.name_servers = four.into_iter().chain(six).collect();
        site
    }

    /// Loads the rules that do not depend on ports.
    pub(crate) fn load(&self) -> Result<(), Error> {
        let load = || self.filter.establish(&Rules::of(&self.config, self.notes, &self.without));
        let name = self.config.instance.bridge_name();
        netns::in_netns(self.netns(), load).map_err(Error::io("enter the network namespace of", name))?
    }

    pub(crate) fn route(&self) -> MutexGuard<'_, Netlink> {
        lock(&self.route)
    }
}

pub(crate) fn gone(name: &str) -> Error {
    Error::Io { op: "find", object: name.to_owned(), source: Errno::NODEV.into() }
}

pub(crate) fn find(route: &mut Netlink, name: &str) -> Result<Option<LinkFacts>, Error> {
    match route.batch(vec![links::show_name(name)]) {
        Ok(answers) => Ok(answers.iter().find_map(links::facts)),
        Err(error) if error.is(Errno::NODEV) => Ok(None),
        Err(source) => Err(Error::Netlink { op: "find", object: name.to_owned(), source }),
    }
}

pub(crate) fn no_ipv6_address(route: &mut Netlink, index: u32) -> Result<(), crate::NetlinkError> {
    match route.batch(vec![links::no_ipv6_address(index)]) {
        // The kernel or this namespace has no IPv6.
        Err(error) if error.is(Errno::AFNOSUPPORT) => Ok(()),
        other => other.map(drop),
    }
}

/// Takes away what was told of an address: whose it is, and where.
pub(crate) fn forget_address(route: &mut Netlink, inner: &Inner, bridge: u32, address: IpAddr) -> Result<(), Error> {
    forget_neighbour(route, bridge, address)?;
    let local = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
    if local || (bridge == inner.bridge && inner.config.contains(address)) {
        return Ok(());
    }
    match route.batch(vec![links::forget_route(bridge, address)]) {
        Err(error) if error.is(Errno::SRCH) || error.is(Errno::NODEV) => Ok(()),
        other => other.map(drop).map_err(Error::netlink("forget the route to", address.to_string())),
    }
}

/// Refuses what the host itself has.
pub(crate) fn refuse_own(route: &mut Netlink, wanted: &[IpAddr]) -> Result<(), Error> {
    if wanted.is_empty() {
        return Ok(());
    }
    let addresses = route.dump(links::every_address()).map_err(Error::netlink("list", "addresses"))?;
    let own = addresses.iter().filter_map(links::address_facts).find(|(_, address, _)| wanted.contains(address));
    own.map_or(Ok(()), |(_, address, _)| {
        Err(Error::Invalid(format!("address {address} is the host's own, and so no desktop's")))
    })
}

fn forget_neighbour(route: &mut Netlink, bridge: u32, address: IpAddr) -> Result<(), Error> {
    match route.batch(vec![links::forget_neighbour(bridge, address)]) {
        Err(error) if error.is(Errno::NOENT) || error.is(Errno::NODEV) => Ok(()),
        other => other.map(drop).map_err(Error::netlink("forget the neighbour", address.to_string())),
    }
}

/// Looks for an address or a route of the host that the subnet would hide.
fn refuse_clash(route: &mut Netlink, subnet: Subnet, own: &[u32]) -> Result<(), Error> {
    let listing = |what| Error::netlink("list", what);
    let addresses = route.dump(links::every_address()).map_err(listing("addresses"))?;
    let routes = route.dump(links::every_route()).map_err(listing("routes"))?;
    let address = addresses
        .iter()
        .filter_map(links::address_facts)
        .filter_map(|(index, address, prefix_len)| match address {
            IpAddr::V4(address) => Some((index, address, prefix_len)),
            IpAddr::V6(_) => None,
        })
        .find(|&(index, address, _)| !own.contains(&index) && subnet.contains(address))
        .map(|(index, address, prefix_len)| (format!("address {address}/{prefix_len}"), Some(index)));
    let clash = address.or_else(|| {
        routes
            .iter()
            .filter_map(links::route_facts)
            .find(|&(index, base, prefix_len)| {
                index.is_none_or(|index| !own.contains(&index)) && subnet.overlaps(base, prefix_len)
            })
            .map(|(index, base, prefix_len)| (format!("route {base}/{prefix_len}"), index))
    });
    let Some((what, index)) = clash else { return Ok(()) };
    let link = index
        .and_then(|index| route.batch(vec![links::show(index)]).ok())
        .and_then(|answers| answers.iter().find_map(links::facts));
    let with = link.map_or_else(|| what.clone(), |link| format!("{what} on {}", link.name));
    Err(Error::SubnetClash { subnet, with })
}

fn sweep_links(route: &mut Netlink, instance: Instance, kept: &BTreeSet<String>) -> Result<usize, Error> {
    let prefix = format!("{}-", instance.bridge_name());
    let refused = |op| Error::netlink(op, format!("{prefix}*"));
    let all = route.dump(links::every_link()).map_err(refused("list the links"))?;
    let stale: Vec<_> = all
        .iter()
        .filter_map(links::facts)
        .filter(|link| link.name.starts_with(&prefix) && !kept.contains(&link.name))
        .collect();
    // One by one each would wait for a grace period of its own.
    for some in stale.chunks(256) {
        for link in some {
            match route.batch(vec![links::set_group(link.index, trash(instance))]) {
                Err(error) if !error.is(Errno::NODEV) => return Err(refused("collect the links")(error)),
                _ => {}
            }
        }
        match route.batch(vec![links::delete_group(trash(instance))]) {
            Err(error) if !error.is(Errno::NODEV) => return Err(refused("delete the links")(error)),
            _ => {}
        }
    }
    Ok(stale.len())
}

/// Removes a whole network from the calling thread's namespace.
fn remove(config: NetConfig, route: &mut Netlink, filter: &dyn Filter) -> Result<(), Error> {
    let mut errors = Vec::new();
    errors.extend(sweep_links(route, config.instance, &BTreeSet::new()).err());
    errors.extend(bridges::remove(config.instance, route).err());
    errors.extend(restore_forwarding(route, filter).err());
    // Without its links the rules stop nobody; as long as one is left they stay.
    if errors.is_empty() {
        errors.extend(filter.close().err());
    }
    TeardownErrors::into_result(errors)
}

fn restore_forwarding(route: &mut Netlink, filter: &dyn Filter) -> Result<(), Error> {
    let Notes { ipv4: of_4, ipv6: of_6 } = filter.notes()?;
    if !of_4 && !of_6 {
        return Ok(());
    }
    let links = route.dump(links::every_link()).map_err(Error::netlink("list", "links"))?;
    let other = links
        .iter()
        .filter_map(links::facts)
        .find(|link| group_is_ours(link.group) && link.kind == Some(InfoKind::Bridge));
    if let Some(other) = other {
        tracing::info!(network = other.name, "forwarding stays on for another network");
        return Ok(());
    }
    if of_4 {
        sysctl::write("ipv4/ip_forward", "0")?;
    }
    if of_6 { sysctl::write(FORWARDING6, "0") } else { Ok(()) }
}

/// Whether the host forwards packets of IPv6.
const FORWARDING6: &str = "ipv6/conf/all/forwarding";

/// Lets the host forward IPv6. A host that forwards no longer heeds router
/// advertisements by default, so links that did are told to go on.
fn forward_ipv6() -> Result<(), Error> {
    for link in sysctl::list("ipv6/conf")? {
        let setting = format!("ipv6/conf/{link}/accept_ra");
        if link != "all" && sysctl::read(&setting).is_ok_and(|value| value == "1") {
            sysctl::write_if_there(&setting, "2")?;
        }
    }
    sysctl::write(FORWARDING6, "1")
}

const fn group_is_ours(group: u32) -> bool {
    group & 0xffff_0000 == 0x5156_0000
}
