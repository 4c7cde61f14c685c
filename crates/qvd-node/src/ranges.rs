//! Which ranges of the host's user ids are taken.

use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, PoisonError},
};

use qvd_core::UidRange;

use crate::{HostError, HostErrorKind};

/// The ranges of this host, by number; see [`UidRange::of_slot`].
#[derive(Debug)]
pub(crate) struct Ranges {
    taken: Mutex<BTreeSet<u32>>,
    count: u32,
}

impl Default for Ranges {
    fn default() -> Self {
        Self { taken: Mutex::default(), count: UidRange::COUNT }
    }
}

impl Ranges {
    fn taken(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one that nobody has.
    pub(crate) fn take(&self) -> Result<u32, HostError> {
        let mut taken = self.taken();
        let free = (0..self.count).find(|range| !taken.contains(range));
        let range = free.ok_or_else(|| {
            let what = format!("all {} ranges of user ids are taken; stop a desktop that runs", self.count);
            HostError::new(HostErrorKind::Busy, what)
        })?;
        taken.insert(range);
        Ok(range)
    }

    /// Takes this one; false if somebody has it.
    pub(crate) fn claim(&self, range: u32) -> bool {
        self.taken().insert(range)
    }

    /// Gives one back.
    pub(crate) fn free(&self, range: u32) {
        self.taken().remove(&range);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn when_all_are_taken_one_hears_so_until_one_is_free() {
        let ranges = Ranges { taken: Mutex::default(), count: 3 };
        assert!(ranges.claim(1) && !ranges.claim(1));
        assert_eq!((ranges.take().unwrap(), ranges.take().unwrap()), (0, 2));
        let error = ranges.take().unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::Busy);
        assert_eq!(error.to_string(), "all 3 ranges of user ids are taken; stop a desktop that runs");
        ranges.free(1);
        assert_eq!(ranges.take().unwrap(), 1);
        // The last one there is has ids that the kernel can map.
        let last = UidRange::of_slot(UidRange::COUNT - 1).unwrap();
        assert!(last.base().checked_add(UidRange::LEN).is_some());
        assert!(UidRange::of_slot(UidRange::COUNT).is_err());
    }
}
