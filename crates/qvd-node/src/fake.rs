//! A host in memory, for tests of what stands above a host.
//!
//! Strict on purpose: it refuses what a real host would refuse (an image it
//! does not have, a display of a desktop that does not run, an address two
//! desktops claim), so that a caller's mistake fails its test.

use std::{
    collections::{BTreeMap, HashMap},
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::Duration,
};

use qvd_core::{Bytes, DesktopId, DesktopSpec, DesktopState, Digest, DisplayKind, FlavourName, StartStep, Tag};
use qvd_guest::{Channel, ChannelError, ExecRequest, Exit, Reply, Request, Stats};
use qvd_net::PortView;
use qvd_storage::{
    BuildOptions, Defaults, Repository,
    repository::{NewVersion, Version},
};

use crate::{
    Attachment, AttachmentEnd, DesktopMemory, DesktopStatus, EndReason, ExecSession, ExecStdio, Host, HostError,
    HostErrorKind, ImageSummary, MemoryReport, Timings,
};

/// What an attached display says first. Source: RFC 6143, 7.1.1.
pub const GREETING: &[u8] = b"RFB 003.008\n";

/// How long a program of the fake waits for its signal before it gives up.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a program of the fake does: its arguments do not matter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Script {
    /// Writes these and ends so.
    Say {
        /// Standard output; it must fit a socket's buffer.
        stdout: Vec<u8>,
        /// Standard error; it must fit a socket's buffer.
        stderr: Vec<u8>,
        /// How it ends.
        exit: Exit,
    },
    /// Copies its input to its output, and ends with 0 when its input does.
    Echo,
    /// Writes `ready\n`, then `ROWSxCOLUMNS\n` at each new size of its
    /// terminal, until a signal ends it.
    Terminal,
}

/// An operation of [`Host`] that can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Op {
    /// [`Host::ensure_running`].
    EnsureRunning,
    /// [`Host::stop`].
    Stop,
    /// [`Host::remove`].
    Remove,
    /// [`Host::attach`].
    Attach,
    /// [`Host::exec`].
    Exec,
    /// [`Host::stats`].
    Stats,
    /// [`Host::build_image`].
    BuildImage,
    /// [`Host::images`].
    Images,
}

/// Holds up a call, until it is dropped. See [`FakeHost::hold_next`].
#[derive(Debug)]
#[must_use]
pub struct Hold {
    _until_dropped: mpsc::Sender<()>,
}

#[derive(Debug)]
struct Running {
    spec: DesktopSpec,
    client: Option<AttachmentEnd>,
}

#[derive(Debug, Default)]
struct State {
    images: BTreeMap<FlavourName, ImageSummary>,
    running: HashMap<DesktopId, Running>,
    removed: Vec<DesktopId>,
    failures: HashMap<Op, Vec<HostError>>,
    holds: HashMap<Op, mpsc::Receiver<()>>,
    script: Option<Script>,
    recipes: HashMap<PathBuf, FlavourName>,
    repository: Option<Arc<Repository>>,
    ports: HashMap<DesktopId, PortView>,
}

/// A strict host in memory. Starts with one image, of flavour `icewm`.
#[derive(Debug)]
pub struct FakeHost {
    state: Mutex<State>,
}

impl Default for FakeHost {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeHost {
    /// A host with an image of flavour `icewm` and no desktop.
    #[must_use]
    pub fn new() -> Self {
        let host = Self { state: Mutex::default() };
        if let Ok(icewm) = "icewm".parse() {
            host.add_image(icewm);
        }
        host
    }

    /// Adds an image; its digest follows from the name.
    pub fn add_image(&self, flavour: FlavourName) {
        self.add_image_with(flavour, Defaults::default());
    }

    /// The same, whose recipe gives this to desktops.
    pub fn add_image_with(&self, flavour: FlavourName, defaults: Defaults) {
        let image = ImageSummary { defaults, ..image_of(&flavour) };
        self.state().images.insert(flavour, image);
    }

    /// Lets a recipe file build an image of `flavour`; others do not exist.
    pub fn add_recipe(&self, recipe: impl Into<PathBuf>, flavour: FlavourName) {
        self.state().recipes.insert(recipe.into(), flavour);
    }

    /// Gives it a repository, which it has none of until then.
    pub fn keep_images_in(&self, repository: Arc<Repository>) {
        self.state().repository = Some(repository);
    }

    /// Gives a desktop a port, which none has until then. What it explains are the
    /// frames that are asked about, in their order.
    pub fn add_port(&self, id: DesktopId, port: PortView) {
        self.state().ports.insert(id, port);
    }

    /// Makes the next call of `op` fail.
    pub fn fail_next(&self, op: Op, error: HostError) {
        self.state().failures.entry(op).or_default().push(error);
    }

    /// Makes the next call of `op` wait until what this returns is dropped.
    pub fn hold_next(&self, op: Op) -> Hold {
        let (hold, held) = mpsc::channel();
        self.state().holds.insert(op, held);
        Hold { _until_dropped: hold }
    }

    /// What programs do from now on; until then they say `hello\n` and end with 0.
    pub fn script(&self, script: Script) {
        self.state().script = Some(script);
    }

    /// What a running desktop was started with.
    #[must_use]
    pub fn spec(&self, id: DesktopId) -> Option<DesktopSpec> {
        self.state().running.get(&id).map(|running| running.spec.clone())
    }

    /// The desktops that were removed, in order.
    #[must_use]
    pub fn removed(&self) -> Vec<DesktopId> {
        self.state().removed.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, unless this call is to fail; after a wait, if it is to wait.
    fn begin(&self, op: Op) -> Result<MutexGuard<'_, State>, HostError> {
        let held = self.state().holds.remove(&op);
        if let Some(held) = held {
            // Nothing is ever sent: the other side goes.
            let _gone = held.recv();
        }
        let mut state = self.state();
        match state.failures.get_mut(&op).filter(|queue| !queue.is_empty()).map(|queue| queue.remove(0)) {
            Some(error) => Err(error),
            None => Ok(state),
        }
    }
}

fn image_of(flavour: &FlavourName) -> ImageSummary {
    let mut digest = [0; 32];
    for (byte, letter) in digest.iter_mut().zip(flavour.as_str().bytes()) {
        *byte = letter;
    }
    ImageSummary {
        flavour: flavour.clone(),
        digest: Digest::new(digest),
        created_unix_s: 1_700_000_000,
        entries: 1,
        size_bytes: 4096,
        reused: false,
        damaged: None,
        defaults: Defaults::default(),
    }
}

fn not_running(id: DesktopId) -> HostError {
    HostError::new(HostErrorKind::NotRunning, format!("desktop {id} does not run"))
}

fn failed(source: std::io::Error) -> HostError {
    HostError::because(HostErrorKind::Failed, "cannot make a socket", source)
}

/// Two of a fixed address on one bridge would answer for each other.
fn address_is_free(state: &State, id: DesktopId, address: Option<Ipv4Addr>) -> bool {
    address.is_none() || state.running.values().all(|other| other.spec.id == id || other.spec.address != address)
}

impl Host for FakeHost {
    fn ensure_running(&self, spec: &DesktopSpec, progress: &mut dyn FnMut(StartStep)) -> Result<Timings, HostError> {
        let timings = Timings { root_us: 1, port_us: 2, start_us: 3, session_us: 4 };
        let mut state = self.begin(Op::EnsureRunning)?;
        if state.running.contains_key(&spec.id) {
            return Ok(timings);
        }
        if !state.images.values().any(|image| image.digest == spec.image) {
            return Err(HostError::new(HostErrorKind::NotFound, format!("there is no image {}", spec.image)));
        }
        if !address_is_free(&state, spec.id, spec.address) {
            return Err(HostError::new(HostErrorKind::Busy, "the address is in use on the bridge"));
        }
        for step in [StartStep::Root, StartStep::Confinement, StartStep::Port, StartStep::Init, StartStep::Session] {
            progress(step);
        }
        state.running.insert(spec.id, Running { spec: spec.clone(), client: None });
        Ok(timings)
    }

    fn stop(&self, id: DesktopId, _grace: Duration) -> Result<(), HostError> {
        if let Some(client) = self.begin(Op::Stop)?.running.remove(&id).and_then(|running| running.client) {
            client.end(EndReason::Stopped);
        }
        Ok(())
    }

    fn remove(&self, id: DesktopId) -> Result<(), HostError> {
        let mut state = self.begin(Op::Remove)?;
        if let Some(client) = state.running.remove(&id).and_then(|running| running.client) {
            client.end(EndReason::Stopped);
        }
        state.removed.push(id);
        Ok(())
    }

    fn status(&self, id: DesktopId) -> DesktopStatus {
        let state = self.state();
        let running = state.running.get(&id);
        DesktopStatus {
            state: if running.is_some() { DesktopState::Running } else { DesktopState::Stopped },
            step: None,
            timings: None,
            attached: running.and_then(|r| r.client.as_ref()).is_some_and(AttachmentEnd::is_open),
            resting: false,
            ended: None,
            image: running.map(|running| running.spec.image),
            lacks_room: false,
        }
    }

    fn attach(
        &self,
        id: DesktopId,
        _kind: DisplayKind,
        progress: &mut dyn FnMut(String),
    ) -> Result<Attachment, HostError> {
        let mut state = self.begin(Op::Attach)?;
        let running = state.running.get_mut(&id).ok_or_else(|| not_running(id))?;
        progress("Opening the display".to_owned());
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let (attachment, end) = Attachment::new(theirs).map_err(failed)?;
        if let Some(before) = running.client.replace(end) {
            before.end(EndReason::TakenOver);
        }
        thread::spawn(move || greet_and_echo(ours));
        Ok(attachment)
    }

    fn exec(&self, id: DesktopId, request: ExecRequest) -> Result<ExecSession, HostError> {
        let state = self.begin(Op::Exec)?;
        if !state.running.contains_key(&id) {
            return Err(not_running(id));
        }
        let script = state.script.clone().unwrap_or_else(|| Script::Say {
            stdout: b"hello\n".to_vec(),
            stderr: Vec::new(),
            exit: Exit::Code(0),
        });
        drop(state);
        let (control, inside) = UnixStream::pair().map_err(failed)?;
        let (stdin, stdin_inside) = UnixStream::pair().map_err(failed)?;
        let (stdio, out, err) = if request.tty.is_some() {
            let out = stdin_inside.try_clone().map_err(failed)?;
            (ExecStdio::Tty(stdin.into()), out, None)
        } else {
            let (stdout, out) = UnixStream::pair().map_err(failed)?;
            let (stderr, err) = UnixStream::pair().map_err(failed)?;
            let pipes = ExecStdio::Pipes { stdin: stdin.into(), stdout: stdout.into(), stderr: stderr.into() };
            (pipes, out, Some(err))
        };
        let program = Program { control: Channel::new(inside.into()), stdin: stdin_inside, stdout: out, stderr: err };
        thread::spawn(move || {
            // Its peer has gone: so may it.
            if let Err(error) = program.run(script) {
                tracing::debug!(%error, "a fake program lost its peer");
            }
        });
        Ok(ExecSession::new(stdio, Channel::new(OwnedFd::from(control))))
    }

    fn stats(&self, id: DesktopId) -> Result<Stats, HostError> {
        let state = self.begin(Op::Stats)?;
        let running = state.running.get(&id).ok_or_else(|| not_running(id))?;
        let clients = u32::from(running.client.as_ref().is_some_and(AttachmentEnd::is_open));
        Ok(Stats { pss_bytes: 20 << 20, processes: 9, clients, streams: false, memory: None })
    }

    fn memory(&self) -> Result<MemoryReport, HostError> {
        let state = self.begin(Op::Stats)?;
        let each = Bytes::mib(20);
        let desktops = state.running.keys().map(|&id| DesktopMemory {
            id,
            activity: "idle".to_owned(),
            minimum: each,
            maximum: Bytes::gib(1),
            resident: each,
            used: each,
            balloon: None,
            target: None,
            reclaimed: Bytes::new(0),
            merge_profit_bytes: None,
        });
        Ok(MemoryReport {
            stock: crate::StockReport::default(),
            total: Bytes::gib(16),
            available: Bytes::gib(8),
            swap: Bytes::new(0),
            pressure_percent: 0,
            merging: None,
            not_merging: Some("a host in memory has none".to_owned()),
            desktops: desktops.collect(),
        })
    }

    fn network(&self, id: DesktopId, frames: &[Vec<u8>]) -> Result<Option<PortView>, HostError> {
        let state = self.begin(Op::Stats)?;
        state.running.get(&id).ok_or_else(|| not_running(id))?;
        let mut port = state.ports.get(&id).cloned();
        if let Some(port) = &mut port {
            port.explained.truncate(frames.len());
        }
        Ok(port)
    }

    fn commit(&self, id: DesktopId, _new: &NewVersion) -> Result<Version, HostError> {
        let state = self.begin(Op::BuildImage)?;
        state.running.get(&id).ok_or_else(|| not_running(id))?;
        // Its desktops have no files.
        Err(HostError::new(HostErrorKind::Unsupported, format!("desktop {id} has no root to make a version of")))
    }

    fn build_image(
        &self,
        recipe: &Path,
        _options: &BuildOptions,
        progress: &mut dyn FnMut(&str),
    ) -> Result<ImageSummary, HostError> {
        let mut state = self.begin(Op::BuildImage)?;
        let flavour = state.recipes.get(recipe).cloned().ok_or_else(|| {
            HostError::new(HostErrorKind::NotFound, format!("there is no recipe `{}`", recipe.display()))
        })?;
        progress("installing packages");
        progress("storing the tree");
        let image = image_of(&flavour);
        let reused = state.images.insert(flavour, image.clone()).is_some();
        Ok(ImageSummary { reused, ..image })
    }

    fn images(&self) -> Result<Vec<ImageSummary>, HostError> {
        Ok(self.begin(Op::Images)?.images.values().cloned().collect())
    }

    fn follow(&self, flavour: &FlavourName, tag: &Tag, _: Option<DesktopId>) -> Result<Digest, HostError> {
        let state = self.begin(Op::Images)?;
        let known = *tag == Tag::head() || *tag == Tag::default_tag();
        match state.images.get(flavour).filter(|_| known) {
            Some(image) => Ok(image.digest),
            None => Err(HostError::new(HostErrorKind::NotFound, format!("flavour {flavour} has no tag `{tag}`"))),
        }
    }

    fn repository(&self) -> Option<Arc<Repository>> {
        self.state().repository.clone()
    }
}

/// A display that says hello and then gives back what it gets.
fn greet_and_echo(mut stream: UnixStream) {
    let echoed = stream.try_clone().and_then(|mut from| {
        stream.write_all(GREETING)?;
        std::io::copy(&mut from, &mut stream)
    });
    if let Err(error) = echoed {
        tracing::debug!(%error, "a fake display lost its client");
    }
}

struct Program {
    control: Channel,
    stdin: UnixStream,
    stdout: UnixStream,
    stderr: Option<UnixStream>,
}

impl Program {
    fn run(mut self, script: Script) -> Result<(), Box<dyn std::error::Error>> {
        let exit = match script {
            Script::Say { stdout, stderr, exit } => {
                self.stdout.write_all(&stdout)?;
                // On a terminal both are one.
                self.stderr.as_mut().unwrap_or(&mut self.stdout).write_all(&stderr)?;
                exit
            }
            Script::Echo => {
                let mut chunk = [0; 4096];
                loop {
                    match self.stdin.read(&mut chunk)? {
                        0 => break Exit::Code(0),
                        got => self.stdout.write_all(chunk.get(..got).unwrap_or_default())?,
                    }
                }
            }
            Script::Terminal => {
                self.stdout.write_all(b"ready\n")?;
                loop {
                    match self.control.recv::<Request>(PATIENCE)?.0 {
                        Request::Resize { rows, columns } => writeln!(self.stdout, "{rows}x{columns}")?,
                        Request::Signal { signal } => break Exit::Signal(signal),
                        other => return Err(ChannelError::Bad(format!("{other:?} while a program runs")).into()),
                    }
                }
            }
        };
        // The end of its output is seen no later than its exit, as of a real program.
        self.stdout.shutdown(Shutdown::Write)?;
        if let Some(stderr) = &self.stderr {
            stderr.shutdown(Shutdown::Write)?;
        }
        self.control.send(&Reply::Exited(exit), &[])?;
        // Nothing more is said; wait until the caller has read it and left.
        let mut wait = [rustix::event::PollFd::from_borrowed_fd(self.control.as_fd(), rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut wait, None)?;
        Ok(())
    }
}
