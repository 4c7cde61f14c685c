//! Whether the host forwards packets between networks: switched on when desktops
//! may go out, and back when the last network that did so goes.

use netlink_packet_route::link::InfoKind;

use crate::{
    Error,
    filter::{Filter, Notes},
    links,
    netlink::Netlink,
    sysctl,
};

pub(super) fn restore(route: &mut Netlink, filter: &dyn Filter) -> Result<(), Error> {
    let Notes { ipv4: of_4, ipv6: of_6 } = filter.notes()?;
    if !of_4 && !of_6 {
        return Ok(());
    }
    let links = route.dump(links::every_link()).map_err(Error::netlink("list", "links"))?;
    let other = links
        .iter()
        .filter_map(links::facts)
        .find(|link| is_group_of_bridges(link.group) && link.kind == Some(InfoKind::Bridge));
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
pub(super) const FORWARDING6: &str = "ipv6/conf/all/forwarding";

/// Lets the host forward IPv6. A host that forwards no longer heeds router
/// advertisements by default, so links that did are told to go on.
pub(super) fn forward_ipv6() -> Result<(), Error> {
    for link in sysctl::list("ipv6/conf")? {
        let setting = format!("ipv6/conf/{link}/accept_ra");
        if link != "all" && sysctl::read(&setting).is_ok_and(|value| value == "1") {
            sysctl::write_if_there(&setting, "2")?;
        }
    }
    sysctl::write(FORWARDING6, "1")
}

/// Whether a link of this group is a bridge of any installation here.
pub(super) const fn is_group_of_bridges(group: u32) -> bool {
    group & 0xffff_0000 == 0x5158_0000
}
