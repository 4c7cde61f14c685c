//! Locks between processes. They end with the process that holds them.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use crate::Error;

/// A lock that is held.
#[derive(Debug)]
pub(crate) struct Lock {
    // Closing it ends the lock.
    _file: File,
}

impl Lock {
    /// Waits until nobody holds it alone.
    pub(crate) fn shared(path: &Path) -> Result<Self, Error> {
        Self::take(path, FlockOperation::LockShared)
    }

    /// Waits until nobody holds it.
    pub(crate) fn alone(path: &Path) -> Result<Self, Error> {
        Self::take(path, FlockOperation::LockExclusive)
    }

    /// The lock if nobody holds it.
    pub(crate) fn try_alone(path: &Path) -> Result<Option<Self>, Error> {
        let file = open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self { _file: file })),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(Error::io("lock", path)(error)),
        }
    }

    fn take(path: &Path, operation: FlockOperation) -> Result<Self, Error> {
        let file = open(path)?;
        loop {
            match flock(&file, operation) {
                Ok(()) => return Ok(Self { _file: file }),
                Err(Errno::INTR) => {}
                Err(error) => return Err(Error::io("lock", path)(error)),
            }
        }
    }
}

fn open(path: &Path) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    options.open(path).map_err(Error::io("open", path))
}
