//! The bridges of a network. One has room for a number of ports; when it is full,
//! or would become slow, the next port is put on a further one. All are the
//! same host to their desktops, with the same addresses and the same MAC, and
//! whoever is not on the first has a route of its own.

use std::{net::IpAddr, os::fd::AsFd as _};

use netlink_packet_route::link::InfoKind;
use qvd_core::Instance;
use qvd_sys::netns;
use rustix::io::Errno;

use crate::{
    Error, Mac, NetConfig, Subnet6,
    links::{self, LinkFacts},
    netlink::Netlink,
    network::{Inner, find, gone, group_of_bridges, lock, no_ipv6_address},
    rules::Protection,
    sysctl,
};

/// Most bridges of a network: sets of identities have room for so many ports.
const BRIDGES_MAX: usize = 16;

/// Most ports of one. Source: Linux `net/bridge/br_private.h`, `BR_PORT_BITS` 10;
/// the number 0 is none.
pub(crate) const PORTS_MAX: u16 = 1023;

/// Name of a network's bridge: those behind the first have a number.
fn name_of(instance: Instance, place: usize) -> String {
    let name = instance.bridge_name();
    if place == 0 { name } else { format!("{name}.{place}") }
}

/// One of them.
#[derive(Debug)]
struct Bridge {
    index: u32,
    ports: u16,
}

/// Those that there are, in the order of their numbers.
#[derive(Debug, Default)]
pub(crate) struct Bridges(Vec<Bridge>);

impl Bridges {
    /// Makes the first one, or gives those that an earlier process left their settings
    /// again.
    pub(crate) fn open(config: &NetConfig, route: &mut Netlink, without: &[Protection]) -> Result<Self, Error> {
        let there = all(config.instance, route)?;
        let is_there = |place: usize| there.iter().any(|link| link.name == name_of(config.instance, place));
        let mut bridges = Vec::new();
        for place in 0..BRIDGES_MAX {
            if place == 0 || is_there(place) {
                bridges.push(Bridge { index: make(config, place, route, without)?, ports: 0 });
            } else {
                break;
            }
        }
        let mut bridges = Self(bridges);
        bridges.count(route)?;
        Ok(bridges)
    }

    /// Index of the first.
    pub(crate) fn first(&self) -> u32 {
        self.0.first().map_or(0, |bridge| bridge.index)
    }

    /// Counts the ports of each, as the kernel has them.
    pub(crate) fn count(&mut self, route: &mut Netlink) -> Result<(), Error> {
        let links = route.dump(links::every_link()).map_err(Error::netlink("list", "links"))?;
        let on: Vec<_> = links.iter().filter_map(links::facts).filter_map(|link| link.bridge).collect();
        for bridge in &mut self.0 {
            let ports = on.iter().filter(|&&index| index == bridge.index).count();
            bridge.ports = u16::try_from(ports).unwrap_or(u16::MAX);
        }
        Ok(())
    }

    pub(crate) fn indices(&self) -> Vec<u32> {
        self.0.iter().map(|bridge| bridge.index).collect()
    }
}

impl Inner {
    /// Room for a port: the index of a bridge.
    pub(crate) fn take_room(&self) -> Result<u32, Error> {
        let per_bridge = self.config.ports_per_bridge.clamp(1, PORTS_MAX);
        let mut bridges = lock(&self.bridges);
        if let Some(bridge) = bridges.0.iter_mut().find(|bridge| bridge.ports < per_bridge) {
            bridge.ports += 1;
            return Ok(bridge.index);
        }
        let place = bridges.0.len();
        if place >= BRIDGES_MAX {
            return Err(Error::NoRoom {
                network: self.config.instance.bridge_name(),
                bridges: place,
                ports: per_bridge,
            });
        }
        let made =
            netns::in_netns(self.netns().as_fd(), || make(&self.config, place, &mut self.route(), &self.without));
        let name = name_of(self.config.instance, place);
        let index = made.map_err(Error::io("enter the network namespace of", &*name))??;
        tracing::info!(bridge = name, "the bridges before it are full");
        bridges.0.push(Bridge { index, ports: 1 });
        Ok(index)
    }

    /// Which bridge is not as the rules know it, if any: in its group.
    pub(crate) fn bridges_differ(&self) -> Result<Option<String>, Error> {
        let wanted = group_of_bridges(self.config.instance);
        let all = lock(&self.bridges).indices();
        for index in all {
            let name = self.bridge_name(index);
            let answers = match self.route().batch(vec![links::show(index)]) {
                // Its ports tell that better.
                Err(error) if error.is(Errno::NODEV) => continue,
                other => other.map_err(Error::netlink("read back the bridge", &*name))?,
            };
            if answers.iter().find_map(links::facts).is_some_and(|link| link.group != wanted) {
                return Ok(Some(format!("{name} is not in its group")));
            }
        }
        Ok(None)
    }

    /// Puts all into their group again.
    pub(crate) fn regroup_bridges(&self) -> Result<(), Error> {
        let wanted = group_of_bridges(self.config.instance);
        let all = lock(&self.bridges).indices();
        for index in all {
            match self.route().batch(vec![links::set_group(index, wanted)]) {
                Err(error) if error.is(Errno::NODEV) => {}
                other => drop(other.map_err(Error::netlink("group the bridge", self.bridge_name(index)))?),
            }
        }
        Ok(())
    }

    /// A port's room is free again.
    pub(crate) fn give_room_back(&self, bridge: u32) {
        if let Some(bridge) = lock(&self.bridges).0.iter_mut().find(|other| other.index == bridge) {
            bridge.ports = bridge.ports.saturating_sub(1);
        }
    }

    /// Whether a bridge is one of the network's.
    pub(crate) fn is_ours(&self, bridge: u32) -> bool {
        lock(&self.bridges).0.iter().any(|other| other.index == bridge)
    }

    pub(crate) fn bridge_name(&self, bridge: u32) -> String {
        let place = lock(&self.bridges).0.iter().position(|other| other.index == bridge);
        name_of(self.config.instance, place.unwrap_or_default())
    }
}

/// Every bridge of an installation.
pub(crate) fn all(instance: Instance, route: &mut Netlink) -> Result<Vec<LinkFacts>, Error> {
    let links = route.dump(links::every_link()).map_err(Error::netlink("list", "links"))?;
    let names: Vec<_> = (0..BRIDGES_MAX).map(|place| name_of(instance, place)).collect();
    let is_one = |link: &LinkFacts| names.contains(&link.name) && link.kind == Some(InfoKind::Bridge);
    Ok(links.iter().filter_map(links::facts).filter(is_one).collect())
}

/// Makes a bridge, or gives an existing one its settings, and raises it.
fn make(config: &NetConfig, place: usize, route: &mut Netlink, without: &[Protection]) -> Result<u32, Error> {
    let NetConfig { instance, subnet, subnet6, backend, mtu_octets, .. } = *config;
    let name = name_of(instance, place);
    let refused = |op| Error::netlink(op, name.clone());
    let mac = Mac::of(instance, subnet.gateway());
    let reserved = if without.contains(&Protection::ReservedGroups) { 0 } else { links::RESERVED_GROUPS_TO_RULES };
    let made = links::ensure_bridge(&name, mac, group_of_bridges(instance), mtu_octets, reserved, backend);
    route.batch(vec![made]).map_err(refused("make the bridge"))?;
    let bridge = find(route, &name)?.ok_or_else(|| gone(&name))?.index;
    no_ipv6_address(route, bridge).map_err(refused("switch off IPv6 on"))?;
    // Answers to ARP for the gateway only, not for the host's other addresses.
    // Settings of a link whose name has a dot are in a directory of that name.
    sysctl::write(&format!("ipv4/conf/{name}/arp_ignore"), "1")?;
    // Neighbours that may talk do so by the host: it knows no shorter way.
    sysctl::write(&format!("ipv4/conf/{name}/send_redirects"), "0")?;
    // Behind the first, each desktop has a route.
    let is_first = place == 0;
    let mut wanted: Vec<(IpAddr, u8)> =
        vec![(subnet.gateway().into(), if is_first { subnet.prefix_len() } else { 32 })];
    if let Some(subnet6) = subnet6 {
        sysctl::write(&format!("ipv6/conf/{name}/accept_ra"), "0")?;
        sysctl::write(&format!("ipv6/conf/{name}/disable_ipv6"), "0")?;
        wanted.push((mac.link_local().into(), Subnet6::PREFIX_LEN));
        wanted.push((subnet6.gateway(subnet).into(), if is_first { Subnet6::PREFIX_LEN } else { 128 }));
    } else {
        sysctl::write_if_there(&format!("ipv6/conf/{name}/disable_ipv6"), "1")?;
    }
    let addresses = route.dump(links::every_address()).map_err(refused("list the addresses of"))?;
    let stale = addresses
        .iter()
        .filter_map(links::address_facts)
        .filter(|&(index, address, prefix_len)| index == bridge && !wanted.contains(&(address, prefix_len)));
    let given = wanted.iter().map(|&(address, prefix_len)| links::add_address(bridge, address, prefix_len));
    let requests = stale
        .map(|(index, address, prefix_len)| links::remove_address(index, address, prefix_len))
        .chain(given)
        .chain([links::raise(bridge)])
        .collect();
    route.batch(requests).map_err(refused("give its address to"))?;
    Ok(bridge)
}

/// Removes every bridge of an installation.
pub(crate) fn remove(instance: Instance, route: &mut Netlink) -> Result<(), Error> {
    for bridge in all(instance, route)? {
        match route.batch(vec![links::delete(bridge.index)]) {
            Err(error) if !error.is(Errno::NODEV) => {
                return Err(Error::netlink("delete the bridge", bridge.name)(error));
            }
            _ => {}
        }
    }
    Ok(())
}
