//! The QVD wire protocol: what existing QVD clients say to a broker.
//!
//! HTTP/1.1 heads by our own loop, because a client gets any number of `102
//! Processing` before the `101` after which the same connection carries NX;
//! server libraries do not let a handler send those.

mod answer;
mod credentials;
mod head;
mod parameters;
mod relay;

use std::{io, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use qvd_core::DesktopId;
use qvd_farm::{Farm, FarmError, Progress, Secret, SessionKind, User};
use rand::{Rng as _, distr::Alphanumeric};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::mpsc,
    time::{Instant, timeout},
};

use crate::{display::Display, server::Shared};
use answer::Answer;
pub(crate) use answer::{Refusal, causes, explained};
pub(crate) use credentials::{Credentials, TENANT, basic, split_tenant, token};
use head::{HEAD_MAX, Head};

/// Paths that belong to this protocol start so.
pub(crate) const PREFIX: &str = "/qvd/";
/// For a client to take what we send.
const WRITE_DEADLINE: Duration = Duration::from_secs(30);
/// While nothing new happens, the last news is sent again this often: it
/// keeps middle boxes from closing the connection, and finds dead clients.
const REPEAT_NEWS: Duration = Duration::from_secs(15);
/// How long a password that was right stays right for one connection: it
/// lists, then connects, and each check costs tens of milliseconds.
const TRUSTED: Duration = Duration::from_secs(60);

/// One client's dialogue, from its first request to its end.
pub(crate) struct Dialogue<'a, S> {
    pub(crate) stream: S,
    /// Bytes read and not yet understood.
    pub(crate) buffer: Vec<u8>,
    pub(crate) shared: &'a Shared,
    pub(crate) peer: std::net::SocketAddr,
    known: Option<Known>,
}

/// Somebody whose credentials were right on this connection.
struct Known {
    proof: [u8; 32],
    user: User,
    until: Instant,
}

/// How a request ended.
enum Outcome {
    Answer(Answer),
    /// The connection was used up.
    Over,
}

impl From<Answer> for Outcome {
    fn from(answer: Answer) -> Self {
        Self::Answer(answer)
    }
}

/// Reads one head into `buffer`; `None` when the client left or was silent
/// for too long between requests.
pub(crate) async fn read_head<S: AsyncRead + Unpin>(
    stream: &mut S,
    buffer: &mut Vec<u8>,
    idle: Duration,
    deadline: Duration,
) -> io::Result<Result<Option<Head>, Refusal>> {
    let mut until = Instant::now() + if buffer.is_empty() { idle } else { deadline };
    loop {
        if !buffer.is_empty() {
            match Head::parse(buffer) {
                Ok(Some(head)) => return Ok(Ok(Some(head))),
                Ok(None) => {}
                Err(error) => return Ok(Err(error.into())),
            }
        }
        let empty = buffer.is_empty();
        // `take`: what is pipelined behind a head must not grow without bound.
        let room = (HEAD_MAX + 1).saturating_sub(buffer.len()).max(1) as u64;
        match tokio::time::timeout_at(until, (&mut *stream).take(room).read_buf(buffer)).await {
            Err(_) if empty => return Ok(Ok(None)),
            Err(_) => {
                let text = "the request's head did not arrive in time";
                return Ok(Err(Refusal::new(408, "head_timeout", text)));
            }
            Ok(Ok(0)) => return Ok(Ok(None)),
            Ok(Ok(_)) if empty => until = Instant::now() + deadline,
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(error),
        }
    }
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin> Dialogue<'a, S> {
    pub(crate) const fn new(stream: S, buffer: Vec<u8>, shared: &'a Shared, peer: std::net::SocketAddr) -> Self {
        Self { stream, buffer, shared, peer, known: None }
    }

    fn farm(&self) -> &'a Farm {
        &self.shared.farm
    }

    /// Serves requests until one side has enough.
    pub(crate) async fn run(mut self) -> io::Result<()> {
        let limits = self.shared.limits;
        loop {
            let reference = crate::request_id();
            // Between requests, and only there, a stop ends the connection.
            let between = self.buffer.is_empty();
            let read = tokio::select! {
                read = read_head(&mut self.stream, &mut self.buffer, limits.idle, limits.head) => Some(read?),
                () = self.shared.stopping(), if between => None,
            };
            let Some(head) = read else { return self.stream.shutdown().await };
            let head = match head {
                Ok(Some(head)) => head,
                Ok(None) => return self.stream.shutdown().await,
                Err(refusal) => {
                    tracing::info!(%reference, peer = %self.peer, status = refusal.status, "request refused");
                    self.send(&refusal.answer(&reference).closing().encode()).await?;
                    return self.stream.shutdown().await;
                }
            };
            self.buffer.drain(..head.length);
            let began = Instant::now();
            let outcome = match self.handle(&head).await? {
                Ok(outcome) => outcome,
                Err(refusal) => {
                    let answer = refusal.answer(&reference);
                    tracing::info!(%reference, peer = %self.peer, code = refusal.code, text = refusal.text, cause = refusal.cause, "refused");
                    Outcome::Answer(if matches!(refusal.status, 400 | 405 | 505) { answer.closing() } else { answer })
                }
            };
            let Outcome::Answer(answer) = outcome else { return Ok(()) };
            let ms = began.elapsed().as_millis();
            tracing::info!(%reference, peer = %self.peer, path = head.path(), status = answer.status(), ms, "qvd request");
            let close = answer.closes() || head.has_token("connection", "close");
            self.send(&answer.encode()).await?;
            if close {
                return self.stream.shutdown().await;
            }
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let send = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        timeout(WRITE_DEADLINE, send).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }

    async fn handle(&mut self, head: &Head) -> io::Result<Result<Outcome, Refusal>> {
        if !head.http_1_1 {
            return Ok(Err(Refusal::new(505, "http_version", "only HTTP/1.1 is spoken here")));
        }
        if head.method != "GET" {
            return Ok(Err(Refusal::new(405, "method", "only GET is used here")));
        }
        if head.announces_body() {
            return Ok(Err(Refusal::new(400, "body", "requests have no body here")));
        }
        let query = match head.query() {
            Ok(query) => query,
            Err(error) => return Ok(Err(error.into())),
        };
        match head.path().strip_prefix(PREFIX).unwrap_or_default() {
            "ping" => Ok(self.ping()),
            "list_of_vm" => Ok(self.list_of_vm(head).await),
            "list_of_applications" => Ok(self.list_of_applications(head).await),
            "authenticate_user" => Ok(self.authenticate_user(head, &query).await),
            "create_auth_token" => Ok(self.create_auth_token(head).await),
            "stop_vm" => self.stop_vm(head, &query).await,
            "connect_to_vm" => self.connect_to_vm(head, &query).await,
            _ => Ok(Err(Refusal::new(404, "unknown_request", "there is no such request in the QVD protocol"))),
        }
    }

    fn refuse_when_stopping(&self) -> Result<(), Refusal> {
        if self.shared.is_stopping() {
            return Err(Refusal::new(503, "stopping", "this server is stopping; try again in a moment"));
        }
        Ok(())
    }

    fn ping(&self) -> Result<Outcome, Refusal> {
        self.refuse_when_stopping()?;
        Ok(Answer::text("I am alive!\n").into())
    }

    async fn list_of_vm(&mut self, head: &Head) -> Result<Outcome, Refusal> {
        let user = self.user(head).await?;
        self.refuse_when_stopping()?;
        let desktops = self.farm().desktop_infos(Some(&user.name)).await?;
        let rows: Vec<Value> = desktops
            .iter()
            .map(|info| {
                json!({
                    "id": info.desktop.id.number(),
                    "name": info.desktop.name,
                    "state": info.status.state.as_str(),
                    "blocked": u8::from(info.desktop.blocked),
                    "is_application": 0,
                })
            })
            .collect();
        Ok(Answer::json(&Value::Array(rows)).into())
    }

    /// Applications are not published one by one: none are.
    async fn list_of_applications(&mut self, head: &Head) -> Result<Outcome, Refusal> {
        self.user(head).await?;
        self.refuse_when_stopping()?;
        Ok(Answer::json(&json!([])).into())
    }

    async fn authenticate_user(&mut self, head: &Head, query: &[(String, String)]) -> Result<Outcome, Refusal> {
        let user = self.user(head).await?;
        let mut answer = json!({ "user": user.name, "tenant": TENANT });
        if query.iter().any(|(key, value)| key == "store_auth" && value == "1") {
            answer["auth_token"] = self.new_token(&user).await?.into();
        }
        Ok(Answer::json(&answer).into())
    }

    async fn create_auth_token(&mut self, head: &Head) -> Result<Outcome, Refusal> {
        let user = self.user(head).await?;
        let token = self.new_token(&user).await?;
        Ok(Answer::json(&json!({ "auth_token": token })).into())
    }

    async fn new_token(&self, user: &User) -> Result<String, FarmError> {
        let session = self.farm().create_session(&user.name, SessionKind::Bearer).await?;
        Ok(BASE64_STANDARD.encode(session.token.expose()))
    }

    /// Who sends this request.
    async fn user(&mut self, head: &Head) -> Result<User, Refusal> {
        let proof = proof(head);
        if let Some(known) = self.known.as_ref().filter(|known| known.proof == proof && Instant::now() < known.until) {
            return Ok(known.user.clone());
        }
        let user = match Credentials::of(head)? {
            Credentials::Password { user, password } => {
                self.farm().authenticate(&user, &password, Some(self.peer.ip())).await?
            }
            Credentials::Token(token) => self.token_user(&token).await?,
        };
        self.known = Some(Known { proof, user: user.clone(), until: Instant::now() + TRUSTED });
        Ok(user)
    }

    async fn token_user(&self, token: &Secret) -> Result<User, FarmError> {
        Ok(self.farm().find_session(token, SessionKind::Bearer).await?.user)
    }

    async fn stop_vm(&mut self, head: &Head, query: &[(String, String)]) -> io::Result<Result<Outcome, Refusal>> {
        let id = match self.stoppable(head, query).await {
            Ok(id) => id,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let farm = self.farm().clone();
        let mut stopping = std::pin::pin!(farm.stop(id));
        let stopped = loop {
            self.send(&answer::processing("Stopping the desktop")).await?;
            tokio::select! {
                stopped = &mut stopping => break stopped,
                () = tokio::time::sleep(REPEAT_NEWS) => {}
            }
        };
        Ok(match stopped {
            Ok(()) => Ok(Answer::text("The desktop is stopped.\n").into()),
            Err(error) if error.kind() == qvd_farm::ErrorKind::Timeout => {
                Err(Refusal { status: 408, ..Refusal::from(error) })
            }
            Err(error) => Err(error.into()),
        })
    }

    async fn stoppable(&mut self, head: &Head, query: &[(String, String)]) -> Result<DesktopId, Refusal> {
        let user = self.user(head).await?;
        let id = parameters::desktop_id(query)?;
        self.farm().desktop_of(&user.name, id).await?;
        Ok(id)
    }

    async fn connect_to_vm(&mut self, head: &Head, query: &[(String, String)]) -> io::Result<Result<Outcome, Refusal>> {
        let (id, kind, who) = match self.connectable(head, query).await {
            Ok(checked) => checked,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let display = match self.open(id, kind, who.clone()).await? {
            Ok(Some(display)) => display,
            Ok(None) => return Ok(Ok(Outcome::Over)),
            Err(refusal) => return Ok(Err(refusal)),
        };
        let key: String = rand::rng().sample_iter(Alphanumeric).take(64).map(char::from).collect();
        self.send(&answer::switching(&key)).await?;
        let early = std::mem::take(&mut self.buffer);
        let moved = relay::run(&mut self.stream, &display, early, self.shared).await;
        let (up_bytes, down_bytes) = (moved.up_bytes, moved.down_bytes);
        tracing::info!(desktop = %id, who, peer = %self.peer, up_bytes, down_bytes, reason = ?moved.reason, "NX connection ended");
        Ok(Ok(Outcome::Over))
    }

    /// The checks before a connection, in the protocol's order.
    async fn connectable(
        &mut self,
        head: &Head,
        query: &[(String, String)],
    ) -> Result<(DesktopId, qvd_core::DisplayKind, String), Refusal> {
        let user = self.user(head).await?;
        self.refuse_when_stopping()?;
        let upgrade = head.has_token("connection", "upgrade") && head.has_token("upgrade", "QVD/1.0");
        if !upgrade {
            return Err(Refusal::new(426, "no_upgrade", "ask for an upgrade to QVD/1.0 to connect"));
        }
        let id = parameters::desktop_id(query)?;
        parameters::check_keys(query)?;
        let desktop = self.farm().desktop_of(&user.name, id).await?;
        if desktop.blocked {
            return Err(Refusal::new(403, "desktop_blocked", format!("desktop {id} is under maintenance")));
        }
        let kind = parameters::display(query)?;
        Ok((id, kind, format!("{} (NX from {})", user.name, self.peer.ip())))
    }

    /// Opens the display and tells the client what happens meanwhile; `None`
    /// when the client left.
    async fn open(
        &mut self,
        id: DesktopId,
        kind: qvd_core::DisplayKind,
        who: String,
    ) -> io::Result<Result<Option<Display>, Refusal>> {
        let (tell, mut news) = mpsc::channel::<Progress>(16);
        let farm = self.farm().clone();
        let mut opening = std::pin::pin!(Display::open(&farm, id, kind, who, tell));
        let mut last = "Preparing the desktop".to_owned();
        loop {
            let room = HEAD_MAX.saturating_sub(self.buffer.len());
            let mut early = (&mut self.stream).take(room as u64);
            let news_or_end = tokio::select! {
                // News first: what happened before the end is told before it.
                biased;
                Some(progress) = news.recv() => Some(progress),
                opened = &mut opening => {
                    while let Ok(progress) = news.try_recv() {
                        self.send(&answer::processing(progress.text())).await?;
                    }
                    return Ok(opened.map(Some).map_err(Refusal::from));
                }
                read = early.read_buf(&mut self.buffer), if room > 0 => {
                    if read? == 0 {
                        return Ok(Ok(None));
                    }
                    continue;
                }
                () = self.shared.stopping() => {
                    return Ok(self.refuse_when_stopping().map(|()| None));
                }
                () = tokio::time::sleep(REPEAT_NEWS) => None,
            };
            if let Some(progress) = news_or_end {
                progress.text().clone_into(&mut last);
            }
            self.send(&answer::processing(&last)).await?;
        }
    }
}

/// Stands for the credentials of a request without holding them.
fn proof(head: &Head) -> [u8; 32] {
    let mut hash = Sha256::new();
    for (name, value) in head.headers() {
        if name.get(..4).is_some_and(|prefix| prefix.eq_ignore_ascii_case("auth")) {
            hash.update(name.to_ascii_lowercase());
            hash.update([0]);
            hash.update(value);
            hash.update([0]);
        }
    }
    hash.finalize().into()
}
