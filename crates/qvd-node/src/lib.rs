//! One host: storage, virtualizers and network composed into desktops.
#![forbid(unsafe_code)]

mod config;
mod desktop;
#[cfg(feature = "fake")]
pub mod fake;
mod forks;
mod gate;
mod governor;
mod guest;
mod host;
mod limits;
mod machine;
mod net_watch;
mod network;
mod node;
mod probe;
mod ranges;
mod record;
mod rest;
mod start;
mod supervisor;
mod swap;
mod version;

pub use config::{NodeConfig, VmConfig};
pub use governor::{DesktopMemory, MemoryConfig, MemoryReport, StockReport};
pub use host::{
    Attachment, AttachmentEnd, DesktopStatus, EndReason, ExecControl, ExecSession, ExecStdio, Host, HostError,
    HostErrorKind, ImageSummary, Timings,
};
pub use limits::raise_limits;
pub use network::Tenants;
pub use node::Node;
pub use probe::{Probe, probe, probe_vms, survey, survey_disks};
pub use qvd_guest::{ExecRequest, Exit, Stats};
pub use qvd_net::{Counters, Decision, PortView};
pub use qvd_storage::{
    Survey,
    repository::{NewVersion, Version},
};
pub use qvd_virt::vm::AccelChoice;
pub use swap::Swap;
