//! What a desktop runs in: a container, or a virtual machine of the same image.

mod container;
mod hypervisor;
mod standstill;
mod templates;
mod vm;

use std::{error::Error as StdError, fmt, os::fd::OwnedFd, time::Duration};

use qvd_core::{Bytes, UidRange};
use qvd_virt::{Container, ContainerRecord, Exit, vm::VmRecord};
use serde::{Deserialize, Serialize};

pub(crate) use self::{
    container::InContainer,
    hypervisor::{Machines, probe_machines},
    templates::{Kind, Ready, Templates},
    vm::{Birth, Boot, InVm},
};
use crate::guest::Guest;

/// What a part of a machine reports; whose it was is said around it.
pub(crate) type Failure = Box<dyn StdError + Send + Sync>;

/// How long a desktop has beyond its programs' grace to end by itself.
const END_GRACE: Duration = Duration::from_secs(2);

/// A running desktop's processes, and the storage that is theirs alone.
pub(crate) trait Machine: fmt::Debug + Send {
    /// What confines all of them: a machine's is QEMU's.
    fn container(&self) -> &Container;

    /// How its first process ended, if it did.
    fn exit(&mut self) -> Result<Option<Exit>, Failure>;

    /// Whether somebody may be listening to it.
    fn uses_sound(&self) -> Result<bool, Failure>;

    /// Whether its programs talk with other hosts. `guest` is its init.
    fn has_streams(&self, guest: &Guest) -> Result<bool, Failure>;

    /// Its root directory as it is now, and the range that owners in it are
    /// shifted by; none if only what runs in it can read that.
    fn root(&self) -> Result<Option<(OwnedFd, UidRange)>, Failure>;

    /// What it has of the host's memory, and needs. One that stands still is not
    /// asked itself.
    fn memory(&mut self, still: bool) -> Result<Usage, Failure>;

    /// Whether its pages are merged with equal ones of others, or can be.
    fn is_mergeable(&self) -> bool;

    /// What moves its memory while it runs; `None` where nothing does.
    fn balloon(&mut self) -> Option<&mut dyn Balloon>;

    /// How often its programs were refused a process because they had as many as
    /// they may, where that is the host's kernel's matter.
    fn refused_processes(&self) -> Result<u64, Failure> {
        Ok(0)
    }

    /// Looks whether it stands still though nobody wishes that, and does what can be done;
    /// true if it does. `guest` is its init.
    fn stands_still(&mut self, _guest: &Guest) -> Result<bool, Failure> {
        Ok(false)
    }

    /// Why nobody can talk with its init any more, if so; told once.
    fn cut_off(&mut self) -> Option<String> {
        None
    }

    /// Waits until it has ended by itself, as its init was asked to; false if it did
    /// not in time.
    fn wait_end(&mut self, grace: Duration) -> Result<bool, Failure>;

    /// Ends all of its processes now, if any are left. After an error, calling
    /// again tries again.
    fn end(&mut self) -> Result<(), Failure>;

    /// Lets go of its storage, once no process is left: what is volatile is
    /// forgotten. After an error, calling again tries again.
    fn close_storage(&mut self) -> Result<(), Failure>;

    /// What the next node needs to take it over.
    fn record(&self) -> Result<MachineRecord, Failure>;

    /// Lets go of it while it runs.
    fn leave(self: Box<Self>) -> Result<(), Failure>;
}

/// What a machine has and needs of memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Usage {
    /// What it has of the host's.
    pub(crate) resident: Bytes,
    /// What it works with.
    pub(crate) used: Bytes,
    /// What its balloon leaves it, if it has one and answers.
    pub(crate) left: Option<Bytes>,
}

/// Memory of its own that a machine can be asked to give up, and that can be
/// merged with others'.
pub(crate) trait Balloon {
    /// Leaves it so much.
    fn leave(&mut self, memory: Bytes) -> Result<(), Failure>;

    /// Lets the kernel merge its pages with equal ones of others that do.
    fn merge(&mut self) -> Result<(), Failure>;
}

/// What is remembered of a running machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum MachineRecord {
    /// Its container.
    Container(ContainerRecord),
    /// Its QEMU.
    Vm(VmRecord),
}
