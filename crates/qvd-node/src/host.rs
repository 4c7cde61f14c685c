//! What a control plane asks of a host.

use std::{
    error::Error as StdError,
    fmt,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use qvd_core::{DesktopId, DesktopSpec, DesktopState, Digest, DisplayKind, FlavourName, StartStep, Tag};
use qvd_guest::{Channel, ChannelError, ExecRequest, Exit, Reply, Request, Stats};
use qvd_net::PortView;
use qvd_storage::{
    BuildOptions, Defaults, Image, Repository,
    repository::{NewVersion, Reference, Revision, Version},
};
use serde::{Deserialize, Serialize};

use crate::{governor::MemoryReport, rest::Awake};

/// A host that runs desktops. Calls block, may come from many threads at once,
/// and calls about one desktop wait for one another.
pub trait Host: fmt::Debug + Send + Sync {
    /// Makes `spec` run, or finds it running; returns when its session is
    /// ready. `progress` hears of each step as it begins.
    ///
    /// # Errors
    /// Something failed; nothing of the desktop is left running.
    fn ensure_running(&self, spec: &DesktopSpec, progress: &mut dyn FnMut(StartStep)) -> Result<Timings, HostError>;

    /// Ends a desktop; `Ok` when it does not run. Its programs have `grace` to
    /// end by themselves.
    ///
    /// # Errors
    /// Something of it could not be removed; the host keeps trying.
    fn stop(&self, id: DesktopId, grace: Duration) -> Result<(), HostError>;

    /// Stops a desktop and deletes its root and, if the host keeps it, its home.
    /// Removing what is not there is `Ok`.
    ///
    /// # Errors
    /// As [`Host::stop`].
    fn remove(&self, id: DesktopId) -> Result<(), HostError>;

    /// What a desktop is doing; an unknown one is stopped.
    fn status(&self, id: DesktopId) -> DesktopStatus;

    /// Opens the display of a running desktop, taking it from the client that
    /// has it, which learns [`EndReason::TakenOver`].
    ///
    /// # Errors
    /// It does not run, or its session did not give a display in time.
    fn attach(
        &self,
        id: DesktopId,
        kind: DisplayKind,
        progress: &mut dyn FnMut(String),
    ) -> Result<Attachment, HostError>;

    /// Runs a program inside a running desktop.
    ///
    /// # Errors
    /// It does not run, or the program could not be started.
    fn exec(&self, id: DesktopId, request: ExecRequest) -> Result<ExecSession, HostError>;

    /// What a running desktop uses.
    ///
    /// # Errors
    /// It does not run, or did not answer in time.
    fn stats(&self, id: DesktopId) -> Result<Stats, HostError>;

    /// What this host has of memory, who has it, and what was decided about it.
    ///
    /// # Errors
    /// The host does not say.
    fn memory(&self) -> Result<MemoryReport, HostError>;

    /// The port of a running desktop, and what would become of `frames` that it
    /// sent; each begins with its Ethernet header. `None` if it has no port.
    ///
    /// # Errors
    /// It does not run, or the kernel did not say.
    fn network(&self, id: DesktopId, frames: &[Vec<u8>]) -> Result<Option<PortView>, HostError>;

    /// Makes the next version of a flavour from what a desktop's root holds, without
    /// its secrets: one that runs stands still meanwhile, and one that does not
    /// cannot start.
    ///
    /// # Errors
    /// It does not run and no root of it is kept that this host can read, which it can
    /// of no machine; the flavour has moved on since it started; or something in it
    /// cannot be in an image.
    fn commit(&self, id: DesktopId, new: &NewVersion) -> Result<Version, HostError>;

    /// Builds the image that a recipe file describes and makes it the head
    /// and default of its flavour, as `options` say. `progress` gets lines for a person.
    ///
    /// # Errors
    /// The recipe is wrong or could not be carried out; nothing is left.
    fn build_image(
        &self,
        recipe: &Path,
        options: &BuildOptions,
        progress: &mut dyn FnMut(&str),
    ) -> Result<ImageSummary, HostError>;

    /// The newest image of every flavour, by name.
    ///
    /// # Errors
    /// The repository cannot be read.
    fn images(&self) -> Result<Vec<ImageSummary>, HostError>;

    /// The image that a desktop gets at its next start if it follows this tag.
    ///
    /// # Errors
    /// There is no such flavour or tag, or the repository cannot be read.
    fn follow(&self, flavour: &FlavourName, tag: &Tag, desktop: Option<DesktopId>) -> Result<Digest, HostError>;

    /// The repository of its images, if that is on this machine.
    fn repository(&self) -> Option<Arc<Repository>>;
}

/// What somebody who has to choose a next step needs to know of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HostErrorKind {
    /// What was asked for is wrong.
    Invalid,
    /// There is no such thing.
    NotFound,
    /// The desktop does not run, which it would have to.
    NotRunning,
    /// Somebody holds it; later it may work.
    Busy,
    /// This host cannot do it; another may.
    Unsupported,
    /// A step did not end within its deadline.
    Timeout,
    /// It was tried and failed.
    Failed,
}

/// An error of a host: what was tried, and the cause behind it.
#[derive(Debug)]
pub struct HostError {
    kind: HostErrorKind,
    what: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl HostError {
    /// An error without a cause behind it. `what` is lower case, one line, our
    /// verb and the object.
    pub fn new(kind: HostErrorKind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), source: None }
    }

    /// An error with its cause.
    pub fn because(
        kind: HostErrorKind,
        what: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self { kind, what: what.into(), source: Some(source.into()) }
    }

    /// What the caller can make of it.
    #[must_use]
    pub const fn kind(&self) -> HostErrorKind {
        self.kind
    }
}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl StdError for HostError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// What a desktop is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DesktopStatus {
    /// Its state.
    pub state: DesktopState,
    /// While it starts: which step runs.
    pub step: Option<StartStep>,
    /// How its last start went; `None` before the first, or after a restart
    /// of the node.
    pub timings: Option<Timings>,
    /// Whether a client is attached.
    pub attached: bool,
    /// Whether it stands still or has given back memory, because nobody was
    /// attached for a while.
    pub resting: bool,
    /// Why it is not running, when it ended without being asked to.
    pub ended: Option<String>,
    /// The commit that it runs.
    #[serde(default)]
    pub image: Option<Digest>,
    /// Whether it stands still because its host has no room for what it writes. It goes
    /// on by itself once there is some.
    #[serde(default)]
    pub lacks_room: bool,
}

/// Where the time of a start went, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Timings {
    /// Making the root.
    pub root_us: u64,
    /// Making the port and its rules.
    pub port_us: u64,
    /// From the request until the init was running.
    pub start_us: u64,
    /// From the request until the window manager was up.
    pub session_us: u64,
}

/// An image as a list shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSummary {
    /// Flavour it belongs to.
    pub flavour: FlavourName,
    /// Digest of its content.
    pub digest: Digest,
    /// When it was made, in seconds since 1970.
    pub created_unix_s: u64,
    /// Files, directories and links in it.
    pub entries: u64,
    /// Size of its files' contents in bytes.
    pub size_bytes: u64,
    /// Whether this call found it already made.
    pub reused: bool,
    /// Why no desktop can start from it, if so; figures are zero then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damaged: Option<String>,
    /// What its recipe gives to desktops.
    #[serde(default)]
    pub defaults: Defaults,
}

impl ImageSummary {
    /// Describes an image.
    #[must_use]
    pub fn of(image: &Image, reused: bool) -> Self {
        Self {
            flavour: image.config().flavour.clone(),
            digest: image.digest(),
            created_unix_s: image.created().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            entries: image.entries(),
            size_bytes: image.size_bytes(),
            reused,
            damaged: None,
            defaults: image.config().defaults.clone(),
        }
    }

    /// Describes what desktops of each flavour follow. A damaged one is listed as
    /// such: it is no reason not to use the others.
    ///
    /// # Errors
    /// The repository cannot be read.
    pub fn all(repository: &Repository) -> Result<Vec<Self>, qvd_storage::Error> {
        let mut all = Vec::new();
        for flavour in repository.flavours()? {
            let followed = Reference { flavour: flavour.clone(), revision: Some(Revision::Tag(Tag::default_tag())) };
            let newest = Reference { flavour: flavour.clone(), revision: None };
            let id = match repository.resolve(&followed).or_else(|_| repository.resolve(&newest)) {
                Ok(id) => id,
                Err(error) => {
                    tracing::warn!(%flavour, %error, "flavour left out");
                    continue;
                }
            };
            let mut summary = Self {
                flavour,
                digest: id.digest(),
                created_unix_s: 0,
                entries: 0,
                size_bytes: 0,
                reused: false,
                damaged: None,
                defaults: Defaults::default(),
            };
            match repository.whole(id) {
                Ok(commit) => {
                    summary.created_unix_s = commit.time_unix_s;
                    (summary.entries, summary.size_bytes) = commit.content.size();
                    summary.defaults = commit.config.defaults;
                }
                Err(error) => summary.damaged = Some(error.to_string()),
            }
            all.push(summary);
        }
        Ok(all)
    }
}

/// Why a display stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum EndReason {
    /// The client or the session closed it.
    Closed,
    /// Another client of the same user took the desktop.
    TakenOver,
    /// The desktop was stopped or ended.
    Stopped,
}

/// A client's hold on a display: the stream, and why it ended once it did.
#[derive(Debug)]
pub struct Attachment {
    stream: UnixStream,
    reason: Arc<AtomicU8>,
}

impl Attachment {
    /// Wraps a connected stream. The second value ends the attachment from
    /// outside; whoever hands out the attachment keeps it.
    ///
    /// # Errors
    /// The stream's descriptor cannot be duplicated.
    pub fn new(stream: UnixStream) -> std::io::Result<(Self, AttachmentEnd)> {
        let reason = Arc::new(AtomicU8::new(0));
        let end = AttachmentEnd { stream: stream.try_clone()?, reason: Arc::clone(&reason) };
        Ok((Self { stream, reason }, end))
    }

    /// The stream of RFB or NX bytes. It ends when the attachment does.
    #[must_use]
    pub const fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Why the stream ended; meaningful once a read returned nothing.
    #[must_use]
    pub fn end_reason(&self) -> EndReason {
        match self.reason.load(Ordering::Acquire) {
            1 => EndReason::TakenOver,
            2 => EndReason::Stopped,
            _ => EndReason::Closed,
        }
    }
}

/// Ends an [`Attachment`] from outside.
#[derive(Debug)]
pub struct AttachmentEnd {
    stream: UnixStream,
    reason: Arc<AtomicU8>,
}

impl AttachmentEnd {
    /// Ends the stream and says why. The first reason given stays.
    pub fn end(&self, reason: EndReason) {
        let code = match reason {
            EndReason::Closed => 0,
            EndReason::TakenOver => 1,
            EndReason::Stopped => 2,
        };
        // Losing the race means that a reason is already there.
        let _first = self.reason.compare_exchange(0, code, Ordering::AcqRel, Ordering::Acquire);
        if let Err(error) = self.stream.shutdown(std::net::Shutdown::Both) {
            tracing::debug!(%error, "display stream was closed already");
        }
    }

    /// Whether the client's side is still open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        // Once the attachment is dropped, only this end holds the flag.
        Arc::strong_count(&self.reason) > 1
    }
}

/// A program running inside a desktop.
#[derive(Debug)]
pub struct ExecSession {
    /// Our ends of its standard input, output and error; or its terminal.
    pub stdio: ExecStdio,
    /// Steers it. Dropping this sends the program SIGHUP.
    pub control: ExecControl,
}

/// Steers a program inside a desktop.
#[derive(Debug)]
pub struct ExecControl {
    channel: Channel,
    /// A desktop does not rest while a program runs for somebody outside.
    awake: Option<Awake>,
}

/// How one talks with a program inside a desktop.
#[derive(Debug)]
#[non_exhaustive]
pub enum ExecStdio {
    /// Three pipes: write to the first, read from the others.
    Pipes {
        /// Its standard input.
        stdin: OwnedFd,
        /// Its standard output.
        stdout: OwnedFd,
        /// Its standard error.
        stderr: OwnedFd,
    },
    /// The master of its terminal: read and write.
    Tty(OwnedFd),
}

impl ExecSession {
    /// Wraps the connection that the program was started on.
    #[must_use]
    pub const fn new(stdio: ExecStdio, channel: Channel) -> Self {
        Self { stdio, control: ExecControl { channel, awake: None } }
    }
}

impl ExecControl {
    pub(crate) fn keep_awake(&mut self, awake: Awake) {
        self.awake = Some(awake);
    }

    /// Tells the program's terminal its new size.
    ///
    /// # Errors
    /// The connection to the desktop is gone.
    pub fn resize(&mut self, rows: u16, columns: u16) -> Result<(), ChannelError> {
        self.channel.send(&Request::Resize { rows, columns }, &[])
    }

    /// Sends a signal to the program and its children.
    ///
    /// # Errors
    /// The connection to the desktop is gone.
    pub fn signal(&mut self, signal: i32) -> Result<(), ChannelError> {
        self.channel.send(&Request::Signal { signal }, &[])
    }

    /// Waits until the program has ended. The descriptor of this control
    /// (`AsFd`) becomes readable then.
    ///
    /// # Errors
    /// It did not within `timeout`, or the connection to the desktop is gone.
    pub fn wait(&mut self, timeout: Duration) -> Result<Exit, ChannelError> {
        match self.channel.recv::<Reply>(timeout)?.0 {
            Reply::Exited(exit) => Ok(exit),
            other => Err(ChannelError::Bad(format!("{other:?} instead of an exit"))),
        }
    }
}

impl AsFd for ExecControl {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
