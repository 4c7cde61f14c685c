//! Who is answered, and how often.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use super::Guest;
use crate::Mac;

/// Most answers at once to one guest: a boot asks some ten times.
const BURST: u32 = 20;

/// A guest that has used up its burst gets one answer in this time.
const PACE: Duration = Duration::from_millis(200);

/// The guests of a bridge.
#[derive(Debug, Default)]
pub(super) struct Guests(HashMap<[u8; 6], Entry>);

#[derive(Debug)]
struct Entry {
    guest: Guest,
    left: u32,
    counted: Instant,
}

impl Guests {
    pub(super) fn insert(&mut self, guest: Guest, now: Instant) {
        self.0.insert(guest.mac.octets(), Entry { guest, left: BURST, counted: now });
    }

    pub(super) fn remove(&mut self, mac: Mac) {
        self.0.remove(&mac.octets());
    }

    /// The guest with this MAC, unless there is none or it asks too often.
    pub(super) fn admit(&mut self, mac: [u8; 6], now: Instant) -> Option<&Guest> {
        let entry = self.0.get_mut(&mac)?;
        let paces = now.saturating_duration_since(entry.counted).as_millis() / PACE.as_millis();
        if let Ok(paces) = u32::try_from(paces.min(u128::from(BURST)))
            && paces > 0
        {
            entry.left = (entry.left + paces).min(BURST);
            entry.counted = now;
        }
        entry.left = entry.left.checked_sub(1)?;
        Some(&entry.guest)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Guest> {
        self.0.values().map(|entry| &entry.guest)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::Ipv4Addr;

    use qvd_core::Instance;

    use super::*;

    #[test]
    fn a_guest_that_asks_too_often_waits() {
        let address = Ipv4Addr::new(10, 66, 0, 7);
        let guest = Guest::new(Mac::of(Instance::new(1), address), address);
        let (mac, start) = (guest.mac.octets(), Instant::now());
        let mut guests = Guests::default();
        guests.insert(guest, start);
        let answered = |guests: &mut Guests, at| (0..100).filter(|_| guests.admit(mac, at).is_some()).count();
        assert_eq!(answered(&mut guests, start), 20);
        assert_eq!(answered(&mut guests, start + PACE * 2), 2);
        assert_eq!(answered(&mut guests, start + PACE * 1000), 20);
        assert!(guests.admit([2; 6], start).is_none());
    }
}
