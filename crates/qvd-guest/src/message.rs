//! What is said. Both ends are built from this file; [`VERSION`] changes when
//! an old init could misunderstand a new node or the other way round.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use qvd_core::{DisplayKind, Geometry};
use serde::{Deserialize, Serialize};

/// Version of this protocol. An init that was started by an older node keeps
/// speaking its own; the node compares what [`Reply::Status`] says.
pub const VERSION: u32 = 1;

/// How long a machine's programs may be held for one.
pub const STILL_MAX: Duration = Duration::from_secs(30 * 60);

/// What an init is to do, from the image's recipe and the desktop's spec.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitConfig {
    /// [`VERSION`] of the node.
    pub version: u32,
    /// Environment of everything it starts.
    pub env: BTreeMap<String, String>,
    /// Programs to keep running as root inside, each an argument list.
    pub services: Vec<Vec<String>>,
    /// The graphical session; none means that only services run.
    pub session: Option<SessionConfig>,
    /// Whom programs ask for names, the first first: of a container. A machine is told with
    /// its place in the network.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub name_servers: Vec<IpAddr>,
}

/// The graphical session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionConfig {
    /// Name of the user inside, as the image's `/etc/passwd` has it.
    pub user: String,
    /// The user's id inside.
    pub uid: u32,
    /// The user's group inside.
    pub gid: u32,
    /// The user's home directory inside.
    pub home: String,
    /// Window manager or desktop environment, an argument list.
    pub command: Vec<String>,
    /// Programs started once the window manager is up, each an argument list.
    pub autostart: Vec<Vec<String>>,
    /// Size of the screen until a client asks for another.
    pub geometry: Geometry,
    /// How long a browser's head stays after the last client left, in seconds.
    /// Coming back within that time is quicker; each head costs memory.
    pub head_linger_s: u32,
    /// How long a client waits for its display at most, in seconds: longer in a machine
    /// that is emulated.
    pub attach_within_s: u32,
}

/// What a node asks. One per connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Answered by [`Reply::Status`], then again at every change of the
    /// session's state, for as long as the connection stays.
    Watch,
    /// Answered by one [`Reply::Stats`].
    Stats,
    /// Opens the display for a client, taking it from the one before.
    /// Answered by [`Reply::Display`] with one descriptor: a connected stream
    /// that speaks RFB or NX. Closing the connection of this request is not
    /// needed; the display is released when the stream is closed.
    Attach(DisplayKind),
    /// Runs a program. Without `tty`, three descriptors ride along: its
    /// standard input, output and error. Answered by [`Reply::Started`] (with
    /// the terminal's master descriptor if `tty`), later by [`Reply::Exited`].
    /// [`Request::Resize`] and [`Request::Signal`] may follow on the same
    /// connection; when it is closed before the end, the program gets SIGHUP.
    Exec(ExecRequest),
    /// As [`Request::Exec`] on three descriptors, while everybody else inside a machine
    /// stands still, at most [`STILL_MAX`]: they go on when the program has ended or the
    /// connection is closed. A container refuses: its host holds it.
    ExecStill(ExecRequest),
    /// Only after [`Request::Exec`] with `tty`: the terminal's new size.
    Resize {
        /// Rows of text.
        rows: u16,
        /// Columns of text.
        columns: u16,
    },
    /// Only after [`Request::Exec`]: sends a signal to the program's group.
    Signal {
        /// Number of the signal.
        signal: i32,
    },
    /// Becomes another: the machine is a clone from here on. Answered by
    /// [`Reply::Done`]; a container refuses.
    Identify(crate::Identity),
    /// Sets the clock of a machine that stood still for longer than it knows. Answered by
    /// [`Reply::Done`]; a container refuses, whose clock is its host's.
    Time {
        /// What it is, in nanoseconds since 1970.
        time_ns: u64,
    },
    /// Ends the session's programs, but not what shows them, and starts none until
    /// [`Request::Release`]: what a template waits with. Answered by [`Reply::Done`];
    /// a container refuses.
    Hold,
    /// Lets a held session begin, in the home of whoever it is for. Answered by
    /// [`Reply::Done`] before it has begun.
    Release {
        /// Whether the disk [`crate::HOME_SERIAL`] becomes its home first.
        home: bool,
    },
    /// Ends everything inside: SIGTERM, then after the grace SIGKILL.
    /// Answered by [`Reply::Stopping`]; then the init exits.
    Stop {
        /// How long programs have to end by themselves, in milliseconds.
        grace_ms: u32,
    },
}

/// A program to run inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// Program (looked up in the `PATH` inside) and its arguments.
    pub argv: Vec<String>,
    /// Added to the session's environment.
    pub env: BTreeMap<String, String>,
    /// As root inside instead of the session's user.
    pub root: bool,
    /// Rows and columns of a terminal to run it on; `None` runs it on the
    /// three descriptors that came with the request.
    pub tty: Option<(u16, u16)>,
}

/// What an init answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Reply {
    /// Who answers, and how the session is.
    Status {
        /// [`VERSION`] of the init.
        version: u32,
        /// How the session is.
        session: SessionState,
        /// From the init's first instruction to the window manager, in
        /// milliseconds; `None` before.
        session_ready_ms: Option<u32>,
    },
    /// See [`Request::Stats`].
    Stats(Stats),
    /// A step on the way to the display, for the person who waits.
    Progress(String),
    /// The display is open; its descriptor came with this frame.
    Display,
    /// The program runs.
    Started {
        /// Its process id inside.
        pid: u32,
    },
    /// The program ended.
    Exited(Exit),
    /// It was done.
    Done,
    /// The desktop is going down.
    Stopping,
    /// The request could not be carried out.
    Error(GuestError),
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// By itself, with this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("cannot {op} in the desktop: {reason}")]
#[serde(deny_unknown_fields)]
pub struct GuestError {
    /// What was tried, a verb and its object.
    pub op: String,
    /// Why it failed.
    pub reason: String,
}

/// How a session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SessionState {
    /// The image has none.
    None,
    /// Its display or its window manager is still coming up.
    Starting,
    /// Its window manager manages.
    Ready,
    /// It ended or failed and will be started again.
    Restarting,
}

/// What a desktop uses, as its init sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stats {
    /// Proportional set size of all processes inside, in bytes.
    pub pss_bytes: u64,
    /// Processes inside, the init included.
    pub processes: u32,
    /// Clients attached to the display at the moment.
    pub clients: u32,
    /// Whether its programs have connections to other hosts.
    #[serde(default)]
    pub streams: bool,
    /// Memory of a machine as its kernel counts it; `None` in a container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<GuestMemory>,
}

/// Memory of a machine, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestMemory {
    /// All that its kernel manages.
    pub total: u64,
    /// What nothing uses.
    pub free: u64,
    /// What programs can have without anything being written out.
    pub available: u64,
    /// What it keeps of files.
    pub cached: u64,
}
