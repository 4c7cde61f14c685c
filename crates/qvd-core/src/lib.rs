//! Vocabulary of QVD: ids, units, states, specifications, probe answers.
//!
//! No I/O happens here. What one layer hands to another is a type of this
//! crate or a file descriptor, so that `qvd-storage`, `qvd-virt` and `qvd-net`
//! need not know each other.
//!
//! Quantities have types with their unit, and a name that exists is a valid one:
//!
//! ```
//! use qvd_core::{Bytes, DesktopId, Instance, UserName};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let memory: Bytes = "512M".parse()?;
//! assert_eq!((memory, memory.to_string()), (Bytes::mib(512), "512MiB".to_owned()));
//! // What desktop 7 of an installation is called in the kernel.
//! assert_eq!(Instance::new(0x1a2b).link_name(DesktopId::new(7)?), "qvd1a2b-7");
//! let error = "../ana".parse::<UserName>().unwrap_err();
//! assert!(error.to_string().starts_with("`../ana` is not a user name"));
//! # Ok(()) }
//! ```
#![forbid(unsafe_code)]

mod birth;
mod cause;
mod error;
mod id;
mod net;
mod rest;
mod spec;
mod support;
mod unit;

pub use birth::BirthPolicy;
pub use cause::causes;
pub use error::ErrorKind;
pub use id::{DesktopId, Digest, FlavourName, IdError, Instance, Tag, TenantName, UserName};
pub use net::{
    Destination, ExtraAddresses, MulticastGroup, NameServers, Neighbours, NetPolicy, NetWordError, Service, Transport,
};
pub use rest::{RestMode, RestPolicy};
pub use spec::{
    Calls, CallsError, DesktopSpec, DesktopState, Device, DeviceError, DisplayKind, Geometry, GeometryError, Limits,
    LinkSpeed, RootPolicy, StartStep, Virtualizer,
};
pub use support::{Missing, Support};
pub use unit::{Bytes, MilliCpu, UidRange, UnitError};
