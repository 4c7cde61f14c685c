//! Swap in compressed memory, for what idle desktops give back.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use qvd_core::Bytes;
use qvd_sys::zram::{self, ZramSwap};

use crate::{HostError, HostErrorKind};

/// Where the device is noted, among what lasts until the next boot.
const NOTE: &str = "zram";

/// Swap that this host had not, made with the administrator's leave.
///
/// Dropping it leaves it as it is: desktops that run on have pages in it, and
/// the next [`Swap::open`] on the same directory finds it.
#[derive(Debug)]
#[must_use = "the swap stays until it is closed"]
pub struct Swap {
    device: ZramSwap,
    note: PathBuf,
}

impl Swap {
    /// Swaps to compressed memory, up to `most` bytes of pages, unless the host
    /// swaps to something already. `run` is a node's directory of what lasts
    /// until the next boot.
    ///
    /// # Errors
    /// The kernel has no zram, this process may not, or the note cannot be
    /// written. Nothing is left then.
    pub fn open(run: &Path, most: Bytes) -> Result<Option<Self>, HostError> {
        let failed = |error: io::Error| {
            let kind = match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => HostErrorKind::Unsupported,
                _ => HostErrorKind::Failed,
            };
            HostError::because(kind, format!("cannot swap to {most} of compressed memory"), error)
        };
        let note = run.join(NOTE);
        if let Some(device) = noted(&note).map_err(failed)? {
            return Ok(Some(Self { device, note }));
        }
        if zram::has_swap().map_err(failed)? {
            tracing::info!("this host swaps already; no compressed memory is added");
            return Ok(None);
        }
        let device = ZramSwap::open(most.get()).map_err(failed)?;
        tracing::info!(device = %device.device().display(), size = %most, "swapping to compressed memory");
        let mut swap = Self { device, note };
        let written = fs::create_dir_all(run).and_then(|()| fs::write(&swap.note, swap.device.number().to_string()));
        if let Err(error) = written {
            // Nobody would find it again.
            swap.close()?;
            return Err(failed(error));
        }
        Ok(Some(swap))
    }

    /// Takes it away. Idempotent; still armed after an error.
    ///
    /// # Errors
    /// What is in it does not fit in memory.
    pub fn close(&mut self) -> Result<(), HostError> {
        let closed = self.device.close().and_then(|()| match fs::remove_file(&self.note) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        });
        closed.map_err(|error| {
            let what = format!("cannot take swap `{}` away", self.device.device().display());
            HostError::because(HostErrorKind::Failed, what, error)
        })
    }
}

/// The device that an earlier process noted, if it is still swapped to.
fn noted(note: &Path) -> io::Result<Option<ZramSwap>> {
    match fs::read_to_string(note) {
        Ok(number) => ZramSwap::find(number.trim().parse().map_err(io::Error::other)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
