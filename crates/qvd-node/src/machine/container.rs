//! Desktops in containers.

use std::{os::fd::OwnedFd, path::PathBuf, time::Duration};

use qvd_core::UidRange;
use qvd_storage::Root;
use qvd_virt::{Container, Exit};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::{Mode, OFlags},
};

use super::{Balloon, END_GRACE, Failure, Machine, MachineRecord, Usage};
use crate::guest::Guest;

/// A container and its root.
#[derive(Debug)]
pub(crate) struct InContainer {
    container: Container,
    root: Box<dyn Root>,
    ids: UidRange,
    /// Whether its memory is offered for merging.
    merges: bool,
}

impl InContainer {
    pub(crate) fn new(container: Container, root: Box<dyn Root>, ids: UidRange, merges: bool) -> Self {
        Self { container, root, ids, merges }
    }
}

impl Machine for InContainer {
    fn container(&self) -> &Container {
        &self.container
    }

    fn exit(&mut self) -> Result<Option<Exit>, Failure> {
        Ok(self.container.try_wait()?)
    }

    fn uses_sound(&self) -> Result<bool, Failure> {
        Ok(self.container.uses_sound()?)
    }

    fn has_streams(&self, _: &Guest) -> Result<bool, Failure> {
        let net: PathBuf = format!("/proc/{}/net", self.container.pid()).into();
        Ok(qvd_guest::has_streams(&net))
    }

    fn root(&self) -> Result<Option<(OwnedFd, UidRange)>, Failure> {
        let root: PathBuf = format!("/proc/{}/root", self.container.pid()).into();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(&root, flags, Mode::empty()).map_err(std::io::Error::from)?;
        // The number may be another's by now; the init was not reaped by us.
        if rustix::event::poll(&mut [PollFd::new(&self.container.pidfd(), PollFlags::IN)], Some(&Timespec::default()))?
            > 0
        {
            return Err("its first process has ended".into());
        }
        Ok(Some((root, self.ids)))
    }

    fn memory(&mut self, _: bool) -> Result<Usage, Failure> {
        let used = self.container.memory()?;
        Ok(Usage { resident: used, used, left: None })
    }

    fn is_mergeable(&self) -> bool {
        self.merges
    }

    /// What it does not use is the host's already.
    fn balloon(&mut self) -> Option<&mut dyn Balloon> {
        None
    }

    fn refused_processes(&self) -> Result<u64, Failure> {
        Ok(self.container.refused_processes()?)
    }

    fn wait_end(&mut self, grace: Duration) -> Result<bool, Failure> {
        Ok(self.container.wait(grace + END_GRACE)?.is_some())
    }

    fn end(&mut self) -> Result<(), Failure> {
        Ok(self.container.close()?)
    }

    fn close_storage(&mut self) -> Result<(), Failure> {
        Ok(self.root.close()?)
    }

    fn record(&self) -> Result<MachineRecord, Failure> {
        Ok(MachineRecord::Container(self.container.record()?))
    }

    fn leave(self: Box<Self>) -> Result<(), Failure> {
        self.container.detach()?;
        Ok(())
    }
}
