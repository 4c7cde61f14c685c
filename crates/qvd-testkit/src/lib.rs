//! Privileged gate, leak census and strict fakes of QVD's tests.
//!
//! A test that needs root, namespaces or a program runs inside [`privileged`],
//! and takes a [`Census`] before and after what it does.
#![forbid(unsafe_code)]
// This crate is the tests' own: it reports by panicking, as asserts do.
#![allow(clippy::panic, clippy::print_stderr)]

mod bed;
mod census;
pub mod chart;
mod need;
mod postgres;
mod read;
mod tree;

pub use bed::{Bed, Ran, bed_directory, debian_disk, in_bed};
pub use census::{Census, Difference, Kind, Object, Scope};
pub use need::{Lack, Need, privileged};
pub use postgres::Postgres;
pub use tree::{copy_program, copy_program_as};
