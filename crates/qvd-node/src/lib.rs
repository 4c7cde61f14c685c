//! One host: storage, virtualizers and network composed into desktops.
//!
//! A [`Node`] is a [`Host`]: it starts desktops, opens their displays, runs programs
//! in them and stops them. Desktops outlive the process: another [`Node::open`] on the same
//! directories adopts what runs and removes what nobody owns. All calls block, and may
//! come from any number of threads. [`probe`] tells what a host lacks.
//!
//! ```no_run
//! # fn example(desktop: qvd_core::DesktopSpec) -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//! use qvd_core::{DisplayKind, Geometry, Instance};
//! use qvd_node::{Host, Node, NodeConfig};
//!
//! let (root, run) = ("/var/lib/qvd".as_ref(), "/run/qvd".as_ref());
//! let node = Node::open(NodeConfig::new(root, run, "/usr/lib/qvd/qvd-init".into(), Instance::new(1)))?;
//! node.ensure_running(&desktop, &mut |step| println!("{}", step.text()))?;
//! let display = node.attach(desktop.id, DisplayKind::Rfb { geometry: Geometry::default() }, &mut |_| ())?;
//! // `display.stream()` speaks RFB until another client takes the desktop over.
//! node.stop(desktop.id, Duration::from_secs(5))?;
//! # Ok(()) }
//! ```
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
