//! The way to the images of a daemon: blocking, as everything about images is.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Read as _},
    net::TcpStream,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use qvd_farm::Secret;
use qvd_storage::repository::wire::Stream;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, crypto::aws_lc_rs};
use rustls_pki_types::{CertificateDer, InvalidDnsNameError, ServerName, pem::PemObject as _};

use super::{dto::ErrorBody, repository::PROTOCOL};

/// How long the daemon may be silent: it reads, verifies and writes to its disk.
const SILENCE: Duration = Duration::from_secs(300);
/// Longest head of an answer in bytes, and longest refusal.
const HEAD_MAX_BYTES: u64 = 64 << 10;
/// Certificates that the host trusts. Source: Debian's package `ca-certificates`.
const HOST_CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Makes connections to the images of a daemon.
pub struct RepositoryDoor {
    at: At,
}

enum At {
    Unix(PathBuf),
    Https { host: String, port: u16, name: ServerName<'static>, tls: Arc<ClientConfig>, authorization: Secret },
}

impl std::fmt::Debug for RepositoryDoor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RepositoryDoor").field("at", &self.name()).finish()
    }
}

/// What is wanted of a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// It is asked.
    Pull,
    /// It is given something.
    Push,
}

impl RepositoryDoor {
    /// The daemon of this host.
    #[must_use]
    pub fn unix(path: &Path) -> Self {
        Self { at: At::Unix(path.to_owned()) }
    }

    /// A daemon elsewhere, as one of its administrators.
    ///
    /// # Errors
    /// `host` is neither a name nor an address.
    pub fn https(
        host: &str,
        port: u16,
        user: &str,
        password: &Secret,
        tls: Arc<ClientConfig>,
    ) -> Result<Self, InvalidDnsNameError> {
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())?;
        let pair = BASE64_STANDARD.encode(format!("{user}:{}", password.expose()));
        let authorization = Secret::new(format!("Basic {pair}"));
        Ok(Self { at: At::Https { host: host.to_owned(), port, name, tls, authorization } })
    }

    /// What errors call it.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.at {
            At::Unix(path) => path.display().to_string(),
            At::Https { host, port, .. } => format!("https://{host}:{port}"),
        }
    }

    /// Makes a connection.
    ///
    /// # Errors
    /// Nobody answers there, is not whom we trust, or refuses; then the text
    /// says why.
    pub fn open(&self, direction: Direction) -> io::Result<Box<dyn Stream>> {
        match &self.at {
            At::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(SILENCE))?;
                stream.set_write_timeout(Some(SILENCE))?;
                Ok(Box::new(upgrade(stream, "localhost", None, direction)?))
            }
            At::Https { host, port, name, tls, authorization } => {
                let stream = TcpStream::connect((host.trim_matches(['[', ']']), *port))?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(SILENCE))?;
                stream.set_write_timeout(Some(SILENCE))?;
                let connection = ClientConnection::new(Arc::clone(tls), name.clone()).map_err(io::Error::other)?;
                let stream = StreamOwned::new(connection, stream);
                Ok(Box::new(upgrade(stream, &format!("{host}:{port}"), Some(authorization), direction)?))
            }
        }
    }
}

/// Whom to trust: the certificates in a PEM file, or those that the host trusts.
///
/// # Errors
/// There is no such file, or no certificate in it.
pub fn trusting(file: Option<&Path>) -> io::Result<Arc<ClientConfig>> {
    let path = file.unwrap_or(Path::new(HOST_CERTIFICATES));
    let bytes = fs::read(path)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot read `{}`: {error}", path.display())))?;
    trusting_pem(&bytes)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot trust `{}`: {error}", path.display())))
}

/// Whom to trust: the certificates in a text in PEM.
///
/// # Errors
/// There is no certificate in it.
pub fn trusting_pem(pem: &[u8]) -> io::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(CertificateDer::pem_slice_iter(pem).flatten());
    if added == 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "there is no certificate in it"));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Asks for the protocol, and returns the connection once it is spoken there.
fn upgrade<S: Stream>(
    mut stream: S,
    host: &str,
    authorization: Option<&Secret>,
    direction: Direction,
) -> io::Result<S> {
    let path = match direction {
        Direction::Pull => "pull",
        Direction::Push => "push",
    };
    let mut head = format!(
        "GET /api/v1/repository/{path} HTTP/1.1\r\nHost: {host}\r\nAccept: application/json\r\n\
         Connection: Upgrade\r\nUpgrade: {PROTOCOL}\r\n"
    );
    if let Some(authorization) = authorization {
        head += &format!("Authorization: {}\r\n", authorization.expose());
    }
    head += "\r\n";
    stream.write_all(head.as_bytes())?;
    stream.flush()?;
    // Byte by byte: what follows the head belongs to the protocol.
    let mut from = BufReader::with_capacity(1, &mut stream).take(HEAD_MAX_BYTES);
    let mut status = String::new();
    from.read_line(&mut status)?;
    let mut length = 0;
    loop {
        let mut line = String::new();
        if from.read_line(&mut line)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the answer ended within its head"));
        }
        match line.trim_end().split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse().unwrap_or(0);
            }
            None if line.trim_end().is_empty() => break,
            _ => {}
        }
    }
    let status = status.split(' ').nth(1).unwrap_or_default();
    if status == "101" {
        return Ok(stream);
    }
    let mut body = Vec::new();
    from.take(length).read_to_end(&mut body)?;
    let refusal = serde_json::from_slice::<ErrorBody>(&body);
    let text = refusal.map_or_else(|_| format!("the server answers with HTTP status {status}"), |r| r.error.message);
    let kind = if matches!(status, "401" | "403") { io::ErrorKind::PermissionDenied } else { io::ErrorKind::Other };
    Err(io::Error::new(kind, text))
}
