//! What is to be done for the session, decided from what is seen alone.
//!
//! The session lives in an NX agent. It is shown through one *front* at a
//! time: the *head*, an RFB server with an NX proxy beside it, for browsers;
//! or the proxy of a native client. Changing the front means suspending the
//! agent and resuming it elsewhere. [`Session::step`] compares what is with
//! what is wanted and says what to do next; it is called after every event,
//! so a signal that the agent ignored or a program that died is simply met
//! again.

use std::{collections::BTreeMap, time::Duration};

use qvd_core::{DisplayKind, Geometry};
use qvd_guest::{Exit, SessionState};

use crate::options::Occasion;

/// Time since the init began.
pub(crate) type Moment = Duration;

/// Number of a connection from the node.
pub(crate) type Client = u64;

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
/// A program told to end is killed after this.
const KILL_AFTER: Duration = Duration::from_secs(2);
/// Shortest and longest pause before something that died is started again.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// What ran this long counts as having worked: the pause is short again.
const WORKED: Duration = Duration::from_secs(30);

/// A program of the session's that failed within this time may not have reached
/// the display: an agent between two fronts lets nobody in. It is tried again
/// this often.
const UNREACHED: (Duration, u32) = (Duration::from_secs(5), 3);

/// Pause before the next start after `failures` quick deaths in a row.
fn pause(failures: u32) -> Duration {
    PAUSE.0.saturating_mul(1 << failures.min(8)).min(PAUSE.1)
}

/// Quick deaths in a row, and when to start again, of something that ran from
/// `since` until `now` and had died `failures` times before.
pub(crate) fn restart(failures: u32, since: Moment, now: Moment) -> (u32, Moment) {
    let failures = if now.saturating_sub(since) >= WORKED { 0 } else { failures };
    (failures.saturating_add(1), now + pause(failures))
}

/// Programs of a session.
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

/// What the agent's state file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AgentState {
    /// Nothing: it has only begun, or the file is just being rewritten.
    Unknown,
    /// On its way down, to be suspended or for good; it hears nothing.
    Busy,
    /// Waits for its first proxy.
    Starting,
    /// Is shown somewhere.
    Running,
    /// Is shown nowhere.
    Suspended,
    /// Waits for a proxy.
    Resuming,
}

impl AgentState {
    /// Reads the word in the state file.
    pub(crate) fn parse(text: &str) -> Self {
        match text.trim() {
            "STARTING" => Self::Starting,
            "RUNNING" => Self::Running,
            "SUSPENDED" => Self::Suspended,
            "RESUMING" => Self::Resuming,
            "" => Self::Unknown,
            // SUSPENDING, TERMINATING, TERMINATED, and what is not known.
            _ => Self::Busy,
        }
    }
}

/// What can be seen from outside the session's programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The agent's state file.
    pub agent: AgentState,
    /// Whether the agent listens for a proxy.
    pub listens: bool,
    /// Whether the session's X server listens.
    pub session_socket: bool,
    /// Whether the head's X server listens.
    pub head_socket: bool,
    /// Whether one of them has a socket but does not listen yet: nothing tells
    /// when it begins to, so this is to be looked at again soon.
    pub unsettled: bool,
}

impl Default for Seen {
    fn default() -> Self {
        Self { agent: AgentState::Unknown, listens: false, session_socket: false, head_socket: false, unsettled: false }
    }
}

/// What happened.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Event {
    /// Something may have changed outside.
    Seen(Seen),
    /// A program ended, or could not be started.
    Ended(Role, Exit),
    /// One of the session's programs, by its place in the list, has ended.
    ProgramEnded(usize, Exit),
    /// A client wants the display.
    Attach(Client, DisplayKind),
    /// A client no longer waits.
    Gone(Client),
    /// [`Action::Connect`] worked and the client has its display.
    Connected(Client),
    /// [`Action::Resize`] is done, well or not.
    Resized,
    /// [`Action::Connect`] found nobody listening yet.
    NotConnected,
    /// The session's programs are to end and none to start.
    Hold,
    /// They are to start, as for the first time.
    Release,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Forgets what a former agent left behind.
    Clear,
    /// Tells the agent how it will be shown next.
    Options(Occasion, DisplayKind),
    /// Starts a program; the head with this size.
    Start(Role, Geometry),
    /// Asks a program to end.
    End(Role),
    /// Ends a program that did not when asked.
    Kill(Role),
    /// Asks the agent to suspend or resume.
    Toggle,
    /// Gives the running head this size.
    Resize(Geometry),
    /// Has the session's programs draw their windows again.
    Redraw,
    /// Connects a client to its display.
    Connect(Client, DisplayKind),
    /// Tells a client what it waits for.
    Progress(Client, &'static str),
    /// Tells a client that it will not get its display.
    Refuse(Client, &'static str, &'static str),
    /// Starts the session's programs.
    Autostart,
    /// Starts one of them again.
    AutostartAgain(usize),
    /// The session's state is another.
    Changed,
}

/// A program, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Program {
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
    const fn is_up(self) -> bool {
        matches!(self, Self::Up { .. })
    }
    const fn is_down(self) -> bool {
        matches!(self, Self::Down)
    }
}

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

/// Deaths in a row, and when the next start may be.
#[derive(Debug, Clone, Copy, Default)]
struct Backoff {
    failures: u32,
    not_before: Moment,
}

impl Backoff {
    fn died(&mut self, now: Moment, since: Moment) {
        (self.failures, self.not_before) = restart(self.failures, since, now);
    }
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
    agent: Program,
    head: Program,
    proxy: Program,
    fit: Program,
    manager: Program,
    watch: Program,
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
            agent: Program::Down,
            head: Program::Down,
            proxy: Program::Down,
            fit: Program::Down,
            manager: Program::Down,
            watch: Program::Down,
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
                Front::Head => self.proxy.is_up(),
                Front::Native => true,
                Front::Nobody => false,
            }
    }

    /// Takes note of an event.
    pub(crate) fn note(&mut self, now: Moment, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::Seen(mut seen) => {
                if !self.agent.is_up() {
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
            Event::Attach(client, kind) => {
                if let Some(before) = self.waiting.take() {
                    out.push(Action::Refuse(before.client, "open the display", "another client took it"));
                }
                self.waiting = Some(Waiting { client, kind, until: now + self.attach_within, step: "" });
                if let DisplayKind::Rfb { geometry } = kind
                    && !self.head.is_down()
                {
                    self.resize = Some(geometry);
                }
                self.connect_not_before = Moment::ZERO;
                self.head_backoff = Backoff::default();
            }
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

    /// Ends the session's programs, but not what shows them.
    fn hold(&mut self, out: &mut Vec<Action>) {
        self.held = true;
        self.managed = false;
        (self.ready_at, self.autostarted) = (None, None);
        self.unreached.clear();
        for role in [Role::WindowManager, Role::Watch] {
            if self.program(role).is_up() {
                *self.program(role) = Program::Ending { kill: None };
                out.push(Action::Kill(role));
            }
        }
    }

    fn ended(&mut self, now: Moment, role: Role, exit: Exit, out: &mut Vec<Action>) {
        let since = |program| if let Program::Up { since } = program { since } else { now };
        match role {
            Role::Agent => {
                self.agent_backoff.died(now, since(self.agent));
                self.agent = Program::Down;
                self.seen = Seen::default();
                self.front = Front::Nobody;
                self.managed = false;
                self.autostarted = None;
                self.unreached.clear();
                for role in [Role::WindowManager, Role::Watch, Role::Proxy, Role::Fit, Role::Head] {
                    self.end(now, role, out);
                }
            }
            Role::Head => {
                if self.head.is_up() {
                    self.head_backoff.died(now, since(self.head));
                }
                self.head = Program::Down;
                self.seen.head_socket = false;
                self.resize = None;
                self.resizing = false;
                self.end(now, Role::Proxy, out);
                self.end(now, Role::Fit, out);
            }
            Role::Proxy | Role::Fit => {
                if let Program::Up { since } = *self.program(role) {
                    self.helper_backoff.died(now, since);
                }
                *self.program(role) = Program::Down;
            }
            Role::WindowManager => {
                self.managed = false;
                // A window manager that ends well was told to: the user signed
                // out. One that crashed is replaced and the programs stay.
                if self.manager.is_up() && exit == Exit::Code(0) {
                    self.end(now, Role::Agent, out);
                }
                self.manager_backoff.died(now, since(self.manager));
                self.manager = Program::Down;
                self.end(now, Role::Watch, out);
            }
            Role::Watch => {
                if self.watch.is_up() && exit == Exit::Code(0) {
                    self.managed = true;
                } else if let Program::Up { since } = self.watch {
                    self.helper_backoff.died(now, since);
                }
                self.watch = Program::Down;
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

    fn program(&mut self, role: Role) -> &mut Program {
        match role {
            Role::Agent => &mut self.agent,
            Role::Head => &mut self.head,
            Role::Proxy => &mut self.proxy,
            Role::Fit => &mut self.fit,
            Role::WindowManager => &mut self.manager,
            Role::Watch => &mut self.watch,
        }
    }

    fn start(&mut self, now: Moment, role: Role, geometry: Geometry, out: &mut Vec<Action>) {
        *self.program(role) = Program::Up { since: now };
        out.push(Action::Start(role, geometry));
    }

    fn end(&mut self, now: Moment, role: Role, out: &mut Vec<Action>) {
        if self.program(role).is_up() && role == Role::Proxy {
            // It keeps nothing, and told to end it would say good-bye for a
            // second; the agent notices its death at once.
            self.proxy = Program::Ending { kill: None };
            out.push(Action::Kill(role));
        } else if self.program(role).is_up() {
            *self.program(role) = Program::Ending { kill: Some(now + KILL_AFTER) };
            out.push(Action::End(role));
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
        if self.agent.is_up() {
            match self.wanted() {
                Front::Head => self.towards_head(now, out),
                Front::Native => self.towards_native(now, out),
                Front::Nobody => {}
            }
            self.manage(now, out);
        } else if self.agent.is_down() && now >= self.agent_backoff.not_before && self.all_down() {
            out.push(Action::Clear);
            out.push(Action::Options(Occasion::Start, DisplayKind::Rfb { geometry: self.head_geometry() }));
            self.start(now, Role::Agent, self.geometry, out);
            self.towards_head(now, out);
        }
        self.tell(out);
    }

    /// Whether nothing of a former session is left.
    const fn all_down(&self) -> bool {
        self.head.is_down() && self.proxy.is_down() && self.manager.is_down() && self.watch.is_down()
    }

    fn overdue(&mut self, now: Moment, out: &mut Vec<Action>) {
        for role in [Role::Agent, Role::Head, Role::Proxy, Role::Fit, Role::WindowManager, Role::Watch] {
            let program = self.program(role);
            if let Program::Ending { kill: Some(moment) } = *program
                && now >= moment
            {
                *program = Program::Ending { kill: None };
                out.push(Action::Kill(role));
            }
        }
        if let Some(waiting) = self.waiting.take_if(|waiting| now >= waiting.until) {
            out.push(Action::Refuse(waiting.client, waiting.step, "it took too long"));
        }
    }

    fn towards_head(&mut self, now: Moment, out: &mut Vec<Action>) {
        if self.head.is_down() && now >= self.head_backoff.not_before {
            self.start(now, Role::Head, self.head_geometry(), out);
        }
        let head_up = self.head.is_up() && self.seen.head_socket;
        let helpers = now >= self.helper_backoff.not_before;
        if head_up && self.fit.is_down() && helpers {
            self.start(now, Role::Fit, self.geometry, out);
        }
        match self.seen.agent {
            AgentState::Unknown | AgentState::Starting | AgentState::Resuming => {
                if head_up && self.seen.listens && self.proxy.is_down() && helpers {
                    self.start(now, Role::Proxy, self.geometry, out);
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
        self.end(now, Role::Proxy, out);
        self.end(now, Role::Fit, out);
        self.end(now, Role::Head, out);
        match self.seen.agent {
            AgentState::Suspended => self.toggle(now, RESUME_AGAIN, out),
            AgentState::Resuming if self.seen.listens && self.proxy.is_down() => self.connect(now, out),
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
        if now < self.toggle_not_before || matches!(self.proxy, Program::Ending { .. }) {
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
        if self.manager.is_down() && now >= self.manager_backoff.not_before {
            self.start(now, Role::WindowManager, self.geometry, out);
        }
        if let Program::Up { since } = self.manager
            && !self.managed
        {
            if now >= since + SILENT_WINDOW_MANAGER {
                self.managed = true;
                self.end(now, Role::Watch, out);
            } else if self.watch.is_down() && now >= self.helper_backoff.not_before {
                self.start(now, Role::Watch, self.geometry, out);
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
        let ending = [self.agent, self.head, self.proxy, self.fit, self.manager, self.watch]
            .into_iter()
            .filter_map(|program| if let Program::Ending { kill } = program { kill } else { None });
        let silent = match self.manager {
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
        ending.chain(silent).chain(self.waiting.map(|waiting| waiting.until)).chain(later).min()
    }
}

#[cfg(test)]
mod tests;
