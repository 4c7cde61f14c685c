//! The database of RPM as a file of SQLite: a table of headers.
//!
//! Source: "Database File Format" of SQLite. A journal beside the file is not read:
//! RPM empties it.

use super::{BLOB_MAX, Found, be};

pub(super) const MAGIC: &[u8] = b"SQLite format 3\0";
/// Bytes before the first page's own.
const FILE_HEADER: usize = 100;
const INTERIOR: u8 = 5;
const LEAF: u8 = 13;

/// Gives each header.
pub(super) fn headers(bytes: &[u8], found: &mut Found<'_>) -> Option<()> {
    let file = Database::open(bytes)?;
    let mut root = None;
    file.rows(1, &mut |row| {
        if row.get(..3) == Some(&[Value::Bytes(b"table"), Value::Bytes(b"Packages"), Value::Bytes(b"Packages")])
            && let Some(Value::Number(page)) = row.get(3)
        {
            root = usize::try_from(*page).ok();
        }
    })?;
    file.rows(root?, &mut |row| {
        if let Some(Value::Bytes(header)) = row.get(1) {
            found(header);
        }
    })
}

/// A column of a row, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Other,
}

struct Database<'a> {
    bytes: &'a [u8],
    page: usize,
    usable: usize,
}

impl<'a> Database<'a> {
    fn open(bytes: &'a [u8]) -> Option<Self> {
        let page = match be(bytes.get(16..18)?) {
            1 => 65_536,
            size => usize::try_from(size).ok()?,
        };
        let usable = page.checked_sub(usize::from(*bytes.get(20)?))?;
        let sound = bytes.starts_with(MAGIC) && page.is_power_of_two() && page >= 512 && usable >= 480;
        sound.then_some(Self { bytes, page, usable })
    }

    fn page(&self, number: usize) -> Option<&'a [u8]> {
        let at = number.checked_sub(1)?.checked_mul(self.page)?;
        self.bytes.get(at..at.checked_add(self.page)?)
    }

    /// Gives every row of the table whose tree begins at a page.
    fn rows(&self, root: usize, take: &mut dyn FnMut(&[Value<'_>])) -> Option<()> {
        let mut todo = vec![root];
        // Each page is in one tree once: a file that says more has loops.
        let mut left = self.bytes.len() / self.page;
        while let Some(number) = todo.pop() {
            left = left.checked_sub(1)?;
            let page = self.page(number)?;
            let start = if number == 1 { FILE_HEADER } else { 0 };
            let kind = *page.get(start)?;
            let cells = usize::try_from(be(page.get(start + 3..start + 5)?)).ok()?;
            let pointers = start + if kind == INTERIOR { 12 } else { 8 };
            for cell in 0..cells {
                let pointer = page.get(pointers + 2 * cell..pointers + 2 * cell + 2)?;
                let cell = page.get(usize::try_from(be(pointer)).ok()?..)?;
                match kind {
                    INTERIOR => todo.push(usize::try_from(be(cell.get(..4)?)).ok()?),
                    LEAF => row(&self.payload(cell)?, take)?,
                    _ => return None,
                }
            }
            if kind == INTERIOR {
                todo.push(usize::try_from(be(page.get(start + 8..start + 12)?)).ok()?);
            }
        }
        Some(())
    }

    /// What a cell of a leaf holds, with the pages that it goes on in.
    fn payload(&self, cell: &[u8]) -> Option<Vec<u8>> {
        let (len, rest) = varint(cell)?;
        let (_row, rest) = varint(rest)?;
        if len > BLOB_MAX {
            return None;
        }
        let len = usize::try_from(len).ok()?;
        let most = self.usable - 35;
        let least = (self.usable - 12) * 32 / 255 - 23;
        let here = match least + (len.wrapping_sub(least)) % (self.usable - 4) {
            _ if len <= most => len,
            part if part <= most => part,
            _ => least,
        };
        let mut payload = rest.get(..here)?.to_vec();
        let mut next = if here < len { usize::try_from(be(rest.get(here..here + 4)?)).ok()? } else { 0 };
        while payload.len() < len {
            let page = self.page(next)?;
            next = usize::try_from(be(page.get(..4)?)).ok()?;
            let part = (len - payload.len()).min(self.usable - 4);
            payload.extend(page.get(4..4 + part)?);
        }
        Some(payload)
    }
}

/// Gives the columns of a row.
fn row(payload: &[u8], take: &mut dyn FnMut(&[Value<'_>])) -> Option<()> {
    let (header, _) = varint(payload)?;
    let header = usize::try_from(header).ok()?;
    let mut kinds = payload.get(payload.len() - varint(payload)?.1.len()..header)?;
    let mut rest = payload.get(header..)?;
    let mut values = Vec::new();
    while !kinds.is_empty() {
        let kind;
        (kind, kinds) = varint(kinds)?;
        let len = match kind {
            0 | 8 | 9 => 0,
            1..=4 => kind,
            5 => 6,
            6 | 7 => 8,
            _ => kind.checked_sub(12)? / 2,
        };
        let (value, after) = rest.split_at_checked(usize::try_from(len).ok()?)?;
        rest = after;
        values.push(match kind {
            1..=6 => Value::Number(be(value)),
            8 | 9 => Value::Number(kind - 8),
            12.. => Value::Bytes(value),
            _ => Value::Other,
        });
    }
    take(&values);
    Some(())
}

/// A number of one to nine bytes, and what comes after it.
fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0_u64;
    for at in 0..8 {
        let byte = *bytes.get(at)?;
        value = value << 7 | u64::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            return Some((value, bytes.get(at + 1..)?));
        }
    }
    Some((value << 8 | u64::from(*bytes.get(8)?), bytes.get(9..)?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::repository::Packages;

    #[test]
    fn a_tree_that_leads_to_itself_is_refused() {
        let mut looped = zstd::stream::decode_all(include_bytes!("rpmdb.sqlite.zst").as_slice()).unwrap();
        assert_eq!(looped[FILE_HEADER], INTERIOR);
        looped[FILE_HEADER + 8..FILE_HEADER + 12].copy_from_slice(&1_u32.to_be_bytes());
        assert!(Packages::of_rpm(&looped).is_none());
    }
}
