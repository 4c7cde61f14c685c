//! Virtualizers: containers on Linux namespaces, and virtual machines by
//! QEMU; for those see [`vm`].
//!
//! [`Runtime`] makes containers in two phases. [`Runtime::prepare`] gives a
//! process in namespaces of its own that has set up everything but its
//! network; [`Prepared::netns`] is where a port goes; [`Prepared::start`] lets
//! it execute its program. No helper program, no daemon, and nothing in the
//! host's mount table.
//!
//! A container is confined by a user namespace with a range of ids for it
//! alone, a system call filter, a small bounding set of capabilities,
//! `no_new_privs`, masked and read-only parts of `/proc` and `/sys`, a minimal
//! `/dev` and cgroup limits. [`Container::enforced`] reads back from the
//! kernel what of that is really so.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let root_mount: std::os::fd::OwnedFd = std::fs::File::open("/")?.into();
//! use std::time::Duration;
//! use qvd_core::{DesktopId, Instance, UidRange};
//! use qvd_virt::{ContainerSpec, Program, Runtime};
//!
//! let runtime = Runtime::new(Instance::new(0x1a2b))?;
//! let program = Program {
//!     file: std::fs::File::open("/usr/lib/qvd/qvd-init")?.into(),
//!     argv: vec!["qvd-init".to_owned()],
//!     env: Vec::new(),
//! };
//! // A detached mount, for instance from `qvd_storage::Root::mount`.
//! let spec = ContainerSpec::new(DesktopId::new(7)?, root_mount, UidRange::of_slot(7)?, program);
//! let prepared = runtime.prepare(spec)?;
//! let netns = prepared.netns()?; // what `qvd_net::Network::attach` puts a port into
//! let mut container = prepared.start()?;
//! println!("{:?} ended: {:?}", container.pid(), container.wait(Duration::from_secs(60))?);
//! container.close()?;
//! # Ok(()) }
//! ```
#![forbid(unsafe_code)]

// Tests in here share the bed of those in `tests`, which name the crate.
#[cfg(test)]
extern crate self as qvd_virt;

mod cgroup;
#[cfg(feature = "conformance")]
pub mod conformance;
mod container;
mod devices;
mod enforced;
mod error;
mod fuse;
mod layout;
mod machine;
mod measures;
pub mod memory;
mod probe;
mod runtime;
mod seccomp;
mod sound;
mod spec;
pub mod vm;

pub use cgroup::{Freezer, Pressure, Waiting};
pub use container::{Container, ContainerRecord, Prepared};
pub use enforced::{Enforced, Protection};
pub use error::{Error, io_error};
pub use machine::{Failure, Machine};
pub use probe::probe;
pub use qvd_sys::process::{Exit, seal};
pub use runtime::Runtime;
pub use spec::{ContainerMount, ContainerSpec, FuseMount, InheritedFd, Merging, Profile, Program};
