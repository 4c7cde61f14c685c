//! Letting all processes of a container stand still, and go on.

use std::{
    io,
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use qvd_core::DesktopId;

use super::{Cgroups, Hierarchy};
use crate::{Error, error::io_error};

/// How long processes may take to stand still. One that sleeps where it cannot
/// be disturbed, as on a dead network file system, keeps its group from that.
const FROZEN_WITHIN: Duration = Duration::from_secs(2);

/// Stops and resumes all processes of a container at once, by its cgroup. A
/// container that stands still answers nothing, not even through its init.
#[derive(Debug, Clone)]
pub struct Freezer {
    all: Arc<Cgroups>,
    id: DesktopId,
    group: PathBuf,
    unified: bool,
}

impl Freezer {
    pub(super) fn new(all: &Arc<Cgroups>, hierarchy: &Hierarchy, id: DesktopId, group: PathBuf) -> Self {
        Self { all: Arc::clone(all), id, group, unified: hierarchy.unified }
    }

    /// Returns once nothing in the container runs any more. After an error
    /// everything in it runs.
    ///
    /// # Errors
    /// [`Error::Timeout`] when something cannot be stopped now.
    pub fn freeze(&self) -> Result<(), Error> {
        let op = || format!("freeze desktop {}", self.id);
        let stopped = self.ask(true).and_then(|()| self.wait_frozen());
        match stopped {
            Ok(true) => Ok(()),
            Ok(false) => {
                self.thaw()?;
                Err(Error::Timeout { op: op(), limit: FROZEN_WITHIN })
            }
            Err(error) => {
                self.thaw()?;
                Err(io_error(op())(error))
            }
        }
    }

    /// Lets everything go on; `Ok` if it does already, or if nothing is left.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn thaw(&self) -> Result<(), Error> {
        match self.ask(false) {
            Err(error) if gone(&error) => Ok(()),
            asked => asked.map_err(io_error(format!("thaw desktop {}", self.id))),
        }
    }

    /// Whether everything in it stands still.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn is_frozen(&self) -> Result<bool, Error> {
        match self.frozen() {
            Err(error) if gone(&error) => Ok(false),
            answer => answer.map_err(io_error(format!("ask whether desktop {} is frozen", self.id))),
        }
    }

    /// Source: Linux `Documentation/admin-guide/cgroup-v2.rst`, `cgroup.freeze`,
    /// and `cgroup-v1/freezer-subsystem.rst`.
    fn ask(&self, still: bool) -> io::Result<()> {
        let (file, value) = match (self.unified, still) {
            (true, true) => ("cgroup.freeze", "1"),
            (true, false) => ("cgroup.freeze", "0"),
            (false, true) => ("freezer.state", "FROZEN"),
            (false, false) => ("freezer.state", "THAWED"),
        };
        self.all.tree.write(&self.group.join(file), value)
    }

    fn frozen(&self) -> io::Result<bool> {
        if self.unified {
            Ok(self.all.tree.read(&self.group.join("cgroup.events"))?.lines().any(|line| line == "frozen 1"))
        } else {
            Ok(self.all.tree.read(&self.group.join("freezer.state"))?.trim() == "FROZEN")
        }
    }

    /// Asks again and again: v1 has no event for it, and a process stands still
    /// within microseconds when it leaves the kernel.
    fn wait_frozen(&self) -> io::Result<bool> {
        let deadline = Instant::now() + FROZEN_WITHIN;
        let mut pause = Duration::from_micros(50);
        while !self.frozen()? {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
        Ok(true)
    }
}

/// Whether an error says that the group was removed, also while it was open.
fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}
