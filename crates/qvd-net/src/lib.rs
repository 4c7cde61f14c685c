//! Bridges, ports, addresses and confinement.
//!
//! A [`Network`] is a bridge and a rule set in one network namespace. A
//! desktop's [`Port`] is a pair of links, one end on the bridge and the other
//! born inside the desktop's own namespace, and the port's entries in the sets
//! that the rules look into. Everything a desktop sends is dropped unless it
//! carries the port's own MAC and addresses of both families; of that, the host
//! takes what resolves its gateway addresses and echo requests to them, and, if
//! policy says so, routes the rest to other networks by NAT. Neighbours and the
//! host's services are out of reach.
//!
//! Everything has a deterministic name: [`Network::open`] takes over what an
//! earlier process left, [`Network::adopt`] a desktop's port, and
//! [`Network::sweep`] removes what nobody claims.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::os::fd::AsFd;
//! use qvd_core::{DesktopId, Instance, NetPolicy};
//! use qvd_net::{NetConfig, Network, PortSpec};
//!
//! let mut network = Network::open(NetConfig { internet: true, ..NetConfig::new(Instance::new(0x1a2b)) })?;
//! let inside = qvd_sys::netns::create()?;
//! let mut port = network.attach(&PortSpec {
//!     desktop: DesktopId::new(7)?,
//!     netns: inside.as_fd(),
//!     address: None,
//!     policy: NetPolicy::internet(),
//! })?;
//! println!("{} {}", port.address(), port.mac());
//! port.close()?;
//! network.close()?;
//! # Ok(()) }
//! ```
#![forbid(unsafe_code)]

mod access;
mod attributes;
mod bridges;
mod drops;
mod elements;
mod error;
mod explain;
mod filter;
mod flows;
mod giants;
mod guard;
mod identity;
mod kept;
mod leases;
mod links;
mod mac;
mod mend;
mod netlink;
mod network;
mod pool;
mod port;
mod probe;
mod program;
mod qdisc;
pub mod responder;
mod rules;
mod subnet6;
mod sysctl;
mod tenants;
mod view;
mod waiter;

#[cfg(test)]
mod tests;

pub use drops::{DropReason, DropReport, DropWatch, Dropped, Sample, samples_of};
pub use error::{Error, TeardownErrors};
pub use explain::Decision;
pub use filter::Backend;
pub use guard::{Guard, Report};
pub use leases::forget_address;
pub use mac::{Mac, MacError};
pub use mend::Mended;
pub use netlink::NetlinkError;
pub use network::{NetConfig, Network};
pub use pool::{Subnet, SubnetError};
pub use port::{Port, PortPlace, PortSpec, TapSpec, loopback_up};
pub use probe::probe;
pub use qvd_core::ErrorKind;
pub use subnet6::Subnet6;
pub use tenants::{SiteRange, TenantPools};
pub use view::{Counters, PortView};
