//! Talking with the init inside a desktop, over the socket that this node
//! made and the init inherited.

#[cfg(test)]
mod tests;

use std::{
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    time::{Duration, Instant},
};

use qvd_core::DisplayKind;
use qvd_guest::{
    Channel, ChannelError, ExecRequest, GuestError, Identity, Reply, Request, SessionState, Stats, VERSION,
};
use rustix::{fs::Mode, pipe::PipeFlags};

use crate::{ExecSession, ExecStdio, HostError, HostErrorKind};

/// An init that works answers such requests within microseconds; a desktop
/// whose processors are all taken may need longer.
const ANSWER: Duration = Duration::from_secs(5);
/// The same, once all programs of a machine stand still.
const STILL: Duration = Duration::from_secs(60);

/// Why the init did not do as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Error {
    #[error("cannot {op} `{}`", path.display())]
    Socket { op: &'static str, path: PathBuf, source: std::io::Error },
    #[error("cannot talk with the desktop's init")]
    Channel(#[from] ChannelError),
    #[error("the desktop's init refused")]
    Refused(#[from] GuestError),
    #[error("cannot make pipes for a program")]
    Pipes(#[source] std::io::Error),
    #[error("the desktop's init speaks version {0} of the guest protocol, this node {VERSION}")]
    Version(u32),
    #[error("the desktop's init answered out of turn: {0}")]
    Unexpected(String),
    #[error("the session was not ready within {0:?}")]
    SessionLate(Duration),
}

impl Error {
    /// Says what could not be done for want of the init's help.
    pub(crate) fn into_host_error(self, what: String) -> HostError {
        let kind = match &self {
            Self::SessionLate(_) | Self::Channel(ChannelError::Timeout(_)) => HostErrorKind::Timeout,
            _ => HostErrorKind::Failed,
        };
        HostError::because(kind, what, self)
    }
}

/// The node's end: the path of the socket.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    path: PathBuf,
}

impl Guest {
    pub(crate) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Makes the listening socket that the init will inherit.
    pub(crate) fn listen(&self) -> Result<OwnedFd, Error> {
        let failed = |op, source| Error::Socket { op, path: self.path.clone(), source };
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed("replace", error)),
            _ => {}
        }
        let listener = UnixListener::bind(&self.path).map_err(|e| failed("listen on", e))?;
        rustix::fs::chmod(&self.path, Mode::RUSR | Mode::WUSR).map_err(|e| failed("protect", e.into()))?;
        Ok(listener.into())
    }

    fn ask(&self, request: &Request) -> Result<Channel, Error> {
        self.ask_with(request, &[])
    }

    fn ask_with(&self, request: &Request, fds: &[std::os::fd::BorrowedFd<'_>]) -> Result<Channel, Error> {
        let socket = UnixStream::connect(&self.path).map_err(|source| Error::Socket {
            op: "connect to the desktop at",
            path: self.path.clone(),
            source,
        })?;
        let mut channel = Channel::new(socket.into());
        channel.send(request, fds)?;
        Ok(channel)
    }

    /// Waits until the session is ready, or finds that the image has none.
    pub(crate) fn wait_session(&self, limit: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + limit;
        let mut channel = self.ask(&Request::Watch)?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let reply = match channel.recv(left) {
                Ok((reply, _)) => reply,
                Err(ChannelError::Timeout(_)) => return Err(Error::SessionLate(limit)),
                Err(error) => return Err(error.into()),
            };
            match reply {
                Reply::Status { version, .. } if version != VERSION => return Err(Error::Version(version)),
                Reply::Status { session: SessionState::Ready | SessionState::None, .. } => return Ok(()),
                Reply::Status { .. } => {}
                other => return Err(unexpected(other)),
            }
        }
    }

    /// Whether an init of our version answers.
    pub(crate) fn check(&self) -> Result<(), Error> {
        match self.ask(&Request::Watch)?.recv(ANSWER)?.0 {
            Reply::Status { version: VERSION, .. } => Ok(()),
            Reply::Status { version, .. } => Err(Error::Version(version)),
            other => Err(unexpected(other)),
        }
    }

    pub(crate) fn stats(&self) -> Result<Stats, Error> {
        match self.ask(&Request::Stats)?.recv(ANSWER)?.0 {
            Reply::Stats(stats) => Ok(stats),
            other => Err(unexpected(other)),
        }
    }

    /// Opens the display; the init passes out a connected stream.
    pub(crate) fn attach(
        &self,
        kind: DisplayKind,
        limit: Duration,
        progress: &mut dyn FnMut(String),
    ) -> Result<UnixStream, Error> {
        let deadline = Instant::now() + limit;
        let mut channel = self.ask(&Request::Attach(kind))?;
        loop {
            match channel.recv(deadline.saturating_duration_since(Instant::now()))? {
                (Reply::Progress(text), _) => progress(text),
                (Reply::Display, mut fds) => {
                    let fd = fds.pop().ok_or_else(|| Error::Unexpected("no descriptor with the display".to_owned()))?;
                    return stream(fd);
                }
                (other, _) => return Err(unexpected(other)),
            }
        }
    }

    /// Runs a program inside, on pipes or on a terminal of its own.
    pub(crate) fn exec(&self, request: ExecRequest) -> Result<ExecSession, Error> {
        if request.tty.is_some() {
            let mut channel = self.ask(&Request::Exec(request))?;
            let mut fds = started(&mut channel, ANSWER)?;
            let tty = fds.pop().ok_or_else(|| Error::Unexpected("no descriptor with the terminal".to_owned()))?;
            return Ok(ExecSession::new(ExecStdio::Tty(tty), channel));
        }
        self.on_pipes(&Request::Exec(request), ANSWER)
    }

    /// Runs a program inside a machine while everybody else there stands still.
    pub(crate) fn exec_still(&self, request: ExecRequest) -> Result<ExecSession, Error> {
        self.on_pipes(&Request::ExecStill(request), STILL)
    }

    fn on_pipes(&self, request: &Request, limit: Duration) -> Result<ExecSession, Error> {
        let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|e| Error::Pipes(e.into()));
        let (in_read, stdin) = pipe()?;
        let (stdout, out_write) = pipe()?;
        let (stderr, err_write) = pipe()?;
        let theirs = [in_read.as_fd(), out_write.as_fd(), err_write.as_fd()];
        let mut channel = self.ask_with(request, &theirs)?;
        started(&mut channel, limit)?;
        Ok(ExecSession::new(ExecStdio::Pipes { stdin, stdout, stderr }, channel))
    }

    /// Sets the clock inside a machine.
    pub(crate) fn set_clock(&self, time_ns: u64) -> Result<(), Error> {
        self.done(&Request::Time { time_ns }, ANSWER)
    }

    /// Has the init end its session's programs and start none.
    pub(crate) fn hold(&self, limit: Duration) -> Result<(), Error> {
        self.done(&Request::Hold, limit)
    }

    /// Has the init become another, and its held session begin in the home that
    /// is on its disk.
    pub(crate) fn become_another(&self, identity: Identity, limit: Duration) -> Result<(), Error> {
        self.done(&Request::Identify(identity), limit)?;
        self.done(&Request::Release { home: true }, limit)
    }

    fn done(&self, request: &Request, limit: Duration) -> Result<(), Error> {
        match self.ask(request)?.recv(limit)?.0 {
            Reply::Done => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Asks the init to end everything inside. Its exit tells when it has.
    pub(crate) fn stop(&self, grace: Duration) -> Result<(), Error> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        match self.ask(&Request::Stop { grace_ms })?.recv(ANSWER)?.0 {
            Reply::Stopping => Ok(()),
            other => Err(unexpected(other)),
        }
    }
}

fn started(channel: &mut Channel, limit: Duration) -> Result<Vec<OwnedFd>, Error> {
    match channel.recv(limit)? {
        (Reply::Started { .. }, fds) => Ok(fds),
        (other, _) => Err(unexpected(other)),
    }
}

fn unexpected(reply: Reply) -> Error {
    match reply {
        Reply::Error(error) => Error::Refused(error),
        other => Error::Unexpected(format!("{other:?}")),
    }
}

/// Takes a descriptor from inside only if it is what it should be: something
/// else, a terminal or a file of the host, would be used as a display.
fn stream(fd: OwnedFd) -> Result<UnixStream, Error> {
    use rustix::net::{AddressFamily, SocketType, sockopt};
    let domain = sockopt::socket_domain(&fd);
    let kind = sockopt::socket_type(&fd);
    match (domain, kind) {
        (Ok(AddressFamily::UNIX), Ok(SocketType::STREAM)) => Ok(UnixStream::from(fd)),
        (domain, kind) => Err(Error::Unexpected(format!("a display that is no unix stream: {domain:?} {kind:?}"))),
    }
}
