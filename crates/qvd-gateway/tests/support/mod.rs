//! A gateway over a host in memory, and a client that sees every byte.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use qvd_core::DesktopId;
use qvd_farm::{Clock, Database, Farm, NewDesktop, Secret};
use qvd_gateway::{ConnectionLimits, Gateway, GatewayConfig, TlsSource};
use qvd_node::fake::FakeHost;
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::oneshot,
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tracing_subscriber::fmt::MakeWriter;

/// Bounds a failure; nothing is measured with it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const PASSWORD: &str = "correct horse";

/// What is logged, for a subscriber to write into.
#[derive(Debug, Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// The host's clocks, put forward by what a test says.
#[derive(Debug, Default)]
pub(crate) struct TestClock(Mutex<Duration>);

impl TestClock {
    pub(crate) fn advance(&self, by: Duration) {
        *self.0.lock().unwrap() += by;
    }
}

impl Clock for TestClock {
    fn now(&self) -> SystemTime {
        SystemTime::now() + *self.0.lock().unwrap()
    }

    fn monotonic(&self) -> Instant {
        Instant::now() + *self.0.lock().unwrap()
    }
}

pub(crate) struct Site {
    pub(crate) address: SocketAddr,
    pub(crate) host: Arc<FakeHost>,
    pub(crate) farm: Farm,
    pub(crate) clock: Arc<TestClock>,
    pub(crate) desktop: DesktopId,
    connector: TlsConnector,
    stop: Option<oneshot::Sender<()>>,
    serving: JoinHandle<()>,
    pub(crate) dir: tempfile::TempDir,
}

impl Site {
    /// Users ada (with a desktop) and bob (with another).
    pub(crate) async fn new() -> Self {
        Self::with(ConnectionLimits::default(), Vec::new()).await
    }

    pub(crate) async fn with(limits: ConnectionLimits, hosts: Vec<String>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = Arc::new(FakeHost::new());
        let (database, clock) = (Database::File(dir.path().join("qvd.sqlite")), Arc::new(TestClock::default()));
        let farm = Farm::open_with_clock(&database, Arc::clone(&host) as _, Arc::clone(&clock) as _).await.unwrap();
        for name in ["ada", "bob"] {
            farm.add_user(&name.parse().unwrap(), &Secret::from(PASSWORD), name == "bob").await.unwrap();
        }
        let new = |user: &str| NewDesktop::new(user.parse().unwrap(), "icewm".parse().unwrap());
        let desktop = farm.create_desktop(new("ada")).await.unwrap().id;
        farm.create_desktop(new("bob")).await.unwrap();
        let directory = dir.path().join("tls");
        let tls = TlsSource::SelfSigned { directory: directory.clone() };
        let config = GatewayConfig { listen: "127.0.0.1:0".parse().unwrap(), tls, hosts, limits };
        let gateway = Gateway::bind(config, farm.clone()).await.unwrap();
        let address = gateway.local_addr();
        let (stop, stopped) = oneshot::channel();
        let serving = tokio::spawn(gateway.serve(async {
            drop(stopped.await);
        }));
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(directory.join("cert.pem")).unwrap()).unwrap();
        let client = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector = TlsConnector::from(Arc::new(client));
        Self { address, host, farm, clock, desktop, connector, stop: Some(stop), serving, dir }
    }

    pub(crate) async fn connect(&self) -> Wire {
        self.try_connect().await.expect("a TLS connection")
    }

    pub(crate) async fn try_connect(&self) -> std::io::Result<Wire> {
        let stream = TcpStream::connect(self.address).await?;
        let name = ServerName::try_from("localhost").unwrap();
        Ok(Wire { stream: self.connector.connect(name, stream).await?, buffer: Vec::new() })
    }

    /// One request on a connection of its own.
    pub(crate) async fn ask(&self, head: &str) -> Answer {
        let mut wire = self.connect().await;
        wire.send(head.as_bytes()).await;
        wire.answer().await
    }

    pub(crate) fn tell_to_stop(&mut self) {
        drop(self.stop.take());
    }

    pub(crate) async fn stopped(mut self) {
        self.tell_to_stop();
        timeout(PATIENCE, self.serving).await.unwrap().unwrap();
    }
}

pub(crate) fn basic(user: &str, password: &str) -> String {
    format!("Authorization: Basic {}\r\n", BASE64_STANDARD.encode(format!("{user}:{password}")))
}

pub(crate) fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n")
}

pub(crate) fn post(path: &str, headers: &str, form: &str) -> String {
    let length = form.len();
    format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nOrigin: https://localhost\r\n\
         Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {length}\r\n{headers}\r\n{form}"
    )
}

/// The value of a hidden field or meta element.
pub(crate) fn token(html: &str) -> &str {
    let at = html.find("name=\"csrf\"").unwrap_or_else(|| panic!("no token in {html}"));
    let html = &html[at..];
    let start = html.find("value=\"").or_else(|| html.find("content=\"")).unwrap();
    html[start..].split('"').nth(1).unwrap()
}

pub(crate) fn cookie_header(answer: &Answer) -> String {
    let pairs: Vec<_> =
        answer.cookies().iter().map(|c| c.split(';').next().unwrap()).filter(|c| !c.ends_with('=')).collect();
    format!("Cookie: {}\r\n", pairs.join("; "))
}

pub(crate) async fn try_sign_in(site: &Site, user: &str, password: &str) -> Answer {
    let page = site.ask(&get("/sign-in", "")).await;
    let form = format!("user={user}&password={}&csrf={}&next=/desktops", password.replace(' ', "+"), token(&page.body));
    site.ask(&post("/sign-in", &cookie_header(&page), &form)).await
}

/// A page lets no code of its own run, has none, and is kept nowhere.
pub(crate) fn forbids_inline_code(path: &str, page: &Answer) {
    let policy = page.header("content-security-policy");
    for part in ["default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"] {
        assert!(policy.contains(part), "{path}: {policy}");
    }
    assert!(!policy.contains("unsafe"), "{policy}");
    assert_eq!(page.header("x-content-type-options"), "nosniff");
    assert_eq!(page.header("cache-control"), "no-store", "{path}");
    assert!(page.body.contains("<html lang"), "{path}: {page:?}");
    for tag in page.body.split('<').map(|tag| tag.split('>').next().unwrap_or_default().to_lowercase()) {
        let name = tag.split_whitespace().next().unwrap_or_default();
        assert!(name != "style" && !tag.contains(" style=") && !tag.contains("javascript:"), "{path}: {tag}");
        assert!(name != "script" || tag.contains(" src="), "{path}: {tag}");
        let handler = tag.split_whitespace().skip(1).find(|a| a.starts_with("on") && a.contains('='));
        assert_eq!(handler, None, "{path}: {tag}");
    }
}

/// A request of the QVD protocol by ada.
pub(crate) fn qvd(target: &str) -> String {
    format!("GET /qvd/{target} HTTP/1.1\r\nHost: localhost\r\n{}\r\n", basic("ada", PASSWORD))
}

pub(crate) fn qvd_upgrade(target: &str) -> String {
    qvd(target).replace("\r\n\r\n", "\r\nConnection: Upgrade\r\nUpgrade: QVD/1.0\r\n\r\n")
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map_or("", |(_, value)| value)
    }

    pub(crate) fn cookies(&self) -> Vec<&str> {
        let cookies = self.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case("set-cookie"));
        cookies.map(|(_, value)| value.as_str()).collect()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

pub(crate) struct Wire {
    pub(crate) stream: TlsStream<TcpStream>,
    pub(crate) buffer: Vec<u8>,
}

impl Wire {
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    /// Reads more; false at the end.
    async fn more(&mut self) -> bool {
        timeout(PATIENCE, self.stream.read_buf(&mut self.buffer)).await.expect("an answer in time").unwrap_or(0) > 0
    }

    /// Reads one answer, final or not.
    pub(crate) async fn answer(&mut self) -> Answer {
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 64];
            let mut parsed = httparse::Response::new(&mut headers);
            if let httparse::Status::Complete(length) = parsed.parse(&self.buffer).unwrap() {
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                let status = parsed.code.unwrap();
                let headers = parsed.headers.iter().map(|h| (h.name.to_owned(), text(h.value))).collect();
                self.buffer.drain(..length);
                let mut answer = Answer { status, headers, body: String::new() };
                let bodyless = status < 200 || status == 204 || status == 304;
                let body = match answer.header("content-length").parse::<usize>() {
                    _ if bodyless => Vec::new(),
                    Ok(length) => self.bytes(length).await,
                    // Chunked: as it is, to the end.
                    Err(_) => self.rest().await,
                };
                answer.body = text(&body);
                return answer;
            }
            assert!(self.more().await, "the server left in the middle of an answer: {:?}", self.buffer);
        }
    }

    pub(crate) async fn bytes(&mut self, count: usize) -> Vec<u8> {
        while self.buffer.len() < count {
            assert!(self.more().await, "the server left after {:?}", self.buffer);
        }
        self.buffer.drain(..count).collect()
    }

    /// Everything until the server closes.
    pub(crate) async fn rest(&mut self) -> Vec<u8> {
        while self.more().await {}
        std::mem::take(&mut self.buffer)
    }
}
