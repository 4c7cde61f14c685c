//! What every running desktop is driven by, whatever runs it.

use std::{
    error::Error as StdError,
    fmt,
    time::{Duration, Instant},
};

use qvd_core::{DesktopId, Missing};
use rustix::process::Signal;

use crate::{
    Container, Error, Exit,
    vm::{Down, StopLimits, StoppedBy, Vm, VmState},
};

/// What a virtualizer reports; each has errors of its own.
pub type Failure = Box<dyn StdError + Send + Sync>;

/// A running desktop of any virtualizer: a container, a machine of QEMU, a domain
/// of libvirt. What only one of them can is on its own type.
///
/// Dropping one ends it.
pub trait Machine: fmt::Debug + Send {
    /// Its number.
    fn id(&self) -> DesktopId;

    /// Number of its first process on this host, if it is on this host and known.
    fn pid(&self) -> Option<u32>;

    /// Waits at most `limit` for its state to become another than it was when it
    /// was looked at last, and says what it is. One that is down stays so.
    ///
    /// # Errors
    /// Who runs it does not answer. That it has ended is a state, not an error.
    fn watch(&mut self, limit: Duration) -> Result<VmState, Failure>;

    /// Lets it run, for the first time or again.
    ///
    /// # Errors
    /// It has ended.
    fn resume(&mut self) -> Result<(), Failure>;

    /// Lets it stand still.
    ///
    /// # Errors
    /// It has ended, or this host cannot.
    fn pause(&mut self) -> Result<(), Failure>;

    /// Stops it: `ask` asks its init and says whether that was reached; then it is
    /// told from outside (a power button, SIGTERM); then it is killed. Each step has its
    /// deadline.
    ///
    /// # Errors
    /// It cannot even be killed.
    fn stop(&mut self, limits: StopLimits, ask: &mut dyn FnMut() -> bool) -> Result<StoppedBy, Failure>;

    /// Ends it now.
    ///
    /// # Errors
    /// It cannot be ended.
    fn kill(&mut self) -> Result<(), Failure>;

    /// Lets go of it without ending it; what comes back is what its virtualizer
    /// adopts it by.
    ///
    /// # Errors
    /// It has ended, or nobody could adopt it; then it is killed.
    fn leave(self: Box<Self>) -> Result<serde_json::Value, Failure>;

    /// Ends what still runs and removes it. Idempotent; still armed after an error.
    ///
    /// # Errors
    /// Something does not go away; calling again retries.
    fn close(&mut self) -> Result<(), Failure>;
}

impl Container {
    fn thaw(&self) -> Result<(), Error> {
        self.freezer().map_or(Ok(()), |freezer| freezer.thaw())
    }

    fn now(&mut self, limit: Duration) -> Result<VmState, Error> {
        Ok(match self.wait(limit)? {
            Some(Exit::Code(_)) => VmState::Down(Down::Guest),
            Some(_) => VmState::Down(Down::Lost),
            None if self.freezer().map_or(Ok(false), |freezer| freezer.is_frozen())? => VmState::Paused,
            None => VmState::Running,
        })
    }
}

impl Machine for Container {
    fn id(&self) -> DesktopId {
        Self::id(self)
    }

    fn pid(&self) -> Option<u32> {
        Some(Self::pid(self))
    }

    fn watch(&mut self, limit: Duration) -> Result<VmState, Failure> {
        Ok(self.now(limit)?)
    }

    fn resume(&mut self) -> Result<(), Failure> {
        if let VmState::Down(_) = self.now(Duration::ZERO)? {
            return Err(format!("desktop {} has ended", Self::id(self)).into());
        }
        Ok(self.thaw()?)
    }

    fn pause(&mut self) -> Result<(), Failure> {
        if let VmState::Down(_) = self.now(Duration::ZERO)? {
            return Err(format!("desktop {} has ended", Self::id(self)).into());
        }
        let missing = Missing::Kernel("cgroup v2, or the controller `freezer`".to_owned());
        let freezer = self.freezer().ok_or(Error::Unsupported { op: "let a container stand still", missing })?;
        Ok(freezer.freeze()?)
    }

    fn stop(&mut self, limits: StopLimits, ask: &mut dyn FnMut() -> bool) -> Result<StoppedBy, Failure> {
        if self.try_wait()?.is_some() {
            return Ok(StoppedBy::Itself);
        }
        // One that stands still hears nothing.
        self.thaw()?;
        if ask() && self.wait(limits.guest)?.is_some() {
            return Ok(StoppedBy::Guest);
        }
        self.signal(Signal::TERM)?;
        if self.wait(limits.button)?.is_some() {
            return Ok(StoppedBy::Button);
        }
        Machine::kill(self)?;
        Ok(StoppedBy::Kill)
    }

    fn kill(&mut self) -> Result<(), Failure> {
        // A v1 freezer holds back even SIGKILL.
        self.thaw()?;
        Ok(Self::kill(self)?)
    }

    fn leave(self: Box<Self>) -> Result<serde_json::Value, Failure> {
        Ok(serde_json::to_value(self.detach()?)?)
    }

    fn close(&mut self) -> Result<(), Failure> {
        Ok(Self::close(self)?)
    }
}

impl Machine for Vm {
    fn id(&self) -> DesktopId {
        Self::id(self)
    }

    fn pid(&self) -> Option<u32> {
        Some(Self::pid(self))
    }

    fn watch(&mut self, limit: Duration) -> Result<VmState, Failure> {
        let (deadline, before) = (Instant::now() + limit, self.state());
        loop {
            // Not every event is another state.
            let left = deadline.saturating_duration_since(Instant::now());
            let state = Self::watch(self, left)?;
            if state != before || matches!(state, VmState::Down(_)) || left.is_zero() {
                return Ok(state);
            }
        }
    }

    fn resume(&mut self) -> Result<(), Failure> {
        Ok(Self::resume(self)?)
    }

    fn pause(&mut self) -> Result<(), Failure> {
        Ok(Self::pause(self)?)
    }

    fn stop(&mut self, limits: StopLimits, ask: &mut dyn FnMut() -> bool) -> Result<StoppedBy, Failure> {
        Ok(Self::stop(self, limits, ask)?)
    }

    fn kill(&mut self) -> Result<(), Failure> {
        if let Some(freezer) = self.container().freezer() {
            freezer.thaw()?;
        }
        Ok(self.container().kill()?)
    }

    fn leave(self: Box<Self>) -> Result<serde_json::Value, Failure> {
        Ok(serde_json::to_value(self.detach()?)?)
    }

    fn close(&mut self) -> Result<(), Failure> {
        Ok(Self::close(self)?)
    }
}
