//! What one desktop's attacks cost its neighbours: the latency of a start, and of
//! a key until the display shows it, beside the same while nobody attacks.
//!
//! Attacks take turns with calm, each from a desktop made for it, so that
//! whatever else the machine does falls on all of them: the ratios count.
//! Which attacks there are, and what was seen, is in `docs/benchmarks.md`.
//!
//! Options: `--store DIR` with an image of the flavour `icewm`, `--init FILE`,
//! `--rounds N`. It works in a network namespace of its own and prints one JSON
//! object.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod attack;
#[path = "../shared/desktop.rs"]
mod desktop;
mod load;
#[path = "../shared/screen.rs"]
mod screen;

use std::{
    collections::BTreeMap,
    error::Error,
    os::fd::AsFd as _,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use qvd_core::{DesktopId, DesktopSpec, DesktopState, Digest, DisplayKind, Geometry, Instance, NetPolicy};
use qvd_node::{Attachment, Host as _, Node, NodeConfig};
use serde_json::{Value, json};

use crate::{attack::Attack, load::Load, screen::Screen};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Who types.
const NEIGHBOUR: u32 = 1;
/// Who attacks.
const ATTACKER: u32 = 2;
/// Who is started meanwhile.
const NEWCOMER: u32 = 3;

const STARTS_A_ROUND: usize = 3;
const KEYS_A_ROUND: usize = 20;

/// An attack that has gone on for so long has reached its limits.
const RAGES_AFTER: Duration = Duration::from_secs(2);

/// How long an attacker may take to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(60);

/// What nothing has changed for, nothing is about to.
const QUIET: Duration = Duration::from_millis(60);
/// How long a key may take at most.
const SHOWN_WITHIN: Duration = Duration::from_secs(20);

// Source: X11 `keysymdef.h`.
const LETTER: u32 = 0x61;
const BACKSPACE: u32 = 0xff08;

struct Options {
    store: PathBuf,
    init: PathBuf,
    rounds: usize,
}

impl Options {
    fn parse() -> Outcome<Self> {
        let mut args = std::env::args().skip(1);
        let (mut store, mut init, mut rounds) = (None, None, 5);
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{arg} takes a value"));
            match arg.as_str() {
                "--store" => store = Some(PathBuf::from(value()?).canonicalize()?),
                "--init" => init = Some(PathBuf::from(value()?).canonicalize()?),
                "--rounds" => rounds = value()?.parse()?,
                // From cargo.
                "--bench" => {}
                _ => return Err(format!("unknown argument `{arg}`").into()),
            }
        }
        let (Some(store), Some(init)) = (store, init) else { return Err("name --store and --init".into()) };
        Ok(Self { store, init, rounds: rounds.max(1) })
    }
}

fn main() -> Outcome<()> {
    let options = Options::parse()?;
    qvd_node::raise_limits();
    // Rules, links and addresses are not those of the host.
    let netns = qvd_sys::netns::create()?;
    let told = qvd_sys::netns::in_netns(netns.as_fd(), || run(&options).map_err(|error| with_causes(&*error)))??;
    println!("{told:#}");
    Ok(())
}

fn run(options: &Options) -> Outcome<Value> {
    // In memory, as `/run` of a host is.
    let run = tempfile::tempdir_in("/dev/shm")?;
    let instance = Instance::of_root(run.path().as_os_str().as_encoded_bytes());
    let node = Node::open(NodeConfig::new(&options.store, run.path(), options.init.clone(), instance))?;
    let measured = measure(options, &node);
    // What failed first explains the rest.
    let stopped = node.shut_down(Duration::ZERO);
    let told = measured?;
    stopped?;
    for number in [NEIGHBOUR, ATTACKER, NEWCOMER] {
        node.remove(DesktopId::new(number)?)?;
    }
    Ok(told)
}

/// What was seen under one attack, or under none.
#[derive(Debug, Default)]
struct Seen {
    start_ms: Vec<f64>,
    key_ms: Vec<f64>,
    busy_cores: Vec<f64>,
    /// How often the attacker was ended.
    ended: Vec<f64>,
}

fn measure(options: &Options, node: &Arc<Node>) -> Outcome<Value> {
    let images = node.images()?;
    let image =
        images.iter().find(|image| image.flavour.as_str() == "icewm").ok_or("the store has no image `icewm`")?.digest;
    node.ensure_running(&spec(image, NEIGHBOUR)?, &mut drop)?;
    let kind = DisplayKind::Rfb { geometry: Geometry::default() };
    let display = node.attach(DesktopId::new(NEIGHBOUR)?, kind, &mut drop)?;
    let mut terminal = Terminal::open(&display)?;

    let mut seen: BTreeMap<&str, Seen> = BTreeMap::new();
    for round in 0..=options.rounds {
        for attack in [None].into_iter().chain(Attack::ALL.into_iter().map(Some)) {
            let name = attack.map_or("calm", Attack::name);
            let now = under(attack, node, image, &mut terminal)?;
            eprintln!(
                "{name}: start {:.0} ms, key {:.1} ms, {:.1} cores busy",
                median(&now.start_ms),
                median(&now.key_ms),
                median(&now.busy_cores)
            );
            // The first round warms caches.
            if round > 0 {
                let all = seen.entry(name).or_default();
                all.start_ms.extend(now.start_ms);
                all.key_ms.extend(now.key_ms);
                all.busy_cores.extend(now.busy_cores);
                all.ended.extend(now.ended);
            }
        }
    }
    let calm = seen.get("calm").map_or((f64::NAN, f64::NAN), |calm| (median(&calm.start_ms), median(&calm.key_ms)));
    let rows = seen.iter().map(|(&name, seen)| {
        let (start, key) = (median(&seen.start_ms), median(&seen.key_ms));
        let row = json!({
            "start_ms": round(start),
            "key_ms": round(key),
            "start_times_calm": round(start / calm.0),
            "key_times_calm": round(key / calm.1),
            "busy_cores": round(median(&seen.busy_cores)),
            "attacker_ended": seen.ended.iter().sum::<f64>(),
        });
        (name.to_owned(), row)
    });
    Ok(json!({ "rounds": options.rounds, "under": rows.collect::<serde_json::Map<_, _>>() }))
}

/// Measures while a desktop made for it attacks, or only exists. Whenever it has
/// been ended, it is started and attacks again: its user may do so, too.
fn under(attack: Option<Attack>, node: &Arc<Node>, image: Digest, terminal: &mut Terminal<'_>) -> Outcome<Seen> {
    let attacker = spec(image, ATTACKER)?;
    node.ensure_running(&attacker, &mut drop)?;
    let over = AtomicBool::new(false);
    let seen = thread::scope(|scope| {
        let attacks = scope.spawn(|| attack.map_or(0, |attack| go_on(attack, node, &attacker, &over)));
        thread::sleep(RAGES_AFTER);
        let seen = look(node, image, terminal).map_err(|error| with_causes(&*error));
        over.store(true, Ordering::Release);
        let ended = attacks.join().map_err(|_| "the attack panicked".to_owned())?;
        seen.map(|mut seen| {
            seen.ended.push(f64::from(ended));
            seen
        })
    })?;
    // What goes down under an attack does so slowly.
    let began = Instant::now();
    while let Err(error) = node.remove(attacker.id) {
        if began.elapsed() > GONE_WITHIN {
            return Err(error.into());
        }
    }
    Ok(seen)
}

/// Attacks until it is over; how often the desktop was ended meanwhile.
fn go_on(attack: Attack, node: &Arc<Node>, attacker: &DesktopSpec, over: &AtomicBool) -> u32 {
    let mut ended = 0;
    while !over.load(Ordering::Acquire) {
        let running = node.ensure_running(attacker, &mut drop).and_then(|_| node.exec(attacker.id, attack.request()));
        match running {
            Ok(running) => {
                while !over.load(Ordering::Acquire) && node.status(attacker.id).state == DesktopState::Running {
                    thread::sleep(QUIET);
                }
                drop(running);
                ended += u32::from(!over.load(Ordering::Acquire));
            }
            // It goes down just now.
            Err(_) => thread::sleep(QUIET),
        }
    }
    ended
}

fn look(node: &Arc<Node>, image: Digest, terminal: &mut Terminal<'_>) -> Outcome<Seen> {
    let load = Load::begin()?;
    let mut seen = Seen::default();
    terminal.settle()?;
    for _ in 0..KEYS_A_ROUND {
        seen.key_ms.push(millis(terminal.key()?));
    }
    for _ in 0..STARTS_A_ROUND {
        let newcomer = spec(image, NEWCOMER)?;
        let began = Instant::now();
        node.ensure_running(&newcomer, &mut drop)?;
        seen.start_ms.push(millis(began.elapsed()));
        node.remove(newcomer.id)?;
    }
    seen.busy_cores.push(load.busy_cores()?);
    Ok(seen)
}

/// The terminal of a session, which has the keyboard.
struct Terminal<'a> {
    screen: Screen<'a>,
    typed: bool,
}

impl<'a> Terminal<'a> {
    fn open(display: &'a Attachment) -> Outcome<Self> {
        const TRIES: usize = 20;
        let mut screen = Screen::open(display.stream())?;
        screen.read_whole()?;
        screen.ask_for_changes()?;
        let mut terminal = Self { screen, typed: false };
        // Its window comes after the window manager, and then its prompt.
        for _ in 0..TRIES {
            terminal.settle()?;
            terminal.strike()?;
            if terminal.changes_within(Duration::from_millis(500))? {
                terminal.settle()?;
                return Ok(terminal);
            }
        }
        Err("the session shows nothing of what is typed".into())
    }

    fn changes_within(&mut self, limit: Duration) -> Outcome<bool> {
        let changed = self.screen.changes_within(limit)?;
        if changed {
            self.screen.ask_for_changes()?;
        }
        Ok(changed)
    }

    /// Waits until nothing changes any more.
    fn settle(&mut self) -> Outcome<()> {
        while self.changes_within(QUIET)? {}
        Ok(())
    }

    /// A letter, and next time takes it away again.
    fn strike(&mut self) -> Outcome<()> {
        self.screen.press(if self.typed { BACKSPACE } else { LETTER })?;
        self.typed = !self.typed;
        Ok(())
    }

    /// From a key to a picture that differs.
    fn key(&mut self) -> Outcome<Duration> {
        let began = Instant::now();
        self.strike()?;
        if !self.changes_within(SHOWN_WITHIN)? {
            return Err(format!("a key was not shown within {SHOWN_WITHIN:?}").into());
        }
        let shown = began.elapsed();
        self.settle()?;
        Ok(shown)
    }
}

fn spec(image: Digest, number: u32) -> Outcome<DesktopSpec> {
    desktop::spec(image, number, NetPolicy::default())
}

fn with_causes(error: &(dyn Error + 'static)) -> String {
    qvd_core::causes(error).join(": ")
}

/// The middle one; of none, none.
fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
