//! File systems to make roots on, each with the same base.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use crate::common::{KINDS, Outcome, mount, noise, run};

/// Files of the base that are written to.
pub(crate) const SMALL: &str = "usr/lib/one";
pub(crate) const LARGE: &str = "usr/lib/hundred";
/// A file of the base that two roots read.
pub(crate) const SHARED: &str = "usr/lib/shared";
pub(crate) const SHARED_BYTES: usize = 32 << 20;
/// A directory of the base with many files.
pub(crate) const MANY: &str = "usr/share";
/// An empty directory of the base that every root can write to.
pub(crate) const NEW: &str = "var/new";

/// Files below [`MANY`] and in the archive: enough to see what each costs.
const FILES: usize = 3000;

/// File systems on loop devices, mounted where only this process sees them.
pub(crate) struct Bed {
    dir: tempfile::TempDir,
}

impl Bed {
    pub(crate) fn new() -> Outcome<Self> {
        let bed = Self { dir: tempfile::tempdir()? };
        for kind in KINDS {
            mount(kind, 3 << 30, &bed.dir.path().join(format!("{kind}.disk")), &bed.at(kind))?;
            plant(&bed.at(kind).join("base"))?;
        }
        bed.archive()?;
        Ok(bed)
    }

    /// Where a file system of this kind is.
    pub(crate) fn at(&self, kind: &str) -> PathBuf {
        self.dir.path().join(kind)
    }

    /// A tar archive of small files.
    pub(crate) fn tar(&self) -> PathBuf {
        self.dir.path().join("many.tar")
    }

    fn archive(&self) -> Outcome<()> {
        let tree = self.at("ext4").join("base").join(MANY);
        run(Command::new("tar").arg("cf").arg(self.tar()).arg("-C").arg(tree).arg(".")).map(drop)
    }
}

fn plant(base: &Path) -> Outcome<()> {
    for name in ["etc", "usr/lib", MANY, NEW] {
        fs::create_dir_all(base.join(name))?;
    }
    let megabyte = noise(1_000_000);
    let write = |name: &str, megabytes: usize| -> Outcome<()> {
        let mut file = File::create(base.join(name))?;
        (0..megabytes).try_for_each(|_| file.write_all(&megabyte))?;
        Ok(file.sync_all()?)
    };
    write(SMALL, 1)?;
    write(LARGE, 100)?;
    write(SHARED, SHARED_BYTES / 1_000_000 + 1)?;
    for number in 0..FILES {
        let dir = base.join(MANY).join((number / 100).to_string());
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(number.to_string()), &megabyte[..1500 + number % 3000])?;
    }
    Ok(())
}
