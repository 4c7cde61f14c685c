//! What a host can do, found by doing it in namespaces that are thrown away.

use std::{error::Error as _, os::fd::AsFd};

use qvd_core::{DesktopId, Instance, Missing, NetPolicy, Support};
use qvd_sys::netns;

use crate::{Backend, Error, NetConfig, Network, PortSpec};

/// Tries what this crate needs of a host. Nothing outside two network
/// namespaces of its own is touched.
#[must_use]
pub fn probe() -> Vec<(&'static str, Support)> {
    const NAMESPACE: &str = "network namespaces";
    const PORT: &str = "confined ports (bridge, veth, nftables bridge family)";
    const NAT: &str = "way out (nftables NAT, IPv4 forwarding)";
    const OLDER: &str = "confined ports without nftables (ebtables, iptables)";
    let (outside, inside) = match netns::create().and_then(|outside| Ok((outside, netns::create()?))) {
        Ok(both) => both,
        Err(error) => {
            let no = Support::No(Missing::Privilege(format!("make network namespaces: {error}")));
            return vec![(NAMESPACE, no.clone()), (PORT, no.clone()), (NAT, no.clone()), (OLDER, no)];
        }
    };
    let trial = |backend, internet| {
        netns::in_netns(outside.as_fd(), || attempt(inside.as_fd(), backend, internet))
            .unwrap_or_else(|error| Support::No(Missing::Privilege(format!("enter a network namespace: {error}"))))
    };
    vec![
        (NAMESPACE, Support::Yes),
        (PORT, trial(Backend::Nft, false)),
        (NAT, trial(Backend::Nft, true)),
        (OLDER, trial(Backend::Iptables, true)),
    ]
}

fn attempt(inside: std::os::fd::BorrowedFd<'_>, backend: Backend, internet: bool) -> Support {
    let tried = DesktopId::new(1).map_err(|error| Error::Invalid(error.to_string())).and_then(|desktop| {
        let mut network = Network::open(NetConfig { internet, backend, ..NetConfig::new(Instance::new(0)) })?;
        let policy = NetPolicy { internet, ..NetPolicy::host_only() };
        let port = network.attach(&PortSpec { desktop, netns: inside, address: None, policy });
        let closed = port.and_then(|mut port| port.close());
        network.close()?;
        closed
    });
    tried.map_or_else(|error| Support::No(missing(&error)), |()| Support::Yes)
}

fn missing(error: &Error) -> Missing {
    if let Error::Unsupported { missing, .. } = error {
        return missing.clone();
    }
    let text = error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"));
    let errno = match error {
        Error::Netlink { source, .. } => source.raw_os_error(),
        Error::Io { source, .. } => source.raw_os_error(),
        _ => None,
    };
    let denied = [rustix::io::Errno::PERM, rustix::io::Errno::ACCESS].map(|errno| Some(errno.raw_os_error()));
    if denied.contains(&errno) { Missing::Privilege(text) } else { Missing::Kernel(text) }
}
