//! Every reader of something untrusted, as a function of bytes.
//!
//! A [`Target`] must neither panic nor hang, whatever the bytes are, and what it
//! promises of inputs that it takes is asserted in it. Two things run them:
//!
//! - `tests/short.rs`, on any compiler: each seed of `fuzz/corpus`, then
//!   [`mutated`] ones, the same at each run;
//! - the crate in `fuzz`, with libFuzzer, for as long as somebody wants.
#![forbid(unsafe_code)]
// This crate is the tests' own: it reports by panicking, as asserts do.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, clippy::missing_panics_doc)]

mod exchange;
mod hosts;
mod images;
mod mutate;
mod parts;
mod repository;
mod seeds;
mod store;
mod world;

pub use mutate::mutated;
pub use seeds::seeds;
pub use world::World;

/// Something that reads untrusted bytes.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, and that of its corpus.
    pub name: &'static str,
    /// Reads the bytes and says whether it took them for what it expects.
    pub run: fn(&World, &[u8]) -> bool,
    /// Inputs of a short run. Some write files, others are done in no time.
    pub inputs: u32,
}

const fn target(name: &'static str, run: fn(&World, &[u8]) -> bool, inputs: u32) -> Target {
    Target { name, run, inputs }
}

/// All of them.
pub const TARGETS: [Target; 22] = [
    target("archive", images::archive, 900),
    target("blocks", repository::blocks, 300),
    target("commit", repository::commit, 6000),
    target("frames", hosts::frames, 12000),
    target("guest", hosts::guest, 3000),
    target("keys", repository::keys, 4500),
    target("log", hosts::log, 12000),
    target("names", repository::names, 12000),
    target("oci", images::oci, 900),
    target("packages", repository::packages, 6000),
    target("pull", exchange::pull, 300),
    target("qcow2", images::qcow2, 900),
    target("qmp", hosts::qmp, 3000),
    target("question", exchange::question, 1800),
    target("receive", exchange::receive, 300),
    target("recipe", images::recipe, 4500),
    target("rpm", repository::rpm, 6000),
    target("signature", repository::signature, 600),
    target("store", store::store, 150),
    target("tags", repository::tags, 450),
    target("told", images::told, 240),
    target("tree", repository::tree, 2400),
];

/// The target of this name.
///
/// # Panics
/// There is none.
#[must_use]
pub fn named(name: &str) -> Target {
    *TARGETS.iter().find(|target| target.name == name).unwrap_or_else(|| panic!("there is no target `{name}`"))
}
