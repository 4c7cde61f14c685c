//! What a machine does with its memory, and what it may be asked for.

use std::time::Duration;

use qvd_core::Bytes;
use serde_json::{Value, json};

use super::{
    Vm,
    command::{QomGet, QomSet},
};
use crate::Error;

const BALLOON: &str = "/machine/peripheral/balloon0";
const RAM: &str = "/objects/ram0";

/// What a guest's kernel says of its memory. A guest may lie: it is a wish, not
/// a fact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestUse {
    /// All that its kernel manages.
    pub total: Bytes,
    /// What programs can have without anything being written out.
    pub available: Bytes,
}

impl GuestUse {
    /// What it works with, caches that it could do without not counted.
    #[must_use]
    pub const fn used(&self) -> Bytes {
        Bytes::new(self.total.get().saturating_sub(self.available.get()))
    }
}

impl Vm {
    /// Has the guest's balloon driver say every `every`, in whole seconds, what
    /// [`Vm::guest_use`] tells.
    ///
    /// # Errors
    /// It has no balloon, or QEMU is gone.
    pub fn report_use(&mut self, every: Duration) -> Result<(), Error> {
        let value = json!(every.as_secs().max(1));
        self.call(&QomSet { path: BALLOON, property: "guest-stats-polling-interval", value }).map(drop)
    }

    /// What the guest said last of its memory. `None`: nothing yet, or nothing
    /// that can be so.
    ///
    /// # Errors
    /// It has no balloon, [`Vm::report_use`] was not called, or QEMU is gone.
    pub fn guest_use(&mut self) -> Result<Option<GuestUse>, Error> {
        let said = self.call(&QomGet { path: BALLOON, property: "guest-stats" })?;
        Ok(guest_use(&said))
    }

    /// Allows the kernel to merge the guest's pages with equal ones of others
    /// that are allowed to, or takes all of them apart again. A guest can tell by the
    /// time of a write that another has the same page: allow it within one
    /// tenant only.
    ///
    /// # Errors
    /// QEMU or its kernel cannot.
    pub fn allow_merging(&mut self, allowed: bool) -> Result<(), Error> {
        self.call(&QomSet { path: RAM, property: "merge", value: json!(allowed) }).map(drop)
    }

    /// Whether [`Vm::allow_merging`] holds; also after an adoption.
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn may_merge(&mut self) -> Result<bool, Error> {
        Ok(self.call(&QomGet { path: RAM, property: "merge" })?.as_bool().unwrap_or(false))
    }
}

/// Reads what the driver said; the guest decides what is in it.
fn guest_use(said: &Value) -> Option<GuestUse> {
    // Before the first report the time is 0 and every number is 2^64 - 1.
    let about = said.get("last-update")?.as_u64().filter(|&time| time > 0)?;
    let stats = said.get("stats").filter(|_| about > 0)?;
    let number = |name: &str| stats.get(name)?.as_u64().filter(|&bytes| bytes < 1 << 60);
    let (total, available) = (number("stat-total-memory")?, number("stat-available-memory")?);
    (available <= total).then_some(GuestUse { total: Bytes::new(total), available: Bytes::new(available) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_so_is_taken_from_a_guest() {
        let said = |time: u64, total: u64, available: u64| json!({ "last-update": time, "stats": { "stat-total-memory": total, "stat-available-memory": available } });
        let seen = guest_use(&said(9, 100, 30)).unwrap();
        assert_eq!(seen.used(), Bytes::new(70));
        for odd in [said(0, 100, 30), said(9, 30, 100), said(9, u64::MAX, 3), json!({}), json!([1])] {
            assert_eq!(guest_use(&odd), None, "{odd}");
        }
    }
}
