//! A signed-in browser: cookies, forms and the display's WebSocket.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, bail, ensure};
use futures_util::{SinkExt as _, StreamExt as _};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header,
};
use hyper_util::rt::TokioIo;
use tokio::{io::DuplexStream, net::TcpStream, task::JoinHandle};
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, client::IntoClientRequest as _, protocol::CloseFrame},
};

use crate::{native::Endpoint, rfb::Rfb};

/// A browser with one server's cookies.
#[derive(Debug, Clone)]
pub struct Browser {
    endpoint: Endpoint,
    cookies: BTreeMap<String, String>,
}

/// An open display, and how it closed once it did.
#[derive(Debug)]
pub struct Display {
    /// The screen.
    pub rfb: Rfb<DuplexStream>,
    pump: JoinHandle<anyhow::Result<Option<CloseFrame>>>,
}

impl Browser {
    /// A browser that trusts the server's certificate and no other.
    ///
    /// # Errors
    /// The address is no `https://HOST:PORT`, or the file holds no certificate.
    pub fn new(url: &str, certificate: &Path) -> anyhow::Result<Self> {
        Ok(Self { endpoint: Endpoint::new(url, certificate)?, cookies: BTreeMap::new() })
    }

    async fn send(&self, method: Method, path: &str, form: Option<String>) -> anyhow::Result<Response<Incoming>> {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(self.endpoint.connect().await?)).await?;
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.endpoint.authority)
            .header(header::ORIGIN, format!("https://{}", self.endpoint.authority));
        if !self.cookies.is_empty() {
            request = request.header(header::COOKIE, self.cookie());
        }
        if form.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
        }
        Ok(sender.send_request(request.body(Full::new(Bytes::from(form.unwrap_or_default())))?).await?)
    }

    /// Loads a page and returns its status and text.
    ///
    /// # Errors
    /// The server did not answer.
    pub async fn page(&self, path: &str) -> anyhow::Result<(StatusCode, String)> {
        let response = self.send(Method::GET, path, None).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }

    /// Fills in the form and keeps the cookies.
    ///
    /// # Errors
    /// The server refused; the error holds what its page says.
    pub async fn sign_in(&mut self, user: &str, password: &str) -> anyhow::Result<()> {
        let response = self.send(Method::GET, "/sign-in", None).await?;
        self.take_cookies(&response)?;
        let page = String::from_utf8(response.into_body().collect().await?.to_bytes().to_vec())?;
        let csrf = between(&page, r#"name="csrf" value=""#, "\"").context("the sign-in page has no form")?;
        let form = [("csrf", csrf), ("next", ""), ("user", user), ("password", password)]
            .map(|(name, value)| format!("{name}={}", escape(value)))
            .join("&");
        let response = self.send(Method::POST, "/sign-in", Some(form)).await?;
        self.take_cookies(&response)?;
        if response.status() != StatusCode::SEE_OTHER {
            let status = response.status();
            let page = String::from_utf8_lossy(&response.into_body().collect().await?.to_bytes()).into_owned();
            bail!(
                "sign-in refused ({status}): {}",
                between(&page, r#"id="problem">"#, "<").unwrap_or("no reason given")
            );
        }
        Ok(())
    }

    fn take_cookies<B>(&mut self, response: &Response<B>) -> anyhow::Result<()> {
        for cookie in response.headers().get_all(header::SET_COOKIE) {
            let cookie = cookie.to_str()?;
            let (name, value) =
                cookie.split(';').next().and_then(|pair| pair.split_once('=')).context("a bad cookie")?;
            if cookie.to_ascii_lowercase().contains("max-age=0") {
                self.cookies.remove(name);
            } else {
                self.cookies.insert(name.to_owned(), value.to_owned());
            }
        }
        Ok(())
    }

    fn cookie(&self) -> String {
        self.cookies.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("; ")
    }

    /// Opens a desktop's display, starting the desktop if need be.
    ///
    /// # Errors
    /// The server refused, and the error holds its reason; or what it speaks is no RFB.
    pub async fn open(&self, desktop: u32, width: u16, height: u16) -> anyhow::Result<Display> {
        let url = format!("wss://{}/desktops/{desktop}/display?width={width}&height={height}", self.endpoint.authority);
        let mut request = url.into_client_request()?;
        request.headers_mut().insert(header::COOKIE, self.cookie().parse()?);
        request.headers_mut().insert(header::ORIGIN, format!("https://{}", self.endpoint.authority).parse()?);
        request.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, "binary".parse()?);
        let (socket, response) = tokio_tungstenite::client_async(request, self.endpoint.connect().await?).await?;
        ensure!(response.status() == StatusCode::SWITCHING_PROTOCOLS, "no display: {}", response.status());
        let (near, far) = tokio::io::duplex(1 << 20);
        let pump = tokio::spawn(pump(socket, far));
        match Rfb::handshake(near).await {
            Ok(rfb) => Ok(Display { rfb, pump }),
            // The handshake gave up its end, so the pump ends: its reason is the better one.
            Err(error) => Err(match pump.await? {
                Ok(Some(frame)) => error.context(format!("the server closed the display: {frame}")),
                Ok(None) => error,
                Err(broken) => error.context(broken),
            }),
        }
    }
}

impl Display {
    /// Waits until the server closes the display, and tells how.
    ///
    /// # Errors
    /// The connection broke instead.
    pub async fn closed(mut self) -> anyhow::Result<Option<CloseFrame>> {
        // Reading on is what a browser does; the updates that come are let go.
        while self.rfb.update(true).await.is_ok() {}
        self.pump.await?
    }

    /// Leaves, as a closed tab does.
    pub fn leave(self) {
        self.pump.abort();
    }
}

/// Copies between the WebSocket's binary messages and a byte stream.
async fn pump(
    mut socket: WebSocketStream<TlsStream<TcpStream>>,
    stream: DuplexStream,
) -> anyhow::Result<Option<CloseFrame>> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let (mut read, mut write) = tokio::io::split(stream);
    let mut bytes = vec![0; 1 << 16];
    loop {
        tokio::select! {
            got = read.read(&mut bytes) => match got? {
                0 => { socket.close(None).await?; return Ok(None); }
                n => socket.send(Message::Binary(Bytes::copy_from_slice(&bytes[..n]))).await?,
            },
            message = socket.next() => match message.transpose()? {
                Some(Message::Binary(data)) => write.write_all(&data).await?,
                Some(Message::Close(frame)) => return Ok(frame),
                Some(_) => {}
                None => return Ok(None),
            },
        }
    }
}

fn between<'a>(text: &'a str, before: &str, after: &str) -> Option<&'a str> {
    Some(text.split_once(before)?.1.split_once(after)?.0)
}

/// Percent-encodes all but what never needs it (RFC 3986, section 2.3).
fn escape(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}
