//! A domain.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use qvd_core::{Bytes, DesktopId};
use qvd_virt::{
    Failure, Machine,
    vm::{Down, StopLimits, StoppedBy, VmState},
};
use serde::{Deserialize, Serialize};
use virt::domain::Domain;
use virt_sys::{
    VIR_DOMAIN_AFFECT_LIVE, VIR_DOMAIN_CRASHED, VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_IOERROR, VIR_DOMAIN_SHUTOFF,
    VIR_DOMAIN_SHUTOFF_DESTROYED, VIR_DOMAIN_SHUTOFF_SHUTDOWN, VIR_DOMAIN_UNDEFINE_MANAGED_SAVE,
    VIR_DOMAIN_UNDEFINE_NVRAM, VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA,
};

use crate::{Error, Files, events::Changes, hypervisor::failed};

/// A domain that runs, or one that has ended and is not yet removed.
///
/// Dropping it ends and removes it; [`LibvirtVm::detach`] leaves it for another
/// process to adopt. It runs on when this process dies.
#[must_use = "dropping it ends the domain"]
#[derive(Debug)]
pub struct LibvirtVm {
    id: DesktopId,
    name: String,
    domain: Domain,
    changes: Arc<Changes>,
    dir: PathBuf,
    /// It has been started, and its processors have not run.
    fresh: bool,
    state: VmState,
    /// Whether it is ours to remove.
    armed: bool,
}

impl LibvirtVm {
    pub(crate) const fn new(
        id: DesktopId,
        name: String,
        domain: Domain,
        changes: Arc<Changes>,
        dir: PathBuf,
        fresh: bool,
    ) -> Self {
        Self { id, name, domain, changes, dir, fresh, state: VmState::Waiting, armed: true }
    }

    pub(crate) const fn domain(&self) -> &Domain {
        &self.domain
    }

    /// Nothing of it is ours.
    pub(crate) fn leave(mut self) {
        self.armed = false;
    }

    /// Its number.
    #[must_use]
    pub const fn id(&self) -> DesktopId {
        self.id
    }

    /// Socket that the guest's init is reached by.
    #[must_use]
    pub fn link(&self) -> PathBuf {
        self.dir.join("link.sock")
    }

    /// Socket of the guest's console; what nobody reads is lost.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.sock")
    }

    /// What it did when it was looked at last.
    #[must_use]
    pub const fn state(&self) -> VmState {
        self.state
    }

    /// Asks libvirt what it does.
    pub(crate) fn look(&mut self) -> Result<VmState, Error> {
        let (state, reason) = self.domain.get_state().map_err(failed(format!("look at domain `{}`", self.name)))?;
        let reason = u32::try_from(reason).unwrap_or(0);
        let seen = match state {
            VIR_DOMAIN_PAUSED if self.fresh => VmState::Waiting,
            // Disks have no other error that a domain stands still for; see `xml`.
            VIR_DOMAIN_PAUSED if reason == VIR_DOMAIN_PAUSED_IOERROR => VmState::Full,
            VIR_DOMAIN_PAUSED => VmState::Paused,
            VIR_DOMAIN_CRASHED => VmState::Down(Down::Panic),
            VIR_DOMAIN_SHUTOFF => VmState::Down(match reason {
                VIR_DOMAIN_SHUTOFF_SHUTDOWN => Down::Guest,
                VIR_DOMAIN_SHUTOFF_DESTROYED => Down::Host,
                _ => Down::Lost,
            }),
            _ => VmState::Running,
        };
        // Why it went down first is what counts.
        if !matches!(self.state, VmState::Down(_)) {
            self.state = seen;
        }
        Ok(self.state)
    }

    /// Waits at most `limit` for its state to become another, and says what it is.
    /// One that is down stays so.
    ///
    /// # Errors
    /// libvirt does not answer.
    pub fn watch(&mut self, limit: Duration) -> Result<VmState, Error> {
        let deadline = Instant::now() + limit;
        let before = self.state;
        loop {
            let count = self.changes.count(&self.name);
            let state = self.look()?;
            if state != before || matches!(state, VmState::Down(_)) || Instant::now() >= deadline {
                return Ok(self.state);
            }
            self.changes.wait(&self.name, count, deadline);
        }
    }

    /// Waits at most `limit` until it is down; why, if it is.
    ///
    /// # Errors
    /// libvirt does not answer.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<Down>, Error> {
        let deadline = Instant::now() + limit;
        loop {
            match self.watch(deadline.saturating_duration_since(Instant::now()))? {
                VmState::Down(why) => return Ok(Some(why)),
                _ if Instant::now() >= deadline => return Ok(None),
                _ => {}
            }
        }
    }

    /// Lets its processors run, for the first time or again.
    ///
    /// # Errors
    /// libvirt refuses.
    pub fn resume(&mut self) -> Result<(), Error> {
        self.domain.resume().map_err(failed(format!("resume domain `{}`", self.name)))?;
        self.fresh = false;
        self.look().map(drop)
    }

    /// Lets its processors stand still.
    ///
    /// # Errors
    /// libvirt refuses.
    pub fn pause(&mut self) -> Result<(), Error> {
        self.domain.suspend().map_err(failed(format!("pause domain `{}`", self.name)))?;
        self.look().map(drop)
    }

    /// Has the guest keep no more than `memory`.
    ///
    /// # Errors
    /// It has no balloon, or libvirt refuses.
    pub fn balloon(&mut self, memory: Bytes) -> Result<(), Error> {
        let set = self.domain.set_memory_flags(memory.get() >> 10, VIR_DOMAIN_AFFECT_LIVE);
        set.map(drop).map_err(failed(format!("set the memory of domain `{}`", self.name)))
    }

    /// Ends it now.
    ///
    /// # Errors
    /// libvirt refuses.
    pub fn kill(&mut self) -> Result<(), Error> {
        destroy(&self.domain, &self.name)?;
        self.look().map(drop)
    }

    /// Stops it: the guest's init is asked first, by `ask`, which says whether it
    /// was reached; then the power button is pressed; then it is ended. Each step
    /// has its deadline.
    ///
    /// # Errors
    /// It cannot even be ended.
    pub fn stop(&mut self, limits: StopLimits, ask: impl FnOnce() -> bool) -> Result<StoppedBy, Error> {
        if self.wait(Duration::ZERO)?.is_some() {
            return Ok(StoppedBy::Itself);
        }
        if matches!(self.state, VmState::Paused | VmState::Waiting | VmState::Full) {
            // It could not hear. If it cannot go on, it is ended below.
            let _resumed = self.resume();
        }
        if ask() && self.wait(limits.guest)?.is_some() {
            return Ok(StoppedBy::Guest);
        }
        if self.domain.shutdown().is_ok() && self.wait(limits.button)?.is_some() {
            return Ok(StoppedBy::Button);
        }
        self.kill()?;
        Ok(StoppedBy::Kill)
    }

    /// What is needed to adopt it later.
    ///
    /// # Errors
    /// libvirt does not answer.
    pub fn record(&self) -> Result<DomainRecord, Error> {
        let uuid = self.domain.get_uuid_string().map_err(failed(format!("look at domain `{}`", self.name)))?;
        Ok(DomainRecord { id: self.id, uuid, dir: self.dir.clone() })
    }

    /// Lets go of it without ending it.
    ///
    /// # Errors
    /// As [`LibvirtVm::record`]; then it is ended, as nobody could adopt it.
    pub fn detach(self) -> Result<DomainRecord, Error> {
        let record = self.record()?;
        self.leave();
        Ok(record)
    }

    /// Ends what still runs and removes it. Idempotent; still armed after an error.
    ///
    /// # Errors
    /// libvirt refuses; calling again retries.
    pub fn close(&mut self) -> Result<(), Error> {
        if !self.armed {
            return Ok(());
        }
        destroy(&self.domain, &self.name)?;
        // What it was is seen before it is forgotten.
        self.look()?;
        undefine(&self.domain, &self.name)?;
        Files::remove(&self.dir)?;
        self.changes.forget(&self.name);
        self.armed = false;
        Ok(())
    }
}

impl Drop for LibvirtVm {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(desktop = %self.id, %error, "domain left behind");
        }
    }
}

/// Ends a domain; one that has ended is.
pub(crate) fn destroy(domain: &Domain, name: &str) -> Result<(), Error> {
    match domain.destroy() {
        // It may also be refused because it ended meanwhile.
        Err(error) if domain.is_active().unwrap_or(true) => Err(failed(format!("end domain `{name}`"))(error)),
        _ => Ok(()),
    }
}

/// Removes the definition of a domain, and what libvirt keeps for it.
pub(crate) fn undefine(domain: &Domain, name: &str) -> Result<(), Error> {
    if !domain.is_persistent().map_err(failed(format!("look at domain `{name}`")))? {
        return Ok(());
    }
    let all = VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA | VIR_DOMAIN_UNDEFINE_NVRAM;
    // Some drivers have none of this.
    domain.undefine_flags(all).or_else(|_| domain.undefine()).map_err(failed(format!("remove domain `{name}`")))
}

/// What names a domain for ever.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DomainRecord {
    id: DesktopId,
    uuid: String,
    dir: PathBuf,
}

impl DomainRecord {
    /// Which desktop it is.
    #[must_use]
    pub const fn id(&self) -> DesktopId {
        self.id
    }

    pub(crate) fn uuid(&self) -> &str {
        &self.uuid
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Machine for LibvirtVm {
    fn id(&self) -> DesktopId {
        self.id
    }

    /// libvirt does not tell it.
    fn pid(&self) -> Option<u32> {
        None
    }

    fn watch(&mut self, limit: Duration) -> Result<VmState, Failure> {
        Ok(Self::watch(self, limit)?)
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
        Ok(Self::kill(self)?)
    }

    fn leave(self: Box<Self>) -> Result<serde_json::Value, Failure> {
        Ok(serde_json::to_value(self.detach()?)?)
    }

    fn close(&mut self) -> Result<(), Failure> {
        Ok(Self::close(self)?)
    }
}
