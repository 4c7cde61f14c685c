mod make;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
};

use netlink_packet_route::RouteNetlinkMessage;
use qvd_core::{DesktopId, NetPolicy};
use qvd_sys::netns;

use crate::{
    Error, Mac, NetConfig, TeardownErrors,
    access::Access,
    explain::Way,
    filter::Confined,
    identity::Identity,
    links,
    mend::Record,
    netlink::{Netlink, gone_is_done},
    network::{Inner, forget_address, lock, refuse_own, way},
};

/// Which desktop to connect, and how.
#[derive(Debug, Clone)]
pub struct PortSpec<'a> {
    /// Its number.
    pub desktop: DesktopId,
    /// Its network namespace, without an `eth0` yet.
    pub netns: BorrowedFd<'a>,
    /// Its address; `None` takes the one that this desktop gets each time,
    /// unless another has it.
    pub address: Option<Ipv4Addr>,
    /// What it may reach.
    pub policy: NetPolicy,
}

/// Which virtual machine to connect, and how.
#[derive(Debug, Clone)]
pub struct TapSpec {
    /// The desktop's number.
    pub desktop: DesktopId,
    /// Its address; `None` takes the one that this desktop gets each time,
    /// unless another has it.
    pub address: Option<Ipv4Addr>,
    /// What it may reach.
    pub policy: NetPolicy,
    /// Whether each frame has a `virtio_net_hdr` before it, as QEMU wants it.
    pub header: bool,
}

/// A port's place in its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortPlace {
    /// Its address.
    pub address: Ipv4Addr,
    /// Bits of the address that are the network's.
    pub prefix: u8,
    /// Who forwards to other networks, if the port may reach any.
    pub gateway: Option<Ipv4Addr>,
    /// Its address of IPv6 and the host's, if the network has such. Nobody else is on its link;
    /// the host forwards to other networks if there is a `gateway`.
    pub ipv6: Option<(Ipv6Addr, Ipv6Addr)>,
    /// Whom to ask for names in each family, if it may reach any.
    pub name_servers: (Option<Ipv4Addr>, Option<Ipv6Addr>),
}

/// A desktop's connection to the bridge: link, MAC, address, rules.
///
/// Dropping it disconnects the desktop, as [`Port::close`] does, but can only
/// log a failure. [`Port::leave`] lets go of a port without touching it.
#[derive(Debug)]
#[must_use = "dropping it disconnects the desktop"]
pub struct Port {
    network: Arc<Inner>,
    desktop: DesktopId,
    identity: Identity,
    /// Index of the host's end, once there is one.
    index: Option<u32>,
    /// Whether a machine's frames come in by it.
    is_tap: bool,
    /// Index of its bridge.
    bridge: u32,
    access: Access,
    open: bool,
}

impl Port {
    pub(crate) fn attach(network: &Arc<Inner>, spec: &PortSpec<'_>) -> Result<Self, Error> {
        let mut port = Self::reserve(network, spec.desktop, spec.address, &spec.policy, None)?;
        match port.make(spec.netns) {
            Ok(()) => {
                port.register();
                Ok(port)
            }
            Err(error) => {
                if let Err(left) = port.close() {
                    tracing::warn!(error = %left, link = port.identity.link, "part of a port that could not be made is left");
                }
                Err(error)
            }
        }
    }

    pub(crate) fn attach_tap(network: &Arc<Inner>, spec: &TapSpec) -> Result<(Self, OwnedFd), Error> {
        let mut port = Self::reserve(network, spec.desktop, spec.address, &spec.policy, None)?;
        let made = port.create_tap(spec.header).and_then(|(tap, index)| {
            (port.index, port.is_tap) = (Some(index), true);
            port.begin()?;
            port.confine(index)?;
            port.answer()?;
            port.raise(index)?;
            Ok(tap)
        });
        match made {
            Ok(tap) => {
                port.register();
                Ok((port, tap))
            }
            Err(error) => {
                if let Err(left) = port.close() {
                    tracing::warn!(error = %left, link = port.identity.link, "part of a port that could not be made is left");
                }
                Err(error)
            }
        }
    }

    pub(crate) fn adopt(
        network: &Arc<Inner>,
        desktop: DesktopId,
        address: Ipv4Addr,
        policy: &NetPolicy,
    ) -> Result<Self, Error> {
        // On the bridge that it is found on.
        let mut port = Self::reserve(network, desktop, Some(address), policy, Some(network.bridge))?;
        match port.readopt() {
            Ok(()) => {
                port.register();
                Ok(port)
            }
            Err(error) => {
                // Not ours to remove, yet not to be left open either.
                if let Some(index) = port.index {
                    let lowered = gone_is_done(network.route().batch(vec![links::lower(index)]).map(drop));
                    lowered.map_err(Error::netlink("lower", &*port.identity.link))?;
                }
                port.leave();
                Err(error)
            }
        }
    }

    fn reserve(
        network: &Arc<Inner>,
        desktop: DesktopId,
        address: Option<Ipv4Addr>,
        policy: &NetPolicy,
        bridge: Option<u32>,
    ) -> Result<Self, Error> {
        let access = Access::of(&network.config, desktop, policy)?;
        let of = |address| Identity::new(&network.config, desktop, address, policy);
        // Those beside it do not depend on it.
        let bridges = lock(&network.bridges).indices();
        refuse_own(&mut network.route(), &of(network.config.subnet.gateway()).extra, &bridges)?;
        let mut pool = lock(&network.pool);
        let address = pool.take(desktop, address)?;
        let identity = of(address);
        if let Err(error) = pool.take_extra(desktop, &identity.extra) {
            pool.give_back(desktop, address);
            return Err(error);
        }
        let was_anothers = pool.was_anothers(desktop, address);
        drop(pool);
        let forgotten = if was_anothers { network.filter.forget_drops(identity.mac) } else { Ok(()) };
        let room = forgotten.and_then(|()| bridge.map_or_else(|| network.take_room(), Ok));
        let bridge = room.inspect_err(|_| lock(&network.pool).give_back(desktop, address))?;
        let network = Arc::clone(network);
        Ok(Self { network, desktop, identity, index: None, is_tap: false, bridge, access, open: true })
    }

    /// From now on it is watched.
    pub(crate) fn register(&self) {
        let Some(index) = self.index else { return };
        let (identity, access) = (self.identity.clone(), self.access.clone());
        let record = Record { identity, access, index, is_tap: self.is_tap };
        lock(&self.network.open).insert(self.desktop, record);
    }

    pub(crate) fn filter(&self) -> &dyn crate::filter::Filter {
        &*self.network.filter
    }

    pub(crate) const fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(crate) fn config(&self) -> &NetConfig {
        &self.network.config
    }

    /// Address inside.
    #[must_use]
    pub const fn address(&self) -> Ipv4Addr {
        self.identity.ipv4
    }

    /// Its address of IPv6 inside, on a network that has such.
    #[must_use]
    pub const fn ipv6(&self) -> Option<Ipv6Addr> {
        self.identity.ipv6
    }

    /// MAC inside.
    #[must_use]
    pub const fn mac(&self) -> Mac {
        self.identity.mac
    }

    /// Where it is in the network, for who configures itself: a machine.
    #[must_use]
    pub fn place(&self) -> PortPlace {
        let subnet = self.network.config.subnet;
        let gateway = self.access.goes_out().then(|| subnet.gateway());
        let router = self.network.config.subnet6.map(|subnet6| subnet6.gateway(subnet));
        let ipv6 = self.identity.ipv6.zip(router);
        let name_servers = self.access.name_servers(&self.network.config);
        PortPlace { address: self.identity.ipv4, prefix: subnet.prefix_len(), gateway, ipv6, name_servers }
    }

    /// Name of the host's end.
    #[must_use]
    pub fn link(&self) -> &str {
        &self.identity.link
    }

    /// Name of the bridge that it is on.
    #[must_use]
    pub fn bridge_name(&self) -> String {
        self.network.bridge_name(self.bridge)
    }

    /// Its addresses that no other route leads to.
    fn behind_bridge(&self) -> Vec<IpAddr> {
        if self.bridge == self.network.bridge { self.identity.extra.clone() } else { self.identity.routed().collect() }
    }

    /// Whose it is.
    #[must_use]
    pub const fn desktop(&self) -> DesktopId {
        self.desktop
    }

    /// What it may reach.
    #[must_use]
    pub fn policy(&self) -> &NetPolicy {
        &self.access.policy
    }

    /// The addresses of the other open ports of its group.
    pub(crate) fn near(&self) -> Vec<IpAddr> {
        let Some(group) = self.access.group() else { return Vec::new() };
        let open = lock(&self.network.open);
        let others = open.values().filter(|record| record.access.group() == Some(group));
        others.flat_map(|record| record.identity.routed()).collect()
    }

    /// Where the host sends what this port sends to an address.
    pub(crate) fn way(&self, to: IpAddr) -> Way {
        let from = if to.is_ipv4() { Some(self.identity.ipv4.into()) } else { self.identity.ipv6.map(IpAddr::V6) };
        from.map_or(Way::Nowhere, |from| way(&mut self.network.route(), self.bridge, from, to))
    }

    /// The addresses of all open ports beside those of the subnets.
    pub(crate) fn extra_of_all(&self) -> Vec<IpAddr> {
        lock(&self.network.open).values().flat_map(|record| record.identity.extra.iter().copied()).collect()
    }

    /// What it may send from beside its own addresses.
    #[must_use]
    pub fn extra_addresses(&self) -> &[IpAddr] {
        &self.identity.extra
    }

    /// Octets of the longest frame that the desktop can send, its header included. A pair of
    /// links has room for a tag (Linux `include/linux/netdevice.h`, `__is_skb_forwardable`).
    pub(crate) fn longest_frame(&self) -> usize {
        const HEADER: usize = 14;
        const TAG: usize = 4;
        usize::from(self.network.config.mtu_octets) + HEADER + if self.is_tap { 0 } else { TAG }
    }

    /// The multicast groups that it takes part in.
    #[must_use]
    pub fn groups(&self) -> &[IpAddr] {
        &self.identity.groups
    }

    /// Asks the kernel whether the port is confined as it was made. Somebody
    /// else may have changed that: `nft flush ruleset`, which reloading a
    /// host's own firewall often means, takes every rule away.
    ///
    /// # Errors
    /// [`Error::NotConfined`] says what is missing; opening the network anew
    /// and adopting the port puts it back, closing the port is safe.
    pub fn verify(&self) -> Result<(), Error> {
        if let Some(differs) = self.network.fixed_differs()? {
            return Err(self.not_confined(&differs));
        }
        self.index.map_or_else(|| Err(Error::NoPort(self.desktop)), |index| self.read_back(index))
    }

    /// Asks the kernel about the host's end.
    pub(crate) fn ask(&self, question: impl Fn(u32) -> links::Request) -> Result<Vec<RouteNetlinkMessage>, Error> {
        let index = self.index.ok_or(Error::NoPort(self.desktop))?;
        let answers = self.network.route().batch(vec![question(index)]);
        answers.map_err(Error::netlink("ask about", &*self.identity.link))
    }

    pub(crate) fn confined(&self) -> Confined<'_> {
        Confined { identity: &self.identity, index: self.index.unwrap_or_default(), access: &self.access }
    }

    fn not_confined(&self, differs: &str) -> Error {
        Error::NotConfined { object: self.identity.link.clone(), differs: differs.to_owned() }
    }

    /// Disconnects the desktop and removes its link, which waits some
    /// milliseconds for the kernel. What is gone is removed.
    ///
    /// # Errors
    /// Something could not be removed; the rest was, and calling again tries
    /// what is left.
    pub fn close(&mut self) -> Result<(), Error> {
        self.end(true)
    }

    /// Disconnects the desktop at once and leaves its link to the end of its
    /// network namespace, which removes it without anybody waiting. For a
    /// desktop all of whose processes have ended, or are about to.
    ///
    /// # Errors
    /// As [`Port::close`].
    pub fn release(&mut self) -> Result<(), Error> {
        self.end(false)
    }

    fn end(&mut self, delete_link: bool) -> Result<(), Error> {
        if !self.open {
            return Ok(());
        }
        let network = &self.network;
        lock(&network.open).remove(&self.desktop);
        network.forget_guest(self.identity.mac);
        let mut errors = Vec::new();
        errors.extend(network.filter.remove(&[self.confined()]).err());
        let addresses: Vec<_> = self.identity.addresses().collect();
        errors.extend(network.flows().and_then(|flows| flows.end(&addresses).err()));
        let mut route = network.route();
        for address in addresses {
            errors.extend(forget_address(&mut route, network, self.bridge, address).err());
        }
        if let Some(index) = self.index.filter(|_| delete_link || !errors.is_empty()) {
            let deleted = gone_is_done(route.batch(vec![links::delete(index)]).map(drop));
            errors.extend(deleted.map_err(Error::netlink("delete the link", &*self.identity.link)).err());
        }
        drop(route);
        TeardownErrors::into_result(errors)?;
        lock(&network.pool).give_back(self.desktop, self.identity.ipv4);
        network.give_room_back(self.bridge);
        self.open = false;
        Ok(())
    }

    /// Lets go of the port and leaves everything as it is: the desktop keeps
    /// its network, and a later [`Network::adopt`](crate::Network::adopt)
    /// takes it over.
    pub fn leave(mut self) {
        lock(&self.network.open).remove(&self.desktop);
        self.network.forget_guest(self.identity.mac);
        lock(&self.network.pool).give_back(self.desktop, self.identity.ipv4);
        self.open = false;
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(%error, link = self.identity.link, "port left behind");
        }
    }
}

fn netlink_in(netns: BorrowedFd<'_>, what: &str) -> Result<Netlink, Error> {
    netns::in_netns(netns, Netlink::route)
        .and_then(|opened| opened)
        .map_err(Error::io("open routing netlink inside", what))
}

/// Raises the loopback interface of a desktop that gets no port.
///
/// # Errors
/// This process may not configure the namespace.
pub fn loopback_up(netns: BorrowedFd<'_>) -> Result<(), Error> {
    let mut inside = netlink_in(netns, "lo")?;
    inside.batch(vec![links::raise(links::LOOPBACK)]).map(drop).map_err(Error::netlink("raise", "lo"))
}
