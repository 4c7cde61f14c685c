//! A running machine.

use std::{
    fs::{self, File},
    os::{fd::BorrowedFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use qvd_core::{Bytes, DesktopId};
use qvd_sys::process::Exit;
use serde::{Deserialize, Serialize};

use super::{
    command::{Balloon, Cont, QueryBalloon, QueryStatus, Quit, RingbufRead, Stop, SystemPowerdown},
    qmp::{Command, Event, QemuVersion, Qmp, QmpError},
    sockets::Sockets,
};
use crate::{Container, ContainerRecord, Error, error::io_error};

/// How long QEMU may take for a command that does not depend on the guest.
pub(crate) const ANSWERS_WITHIN: Duration = Duration::from_secs(10);

/// Most of QEMU's complaints that are shown, in bytes.
const SHOWN: usize = 600;

/// What a machine does, as its events and QEMU say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum VmState {
    /// It has not run yet.
    Waiting,
    /// Its processors run.
    Running,
    /// Its processors stand still; its memory is kept.
    Paused,
    /// As [`VmState::Paused`], because a file of its disks could not grow: the file
    /// system that it is on is full. Nothing is lost: the write is done when
    /// [`Vm::resume`] is called, or the machine stands still again.
    Full,
    /// It is off, or on the way there.
    Down(Down),
}

/// Why a machine is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Down {
    /// The guest switched it off.
    Guest,
    /// The guest's kernel panicked.
    Panic,
    /// We ended it.
    Host,
    /// QEMU ended without saying why.
    Lost,
}

/// How long each step of a stop may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopLimits {
    /// For the guest, after it was asked by its own init.
    pub guest: Duration,
    /// For the guest, after its power button was pressed.
    pub button: Duration,
}

impl Default for StopLimits {
    /// Ten seconds for each: what systems need that shut down in order.
    fn default() -> Self {
        Self { guest: Duration::from_secs(10), button: Duration::from_secs(10) }
    }
}

/// What made a machine stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum StoppedBy {
    /// It was off already.
    Itself,
    /// The guest's init, when it was asked to.
    Guest,
    /// The guest, when its power button was pressed.
    Button,
    /// Nobody: it was killed.
    Kill,
}

/// What a machine's process has of the host's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMemory {
    /// Its own pages, and its part of those that several processes have.
    pub proportional: Bytes,
    /// What would be free if it ended.
    pub private: Bytes,
}

/// A virtual machine: QEMU's process, and the socket that it is driven by.
///
/// Dropping it kills it; [`Vm::detach`] leaves it for another process to
/// adopt. It runs on when this process dies.
#[must_use = "dropping it kills the machine"]
#[derive(Debug)]
pub struct Vm {
    container: Container,
    control: Qmp,
    sockets: Sockets,
    /// What QEMU wrote to its standard error; lost when it is adopted.
    words: Option<File>,
    memory_file: bool,
    state: VmState,
}

impl Vm {
    pub(crate) const fn new(
        container: Container,
        control: Qmp,
        sockets: Sockets,
        words: Option<File>,
        memory_file: bool,
    ) -> Self {
        Self { container, control, sockets, words, memory_file, state: VmState::Waiting }
    }

    /// Its number.
    #[must_use]
    pub const fn id(&self) -> DesktopId {
        self.container.id()
    }

    /// Number of QEMU's process on the host.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.container.pid()
    }

    /// Descriptor of QEMU's process; readable when that has ended.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.container.pidfd()
    }

    /// What confines QEMU, to ask what the kernel says of it.
    pub const fn container(&self) -> &Container {
        &self.container
    }

    /// Socket that the guest's init is reached by; see `qvd-guest`'s link.
    #[must_use]
    pub fn link(&self) -> &Path {
        self.sockets.link()
    }

    /// What it does, as far as its events have been looked at.
    #[must_use]
    pub const fn state(&self) -> VmState {
        self.state
    }

    fn failed(&self, source: QmpError) -> Error {
        Error::Qmp { id: self.id(), source }
    }

    /// Carries out a command.
    pub(crate) fn call<C: Command>(&mut self, command: &C) -> Result<C::Answer, Error> {
        let answer = self.control.call(command, ANSWERS_WITHIN);
        answer.map_err(|source| self.failed(source))
    }

    /// As `call`, with descriptors for QEMU.
    pub(crate) fn call_with<C: Command>(&mut self, command: &C, fds: &[BorrowedFd<'_>]) -> Result<C::Answer, Error> {
        let answer = self.control.call_with(command, fds, ANSWERS_WITHIN);
        answer.map_err(|source| self.failed(source))
    }

    /// Waits at most `limit` for an event that `find` makes something of.
    pub(crate) fn await_event<T>(
        &mut self,
        limit: Duration,
        mut find: impl FnMut(&Event) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.control.event(left) {
                Ok(Some(event)) => {
                    self.note(&event);
                    if let Some(found) = find(&event) {
                        return Ok(Some(found));
                    }
                }
                Ok(None) => return Ok(None),
                Err(QmpError::Closed) => {
                    // It says why as its last words, a moment before it ends.
                    self.container.wait(ANSWERS_WITHIN)?;
                    return Err(Error::Hypervisor { id: self.id(), said: self.words() });
                }
                Err(source) => return Err(self.failed(source)),
            }
        }
    }

    /// Version of the QEMU that it runs in.
    #[must_use]
    pub const fn version(&self) -> &QemuVersion {
        self.control.version()
    }

    /// Takes note of an event.
    fn note(&mut self, event: &Event) {
        let reason = event.data.get("reason").and_then(serde_json::Value::as_str).unwrap_or_default();
        self.state = match (event.name.as_str(), self.state) {
            // Why it went down first is what counts.
            (_, down @ VmState::Down(_)) => down,
            ("RESUME", _) => VmState::Running,
            ("BLOCK_IO_ERROR", _) if event.data.get("action").is_some_and(|action| action == "stop") => VmState::Full,
            ("STOP", VmState::Running) => VmState::Paused,
            ("GUEST_PANICKED", _) => VmState::Down(Down::Panic),
            ("SHUTDOWN", _) if reason.starts_with("host") => VmState::Down(Down::Host),
            ("SHUTDOWN", _) if reason == "guest-panic" => VmState::Down(Down::Panic),
            ("SHUTDOWN", _) => VmState::Down(Down::Guest),
            (_, state) => state,
        };
        tracing::debug!(desktop = %self.id(), event = event.name, state = ?self.state, "machine");
    }

    /// Waits at most `limit` for the next event and says what the machine does.
    ///
    /// # Errors
    /// What came is not QMP. That QEMU has ended is a state, not an error.
    pub fn watch(&mut self, limit: Duration) -> Result<VmState, Error> {
        match self.control.event(limit) {
            Ok(Some(event)) => self.note(&event),
            Ok(None) => {}
            Err(QmpError::Closed) => {
                if !matches!(self.state, VmState::Down(_)) {
                    self.state = VmState::Down(Down::Lost);
                }
            }
            Err(source) => return Err(self.failed(source)),
        }
        Ok(self.state)
    }

    /// Asks QEMU what the machine does.
    pub(crate) fn look(&mut self) -> Result<(), Error> {
        let status = self.call(&QueryStatus)?;
        self.state = match status.status.as_str() {
            "running" => VmState::Running,
            "prelaunch" | "inmigrate" => VmState::Waiting,
            "shutdown" => VmState::Down(Down::Guest),
            "guest-panicked" => VmState::Down(Down::Panic),
            "io-error" => VmState::Full,
            _ => VmState::Paused,
        };
        Ok(())
    }

    /// Lets its processors run, for the first time or again.
    ///
    /// # Errors
    /// QEMU refuses or is gone.
    pub fn resume(&mut self) -> Result<(), Error> {
        self.call(&Cont)?;
        self.catch_up().map(drop)
    }

    /// Lets its processors stand still.
    ///
    /// # Errors
    /// QEMU refuses or is gone.
    pub fn pause(&mut self) -> Result<(), Error> {
        self.call(&Stop)?;
        self.catch_up().map(drop)
    }

    /// Takes note of all events that have come, without waiting, and says what it does.
    ///
    /// # Errors
    /// What came is not QMP. That QEMU has ended is seen by [`Vm::wait`].
    pub fn catch_up(&mut self) -> Result<VmState, Error> {
        loop {
            match self.control.event(Duration::ZERO) {
                Ok(Some(event)) => self.note(&event),
                Ok(None) | Err(QmpError::Closed) => return Ok(self.state),
                Err(source) => return Err(self.failed(source)),
            }
        }
    }

    /// Has the guest keep no more than `memory`; what it gives up is the
    /// host's. Done when the guest has, which [`Vm::memory_left`] shows.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a machine whose memory is a template's.
    pub fn balloon(&mut self, memory: Bytes) -> Result<(), Error> {
        if self.memory_file {
            let reason = "the balloon cannot give back pages of a template's memory file";
            return Err(Error::Invalid { what: format!("a balloon for desktop {}", self.id()), reason });
        }
        self.call(&Balloon { value: memory.get() }).map(drop)
    }

    /// Whether its memory is a template's, so that it has no balloon.
    #[must_use]
    pub const fn is_clone(&self) -> bool {
        self.memory_file
    }

    /// How much memory the balloon leaves to the guest at the moment.
    ///
    /// # Errors
    /// It has no balloon, or QEMU is gone.
    pub fn memory_left(&mut self) -> Result<Bytes, Error> {
        Ok(Bytes::new(self.call(&QueryBalloon)?.actual))
    }

    /// What the guest's kernel wrote to its console since this was last asked.
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn console(&mut self) -> Result<String, Error> {
        self.call(&RingbufRead { device: "console", size: super::arguments::CONSOLE_BYTES })
    }

    /// What it has of the host's memory.
    ///
    /// # Errors
    /// It has ended.
    pub fn host_memory(&self) -> Result<HostMemory, Error> {
        let path = format!("/proc/{}/smaps_rollup", self.pid());
        let text = fs::read_to_string(&path).map_err(io_error(format!("read `{path}`")))?;
        let sum = |names: &[&str]| {
            let lines = text.lines().filter_map(|line| line.split_once(':'));
            let wanted = lines.filter(|(name, _)| names.contains(name));
            let kib = wanted.filter_map(|(_, value)| value.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
            Bytes::new(kib.sum::<u64>() << 10)
        };
        Ok(HostMemory { proportional: sum(&["Pss"]), private: sum(&["Private_Clean", "Private_Dirty"]) })
    }

    /// Stops it: the guest's init is asked first, by `ask`, which says
    /// whether it was reached; then the power button is pressed; then QEMU is
    /// killed. Each step has its deadline.
    ///
    /// # Errors
    /// It cannot even be killed.
    pub fn stop(&mut self, limits: StopLimits, ask: impl FnOnce() -> bool) -> Result<StoppedBy, Error> {
        // One that has said that it is off has only to end.
        let ended = self.is_down(Duration::ZERO)?;
        if ended || (matches!(self.state, VmState::Down(_)) && self.is_down(ANSWERS_WITHIN)?) {
            return Ok(StoppedBy::Itself);
        }
        if matches!(self.state, VmState::Paused | VmState::Full) {
            // It could not hear. If it cannot go on, it is killed below.
            let _resumed = self.resume();
        }
        if ask() && self.is_down(limits.guest)? {
            return Ok(StoppedBy::Guest);
        }
        let pressed = self.call(&SystemPowerdown);
        if pressed.is_ok() && self.is_down(limits.button)? {
            return Ok(StoppedBy::Button);
        }
        // QEMU writes what its disks still wait for when it ends by itself, if it
        // hears at all.
        let hears = matches!(pressed, Ok(_) | Err(Error::Qmp { source: QmpError::Refused { .. }, .. }));
        if !hears || self.call(&Quit).is_err() || !self.is_down(ANSWERS_WITHIN)? {
            self.container.kill()?;
        }
        Ok(StoppedBy::Kill)
    }

    /// Whether QEMU's process has ended, waiting for that at most `limit`.
    fn is_down(&mut self, limit: Duration) -> Result<bool, Error> {
        let deadline = Instant::now() + limit;
        loop {
            // A peer that talks nonsense is no reason not to end it.
            let left = deadline.saturating_duration_since(Instant::now());
            let state = self.watch(left).unwrap_or(VmState::Down(Down::Lost));
            let down = matches!(state, VmState::Down(_));
            let left = deadline.saturating_duration_since(Instant::now());
            let ended = self.container.wait(if down { left } else { Duration::ZERO })?.is_some();
            if ended || left.is_zero() {
                return Ok(ended);
            }
        }
    }

    /// How QEMU ended, if it has within `limit`.
    ///
    /// # Errors
    /// The kernel refuses to wait.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<Exit>, Error> {
        self.container.wait(limit)
    }

    /// What QEMU complained about, for the log.
    #[must_use]
    pub fn words(&self) -> String {
        self.words.as_ref().map(last_words).unwrap_or_default()
    }

    /// What is needed to adopt it later.
    ///
    /// # Errors
    /// It has ended.
    pub fn record(&self) -> Result<VmRecord, Error> {
        let dir = self.sockets.dir().to_owned();
        Ok(VmRecord { container: self.container.record()?, dir, memory_file: self.memory_file })
    }

    /// Has its sockets in `dir` from here on, of the file system that they are on.
    /// It keeps its number, also as the name of its cgroup.
    ///
    /// # Errors
    /// They cannot be moved; then it is of no use any more.
    pub fn move_sockets(&mut self, dir: &Path) -> Result<(), Error> {
        self.sockets.move_to(dir)
    }

    /// Lets go of it without ending it.
    ///
    /// # Errors
    /// It has ended.
    pub fn detach(mut self) -> Result<VmRecord, Error> {
        let record = self.record()?;
        self.sockets.leave();
        self.container.detach()?;
        Ok(record)
    }

    /// Kills what still runs and removes it. Idempotent; still armed after an
    /// error.
    ///
    /// # Errors
    /// Something does not go away; calling again retries.
    pub fn close(&mut self) -> Result<(), Error> {
        self.container.close()?;
        self.sockets.close()
    }
}

/// The end of what QEMU said, on one line.
pub(crate) fn last_words(file: &File) -> String {
    let length = file.metadata().map_or(0, |metadata| metadata.len());
    let mut bytes = vec![0; SHOWN];
    let read = file.read_at(&mut bytes, length.saturating_sub(SHOWN as u64)).unwrap_or(0);
    let text = String::from_utf8_lossy(bytes.get(..read).unwrap_or_default()).into_owned();
    text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// What names a running machine for ever, and where its sockets are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRecord {
    pub(crate) container: ContainerRecord,
    pub(crate) dir: PathBuf,
    pub(crate) memory_file: bool,
}

impl VmRecord {
    /// Which desktop it is.
    #[must_use]
    pub const fn id(&self) -> DesktopId {
        self.container.id()
    }

    /// Whether its memory is a template's.
    #[must_use]
    pub const fn is_clone(&self) -> bool {
        self.memory_file
    }
}
