//! The listener: who may connect, how long it may take, where it goes.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{Router, body::Body, extract::Request};
use hyper_util::rt::{TokioIo, TokioTimer};
use qvd_farm::Farm;
use rustix::net::sockopt;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt as _;

use crate::{
    ConnectionLimits, GatewayConfig, GatewayError, TlsSource, portal,
    rewind::Rewind,
    tls,
    wire::{self, Dialogue},
};

/// Data that the peer has not acknowledged for this long ends a connection:
/// a telephone that lost its network says nothing.
const PEER_TIMEOUT: Duration = Duration::from_secs(90);
/// After an `accept` that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What every connection needs.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) farm: Farm,
    pub(crate) limits: ConnectionLimits,
    /// See [`GatewayConfig::hosts`].
    pub(crate) hosts: Vec<String>,
    /// Whether browsers may insist on TLS from now on: with a certificate of
    /// our own making that would lock people out of clicking past a warning.
    pub(crate) strict_transport: bool,
    stop: watch::Sender<bool>,
    slots: Arc<Semaphore>,
    by_address: Mutex<HashMap<IpAddr, usize>>,
}

impl Shared {
    pub(crate) fn is_stopping(&self) -> bool {
        *self.stop.borrow()
    }

    /// Returns once the gateway stops.
    pub(crate) fn stopping(&self) -> impl Future<Output = ()> + use<> {
        let mut stop = self.stop.subscribe();
        async move {
            // The sender lives in `Shared`: if it is gone, so is the gateway.
            let _gone = stop.wait_for(|stop| *stop).await;
        }
    }

    fn take_slot(self: &Arc<Self>, address: IpAddr) -> Option<Slot> {
        let permit = Arc::clone(&self.slots).try_acquire_owned().ok()?;
        let mut by_address = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        let held = by_address.entry(address).or_default();
        if *held >= self.limits.connections_per_address {
            return None;
        }
        *held += 1;
        drop(by_address);
        Some(Slot { _permit: permit, shared: Arc::clone(self), address })
    }
}

/// The right to have a connection; also held by what outlives the HTTP part.
#[derive(Debug)]
pub(crate) struct Slot {
    _permit: OwnedSemaphorePermit,
    shared: Arc<Shared>,
    address: IpAddr,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut by_address = self.shared.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = by_address.get_mut(&self.address) {
            *held -= 1;
            if *held == 0 {
                by_address.remove(&self.address);
            }
        }
    }
}

/// Whose connection a request came over; in the request's extensions.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    pub(crate) slot: Arc<Slot>,
}

/// What clients connect to: one TLS listener for the QVD wire protocol, the
/// browser's portal and display, and the REST API.
pub struct Gateway {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    address: SocketAddr,
    shared: Arc<Shared>,
    router: Router,
}

impl std::fmt::Debug for Gateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gateway").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Gateway {
    /// Takes the address and makes ready; nobody is served before [`Gateway::serve`].
    ///
    /// # Errors
    /// The address is taken or not ours, or the certificate cannot be read or made.
    pub async fn bind(config: GatewayConfig, farm: Farm) -> Result<Self, GatewayError> {
        let address = config.listen;
        let listener = TcpListener::bind(address).await.map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => GatewayError::PortInUse { address, source },
            _ => GatewayError::Listen { address, source },
        })?;
        let address = listener.local_addr().map_err(|source| GatewayError::Listen { address, source })?;
        let acceptor = TlsAcceptor::from(tls::server_config(&config.tls, address.ip())?);
        let shared = Arc::new(Shared {
            farm,
            limits: config.limits,
            hosts: config.hosts,
            strict_transport: matches!(config.tls, TlsSource::Files { .. }),
            stop: watch::Sender::new(false),
            slots: Arc::new(Semaphore::new(config.limits.connections)),
            by_address: Mutex::default(),
        });
        let router = portal::router(Arc::clone(&shared));
        Ok(Self { listener, acceptor, address, shared, router })
    }

    /// Where it listens: of use when port 0 was asked for.
    #[must_use]
    pub const fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves clients until `shutdown`; then no more are accepted, requests
    /// under way are answered, and displays are closed, their clients told.
    /// The desktops run on.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) {
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = &mut shutdown => break,
            };
            match accepted {
                Ok((stream, peer)) => self.admit(stream, peer),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(self.listener);
        // Nobody listening is as good as having told them.
        self.shared.stop.send_replace(true);
        let all = u32::try_from(self.shared.limits.connections).unwrap_or(u32::MAX);
        match timeout(self.shared.limits.drain, self.shared.slots.acquire_many(all)).await {
            Ok(_permits) => tracing::info!("gateway stopped"),
            Err(_) => tracing::warn!("gateway stopped; some connections did not end in time"),
        }
    }

    fn admit(&self, stream: TcpStream, peer: SocketAddr) {
        let address = peer.ip().to_canonical();
        let Some(slot) = self.shared.take_slot(address) else {
            tracing::warn!(%peer, "connection refused: too many are open");
            return;
        };
        let peer = Peer { address: SocketAddr::new(address, peer.port()), slot: Arc::new(slot) };
        let connection = Connection {
            peer,
            acceptor: self.acceptor.clone(),
            shared: Arc::clone(&self.shared),
            router: self.router.clone(),
        };
        tokio::spawn(async move {
            let peer = connection.peer.address;
            if let Err(error) = connection.run(stream).await {
                tracing::debug!(%peer, %error, "connection ended badly");
            }
        });
    }
}

struct Connection {
    peer: Peer,
    acceptor: TlsAcceptor,
    shared: Arc<Shared>,
    router: Router,
}

impl Connection {
    async fn run(self, stream: TcpStream) -> io::Result<()> {
        let limits = self.shared.limits;
        stream.set_nodelay(true)?;
        sockopt::set_socket_keepalive(&stream, true)?;
        sockopt::set_tcp_keepidle(&stream, PEER_TIMEOUT / 3)?;
        let timeout_ms = u32::try_from(PEER_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
        sockopt::set_tcp_user_timeout(&stream, timeout_ms)?;
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake did not end in time");
        let mut stream = tokio::select! {
            accepted = timeout(limits.handshake, self.acceptor.accept(stream)) => accepted.map_err(late)??,
            () = self.shared.stopping() => return Ok(()),
        };
        let mut seen = Vec::new();
        let first = tokio::select! {
            first = wire::read_head(&mut stream, &mut seen, limits.head, limits.head) => first?,
            () = self.shared.stopping() => return stream.shutdown().await,
        };
        match first {
            Ok(None) => stream.shutdown().await,
            Ok(Some(head)) if !head.target.starts_with(wire::PREFIX) => self.http(Rewind::new(seen, stream)).await,
            // Also what is no request: that loop answers it and closes.
            _ => Dialogue::new(stream, seen, &self.shared, self.peer.address).run().await,
        }
    }

    /// Everything that is not the QVD wire protocol.
    async fn http<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self, stream: S) -> io::Result<()> {
        let (peer, router) = (self.peer, self.router);
        let service = hyper::service::service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
            request.extensions_mut().insert(peer.clone());
            router.clone().oneshot(Request::from(request.map(Body::new)))
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.shared.limits.idle)
            .max_buf_size(64 * 1024)
            .max_headers(100)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.shared.stopping() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        ended.map_err(io::Error::other)
    }
}
