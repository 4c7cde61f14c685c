//! Virtual machines, with privileges and a kernel of the test bed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, unreachable_pub)]

mod bed;
mod boots;
mod conformance;
mod debian;
mod full;
mod guest;
mod hostile;
mod kvm;
mod lifecycle;
mod plug;
mod template;
