//! A desktop's screen in a browser: RFB bytes in a WebSocket, as noVNC wants them.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Extension,
    extract::{
        Path, Query, State,
        ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade},
    },
    http::{HeaderMap, StatusCode},
    response::Response,
};
use futures_util::{SinkExt as _, StreamExt as _};
use qvd_core::{DesktopId, DisplayKind, Geometry};
use qvd_farm::{FarmError, SessionKind};
use qvd_node::EndReason;
use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::mpsc,
    time::{Instant, interval, timeout},
};

use super::{
    guard::{RequestId, SignedIn, same_origin},
    pages::refusal,
};
use crate::{
    display::{CHUNK, Display},
    server::{Peer, Shared},
    wire,
};

/// Longest message that a browser may send. noVNC flushes at 10 KiB; only a
/// large clipboard comes in more.
const MESSAGE_MAX: usize = 1 << 20;
/// Pings without an answer after which a browser is gone.
const MISSED_PINGS: u32 = 3;
/// For a browser to take what we send.
const WRITE_DEADLINE: Duration = Duration::from_secs(60);

/// Why the display ended, as the close code of the WebSocket. From 4000 on
/// codes are the application's (RFC 6455, 7.4.2); `assets/desktop.js` knows them.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    /// The gateway stops; another connection in a moment finds it again.
    GoingAway,
    TakenOver,
    Stopped,
    SignedOut,
    /// The display's side ended without a reason.
    Lost,
    /// It could not be opened.
    Failed(String),
    /// The browser left.
    Left,
}

impl End {
    fn frame(&self) -> Option<CloseFrame> {
        let (code, reason) = match self {
            Self::GoingAway => (1001, "the server is stopping"),
            Self::TakenOver => (4001, "this desktop was opened on another screen"),
            Self::Stopped => (4002, "the desktop was stopped"),
            Self::SignedOut => (4003, "you are signed out"),
            Self::Lost => (4004, "the connection to the desktop was lost"),
            Self::Failed(text) => (4005, text.as_str()),
            Self::Left => return None,
        };
        // A close frame holds at most 123 bytes of text (RFC 6455, 5.5).
        let mut end = reason.len().min(123);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        Some(CloseFrame { code, reason: reason.get(..end).unwrap_or_default().into() })
    }
}

/// The browser's viewport in pixels.
#[derive(Debug, Deserialize)]
pub(super) struct Viewport {
    width: Option<u16>,
    height: Option<u16>,
}

impl Viewport {
    fn geometry(&self) -> Geometry {
        let usual = Geometry::default();
        let width = self.width.unwrap_or(usual.width()).clamp(Geometry::MIN.width(), Geometry::MAX.width());
        let height = self.height.unwrap_or(usual.height()).clamp(Geometry::MIN.height(), Geometry::MAX.height());
        Geometry::new(width, height).unwrap_or_default()
    }
}

/// `GET /desktops/{id}/display`, upgraded to a WebSocket.
#[expect(clippy::too_many_arguments, reason = "each is a part of one request")]
pub(super) async fn display(
    State(shared): State<Arc<Shared>>,
    Extension(peer): Extension<Peer>,
    Extension(request): Extension<RequestId>,
    headers: HeaderMap,
    who: SignedIn,
    Path(desktop): Path<String>,
    Query(viewport): Query<Viewport>,
    upgrade: WebSocketUpgrade,
) -> Response {
    // Cookies travel with any site's WebSocket: only `Origin` tells whose it is.
    if same_origin(&headers) != Some(true) {
        tracing::warn!(reference = request.0, "display asked for by another site's page");
        return refusal(&headers, StatusCode::FORBIDDEN, "origin", "another site's page asked for this", &request.0);
    }
    let found = async { shared.farm.desktop_of(&who.session.user.name, super::number(&desktop)?).await };
    let id = match found.await {
        Ok(desktop) => desktop.id,
        Err(error) => return super::failure(&headers, &request, &error),
    };
    let kind = DisplayKind::Rfb { geometry: viewport.geometry() };
    upgrade
        .protocols(["binary"])
        .max_message_size(MESSAGE_MAX)
        .max_frame_size(MESSAGE_MAX)
        .read_buffer_size(16 * 1024)
        .write_buffer_size(0)
        .max_write_buffer_size(4 * CHUNK)
        .on_upgrade(move |socket| async move {
            let name = who.session.user.name.clone();
            let (end, moved) = Screen { shared, who, id, kind, peer: &peer }.run(socket).await;
            let (up_bytes, down_bytes) = moved;
            tracing::info!(reference = request.0, desktop = %id, user = %name, ?end, up_bytes, down_bytes, "display closed");
            // The connection counts as open until here.
            drop(peer.slot);
        })
}

struct Screen<'a> {
    shared: Arc<Shared>,
    who: SignedIn,
    id: DesktopId,
    kind: DisplayKind,
    peer: &'a Peer,
}

impl Screen<'_> {
    /// Runs until one side ends; says which and how many bytes went up and down.
    async fn run(self, mut socket: WebSocket) -> (End, (u64, u64)) {
        let mut moved = (0, 0);
        let end = match self.open(&mut socket).await {
            Ok(display) => self.copy(&mut socket, &display, &mut moved).await,
            Err(end) => end,
        };
        if let Some(frame) = end.frame() {
            // Whoever is gone cannot be told.
            let _gone = timeout(Duration::from_secs(2), socket.send(Message::Close(Some(frame)))).await;
            let _gone = timeout(Duration::from_secs(2), async { while let Some(Ok(_)) = socket.recv().await {} }).await;
        }
        (end, moved)
    }

    async fn open(&self, socket: &mut WebSocket) -> Result<Display, End> {
        // Its steps were told by `open` before; here only the last one is left.
        let (progress, _unheard) = mpsc::channel(1);
        let who = format!("{} (browser at {})", self.who.session.user.name, self.peer.address.ip());
        let mut opening = std::pin::pin!(Display::open(&self.shared.farm, self.id, self.kind, who, progress));
        loop {
            tokio::select! {
                opened = &mut opening => return opened.map_err(|error: FarmError| {
                    let cause = wire::causes(&error);
                    tracing::warn!(desktop = %self.id, %error, cause, "display could not be opened");
                    End::Failed(wire::explained(&error))
                }),
                // RFB's server speaks first; a browser that speaks is wrong.
                message = socket.recv() => match message {
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    _ => return Err(End::Left),
                },
                () = self.shared.stopping() => return Err(End::GoingAway),
            }
        }
    }

    async fn copy(&self, socket: &mut WebSocket, display: &Display, moved: &mut (u64, u64)) -> End {
        let mut inside = match display.stream() {
            Ok(stream) => stream,
            Err(error) => {
                tracing::error!(%error, "cannot use a display's stream");
                return End::Lost;
            }
        };
        match self.pump(socket, &mut inside, moved).await {
            Ok(Some(end)) => end,
            Ok(None) => match display.end_reason() {
                EndReason::TakenOver => End::TakenOver,
                EndReason::Stopped => End::Stopped,
                _ => End::Lost,
            },
            Err(error) => {
                tracing::debug!(%error, "display connection broke off");
                if display.end_reason() == EndReason::Closed { End::Left } else { End::Lost }
            }
        }
    }

    /// Copies both ways; `None` when the display's side ended. Each direction
    /// waits for its receiver before it reads on, so that a slow browser slows
    /// the display instead of filling memory.
    async fn pump(
        &self,
        socket: &mut WebSocket,
        inside: &mut UnixStream,
        moved: &mut (u64, u64),
    ) -> io::Result<Option<End>> {
        let (mut from_display, mut to_display) = inside.split();
        let (mut to_browser, mut from_browser) = socket.split();
        let (heard, up_bytes, down_bytes) = (Mutex::new(Instant::now()), &mut moved.0, &mut moved.1);
        let up = async {
            while let Some(message) = from_browser.next().await {
                *heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
                match message.map_err(io::Error::other)? {
                    Message::Binary(bytes) => {
                        to_display.write_all(&bytes).await?;
                        *up_bytes += bytes.len() as u64;
                    }
                    Message::Close(_) => break,
                    Message::Ping(_) | Message::Pong(_) => {}
                    Message::Text(_) => return Err(io::Error::other("text where RFB was expected")),
                }
            }
            Ok::<_, io::Error>(Some(End::Left))
        };
        let down = async {
            let mut chunk = vec![0; CHUNK];
            let mut ping = interval(self.shared.limits.ping);
            loop {
                let message = tokio::select! {
                    read = from_display.read(&mut chunk) => match read? {
                        0 => return Ok(None),
                        read => {
                            *down_bytes += read as u64;
                            Message::Binary(chunk.get(..read).unwrap_or_default().to_vec().into())
                        }
                    },
                    _ = ping.tick() => {
                        let silence = heard.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
                        if silence > self.shared.limits.ping * MISSED_PINGS + WRITE_DEADLINE / 10 {
                            return Ok(Some(End::Left));
                        }
                        if !self.still_signed_in().await {
                            return Ok(Some(End::SignedOut));
                        }
                        Message::Ping(Vec::new().into())
                    }
                };
                timeout(WRITE_DEADLINE, to_browser.send(message)).await?.map_err(io::Error::other)?;
            }
        };
        tokio::select! {
            end = up => end,
            end = down => end,
            () = self.shared.stopping() => Ok(Some(End::GoingAway)),
        }
    }

    /// Whether the session goes on; an open display also keeps it in use. A
    /// database that cannot be read ends nobody's work.
    async fn still_signed_in(&self) -> bool {
        match self.shared.farm.find_session(&self.who.token, SessionKind::Web).await {
            Ok(_) => true,
            Err(error) => error.kind() != qvd_farm::ErrorKind::Unauthenticated,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_long_reason_is_cut_between_letters() {
        let frame = End::Failed("ä".repeat(100)).frame().unwrap();
        assert_eq!(frame.reason.as_str(), "ä".repeat(61));
    }

    #[test]
    fn a_viewport_is_brought_within_the_limits() {
        let geometry = |width, height| Viewport { width, height }.geometry().to_string();
        assert_eq!(geometry(Some(1), Some(u16::MAX)), "320x4096");
        assert_eq!(geometry(None, None), Geometry::default().to_string());
    }
}
