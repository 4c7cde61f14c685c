//! Making a port, and confining it: all that a start and an adoption do to the
//! kernel, in their order.

use std::{
    net::IpAddr,
    os::fd::{BorrowedFd, OwnedFd},
};

use netlink_packet_route::link::{InfoBridgePort, InfoKind};
use qvd_sys::netns;
use rustix::io::Errno;

use super::{Port, netlink_in};
use crate::{
    Error, links,
    mend::GIANTS_PASS,
    netlink::gone_is_done,
    network::{find, group, no_ipv6_address},
    qdisc,
    responder::Guest,
    rules::Protection,
};

impl Port {
    /// Created down, confined, its inside configured, raised last.
    pub(super) fn make(&mut self, netns: BorrowedFd<'_>) -> Result<(), Error> {
        let (index, peer) = self.create(netns)?;
        self.index = Some(index);
        self.begin()?;
        self.confine(index)?;
        self.configure_inside(netns, peer)?;
        self.raise(index)
    }

    pub(super) fn readopt(&mut self) -> Result<(), Error> {
        let found = find(&mut self.network.route(), &self.identity.link)?;
        let found = found.ok_or(Error::NoPort(self.desktop))?;
        let index = found.index;
        self.index = Some(index);
        // What runs inside keeps its own until it is started anew.
        let mtu = links::set_mtu(index, self.network.config.mtu_octets);
        self.network.route().batch(vec![mtu]).map_err(Error::netlink("set the MTU of", &*self.identity.link))?;
        self.bridge = found.bridge.filter(|&bridge| self.network.is_ours(bridge)).unwrap_or(self.bridge);
        self.is_tap = found.kind == Some(InfoKind::Tun);
        if self.is_tap {
            self.answer()?;
        }
        if self.access.policy.down_kbit_s.is_none() {
            match self.network.route().batch(vec![qdisc::unshape(index)]) {
                // There is none to take away.
                Err(error) if error.is(Errno::NOENT) || error.is(Errno::INVAL) => {}
                other => drop(other.map_err(Error::netlink("take the limit of", &*self.identity.link))?),
            }
        }
        // What runs goes on with what it has begun.
        if let Some(flows) = self.network.flows() {
            flows.keep(&self.identity);
        }
        self.confine(index)?;
        self.raise(index)
    }

    /// Whoever had these addresses before has left nothing.
    pub(super) fn begin(&self) -> Result<(), Error> {
        self.network.flows().map_or(Ok(()), |flows| flows.begin(&self.identity))
    }

    /// A machine asks for its addresses; a container has them.
    pub(super) fn answer(&self) -> Result<(), Error> {
        let mut guest = Guest::new(self.identity.mac, self.identity.ipv4);
        (guest.ipv6, guest.way_out) = (self.identity.ipv6, self.access.goes_out());
        self.network.answer(self.bridge, guest)
    }

    fn create(&self, netns: BorrowedFd<'_>) -> Result<(u32, u32), Error> {
        let network = &self.network;
        let request = || {
            links::create_pair(
                &self.identity.link,
                self.bridge,
                group(network.config.instance),
                self.identity.mac,
                network.config.mtu_octets,
                netns,
            )
        };
        let first = network.route().batch(vec![request()]);
        let made = match first {
            Err(error) if error.is(Errno::EXIST) => {
                self.delete_stale()?;
                network.route().batch(vec![request()])
            }
            other => other,
        };
        let mut route = network.route();
        made.map_err(Error::netlink("make the link", &self.identity.link))?;
        let found = find(&mut route, &self.identity.link)?;
        found.and_then(|link| Some((link.index, link.peer?))).ok_or_else(|| self.not_confined("the link is gone"))
    }

    /// A tap, down and on the bridge. Taps are made without netlink, and so in
    /// the namespace of a thread.
    pub(super) fn create_tap(&self, header: bool) -> Result<(OwnedFd, u32), Error> {
        let network = &self.network;
        let link = &*self.identity.link;
        self.delete_stale()?;
        let tap = netns::in_netns(network.netns(), || qvd_sys::tap::create(link, header))
            .and_then(|made| made)
            .map_err(Error::io("make the tap", link))?;
        let mut route = network.route();
        let made = find(&mut route, link)?.ok_or_else(|| self.not_confined("the link is gone"))?;
        let placed = route.batch(links::place(
            made.index,
            self.bridge,
            group(network.config.instance),
            network.config.mtu_octets,
        ));
        placed.map_err(Error::netlink("put on the bridge", link))?;
        Ok((tap, made.index))
    }

    /// Removes a link of this name: a run before this one left it, for the name
    /// is nobody else's.
    fn delete_stale(&self) -> Result<(), Error> {
        let mut route = self.network.route();
        let Some(stale) = find(&mut route, &self.identity.link)? else { return Ok(()) };
        let deleted = route.batch(vec![links::delete(stale.index)]).map(drop);
        gone_is_done(deleted).map_err(Error::netlink("delete the stale link", &self.identity.link))
    }

    /// Flags and rules, both read back.
    pub(super) fn confine(&self, index: u32) -> Result<(), Error> {
        let network = &self.network;
        let refused = |op| Error::netlink(op, &*self.identity.link);
        {
            let mut route = network.route();
            no_ipv6_address(&mut route, index).map_err(refused("switch off IPv6 on"))?;
            let mut flags = self.demanded_flags();
            flags.extend((!flags.is_empty()).then_some(links::LOCKED));
            let mut requests = vec![links::set_port_flags(index, flags), links::forward_to(index, self.identity.mac)];
            let known = |address| links::know_neighbour(self.bridge, address, self.identity.mac);
            requests.extend(self.identity.addresses().map(known));
            requests.extend(self.behind_bridge().into_iter().map(|address| links::route_to(self.bridge, address)));
            route.batch(requests).map_err(refused("set the flags of"))?;
        }
        network.filter.add(&[self.confined()])?;
        if self.is_tap {
            network.stop_giants(index, &self.identity.link)?;
        }
        if let Some(rate) = self.access.policy.down_kbit_s {
            let shaped = network.route().batch(vec![qdisc::shape(index, rate)]);
            shaped.map_err(Error::netlink("limit what is sent to", &*self.identity.link))?;
        }
        self.read_back(index)
    }

    fn demanded_flags(&self) -> Vec<InfoBridgePort> {
        if self.network.without.contains(&Protection::PortFlags) { Vec::new() } else { links::port_flags() }
    }

    pub(super) fn read_back(&self, index: u32) -> Result<(), Error> {
        let network = &self.network;
        let answers = network.route().batch(vec![links::show(index)]);
        let answers = answers.map_err(Error::netlink("read back the flags of", &*self.identity.link))?;
        let shown = answers.iter().find_map(links::facts).ok_or_else(|| self.not_confined("the link is gone"))?;
        if shown.bridge != Some(self.bridge) {
            return Err(self.not_confined("it is not on the bridge"));
        }
        if let Some(flag) = self.demanded_flags().iter().find(|&flag| !shown.port.contains(flag)) {
            return Err(self.not_confined(&format!("the bridge does not show {flag:?}")));
        }
        if self.is_tap && !network.giants_are_stopped(index, &self.identity.link)? {
            return Err(self.not_confined(GIANTS_PASS));
        }
        match network.filter.missing(&[self.confined()])? {
            None => Ok(()),
            Some((_, missing)) => Err(self.not_confined(&missing)),
        }
    }

    fn configure_inside(&self, netns: BorrowedFd<'_>, eth0: u32) -> Result<(), Error> {
        let mut inside = netlink_in(netns, &self.identity.link)?;
        let refused = || Error::netlink("configure the inside of", &*self.identity.link);
        no_ipv6_address(&mut inside, eth0).map_err(refused())?;
        let config = &self.network.config;
        let gateway = config.subnet.gateway();
        let mut requests = vec![
            links::raise(links::LOOPBACK),
            // A host of its own: neighbours are not even on its link.
            links::add_address(eth0, self.identity.ipv4, 32),
            links::raise(eth0),
            links::route_to(eth0, gateway),
        ];
        if self.access.goes_out() {
            requests.push(links::default_route(eth0, gateway));
        }
        if let (Some(ipv6), Some(subnet6)) = (self.identity.ipv6, config.subnet6) {
            let gateway6 = subnet6.gateway(config.subnet);
            requests.extend([
                links::add_address(eth0, self.identity.mac.link_local(), 64),
                links::add_address(eth0, ipv6, 128),
                links::route_to(eth0, gateway6),
            ]);
            if self.access.goes_out() {
                requests.push(links::default_route(eth0, gateway6));
            }
        }
        requests.extend(self.identity.extra.iter().map(|&address| links::add_address(eth0, address, prefix(address))));
        inside.batch(requests).map(drop).map_err(refused())
    }

    pub(super) fn raise(&self, index: u32) -> Result<(), Error> {
        let raised = self.network.route().batch(vec![links::raise(index)]);
        raised.map(drop).map_err(Error::netlink("raise", &*self.identity.link))
    }
}

/// Bits of a whole address.
const fn prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}
