//! Copies bytes between a client and a display.

use std::{io, time::Duration};

use qvd_node::EndReason;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::timeout,
};

use crate::{
    display::{CHUNK, Display},
    server::Shared,
};

/// Once one side has ended, the other has this long to end as well.
const LINGER: Duration = Duration::from_secs(5);

/// What a connection carried, and how it ended.
#[derive(Debug)]
pub(super) struct Moved {
    pub(super) up_bytes: u64,
    pub(super) down_bytes: u64,
    pub(super) reason: EndReason,
}

/// Copies both ways until both sides have ended, or one has and the other
/// does not follow, or the server stops. `early` came before the display.
pub(super) async fn run<S>(client: &mut S, display: &Display, early: Vec<u8>, shared: &Shared) -> Moved
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut up_bytes, mut down_bytes) = (0, 0);
    let copied = async {
        let mut inside = display.stream()?;
        let (mut from_display, mut to_display) = inside.split();
        let (mut from_client, mut to_client) = tokio::io::split(client);
        to_display.write_all(&early).await?;
        up_bytes += early.len() as u64;
        drop(early);
        let mut up = std::pin::pin!(copy(&mut from_client, &mut to_display, &mut up_bytes));
        let mut down = std::pin::pin!(copy(&mut from_display, &mut to_client, &mut down_bytes));
        let late = |_| io::Error::from(io::ErrorKind::TimedOut);
        tokio::select! {
            up = &mut up => { up?; timeout(LINGER, down).await.map_err(late)? }
            down = &mut down => { down?; timeout(LINGER, up).await.map_err(late)? }
            () = shared.stopping() => Ok(()),
        }
    };
    if let Err(error) = copied.await {
        tracing::debug!(%error, "a side of an NX connection broke off");
    }
    Moved { up_bytes, down_bytes, reason: display.end_reason() }
}

/// Copies until `from` ends, then ends `to`.
async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    bytes: &mut u64,
) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = from.read(&mut chunk).await?;
        if read == 0 {
            return to.shutdown().await;
        }
        to.write_all(chunk.get(..read).unwrap_or_default()).await?;
        to.flush().await?;
        *bytes += read as u64;
    }
}
