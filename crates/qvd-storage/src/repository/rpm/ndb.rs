//! The database of RPM in its own format: slots, and where each header is.
//!
//! Source: RPM, `lib/backend/ndb/rpmpkg.c`. All numbers have their smallest digit first.

use super::{BLOB_MAX, Found};

pub(super) const MAGIC: &[u8] = b"RpmP";
const SLOT: &[u8] = b"Slot";
const BLOB: &[u8] = b"BlbS";
/// Bytes of a page of slots, of a slot, and of what places are counted in.
const PAGE: usize = 4096;
const UNIT: usize = 16;
/// Slots' places that the file's header takes.
const HEADER_SLOTS: usize = 2;

/// Gives each header.
pub(super) fn headers(bytes: &[u8], found: &mut Found<'_>) -> Option<()> {
    let version_0 = number(bytes, 4)? == 0;
    let slots = bytes.get(..number(bytes, 12)?.checked_mul(PAGE)?).filter(|_| version_0)?;
    // Headers do not lie over each other: a file that says so has more than it can hold.
    let mut left = bytes.len();
    for slot in slots.chunks_exact(UNIT).skip(HEADER_SLOTS) {
        let (index, at, units) = (number(slot, 4)?, number(slot, 8)?, number(slot, 12)?);
        if !slot.starts_with(SLOT) {
            return None;
        }
        if at == 0 {
            continue;
        }
        let len = units.checked_mul(UNIT)?;
        left = left.checked_sub(len)?;
        let at = at.checked_mul(UNIT)?;
        let blob = bytes.get(at..at.checked_add(len)?).filter(|blob| blob.starts_with(BLOB))?;
        let len = number(blob, 12).filter(|len| *len as u64 <= BLOB_MAX)?;
        if number(blob, 4)? != index {
            return None;
        }
        found(blob.get(UNIT..UNIT.checked_add(len)?)?);
    }
    Some(())
}

fn number(bytes: &[u8], at: usize) -> Option<usize> {
    let digits = bytes.get(at..at.checked_add(4)?)?;
    usize::try_from(u32::from_le_bytes(digits.try_into().ok()?)).ok()
}
