//! Processes in namespaces of their own: `clone3`, and a plan that the child
//! executes with raw system calls.
//!
//! After a clone of one thread of a threaded process, the child may call only
//! what is async-signal-safe: another thread may have held the allocator's
//! lock. So the parent compiles everything beforehand into a [`Plan`], and the
//! child merely walks it.
//!
//! A child in namespaces of its own shares its parent's memory until it executes its
//! program, by way of `CLONE_VM | CLONE_VFORK`; others have a copy. A copy costs the parent's
//! page tables: 2 ms with 16 MiB of touched memory, 8 ms with 64 MiB (`benches/start.rs`
//! of `qvd-virt`).

mod child;
mod landlock;
mod memfd;
mod memory;
mod pidfd;
mod plan;
mod shared;
mod spawn;
#[cfg(test)]
mod tests;
pub mod traced;

pub use landlock::LandlockRules;
pub use memfd::{memory_file, seal};
pub use memory::page_out;
pub use pidfd::{Exit, Process, boot_id, cpu_time, start_time};
pub use plan::{BpfInstruction, ExecArgs, Namespaces, Op, Plan, PlanFd};
pub use spawn::{Event, SpawnError, Spawned, spawn};
