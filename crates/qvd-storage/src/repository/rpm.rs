//! The packages that RPM says are installed: a file of SQLite, in it a header of
//! each package. Both formats are read here, as far as it takes, because the file
//! comes from whoever made the image.
//!
//! Source: "Database File Format" of SQLite; "Package File Format" of RPM,
//! "Header Structure". A journal beside the file is not read: RPM empties it.

use std::collections::BTreeMap;

use super::packages::{PackageKind, Packages};

/// Where the file is: of systems of today, and of those before.
pub(crate) const FILES: [&str; 2] = ["usr/lib/sysimage/rpm/rpmdb.sqlite", "var/lib/rpm/rpmdb.sqlite"];

const MAGIC: &[u8] = b"SQLite format 3\0";
/// Bytes before the first page's own.
const FILE_HEADER: usize = 100;
const INTERIOR: u8 = 5;
const LEAF: u8 = 13;
/// Longest header of a package, in bytes. Source: RPM, `lib/header.c`, `headerMaxbytes`.
const BLOB_MAX: u64 = 256 << 20;

/// Tags of a header. Source: RPM, `include/rpm/rpmtag.h`.
const NAME: u32 = 1000;
const VERSION: u32 = 1001;
const RELEASE: u32 = 1002;
const EPOCH: u32 = 1003;
const ARCH: u32 = 1022;

impl Packages {
    /// Reads the database of RPM, in the form of SQLite; none if it is no such file,
    /// or damaged. Of a package that is there in several versions, all are told.
    #[must_use]
    pub fn of_rpm(database: &[u8]) -> Option<Self> {
        let file = Database::open(database)?;
        let mut versions: BTreeMap<String, String> = BTreeMap::new();
        let mut root = None;
        file.rows(1, &mut |row| {
            if row.get(..3) == Some(&[Value::Bytes(b"table"), Value::Bytes(b"Packages"), Value::Bytes(b"Packages")])
                && let Some(Value::Number(page)) = row.get(3)
            {
                root = usize::try_from(*page).ok();
            }
        })?;
        file.rows(root?, &mut |row| {
            if let Some(Value::Bytes(header)) = row.get(1)
                && let Some((name, version)) = package(header)
            {
                let known = versions.entry(name).or_default();
                if !known.is_empty() {
                    known.push_str(", ");
                }
                known.push_str(&version);
            }
        })?;
        Some(Self { kind: PackageKind::Rpm, versions })
    }
}

/// Name with architecture, and version, of a header.
fn package(header: &[u8]) -> Option<(String, String)> {
    let number = |at: usize| Some(u32::from_be_bytes(header.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let entries = usize::try_from(number(0)?).ok()?;
    let data = header.get(entries.checked_mul(16)?.checked_add(8)?..)?;
    let find = |tag| {
        let at = (0..entries).map(|entry| 8 + entry * 16).find(|at| number(*at) == Some(tag))?;
        data.get(usize::try_from(number(at + 8)?).ok()?..)
    };
    let text = |tag| {
        let text = std::str::from_utf8(find(tag)?.split(|byte| *byte == 0).next()?).ok()?;
        // In a list a blank ends a name and a line a package.
        (!text.is_empty() && !text.contains(|c: char| c.is_whitespace() || c.is_control())).then_some(text)
    };
    // Keys stand among the packages, and have no architecture.
    let name = format!("{}.{}", text(NAME)?, text(ARCH)?);
    let version = format!("{}-{}", text(VERSION)?, text(RELEASE)?);
    let epoch = find(EPOCH).and_then(|bytes| Some(u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?)));
    Some((name, epoch.map_or_else(|| version.clone(), |epoch| format!("{epoch}:{version}"))))
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

/// A number of at most eight bytes, the largest digit first.
fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// What RPM 4.18 wrote when 40 packages were installed, one with a header of
    /// many pages and one with an epoch.
    fn database() -> Vec<u8> {
        zstd::stream::decode_all(include_bytes!("rpmdb.sqlite.zst").as_slice()).unwrap()
    }

    #[test]
    fn what_rpm_has_written_is_read() {
        let packages = Packages::of_rpm(&database()).unwrap();
        assert_eq!((packages.kind, packages.versions.len()), (PackageKind::Rpm, 40));
        assert_eq!(packages.versions["package1.noarch"], "1.1-2.el9");
        assert_eq!(packages.versions["package7.noarch"], "3:1.7-2.el9");
        assert_eq!(packages.versions["package9.noarch"], "1.9-2.el9", "over many pages");
        assert_eq!(Packages::decode(&packages.encode()).unwrap(), packages);
    }

    #[test]
    fn damaged_and_hostile_files_are_refused_or_read_and_never_more() {
        let whole = database();
        assert!(Packages::of_rpm(b"").is_none());
        assert!(Packages::of_rpm(&whole[..whole.len() / 2]).is_none());
        // A tree that leads to itself.
        let mut looped = whole.clone();
        assert_eq!(looped[FILE_HEADER], INTERIOR);
        looped[FILE_HEADER + 8..FILE_HEADER + 12].copy_from_slice(&1_u32.to_be_bytes());
        assert!(Packages::of_rpm(&looped).is_none());
        // Some byte or other is wrong.
        let mut seed = 7_u64;
        for _ in 0..100 {
            let mut damaged = whole.clone();
            for _ in 0..8 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = usize::try_from(seed >> 33).unwrap() % damaged.len();
                damaged[at] = seed.to_le_bytes()[7];
            }
            let found = Packages::of_rpm(&damaged).map_or(0, |packages| packages.versions.len());
            assert!(found <= 40, "{found}");
        }
    }
}
