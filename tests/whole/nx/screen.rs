//! The screen of a native client: an X server without a monitor, what it
//! shows, and a keyboard and pointer for it.

use std::{process::Stdio, time::Duration};

use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::TcpListener,
    process::{Child, Command},
    task::JoinHandle,
    time::timeout,
};
use x11rb::{
    connection::Connection as _,
    protocol::{
        Event,
        xproto::{
            self, ChangeWindowAttributesAux, ConfigureWindowAux, ConnectionExt as _, EventMask, ImageFormat, Window,
        },
        xtest::ConnectionExt as _,
    },
    rust_connection::RustConnection,
};

use crate::harness::SOON;

/// Larger than the session, as a user's screen is.
const WIDTH: u16 = 1600;
const HEIGHT: u16 = 1000;

/// The port of `localhost:40` in NX's counting; free in a namespace of its own.
const NX_PORT: u16 = 4040;

/// Between two looks at what announces no change.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What a screen shows: `0xRRGGBB`, row by row.
#[derive(Debug)]
pub(super) struct Picture {
    width: usize,
    pixels: Vec<u32>,
}

impl Picture {
    pub(super) fn pixel(&self, x: u16, y: u16) -> Option<u32> {
        self.pixels.get(usize::from(y) * self.width + usize::from(x)).copied()
    }
}

/// A running X server and a connection to it.
#[derive(Debug)]
pub(super) struct Screen {
    server: Child,
    display: String,
    x: RustConnection,
    root: Window,
}

impl Screen {
    pub(super) async fn start() -> Self {
        let size = format!("{WIDTH}x{HEIGHT}x24");
        let mut server = Command::new("Xvfb")
            .args(["-displayfd", "1", "-screen", "0", &size, "-nolisten", "tcp", "-noreset"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut number = String::new();
        let mut stdout = BufReader::new(server.stdout.take().unwrap());
        timeout(SOON, stdout.read_line(&mut number)).await.unwrap().unwrap();
        let display = format!(":{}", number.trim());
        let (x, screen) = x11rb::connect(Some(&display)).unwrap();
        let root = x.setup().roots[screen].root;
        manage(&display);
        Self { server, display, x, root }
    }

    pub(super) fn display(&self) -> &str {
        &self.display
    }

    pub(super) fn picture(&self) -> Picture {
        let image =
            self.x.get_image(ImageFormat::Z_PIXMAP, self.root, 0, 0, WIDTH, HEIGHT, u32::MAX).unwrap().reply().unwrap();
        let pixels = image.data.chunks_exact(4).map(|p| u32::from_le_bytes([p[0], p[1], p[2], 0])).collect();
        Picture { width: usize::from(WIDTH), pixels }
    }

    /// Types on the keyboard: ASCII, and a line feed as the Return key.
    pub(super) fn type_text(&self, text: &str) {
        const RETURN: u32 = 0xff0d;
        const SHIFT: u32 = 0xffe1;
        let first = self.x.setup().min_keycode;
        let count = self.x.setup().max_keycode - first + 1;
        let map = self.x.get_keyboard_mapping(first, count).unwrap().reply().unwrap();
        let levels = usize::from(map.keysyms_per_keycode);
        let code = |keysym: u32, level: usize| {
            let at = map.keysyms.chunks_exact(levels).position(|key| key[level] == keysym)?;
            Some(first + u8::try_from(at).unwrap())
        };
        let shift = code(SHIFT, 0).unwrap();
        for byte in text.bytes() {
            let keysym = if byte == b'\n' { RETURN } else { u32::from(byte) };
            let (key, shifted) = match code(keysym, 0) {
                Some(key) => (key, false),
                None => (code(keysym, 1).unwrap(), true),
            };
            let presses = [(xproto::KEY_PRESS_EVENT, shift), (xproto::KEY_PRESS_EVENT, key)];
            let releases = [(xproto::KEY_RELEASE_EVENT, key), (xproto::KEY_RELEASE_EVENT, shift)];
            for (event, key) in presses.into_iter().chain(releases).filter(|&(_, key)| shifted || key != shift) {
                self.input(event, key, 0, 0);
            }
        }
        self.x.flush().unwrap();
    }

    /// Moves the pointer and clicks.
    pub(super) fn click(&self, (x, y): (u16, u16)) {
        self.input(xproto::MOTION_NOTIFY_EVENT, 0, x.cast_signed(), y.cast_signed());
        self.input(xproto::BUTTON_PRESS_EVENT, 1, 0, 0);
        self.input(xproto::BUTTON_RELEASE_EVENT, 1, 0, 0);
        self.x.flush().unwrap();
    }

    fn input(&self, event: u8, detail: u8, x: i16, y: i16) {
        self.x.xtest_fake_input(event, detail, x11rb::CURRENT_TIME, self.root, x, y, 0).unwrap().check().unwrap();
    }

    /// Ends the server and waits, so that it removes its socket and lock.
    pub(super) async fn end(mut self) {
        let pid = rustix::process::Pid::from_raw(self.server.id().unwrap().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        timeout(SOON, self.server.wait()).await.unwrap().unwrap();
    }
}

/// The least of a window manager, which the agent wants to see: every window
/// gets the size it asks for, in the corner. Ends with the server.
fn manage(display: &str) {
    let (x, screen) = x11rb::connect(Some(display)).unwrap();
    let root = x.setup().roots[screen].root;
    let manager = ChangeWindowAttributesAux::new().event_mask(EventMask::SUBSTRUCTURE_REDIRECT);
    x.change_window_attributes(root, &manager).unwrap().check().unwrap();
    std::thread::spawn(move || {
        while let Ok(event) = x.wait_for_event() {
            let granted = match event {
                Event::MapRequest(request) => x.map_window(request.window),
                Event::ConfigureRequest(request) => {
                    x.configure_window(request.window, &ConfigureWindowAux::from_configure_request(&request).x(0).y(0))
                }
                _ => continue,
            };
            if granted.and_then(|_| x.flush()).is_err() {
                return;
            }
        }
    });
}

/// A native client that shows a desktop: its NX proxy and the copying.
#[derive(Debug)]
pub(super) struct Client {
    proxy: Child,
    copying: JoinHandle<anyhow::Result<()>>,
    home: TempDir,
}

impl Client {
    /// Starts the proxy exactly as the QVD clients do.
    pub(super) async fn start(nx: qvd_demo::Nx, screen: &Screen) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", NX_PORT)).await.unwrap();
        let home = tempfile::tempdir().unwrap();
        let log = std::fs::File::create(home.path().join("log")).unwrap();
        let proxy = Command::new("nxproxy")
            .args(["-S", "localhost:40"])
            .env("DISPLAY", screen.display())
            .env("HOME", home.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let (stream, _peer) = timeout(SOON, listener.accept()).await.unwrap().unwrap();
        stream.set_nodelay(true).unwrap();
        Self { proxy, copying: tokio::spawn(nx.splice(stream)), home }
    }

    /// What the proxy said.
    pub(super) fn said(&self) -> String {
        std::fs::read_to_string(self.home.path().join("log")).unwrap()
    }

    /// Waits until the server has ended the connection and the proxy with it.
    pub(super) async fn ended(mut self) {
        timeout(SOON, &mut self.copying).await.expect("the connection was not ended").unwrap().unwrap();
        timeout(SOON, self.proxy.wait()).await.expect("the proxy did not end").unwrap();
    }

    /// Leaves, as a closed window does.
    pub(super) async fn leave(mut self) {
        self.proxy.kill().await.unwrap();
        timeout(SOON, &mut self.copying).await.unwrap().unwrap().ok();
    }
}
