//! A program inside a desktop, over an upgraded connection.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use axum::{
    extract::{FromRequest, Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use qvd_core::DesktopId;
use qvd_guest::{ChannelError, ExecRequest};
use qvd_node::{ExecControl, ExecSession, ExecStdio};
use rustix::{io::Errno, net::sockopt};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, unix::AsyncFd},
    sync::mpsc,
    task::JoinSet,
};

use super::{
    Caller,
    dto::ErrorInfo,
    error::ApiError,
    frame::{self, Frame},
    repository::{asks_for, upgrade_required},
    router::{ApiState, At, Body, visible},
};

/// How long a desktop's init may take over a message that it began.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long output may still come after the program has ended: a child of it
/// in the background may hold its output open for ever.
const DRAIN: Duration = Duration::from_secs(2);

/// Frames that wait on their way; a slow reader slows the program down.
const QUEUE: usize = 8;

pub(super) async fn exec(
    State(ApiState { farm }): State<ApiState>,
    caller: Caller,
    At(id): At<DesktopId>,
    mut request: Request,
) -> Result<Response, ApiError> {
    visible(&farm, &caller, id).await?;
    let upgrade =
        request.extensions_mut().remove::<OnUpgrade>().filter(|_| asks_for(request.headers(), frame::PROTOCOL));
    let Some(upgrade) = upgrade else { return Ok(upgrade_required(frame::PROTOCOL)) };
    let Body(program) = Body::<ExecRequest>::from_request(request, &()).await?;
    if program.root && !caller.is_admin() {
        return Err(ApiError::forbidden());
    }
    let session = farm.exec(id, program).await.map_err(|e| ApiError::new(&caller, &e))?;
    tokio::spawn(async move {
        let served = match upgrade.await {
            Ok(stream) => serve(TokioIo::new(stream), session).await,
            Err(e) => Err(io::Error::other(e)),
        };
        if let Err(error) = served {
            tracing::debug!(desktop = %id, %error, "a program's connection ended early");
        }
    });
    let headers = [(header::CONNECTION, "Upgrade"), (header::UPGRADE, frame::PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

type Stream = TokioIo<Upgraded>;

/// Copies between the connection and the program until one of them leaves.
/// When it is the client, dropping the session tells the program (SIGHUP).
async fn serve(stream: Stream, session: ExecSession) -> io::Result<()> {
    let (from, to) = tokio::io::split(stream);
    let (output, outgoing) = mpsc::channel(QUEUE);
    let (incoming_to, incoming) = mpsc::channel(QUEUE);
    // Dropping the sets ends what is left of their tasks.
    let mut pumps = JoinSet::new();
    let mut ends = JoinSet::new();
    let (stdin, control) = open(session, &output, &mut pumps)?;
    ends.spawn(read_frames(from, incoming_to));
    let mut writer = JoinSet::new();
    writer.spawn(write_frames(to, outgoing));

    let last = tokio::select! {
        last = follow(control, stdin, incoming) => last,
        // The client has gone, so nobody hears how it ends.
        _ = writer.join_next() => return Ok(()),
    };
    let Some(last) = last else { return Ok(()) };
    if tokio::time::timeout(DRAIN, async { while pumps.join_next().await.is_some() {} }).await.is_err() {
        pumps.abort_all();
    }
    if output.send(last).await.is_err() {
        return Ok(());
    }
    drop(output);
    // The pumps' senders are gone with them: the writer ends after the last frame.
    pumps.shutdown().await;
    writer.join_next().await.map_or(Ok(()), |ended| ended.map_err(io::Error::other)?)
}

/// Takes a session apart, and starts copying its output.
fn open(
    session: ExecSession,
    output: &mpsc::Sender<Frame>,
    pumps: &mut JoinSet<()>,
) -> io::Result<(mpsc::Sender<Vec<u8>>, Control)> {
    let ExecSession { stdio, control: session } = session;
    let ended = watched(session.as_fd().try_clone_to_owned()?)?;
    // What is inside may not read what we send; that must not hold a thread for ever.
    sockopt::set_socket_timeout(&ended, sockopt::Timeout::Send, Some(CONTROL_TIMEOUT))?;
    let (stdin_to, stdin_from) = mpsc::channel(QUEUE);
    match stdio {
        ExecStdio::Pipes { stdin, stdout, stderr } => {
            pumps.spawn(pump(Arc::new(Pipe::new(stdout)?), output.clone(), Frame::Stdout));
            pumps.spawn(pump(Arc::new(Pipe::new(stderr)?), output.clone(), Frame::Stderr));
            tokio::spawn(feed(Arc::new(Pipe::new(stdin)?), stdin_from));
        }
        ExecStdio::Tty(terminal) => {
            let terminal = Arc::new(Pipe::new(terminal)?);
            pumps.spawn(pump(Arc::clone(&terminal), output.clone(), Frame::Stdout));
            tokio::spawn(feed(terminal, stdin_from));
        }
        _ => return Err(io::Error::other("the program's input and output are of an unknown kind")),
    }
    Ok((stdin_to, Control { session, ended }))
}

/// What is left of a session without its input and output.
struct Control {
    session: ExecControl,
    ended: AsyncFd<OwnedFd>,
}

impl Control {
    /// Does something with the session that may take a while.
    async fn with<T: Send + 'static>(
        self,
        work: impl FnOnce(&mut ExecControl) -> Result<T, ChannelError> + Send + 'static,
    ) -> (Option<Self>, Result<T, String>) {
        let Self { mut session, ended } = self;
        let result = tokio::task::spawn_blocking(move || {
            let result = work(&mut session);
            (session, result)
        });
        match result.await {
            Ok((session, result)) => (Some(Self { session, ended }), result.map_err(|e| e.to_string())),
            Err(e) => (None, Err(e.to_string())),
        }
    }
}

/// Passes on what the client sends until the program ends. Gives the last
/// frame, or none when the client left first.
async fn follow(
    mut control: Control,
    stdin: mpsc::Sender<Vec<u8>>,
    mut incoming: mpsc::Receiver<Frame>,
) -> Option<Frame> {
    let mut stdin = Some(stdin);
    let failed = |cause: String| {
        let error = ApiError::plain(StatusCode::BAD_GATEWAY, "exec_failed", "cannot follow the program");
        Some(Frame::Failed(ErrorInfo { cause: vec![cause], ..error.into_info() }))
    };
    loop {
        let frame = tokio::select! {
            ready = control.ended.readable() => {
                if let Err(error) = ready {
                    return failed(error.to_string());
                }
                None
            }
            frame = incoming.recv() => Some(frame?),
        };
        let (back, result) = match frame {
            None => match control.with(|session| session.wait(CONTROL_TIMEOUT)).await {
                (_, Ok(exit)) => return Some(Frame::Exit(exit)),
                (_, Err(cause)) => return failed(cause),
            },
            Some(Frame::Stdin(bytes)) => {
                if bytes.is_empty() {
                    stdin = None;
                } else if let Some(to) = &stdin
                    && to.send(bytes).await.is_err()
                {
                    // The program closed its input; it may go on all the same.
                    stdin = None;
                }
                continue;
            }
            Some(Frame::Resize { rows, columns }) => control.with(move |session| session.resize(rows, columns)).await,
            Some(Frame::Signal(signal)) => control.with(move |session| session.signal(signal)).await,
            Some(_) => return failed("the client sent a frame that only a server sends".to_owned()),
        };
        if let Err(cause) = result {
            // It may have ended at this moment; then its exit says so.
            tracing::debug!(cause, "a program could not be steered");
        }
        control = back?;
    }
}

async fn read_frames<R: AsyncRead + Unpin>(mut from: R, to: mpsc::Sender<Frame>) {
    loop {
        match frame::read(&mut from).await {
            Ok(Some(frame)) => {
                if to.send(frame).await.is_err() {
                    return;
                }
            }
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(%error, "a client's frames ended");
                return;
            }
        }
    }
}

async fn write_frames<W: AsyncWrite + Unpin>(mut to: W, mut from: mpsc::Receiver<Frame>) -> io::Result<()> {
    while let Some(frame) = from.recv().await {
        frame::write(&mut to, &frame).await?;
    }
    to.shutdown().await
}

/// Copies output to the client until its end.
async fn pump(from: Arc<Pipe>, to: mpsc::Sender<Frame>, frame: fn(Vec<u8>) -> Frame) {
    let mut chunk = vec![0; 16 * 1024];
    loop {
        match from.read(&mut chunk).await {
            Ok(0) => return,
            Ok(got) => {
                if to.send(frame(chunk.get(..got).unwrap_or_default().to_vec())).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::debug!(%error, "a program's output ended");
                return;
            }
        }
    }
}

/// Copies input to the program until its end.
async fn feed(to: Arc<Pipe>, mut from: mpsc::Receiver<Vec<u8>>) {
    while let Some(bytes) = from.recv().await {
        if let Err(error) = to.write_all(&bytes).await {
            tracing::debug!(%error, "a program takes no more input");
            return;
        }
    }
}

/// Registers a descriptor with the reactor. `new` is deprecated because a type
/// may lie about which descriptor it owns; `OwnedFd` does not, and the
/// replacement is `unsafe`.
#[allow(deprecated)]
fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}

/// A descriptor of a program's, awaited instead of waited for.
struct Pipe(AsyncFd<OwnedFd>);

impl Pipe {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        watched(fd).map(Self)
    }

    async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|fd| Ok(rustix::io::read(fd, &mut *into)?)) {
                // A terminal whose last program has left says EIO: tty_ioctl(4).
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => return Ok(0),
                Ok(result) => return result,
                Err(_not_yet) => {}
            }
        }
    }

    async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.0.writable().await?;
            if let Ok(written) = ready.try_io(|fd| Ok(rustix::io::write(fd, bytes)?)) {
                bytes = bytes.get(written?..).unwrap_or_default();
            }
        }
        Ok(())
    }
}
