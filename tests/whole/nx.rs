//! A native client: the QVD protocol, a real NX proxy, a real X server; alone,
//! and in turn with a browser.

mod screen;

use std::time::{Duration, Instant};

use qvd_demo::{Display, Native, Nx, Server, Setup};
use qvd_testkit::{Need, bed_directory, privileged};
use tokio::{
    process::Command,
    time::{sleep, timeout},
};

use crate::harness::{
    Host, PASSWORD, browser, create_desktop, expect_ok, on_a_host, remove_user, run, user_with_desktop,
};
use screen::{Client, LOOK_AGAIN, Screen};

/// Bounds a failure; nothing that works takes as long, also by emulation.
const SOON: Duration = Duration::from_secs(120);

/// Size of the session, which the client asks for. An agent keeps the size that
/// it began with, so this is that one.
const WIDTH: u16 = 1280;
const HEIGHT: u16 = 800;

/// Blue, the colour that a terminal shows for `ESC [ 44 m`, as xterm has it.
const BLUE: u32 = 0x0000_00ee;

/// Has the terminal fill its screen with blue.
const PAINT: &str = "clear; printf '\\033[44m\\033[2J'\n";

/// How much of the terminal has to be blue, in hundredths: the rest is text.
const MOSTLY: usize = 90;

/// A place on the session's screen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Area {
    x: u16,
    y: u16,
    width: u16,
    height: u16,
}

impl Area {
    /// Every fourth pixel of every fourth row, by what shows the screen.
    fn sample<T>(self, pixel: impl Fn(u16, u16) -> Option<T>) -> Vec<T> {
        let rows = (self.y..self.y + self.height).step_by(4);
        let places = rows.flat_map(|y| (self.x..self.x + self.width).step_by(4).map(move |x| (x, y)));
        places.filter_map(|(x, y)| pixel(x, y)).collect()
    }

    /// Hundredths of the area that have this colour.
    fn share(self, colour: u32, pixel: impl Fn(u16, u16) -> Option<u32>) -> usize {
        let pixels = self.sample(pixel);
        pixels.iter().filter(|&&pixel| near(pixel, colour)).count() * 100 / pixels.len().max(1)
    }

    fn colours(self, pixel: impl Fn(u16, u16) -> Option<u32>) -> usize {
        self.sample(pixel).into_iter().collect::<std::collections::HashSet<_>>().len()
    }

    const fn middle(self) -> (u16, u16) {
        (self.x + self.width / 2, self.y + self.height / 2)
    }
}

/// All of the session's screen.
const ALL: Area = Area { x: 0, y: 0, width: WIDTH, height: HEIGHT };

/// Pictures may be packed with loss.
fn near(one: u32, other: u32) -> bool {
    (0..3).all(|n| (one >> (8 * n) & 0xff).abs_diff(other >> (8 * n) & 0xff) <= 24)
}

/// What a program inside prints, without stopping what this runtime copies.
async fn ask(server: &Server, desktop: u32, script: &str) -> String {
    let mut command = Command::from(server.setup().command());
    command.args(["desktop", "exec", "-T", &desktop.to_string(), "--", "sh", "-c", script]);
    let output = timeout(SOON, command.kill_on_drop(true).output()).await.unwrap().unwrap();
    expect_ok(&output);
    String::from_utf8(output.stdout).unwrap()
}

/// Asks inside until there is an answer, and returns it.
async fn answer(server: &Server, desktop: u32, script: &str) -> String {
    let end = Instant::now() + SOON;
    loop {
        let said = ask(server, desktop, &format!("{script} 2>/dev/null; true")).await;
        if !said.trim().is_empty() {
            return said.trim().to_owned();
        }
        assert!(Instant::now() < end, "`{script}` said nothing");
        sleep(LOOK_AGAIN).await;
    }
}

/// Where a window is on the session's screen: name and class are in `name`.
async fn window(server: &Server, desktop: u32, name: &str) -> Area {
    // 0x40000a "xterm": ("xterm" "XTerm")  584x316+1+20  +101+120
    let script = format!("xwininfo -root -tree | grep '{name}' | grep -v ' 1x1' | head -n 1");
    let line = answer(server, desktop, &script).await;
    let words: Vec<&str> = line.split_whitespace().rev().take(2).collect();
    let number = |text: &str| text.parse::<u16>().unwrap_or_else(|_| panic!("no window: {line}"));
    let (width, height) = words[1].split('+').next().unwrap().split_once('x').unwrap();
    let (x, y) = words[0].trim_start_matches('+').split_once('+').unwrap();
    Area { x: number(x), y: number(y), width: number(width), height: number(height) }
}

async fn connect(server: &Server, user: &str, desktop: u32) -> Nx {
    let certificate = server.setup().root.join("tls/cert.pem");
    let mut native = Native::connect(server.url(), &certificate, user, PASSWORD).await.unwrap();
    native.ping().await.unwrap();
    let listed = native.list_of_vm().await.unwrap();
    assert_eq!(listed.iter().map(|row| row.id).collect::<Vec<_>>(), [desktop]);
    let geometry = format!("{WIDTH}x{HEIGHT}");
    let parameters =
        [("geometry", &*geometry), ("link", "lan"), ("os", "linux"), ("keyboard", "pc105/us"), ("fullscreen", "0")];
    timeout(SOON, native.connect_to_vm(desktop, &parameters)).await.expect("no display in time").unwrap()
}

/// Looks at the client's screen until it satisfies.
async fn until(
    screen: &Screen,
    client: &Client,
    what: &str,
    satisfied: impl Fn(&dyn Fn(u16, u16) -> Option<u32>) -> bool,
) {
    let end = Instant::now() + SOON;
    loop {
        let picture = screen.picture();
        if satisfied(&|x, y| picture.pixel(x, y)) {
            return;
        }
        assert!(Instant::now() < end, "{what} was not seen in time; the proxy said: {}", client.said());
        sleep(LOOK_AGAIN).await;
    }
}

/// Waits until the session is as large as was asked.
async fn fits(server: &Server, desktop: u32) {
    let end = Instant::now() + SOON;
    let size = format!("current {WIDTH} x {HEIGHT},");
    loop {
        let said = answer(server, desktop, "xrandr --current").await;
        if said.contains(&size) {
            return;
        }
        assert!(Instant::now() < end, "the session is not {size}, but {said}");
        sleep(LOOK_AGAIN).await;
    }
}

/// A client whose screen shows a whole desktop, and where its terminal is.
async fn shown(nx: Nx, screen: &Screen, server: &Server, desktop: u32) -> (Client, Area) {
    let client = Client::start(nx, screen).await;
    fits(server, desktop).await;
    let bar = window(server, desktop, "TaskBar\")").await;
    assert!(
        bar.width.abs_diff(WIDTH) <= 2 && (bar.y + bar.height).abs_diff(HEIGHT) <= 2,
        "{bar:?} is not at the bottom"
    );
    // What is typed before a shell reads may be lost.
    answer(server, desktop, "ps -C bash,sh,dash -o tty= | grep pts").await;
    let terminal = window(server, desktop, "XTerm\")").await;
    until(screen, &client, "a desktop", |pixel| bar.colours(pixel) >= 8 && ALL.colours(pixel) >= 16).await;
    (client, terminal)
}

/// Clicks into the terminal and types.
fn type_into(screen: &Screen, terminal: Area, text: &str) {
    screen.click(terminal.middle());
    screen.type_text(text);
}

/// Has the shell in the terminal write its number, by `type_text`.
async fn shell(server: &Server, desktop: u32, mark: &str) -> String {
    answer(server, desktop, &format!("cat ~/{mark}")).await
}

fn tell(mark: &str) -> String {
    format!("echo $$ > ~/{mark}\n")
}

/// The windows that there are, by their numbers.
async fn windows(server: &Server, desktop: u32) -> String {
    answer(server, desktop, "xwininfo -root -tree | grep -oE '\\(\"(icewm|xterm)\".*' | sort").await
}

/// Lets the browser draw until it satisfies.
async fn drawn(display: &mut Display, what: &str, satisfied: impl Fn(&Display) -> bool) {
    let draw = async {
        display.rfb.update(false).await.unwrap();
        while !satisfied(display) {
            display.rfb.update(true).await.unwrap();
        }
    };
    timeout(SOON, draw).await.unwrap_or_else(|_| panic!("{what} was not drawn in time"));
}

/// Runs a test that needs what a native client brings.
fn with_a_screen(test: impl FnOnce(&Host) + Send) {
    privileged(&[Need::Program("Xvfb"), Need::Program("nxproxy")], || on_a_host(test));
}

#[test]
fn a_native_client_sees_the_desktop_and_types() {
    with_a_screen(|host| {
        let server = host.setup.start().unwrap();
        let (user, desktop) = user_with_desktop(&server);
        run(async {
            let screen = Screen::start().await;
            let asked = Instant::now();
            let nx = connect(&server, &user, desktop).await;
            let switched = asked.elapsed();
            assert!(!nx.news.is_empty(), "nothing was told while the desktop started");
            assert!(nx.slave_key.len() == 64 && nx.slave_key.bytes().all(|b| b.is_ascii_alphanumeric()));
            let (client, terminal) = shown(nx, &screen, &server, desktop).await;
            eprintln!("native: switched after {switched:?}, picture after {:?}", asked.elapsed());
            type_into(&screen, terminal, PAINT);
            until(&screen, &client, "blue", |pixel| terminal.share(BLUE, pixel) >= MOSTLY).await;
            client.leave().await;
            screen.end().await;
        });
        remove_user(&server, &user);
        server.stop().unwrap();
    });
}

/// Has a session shown by a native client, a browser and a native client again.
async fn roams(server: &Server, user: &str, desktop: u32) {
    let screen = Screen::start().await;
    let nx = connect(server, user, desktop).await;
    let (client, terminal) = shown(nx, &screen, server, desktop).await;
    type_into(&screen, terminal, &tell("first"));
    let pid = shell(server, desktop, "first").await;
    type_into(&screen, terminal, PAINT);
    until(&screen, &client, "blue", |pixel| terminal.share(BLUE, pixel) >= MOSTLY).await;
    let before = windows(server, desktop).await;

    let browser = browser(server, user).await;
    let asked = Instant::now();
    let mut display = timeout(SOON, browser.open(desktop, WIDTH, HEIGHT)).await.unwrap().unwrap();
    drawn(&mut display, "the same terminal", |display| {
        terminal.share(BLUE, |x, y| display.rfb.pixel(x, y)) >= MOSTLY && display.rfb.colours() >= 16
    })
    .await;
    eprintln!("native to browser: {:?}", asked.elapsed());
    client.ended().await;
    assert_eq!(windows(server, desktop).await, before);
    display.rfb.type_text(&tell("second")).await.unwrap();
    assert_eq!(shell(server, desktop, "second").await, pid);

    let asked = Instant::now();
    let (nx, closed) = tokio::join!(connect(server, user, desktop), timeout(SOON, display.closed()));
    let close = closed.unwrap().unwrap().expect("a close frame");
    assert_eq!(u16::from(close.code), 4001, "{close}");
    let client = Client::start(nx, &screen).await;
    until(&screen, &client, "the terminal again", |pixel| terminal.share(BLUE, pixel) >= MOSTLY).await;
    eprintln!("browser to native: {:?}", asked.elapsed());
    assert_eq!(windows(server, desktop).await, before);
    type_into(&screen, terminal, &tell("third"));
    assert_eq!(shell(server, desktop, "third").await, pid);
    client.leave().await;
    screen.end().await;
}

#[test]
fn a_session_moves_to_a_browser_and_back_with_all_its_windows() {
    with_a_screen(|host| {
        let server = host.setup.start().unwrap();
        let (user, desktop) = user_with_desktop(&server);
        run(roams(&server, &user, desktop));
        remove_user(&server, &user);
        server.stop().unwrap();
    });
}

#[test]
fn a_session_in_a_machine_moves_too() {
    let kernel = || bed_directory().unwrap().display().to_string();
    privileged(&[Need::Bed], || {
        with_a_screen(|host| {
            let arguments = ["--vm-kernel", &kernel(), "--accel", "tcg", "--vm-disk", "2G"].map(str::to_owned).to_vec();
            let server = Setup { arguments, ..host.setup.clone() }.start().unwrap();
            let user = format!("nx-machine-{}", std::process::id());
            server.add_user(&user, PASSWORD).unwrap();
            let desktop = create_desktop(&server, &user, &["--virtualizer", "qemu"]);
            run(roams(&server, &user, desktop));
            remove_user(&server, &user);
            server.stop().unwrap();
        });
    });
}
