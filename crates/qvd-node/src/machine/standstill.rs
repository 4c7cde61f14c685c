//! A machine that stands still because a disk of its cannot grow is let go on when
//! there is room again.

use std::time::{Duration, Instant};

use qvd_core::Bytes;
use qvd_virt::vm::{Vm, VmState};

use super::Failure;

/// As much more room is worth a try: some clusters of a disk.
const MORE: Bytes = Bytes::mib(1);

/// How often it is tried where room cannot be seen, as on a volume that others fill too.
const TRIES_EVERY: Duration = Duration::from_secs(60);

/// A machine that finds no room says so within milliseconds after it was let go on.
const GOES_ON_WITHIN: Duration = Duration::from_secs(1);

/// Since when a machine stands still, and what was tried.
#[derive(Debug)]
pub(super) struct Standstill {
    since: Instant,
    tried: Instant,
    /// What was free then.
    room: Option<Bytes>,
}

impl Standstill {
    /// Looks whether a machine stands still for want of room, and lets it go on if there
    /// seems to be some. Costs one look at its control socket while it runs.
    pub(super) fn tend(this: &mut Option<Self>, vm: &mut Vm) -> Result<(), Failure> {
        let now = Instant::now();
        match (vm.catch_up()?, &mut *this) {
            (VmState::Full, None) => {
                let room = vm.room()?;
                tracing::warn!(desktop = %vm.id(), ?room, "the host has no room for its disk: it stands still");
                *this = Some(Self { since: now, tried: now, room });
            }
            (VmState::Full, Some(there)) => {
                let room = vm.room()?;
                if there.is_due(room) {
                    (there.tried, there.room) = (now, room);
                    vm.resume()?;
                }
                // Somebody may have filled what was free.
                there.room = there.room.min(room);
            }
            (VmState::Running, Some(there)) if there.tried.elapsed() < GOES_ON_WITHIN => {}
            (_, Some(there)) => {
                let stood_s = there.since.elapsed().as_secs();
                tracing::info!(desktop = %vm.id(), stood_s, "there is room for its disk: it goes on");
                *this = None;
            }
            (_, None) => {}
        }
        Ok(())
    }

    fn is_due(&self, room: Option<Bytes>) -> bool {
        let more = room.zip(self.room).is_some_and(|(now, then)| now.get() >= then.get().saturating_add(MORE.get()));
        more || self.tried.elapsed() >= TRIES_EVERY
    }
}
