//! The other end of the API: what the commands use.

use std::{
    error::Error as StdError,
    fmt,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    http::{Method, Request, Response, StatusCode, header},
};
use futures_util::StreamExt;
use hyper_util::rt::TokioIo;
use qvd_core::{DesktopId, FlavourName, StartStep, UserName};
use qvd_farm::{Desktop, DesktopInfo, Flavour, FlavourDefaults, OwnedDesktops, Secret, SessionInfo, User};
use qvd_guest::{ExecRequest, Stats};
use qvd_node::{ImageSummary, MemoryReport, NewVersion, PortView, Timings, Version};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    time::timeout,
};

use super::{
    client_exec::{self, ExecReader, ExecWriter},
    dto::{
        AddUser, BuildImage, ChangeDesktop, CreateDesktop, ErrorBody, ErrorInfo, Event, ExplainFrames, Health,
        SetPassword, WhoAmI,
    },
    frame,
};
use crate::images::{Amount, ImageCall, News};

/// How long a daemon may take to accept us.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a request without progress may take: a removal deletes a home.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);

/// How long a request with progress may be silent: a build downloads a distribution.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(1800);

/// Longest answer, and longest line of one, in bytes: two large trees that have nothing in common differ in as much.
const MAX_ANSWER: usize = 128 << 20;

/// Why a call of the API gave no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody answers there: the daemon does not run, or this user may not.
    #[error("cannot connect to the daemon at `{at}`")]
    Connect {
        /// Address of the daemon.
        at: String,
        /// Why.
        source: std::io::Error,
    },
    /// The daemon refused, or failed.
    #[error("{}", info.message)]
    Refused {
        /// HTTP status of the answer.
        status: StatusCode,
        /// What the daemon says.
        info: ErrorInfo,
    },
    /// The daemon said nothing for too long.
    #[error("the daemon did not answer within {0:?}")]
    Timeout(Duration),
    /// The connection ended, or what came is not of this API.
    #[error("cannot {op} the daemon")]
    Protocol {
        /// What was tried.
        op: &'static str,
        /// Why it failed.
        source: Box<dyn StdError + Send + Sync>,
    },
}

impl ClientError {
    /// The daemon's stable word for what went wrong, if it was the daemon that refused.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { info, .. } => Some(&info.code),
            _ => None,
        }
    }

    /// HTTP status of a refusal.
    #[must_use]
    pub const fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    pub(super) fn protocol(op: &'static str) -> impl Fn(Box<dyn StdError + Send + Sync>) -> Self {
        move |source| Self::Protocol { op, source }
    }
}

/// A connection of either sort.
trait Connection: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Connection for T {}

#[derive(Clone)]
enum Door {
    Unix(PathBuf),
    Https {
        host: String,
        port: u16,
        name: rustls_pki_types::ServerName<'static>,
        tls: Arc<rustls::ClientConfig>,
        token: Secret,
    },
}

/// Calls the API of one daemon. Cloning is cheap; each call is a connection.
#[derive(Clone)]
pub struct Client {
    door: Door,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("at", &self.address()).finish()
    }
}

impl Client {
    /// Calls the daemon of this host over its socket.
    #[must_use]
    pub fn unix(path: &Path) -> Self {
        Self { door: Door::Unix(path.to_owned()) }
    }

    /// Calls a daemon over HTTPS with a bearer token. Whom to trust is up to `tls`.
    ///
    /// # Errors
    /// `host` is neither a name nor an address.
    pub fn https(
        host: &str,
        port: u16,
        token: Secret,
        tls: Arc<rustls::ClientConfig>,
    ) -> Result<Self, rustls_pki_types::InvalidDnsNameError> {
        let name = rustls_pki_types::ServerName::try_from(host.to_owned())?;
        Ok(Self { door: Door::Https { host: host.to_owned(), port, name, tls, token } })
    }

    /// Whether the daemon is there, and its version.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn health(&self) -> Result<Health, ClientError> {
        self.get("/health").await
    }

    /// Who the daemon takes us for.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn who_am_i(&self) -> Result<WhoAmI, ClientError> {
        self.get("/whoami").await
    }

    /// All users.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn users(&self) -> Result<Vec<User>, ClientError> {
        self.get("/users").await
    }

    /// Adds a user.
    ///
    /// # Errors
    /// [`ClientError`]: `user_exists`, `invalid_password`.
    pub async fn add_user(&self, add: &AddUser) -> Result<User, ClientError> {
        self.send(Method::POST, "/users", Some(add)).await
    }

    /// Removes a user.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_user`, `user_has_desktops`.
    pub async fn remove_user(&self, name: &UserName, desktops: OwnedDesktops) -> Result<(), ClientError> {
        let how = match desktops {
            OwnedDesktops::Refuse => "refuse",
            OwnedDesktops::Remove => "remove",
        };
        self.done(Method::DELETE, &format!("/users/{name}?desktops={how}"), NOTHING).await
    }

    /// Gives a user another password.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_user`, `invalid_password`, `wrong_credentials`.
    pub async fn set_password(&self, name: &UserName, set: &SetPassword) -> Result<(), ClientError> {
        self.done(Method::PUT, &format!("/users/{name}/password"), Some(set)).await
    }

    /// The newest image of every flavour.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn images(&self) -> Result<Vec<ImageSummary>, ClientError> {
        self.get("/images").await
    }

    /// Builds the image of a recipe.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn build_image(
        &self,
        build: &BuildImage,
        mut progress: impl FnMut(&str) + Send,
    ) -> Result<ImageSummary, ClientError> {
        self.events("/images", Some(build), |_, line, _| progress(line)).await
    }

    /// Asks for something about images. `news` hears how a long one goes on.
    ///
    /// # Errors
    /// [`ClientError`]: `not_found`, `invalid`, `busy`, `unsupported`, `failed`, `forbidden`, `no_repository`.
    pub async fn image<C: ImageCall + Sync>(
        &self,
        call: &C,
        mut news: impl FnMut(News) + Send,
    ) -> Result<C::Answer, ClientError> {
        let mut path = format!("/images/{}", C::PATH);
        if C::LONG {
            let tell = |_, text: &str, amount| news(News { text: text.to_owned(), amount });
            return self.events(&path, Some(call), tell).await;
        }
        if matches!(C::METHOD, Method::GET | Method::DELETE) {
            path += &query(call)?;
            return self.send(C::METHOD, &path, NOTHING).await;
        }
        self.send(C::METHOD, &path, Some(call)).await
    }

    /// The flavours and their defaults.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn flavours(&self) -> Result<Vec<Flavour>, ClientError> {
        self.get("/flavours").await
    }

    /// Sets what new desktops of a flavour get.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_flavour`, `invalid_limits`.
    pub async fn set_flavour_defaults(
        &self,
        name: &FlavourName,
        defaults: &FlavourDefaults,
    ) -> Result<(), ClientError> {
        self.done(Method::PUT, &format!("/flavours/{name}/defaults"), Some(defaults)).await
    }

    /// The desktops of one user or of all.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn desktops(&self, user: Option<&UserName>) -> Result<Vec<DesktopInfo>, ClientError> {
        self.get(&whose("/desktops", user)).await
    }

    /// Makes a desktop.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_user`, `unknown_flavour`, `unknown_tag`,
    /// `name_taken`, `address_taken`, `invalid_name`, `invalid_address`, `invalid_limits`.
    pub async fn create_desktop(&self, create: &CreateDesktop) -> Result<Desktop, ClientError> {
        self.send(Method::POST, "/desktops", Some(create)).await
    }

    /// One desktop.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_desktop`, `not_yours`.
    pub async fn desktop(&self, id: DesktopId) -> Result<DesktopInfo, ClientError> {
        self.get(&format!("/desktops/{id}")).await
    }

    /// Closes a desktop for maintenance, or opens it again.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_desktop`.
    pub async fn set_blocked(&self, id: DesktopId, blocked: bool) -> Result<(), ClientError> {
        self.done(Method::PATCH, &format!("/desktops/{id}"), Some(&ChangeDesktop { blocked })).await
    }

    /// Stops a desktop and deletes its files.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_desktop`.
    pub async fn remove_desktop(&self, id: DesktopId) -> Result<(), ClientError> {
        self.done(Method::DELETE, &format!("/desktops/{id}"), NOTHING).await
    }

    /// Makes a desktop run and waits for its session.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_desktop`, `not_yours`, `desktop_blocked`, `desktop_removing`.
    pub async fn start(
        &self,
        id: DesktopId,
        mut progress: impl FnMut(Option<StartStep>, &str) + Send,
    ) -> Result<Timings, ClientError> {
        self.events(&format!("/desktops/{id}/start"), NOTHING, |step, text, _| progress(step, text)).await
    }

    /// Stops a desktop.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_desktop`, `not_yours`.
    pub async fn stop(&self, id: DesktopId) -> Result<(), ClientError> {
        self.done(Method::POST, &format!("/desktops/{id}/stop"), NOTHING).await
    }

    /// `POST desktops/{id}/commit`: makes the next version of a flavour from what a
    /// running desktop's root holds.
    ///
    /// # Errors
    /// As [`Client::health`].
    pub async fn commit(&self, id: DesktopId, new: &NewVersion) -> Result<Version, ClientError> {
        self.send(Method::POST, &format!("/desktops/{id}/commit"), Some(new)).await
    }

    /// What a running desktop uses.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_desktop`, `not_yours`.
    pub async fn stats(&self, id: DesktopId) -> Result<Stats, ClientError> {
        self.get(&format!("/desktops/{id}/stats")).await
    }

    /// What the host has of memory, who has it, and what was decided about it.
    ///
    /// # Errors
    /// [`ClientError`]: `forbidden`.
    pub async fn memory(&self) -> Result<MemoryReport, ClientError> {
        self.get("/memory").await
    }

    /// The port of a running desktop, and what would become of `frames` that it
    /// sent; `None` if it has no port.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_desktop`, `not_yours`, `invalid_frame`.
    pub async fn network(&self, id: DesktopId, frames: &ExplainFrames) -> Result<Option<PortView>, ClientError> {
        self.send(Method::POST, &format!("/desktops/{id}/network"), Some(frames)).await
    }

    /// Runs a program inside a running desktop: what goes in, and what comes out.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_desktop`, `not_yours`, `invalid_command`.
    pub async fn exec(&self, id: DesktopId, program: &ExecRequest) -> Result<(ExecWriter, ExecReader), ClientError> {
        let response = self.call(Method::POST, &format!("/desktops/{id}/exec"), Some(program), true).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(response).await);
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(|e| ClientError::protocol("talk with")(e.into()))?;
        Ok(client_exec::split(TokioIo::new(upgraded)))
    }

    /// Who is signed in.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn sessions(&self, user: Option<&UserName>) -> Result<Vec<SessionInfo>, ClientError> {
        self.get(&whose("/sessions", user)).await
    }

    /// Ends a session.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_session`.
    pub async fn end_session(&self, id: i64) -> Result<(), ClientError> {
        self.done(Method::DELETE, &format!("/sessions/{id}"), NOTHING).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.send(Method::GET, path, NOTHING).await
    }

    /// A call whose answer says no more than that it is done.
    async fn done<B: Serialize + Sync>(&self, method: Method, path: &str, body: Option<&B>) -> Result<(), ClientError> {
        let response = self.call(method, path, body, false).await?;
        if response.status().is_success() { Ok(()) } else { Err(refusal(response).await) }
    }

    async fn send<T: DeserializeOwned, B: Serialize + Sync>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<T, ClientError> {
        let response = self.call(method, path, body, false).await?;
        if !response.status().is_success() {
            return Err(refusal(response).await);
        }
        let answer = whole(response).await?;
        serde_json::from_slice(&answer).map_err(|e| ClientError::protocol("understand")(e.into()))
    }

    /// A call that answers with events, one a line.
    async fn events<T: DeserializeOwned, B: Serialize + Sync>(
        &self,
        path: &str,
        body: Option<&B>,
        mut progress: impl FnMut(Option<StartStep>, &str, Option<Amount>) + Send,
    ) -> Result<T, ClientError> {
        let response = self.call(Method::POST, path, body, false).await?;
        let status = response.status();
        if !status.is_success() {
            return Err(refusal(response).await);
        }
        let mut stream = response.into_body().into_data_stream();
        let mut pending = Vec::new();
        loop {
            let chunk = timeout(SILENCE_TIMEOUT, stream.next()).await;
            let chunk = chunk.map_err(|_| ClientError::Timeout(SILENCE_TIMEOUT))?.ok_or_else(|| {
                ClientError::protocol("hear the result from")("the answer ended before the result".into())
            })?;
            pending.extend_from_slice(&chunk.map_err(|e| ClientError::protocol("read from")(e.into()))?);
            while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
                let event = serde_json::from_slice(pending.get(..end).unwrap_or_default())
                    .map_err(|e| ClientError::protocol("understand")(e.into()))?;
                pending.drain(..=end);
                match event {
                    Event::Progress { step, text, amount } => progress(step, &text, amount),
                    Event::Done { result } => return Ok(result),
                    Event::Failed { error: info } => return Err(ClientError::Refused { status, info }),
                }
            }
            if pending.len() > MAX_ANSWER {
                return Err(ClientError::protocol("understand")("a line without end".into()));
            }
        }
    }

    async fn call<B: Serialize + Sync>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
        upgrade: bool,
    ) -> Result<Response<Body>, ClientError> {
        let failed = ClientError::protocol("ask");
        let mut request =
            Request::builder().method(method).uri(format!("/api/v1{path}")).header(header::HOST, self.host());
        if let Door::Https { token, .. } = &self.door {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.expose()));
        }
        if upgrade {
            request = request.header(header::CONNECTION, "Upgrade").header(header::UPGRADE, frame::PROTOCOL);
        }
        let body = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                Body::from(serde_json::to_vec(body).map_err(|e| failed(e.into()))?)
            }
            None => Body::empty(),
        };
        let request = request.body(body).map_err(|e| failed(e.into()))?;

        let stream = match timeout(CONNECT_TIMEOUT, self.connect()).await {
            Ok(connected) => connected.map_err(|source| ClientError::Connect { at: self.address(), source })?,
            Err(_) => return Err(ClientError::Timeout(CONNECT_TIMEOUT)),
        };
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| ClientError::protocol("talk with")(e.into()))?;
        // It ends with the answer, or with the upgraded stream.
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "connection to the daemon failed");
            }
        });
        let answer = timeout(SILENCE_TIMEOUT, sender.send_request(request)).await;
        let response = answer.map_err(|_| ClientError::Timeout(SILENCE_TIMEOUT))?.map_err(|e| failed(e.into()))?;
        Ok(response.map(Body::new))
    }

    async fn connect(&self) -> std::io::Result<Pin<Box<dyn Connection>>> {
        match &self.door {
            Door::Unix(path) => Ok(Box::pin(UnixStream::connect(path).await?)),
            Door::Https { host, port, name, tls, .. } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await?;
                let connector = tokio_rustls::TlsConnector::from(Arc::clone(tls));
                Ok(Box::pin(connector.connect(name.clone(), stream).await?))
            }
        }
    }

    fn host(&self) -> String {
        match &self.door {
            Door::Unix(_) => "localhost".to_owned(),
            Door::Https { name: rustls_pki_types::ServerName::IpAddress(ip), port, .. } => {
                std::net::SocketAddr::new((*ip).into(), *port).to_string()
            }
            Door::Https { host, port, .. } => format!("{host}:{port}"),
        }
    }

    fn address(&self) -> String {
        match &self.door {
            Door::Unix(path) => path.display().to_string(),
            Door::Https { .. } => format!("https://{}", self.host()),
        }
    }
}

const NOTHING: Option<&()> = None;

/// What is asked, behind a `?`: fields that are text, escaped.
fn query<C: Serialize>(call: &C) -> Result<String, ClientError> {
    let fields = serde_json::to_value(call).map_err(|e| ClientError::protocol("ask")(e.into()))?;
    let mut text = String::new();
    for (name, value) in fields.as_object().into_iter().flatten() {
        text += &format!("{}{name}=", if text.is_empty() { '?' } else { '&' });
        // Source: RFC 3986, 2.3, "Unreserved Characters".
        for byte in value.as_str().unwrap_or_default().bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => text.push(byte.into()),
                other => text += &format!("%{other:02X}"),
            }
        }
    }
    Ok(text)
}

fn whose(path: &str, user: Option<&UserName>) -> String {
    user.map_or_else(|| path.to_owned(), |user| format!("{path}?user={user}"))
}

async fn whole(response: Response<Body>) -> Result<Bytes, ClientError> {
    match timeout(ANSWER_TIMEOUT, axum::body::to_bytes(response.into_body(), MAX_ANSWER)).await {
        Ok(read) => read.map_err(|e| ClientError::protocol("read from")(e.into())),
        Err(_) => Err(ClientError::Timeout(ANSWER_TIMEOUT)),
    }
}

/// What a refusal says; an answer that is none of this API's is reported by its status.
async fn refusal(response: Response<Body>) -> ClientError {
    let status = response.status();
    match whole(response).await.map(|answer| serde_json::from_slice::<ErrorBody>(&answer)) {
        Ok(Ok(ErrorBody { error: info })) => ClientError::Refused { status, info },
        Ok(Err(e)) => {
            tracing::debug!(%status, error = %e, "an answer that is none of this API's");
            ClientError::protocol("understand")(format!("HTTP status {status}").into())
        }
        Err(error) => error,
    }
}
