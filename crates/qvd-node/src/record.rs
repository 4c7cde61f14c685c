//! What a node must remember of a running desktop to adopt it.
//!
//! Records live in the run-time directory and are not synced: they matter only
//! while the kernel that runs the desktop does, and the page cache outlives a
//! killed process as well as a disk would. Everything that has no record is
//! found by its name and swept, so there is no intent to record beforehand.

use std::{
    io::{self, Write as _},
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use qvd_core::{DesktopId, DesktopSpec};
use serde::{Deserialize, Serialize};

use crate::machine::MachineRecord;

/// Format of the record; another version is not adopted but swept.
const VERSION: u32 = 2;

/// A running desktop.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    version: u32,
    pub(crate) spec: DesktopSpec,
    /// Which range of host uids it has, see [`qvd_core::UidRange::of_slot`].
    pub(crate) uid_slot: u32,
    pub(crate) machine: MachineRecord,
    pub(crate) address: Option<Ipv4Addr>,
    /// Whether all its memory was offered for merging when it was born.
    #[serde(default)]
    pub(crate) merges: bool,
}

impl Record {
    pub(crate) fn new(spec: DesktopSpec, uid_slot: u32, machine: MachineRecord, address: Option<Ipv4Addr>) -> Self {
        Self { version: VERSION, spec, uid_slot, machine, address, merges: false }
    }

    /// Of one whose memory is offered for merging, or not.
    pub(crate) fn merging(self, merges: bool) -> Self {
        Self { merges, ..self }
    }
}

/// The directories of running desktops: each holds a record and the socket to
/// the init inside.
#[derive(Debug)]
pub(crate) struct Records {
    dir: PathBuf,
    ready: PathBuf,
}

impl Records {
    /// Opens, making it if need be, the directory below the run-time directory.
    pub(crate) fn open(run: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let dir = run.join("desktops");
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        // What stood ready for nobody is not taken over.
        let ready = run.join("ready");
        remove_all(&ready)?;
        make(&ready)?;
        Ok(Self { dir, ready })
    }

    /// Makes the directory of a machine that is to stand ready.
    pub(crate) fn begin_ready(&self, id: DesktopId) -> io::Result<PathBuf> {
        let dir = self.ready.join(id.to_string());
        make(&dir)?;
        Ok(dir)
    }

    /// Forgets one that does not stand ready any more.
    pub(crate) fn end_ready(&self, id: DesktopId) -> io::Result<()> {
        remove_all(&self.ready.join(id.to_string()))
    }

    /// Directory of a desktop; nobody but root can enter it.
    pub(crate) fn dir(&self, id: DesktopId) -> PathBuf {
        self.dir.join(id.to_string())
    }

    /// Path of the socket to the init of a desktop.
    pub(crate) fn socket(&self, id: DesktopId) -> PathBuf {
        self.dir(id).join("init.sock")
    }

    /// Makes the directory of a desktop about to start.
    pub(crate) fn begin(&self, id: DesktopId) -> io::Result<()> {
        make(&self.dir(id))
    }

    /// Writes a record, whole or not at all.
    pub(crate) fn write(&self, record: &Record) -> io::Result<()> {
        let dir = self.dir(record.spec.id);
        let mut file = tempfile::NamedTempFile::new_in(&dir)?;
        file.write_all(&serde_json::to_vec(record)?)?;
        file.persist(dir.join("record.json")).map_err(|e| e.error)?;
        Ok(())
    }

    /// The record of a desktop, or why there is none that can be used.
    pub(crate) fn read(&self, id: DesktopId) -> io::Result<Record> {
        let record: Record = serde_json::from_slice(&std::fs::read(self.dir(id).join("record.json"))?)?;
        if record.version != VERSION || record.spec.id != id {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the record is of another version or desktop"));
        }
        Ok(record)
    }

    /// Forgets a desktop. Forgetting what is not there is `Ok`.
    pub(crate) fn end(&self, id: DesktopId) -> io::Result<()> {
        remove_all(&self.dir(id))
    }

    /// Every desktop that has a directory, with a record or without. What else
    /// stands there is not ours and stays.
    pub(crate) fn all(&self) -> io::Result<Vec<DesktopId>> {
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            ids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<DesktopId>().ok()));
        }
        ids.sort_unstable();
        Ok(ids)
    }
}

/// Makes a directory that nobody but root can enter, if it is not there.
fn make(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    match std::fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

fn remove_all(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
