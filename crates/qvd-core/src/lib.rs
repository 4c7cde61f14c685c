//! Vocabulary of QVD: ids, units, states, specifications, probe answers.
//!
//! No I/O happens here. What one layer hands to another is a type of this
//! crate or a file descriptor, so that `qvd-storage`, `qvd-virt` and `qvd-net`
//! need not know each other.
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
