//! The thin pool that an administrator gave.

use std::sync::{Mutex, PoisonError};

use qvd_core::{Digest, Missing};
use qvd_sys::dm;
use rustix::io::Errno;

use super::{LVM, Volume, run};
use crate::{Error, Place};

/// What tells our pool from others.
pub(crate) const TAG: &str = "qvd";

/// Nothing new is made in a pool that is fuller, in percent: the rest is for
/// what is there already. Metadata are needed to give anything back, too.
const DATA_MOST: u64 = 95;
const METADATA_MOST: u64 = 90;

/// A thin pool, and with it its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pool(Volume);

/// How full a pool is, as its target says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Filled {
    data: u64,
    metadata: u64,
    /// Whether it still takes writes.
    writable: bool,
}

/// Finds the pool once, and again as long as there is none.
#[derive(Debug, Default)]
pub(crate) struct Lookup(Mutex<Option<Pool>>);

impl Lookup {
    /// The pool to use.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with what is missing.
    pub(crate) fn pool(&self) -> Result<Pool, Error> {
        let mut found = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = &*found {
            return Ok(pool.clone());
        }
        let pool = Pool::find()?;
        Ok(found.insert(pool).clone())
    }
}

impl Pool {
    fn find() -> Result<Self, Error> {
        let lacks = |missing| Error::Unsupported { op: "use thin volumes", missing };
        if LVM.find().is_none() {
            return Err(lacks(LVM.missing()));
        }
        dm::probe().map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::ACCESS | Errno::PERM) => lacks(Missing::Privilege("use the device mapper".to_owned())),
            Some(Errno::NOENT | Errno::NODEV | Errno::NXIO) => {
                lacks(Missing::Kernel("the device mapper (`modprobe dm_mod dm_thin_pool`)".to_owned()))
            }
            _ => Error::io("ask", "/dev/mapper/control")(error),
        })?;
        let select = format!("segtype=thin-pool && lv_tags={TAG}");
        let columns = "vg_name,lv_name,lv_when_full";
        let listed =
            run("look for a thin pool", &["lvs", "--noheadings", "--separator", "/", "-o", columns, "-S", &select])?;
        let Some((pool, when_full)) = listed.lines().find_map(read_line) else {
            let tag = format!("`GROUP/POOL`: a thin pool with the tag `{TAG}` (`lvchange --addtag {TAG} GROUP/POOL`)");
            return Err(lacks(Missing::Device(tag)));
        };
        if when_full != "error" {
            let path = pool.path();
            let waits =
                format!("{path}, which lets writers hang when it is full (`lvchange --errorwhenfull y {path}`)");
            return Err(lacks(Missing::Device(waits)));
        }
        Ok(Self(pool))
    }

    pub(crate) const fn volume(&self) -> &Volume {
        &self.0
    }

    /// Another volume of its group.
    pub(crate) fn sibling(&self, name: String) -> Volume {
        Volume { group: self.0.group.clone(), name }
    }

    /// Says when there is no room for more: who goes on writing is refused, and
    /// file systems that are refused for their own needs become read-only.
    ///
    /// # Errors
    /// [`Error::PoolFull`].
    pub(crate) fn expect_room(&self) -> Result<(), Error> {
        // What thin volumes stand on; the pool's own name is at best a view of it.
        let mapped = format!("{}-tpool", self.0.mapped());
        let Some(status) = dm::status(&mapped).map_err(Error::io("look at pool", self.0.path()))? else {
            // Nothing is active in it.
            return Ok(());
        };
        if status.suspended {
            let _nobody_changes_it = super::command_lock();
            dm::resume(&mapped).map_err(Error::io("resume pool", self.0.path()))?;
        }
        let Some(filled) = Filled::read(&status.says) else { return Ok(()) };
        let full = |what, percent| Err(Error::PoolFull { pool: self.0.path(), what, percent });
        match filled {
            Filled { metadata: METADATA_MOST.., .. } => full("metadata", filled.metadata),
            Filled { data: DATA_MOST.., .. } | Filled { writable: false, .. } => full("data", filled.data),
            _ => Ok(()),
        }
    }

    /// Makes an empty volume that no start of the host activates by itself.
    pub(crate) fn create(&self, volume: &Volume, bytes: u64) -> Result<(), Error> {
        self.expect_room()?;
        let (size, pool) = (format!("{bytes}b"), &self.0.name);
        let args = ["lvcreate", "-q", "-y", "-V", &size, "--thinpool", pool, "-n", &volume.name];
        run("make a volume", &[&args[..], &["-Wn", "-ky", "-K", "-ay", &volume.group]].concat()).map(drop)
    }

    /// Makes a snapshot of a volume.
    pub(crate) fn snapshot(&self, of: &Volume, to: &Volume) -> Result<(), Error> {
        self.expect_room()?;
        let args = ["lvcreate", "-q", "-y", "-s", "-n", &to.name, "-kn", "-ay", &of.path()];
        run("make a snapshot", &args).map(drop)
    }

    /// Snapshots the base `name` of a place, with what `digest` says, which `fill`
    /// makes where it is absent yet.
    pub(crate) fn snapshot_base(
        &self,
        (place, digest, name): (&Place, Digest, String),
        to: &Volume,
        fill: impl FnOnce(&Volume) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let base = self.sibling(name);
        super::note_base(place, digest, &base)?;
        // Without a look first: the base is there, but for the first time.
        match self.snapshot(&base, to) {
            Err(Error::Program { .. }) if !base.exists()? => {}
            done => return done,
        }
        fill(&base)?;
        self.snapshot(&base, to)
    }

    /// Gives what was filled its name as a base, for good. One that another
    /// process made meanwhile is as good.
    pub(crate) fn name_base(filled: &Volume, base: &Volume) -> Result<bool, Error> {
        filled.in_use()?;
        run("put a base to rest", &["lvchange", "-q", "-an", &filled.path()])?;
        match run("name a base", &["lvrename", "-q", &filled.group, &filled.name, &base.name]) {
            Ok(_) => Ok(true),
            Err(error) => {
                if base.exists()? {
                    Ok(false)
                } else {
                    Err(error)
                }
            }
        }
    }
}

fn read_line(line: &str) -> Option<(Volume, String)> {
    let (path, when_full) = line.trim().rsplit_once('/')?;
    Some((Volume::parse(path, '/')?, when_full.to_owned()))
}

impl Filled {
    /// Source: Linux `Documentation/admin-guide/device-mapper/thin-provisioning.rst`, "Status".
    fn read(says: &str) -> Option<Self> {
        let mut words = says.split(' ');
        let percent = |word: Option<&str>| {
            let (used, all) = word?.split_once('/')?;
            let (used, all) = (used.parse::<u64>().ok()?, all.parse::<u64>().ok()?);
            used.checked_mul(100)?.checked_div(all)
        };
        if says == "Fail" || says == "Error" {
            return Some(Self { data: 100, metadata: 100, writable: false });
        }
        words.next()?;
        let (metadata, data) = (percent(words.next())?, percent(words.next())?);
        words.next()?;
        Some(Self { data, metadata, writable: words.next()? == "rw" })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_a_pool_says_is_read() {
        let says = "1 112/1024 1200/4800 - rw discard_passdown error_if_no_space - 256 ";
        assert_eq!(Filled::read(says).unwrap(), Filled { data: 25, metadata: 10, writable: true });
        let full = "3 112/1024 4800/4800 - out_of_data_space discard_passdown error_if_no_space - 256 ";
        assert_eq!(Filled::read(full).unwrap(), Filled { data: 100, metadata: 10, writable: false });
        assert!(!Filled::read("Fail").unwrap().writable);
        assert_eq!(Filled::read("1 2"), None);
        let (pool, when_full) = read_line("  vg/pool/queue\n").unwrap();
        assert_eq!((pool.path().as_str(), when_full.as_str()), ("vg/pool", "queue"));
    }
}
