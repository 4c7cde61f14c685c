//! The memory governor's way to the desktops of a node.

use std::{
    io,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Instant,
};

use qvd_core::{DesktopId, DesktopSpec, Virtualizer};

use super::{Inner, State, lock};
use crate::{
    HostError, HostErrorKind,
    governor::{Desktops, Reached},
};

/// Shares out memory until the governor is told to stop, or the node is gone.
pub(super) fn govern(inner: &Arc<Inner>) -> io::Result<JoinHandle<()>> {
    let (governor, inner) = (Arc::clone(&inner.governor), Arc::downgrade(inner));
    thread::Builder::new().name("qvd-governor".to_owned()).spawn(move || {
        while let Some(inner) = inner.upgrade() {
            let began = Instant::now();
            governor.go_round(&*inner);
            drop(inner);
            if !governor.wait(began.elapsed()) {
                return;
            }
        }
    })
}

impl Inner {
    /// Whether there is memory for one more desktop; others give some back now
    /// if that is what it takes.
    pub(super) fn admit(&self, spec: &DesktopSpec) -> Result<(), HostError> {
        for id in self.governor.started() {
            self.governor.look(self, id);
        }
        let refused = |why| HostError::because(HostErrorKind::Busy, format!("cannot start desktop {}", spec.id), why);
        let mut admitted = self.governor.admit(spec);
        // Machines that stand ready for nobody come last.
        if !matches!(&admitted, Ok(admitted) if !admitted.needs_room) && self.release_stock() > 0 {
            admitted = self.governor.admit(spec);
        }
        if admitted.map_err(refused)?.needs_room {
            self.governor.go_round_unless_busy(self);
        }
        Ok(())
    }

    /// Whether a desktop that starts offers its memory for merging.
    pub(super) fn shares(&self, spec: &DesktopSpec) -> bool {
        spec.virtualizer == Virtualizer::Container
            && self.parts.runtime.can_merge()
            && self.governor.offers_memory(spec.id, &spec.tenant)
    }
}

impl Desktops for Inner {
    fn all(&self) -> Vec<DesktopId> {
        lock(&self.slots).keys().copied().collect()
    }

    fn release_stock(&self) {
        let ended = Self::release_stock(self);
        tracing::info!(ended, "memory is short: machines that stood ready are ended");
    }

    fn with(&self, id: DesktopId, work: &mut dyn FnMut(Reached<'_>)) {
        let Some(slot) = lock(&self.slots).get(&id).cloned() else { return };
        let Ok(mut live) = slot.live.try_lock() else { return };
        let (state, attached) = {
            let face = lock(&slot.face);
            (face.state, face.is_attached())
        };
        let resting = lock(&slot.rest).is_resting();
        if let Some(desktop) = live.as_mut().filter(|_| state == State::Running) {
            work(Reached { desktop, attached, resting });
        }
    }
}
