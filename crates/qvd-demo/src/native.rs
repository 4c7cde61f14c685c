//! A native client: the QVD protocol up to the switch, then NX bytes.

use std::{path::Path, sync::Arc};

use anyhow::{Context as _, bail, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// Longest head taken from a server, in bytes.
const MAX_HEAD: usize = 16 << 10;

/// Longest body taken from a server, in bytes.
const MAX_BODY: usize = 1 << 20;

/// How to reach one server, and whose certificate to trust.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    /// `HOST:PORT`.
    pub(crate) authority: String,
    tls: Arc<rustls::ClientConfig>,
}

impl Endpoint {
    /// Trusts the certificates in this file and no other.
    pub(crate) fn new(url: &str, certificate: &Path) -> anyhow::Result<Self> {
        let authority = url.strip_prefix("https://").with_context(|| format!("`{url}` is no https address"))?;
        let mut roots = rustls::RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(certificate)
            .with_context(|| format!("cannot read `{}`", certificate.display()))?
        {
            roots.add(certificate?)?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self { authority: authority.trim_end_matches('/').to_owned(), tls: Arc::new(tls) })
    }

    pub(crate) async fn connect(&self) -> anyhow::Result<TlsStream<TcpStream>> {
        let tcp =
            TcpStream::connect(&self.authority).await.with_context(|| format!("cannot reach {}", self.authority))?;
        tcp.set_nodelay(true)?;
        let host = self.authority.rsplit_once(':').map_or(&*self.authority, |(host, _)| host);
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())?;
        Ok(TlsConnector::from(Arc::clone(&self.tls)).connect(name, tcp).await?)
    }
}

/// A native client on the one connection that carries its whole dialogue.
#[derive(Debug)]
pub struct Native {
    stream: TlsStream<TcpStream>,
    /// Bytes read and not yet understood.
    buffer: Vec<u8>,
    authority: String,
    authorization: String,
}

/// A row of the list of desktops.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Listed {
    /// Number to connect to.
    pub id: u32,
    /// Name that the user gave it.
    pub name: String,
    /// Such as `stopped` or `running`.
    pub state: String,
    /// 1 under maintenance.
    pub blocked: u8,
    /// 1 for a single application.
    pub is_application: u8,
}

/// A connection after `101 Switching Protocols`.
#[derive(Debug)]
pub struct Nx {
    /// What each `102 Processing` said, in order.
    pub news: Vec<String>,
    /// The key in the answer.
    pub slave_key: String,
    stream: TlsStream<TcpStream>,
    early: Vec<u8>,
}

struct Head {
    status: u16,
    headers: Vec<(String, String)>,
}

impl Head {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| &**value)
    }
}

impl Native {
    /// Connects to the server and trusts its certificate and no other.
    ///
    /// # Errors
    /// The server cannot be reached or is another.
    pub async fn connect(url: &str, certificate: &Path, user: &str, password: &str) -> anyhow::Result<Self> {
        let endpoint = Endpoint::new(url, certificate)?;
        Ok(Self {
            stream: endpoint.connect().await?,
            buffer: Vec::new(),
            authority: endpoint.authority,
            authorization: format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}"))),
        })
    }

    /// Asks whether the server takes clients.
    ///
    /// # Errors
    /// It does not.
    pub async fn ping(&mut self) -> anyhow::Result<String> {
        self.get("/qvd/ping").await
    }

    /// The user's desktops.
    ///
    /// # Errors
    /// The server refused, or answered with something else.
    pub async fn list_of_vm(&mut self) -> anyhow::Result<Vec<Listed>> {
        serde_json::from_str(&self.get("/qvd/list_of_vm").await?).context("the list of desktops is none")
    }

    /// Connects to a desktop with the given `qvd.client.` parameters.
    ///
    /// # Errors
    /// The server refused; the error holds status and reason.
    pub async fn connect_to_vm(mut self, id: u32, parameters: &[(&str, &str)]) -> anyhow::Result<Nx> {
        let query: String = parameters.iter().map(|(key, value)| format!("&qvd.client.{key}={value}")).collect();
        self.request(&format!("/qvd/connect_to_vm?id={id}{query}"), "Connection: Upgrade\r\nUpgrade: QVD/1.0\r\n")
            .await?;
        let mut news = Vec::new();
        loop {
            let head = self.head().await?;
            match head.status {
                102 => news.extend(head.header("x-qvd-vm-info").map(str::to_owned)),
                101 => {
                    let slave_key = head.header("x-qvd-slave-key").context("the answer holds no key")?.to_owned();
                    return Ok(Nx { news, slave_key, stream: self.stream, early: self.buffer });
                }
                status => bail!("refused with {status}: {}", self.body(&head).await?),
            }
        }
    }

    /// One ordinary request; the connection stays for the next.
    async fn get(&mut self, path: &str) -> anyhow::Result<String> {
        self.request(path, "").await?;
        let head = self.head().await?;
        let body = self.body(&head).await?;
        ensure!(head.status == 200, "refused with {}: {body}", head.status);
        Ok(body)
    }

    async fn request(&mut self, target: &str, headers: &str) -> anyhow::Result<()> {
        let (authority, authorization) = (&self.authority, &self.authorization);
        let head =
            format!("GET {target} HTTP/1.1\r\nHost: {authority}\r\nAuthorization: {authorization}\r\n{headers}\r\n");
        self.stream.write_all(head.as_bytes()).await?;
        Ok(self.stream.flush().await?)
    }

    async fn head(&mut self) -> anyhow::Result<Head> {
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 32];
            let mut response = httparse::Response::new(&mut headers);
            if let httparse::Status::Complete(length) = response.parse(&self.buffer)? {
                let status = response.code.context("an answer without a status")?;
                let headers = response
                    .headers
                    .iter()
                    .map(|header| (header.name.to_owned(), String::from_utf8_lossy(header.value).into_owned()));
                let head = Head { status, headers: headers.collect() };
                self.buffer.drain(..length);
                return Ok(head);
            }
            ensure!(self.buffer.len() < MAX_HEAD, "a head of more than {MAX_HEAD} bytes");
            ensure!(self.stream.read_buf(&mut self.buffer).await? > 0, "the server closed the connection");
        }
    }

    async fn body(&mut self, head: &Head) -> anyhow::Result<String> {
        let length: usize = head.header("content-length").context("a body of unknown length")?.parse()?;
        ensure!(length <= MAX_BODY, "a body of {length} bytes");
        while self.buffer.len() < length {
            ensure!(self.stream.read_buf(&mut self.buffer).await? > 0, "the server closed the connection");
        }
        Ok(String::from_utf8(self.buffer.drain(..length).collect())?)
    }
}

impl Nx {
    /// Copies between the desktop and the client's proxy until one of them
    /// ends, and ends the other.
    ///
    /// # Errors
    /// A connection broke instead.
    pub async fn splice(self, proxy: impl AsyncRead + AsyncWrite + Unpin) -> anyhow::Result<()> {
        let (mut from_desktop, mut to_desktop) = tokio::io::split(self.stream);
        let (mut from_proxy, mut to_proxy) = tokio::io::split(proxy);
        to_proxy.write_all(&self.early).await?;
        tokio::select! {
            up = tokio::io::copy(&mut from_proxy, &mut to_desktop) => { up?; to_desktop.shutdown().await?; }
            down = tokio::io::copy(&mut from_desktop, &mut to_proxy) => { down?; to_proxy.shutdown().await?; }
        }
        Ok(())
    }
}
