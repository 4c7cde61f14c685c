//! Processes in namespaces of their own: `clone3`, and a plan that the child
//! executes with raw system calls.
//!
//! After a clone of one thread of a threaded process, the child may call only
//! what is async-signal-safe: another thread may have held the allocator's
//! lock. So the parent compiles everything beforehand into a [`Plan`], and the
//! child merely walks it.
//!
//! The child is a copy-on-write clone and not `CLONE_VM`: it has to act at the
//! same time as its parent, and processes that share memory share their fate
//! with the OOM killer and their "dumpable" flag with `setuid`. The price is
//! the parent's page tables. It is not small: `benches/start.rs` of `qvd-virt`
//! saw 1 ms more with 16 MiB of touched memory and 9 ms more with 64 MiB, so
//! whoever starts containers should be a small process.

mod child;
mod landlock;
mod memfd;
mod memory;
mod pidfd;
mod plan;
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
