//! Virtual machines, with privileges and a kernel of the test bed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, unreachable_pub)]

mod bed;
mod boots;
mod guest;
mod kvm;
mod lifecycle;
mod plug;
