//! The way to a daemon: over its socket or by HTTPS, and one request over it.

use std::{path::PathBuf, pin::Pin, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{Method, Request, Response, header},
};
use futures_util::StreamExt;
use hyper_util::rt::TokioIo;
use qvd_core::StartStep;
use qvd_farm::Secret;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    time::timeout,
};

use super::ClientError;
use crate::{
    api::{
        dto::{ErrorBody, Event},
        frame,
    },
    images::Amount,
};

/// How long a daemon may take to accept us.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a request without progress may take: a removal deletes a home.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);

/// How long a request with progress may be silent: a build downloads a distribution.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(1800);

/// Longest answer, and longest line of one, in bytes: two large trees that have nothing in common differ in as much.
const MAX_ANSWER: usize = 128 << 20;

/// A connection of either sort.
trait Connection: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Connection for T {}

#[derive(Clone)]
pub(super) enum Transport {
    Unix(PathBuf),
    Https {
        host: String,
        port: u16,
        name: rustls_pki_types::ServerName<'static>,
        tls: Arc<rustls::ClientConfig>,
        token: Secret,
    },
}

/// The body of a call that says nothing.
pub(super) const NOTHING: Option<&()> = None;

impl Transport {
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.send(Method::GET, path, NOTHING).await
    }

    /// A call whose answer says no more than that it is done.
    pub(super) async fn done<B: Serialize + Sync>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<(), ClientError> {
        let response = self.call(method, path, body, false).await?;
        if response.status().is_success() { Ok(()) } else { Err(refusal(response).await) }
    }

    pub(super) async fn send<T: DeserializeOwned, B: Serialize + Sync>(
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
    pub(super) async fn events<T: DeserializeOwned, B: Serialize + Sync>(
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

    pub(super) async fn call<B: Serialize + Sync>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
        upgrade: bool,
    ) -> Result<Response<Body>, ClientError> {
        let failed = ClientError::protocol("ask");
        let mut request =
            Request::builder().method(method).uri(format!("/api/v1{path}")).header(header::HOST, self.host());
        if let Self::Https { token, .. } = self {
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
        match self {
            Self::Unix(path) => Ok(Box::pin(UnixStream::connect(path).await?)),
            Self::Https { host, port, name, tls, .. } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await?;
                let connector = tokio_rustls::TlsConnector::from(Arc::clone(tls));
                Ok(Box::pin(connector.connect(name.clone(), stream).await?))
            }
        }
    }

    fn host(&self) -> String {
        match self {
            Self::Unix(_) => "localhost".to_owned(),
            Self::Https { name: rustls_pki_types::ServerName::IpAddress(ip), port, .. } => {
                std::net::SocketAddr::new((*ip).into(), *port).to_string()
            }
            Self::Https { host, port, .. } => format!("{host}:{port}"),
        }
    }

    pub(super) fn address(&self) -> String {
        match self {
            Self::Unix(path) => path.display().to_string(),
            Self::Https { .. } => format!("https://{}", self.host()),
        }
    }
}

async fn whole(response: Response<Body>) -> Result<Bytes, ClientError> {
    match timeout(ANSWER_TIMEOUT, axum::body::to_bytes(response.into_body(), MAX_ANSWER)).await {
        Ok(read) => read.map_err(|e| ClientError::protocol("read from")(e.into())),
        Err(_) => Err(ClientError::Timeout(ANSWER_TIMEOUT)),
    }
}

/// What a refusal says; an answer that is none of this API's is reported by its status.
pub(super) async fn refusal(response: Response<Body>) -> ClientError {
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
