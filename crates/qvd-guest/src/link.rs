//! The host's and the guest's ends of the line into a virtual machine.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, fcntl_dupfd_cloexec},
};

use crate::{
    BootConfig, Booted,
    bridge::{Bridge, End},
    frame::{FLUSH, Frame, HEAD, Kind, LinkError, NONCE, Parser},
};

/// Most of what an earlier connection left on its way that is read over.
const MAX_STALE: usize = 16 << 20;

/// Between two looks at a port that nobody has connected to yet.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

fn io_error(op: &'static str) -> impl FnOnce(io::Error) -> LinkError {
    move |source| LinkError::Io { op, source }
}

/// The host's end, before it carries conversations.
#[derive(Debug)]
pub struct Link {
    socket: UnixStream,
    parser: Parser,
}

impl Link {
    /// Connects to the socket of a new machine's port and waits for the guest
    /// to answer.
    ///
    /// # Errors
    /// Nobody listens, or the guest does not answer within `limit`.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self, LinkError> {
        Self::greet(path, limit, 0)
    }

    /// Connects to a machine that was connected to before. Its guest forgets
    /// its former conversations.
    ///
    /// # Errors
    /// As [`Link::connect`].
    pub fn reconnect(path: &Path, limit: Duration) -> Result<Self, LinkError> {
        Self::greet(path, limit, FLUSH)
    }

    fn greet(path: &Path, limit: Duration, flush: usize) -> Result<Self, LinkError> {
        let mut socket = UnixStream::connect(path).map_err(io_error("connect to"))?;
        let mut nonce = vec![0; NONCE];
        let random = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut nonce));
        random.map_err(io_error("name the connection of"))?;
        let mut said = vec![0; flush];
        Frame::new(Kind::Hello, 0, nonce.clone()).write_to(&mut said);
        socket.set_write_timeout(Some(limit)).map_err(io_error("set up"))?;
        socket.write_all(&said).map_err(io_error("write to"))?;
        socket.set_nonblocking(true).map_err(io_error("set up"))?;
        let deadline = Instant::now() + limit;
        let late = || LinkError::Timeout { step: "answer", limit };
        let wanted = Frame::new(Kind::Welcome, 0, nonce).bytes();
        let (mut stale, mut window) = (0, Vec::new());
        loop {
            if let Some(at) = window.windows(wanted.len()).position(|piece| piece == wanted) {
                let mut parser = Parser::default();
                parser.feed(window.get(at + wanted.len()..).unwrap_or_default());
                return Ok(Self { socket, parser });
            }
            let kept = window.len().saturating_sub(wanted.len());
            stale += kept;
            window.drain(..kept);
            if stale > MAX_STALE {
                return Err(LinkError::Bad("no answer among much else"));
            }
            window.extend(read_some(&mut socket, deadline)?.ok_or_else(late)?);
        }
    }

    /// Tells the guest what to become, and waits until it has.
    ///
    /// # Errors
    /// The guest cannot, or takes longer than `limit`.
    pub fn boot(&mut self, config: &BootConfig, limit: Duration) -> Result<Booted, LinkError> {
        let deadline = Instant::now() + limit;
        let said = Frame::json(Kind::Boot, config)?.bytes();
        self.socket.set_nonblocking(false).map_err(io_error("set up"))?;
        self.socket.write_all(&said).map_err(io_error("write to"))?;
        self.socket.set_nonblocking(true).map_err(io_error("set up"))?;
        loop {
            if let Some(frame) = self.parser.next()? {
                return match frame.kind {
                    Kind::Booted => frame.parse("report"),
                    Kind::Failed => Err(LinkError::Refused(words(&frame.body))),
                    _ => Err(LinkError::Bad("something else than a report")),
                };
            }
            let bytes = read_some(&mut self.socket, deadline)?;
            self.parser.feed(&bytes.ok_or(LinkError::Timeout { step: "boot", limit })?);
        }
    }

    /// Carries the conversations of whoever connects to `listener`, until the
    /// guest is gone or [`Carrier::close`] is called.
    ///
    /// # Errors
    /// There is no thread or descriptor to be had.
    pub fn carry(self, listener: OwnedFd) -> Result<Carrier, LinkError> {
        let (stop, theirs) = UnixStream::pair().map_err(io_error("watch"))?;
        let mut bridge = Bridge::new(self.socket.into(), theirs.into(), End::Host(listener), self.parser);
        let work = move || bridge.run().err();
        let thread = thread::Builder::new().name("guest link".to_owned()).spawn(work);
        Ok(Carrier { stop: Some(stop), thread: Some(thread.map_err(io_error("carry"))?) })
    }
}

/// A text of the guest's, fit for one line of a log.
fn words(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().take(300).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Reads what is there, waiting for it until the deadline.
fn read_some(socket: &mut UnixStream, deadline: Instant) -> Result<Option<Vec<u8>>, LinkError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
        match poll(&mut [PollFd::new(&*socket, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(LinkError::Io { op: "wait for", source: error.into() }),
        }
        let mut bytes = [0; 4096];
        match socket.read(&mut bytes) {
            Ok(0) => return Err(LinkError::Closed),
            Ok(got) => return Ok(Some(bytes.get(..got).unwrap_or_default().to_vec())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(LinkError::Closed),
            Err(error) => return Err(io_error("read from")(error)),
        }
    }
}

/// A thread that carries conversations. Dropping it ends them.
#[derive(Debug)]
pub struct Carrier {
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<Option<LinkError>>>,
}

impl Carrier {
    /// Whether it has ended by itself: the guest is gone, or is not to be
    /// talked with.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends it. Idempotent.
    ///
    /// # Errors
    /// What had ended it before.
    pub fn close(&mut self) -> Result<(), LinkError> {
        drop(self.stop.take());
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(Some(error))) => Err(error),
            Some(Err(_)) => Err(LinkError::Bad("the thread that carries it panicked")),
            Some(Ok(None)) | None => Ok(()),
        }
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        // How it ended was for `close` to tell.
        let _ended = self.close();
    }
}

/// The guest's end, in the first process while it boots.
#[derive(Debug)]
pub struct GuestLink {
    port: File,
}

impl GuestLink {
    /// Takes over the port.
    #[must_use]
    pub const fn new(port: File) -> Self {
        Self { port }
    }

    /// Waits for the host to say what this guest is to become.
    ///
    /// # Errors
    /// What comes is not that.
    pub fn configuration(&mut self) -> Result<BootConfig, LinkError> {
        let mut parser = Parser::default();
        loop {
            if let Some(frame) = parser.next()? {
                match frame.kind {
                    Kind::Hello => self.say(&Frame::new(Kind::Welcome, 0, frame.body))?,
                    Kind::Boot => return frame.parse("configuration"),
                    _ => return Err(LinkError::Bad("a frame before the configuration")),
                }
                continue;
            }
            // Not a byte more: what follows is for the process that carries
            // conversations.
            let mut bytes = vec![0; parser.due()?.min(4096)];
            match self.port.read(&mut bytes) {
                // A port that nobody is connected to is at its end.
                Ok(0) => thread::sleep(LOOK_AGAIN),
                Ok(got) => parser.feed(bytes.get(..got).unwrap_or_default()),
                Err(error) => return Err(io_error("read from")(error)),
            }
        }
    }

    /// Tells the host that the init begins.
    ///
    /// # Errors
    /// The port does not take it.
    pub fn booted(&mut self, booted: &Booted) -> Result<(), LinkError> {
        self.say(&Frame::json(Kind::Booted, booted)?)
    }

    /// Tells the host why this guest cannot boot.
    ///
    /// # Errors
    /// The port does not take it.
    pub fn failed(&mut self, why: &str) -> Result<(), LinkError> {
        self.say(&Frame::new(Kind::Failed, 0, why.as_bytes().to_vec()))
    }

    fn say(&mut self, frame: &Frame) -> Result<(), LinkError> {
        debug_assert!(frame.body.len() + HEAD <= FLUSH);
        self.port.write_all(&frame.bytes()).map_err(io_error("write to"))
    }

    /// The port, for whoever carries conversations.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn into_port(self) -> io::Result<OwnedFd> {
        Ok(fcntl_dupfd_cloexec(self.port.as_fd(), 16)?)
    }
}

/// Carries conversations between the `port` of a guest and its init, which
/// listens at `control`; ends when `stop` becomes readable.
///
/// # Errors
/// The port failed, or the host broke the protocol.
pub fn carry_in_guest(port: OwnedFd, stop: OwnedFd, control: PathBuf) -> Result<(), LinkError> {
    rustix::io::ioctl_fionbio(&port, true).map_err(|e| LinkError::Io { op: "set up", source: e.into() })?;
    Bridge::new(port, stop, End::Guest(control), Parser::default()).run().map(drop)
}
