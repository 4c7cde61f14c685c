//! The host's images for other repositories, over an upgraded connection.
//!
//! What travels on it is in [`qvd_storage::repository::wire`]: below, the side
//! that has the connection accepted; [`RepositoryDoor`](super::RepositoryDoor) is the other.

use std::{io, os::unix::net::UnixStream, sync::Arc, thread, time::Duration};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use qvd_storage::{Repository, repository::wire};

use super::{Caller, error::ApiError, router::ApiState};

/// Name of the protocol in `Upgrade`.
pub(super) const PROTOCOL: &str = "qvd-repository-1";

/// How long the other side may be silent: it reads from its disk and
/// compresses, or asks next. A connection is cheap to make again.
const SILENCE: Duration = Duration::from_secs(120);

/// Answers questions about the repository.
pub(super) async fn pull(state: State<ApiState>, caller: Caller, request: Request) -> Result<Response, ApiError> {
    upgraded(state, caller, request, |repository, stream, _| wire::serve(&repository, &mut { stream }))
}

/// Gets into the repository what the other side offers.
pub(super) async fn push(state: State<ApiState>, caller: Caller, request: Request) -> Result<Response, ApiError> {
    upgraded(state, caller, request, |repository, stream, who| {
        wire::receive(&repository, Box::new(stream), who, who)?;
        tracing::info!(who, "images were pushed here");
        Ok(())
    })
}

fn upgraded(
    State(ApiState { farm }): State<ApiState>,
    caller: Caller,
    mut request: Request,
    work: impl FnOnce(Arc<Repository>, UnixStream, &str) -> io::Result<()> + Send + 'static,
) -> Result<Response, ApiError> {
    // An image may hold what only administrators are to see.
    if !caller.is_admin() {
        return Err(ApiError::forbidden());
    }
    let Some(repository) = farm.repository() else {
        let message = "the images of this host are not on this machine";
        return Err(ApiError::plain(StatusCode::NOT_IMPLEMENTED, "no_repository", message));
    };
    let upgrade = request.extensions_mut().remove::<OnUpgrade>().filter(|_| asks_for(request.headers(), PROTOCOL));
    let Some(upgrade) = upgrade else { return Ok(upgrade_required(PROTOCOL)) };
    let who = caller.user().map_or_else(|| "root".to_owned(), ToString::to_string);
    let prepared = || {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(SILENCE))?;
        ours.set_write_timeout(Some(SILENCE))?;
        theirs.set_nonblocking(true)?;
        // A thread of its own, and no task that blocks: nobody waits for one
        // when the daemon ends, which ends its connection.
        let work = move || {
            if let Err(error) = work(repository, ours, &who) {
                tracing::info!(%error, "a transfer of images was cut off");
            }
        };
        thread::Builder::new().name("images".to_owned()).spawn(work)?;
        tokio::net::UnixStream::from_std(theirs)
    };
    let mut stream = prepared().map_err(|error| {
        tracing::error!(%error, "cannot serve images");
        ApiError::plain(StatusCode::INTERNAL_SERVER_ERROR, "internal", "cannot serve images")
    })?;
    tokio::spawn(async move {
        let copied = match upgrade.await {
            Ok(upgraded) => tokio::io::copy_bidirectional(&mut TokioIo::new(upgraded), &mut stream).await,
            Err(error) => Err(io::Error::other(error)),
        };
        if let Err(error) = copied {
            tracing::debug!(%error, "a connection about images ended early");
        }
    });
    let headers = [(header::CONNECTION, "Upgrade"), (header::UPGRADE, PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Whether a request asks for a protocol.
pub(super) fn asks_for(headers: &HeaderMap, protocol: &str) -> bool {
    let has = |name, word: &str| {
        let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|part| part.trim().eq_ignore_ascii_case(word))
    };
    has(header::CONNECTION, "upgrade") && has(header::UPGRADE, protocol)
}

/// The answer to who does not.
pub(super) fn upgrade_required(protocol: &'static str) -> Response {
    let message = format!("this path takes `Connection: Upgrade` and `Upgrade: {protocol}`");
    let mut response = ApiError::plain(StatusCode::UPGRADE_REQUIRED, "upgrade_required", message).into_response();
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(protocol));
    response
}
