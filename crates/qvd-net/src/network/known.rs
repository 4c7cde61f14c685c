//! What the host has already: links, addresses and routes, its own and ours.

use std::net::IpAddr;

use netlink_packet_route::route::RouteType;
use rustix::io::Errno;

use super::{Inner, forwarding::is_group_of_bridges};
use crate::{
    Error, NetConfig,
    explain::Way,
    links::{self, LinkFacts},
    netlink::Netlink,
};

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

/// Where the host sends what comes over a bridge.
pub(crate) fn way(route: &mut Netlink, bridge: u32, from: IpAddr, to: IpAddr) -> Way {
    // Whatever the kernel has against the packet, it goes nowhere then.
    let Ok(answers) = route.batch(vec![links::ask_way(bridge, from, to)]) else { return Way::Nowhere };
    let Some((kind, link)) = answers.iter().find_map(links::way_facts) else { return Way::Nowhere };
    match kind {
        RouteType::Local | RouteType::Broadcast | RouteType::Anycast => Way::Host,
        RouteType::Unicast => {
            let link = link.and_then(|index| route.batch(vec![links::show(index)]).ok());
            let link = link.and_then(|answers| answers.iter().find_map(links::facts));
            if link.is_some_and(|link| is_group_of_bridges(link.group)) { Way::Desktops } else { Way::Out }
        }
        _ => Way::Nowhere,
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

/// Refuses what the host itself has, or has a route to behind another link than
/// `bridges`: another network's desktop, for instance.
pub(crate) fn refuse_own(route: &mut Netlink, wanted: &[IpAddr], bridges: &[u32]) -> Result<(), Error> {
    if wanted.is_empty() {
        return Ok(());
    }
    let addresses = route.dump(links::every_address()).map_err(Error::netlink("list", "addresses"))?;
    let own = addresses.iter().filter_map(links::address_facts).find(|(_, address, _)| wanted.contains(address));
    if let Some((_, address, _)) = own {
        return Err(Error::Invalid(format!("address {address} is the host's own, and so no desktop's")));
    }
    for six in [false, true].into_iter().filter(|six| wanted.iter().any(|address| address.is_ipv6() == *six)) {
        let routes = route.dump(links::every_route(six)).map_err(Error::netlink("list", "routes"))?;
        let whole = if six { 128 } else { 32 };
        let elsewhere = routes.iter().filter_map(links::route_facts).find(|(link, to, prefix_len)| {
            *prefix_len == whole && wanted.contains(to) && link.is_none_or(|link| !bridges.contains(&link))
        });
        if let Some((_, address, _)) = elsewhere {
            return Err(Error::Invalid(format!("address {address} is somebody else's: the host has a route to it")));
        }
    }
    Ok(())
}

fn forget_neighbour(route: &mut Netlink, bridge: u32, address: IpAddr) -> Result<(), Error> {
    match route.batch(vec![links::forget_neighbour(bridge, address)]) {
        Err(error) if error.is(Errno::NOENT) || error.is(Errno::NODEV) => Ok(()),
        other => other.map(drop).map_err(Error::netlink("forget the neighbour", address.to_string())),
    }
}

/// Looks for an address or a route of the host that the subnet would hide.
pub(super) fn refuse_clash(route: &mut Netlink, config: &NetConfig, own: &[u32]) -> Result<(), Error> {
    let NetConfig { subnet, subnet6, .. } = *config;
    let listing = |what| Error::netlink("list", what);
    let addresses = route.dump(links::every_address()).map_err(listing("addresses"))?;
    let others = || addresses.iter().filter_map(links::address_facts).filter(|(index, ..)| !own.contains(index));
    if let Some(subnet6) = subnet6
        && let Some(address) = others().find_map(|(_, address, _)| match address {
            IpAddr::V6(address) => subnet6.contains(address).then_some(address),
            IpAddr::V4(_) => None,
        })
    {
        return Err(Error::Invalid(format!(
            "subnet {subnet6} clashes with address {address} of the host: choose another"
        )));
    }
    let routes = route.dump(links::every_route(false)).map_err(listing("routes"))?;
    let address = others()
        .filter_map(|(index, address, prefix_len)| match address {
            IpAddr::V4(address) => Some((index, address, prefix_len)),
            IpAddr::V6(_) => None,
        })
        .find(|&(_, address, _)| subnet.contains(address))
        .map(|(index, address, prefix_len)| (format!("address {address}/{prefix_len}"), Some(index)));
    let clash = address.or_else(|| {
        routes
            .iter()
            .filter_map(links::route_facts)
            .find(|&(index, base, prefix_len)| {
                let IpAddr::V4(base) = base else { return false };
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
