//! Whether one more desktop fits, and if not, what would make it fit.

use qvd_core::{Bytes, DesktopId};

use super::{Activity, Guest, HostState, reserve, spare};

/// A desktop that is to be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What it needs to come up, and is never brought below.
    pub minimum: Bytes,
    /// What it is promised at most.
    pub maximum: Bytes,
}

/// What is missing, and what would do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lack {
    /// What is asked for.
    pub needs: Bytes,
    /// What there is of it.
    pub free: Bytes,
    /// How much less that is than needed; more than the difference where others
    /// have been let down already.
    pub lack: Bytes,
    /// The smallest desktop whose end would be enough, an idle one before one
    /// that somebody sits in front of.
    pub stop: Option<DesktopId>,
}

/// Why a desktop does not fit. Its text names the constraint, both numbers, and
/// the smallest change that would do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Shortfall {
    /// The memory is there no more: not even with everybody at their minimum.
    #[error("needs {} MiB, {} free after reclaim; smallest change: {}", up(.0.needs), down(.0.free), free_some(.0))]
    Free(Lack),
    /// Not all could be kept at their minimum.
    #[error("needs {} MiB, {} not owed to others; smallest change: {}", up(.0.needs), down(.0.free), free_some(.0))]
    Minimums(Lack),
    /// More would be promised than the host may promise.
    #[error("is promised {} MiB, {} not promised to others; smallest change: {}", up(.0.needs), down(.0.free), ask_less(.0))]
    Maximums(Lack),
}

impl Shortfall {
    /// What is missing, whatever it is.
    #[must_use]
    pub const fn lack(&self) -> &Lack {
        match self {
            Self::Free(lack) | Self::Minimums(lack) | Self::Maximums(lack) => lack,
        }
    }
}

/// Says whether `request` fits beside `guests`. Those that are starting are
/// among them, with what they have already.
///
/// # Errors
/// The first constraint that fails: memory that can be had now, the sum of
/// minimums, the sum of maximums.
pub fn admit(host: &HostState, guests: &[Guest], request: Request) -> Result<(), Shortfall> {
    let sum = |of: &dyn Fn(&Guest) -> i128| guests.iter().map(of).sum::<i128>();
    let paged_out = sum(&pages_out).min(i128::from(host.swap.get()));
    let free = spare(host) + sum(&gives_back) + paged_out;
    let ends = |guest: &Guest| {
        let without = if host.swap.get() == 0 { 0 } else { pages_out(guest) };
        i128::from(held(guest)) - gives_back(guest) - without
    };
    lacking(guests, request.minimum, free, ends).map_or(Ok(()), |lack| Err(Shortfall::Free(lack)))?;

    let minimum = |guest: &Guest| i128::from(guest.minimum.get());
    let unowed = i128::from(host.total.get()) - i128::from(reserve(host)) - sum(&minimum);
    lacking(guests, request.minimum, unowed, minimum).map_or(Ok(()), |lack| Err(Shortfall::Minimums(lack)))?;

    let Some(promises) = host.promises else { return Ok(()) };
    let maximum = |guest: &Guest| i128::from(guest.maximum.get());
    let unpromised = i128::from(promises.get()) - sum(&maximum);
    lacking(guests, request.maximum, unpromised, maximum).map_or(Ok(()), |lack| Err(Shortfall::Maximums(lack)))
}

/// What a guest's balloon can give while the guest keeps its minimum. What any
/// guest is owed but has not taken yet is not free: less than nothing.
fn gives_back(guest: &Guest) -> i128 {
    let above = above(guest);
    if guest.balloon { above } else { above.min(0) }
}

/// What can be paged out of a guest without a balloon.
fn pages_out(guest: &Guest) -> i128 {
    if guest.activity == Activity::Idle && !guest.balloon { above(guest).max(0) } else { 0 }
}

fn above(guest: &Guest) -> i128 {
    i128::from(held(guest)) - i128::from(guest.minimum.get())
}

/// What it may use but does not is the host's already.
fn held(guest: &Guest) -> u64 {
    guest.used.get().min(guest.current.get())
}

/// What is missing, and whose end would do; `None` if it fits.
fn lacking(guests: &[Guest], needs: Bytes, free: i128, gives: impl Fn(&Guest) -> i128) -> Option<Lack> {
    let lack = i128::from(needs.get()) - free;
    if lack <= 0 {
        return None;
    }
    let enough = guests.iter().filter(|guest| gives(guest) >= lack);
    // Nobody who sits in front of a desktop loses it while an idle one will do.
    let stop = enough.min_by_key(|guest| (guest.activity, gives(guest))).map(|guest| guest.id);
    let bytes = |amount: i128| Bytes::new(u64::try_from(amount.max(0)).unwrap_or(u64::MAX));
    Some(Lack { needs, free: bytes(free), lack: bytes(lack), stop })
}

const fn up(bytes: Bytes) -> u64 {
    bytes.get().div_ceil(1 << 20)
}

const fn down(bytes: Bytes) -> u64 {
    bytes.get() >> 20
}

fn free_some(lack: &Lack) -> String {
    let mib = up(lack.lack);
    match lack.stop {
        Some(id) => format!("stop desktop {id}, or free {mib} MiB"),
        None => format!("free {mib} MiB, or add as much memory"),
    }
}

fn ask_less(lack: &Lack) -> String {
    let mib = up(lack.lack);
    match lack.stop {
        Some(id) => format!("stop desktop {id}, or ask for {mib} MiB less"),
        None => format!("ask for {mib} MiB less"),
    }
}
