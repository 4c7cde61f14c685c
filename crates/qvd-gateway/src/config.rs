//! What the administrator decides about a gateway.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

/// Where a gateway listens and with which certificate.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// Address and port; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where its certificate comes from.
    pub tls: TlsSource,
    /// Names (and `name:port`) that a request's `Host` may bear. Empty
    /// accepts any: cookies are bound to the name in any case.
    pub hosts: Vec<String>,
    /// What one client, and all of them, may hold.
    pub limits: ConnectionLimits,
}

/// Where the certificate comes from.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum TlsSource {
    /// Made at the first start and kept in this directory.
    SelfSigned {
        /// Directory of `cert.pem` and `key.pem`; made when absent.
        directory: PathBuf,
    },
    /// The administrator's own, in PEM.
    Files {
        /// The certificate, followed by the intermediate ones.
        certificate: PathBuf,
        /// Its private key.
        key: PathBuf,
    },
}

/// Bounds that a stranger meets before anybody knows who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Open connections at once.
    pub connections: usize,
    /// Open connections at once from one address. Generous: a whole office
    /// may sit behind one.
    pub connections_per_address: usize,
    /// For the TLS handshake.
    pub handshake: Duration,
    /// For a request's head, from its first byte (or from the connection).
    pub head: Duration,
    /// A connection without a request is closed after this.
    pub idle: Duration,
    /// How often the browser of an open display is asked whether it is there,
    /// and the farm whether its user is still signed in.
    pub ping: Duration,
    /// For displays to end when the gateway stops.
    pub drain: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            connections_per_address: 2_048,
            handshake: Duration::from_secs(10),
            head: Duration::from_secs(10),
            idle: Duration::from_secs(75),
            ping: Duration::from_secs(20),
            drain: Duration::from_secs(5),
        }
    }
}
