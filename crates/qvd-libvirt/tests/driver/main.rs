//! Domains of a real libvirt.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, unreachable_pub)]

mod hidden;
mod qemu;
mod test_driver;
