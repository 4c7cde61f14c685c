//! What is to be done for the session, decided from what is seen alone.
//!
//! The session lives in an NX agent. It is shown through one *front* at a
//! time: the *head*, an RFB server with an NX proxy beside it, for browsers;
//! or the proxy of a native client. Changing the front means suspending the
//! agent and resuming it elsewhere. [`Session::step`] compares what is with
//! what is wanted and says what to do next; it is called after every event,
//! so a signal that the agent ignored or a program that died is simply met
//! again.

mod events;
mod programs;

use std::{collections::BTreeMap, time::Duration};

use qvd_core::{DisplayKind, Geometry};
use qvd_guest::{Exit, SessionState};

use self::programs::{Backoff, Program, Programs};
pub(crate) use self::{
    events::{Action, AgentState, Client, Event, Seen},
    programs::{Moment, Role, restart},
};
use crate::options::Occasion;

/// A running agent takes up to 1.2 s to suspend where a client waits 20 s, and ignores
/// signals meanwhile; asked again after this part of what a client waits, in case it ignored the
/// first. One that is emulated takes longer, and would be asked while it is at it.
const SUSPEND_AGAIN: (u32, u32) = (3, 40);
/// A suspended agent resumes at once, or was still busy and heard nothing.
const RESUME_AGAIN: Duration = Duration::from_millis(25);
/// Between two tries to connect to a socket that just appeared.
const CONNECT_AGAIN: Duration = Duration::from_millis(5);
/// A window manager that never announces itself counts as up after this.
const SILENT_WINDOW_MANAGER: Duration = Duration::from_secs(15);
/// A program of the session's that failed within this time may not have reached
/// the display: an agent between two fronts lets nobody in. It is tried again
/// this often.
const UNREACHED: (Duration, u32) = (Duration::from_secs(5), 3);

/// Who shows the session, or was the last to be given it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Front {
    Nobody,
    Head,
    Native,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    client: Client,
    kind: DisplayKind,
    until: Moment,
    step: &'static str,
}

/// One of the session's programs that failed at once.
#[derive(Debug, Clone, Copy)]
struct Unreached {
    since: Moment,
    backoff: Backoff,
    due: bool,
}

/// The session of a desktop.
#[derive(Debug)]
pub(crate) struct Session {
    geometry: Geometry,
    /// How long a client waits for its display at most.
    attach_within: Duration,
    seen: Seen,
    programs: Programs,
    front: Front,
    /// Whether the head shown now was made for a size other than the client's.
    resize: Option<Geometry>,
    /// Whether it is being given another size. A client that comes meanwhile
    /// is thrown out: it has not said yet that it follows a screen's size.
    resizing: bool,
    managed: bool,
    /// Whether no window manager is to run.
    held: bool,
    /// Whether it was held, and its window manager is not up yet.
    released: bool,
    autostarted: Option<Moment>,
    unreached: BTreeMap<usize, Unreached>,
    waiting: Option<Waiting>,
    agent_backoff: Backoff,
    manager_backoff: Backoff,
    head_backoff: Backoff,
    helper_backoff: Backoff,
    toggle_not_before: Moment,
    connect_not_before: Moment,
    state: SessionState,
    ready_at: Option<Moment>,
}

impl Session {
    /// A session that has not begun; its first screen has this size, and clients wait for
    /// their display at most `attach_within`.
    pub(crate) fn new(geometry: Geometry, attach_within: Duration) -> Self {
        Self {
            geometry,
            attach_within,
            seen: Seen::default(),
            programs: Programs::default(),
            front: Front::Nobody,
            resize: None,
            resizing: false,
            managed: false,
            held: false,
            released: false,
            autostarted: None,
            unreached: BTreeMap::new(),
            waiting: None,
            agent_backoff: Backoff::default(),
            manager_backoff: Backoff::default(),
            head_backoff: Backoff::default(),
            helper_backoff: Backoff::default(),
            toggle_not_before: Moment::ZERO,
            connect_not_before: Moment::ZERO,
            state: SessionState::Starting,
            ready_at: None,
        }
    }

    /// How the session is.
    pub(crate) const fn state(&self) -> SessionState {
        self.state
    }

    /// When the window manager was first up.
    pub(crate) const fn ready_at(&self) -> Option<Moment> {
        self.ready_at
    }

    /// Whether a native client shows the session.
    pub(crate) fn is_native(&self) -> bool {
        self.front == Front::Native && self.seen.agent == AgentState::Running
    }

    /// Whether the session is shown, and not about to change its front.
    fn is_shown(&self) -> bool {
        self.seen.agent == AgentState::Running
            && match self.front {
                Front::Head => self.programs[Role::Proxy].is_up(),
                Front::Native => true,
                Front::Nobody => false,
            }
    }

    /// Takes note of an event.
    pub(crate) fn note(&mut self, now: Moment, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::Seen(seen) => self.look(seen, out),
            Event::Attach(client, kind) => self.attach(now, client, kind, out),
            Event::Gone(client) | Event::Connected(client) => {
                if let Some(waiting) = self.waiting.take_if(|waiting| waiting.client == client)
                    && matches!(event, Event::Connected(_))
                    && matches!(waiting.kind, DisplayKind::Nx { .. })
                {
                    self.front = Front::Native;
                    self.seen.listens = false;
                }
            }
            Event::ProgramEnded(index, exit) => self.program_ended(now, index, exit),
            Event::Resized => self.resizing = false,
            Event::NotConnected => self.connect_not_before = now + CONNECT_AGAIN,
            Event::Hold => self.hold(out),
            Event::Release => {
                (self.held, self.released) = (false, true);
                self.manager_backoff = Backoff::default();
            }
            Event::Ended(role, exit) => self.ended(now, role, exit, out),
        }
    }

    fn look(&mut self, mut seen: Seen, out: &mut Vec<Action>) {
        if !self.programs[Role::Agent].is_up() {
            // What a former agent left says nothing about the next.
            (seen.agent, seen.listens, seen.session_socket) = (AgentState::Unknown, false, false);
        } else if seen.agent == AgentState::Unknown {
            seen.agent = self.seen.agent;
        }
        if seen.agent != self.seen.agent {
            self.toggle_not_before = Moment::ZERO;
            if seen.agent == AgentState::Suspended {
                self.front = Front::Nobody;
            }
            // What a window lost while nobody showed it, the agent does
            // not always ask its program for again.
            if seen.agent == AgentState::Running && self.seen.agent != AgentState::Starting {
                out.push(Action::Redraw);
            }
        }
        self.seen = seen;
    }

    fn attach(&mut self, now: Moment, client: Client, kind: DisplayKind, out: &mut Vec<Action>) {
        if let Some(before) = self.waiting.take() {
            out.push(Action::Refuse(before.client, "open the display", "another client took it"));
        }
        self.waiting = Some(Waiting { client, kind, until: now + self.attach_within, step: "" });
        if let DisplayKind::Rfb { geometry } = kind
            && !self.programs[Role::Head].is_down()
        {
            self.resize = Some(geometry);
        }
        self.connect_not_before = Moment::ZERO;
        self.head_backoff = Backoff::default();
    }

    /// Ends the session's programs, but not what shows them.
    fn hold(&mut self, out: &mut Vec<Action>) {
        self.held = true;
        self.managed = false;
        (self.ready_at, self.autostarted) = (None, None);
        self.unreached.clear();
        for role in [Role::WindowManager, Role::Watch] {
            self.programs.kill(role, out);
        }
    }

    fn ended(&mut self, now: Moment, role: Role, exit: Exit, out: &mut Vec<Action>) {
        // Since when it was up, unless it was told to end.
        let since = self.programs.ended(role);
        match role {
            Role::Agent => {
                self.agent_backoff.died(now, since.unwrap_or(now));
                self.seen = Seen::default();
                self.front = Front::Nobody;
                self.managed = false;
                self.autostarted = None;
                self.unreached.clear();
                for role in [Role::WindowManager, Role::Watch, Role::Proxy, Role::Fit, Role::Head] {
                    self.programs.end(now, role, out);
                }
            }
            Role::Head => {
                if let Some(since) = since {
                    self.head_backoff.died(now, since);
                }
                self.seen.head_socket = false;
                self.resize = None;
                self.resizing = false;
                self.programs.end(now, Role::Proxy, out);
                self.programs.end(now, Role::Fit, out);
            }
            Role::WindowManager => {
                self.managed = false;
                // A window manager that ends well was told to: the user signed
                // out. One that crashed is replaced and the programs stay.
                if since.is_some() && exit == Exit::Code(0) {
                    self.programs.end(now, Role::Agent, out);
                }
                self.manager_backoff.died(now, since.unwrap_or(now));
                self.programs.end(now, Role::Watch, out);
            }
            Role::Watch if since.is_some() && exit == Exit::Code(0) => self.managed = true,
            Role::Proxy | Role::Fit | Role::Watch => {
                if let Some(since) = since {
                    self.helper_backoff.died(now, since);
                }
            }
        }
    }

    fn program_ended(&mut self, now: Moment, index: usize, exit: Exit) {
        let Some(since) = self.autostarted else { return };
        let first = Unreached { since, backoff: Backoff::default(), due: false };
        let program = self.unreached.entry(index).or_insert(first);
        program.due = exit != Exit::Code(0)
            && now.saturating_sub(program.since) < UNREACHED.0
            && program.backoff.failures < UNREACHED.1;
        if program.due {
            program.backoff.died(now, program.since);
        }
    }

    /// Whom the session is wanted by.
    fn wanted(&self) -> Front {
        // An agent aborts when its first proxy fails it, so that is always ours.
        if matches!(self.seen.agent, AgentState::Unknown | AgentState::Starting) {
            return Front::Head;
        }
        match self.waiting.map(|waiting| waiting.kind) {
            // Programs may not reach an agent that is shown nowhere.
            None if self.released && self.front != Front::Native => Front::Head,
            Some(DisplayKind::Nx { .. }) => Front::Native,
            Some(_) => Front::Head,
            None => Front::Nobody,
        }
    }

    /// Whether the head is to stay though no client has its display yet: an agent
    /// that is on its way there would lose it, or end with it.
    pub(crate) fn needs_head(&self) -> bool {
        let up = self.programs[Role::Head].is_up() && self.seen.head_socket;
        up && (self.ready_at.is_none() || self.wanted() == Front::Head)
    }

    /// Size of the head for whoever waits, or the first one.
    const fn head_geometry(&self) -> Geometry {
        match self.waiting {
            Some(Waiting { kind: DisplayKind::Rfb { geometry }, .. }) => geometry,
            _ => self.geometry,
        }
    }

    /// Decides what is to be done now.
    pub(crate) fn step(&mut self, now: Moment, out: &mut Vec<Action>) {
        self.overdue(now, out);
        if self.programs[Role::Agent].is_up() {
            match self.wanted() {
                Front::Head => self.towards_head(now, out),
                Front::Native => self.towards_native(now, out),
                Front::Nobody => {}
            }
            self.manage(now, out);
        } else if self.programs[Role::Agent].is_down() && now >= self.agent_backoff.not_before && self.all_down() {
            out.push(Action::Clear);
            out.push(Action::Options(Occasion::Start, DisplayKind::Rfb { geometry: self.head_geometry() }));
            self.programs.start(now, Role::Agent, self.geometry, out);
            self.towards_head(now, out);
        }
        self.tell(out);
    }

    /// Whether nothing of a former session is left.
    fn all_down(&self) -> bool {
        self.programs[Role::Head].is_down()
            && self.programs[Role::Proxy].is_down()
            && self.programs[Role::WindowManager].is_down()
            && self.programs[Role::Watch].is_down()
    }

    fn overdue(&mut self, now: Moment, out: &mut Vec<Action>) {
        self.programs.kill_overdue(now, out);
        if let Some(waiting) = self.waiting.take_if(|waiting| now >= waiting.until) {
            out.push(Action::Refuse(waiting.client, waiting.step, "it took too long"));
        }
    }

    fn towards_head(&mut self, now: Moment, out: &mut Vec<Action>) {
        if self.programs[Role::Head].is_down() && now >= self.head_backoff.not_before {
            self.programs.start(now, Role::Head, self.head_geometry(), out);
        }
        let head_up = self.programs[Role::Head].is_up() && self.seen.head_socket;
        let helpers = now >= self.helper_backoff.not_before;
        if head_up && self.programs[Role::Fit].is_down() && helpers {
            self.programs.start(now, Role::Fit, self.geometry, out);
        }
        match self.seen.agent {
            AgentState::Unknown | AgentState::Starting | AgentState::Resuming => {
                if head_up && self.seen.listens && self.programs[Role::Proxy].is_down() && helpers {
                    self.programs.start(now, Role::Proxy, self.geometry, out);
                    self.front = Front::Head;
                }
            }
            AgentState::Suspended => self.toggle(now, RESUME_AGAIN, out),
            AgentState::Running if self.front == Front::Head => {
                if let Some(geometry) = self.resize.take() {
                    self.resizing = true;
                    out.push(Action::Resize(geometry));
                }
                if head_up && !self.resizing {
                    self.connect(now, out);
                }
            }
            AgentState::Running => self.toggle(now, self.suspend_again(), out),
            AgentState::Busy => {}
        }
    }

    fn towards_native(&mut self, now: Moment, out: &mut Vec<Action>) {
        self.programs.end(now, Role::Proxy, out);
        self.programs.end(now, Role::Fit, out);
        self.programs.end(now, Role::Head, out);
        match self.seen.agent {
            AgentState::Suspended => self.toggle(now, RESUME_AGAIN, out),
            AgentState::Resuming if self.seen.listens && self.programs[Role::Proxy].is_down() => self.connect(now, out),
            // Without its proxy the agent suspends by itself.
            AgentState::Running if self.front != Front::Head => self.toggle(now, self.suspend_again(), out),
            _ => {}
        }
    }

    fn suspend_again(&self) -> Duration {
        self.attach_within * SUSPEND_AGAIN.0 / SUSPEND_AGAIN.1
    }

    fn toggle(&mut self, now: Moment, again: Duration, out: &mut Vec<Action>) {
        // A proxy that still goes down would be taken for the new one.
        if now < self.toggle_not_before || matches!(self.programs[Role::Proxy], Program::Ending { .. }) {
            return;
        }
        self.toggle_not_before = now + again;
        // Should the agent have changed its state meanwhile, it resumes instead
        // of suspending: then these options have to be the right ones.
        let kind = match self.waiting {
            Some(waiting) => waiting.kind,
            None => DisplayKind::Rfb { geometry: self.geometry },
        };
        out.push(Action::Options(Occasion::Resume, kind));
        out.push(Action::Toggle);
    }

    fn connect(&mut self, now: Moment, out: &mut Vec<Action>) {
        if let Some(waiting) = self.waiting
            && now >= self.connect_not_before
        {
            // Once for each round; what came of it is an event.
            self.connect_not_before = now + CONNECT_AGAIN;
            out.push(Action::Connect(waiting.client, waiting.kind));
        }
    }

    /// Looks after the window manager.
    fn manage(&mut self, now: Moment, out: &mut Vec<Action>) {
        if !self.seen.session_socket || self.held || (self.released && !self.is_shown()) {
            return;
        }
        if self.programs[Role::WindowManager].is_down() && now >= self.manager_backoff.not_before {
            self.programs.start(now, Role::WindowManager, self.geometry, out);
        }
        if let Program::Up { since } = self.programs[Role::WindowManager]
            && !self.managed
        {
            if now >= since + SILENT_WINDOW_MANAGER {
                self.managed = true;
                self.programs.end(now, Role::Watch, out);
            } else if self.programs[Role::Watch].is_down() && now >= self.helper_backoff.not_before {
                self.programs.start(now, Role::Watch, self.geometry, out);
            }
        }
        if self.managed && self.autostarted.is_none() {
            self.released = false;
            self.autostarted = Some(now);
            self.ready_at = self.ready_at.or(Some(now));
            out.push(Action::Autostart);
        }
        if self.managed && self.is_shown() {
            for (&index, program) in &mut self.unreached {
                if program.due && now >= program.backoff.not_before {
                    (program.due, program.since) = (false, now);
                    out.push(Action::AutostartAgain(index));
                }
            }
        }
    }

    /// Tells those concerned what changed.
    fn tell(&mut self, out: &mut Vec<Action>) {
        let state = match (self.managed, self.ready_at) {
            (true, _) => SessionState::Ready,
            (false, None) => SessionState::Starting,
            (false, Some(_)) => SessionState::Restarting,
        };
        if state != self.state {
            self.state = state;
            out.push(Action::Changed);
        }
        let step = match (self.wanted(), self.seen.agent) {
            (_, AgentState::Unknown | AgentState::Starting) => "start the session",
            (Front::Head, AgentState::Running) if self.front == Front::Head => "open the display",
            (_, AgentState::Running | AgentState::Busy) => "suspend the session",
            (_, AgentState::Suspended) => "resume the session",
            (_, AgentState::Resuming) => "show the session",
        };
        if let Some(waiting) = &mut self.waiting
            && waiting.step != step
        {
            waiting.step = step;
            out.push(Action::Progress(waiting.client, step));
        }
    }

    /// When [`Session::step`] has to be called again if nothing happens.
    pub(crate) fn deadline(&self, now: Moment) -> Option<Moment> {
        let silent = match self.programs[Role::WindowManager] {
            Program::Up { since } if !self.managed => Some(since + SILENT_WINDOW_MANAGER),
            _ => None,
        };
        let later = [
            self.agent_backoff.not_before,
            self.manager_backoff.not_before,
            self.head_backoff.not_before,
            self.helper_backoff.not_before,
            self.toggle_not_before,
            self.connect_not_before,
        ];
        let unreached = self.unreached.values().filter(|program| program.due).map(|program| program.backoff.not_before);
        let later = later.into_iter().chain(unreached).filter(|&moment| moment > now);
        self.programs
            .deadline()
            .into_iter()
            .chain(silent)
            .chain(self.waiting.map(|waiting| waiting.until))
            .chain(later)
            .min()
    }
}

#[cfg(test)]
mod tests;
