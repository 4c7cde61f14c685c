//! A container, before and after its program runs.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use qvd_core::{Bytes, DesktopId, UidRange};
use qvd_sys::process::{Event, Exit, Process, SpawnError, Spawned, boot_id, page_out, start_time};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use tracing::info_span;

use crate::{
    Enforced, Error, Freezer,
    cgroup::{Cgroup, Pressure},
    enforced::Demand,
    error::io_error,
    fuse,
    memory::MergeProfit,
    runtime::{PLAN_WITHIN, Shared},
    sound,
};

/// How long a killed process may take to be gone.
const KILLED_WITHIN: Duration = Duration::from_secs(10);

/// After how long one asks what keeps a killed process. Without anything that
/// does it takes milliseconds, and asking does no harm.
const KILLED_SOON: Duration = Duration::from_secs(1);

/// What a child calls after it has reported: it waits, and executes.
const CALLS_AFTER_READY: u32 = 2;

/// What is the container's beside its process.
#[derive(Debug)]
pub(crate) struct Place {
    shared: Arc<Shared>,
    cgroup: Cgroup,
    id: DesktopId,
    ids: UidRange,
    /// Whether the number is ours: until the cgroup is gone.
    claimed: bool,
}

impl Place {
    pub(crate) const fn new(shared: Arc<Shared>, cgroup: Cgroup, id: DesktopId, ids: UidRange) -> Self {
        Self { shared, cgroup, id, ids, claimed: true }
    }

    fn close(&mut self) -> Result<(), Error> {
        self.cgroup.close()?;
        self.release();
        Ok(())
    }

    fn leave(&mut self) {
        self.cgroup.leave();
        self.release();
    }

    fn release(&mut self) {
        if std::mem::take(&mut self.claimed) {
            self.shared.release(self.id);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(desktop = %self.id, %error, "container left behind");
            self.release();
        }
    }
}

/// A process in the namespaces of a container that has not executed its
/// program. Dropping it removes it.
#[must_use = "dropping it removes the container"]
#[derive(Debug)]
pub struct Prepared {
    // Before `place`: the process has to be gone before its cgroup can go.
    spawned: Spawned,
    place: Place,
    landlock: bool,
    demand: Demand,
}

impl Prepared {
    pub(crate) const fn new(place: Place, spawned: Spawned, landlock: bool, demand: Demand) -> Self {
        Self { spawned, place, landlock, demand }
    }

    pub(crate) fn release(&self) -> Result<(), Error> {
        self.spawned.release().map_err(|source| self.failed(source))
    }

    /// What the child has reported as its failure, if it has. One that has ended
    /// makes other things fail, which say nothing about why.
    pub(crate) fn reason(&self) -> Option<Error> {
        match self.spawned.event(Duration::ZERO) {
            Err(source @ SpawnError::Step { .. }) => Some(self.failed(source)),
            _ => None,
        }
    }

    pub(crate) const fn cgroup(&self) -> &Cgroup {
        &self.place.cgroup
    }

    fn failed(&self, source: SpawnError) -> Error {
        Error::Start { id: self.place.id, source }
    }

    /// Number of the process on the host.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.spawned.process().pid()
    }

    /// The container's network namespace, to make a port in.
    ///
    /// # Errors
    /// [`Error::Start`] names the step that failed meanwhile; or the process was
    /// killed.
    pub fn netns(&self) -> Result<OwnedFd, Error> {
        let path = format!("/proc/{}/ns/net", self.pid());
        let opened = File::open(&path).map_err(io_error(format!("open `{path}`")));
        Ok(opened.map_err(|error| self.reason().unwrap_or(error))?.into())
    }

    /// Executes the program, and returns once that has succeeded.
    ///
    /// # Errors
    /// [`Error::Start`] names the step that failed; nothing is left.
    pub fn start(self) -> Result<Container, Error> {
        let _span = info_span!("start", desktop = %self.place.id).entered();
        // A child that has failed cannot be released; why it failed is what
        // its report says.
        let event = || self.spawned.event(PLAN_WITHIN).map_err(|source| self.failed(source));
        let ready = |event| match event {
            Event::Ready { calls } => Ok(calls),
            Event::Closed => Err(self.failed(SpawnError::Died)),
        };
        // Whoever demands something looks while nothing of the image runs yet.
        let (released, calls) = if self.demand.require.is_empty() {
            let released = self.spawned.release();
            (released, ready(event()?)?)
        } else {
            let calls = ready(event()?)?;
            let enforced = Enforced::read(self.pid(), &self.place.cgroup, self.landlock);
            self.demand.check(self.place.id, &enforced.map_err(|error| self.reason().unwrap_or(error))?)?;
            (self.spawned.release(), calls)
        };
        // One that was not released would not execute, however long one waits.
        released.map_err(|source| self.failed(source))?;
        let Event::Closed = event()? else { return Err(self.failed(SpawnError::Died)) };
        let calls = calls.saturating_add(CALLS_AFTER_READY);
        tracing::debug!(calls, "program runs");
        let mut container = Container::new(self.place, self.spawned.into_process(), self.landlock);
        container.start_calls = Some(calls);
        Ok(container)
    }
}

/// A running container, or one that has ended and is not yet removed.
///
/// Dropping it kills it; [`Container::detach`] leaves it for another process
/// to adopt. It runs on when this process dies.
#[must_use = "dropping it kills the container"]
#[derive(Debug)]
pub struct Container {
    process: Process,
    place: Place,
    start_calls: Option<u32>,
    /// Whether it keeps to rules of Landlock.
    landlock: bool,
}

impl Container {
    pub(crate) const fn new(place: Place, process: Process, landlock: bool) -> Self {
        Self { process, place, start_calls: None, landlock }
    }

    /// How many system calls its process made from its birth until its program
    /// ran, as it counted them itself; `None` for an adopted container. Unlike
    /// the time that a start takes, it does not depend on what else runs.
    #[must_use]
    pub const fn start_calls(&self) -> Option<u32> {
        self.start_calls
    }

    /// What lets all its processes stand still and go on; `None` where the
    /// host has neither cgroup v2 nor the v1 controller `freezer`.
    #[must_use]
    pub fn freezer(&self) -> Option<Freezer> {
        self.place.cgroup.freezer(self.place.id)
    }

    /// Its number.
    #[must_use]
    pub const fn id(&self) -> DesktopId {
        self.place.id
    }

    /// Number of its process 1 on the host.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Descriptor of its process 1; readable when that has ended.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }

    /// The container's network namespace.
    ///
    /// # Errors
    /// It has ended.
    pub fn netns(&self) -> Result<OwnedFd, Error> {
        let path = format!("/proc/{}/ns/net", self.pid());
        Ok(File::open(&path).map_err(io_error(format!("open `{path}`")))?.into())
    }

    /// How process 1 ended, if it has.
    ///
    /// # Errors
    /// The kernel refuses to say.
    pub fn try_wait(&mut self) -> Result<Option<Exit>, Error> {
        self.wait(Duration::ZERO)
    }

    /// Waits at most `limit` for the end of process 1. `None`: it runs.
    ///
    /// # Errors
    /// The kernel refuses to wait.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<Exit>, Error> {
        let op = format!("wait for desktop {}", self.place.id);
        self.process.wait(limit).map_err(io_error(op))
    }

    /// Sends a signal to process 1; `Ok` if that has ended. A process 1 gets
    /// from its own host only signals that it handles, and SIGKILL and SIGSTOP.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn signal(&self, signal: Signal) -> Result<(), Error> {
        self.process.signal(signal).map_err(io_error(format!("signal desktop {}", self.place.id)))
    }

    /// Asks an image's own init to end everything in its own time.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn ask_to_halt(&self) -> Result<(), Error> {
        self.process.halt().map_err(io_error(format!("ask desktop {} to halt", self.place.id)))
    }

    /// How long its processes waited for processor, memory and disks; `None` where the
    /// kernel does not keep count of that, as with cgroups of version 1.
    ///
    /// # Errors
    /// It has been removed, or the kernel does not say.
    pub fn pressure(&self) -> Result<Option<Pressure>, Error> {
        self.place.cgroup.pressure().map_err(io_error(format!("read the pressure on desktop {}", self.place.id)))
    }

    /// Kills process 1 and, with it, everything in the container.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn kill(&self) -> Result<(), Error> {
        self.signal(Signal::KILL)
    }

    /// What is needed to adopt it later.
    ///
    /// # Errors
    /// It has been reaped already.
    pub fn record(&self) -> Result<ContainerRecord, Error> {
        let op = || format!("record desktop {}", self.place.id);
        Ok(ContainerRecord {
            id: self.place.id,
            pid: self.pid(),
            start_time_ticks: start_time(self.pid()).map_err(io_error(op()))?,
            boot_id: boot_id().map_err(io_error(op()))?,
            ids: self.place.ids,
            landlock: self.landlock,
        })
    }

    /// Lets go of it without ending it.
    ///
    /// # Errors
    /// As [`Container::record`]; then it is killed, as nobody could adopt it.
    pub fn detach(mut self) -> Result<ContainerRecord, Error> {
        let record = self.record()?;
        self.place.leave();
        Ok(record)
    }

    /// What the kernel says of its confinement.
    ///
    /// # Errors
    /// It has ended.
    pub fn enforced(&self) -> Result<Enforced, Error> {
        Enforced::read(self.pid(), &self.place.cgroup, self.landlock)
    }

    /// Asks the kernel for the memory that nothing but this container uses:
    /// what a desktop at rest can do without until somebody comes back. Pages
    /// of files that other containers map too stay. Returns how many bytes of
    /// address space were asked for.
    ///
    /// # Errors
    /// The kernel is older than 5.10, or its processes cannot be listed.
    pub fn page_out(&self) -> Result<u64, Error> {
        let op = || format!("page out desktop {}", self.place.id);
        let mut asked = 0;
        for pid in self.place.cgroup.processes().map_err(io_error(op()))? {
            asked += page_out(pid).map_err(io_error(op()))?;
        }
        Ok(asked)
    }

    /// What it keeps in memory: all that is charged to its cgroup but pages of
    /// files that nobody used for a while.
    ///
    /// # Errors
    /// It has been removed, or the kernel does not say.
    pub fn memory(&self) -> Result<Bytes, Error> {
        let op = || format!("read the memory of desktop {}", self.place.id);
        self.place.cgroup.memory().map(Bytes::new).map_err(io_error(op()))
    }

    /// What merging of equal pages does for its programs at the moment.
    ///
    /// # Errors
    /// Its processes cannot be listed, or the kernel is older than 6.1.
    pub fn merge_profit(&self) -> Result<MergeProfit, Error> {
        let op = || format!("read what merging does for desktop {}", self.place.id);
        let mut sum = MergeProfit::default();
        for pid in self.place.cgroup.processes().map_err(io_error(op()))? {
            match MergeProfit::of_process(pid) {
                Ok(one) => sum = sum.and(one),
                // It has ended since.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {}
                Err(error) => return Err(io_error(op())(error)),
            }
        }
        Ok(sum)
    }

    /// Asks the kernel for so much of the memory that it keeps. Cgroup v2 gives
    /// about as much; elsewhere its processes are paged out one after another
    /// until it is enough.
    ///
    /// # Errors
    /// As [`Container::page_out`].
    pub fn reclaim(&self, amount: Bytes) -> Result<(), Error> {
        let op = || format!("reclaim memory of desktop {}", self.place.id);
        if self.place.cgroup.reclaim(amount.get()).map_err(io_error(op()))? {
            return Ok(());
        }
        let enough = self.memory()?.get().saturating_sub(amount.get());
        for pid in self.place.cgroup.processes().map_err(io_error(op()))? {
            page_out(pid).map_err(io_error(op()))?;
            if self.memory()?.get() <= enough {
                break;
            }
        }
        Ok(())
    }

    /// Asks the kernel for all other memory that is charged to it, such as what it
    /// remembers of files for its programs. For a container that stands still:
    /// one that runs would ask for it again, and this might not end.
    ///
    /// # Errors
    /// It has been removed, or the kernel refuses.
    pub fn reclaim_all(&self) -> Result<(), Error> {
        self.place.cgroup.reclaim_all().map_err(io_error(format!("ask for the memory of desktop {}", self.place.id)))
    }

    /// How often its programs were refused a process or a thread, since it runs,
    /// because they had as many as they may.
    ///
    /// # Errors
    /// It has been removed, or the kernel does not say.
    pub fn refused_processes(&self) -> Result<u64, Error> {
        let op = || format!("count the processes that desktop {} was refused", self.place.id);
        self.place.cgroup.refused_processes().map_err(io_error(op()))
    }

    /// How often the kernel has ended one of its processes because memory was used up:
    /// its own, or all of the host's.
    ///
    /// # Errors
    /// It has been removed, or the kernel does not say.
    pub fn killed_for_memory(&self) -> Result<u64, Error> {
        let op = || format!("count the processes of desktop {} that memory was missing for", self.place.id);
        self.place.cgroup.killed_for_memory().map_err(io_error(op()))
    }

    /// Whether one of its programs has a stream of a sound device open, so that
    /// somebody may be listening although nobody looks.
    ///
    /// # Errors
    /// Its processes cannot be listed, or the kernel does not say.
    pub fn uses_sound(&self) -> Result<bool, Error> {
        let asked = || -> io::Result<bool> {
            for pid in self.place.cgroup.processes()? {
                if sound::is_used_by(pid)? {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        asked().map_err(io_error(format!("look for sound of desktop {}", self.place.id)))
    }

    /// Processor time that its programs have used.
    ///
    /// # Errors
    /// It has been removed, or the kernel does not say.
    pub fn cpu_time(&self) -> Result<Duration, Error> {
        self.place.cgroup.cpu_time().map_err(io_error(format!("read the processor time of desktop {}", self.place.id)))
    }

    /// Kills what still runs and removes it. Idempotent; still armed after an
    /// error.
    ///
    /// # Errors
    /// Something does not go away; calling again retries.
    pub fn close(&mut self) -> Result<(), Error> {
        if self.place.cgroup.is_closed() {
            return Ok(());
        }
        let id = self.place.id;
        let _span = info_span!("close", desktop = %id).entered();
        // A v1 freezer holds back even SIGKILL.
        if let Some(freezer) = self.freezer() {
            freezer.thaw()?;
        }
        self.kill()?;
        if self.wait(KILLED_SOON)?.is_none() {
            let ended = self.place.cgroup.processes().and_then(|processes| fuse::abort(&processes));
            let ended = ended.map_err(io_error(format!("end what programs of desktop {id} serve")))?;
            tracing::info!(desktop = %id, ended, "a kill was not enough");
        }
        if self.wait(KILLED_WITHIN)?.is_none() {
            return Err(Error::Timeout { op: format!("kill desktop {id}"), limit: KILLED_WITHIN });
        }
        self.place.close()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(desktop = %self.place.id, %error, "container left behind");
        }
    }
}

/// What names a running container for ever: number and start time of its
/// process 1, and the boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerRecord {
    pub(crate) id: DesktopId,
    pub(crate) pid: u32,
    pub(crate) start_time_ticks: u64,
    pub(crate) boot_id: String,
    pub(crate) ids: UidRange,
    /// Absent in records of versions that did not use it.
    #[serde(default)]
    pub(crate) landlock: bool,
}

impl ContainerRecord {
    /// Which desktop it is.
    #[must_use]
    pub const fn id(&self) -> DesktopId {
        self.id
    }
}
