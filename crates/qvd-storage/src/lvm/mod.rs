//! Thin volumes of LVM: the pool that an administrator gave, and what is done
//! in it for roots and disks alike.
//!
//! A volume is in a directory of its own before it exists, in the place or in the
//! trash, whose name or link says which it is. So nothing has to be searched for after a
//! crash: what was being made has a name that is thrown away at the next open,
//! and the trash removes the volume with the directory.

mod pool;

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use qvd_core::Digest;
use qvd_sys::dm;

pub(crate) use self::pool::{Lookup, Pool};
use crate::{Error, Place, fsio, program::Program};

pub(super) const LVM: Program = Program { name: "lvm", package: "lvm2" };

/// A command waits for others that change the same group; who makes it stop
/// half way may leave devices suspended, so it is given time.
const COMMAND: Duration = Duration::from_secs(180);

/// How long the kernel may take to let go of a device that was closed.
const RELEASE: Duration = Duration::from_millis(300);

/// How the names of entries begin that stand for a volume: in a place while it
/// is made, and in the trash. No root's or disk's name has a colon, and nothing
/// that a desktop named is ever given such a name.
const MAKING: &str = ".lv:";
pub(crate) const DOOMED: &str = "lv:";

/// Names the volume, in the directory of a root or disk: a link is there whole
/// or not at all.
const LINK: &str = "volume";

/// Where a place notes its bases; no root or disk has a name in capital letters.
const BASES: &str = "BASES";

/// A volume of a group, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Volume {
    pub(crate) group: String,
    pub(crate) name: String,
}

impl Volume {
    /// As commands take it.
    pub(crate) fn path(&self) -> String {
        format!("{}/{}", self.group, self.name)
    }

    /// What the device mapper calls it.
    fn mapped(&self) -> String {
        format!("{}-{}", self.group.replace('-', "--"), self.name.replace('-', "--"))
    }

    /// Its device.
    pub(crate) fn device(&self) -> PathBuf {
        Path::new("/dev/mapper").join(self.mapped())
    }

    fn parse(text: &str, separator: char) -> Option<Self> {
        let (group, name) = text.split_once(separator)?;
        let valid = |text: &str| {
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"+_.-".contains(&b);
            !text.is_empty() && !text.starts_with(['-', '.']) && text.bytes().all(plain)
        };
        (valid(group) && valid(name)).then(|| Self { group: group.to_owned(), name: name.to_owned() })
    }

    /// The volume that an entry of the trash stands for.
    pub(crate) fn doomed(entry: &[u8]) -> Option<Self> {
        Self::parse(std::str::from_utf8(entry).ok()?.strip_prefix(DOOMED)?, ':')
    }

    /// The name in the trash for what bears `name` in a place: its own, if it
    /// stands for a volume that was being made.
    pub(crate) fn doom(name: &std::ffi::OsStr) -> Option<String> {
        let rest = name.to_str()?.strip_prefix(MAKING)?;
        Self::parse(rest, ':').map(|volume| volume.entry())
    }

    fn entry(&self) -> String {
        format!("{DOOMED}{}:{}", self.group, self.name)
    }

    /// The volume of the root or disk in `dir`.
    pub(crate) fn of(dir: &Path) -> Result<Self, Error> {
        let read = || {
            let target = fs::read_link(dir.join(LINK))?;
            target.to_str().and_then(|text| Self::parse(text, '/')).ok_or(io::Error::from(io::ErrorKind::InvalidData))
        };
        read().map_err(Error::io("read the volume of", dir))
    }

    /// Looks at its device, and lets it go on if a killed command had stopped it;
    /// `None` when it is not active.
    pub(crate) fn status(&self) -> Result<Option<dm::Status>, Error> {
        let (device, name) = (self.device(), self.mapped());
        let status = dm::status(&name).map_err(Error::io("look at volume", &device))?;
        if status.as_ref().is_some_and(|status| status.suspended) {
            let _nobody_changes_it = command_lock();
            dm::resume(&name).map_err(Error::io("resume volume", &device))?;
        }
        Ok(status)
    }

    /// Whether a mount or a virtual machine has it.
    pub(crate) fn in_use(&self) -> Result<bool, Error> {
        self.in_use_after(RELEASE)
    }

    /// As [`Volume::in_use`], where the kernel may need so long to let go of the
    /// device after the last unmount. It tells nobody when it has.
    pub(crate) fn in_use_after(&self, limit: Duration) -> Result<bool, Error> {
        let until = Instant::now() + limit;
        loop {
            let used = self.status()?.is_some_and(|status| status.open_count > 0);
            if !used || Instant::now() >= until {
                return Ok(used);
            }
            thread::park_timeout(Duration::from_millis(10));
        }
    }

    /// Makes sure that there is a device.
    pub(crate) fn activate(&self) -> Result<(), Error> {
        if self.status()?.is_some() {
            return Ok(());
        }
        run("activate a volume", &["lvchange", "-ay", "-K", &self.path()]).map(drop)
    }

    pub(crate) fn extend(&self, bytes: u64) -> Result<(), Error> {
        run("make a volume larger", &["lvextend", "-q", "-y", "-L", &format!("{bytes}b"), &self.path()]).map(drop)
    }

    /// Whether the group has it.
    pub(crate) fn exists(&self) -> Result<bool, Error> {
        let select = format!("lv_name={}", self.name);
        let listed = run("look for a volume", &["lvs", "--noheadings", "-o", "lv_name", "-S", &select, &self.group])?;
        Ok(!listed.trim().is_empty())
    }

    /// Removes it for good; `Ok` when there is none.
    pub(crate) fn remove(&self) -> Result<(), Error> {
        self.status()?;
        run("remove a volume", &["lvremove", "-q", "-f", &self.path()])
            .map(drop)
            .or_else(|error| if self.exists()? { Err(error) } else { Ok(()) })
    }
}

/// Commands of this process wait for each other here instead of inside, where
/// their time would run.
fn command_lock() -> std::sync::MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a command of LVM. `op` is our verb.
pub(super) fn run(op: &'static str, args: &[&str]) -> Result<String, Error> {
    // Each root would leave a file otherwise.
    let mut config = "backup {archive=0}".to_owned();
    // Who makes the devices' names: nobody else where udev does not run.
    if !Path::new("/run/udev/control").exists() {
        config.push_str(" activation {udev_sync=0 udev_rules=0}");
    }
    let _alone = command_lock();
    LVM.run(op, args.iter().copied().chain(["--config", &config]), Stdio::null(), COMMAND)
}

/// A directory beside its place whose name says which volume belongs to it:
/// the intent to make that.
#[derive(Debug)]
pub(crate) struct Making {
    pub(crate) dir: PathBuf,
    pub(crate) volume: Volume,
}

impl Making {
    /// Begins to make a volume for `what`.
    pub(crate) fn begin(place: &Place, pool: &Pool, what: &str) -> Result<Self, Error> {
        // Signs that LVM would read as a part of something, or write twice.
        let what = what.replace('_', "+").replace('-', ".");
        let prefix = format!("{MAKING}{}:qvd.{what}.", pool.volume().group);
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir_in(place.dir());
        let dir = dir.map_err(Error::io("make a volume for", place.dir()))?.keep();
        let name = dir.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix(MAKING));
        let volume = name.and_then(|name| Volume::parse(name, ':'));
        let volume =
            volume.ok_or_else(|| Error::io("make a volume for", &dir)(io::Error::from(io::ErrorKind::InvalidData)))?;
        std::os::unix::fs::symlink(volume.path(), dir.join(LINK)).map_err(Error::io("make a volume for", &dir))?;
        Ok(Self { dir, volume })
    }

    /// Puts it at its place, whole; `synced` when it is to survive a crash.
    pub(crate) fn finish(self, place: &Place, dir: &Path, synced: bool) -> Result<(), Error> {
        let finish = || {
            if synced {
                fsio::sync_dir(&self.dir)?;
            }
            fs::rename(&self.dir, dir)?;
            if synced { fsio::sync_dir(place.dir()) } else { Ok(()) }
        };
        finish().map_err(Error::io("finish a volume for", dir)).inspect_err(|_| self.give_up(place))
    }

    /// Throws away what was made so far.
    pub(crate) fn give_up(&self, place: &Place) {
        if let Err(error) = discard(place, &self.dir, &self.volume) {
            tracing::warn!(path = %self.dir.display(), %error, "volume left behind until the next start");
        }
    }
}

/// Notes that the volume `base`, with the files or the disk `digest`, is there for
/// this place or will be: before it is, so that none is forgotten.
pub(crate) fn note_base(place: &Place, digest: Digest, base: &Volume) -> Result<(), Error> {
    let bases = place.dir().join(BASES);
    let note = bases.join(format!("{}.{}", digest.hex(), base.name));
    let there = || match note.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    };
    if there().map_err(Error::io("read", &note))? {
        return Ok(());
    }
    fsio::ensure_private_dir(&bases).map_err(Error::io("use", &bases))?;
    match std::os::unix::fs::symlink(base.path(), &note) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(Error::io("note base at", &note)(error)),
        _ => fsio::sync_dir(&bases).map_err(Error::io("note base at", &note)),
    }
}

/// Takes the bases of this place out of the way that `gone` names. Snapshots of
/// them stay as they are; another place that used one makes it again.
pub(crate) fn forget_bases(place: &Place, gone: &dyn Fn(Digest) -> bool) -> Result<(), Error> {
    let bases = place.dir().join(BASES);
    let entries = match fs::read_dir(&bases) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(Error::io("read", &bases))?,
    };
    for entry in entries {
        let note = entry.map_err(Error::io("read", &bases))?.path();
        let name = note.file_name().and_then(|name| name.to_str()).and_then(|name| name.split_once('.'));
        let digest = name.and_then(|(hex, _)| format!("sha256:{hex}").parse().ok());
        if !digest.is_some_and(gone) {
            continue;
        }
        let target = fs::read_link(&note).map_err(Error::io("read", &note))?;
        if let Some(volume) = target.to_str().and_then(|target| Volume::parse(target, '/')) {
            place.trash().discard_as(&note, &volume.entry())?;
        }
    }
    Ok(())
}

/// Takes a directory and its volume out of the way; the volume is removed in the
/// background, or after the next start.
pub(crate) fn discard(place: &Place, dir: &Path, volume: &Volume) -> Result<(), Error> {
    place.trash().discard_as(dir, &volume.entry())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_of_volumes_are_read_and_nothing_else() {
        let volume = Volume { group: "vg-0".to_owned(), name: "qvd.root.a.x1".to_owned() };
        assert_eq!(volume.mapped(), "vg--0-qvd.root.a.x1");
        assert_eq!(Volume::doomed(volume.entry().as_bytes()), Some(volume.clone()));
        let making = format!(".{}", volume.entry());
        assert_eq!(Volume::doom(making.as_ref()), Some(volume.entry()));
        for other in ["7", "lv:a", "lv:a:b:c", "lv:a/b:c", "lv::b", "lv:-f:b", "lv:a:../b", ".new-x"] {
            assert_eq!(Volume::doomed(other.as_bytes()), None, "{other}");
        }
        assert_eq!(Volume::doom("lv:a:b".as_ref()), None);
    }
}
