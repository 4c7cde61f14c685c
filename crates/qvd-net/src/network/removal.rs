//! Taking a network away, all of it or what nobody claims.

use std::collections::BTreeSet;

use qvd_core::Instance;
use rustix::io::Errno;

use super::{NetConfig, forwarding, trash};
use crate::{Error, TeardownErrors, bridges, filter::Filter, links, netlink::Netlink};

pub(super) fn sweep_links(route: &mut Netlink, instance: Instance, kept: &BTreeSet<String>) -> Result<usize, Error> {
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
pub(super) fn remove(config: NetConfig, route: &mut Netlink, filter: &dyn Filter) -> Result<(), Error> {
    let mut errors = Vec::new();
    errors.extend(sweep_links(route, config.instance, &BTreeSet::new()).err());
    errors.extend(bridges::remove(config.instance, route).err());
    errors.extend(forwarding::restore(route, filter).err());
    // Without its links the rules stop nobody; as long as one is left they stay.
    if errors.is_empty() {
        errors.extend(filter.close().err());
    }
    TeardownErrors::into_result(errors)
}
