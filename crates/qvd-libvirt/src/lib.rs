//! Virtual machines of QVD as domains of libvirt, for sites that manage their
//! hosts with it.
//!
//! `Libvirt::start` takes the same specification as `qvd_virt::vm::Qemu`, and
//! what comes of it is driven in the same way. libvirt is told by name what it
//! opens, so every disk needs one; networks are ports of ours (taps) and none of
//! libvirt's. What it cannot do is refused by name: templates, and a base that is
//! memory.
//!
//! Without the feature `libvirt` there is [`domain_xml`] alone, and no library
//! is linked.
#![cfg_attr(not(feature = "libvirt"), forbid(unsafe_code))]
#![deny(unsafe_code)]

mod error;
#[cfg(feature = "libvirt")]
mod events;
mod files;
#[cfg(feature = "libvirt")]
mod hypervisor;
#[cfg(feature = "libvirt")]
mod machine;
mod node;
mod xml;

pub use error::Error;
pub use files::Files;
#[cfg(feature = "libvirt")]
pub use hypervisor::Libvirt;
#[cfg(feature = "libvirt")]
pub use machine::{DomainRecord, LibvirtVm};
pub use xml::{Kind, domain_xml};
