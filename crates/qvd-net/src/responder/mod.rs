//! Tells virtual machines their addresses: `DHCPv4`, `DHCPv6` and router
//! advertisements on one bridge.
//!
//! It answers exactly the guests that it was told of, each with its own
//! addresses, and keeps nothing of what they say: there are no leases to run
//! out, no table that a flood could fill. It hears raw frames on the bridge
//! behind a filter in the kernel, and so needs no address, no port of the
//! host's and no opening in the rules for what reaches the host itself.

mod dhcp4;
mod dhcp6;
mod frame;
mod guests;
mod router;
mod service;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

pub use service::Responder;
#[cfg(test)]
pub(crate) use service::WORKER;

use crate::{Mac, Subnet};
use frame::Heard;

/// What every guest of a bridge is told alike.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Site {
    /// Addresses of the desktops, and the gateway's.
    pub subnet: Subnet,
    /// MAC of the bridge.
    pub gateway_mac: Mac,
    /// Link-local address of the bridge, when guests are to have IPv6.
    pub gateway_ipv6: Option<Ipv6Addr>,
    /// Name servers of both families.
    pub name_servers: Vec<IpAddr>,
    /// Longest packet on the bridge.
    pub mtu_octets: u16,
    /// How long a guest may use what it was told before it has to ask again.
    pub lease: Duration,
}

impl Site {
    /// Longest packet of an Ethernet.
    pub(crate) const MTU_OCTETS: u16 = 1500;
    /// Short enough that a changed name server is used within the hour.
    const LEASE: Duration = Duration::from_secs(3600);

    /// A site without name servers and IPv6.
    #[must_use]
    pub const fn new(subnet: Subnet, gateway_mac: Mac) -> Self {
        Self {
            subnet,
            gateway_mac,
            gateway_ipv6: None,
            name_servers: Vec::new(),
            mtu_octets: Self::MTU_OCTETS,
            lease: Self::LEASE,
        }
    }

    fn lease_s(&self) -> u32 {
        u32::try_from(self.lease.as_secs()).unwrap_or(u32::MAX)
    }
}

/// One that is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Guest {
    /// By which it is known. That nobody else uses it is the rules' business.
    pub mac: Mac,
    /// Its address.
    pub ipv4: Ipv4Addr,
    /// Its other address.
    pub ipv6: Option<Ipv6Addr>,
    /// What it is called.
    pub name: Option<String>,
    /// Whether the gateway is its way to other networks.
    pub way_out: bool,
}

impl Guest {
    /// One that has an IPv4 address and no way out.
    #[must_use]
    pub const fn new(mac: Mac, ipv4: Ipv4Addr) -> Self {
        Self { mac, ipv4, ipv6: None, name: None, way_out: false }
    }
}

/// The answer to what was heard, if it has one. Never a panic and never a
/// frame to anybody but `guest`, whatever was heard.
fn answer(site: &Site, guest: &Guest, heard: &Heard<'_>) -> Option<Vec<u8>> {
    match *heard {
        Heard::Dhcp4(message) => dhcp4::answer(site, guest, message),
        Heard::Dhcp6 { from, message } => dhcp6::answer(site, guest, from, message),
        Heard::RouterSolicitation => router::advertisement(site, guest),
    }
}

/// Takes a frame as a machine could send it: for fuzzing. Says whether it would
/// be answered by what serves one guest, whose MAC is that of `10.66.0.7` of instance 1.
#[doc(hidden)]
#[must_use]
pub fn is_answered(frame: &[u8]) -> bool {
    let Ok(subnet) = "10.66.0.0/16".parse::<Subnet>() else { return false };
    let (instance, ipv4) = (qvd_core::Instance::new(1), Ipv4Addr::new(10, 66, 0, 7));
    let gateway_ipv6 = Some(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));
    let site = Site { gateway_ipv6, ..Site::new(subnet, Mac::of(instance, subnet.gateway())) };
    let ipv6 = Some(Ipv6Addr::new(0xfd51, 0x5644, 0, 0, 0, 0, 0, 7));
    let guest = Guest { ipv6, way_out: true, ..Guest::new(Mac::of(instance, ipv4), ipv4) };
    frame::open(frame).is_some_and(|(_, heard)| answer(&site, &guest, &heard).is_some())
}

#[cfg(test)]
mod tests;
