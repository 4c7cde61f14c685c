//! Containers as their users and their inmates see them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, unreachable_pub)]

mod attacks;
mod bed;
mod browser;
mod calls;
mod confinement;
mod conformance;
mod crash;
mod devices;
mod faults;
mod lifecycle;
mod limits;
mod many;
mod parent;
mod races;
mod system;
mod v2;
