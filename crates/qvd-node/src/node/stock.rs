//! Keeps clones of templates ready, while there is memory for them.

use std::{
    io,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use qvd_core::{Bytes, Digest, FlavourName};

use super::{Inner, lock};
use crate::HostError;

/// How often it is looked whether all clones that stand ready are still wanted.
const LOOKS_EVERY: Duration = Duration::from_secs(5);

/// What a clone takes that has done nothing yet: QEMU itself, and a little beside.
/// Source: docs/vms.md, 30 to 43 MiB with what it takes to answer.
const CLONE: Bytes = Bytes::mib(48);

/// Replaces clones that were taken until there are to be none.
pub(super) fn keep(inner: &Arc<Inner>) -> io::Result<JoinHandle<()>> {
    let (born, inner) = (Arc::clone(&inner.parts.machines.born), Arc::downgrade(inner));
    thread::Builder::new().name("qvd-stock".to_owned()).spawn(move || {
        while born.wait(LOOKS_EVERY)
            && let Some(inner) = inner.upgrade()
        {
            inner.tend_stock();
        }
    })
}

impl Inner {
    /// Lets go of clones that are not wanted or that memory is too short for, and makes
    /// those that are missing.
    fn tend_stock(&self) {
        let _one = lock(&self.stock);
        let born = &self.parts.machines.born;
        let mut gone = born.tidy(|flavour, image| self.is_followed(flavour, image));
        if self.governor.is_short() {
            gone.extend(born.take_all());
        }
        for ready in gone {
            self.parts.discard_or_log(ready);
        }
        while self.governor.has_room_for(CLONE)
            && let Some((kind, template)) = born.lacking()
        {
            match self.parts.make_ready(&kind, &template) {
                Ok(ready) => {
                    if let Some(ready) = born.add(&kind, &template, ready) {
                        self.parts.discard_or_log(ready);
                    }
                }
                Err(error) => {
                    tracing::info!(tenant = %kind.tenant, image = %kind.image, error, "no clone stands ready");
                    born.retry_later(&kind);
                }
            }
            self.note_stock();
        }
        self.note_stock();
    }

    /// Ends all clones that stand ready, for the memory that they have; how many.
    pub(super) fn release_stock(&self) -> usize {
        let all = self.parts.machines.born.take_all();
        let count = all.len();
        for ready in all {
            self.parts.discard_or_log(ready);
        }
        self.note_stock();
        count
    }

    /// Ends all clones that stand ready, and makes no more.
    pub(super) fn close_stock(&self) -> Result<(), HostError> {
        self.parts.machines.born.close();
        // Whoever makes one sees that when it is made.
        let _one = lock(&self.stock);
        let all = self.parts.machines.born.take_all();
        // All of them, whatever becomes of each.
        let ended: Vec<_> = all.into_iter().map(|ready| self.parts.discard(ready)).collect();
        ended.into_iter().collect()
    }

    fn note_stock(&self) {
        self.governor.note_stock(self.parts.machines.born.report());
    }

    /// Whether a tag leads to the image; what cannot be read counts as yes.
    fn is_followed(&self, flavour: &FlavourName, image: Digest) -> bool {
        let tags = self.parts.store.repository().tags(flavour);
        tags.map_or(true, |tags| tags.values().any(|commit| commit.digest() == image))
    }
}
