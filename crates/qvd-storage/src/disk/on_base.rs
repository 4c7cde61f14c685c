//! Disks whose base stays behind them, and what can be done with the two.

use std::fmt;

use super::{BaseDisk, qcow2::Rebase};
use crate::Error;

/// What disks add that have their base behind them: see [`Disk::on_base`](super::Disk::on_base).
pub trait OnBase: fmt::Debug {
    /// Writes what the disk has changed to its base and empties the disk, which
    /// then shows the same. Killed in between, the disk shows the same too, and done
    /// again it completes.
    ///
    /// The base is another one afterwards, and its digest says so no more: whoever
    /// keeps bases by their digest gives it a new one. Nobody else may stand on it,
    /// which can be seen of the disks of this back end alone.
    ///
    /// # Errors
    /// [`Error::DiskBusy`] while a virtual machine has the disk, [`Error::DiskFileBusy`] while
    /// one has the base, [`Error::BaseShared`] when another disk stands on it; it cannot be written.
    fn commit(&self) -> Result<(), Error>;

    /// Puts the disk on another base. Killed in between, it stands on the one or the
    /// other and [`create`](super::DiskBackend::create) finds it with that one.
    ///
    /// # Errors
    /// [`Error::DiskBusy`] while a virtual machine has it, [`Error::DiskFile`] when a
    /// file is damaged or not permitted; it cannot be written.
    fn rebase(&self, to: &BaseDisk, how: Rebase) -> Result<(), Error>;
}
