//! What happens to a session, and what is done about it.

use qvd_core::{DisplayKind, Geometry};
use qvd_guest::Exit;

use super::programs::Role;
use crate::options::Occasion;

/// Number of a connection from the node.
pub(crate) type Client = u64;

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
