//! A desktop's place in its node, and what others see of it.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use qvd_core::{DesktopId, Digest, StartStep};

use crate::{
    AttachmentEnd, HostError, HostErrorKind, Timings,
    desktop::Desktop,
    guest::Guest,
    rest::{Awake, Rest},
};

/// One desktop's place. `live` is held for as long as a start or a stop takes,
/// so that these wait for one another; `rest` while its processes are stopped
/// or resumed; `face` only for a moment. Taken in this order.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) live: Mutex<Option<Desktop>>,
    pub(super) rest: Mutex<Rest>,
    pub(super) face: Mutex<Face>,
}

/// What others may know of a desktop while somebody works on it.
#[derive(Debug, Default)]
pub(super) struct Face {
    pub(super) state: State,
    pub(super) timings: Option<Timings>,
    pub(super) ended: Option<String>,
    pub(super) guest: Option<Guest>,
    /// How long it may take until it gives a display.
    pub(super) attach_limit: Duration,
    pub(super) attachment: Option<AttachmentEnd>,
    /// The commit that it runs.
    pub(super) image: Option<Digest>,
    /// Whether it stands still because its host has no room for what it writes.
    pub(super) lacks_room: bool,
}

impl Slot {
    /// The desktop itself, for whoever looks at it. A start or a stop is not waited
    /// for; a measurement is, which takes a moment.
    pub(super) fn live(&self, id: DesktopId) -> Result<MutexGuard<'_, Option<Desktop>>, HostError> {
        let state = lock(&self.face).state;
        if matches!(state, State::Starting(_) | State::Stopping) {
            let what = format!("desktop {id} is starting or stopping");
            return Err(HostError::new(HostErrorKind::Busy, what));
        }
        Ok(lock(&self.live))
    }

    /// Lets the desktop go on if it stands still, and keeps it awake.
    pub(super) fn wake(&self, id: DesktopId) -> Result<Awake, HostError> {
        let woken = lock(&self.rest).wake();
        woken.map_err(|e| HostError::because(HostErrorKind::Failed, format!("cannot wake desktop {id}"), e))
    }
}

impl Face {
    pub(super) fn is_attached(&self) -> bool {
        self.attachment.as_ref().is_some_and(AttachmentEnd::is_open)
    }
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    #[default]
    Stopped,
    Starting(StartStep),
    Running,
    Stopping,
    Zombie,
}

/// A panic elsewhere has not broken what these locks protect: every change
/// under them is one assignment.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
