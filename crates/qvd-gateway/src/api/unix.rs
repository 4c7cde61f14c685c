//! The front door for the host itself: a unix socket that knows its callers.

use std::{
    fs::{self, Permissions},
    future::Future,
    io,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    pin::pin,
    time::Duration,
};

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
    task::JoinSet,
};

use super::{Caller, error::ApiError};

/// How long a caller may take over the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// How long requests under way may take when the daemon is told to end.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// Callers at once. They are the host's own; a runaway script must not take
/// every descriptor of the daemon.
const MAX_CONNECTIONS: usize = 256;

/// Why the socket cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnixServeError {
    /// Somebody answers there: another daemon.
    #[error("`{}` is in use by another daemon", .0.display())]
    InUse(PathBuf),
    /// Something stands there that is no socket; it is left alone.
    #[error("`{}` exists and is no socket", .0.display())]
    NotASocket(PathBuf),
    /// A system call failed.
    #[error("cannot {op} `{}`", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// With what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// A socket that listens, for its owner alone.
#[derive(Debug)]
pub struct UnixDoor {
    listener: UnixListener,
    place: Place,
}

/// Our socket's name. Goes with its owner, also with one that never served.
#[derive(Debug)]
struct Place {
    path: PathBuf,
    /// Device and inode, to know our own socket again.
    identity: (u64, u64),
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::warn!(%error, "socket left behind");
        }
    }
}

impl UnixDoor {
    /// Listens at `path`, in place of a socket that a dead daemon left there.
    /// From its return on, callers can connect.
    ///
    /// # Errors
    /// [`UnixServeError::InUse`] when a daemon answers there.
    pub async fn bind(path: &Path) -> Result<Self, UnixServeError> {
        let failed = |op| move |source| UnixServeError::Io { op, path: path.to_owned(), source };
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => return Err(UnixServeError::NotASocket(path.to_owned())),
            Ok(_) => match UnixStream::connect(path).await {
                Ok(_answered) => return Err(UnixServeError::InUse(path.to_owned())),
                Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {}
                Err(e) => return Err(failed("ask who listens at")(e)),
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed("look at")(e)),
        }
        // Made private under another name first, then renamed over what is
        // there: at `path` it is never open to others and never absent.
        let mut new = path.as_os_str().to_owned();
        new.push(format!(".{}", std::process::id()));
        let new = PathBuf::from(new);
        match fs::remove_file(&new) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("remove an old socket beside")(e)),
            _ => {}
        }
        let listener = UnixListener::bind(&new).map_err(failed("listen at"))?;
        let placed = fs::set_permissions(&new, Permissions::from_mode(0o600))
            .and_then(|()| fs::symlink_metadata(&new))
            .and_then(|found| fs::rename(&new, path).map(|()| (found.dev(), found.ino())));
        match placed {
            Ok(identity) => Ok(Self { listener, place: Place { path: path.to_owned(), identity } }),
            Err(e) => {
                if let Err(error) = fs::remove_file(&new) {
                    tracing::warn!(path = %new.display(), %error, "socket left behind");
                }
                Err(failed("listen at")(e))
            }
        }
    }

    /// Serves `router` until `shutdown`, then lets requests under way end and
    /// removes the socket.
    ///
    /// # Errors
    /// The socket cannot be removed.
    pub async fn serve(self, router: Router, shutdown: impl Future<Output = ()>) -> Result<(), UnixServeError> {
        let (ending, ended) = watch::channel(false);
        let mut connections = JoinSet::new();
        let mut shutdown = pin!(shutdown);
        loop {
            let accepted = tokio::select! {
                () = &mut shutdown => break,
                Some(_) = connections.join_next(), if !connections.is_empty() => continue,
                accepted = self.listener.accept(), if connections.len() < MAX_CONNECTIONS => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(stream, router.clone(), ended.clone()));
                }
                Err(error) => {
                    // Of one caller, or for want of descriptors: a moment later it may work.
                    tracing::warn!(%error, "cannot accept a caller");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
        let Self { listener, place } = self;
        let removed = place.remove();
        drop(listener);
        ending.send_replace(true);
        let all = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(SHUTDOWN_GRACE, all).await.is_err() {
            tracing::warn!("requests were cut off at shutdown");
        }
        removed
    }
}

impl Place {
    /// Removes the socket unless another daemon has put its own there.
    fn remove(&self) -> Result<(), UnixServeError> {
        let failed = |op| move |source| UnixServeError::Io { op, path: self.path.clone(), source };
        match fs::symlink_metadata(&self.path) {
            Ok(found) if (found.dev(), found.ino()) == self.identity => {
                fs::remove_file(&self.path).map_err(failed("remove"))
            }
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(failed("look at")(e)),
        }
    }
}

/// [`UnixDoor::bind`] and [`UnixDoor::serve`].
///
/// # Errors
/// As those.
pub async fn serve_unix(path: &Path, router: Router, shutdown: impl Future<Output = ()>) -> Result<(), UnixServeError> {
    UnixDoor::bind(path).await?.serve(router, shutdown).await
}

/// Who is behind a connection.
fn caller_of(stream: &UnixStream) -> io::Result<Option<Caller>> {
    Ok(caller_with(stream.peer_cred()?.uid(), rustix::process::geteuid().as_raw()))
}

/// Root, and the daemon's own user, who could take over the daemon anyway.
fn caller_with(uid: u32, own: u32) -> Option<Caller> {
    (uid == 0 || uid == own).then_some(Caller::Admin { user: None })
}

async fn connection(stream: UnixStream, router: Router, mut ended: watch::Receiver<bool>) {
    let router = match caller_of(&stream) {
        Ok(Some(caller)) => router.layer(Extension(caller)),
        Ok(None) => Router::new().fallback(|| async { ApiError::forbidden() }),
        Err(error) => {
            tracing::warn!(%error, "cannot tell who calls");
            return;
        }
    };
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    let served = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)).with_upgrades();
    let mut served = pin!(served);
    let result = tokio::select! {
        result = &mut served => Some(result),
        () = async { ended.wait_for(|ended| *ended).await.map_or((), drop) } => None,
    };
    let result = match result {
        Some(result) => result,
        None => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a caller's connection failed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_and_the_daemons_own_user_administer() {
        let admin = Some(Caller::Admin { user: None });
        assert_eq!(
            (caller_with(0, 0), caller_with(0, 990), caller_with(990, 990)),
            (admin.clone(), admin.clone(), admin)
        );
        assert_eq!((caller_with(1000, 0), caller_with(1000, 990)), (None, None));
    }
}
