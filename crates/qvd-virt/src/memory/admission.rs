//! Whether one more desktop fits, and if not, what would make it fit.

use qvd_core::{Bytes, DesktopId};

use super::{Guest, HostState, reserve, spare};

/// A desktop that is to be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What it needs to come up, and is never brought below.
    pub minimum: Bytes,
    /// What it is promised at most.
    pub maximum: Bytes,
}

/// Why a desktop does not fit. Its text names the constraint, both numbers, and
/// the smallest change that would do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Shortfall {
    /// The memory is there no more.
    #[error("needs {} MiB, {} free after reclaim; smallest change: {}", up(*.needs), down(*.free), change(*.needs, *.free, *.stop))]
    Free {
        /// What it needs to come up.
        needs: Bytes,
        /// What could be had, everybody at their minimum.
        free: Bytes,
        /// The smallest desktop whose end would be enough.
        stop: Option<DesktopId>,
    },
    /// Not all could be kept at their minimum.
    #[error("needs {} MiB, {} not owed to others; smallest change: {}", up(*.needs), down(*.free), change(*.needs, *.free, *.stop))]
    Minimums {
        /// What it is to be owed.
        needs: Bytes,
        /// What nobody is owed.
        free: Bytes,
        /// The smallest desktop whose end would be enough.
        stop: Option<DesktopId>,
    },
    /// More would be promised than memory and swap together hold.
    #[error("is promised {} MiB, {} not promised to others; smallest change: {}", up(*.needs), down(*.free), change(*.needs, *.free, *.stop))]
    Maximums {
        /// What it would be promised.
        needs: Bytes,
        /// What nobody is promised.
        free: Bytes,
        /// The smallest desktop whose end would be enough.
        stop: Option<DesktopId>,
    },
}

/// Says whether `request` fits beside `guests`.
///
/// # Errors
/// The first constraint that fails: memory that can be had now, the sum of
/// minimums, the sum of maximums.
pub fn admit(host: &HostState, guests: &[Guest], request: Request) -> Result<(), Shortfall> {
    let sum = |of: fn(&Guest) -> u64| guests.iter().map(|guest| i128::from(of(guest))).sum::<i128>();
    // Paging out is counted where a guest is idle; the balloon where it is not.
    // Both leave a guest its minimum, and neither gives the same byte twice.
    let free = spare(host) + sum(reclaimable);
    if let Some((needs, free, stop)) = lacking(guests, request.minimum, free, frees) {
        return Err(Shortfall::Free { needs, free, stop });
    }
    let own = i128::from(host.total.get()) - i128::from(reserve(host));
    let unowed = own - sum(|guest| guest.minimum.get());
    if let Some((needs, free, stop)) = lacking(guests, request.minimum, unowed, |guest| guest.minimum.get()) {
        return Err(Shortfall::Minimums { needs, free, stop });
    }
    let unpromised = own + i128::from(host.swap.get()) - sum(|guest| guest.maximum.get());
    if let Some((needs, free, stop)) = lacking(guests, request.maximum, unpromised, |guest| guest.maximum.get()) {
        return Err(Shortfall::Maximums { needs, free, stop });
    }
    Ok(())
}

/// What a guest holds above its minimum. What it may use but does not is the
/// host's already.
fn reclaimable(guest: &Guest) -> u64 {
    held(guest).saturating_sub(guest.minimum.get())
}

/// What its end gives beyond what reclaim would.
fn frees(guest: &Guest) -> u64 {
    held(guest).min(guest.minimum.get())
}

fn held(guest: &Guest) -> u64 {
    guest.used.get().min(guest.current.get())
}

/// What is needed, what there is, and whose end would do; `None` if it fits.
fn lacking(
    guests: &[Guest],
    needs: Bytes,
    free: i128,
    gives: impl Fn(&Guest) -> u64,
) -> Option<(Bytes, Bytes, Option<DesktopId>)> {
    let lack = i128::from(needs.get()) - free;
    if lack <= 0 {
        return None;
    }
    let enough = guests.iter().filter(|guest| i128::from(gives(guest)) >= lack);
    // Nobody who sits in front of a desktop loses it while an idle one will do.
    let stop = enough.min_by_key(|guest| (!guest.idle, gives(guest))).map(|guest| guest.id);
    Some((needs, Bytes::new(u64::try_from(free.max(0)).unwrap_or(u64::MAX)), stop))
}

fn up(bytes: Bytes) -> u64 {
    bytes.get().div_ceil(1 << 20)
}

fn down(bytes: Bytes) -> u64 {
    bytes.get() >> 20
}

fn change(needs: Bytes, free: Bytes, stop: Option<DesktopId>) -> String {
    let lack = up(Bytes::new(needs.get().saturating_sub(free.get())));
    match stop {
        Some(id) => format!("stop desktop {id}, or ask for {lack} MiB less"),
        None => format!("add {lack} MiB of memory, or ask for as much less"),
    }
}
