//! Virtual desktops for Linux: images, confined containers, network ports and
//! displays, as a library.
//!
//! Every layer is a crate of its own, re-exported here; take the facade, or
//! only the layer you need:
//!
//! | Module | What it gives |
//! |---|---|
//! | [`core`] | ids, units, specifications, probe answers; no I/O |
//! | [`storage`] | images from recipes, writable roots on them, homes |
//! | [`virt`] | containers on Linux namespaces, virtual machines by QEMU |
//! | [`guest`] | the conversation with the init inside a desktop |
//! | [`net`] | bridges, ports, addresses, confinement |
//! | [`node`] | the three composed into desktops that outlive their process |
//! | [`farm`] | users, flavours, desktops and sign-in, in a database |
//! | [`gateway`] | TLS, QVD wire protocol, browser display, REST API, portal |
//!
//! A desktop in one call once a node is open:
//!
//! ```no_run
//! use qvd::core::{DesktopSpec, Instance};
//! use qvd::node::{Host, Node, NodeConfig};
//!
//! # fn example(desktop: DesktopSpec) -> Result<(), Box<dyn std::error::Error>> {
//! let config = NodeConfig::new(
//!     "/var/lib/qvd".as_ref(),
//!     "/run/qvd".as_ref(),
//!     "/usr/lib/qvd/qvd-init".into(),
//!     Instance::new(1),
//! );
//! let node = Node::open(config)?;
//! node.ensure_running(&desktop, &mut |step| println!("{}", step.text()))?;
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

pub use qvd_core as core;
pub use qvd_farm as farm;
pub use qvd_gateway as gateway;
pub use qvd_guest as guest;
pub use qvd_net as net;
pub use qvd_node as node;
pub use qvd_storage as storage;
pub use qvd_virt as virt;
