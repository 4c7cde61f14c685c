//! The database of RPM as a file of Berkeley DB: a hash of headers.
//!
//! Source: Berkeley DB 5.3, `src/dbinc/db_page.h`; RPM, `lib/backend/bdb_ro.c`. Which
//! bucket a header is in does not matter here, so the pages are read in their order.

use super::{BLOB_MAX, Found};

/// Where a file says that it is a hash, and what it says then.
const MAGIC_AT: usize = 12;
const MAGIC: u32 = 0x0006_1561;
/// Bytes before what is on a page.
const PAGE_HEADER: usize = 26;
/// Kinds of pages: with pairs of keys and values, and with what goes on.
const PAIRS: [u8; 2] = [2, 13];
const OVERFLOW: u8 = 7;
/// Kinds of items: in their place, and elsewhere.
const HERE: u8 = 1;
const ELSEWHERE: u8 = 3;

/// A file in the order of digits of the host that wrote it.
struct Hash<'a> {
    bytes: &'a [u8],
    page: usize,
    big: bool,
}

/// Gives each header.
pub(super) fn headers(bytes: &[u8], found: &mut Found<'_>) -> Option<()> {
    let big = |big| Hash { bytes, page: 0, big };
    let mut hash = [big(false), big(true)].into_iter().find(|h| h.long(bytes, MAGIC_AT) == Some(MAGIC as usize))?;
    // Versions of the last twenty-five years.
    let version_known = (8..=10).contains(&hash.long(bytes, 16)?);
    hash.page = hash.long(bytes, 20).filter(|page| page.is_power_of_two() && (512..=65_536).contains(page))?;
    let last = hash.long(bytes, 32).filter(|_| version_known)?;
    // Each page goes on one other: a file that says more has loops.
    let mut left = bytes.len() / hash.page;
    for number in 1..=last {
        let page = hash.page(number)?;
        if !page.get(25).is_some_and(|kind| PAIRS.contains(kind)) {
            continue;
        }
        let mut end = hash.page;
        for item in 0..hash.short(page, 20)? {
            let start = hash.short(page, PAGE_HEADER + 2 * item)?;
            let item_is_value = item % 2 == 1;
            let bytes = page.get(start..end)?;
            end = start;
            match bytes.split_first()? {
                _ if !item_is_value => {}
                (&HERE, value) => found(value),
                (&ELSEWHERE, _) => found(&hash.elsewhere(bytes, &mut left)?),
                _ => return None,
            }
        }
    }
    Some(())
}

impl<'a> Hash<'a> {
    fn page(&self, number: usize) -> Option<&'a [u8]> {
        let at = number.checked_mul(self.page)?;
        self.bytes.get(at..at.checked_add(self.page)?)
    }

    fn elsewhere(&self, item: &[u8], left: &mut usize) -> Option<Vec<u8>> {
        let (mut number, len) = (self.long(item, 4)?, self.long(item, 8)?);
        if len as u64 > BLOB_MAX {
            return None;
        }
        let mut value = Vec::new();
        while value.len() < len {
            *left = left.checked_sub(1)?;
            let page = self.page(number).filter(|page| page.get(25) == Some(&OVERFLOW))?;
            let part = self.short(page, 22)?.min(len - value.len());
            value.extend(page.get(PAGE_HEADER..PAGE_HEADER + part)?);
            number = self.long(page, 16)?;
        }
        Some(value)
    }

    fn short(&self, bytes: &[u8], at: usize) -> Option<usize> {
        let digits = bytes.get(at..at.checked_add(2)?)?.try_into().ok()?;
        Some(usize::from(if self.big { u16::from_be_bytes(digits) } else { u16::from_le_bytes(digits) }))
    }

    fn long(&self, bytes: &[u8], at: usize) -> Option<usize> {
        let digits = bytes.get(at..at.checked_add(4)?)?.try_into().ok()?;
        usize::try_from(if self.big { u32::from_be_bytes(digits) } else { u32::from_le_bytes(digits) }).ok()
    }
}
