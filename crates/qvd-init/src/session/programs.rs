//! The programs of a session: which run, which are on their way down, and when one that
//! died may start again.

use std::{ops::Index, time::Duration};

use qvd_core::Geometry;

use super::events::Action;

/// Time since the init began.
pub(crate) type Moment = Duration;

/// A program told to end is killed after this.
const KILL_AFTER: Duration = Duration::from_secs(2);
/// Shortest and longest pause before something that died is started again.
pub(super) const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// What ran this long counts as having worked: the pause is short again.
pub(super) const WORKED: Duration = Duration::from_secs(30);

/// Pause before the next start after `failures` quick deaths in a row.
pub(super) fn pause(failures: u32) -> Duration {
    PAUSE.0.saturating_mul(1 << failures.min(8)).min(PAUSE.1)
}

/// Quick deaths in a row, and when to start again, of something that ran from
/// `since` until `now` and had died `failures` times before.
pub(crate) fn restart(failures: u32, since: Moment, now: Moment) -> (u32, Moment) {
    let failures = if now.saturating_sub(since) >= WORKED { 0 } else { failures };
    (failures.saturating_add(1), now + pause(failures))
}

/// What a program is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    /// The NX agent: X server of the session.
    Agent,
    /// The RFB server of the head.
    Head,
    /// The head's NX proxy, between its RFB server and the agent.
    Proxy,
    /// Keeps the agent's window as large as the head's screen.
    Fit,
    /// The window manager or desktop environment.
    WindowManager,
    /// Waits until the window manager manages.
    Watch,
}

impl Role {
    const ALL: [Self; 6] = [Self::Agent, Self::Head, Self::Proxy, Self::Fit, Self::WindowManager, Self::Watch];
}

/// A program, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Program {
    #[default]
    Down,
    Up {
        since: Moment,
    },
    /// Told to end; killed at this moment.
    Ending {
        kill: Option<Moment>,
    },
}

impl Program {
    pub(super) const fn is_up(self) -> bool {
        matches!(self, Self::Up { .. })
    }
    pub(super) const fn is_down(self) -> bool {
        matches!(self, Self::Down)
    }
}

/// Deaths in a row, and when the next start may be.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Backoff {
    pub(super) failures: u32,
    pub(super) not_before: Moment,
}

impl Backoff {
    pub(super) fn died(&mut self, now: Moment, since: Moment) {
        (self.failures, self.not_before) = restart(self.failures, since, now);
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Programs([Program; Role::ALL.len()]);

impl Index<Role> for Programs {
    type Output = Program;

    fn index(&self, role: Role) -> &Program {
        // One place for each role.
        &self.0[role as usize]
    }
}

impl Programs {
    pub(super) fn start(&mut self, now: Moment, role: Role, geometry: Geometry, out: &mut Vec<Action>) {
        self.set(role, Program::Up { since: now });
        out.push(Action::Start(role, geometry));
    }

    /// Tells a program to end, if it is up.
    pub(super) fn end(&mut self, now: Moment, role: Role, out: &mut Vec<Action>) {
        if role == Role::Proxy {
            // It keeps nothing, and told to end it would say good-bye for a
            // second; the agent notices its death at once.
            self.kill(role, out);
        } else if self[role].is_up() {
            self.set(role, Program::Ending { kill: Some(now + KILL_AFTER) });
            out.push(Action::End(role));
        }
    }

    /// Has a program killed, if it is up.
    pub(super) fn kill(&mut self, role: Role, out: &mut Vec<Action>) {
        if self[role].is_up() {
            self.set(role, Program::Ending { kill: None });
            out.push(Action::Kill(role));
        }
    }

    /// Has those killed that did not end when they were told to.
    pub(super) fn kill_overdue(&mut self, now: Moment, out: &mut Vec<Action>) {
        for role in Role::ALL {
            if let Program::Ending { kill: Some(moment) } = self[role]
                && now >= moment
            {
                self.set(role, Program::Ending { kill: None });
                out.push(Action::Kill(role));
            }
        }
    }

    /// Notes that a program is down. Says since when it was up, unless it was told to end.
    pub(super) fn ended(&mut self, role: Role) -> Option<Moment> {
        let since = if let Program::Up { since } = self[role] { Some(since) } else { None };
        self.set(role, Program::Down);
        since
    }

    /// When the next one is to be killed.
    pub(super) fn deadline(&self) -> Option<Moment> {
        let ending = |program: &Program| if let Program::Ending { kill } = *program { kill } else { None };
        self.0.iter().filter_map(ending).min()
    }

    fn set(&mut self, role: Role, program: Program) {
        self.0[role as usize] = program;
    }
}
