//! Images, writable roots and homes for desktops.
//!
//! A [`Store`] keeps what one host needs: images built from [`Recipe`]s, as
//! commits of a [`Repository`]; a writable [`Root`] per desktop on one of
//! them, made in constant time by a [`RootBackend`]; and a [`Home`] per user.
//! Roots and homes are handed out as detached mounts: descriptors that are in
//! no mount table.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use qvd_storage::{BuildOptions, Recipe, Store};
//!
//! let store = Store::open("/var/lib/qvd".as_ref())?;
//! let recipe = Recipe::parse(&std::fs::read_to_string("recipes/icewm.toml")?)?;
//! let image = store.build(&recipe, &BuildOptions::default(), &mut |line| println!("{line}"))?.image;
//! let root = store.root(&image, &"7".parse()?, qvd_core::RootPolicy::Volatile)?;
//! let mount = root.mount(None)?;
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod apt;
mod backend;
mod build;
#[cfg(feature = "conformance")]
pub mod conformance;
mod copytree;
mod disk;
mod error;
mod fsio;
mod glob;
mod guest_base;
mod guests;
mod home;
mod image;
mod lvm;
mod pin;
mod probe;
mod program;
mod quota;
mod recipe;
pub mod repository;
mod roots;
mod store;
mod survey;
mod trash;
#[cfg(test)]
mod tree;
mod treeedit;
mod xattr;

pub use backend::{
    Aufs, AufsBranch, AufsOptions, AufsPermission, Backends, BaseTree, Bind, Btrfs, Capabilities, Capability,
    Deviation, Factory, Fuse, Layer, Looped, Lvm, OverlayOptions, Overlayfs, Place, PlainCopy, Quota, Reflink, Root,
    RootBackend, RootId, RootIdError, RootOptions, Snapshots,
};
pub use build::BuildOptions;
pub use disk::{
    BaseDisk, Device, Disk, DiskBackend, DiskBackends, DiskCapabilities, DiskCapability, DiskDeviation, DiskFactory,
    DiskFormat, DiskFormatError, DiskId, DiskIdError, DiskOptions, DiskReport, DiskSurvey, LvmDisks, OnBase, Qcow2,
    RawCopy, RawReflink, SurveyedDisks, qcow2,
};
pub use error::{Error, RecipeError};
pub use guest_base::{is_guest_base, make_guest_base};
pub use guests::GuestBase;
pub use home::{Home, HomeId, HomeKind, HomeOptions};
pub use image::Image;
pub use qvd_core::ErrorKind;
pub use recipe::{Defaults, ImageConfig, Recipe, SessionSpec, UserConfig};
pub use repository::{Repository, TreeError};
pub use store::{Built, KeptRoot, Store};
pub use survey::{Historic, Recommendation, Survey, Surveyed, recommend};
