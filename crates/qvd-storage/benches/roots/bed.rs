//! File systems to make roots on, each with the same base.

use std::{
    fs::{self, File},
    io::Write as _,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::Command,
};

use qvd_sys::{
    loopdev::LoopDevice,
    mount::{FsContext, Restrictions, attach, open_dir_path},
};

use crate::Outcome;

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
    /// Every kind that is used here.
    pub(crate) const KINDS: [&str; 3] = ["ext4", "xfs", "btrfs"];

    pub(crate) fn new() -> Outcome<Self> {
        let bed = Self { dir: tempfile::tempdir()? };
        for kind in Self::KINDS {
            mount(kind, &bed.dir.path().join(format!("{kind}.disk")), &bed.at(kind))?;
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
        command(Command::new("tar").arg("cf").arg(self.tar()).arg("-C").arg(tree).arg("."))
    }
}

/// Runs a program, and says what it said when it fails.
pub(crate) fn command(command: &mut Command) -> Outcome<()> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)).into())
}

fn mount(kind: &'static str, disk: &Path, at: &Path) -> Outcome<()> {
    let file = File::options().read(true).write(true).create_new(true).open(disk)?;
    file.set_len(3 << 30)?;
    command(Command::new(format!("mkfs.{kind}")).arg("-q").arg(disk))?;
    fs::create_dir(at)?;
    let device = LoopDevice::attach(file.as_fd(), false)?;
    let context = FsContext::open(kind)?;
    context.set("source", device.path().to_str().ok_or("a device with a strange name")?)?;
    let mount = context.mount(Restrictions::default())?;
    Ok(attach(mount.as_fd(), open_dir_path(at)?.as_fd())?)
}

fn plant(base: &Path) -> Outcome<()> {
    for name in ["etc", "usr/lib", MANY, NEW] {
        fs::create_dir_all(base.join(name))?;
    }
    // Nothing that a file system could keep without storing it.
    let megabyte: Vec<u8> =
        (0..1_000_000_u32).map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
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
