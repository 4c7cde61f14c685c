//! The conformance suite of virtualizers: what each has to do with a running
//! desktop, to run on one's own.
//!
//! ```no_run
//! # fn mine() -> Box<dyn qvd_virt::conformance::Virtualizer> { unimplemented!() }
//! use std::time::Duration;
//!
//! let broken = qvd_virt::conformance::check(mine().as_ref(), Duration::from_secs(60));
//! assert!(broken.is_empty(), "{broken:#?}");
//! ```

use std::{
    fmt,
    time::{Duration, Instant},
};

use qvd_core::DesktopId;
use serde_json::Value;

use crate::{
    Failure, Machine,
    vm::{Down, StopLimits, StoppedBy, VmState},
};

/// What a desktop that the suite asks for does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// It runs until it is ended, and hears nobody who asks it to.
    Waits,
    /// It ends by itself soon after it has begun to run.
    Ends,
    /// It cannot be started.
    Broken,
}

/// What the suite needs of a virtualizer. Its specifications are its own affair.
pub trait Virtualizer: fmt::Debug {
    /// Starts a desktop that does this.
    ///
    /// # Errors
    /// It cannot be started, or one of this number runs.
    fn start(&self, id: DesktopId, behaviour: Behaviour) -> Result<Box<dyn Machine>, Failure>;

    /// Takes over a desktop by what [`Machine::leave`] gave. `None`: it has ended.
    ///
    /// # Errors
    /// Who runs it does not answer.
    fn adopt(&self, record: &Value) -> Result<Option<Box<dyn Machine>>, Failure>;

    /// Removes all desktops of the installation, as a process that knows of none.
    ///
    /// # Errors
    /// Something cannot be removed.
    fn sweep(&self) -> Result<(), Failure>;

    /// Kills the desktop's process behind everybody's back.
    ///
    /// # Errors
    /// It was not found.
    fn strike(&self, machine: &dyn Machine) -> Result<(), Failure>;

    /// What there is of any desktop: nothing once all are closed.
    fn left(&self) -> Vec<String>;
}

/// A rule that does not hold.
#[derive(Debug)]
pub struct Broken {
    /// The rule.
    pub rule: &'static str,
    /// What was seen instead.
    pub seen: String,
}

type Checked = Result<(), String>;

/// Holds a virtualizer to every rule; those that do not hold come back. Nothing
/// waits longer than `limit` for what has to happen.
#[must_use]
pub fn check(virtualizer: &dyn Virtualizer, limit: Duration) -> Vec<Broken> {
    let suite = Suite { virtualizer, limit };
    type Rule<'a> = (&'static str, fn(&Suite<'a>) -> Checked);
    let rules: [Rule<'_>; 7] = [
        ("it runs, stands still, goes on and is stopped", Suite::is_driven),
        ("one that was left is adopted as it was, and once it has ended it is not", Suite::is_adopted),
        ("one number is one desktop", Suite::is_one),
        ("one that ends by itself is seen to", Suite::ends_by_itself),
        ("one that somebody kills is lost, and its number is free", Suite::is_lost),
        ("one that cannot be started leaves nothing", Suite::cannot_start),
        ("what nobody owns is swept", Suite::is_swept),
    ];
    let mut broken = Vec::new();
    for (rule, holds) in rules {
        let outcome = holds(&suite).and_then(|()| match virtualizer.left() {
            left if left.is_empty() => Ok(()),
            left => Err(format!("left behind: {left:?}")),
        });
        if let Err(seen) = outcome {
            broken.push(Broken { rule, seen });
            // The next rule begins with nothing.
            drop(virtualizer.sweep());
        }
    }
    broken
}

struct Suite<'a> {
    virtualizer: &'a dyn Virtualizer,
    limit: Duration,
}

/// Nobody hears in these desktops.
const AT_ONCE: StopLimits = StopLimits { guest: Duration::ZERO, button: Duration::ZERO };

fn said(what: &str) -> impl FnOnce(Failure) -> String {
    move |error| format!("{what}: {}", qvd_core::causes(&*error).join(": "))
}

fn expect(holds: bool, seen: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(seen()) }
}

impl Suite<'_> {
    fn start(&self, behaviour: Behaviour) -> Result<Box<dyn Machine>, String> {
        self.start_as(1, behaviour)
    }

    fn start_as(&self, number: u32, behaviour: Behaviour) -> Result<Box<dyn Machine>, String> {
        let id = DesktopId::new(number).map_err(|error| error.to_string())?;
        let mut machine = self.virtualizer.start(id, behaviour).map_err(said("start"))?;
        expect(machine.id() == id, || format!("it is {}", machine.id()))?;
        let state = machine.watch(Duration::ZERO).map_err(said("look"))?;
        let there = matches!(state, VmState::Waiting | VmState::Running | VmState::Down(Down::Guest));
        expect(there, || format!("after its start: {state:?}"))?;
        machine
            .resume()
            .or_else(|error| if behaviour == Behaviour::Ends { Ok(()) } else { Err(error) })
            .map_err(said("resume"))?;
        Ok(machine)
    }

    /// Waits for a state.
    fn comes(&self, machine: &mut dyn Machine, what: &str, wanted: fn(VmState) -> bool) -> Checked {
        let deadline = Instant::now() + self.limit;
        loop {
            let state = machine.watch(deadline.saturating_duration_since(Instant::now())).map_err(said("watch"))?;
            if wanted(state) {
                return Ok(());
            }
            expect(Instant::now() < deadline, || format!("it is {state:?} instead of {what}"))?;
        }
    }

    fn is(&self, machine: &mut dyn Machine, wanted: VmState) -> Checked {
        let state = machine.watch(Duration::ZERO).map_err(said("look"))?;
        expect(state == wanted, || format!("it is {state:?} instead of {wanted:?}"))
    }

    fn close(machine: &mut dyn Machine) -> Checked {
        machine.close().map_err(said("close"))?;
        machine.close().map_err(said("close again"))
    }

    fn is_driven(&self) -> Checked {
        let mut machine = self.start(Behaviour::Waits)?;
        let machine = machine.as_mut();
        self.is(machine, VmState::Running)?;
        for _ in 0..2 {
            machine.pause().map_err(said("pause"))?;
            self.is(machine, VmState::Paused)?;
            machine.resume().map_err(said("resume"))?;
            self.is(machine, VmState::Running)?;
        }
        // Also one that stands still.
        machine.pause().map_err(said("pause"))?;
        let mut asked = 0;
        let by = machine
            .stop(AT_ONCE, &mut || {
                asked += 1;
                false
            })
            .map_err(said("stop"))?;
        expect(asked == 1, || format!("its init was asked {asked} times"))?;
        expect(matches!(by, StoppedBy::Kill | StoppedBy::Button), || format!("stopped by {by:?}"))?;
        self.comes(machine, "down", |state| matches!(state, VmState::Down(_)))?;
        let by = machine.stop(AT_ONCE, &mut || true).map_err(said("stop again"))?;
        expect(by == StoppedBy::Itself, || format!("stopped again by {by:?}"))?;
        expect(machine.pause().is_err(), || "what has ended was paused".to_owned())?;
        Self::close(machine)
    }

    fn is_adopted(&self) -> Checked {
        let mut machine = self.start(Behaviour::Waits)?;
        let pid = machine.pid();
        let mut record = machine.leave().map_err(said("leave"))?;
        for _ in 0..2 {
            // Records are written to files.
            record = serde_json::from_str(&record.to_string()).map_err(|error| error.to_string())?;
            machine = self.virtualizer.adopt(&record).map_err(said("adopt"))?.ok_or("it was not found")?;
            expect(machine.pid() == pid && machine.id().number() == 1, || format!("another came: {machine:?}"))?;
            self.is(machine.as_mut(), VmState::Running)?;
            record = machine.leave().map_err(said("leave"))?;
        }
        let mut machine = self.virtualizer.adopt(&record).map_err(said("adopt"))?.ok_or("it was not found")?;
        machine.kill().map_err(said("kill"))?;
        self.comes(machine.as_mut(), "down", |state| matches!(state, VmState::Down(Down::Host | Down::Lost)))?;
        Self::close(machine.as_mut())?;
        let gone = self.virtualizer.adopt(&record).map_err(said("adopt what has ended"))?;
        expect(gone.is_none(), || format!("it was adopted after its end: {gone:?}"))
    }

    fn is_one(&self) -> Checked {
        let mut machine = self.start(Behaviour::Waits)?;
        let second = self.start(Behaviour::Waits);
        expect(second.is_err(), || "a second one was started".to_owned())?;
        self.is(machine.as_mut(), VmState::Running)?;
        let mut other = self.start_as(2, Behaviour::Waits)?;
        Self::close(machine.as_mut())?;
        self.is(other.as_mut(), VmState::Running)?;
        // Dropping ends, too.
        drop(other);
        Ok(())
    }

    fn ends_by_itself(&self) -> Checked {
        let mut machine = self.start(Behaviour::Ends)?;
        self.comes(machine.as_mut(), "down by itself", |state| {
            matches!(state, VmState::Down(Down::Guest | Down::Panic))
        })?;
        let by = machine.stop(AT_ONCE, &mut || true).map_err(said("stop"))?;
        expect(by == StoppedBy::Itself, || format!("stopped by {by:?}"))?;
        Self::close(machine.as_mut())
    }

    fn is_lost(&self) -> Checked {
        let mut machine = self.start(Behaviour::Waits)?;
        self.virtualizer.strike(machine.as_ref()).map_err(said("strike"))?;
        self.comes(machine.as_mut(), "lost", |state| state == VmState::Down(Down::Lost))?;
        expect(machine.pause().is_err(), || "what was killed was paused".to_owned())?;
        Self::close(machine.as_mut())?;
        let mut machine = self.start(Behaviour::Waits)?;
        // While nobody owns it.
        let record = {
            let pid = machine.pid();
            let record = machine.leave().map_err(said("leave"))?;
            machine = self.virtualizer.adopt(&record).map_err(said("adopt"))?.ok_or("it was not found")?;
            expect(machine.pid() == pid, || format!("another came: {machine:?}"))?;
            self.virtualizer.strike(machine.as_ref()).map_err(said("strike"))?;
            self.comes(machine.as_mut(), "lost", |state| state == VmState::Down(Down::Lost))?;
            Self::close(machine.as_mut())?;
            record
        };
        let gone = self.virtualizer.adopt(&record).map_err(said("adopt what was killed"))?;
        expect(gone.is_none(), || format!("it was adopted after its end: {gone:?}"))
    }

    fn cannot_start(&self) -> Checked {
        for _ in 0..2 {
            let started = self.start(Behaviour::Broken);
            expect(started.is_err(), || "it was started".to_owned())?;
            let left = self.virtualizer.left();
            expect(left.is_empty(), || format!("left behind: {left:?}"))?;
        }
        // Its number is free.
        let mut machine = self.start(Behaviour::Waits)?;
        Self::close(machine.as_mut())
    }

    fn is_swept(&self) -> Checked {
        let machine = self.start(Behaviour::Waits)?;
        let record = machine.leave().map_err(said("leave"))?;
        expect(!self.virtualizer.left().is_empty(), || "nothing is seen of one that runs".to_owned())?;
        self.virtualizer.sweep().map_err(said("sweep"))?;
        self.virtualizer.sweep().map_err(said("sweep again"))?;
        let gone = self.virtualizer.adopt(&record).map_err(said("adopt what was swept"))?;
        expect(gone.is_none(), || format!("it was adopted after it was swept: {gone:?}"))
    }
}
