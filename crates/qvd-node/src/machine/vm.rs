//! Desktops in virtual machines.

use std::{
    fs::File,
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use qvd_core::{Bytes, UidRange};
use qvd_guest::{BootConfig, Carrier, Identity, Link, LinkError};
use qvd_storage::{Device, Disk, DiskFormat};
use qvd_virt::{
    Container, Exit,
    vm::{BackingSpec, DiskFormat as Format, DiskSpec, StopLimits, StoppedBy, Vm, VmState},
};

use super::{Balloon, END_GRACE, Failure, Machine, MachineRecord, Usage, standstill::Standstill};
use crate::guest::Guest;

/// How long a kernel may take to come up and find its disks: ten seconds by
/// emulation on a host with nothing else to do.
const BOOTS_WITHIN: Duration = Duration::from_secs(120);

/// How long a machine may take to write back what its disks wait for and switch
/// itself off, once its programs have ended.
const OFF_WITHIN: Duration = Duration::from_secs(15);

/// How long an init may take to answer that has just been let go on, before others are
/// looked at.
const LOOKS_FOR: Duration = Duration::from_millis(500);

/// Lines of the console that an error shows.
const CONSOLE_LINES: usize = 4;

/// How often a guest's kernel says what it uses.
const REPORTS_EVERY: Duration = Duration::from_secs(2);

/// A machine, its disks, and the line to its init.
#[derive(Debug)]
pub(crate) struct InVm {
    vm: Vm,
    line: Line,
    standstill: Option<Standstill>,
    /// Whether its clock has to be set, as it has stood still.
    lags: bool,
    /// What it writes to its system, if that is not its memory, and its home.
    disks: Vec<Box<dyn Disk>>,
    /// Whether it was told to say what it uses.
    reports: bool,
}

/// What is said at the socket of its init.
#[derive(Debug)]
enum Line {
    /// Is carried.
    Carried(Carrier),
    /// Waits until its init, which stood still when it was adopted, answers.
    Waits { listener: OwnedFd, runs_since: Option<Instant> },
}

impl Line {
    fn close(&mut self) -> Result<(), LinkError> {
        match self {
            Self::Carried(carrier) => carrier.close(),
            Self::Waits { .. } => Ok(()),
        }
    }
}

/// What makes a machine a desktop.
pub(crate) struct Boot<'a> {
    /// What its init becomes.
    pub(crate) config: &'a BootConfig,
    /// Where the node talks with that.
    pub(crate) listener: OwnedFd,
}

impl InVm {
    const fn new(vm: Vm, line: Line, disks: Vec<Box<dyn Disk>>) -> Self {
        Self { vm, line, standstill: None, lags: false, disks, reports: false }
    }

    /// Lets a machine boot, and tells its init what to become.
    pub(crate) fn boot(mut vm: Vm, disks: Vec<Box<dyn Disk>>, boot: Boot<'_>) -> Result<Self, Failure> {
        let mut tell = || -> Result<Carrier, Failure> {
            vm.resume()?;
            let mut link = Link::connect(vm.link(), BOOTS_WITHIN)?;
            let mut config = boot.config.clone();
            config.identity.time_ns = now_ns();
            link.boot(&config, BOOTS_WITHIN)?;
            Ok(link.carry(boot.listener.try_clone()?)?)
        };
        match tell() {
            Ok(carrier) => Ok(Self::new(vm, Line::Carried(carrier), disks)),
            Err(error) => Err(given_up(vm, error)),
        }
    }

    /// Lets a clone go on as another, whose home is on its one disk.
    pub(crate) fn born(mut vm: Vm, disks: Vec<Box<dyn Disk>>, birth: Birth<'_>) -> Result<Self, Failure> {
        let mut tell = || -> Result<Carrier, Failure> {
            vm.resume()?;
            let link = Link::reconnect(vm.link(), BOOTS_WITHIN)?;
            let carrier = link.carry(birth.listener.try_clone()?)?;
            let identity = Identity { time_ns: now_ns(), ..birth.identity.clone() };
            birth.guest.become_another(identity, BOOTS_WITHIN)?;
            Ok(carrier)
        };
        match tell() {
            Ok(carrier) => Ok(Self::new(vm, Line::Carried(carrier), disks)),
            Err(error) => Err(given_up(vm, error)),
        }
    }

    /// The machine alone, once its session's programs have ended: what a template
    /// is made of.
    pub(crate) fn into_template(self, guest: &Guest) -> Result<Vm, Failure> {
        let Self { vm, mut line, .. } = self;
        if let Err(error) = guest.hold(BOOTS_WITHIN) {
            return Err(given_up(vm, error.into()));
        }
        match line.close() {
            Ok(()) => Ok(vm),
            Err(error) => Err(given_up(vm, error.into())),
        }
    }

    /// Takes over a machine that an earlier node left running. The init of one that stands
    /// still for want of room cannot answer before there is some.
    pub(crate) fn adopt(vm: Vm, disks: Vec<Box<dyn Disk>>, listener: OwnedFd) -> Result<Self, Failure> {
        let line = match vm.state() {
            VmState::Full => Line::Waits { listener, runs_since: None },
            _ => Line::Carried(Link::reconnect(vm.link(), BOOTS_WITHIN)?.carry(listener)?),
        };
        Ok(Self::new(vm, line, disks))
    }

    /// Has what is said to its init carried, if that waited until it runs.
    fn connect(&mut self) -> Result<(), Failure> {
        let Line::Waits { listener, runs_since } = &mut self.line else { return Ok(()) };
        let since = *runs_since.get_or_insert_with(Instant::now);
        match Link::reconnect(self.vm.link(), LOOKS_FOR) {
            Ok(link) => {
                self.line = Line::Carried(link.carry(listener.try_clone()?)?);
                Ok(())
            }
            Err(LinkError::Timeout { .. }) if since.elapsed() < BOOTS_WITHIN => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens a disk for QEMU, with what the back end says is behind it.
    pub(crate) fn disk(serial: &str, disk: &dyn Disk) -> Result<DiskSpec, Failure> {
        let Device { path, format, backing, .. } = disk.attach()?;
        let open = |path: &Path, write| {
            let opened = File::options().read(true).write(write).open(path);
            opened.map_err(|error| format!("cannot open `{}`: {error}", path.display()))
        };
        let backing = match backing {
            Some(base) => {
                let qcow2 = base.format() == DiskFormat::Qcow2;
                Some(Box::new(BackingSpec { file: open(base.path(), false)?.into(), qcow2 }))
            }
            None => None,
        };
        let format = match format {
            DiskFormat::Qcow2 => Format::Qcow2 { backing },
            _ => Format::Raw,
        };
        Ok(DiskSpec { serial: serial.to_owned(), file: open(&path, true)?.into(), format })
    }
}

/// What makes a clone a desktop.
pub(crate) struct Birth<'a> {
    /// Who it becomes.
    pub(crate) identity: &'a Identity,
    /// Where the node talks with its init.
    pub(crate) listener: OwnedFd,
    /// Its init, at that place.
    pub(crate) guest: &'a Guest,
}

/// What a clock is set to that is set now: a boot and a template take a while.
fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Ends a machine that did not become what it was to, and shows why.
fn given_up(mut vm: Vm, source: Failure) -> Failure {
    let said = last_lines(&vm.console().unwrap_or_default());
    if let Err(left) = vm.close() {
        tracing::warn!(desktop = %vm.id(), error = &left as &dyn std::error::Error, "machine left behind");
    }
    Silent { said, source }.into()
}

/// A machine whose init did not become a desktop's.
#[derive(Debug, thiserror::Error)]
#[error("the machine did not become a desktop; its console ended with: {said}")]
struct Silent {
    said: String,
    source: Failure,
}

fn last_lines(console: &str) -> String {
    let lines: Vec<_> = console.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let last = lines.get(lines.len().saturating_sub(CONSOLE_LINES)..).unwrap_or_default().join(" | ");
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    if last.is_empty() { "nothing".to_owned() } else { last.chars().map(plain).collect() }
}

impl Machine for InVm {
    fn container(&self) -> &Container {
        self.vm.container()
    }

    fn exit(&mut self) -> Result<Option<Exit>, Failure> {
        Ok(self.vm.wait(Duration::ZERO)?)
    }

    /// Machines have no sound device.
    fn uses_sound(&self) -> Result<bool, Failure> {
        Ok(false)
    }

    fn has_streams(&self, guest: &Guest) -> Result<bool, Failure> {
        Ok(guest.stats()?.streams)
    }

    fn root(&self) -> Result<Option<(OwnedFd, UidRange)>, Failure> {
        // What it writes is on a file system that nobody but itself is to trust.
        Ok(None)
    }

    fn memory(&mut self, still: bool) -> Result<Usage, Failure> {
        let resident = self.vm.container().memory()?;
        let unasked = Usage { resident, used: resident, left: None };
        if still || self.vm.is_clone() {
            return Ok(unasked);
        }
        if !self.reports {
            self.vm.report_use(REPORTS_EVERY)?;
            self.reports = true;
        }
        // A guest without that driver, or one that has not got so far.
        let Some(seen) = self.vm.guest_use()? else { return Ok(unasked) };
        Ok(Usage { resident, used: seen.used(), left: Some(self.vm.memory_left()?) })
    }

    /// What a clone has not written to is the template's once already.
    fn is_mergeable(&self) -> bool {
        !self.vm.is_clone()
    }

    /// A clone has none: the kernel has what clones have in common once already.
    fn balloon(&mut self) -> Option<&mut dyn Balloon> {
        (!self.vm.is_clone()).then_some(self)
    }

    fn stands_still(&mut self, guest: &Guest) -> Result<bool, Failure> {
        let stood = self.standstill.is_some();
        Standstill::tend(&mut self.standstill, &mut self.vm)?;
        if self.standstill.is_some() {
            return Ok(true);
        }
        self.lags |= stood;
        // Its clock stood still as well.
        if self.lags && matches!(self.line, Line::Carried(_)) {
            self.lags = false;
            guest.set_clock(now_ns())?;
        }
        Ok(false)
    }

    /// A guest that does not keep to the protocol is not listened to again.
    fn cut_off(&mut self) -> Option<String> {
        if self.standstill.is_none()
            && let Err(error) = self.connect()
        {
            return Some(qvd_core::causes(&*error).join(": "));
        }
        let Line::Carried(carrier) = &mut self.line else { return None };
        let over = carrier.is_over();
        over.then(|| carrier.close().err()).flatten().map(|error| qvd_core::causes(&error).join(": "))
    }

    fn wait_end(&mut self, grace: Duration) -> Result<bool, Failure> {
        let limits = StopLimits { guest: grace + END_GRACE + OFF_WITHIN, button: Duration::ZERO };
        Ok(self.vm.stop(limits, || true)? != StoppedBy::Kill)
    }

    fn end(&mut self) -> Result<(), Failure> {
        self.vm.close()?;
        if let Err(error) = self.line.close() {
            // It ends with the machine: how is of no account any more.
            tracing::debug!(desktop = %self.vm.id(), %error, "line to a machine that has ended");
        }
        Ok(())
    }

    fn close_storage(&mut self) -> Result<(), Failure> {
        for disk in &mut self.disks {
            disk.close()?;
        }
        Ok(())
    }

    fn record(&self) -> Result<MachineRecord, Failure> {
        Ok(MachineRecord::Vm(self.vm.record()?))
    }

    fn leave(self: Box<Self>) -> Result<(), Failure> {
        let Self { vm, mut line, .. } = *self;
        vm.detach()?;
        Ok(line.close()?)
    }
}

impl Balloon for InVm {
    fn leave(&mut self, memory: Bytes) -> Result<(), Failure> {
        Ok(self.vm.balloon(memory)?)
    }

    fn merge(&mut self) -> Result<(), Failure> {
        Ok(self.vm.allow_merging(true)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_shows_the_end_of_the_console_in_one_line() {
        assert_eq!(last_lines("a\r\n\nb\nc\nd\ne\x1b[0m\n"), "b | c | d | e [0m");
        assert_eq!(last_lines(" \n"), "nothing");
    }
}
