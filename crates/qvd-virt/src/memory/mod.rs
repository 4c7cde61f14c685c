//! The memory governor's judgement: who gets how much of a host's memory, and
//! whether one more desktop fits. Pure functions of what was measured, so that
//! their promises are tested without a machine. [`Ksm`] and [`HostState::read`]
//! are all that touches one.
//!
//! [`decide`] shares out a *pool*: what the guests have now, and what the host
//! can spare beside. A balloon moves memory between these two and leaves
//! their sum as it is, so the goals that follow from the pool stand still while
//! the balloons move towards them. That is why nothing swings.

mod admission;
mod decision;
mod host;
mod ksm;
mod profit;

pub use admission::{Lack, Request, Shortfall, admit};
pub use decision::decide;
pub use ksm::{KSM_DIR, Ksm, MergeCost};
pub use profit::MergeProfit;
use std::path::Path;

use qvd_core::{Bytes, DesktopId, Missing, Support};

/// Whose desktops may share pages with one another. That a page is shared can
/// be told by the time a write to it takes, so it stays within one tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tenant(pub u32);

/// What a host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostState {
    /// All of its memory.
    pub total: Bytes,
    /// What can be had without swapping: `MemAvailable`.
    pub available: Bytes,
    /// Free swap, compressed or not: what there is to page out to.
    pub swap: Bytes,
    /// Most that the maximums of all may come to, if that is limited. With no
    /// more than memory and swap nobody can be let down; but most desktops never
    /// need what they may have.
    pub promises: Option<Bytes>,
    /// Hundredths of the last ten seconds in which something waited for
    /// memory: `some avg10` of `/proc/pressure/memory`.
    pub pressure_percent: u8,
    /// What the kernel's merging of equal pages does, if it runs.
    pub merging: Option<Merging>,
    /// The tenant whose guests are allowed to be merged with one another.
    pub merging_tenant: Option<Tenant>,
}

/// What merging of equal pages has come to since it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Merging {
    /// How often all pages were looked at. One round only remembers, the second
    /// merges.
    pub full_scans: u64,
    /// What is saved less what the kernel's notes take, in bytes.
    pub profit_bytes: i64,
}

/// What goes on in a desktop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Activity {
    /// Nobody is attached and its programs do nothing.
    Idle,
    /// Nobody is attached; its programs work.
    Working,
    /// Somebody sits in front of it.
    Attended,
}

/// What a desktop has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guest {
    /// Which one.
    pub id: DesktopId,
    /// Whose it is.
    pub tenant: Tenant,
    /// What it is never brought below.
    pub minimum: Bytes,
    /// What it was promised at most; not less than the minimum.
    pub maximum: Bytes,
    /// What it may use at the moment. Without a balloon, what it holds.
    pub current: Bytes,
    /// What it works with, caches that it could do without not counted.
    pub used: Bytes,
    /// What goes on in it: in which order needs are met when there is not
    /// enough.
    pub activity: Activity,
    /// Whether a balloon can move what it may use. A container, or a machine
    /// that stands still, has none: it can only be paged out.
    pub balloon: bool,
    /// Whether the kernel can be let merge its pages.
    pub mergeable: bool,
}

/// What is to be done now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// For each guest, in the order given.
    pub guests: Vec<Share>,
    /// What of the pool no guest has once all targets are reached. Below zero,
    /// in bytes, when the guests have more than there is.
    pub left: i128,
    /// How equal pages are to be merged.
    pub merge: Merge,
}

/// One guest's part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Which one.
    pub id: DesktopId,
    /// Where it is going while nothing else changes.
    pub goal: Bytes,
    /// What its balloon is to leave it now: a step on that way.
    pub target: Bytes,
    /// What is to be paged out of it at once, because it is idle and the host
    /// is short.
    pub reclaim: Bytes,
}

/// What the kernel's merging of equal pages is to be set to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Merge {
    /// Whether it runs.
    pub run: bool,
    /// Pages looked at in each round of [`Merge::SLEEP_MS`].
    pub pages_to_scan: u32,
    /// The one tenant whose guests may be merged with one another.
    pub tenant: Option<Tenant>,
}

impl Merge {
    /// Pause between rounds: the kernel's own, `sleep_millisecs`.
    pub const SLEEP_MS: u32 = 20;
}

/// What a host answers about its memory, below `/sys` and `/proc`: whether equal
/// pages can be merged by us, and whether it tells of pressure.
#[must_use]
pub fn probe() -> Vec<(&'static str, Support)> {
    let read = |path: &Path| std::fs::read_to_string(path);
    let merging = match read(&Path::new(KSM_DIR).join("run")) {
        Err(_) => Support::No(Missing::Kernel("merging of equal pages (CONFIG_KSM)".to_owned())),
        Ok(_) => Support::Yes,
    };
    let pressure = match read(Path::new("/proc/pressure/memory")) {
        Err(_) => Support::No(Missing::Kernel("pressure stall information (CONFIG_PSI, psi=1)".to_owned())),
        Ok(_) => Support::Yes,
    };
    vec![("merging of equal pages (KSM)", merging), ("memory pressure (PSI)", pressure)]
}

/// What the host keeps for itself and for guests that suddenly grow: a
/// twentieth, and up to three more of them as pressure rises.
fn reserve(host: &HostState) -> u64 {
    let twentieth = host.total.get() / 20;
    twentieth + twentieth * 3 / 100 * u64::from(host.pressure_percent.min(100))
}

/// What the host can give beyond its reserve; below zero when it is short.
fn spare(host: &HostState) -> i128 {
    i128::from(host.available.get()) - i128::from(reserve(host))
}

#[cfg(test)]
mod tests;
