//! The demonstration: from nothing to a desktop on the screen.
//!
//! Starts a server of its own, builds the image, makes a user and a desktop,
//! and prints where to sign in. With `--once` it signs in by itself, looks at
//! the desktop as a browser would, prints figures and leaves nothing.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is a program that talks to a person")]

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use clap::Parser;
use qvd_core::Instance;
use qvd_demo::{Browser, Server, Setup};
use qvd_testkit::{Census, Scope};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

/// For the window manager's and the terminal's first pixels after the first
/// frame: what the picture is for.
const PAINTED: Duration = Duration::from_secs(20);

/// Colours of a screen that shows more than a background.
const COLOURS: usize = 16;

/// For a desktop to rest after its client has left.
const RESTS: Duration = Duration::from_secs(60);

/// For the kernel to take down what was ended.
const SETTLED: Duration = Duration::from_secs(10);

#[derive(Debug, Parser)]
#[command(about = "From nothing to a desktop on the screen")]
struct Args {
    /// The command `qvd`.
    #[arg(long)]
    qvd: PathBuf,
    /// The static init for desktops.
    #[arg(long)]
    init: PathBuf,
    /// Directory for state.
    #[arg(long, default_value = "target/demo/state")]
    root: PathBuf,
    /// Directory for the picture.
    #[arg(long, default_value = "target/demo")]
    output: PathBuf,
    /// Recipe of the image.
    #[arg(long, default_value = "recipes/icewm.toml")]
    recipe: PathBuf,
    /// Address to listen on.
    #[arg(long, default_value = "0.0.0.0:8443")]
    listen: String,
    /// Sign in by itself, print figures, leave nothing.
    #[arg(long)]
    once: bool,
}

/// What `--once` prints, on one line.
#[derive(Debug, Default, Serialize)]
struct Figures {
    image_build_s: f64,
    root_ms: f64,
    port_ms: f64,
    start_ms: f64,
    session_ms: f64,
    first_frame_ms: f64,
    desktop_pss_mib: f64,
    desktop_processes: u32,
    screenshot: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Built {
    flavour: String,
}

#[derive(Debug, Deserialize)]
struct Created {
    id: u32,
}

#[derive(Debug, Deserialize)]
struct Shown {
    status: Status,
}

#[derive(Debug, Deserialize)]
struct Status {
    resting: bool,
    timings: Option<Timings>,
}

#[derive(Debug, Deserialize)]
#[expect(clippy::struct_field_names, reason = "the unit belongs to the name")]
struct Timings {
    root_us: u32,
    port_us: u32,
    start_us: u32,
    session_us: u32,
}

#[derive(Debug, Deserialize)]
struct Stats {
    pss_bytes: u64,
    processes: u32,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    for dir in [&args.root, &args.output] {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make `{}`", dir.display()))?;
    }
    let root = args.root.canonicalize()?;
    let before = args.once.then(|| Census::take(&scope(&root)));
    let listen = if args.once { "127.0.0.1:0".to_owned() } else { args.listen.clone() };
    let log = args.output.join("qvd.log");
    let setup = Setup {
        qvd: args.qvd.clone(),
        init: args.init.clone(),
        root: root.clone(),
        listen,
        ephemeral: true,
        arguments: Vec::new(),
        manager: None,
        log: Some(log.clone()),
    };
    let server = setup.start().with_context(|| format!("the server's log is `{}`", log.display()))?;

    let began = Instant::now();
    let recipe = args.recipe.to_str().context("the recipe's path is no text")?;
    eprintln!("building the image of {recipe} (the first time takes some minutes)");
    let image: Built = server.json(&["image", "build", recipe])?;
    let image_build_s = round(began.elapsed().as_secs_f64());

    let password = password()?;
    let user = format!("demo{}", std::process::id());
    let user = if args.once { user.as_str() } else { "demo" };
    // A user of an earlier demonstration has an unknown password.
    let _absent = server.run(["user", "rm", user, "--with-desktops"])?;
    server.add_user(user, &password)?;
    let desktop: Created = server.json(&["desktop", "create", user, &image.flavour])?;

    if let Some(before) = before {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let figures = runtime.block_on(look(&server, user, &password, desktop.id, image_build_s, &args.output))?;
        let removed = server.run(["user", "rm", user, "--with-desktops"])?;
        ensure!(removed.status.success(), "cannot remove the user: {}", String::from_utf8_lossy(&removed.stderr));
        server.stop()?;
        let left = before.settle(SETTLED);
        ensure!(left.is_empty(), "the demonstration left things behind:\n{left}");
        println!("{}", serde_json::to_string(&figures)?);
        return Ok(());
    }
    println!("\n  Open      {}\n  User      {user}\n  Password  {password}\n\nCtrl-C ends it.", server.url());
    server.stop_at_interrupt()
}

/// Everything that bears this installation's name.
fn scope(root: &Path) -> Scope {
    let instance = Instance::of_root(root.as_os_str().as_encoded_bytes());
    let marks = [instance.bridge_name(), instance.cgroup_name(), root.display().to_string()];
    Scope::marked(marks).files_under(format!("/run/qvd-{instance}"))
}

/// Does what a person at a browser would, and measures.
async fn look(
    server: &Server,
    user: &str,
    password: &str,
    desktop: u32,
    image_build_s: f64,
    output: &Path,
) -> anyhow::Result<Figures> {
    let mut browser = Browser::new(server.url(), &server.setup().root.join("tls/cert.pem"))?;
    browser.sign_in(user, password).await?;
    let (status, page) = browser.page("/desktops").await?;
    ensure!(
        status.is_success() && page.contains(&format!("data-desktop=\"{desktop}\"")),
        "the portal lacks the desktop"
    );

    let click = Instant::now();
    let mut display = browser.open(desktop, 1280, 800).await?;
    display.rfb.update(false).await?;
    let first_frame_ms = millis(click.elapsed());
    let painted = async {
        while display.rfb.colours() < COLOURS {
            display.rfb.update(true).await?;
        }
        anyhow::Ok(())
    };
    timeout(PAINTED, painted).await.context("the desktop's screen stayed empty")??;
    settle(&mut display).await?;
    let screenshot = output.join("desktop.png");
    display.rfb.save_png(&screenshot)?;
    display.leave();

    let shown: Shown = server.json(&["desktop", "show", &desktop.to_string()])?;
    let timings = shown.status.timings.context("no timings of the start")?;
    let ms = |us: u32| round(f64::from(us) / 1e3);
    let stats = at_rest(server, desktop).await?;
    Ok(Figures {
        image_build_s,
        root_ms: ms(timings.root_us),
        port_ms: ms(timings.port_us),
        start_ms: ms(timings.start_us),
        session_ms: ms(timings.session_us),
        first_frame_ms,
        #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
        desktop_pss_mib: round(stats.pss_bytes as f64 / f64::from(1 << 20)),
        desktop_processes: stats.processes,
        screenshot,
    })
}

/// Takes updates until none comes for a moment: windows have been drawn.
async fn settle(display: &mut qvd_demo::Display) -> anyhow::Result<()> {
    const QUIET: Duration = Duration::from_millis(700);
    let deadline = Instant::now() + PAINTED;
    while Instant::now() < deadline {
        match timeout(QUIET, display.rfb.update(true)).await {
            Ok(update) => update?,
            Err(_quiet) => break,
        }
    }
    Ok(())
}

/// What the desktop uses once nobody looks at it any more.
async fn at_rest(server: &Server, desktop: u32) -> anyhow::Result<Stats> {
    let (deadline, id) = (Instant::now() + RESTS, desktop.to_string());
    while !server.json::<Shown>(&["desktop", "show", &id])?.status.resting {
        ensure!(Instant::now() < deadline, "the desktop did not rest within {RESTS:?} after its client left");
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    server.json(&["desktop", "stats", &id])
}

/// Fresh, and easy to type: 20 of 32 characters are 100 bits.
fn password() -> anyhow::Result<String> {
    const LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let mut random = [0; 20];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
    Ok(random.iter().map(|byte| char::from(LETTERS[usize::from(byte % 32)])).collect())
}

fn millis(duration: Duration) -> f64 {
    round(duration.as_secs_f64() * 1e3)
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
