//! The packages that RPM says are installed: a header of each, in a file of one of
//! three forms. All are read here, as far as it takes, because the file comes from
//! whoever made the image.
//!
//! Source: "Package File Format" of RPM, "Header Structure".

mod berkeley;
mod ndb;
mod sqlite;

use std::collections::BTreeMap;

use super::packages::{PackageKind, Packages};

/// Where the file is, the form of today first: SQLite (Fedora, RHEL 9), RPM's own
/// (openSUSE, SLES 15) and Berkeley DB (RHEL 8 and before).
pub(crate) const FILES: [&str; 6] = [
    "usr/lib/sysimage/rpm/rpmdb.sqlite",
    "var/lib/rpm/rpmdb.sqlite",
    "usr/lib/sysimage/rpm/Packages.db",
    "var/lib/rpm/Packages.db",
    "usr/lib/sysimage/rpm/Packages",
    "var/lib/rpm/Packages",
];

/// Longest header of a package, in bytes. Source: RPM, `lib/header.c`, `headerMaxbytes`.
const BLOB_MAX: u64 = 256 << 20;

/// Tags of a header. Source: RPM, `include/rpm/rpmtag.h`.
const NAME: u32 = 1000;
const VERSION: u32 = 1001;
const RELEASE: u32 = 1002;
const EPOCH: u32 = 1003;
const ARCH: u32 = 1022;

/// What is done with a header.
type Found<'f> = dyn FnMut(&[u8]) + 'f;

impl Packages {
    /// Reads the database of RPM: a file of SQLite, of RPM's own format or of Berkeley
    /// DB; none if it is no such file, or damaged. Of a package that is there in several
    /// versions, all are told.
    #[must_use]
    pub fn of_rpm(database: &[u8]) -> Option<Self> {
        let mut versions: BTreeMap<String, String> = BTreeMap::new();
        let mut found = |header: &[u8]| {
            let Some((name, version)) = package(header) else { return };
            let known = versions.entry(name).or_default();
            if !known.is_empty() {
                known.push_str(", ");
            }
            known.push_str(&version);
        };
        if database.starts_with(sqlite::MAGIC) {
            sqlite::headers(database, &mut found)?;
        } else if database.starts_with(ndb::MAGIC) {
            ndb::headers(database, &mut found)?;
        } else {
            berkeley::headers(database, &mut found)?;
        }
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

/// A number of at most eight bytes, the largest digit first.
fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The same 40 packages, one with a header of many pages and one with an epoch, as
    /// RPM 4.18 wrote them, as its own format's code did, and as Berkeley DB 5.3 did.
    fn databases() -> [Vec<u8>; 3] {
        let files = [
            include_bytes!("rpmdb.sqlite.zst").as_slice(),
            include_bytes!("Packages.db.zst"),
            include_bytes!("Packages.zst"),
        ];
        files.map(|file| zstd::stream::decode_all(file).unwrap())
    }

    #[test]
    fn what_rpm_has_written_is_read_in_each_form() {
        for database in databases() {
            let packages = Packages::of_rpm(&database).unwrap();
            assert_eq!((packages.kind, packages.versions.len()), (PackageKind::Rpm, 40));
            assert_eq!(packages.versions["package1.noarch"], "1.1-2.el9");
            assert_eq!(packages.versions["package7.noarch"], "3:1.7-2.el9");
            assert_eq!(packages.versions["package9.noarch"], "1.9-2.el9", "over many pages");
            assert_eq!(Packages::decode(&packages.encode()).unwrap(), packages);
        }
    }

    #[test]
    fn damaged_and_hostile_files_are_refused_or_read_and_never_more() {
        assert!(Packages::of_rpm(b"").is_none());
        for whole in databases() {
            assert!(Packages::of_rpm(&whole[..whole.len() / 2]).is_none());
            // Some byte or other is wrong, also of those that say where the rest is.
            let mut seed = 7_u64;
            for round in 0..200 {
                let mut damaged = whole.clone();
                let within = if round % 2 == 0 { damaged.len() } else { 600 };
                for _ in 0..8 {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let at = usize::try_from(seed >> 33).unwrap() % within;
                    damaged[at] = seed.to_le_bytes()[7];
                }
                let found = Packages::of_rpm(&damaged).map_or(0, |packages| packages.versions.len());
                assert!(found <= 40, "{found}");
            }
        }
    }
}
