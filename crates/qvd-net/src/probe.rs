//! What a host can do, found by doing it in namespaces that are thrown away.

use std::{error::Error as _, os::fd::AsFd};

use qvd_core::{DesktopId, Instance, Missing, NetPolicy, Support};
use qvd_sys::netns;

use crate::{Backend, Error, NetConfig, Network, PortSpec, TapSpec};

/// Tries what this crate needs of a host. Nothing outside two network
/// namespaces of its own is touched.
#[must_use]
pub fn probe() -> Vec<(&'static str, Support)> {
    const NAMESPACE: &str = "network namespaces";
    const PORT: &str = "confined ports (bridge, veth, nftables bridge family)";
    const NAT: &str = "way out (nftables NAT, IPv4 forwarding)";
    const MACHINE: &str = "confined ports of machines (tap, tc's BPF classifier)";
    const OLDER: &str = "confined ports without nftables (ebtables, iptables)";
    let (outside, inside) = match netns::create().and_then(|outside| Ok((outside, netns::create()?))) {
        Ok(both) => both,
        Err(error) => {
            let no = Support::No(Missing::Privilege(format!("make network namespaces: {error}")));
            return [NAMESPACE, PORT, NAT, MACHINE, OLDER].map(|what| (what, no.clone())).into();
        }
    };
    let trial = |backend, internet, is_machine: bool| {
        let inside = (!is_machine).then(|| inside.as_fd());
        netns::in_netns(outside.as_fd(), || attempt(inside, backend, internet))
            .unwrap_or_else(|error| Support::No(Missing::Privilege(format!("enter a network namespace: {error}"))))
    };
    vec![
        (NAMESPACE, Support::Yes),
        (PORT, trial(Backend::Nft, false, false)),
        (NAT, trial(Backend::Nft, true, false)),
        (MACHINE, trial(Backend::Nft, false, true)),
        (OLDER, trial(Backend::Iptables, true, false)),
    ]
}

/// A port of a container with this namespace, or of a machine.
fn attempt(inside: Option<std::os::fd::BorrowedFd<'_>>, backend: Backend, internet: bool) -> Support {
    let tried = DesktopId::new(1).map_err(|error| Error::Invalid(error.to_string())).and_then(|desktop| {
        let mut network = Network::open(NetConfig { internet, backend, ..NetConfig::new(Instance::new(0)) })?;
        let policy = NetPolicy { internet, ..NetPolicy::host_only() };
        let port = match inside {
            Some(netns) => network.attach(&PortSpec { desktop, netns, address: None, policy }),
            None => {
                let spec = TapSpec { desktop, address: None, policy, header: true };
                network.attach_tap(&spec).map(|(port, _tap)| port)
            }
        };
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
