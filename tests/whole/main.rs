//! The whole, as its users meet it: the real command, a real image, real
//! clients. Each test runs in a network namespace of its own, on the one store
//! that `make test` prepares, and leaves nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, missing_docs)]

mod bad_input;
mod bisect;
mod build;
mod crash;
mod exec;
mod harness;
mod journey;
mod machine;
mod machine_crash;
mod memory;
mod nx;
mod recipes;
mod rollout;
