//! How many desktops a machine holds: starts them, each with its session up,
//! and says what they take, running and at rest.
//!
//! Options: `--store DIR` with an image of the flavour `icewm`, `--init FILE`,
//! `--count N`, `--idle` (let them rest, with swap in compressed memory),
//! `--minute SECONDS` that idle processor time is measured for, `--picture FILE`.
//! It works in a network namespace of its own and prints one JSON object.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "../shared/desktop.rs"]
mod desktop;
mod measure;
mod picture;
#[allow(dead_code, reason = "nobody types here")]
#[path = "../shared/screen.rs"]
mod screen;

use std::{
    collections::BTreeMap,
    error::Error,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use qvd_core::{DesktopId, DesktopSpec, DesktopState, Digest, DisplayKind, Geometry, Instance, NetPolicy};
use qvd_node::{DesktopStatus, Host as _, Node, NodeConfig};
use qvd_sys::zram::ZramSwap;
use serde_json::{Value, json};

use crate::{
    measure::{Host, Processes, median},
    picture::Point,
    screen::Screen,
};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// After it, nothing that a session does at its start is going on.
const SETTLES_WITHIN: Duration = Duration::from_secs(5);

/// As many as the bridges of a network take; those beyond have no port.
const PORTS_MAX: u32 = 4096;

/// More than a desktop has, so that the device is never what is full.
const SWAP_EACH_BYTES: u64 = 28 << 20;

const MIB: f64 = 1_048_576.0;

/// What a start takes: for its root, for its port, until its init runs, and until
/// its session is up.
const STEPS: [&str; 4] = ["root", "port", "init", "session"];

struct Options {
    store: PathBuf,
    init: PathBuf,
    count: u32,
    idle: bool,
    /// How long idle desktops are watched.
    minute: Duration,
    picture: Option<PathBuf>,
}

impl Options {
    fn parse() -> Outcome<Self> {
        let mut args = std::env::args().skip(1);
        let (mut store, mut init, mut picture) = (None, None, None);
        let (mut count, mut idle, mut minute) = (40, false, Duration::from_secs(60));
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{arg} takes a value"));
            match arg.as_str() {
                "--store" => store = Some(PathBuf::from(value()?).canonicalize()?),
                "--init" => init = Some(PathBuf::from(value()?).canonicalize()?),
                "--picture" => picture = Some(PathBuf::from(value()?)),
                "--count" => count = value()?.parse()?,
                "--minute" => minute = Duration::from_secs(value()?.parse()?),
                "--idle" => idle = true,
                // From cargo.
                "--bench" => {}
                _ => return Err(format!("unknown argument `{arg}`").into()),
            }
        }
        let (Some(store), Some(init)) = (store, init) else { return Err("name --store and --init".into()) };
        Ok(Self { store, init, count: count.max(1), idle, minute, picture })
    }
}

fn main() -> Outcome<()> {
    let options = Options::parse()?;
    raise_descriptor_limit();
    qvd_node::raise_limits();
    // Rules, links and addresses are not those of the host.
    let netns = qvd_sys::netns::create()?;
    let told = qvd_sys::netns::in_netns(netns.as_fd(), || run(&options).map_err(|error| error.to_string()))??;
    println!("{told:#}");
    Ok(())
}

fn run(options: &Options) -> Outcome<Value> {
    let run = tempfile::tempdir()?;
    let instance = Instance::of_root(run.path().as_os_str().as_encoded_bytes());
    let mut swap = if options.idle { Some(ZramSwap::open(u64::from(options.count) * SWAP_EACH_BYTES)?) } else { None };
    let result = measure(options, run.path(), instance, swap.as_ref());
    if let Some(swap) = &mut swap {
        swap.close()?;
    }
    result
}

fn measure(options: &Options, run: &Path, instance: Instance, swap: Option<&ZramSwap>) -> Outcome<Value> {
    let mut config = NodeConfig::new(&options.store, run, options.init.clone(), instance);
    config.rest_after = if options.idle { Duration::from_secs(2) } else { Duration::from_secs(1 << 20) };
    let node = Node::open(config)?;
    let images = node.images()?;
    let image =
        images.iter().find(|image| image.flavour.as_str() == "icewm").ok_or("the store has no image `icewm`")?;
    // What every desktop needs once: the image in the page cache, the X server's
    // and the window manager's files mapped.
    let first = spec(image.digest, 1)?;
    node.ensure_running(&first, &mut drop).map_err(|error| with_causes(&error))?;
    node.remove(first.id)?;

    let measured = fill(options, &node, image.digest, instance, swap);
    let began = Instant::now();
    let stopped = node.shut_down(Duration::ZERO);
    let stop_ms = began.elapsed().as_secs_f64() * 1000.0;
    // What failed first explains the rest.
    let mut told = measured?;
    stopped.map_err(|error| with_causes(&error))?;
    for number in 1..=options.count {
        node.remove(DesktopId::new(number)?)?;
    }
    told["stop_all_ms"] = json!(round(stop_ms));
    Ok(told)
}

/// Starts all of them and measures.
fn fill(
    options: &Options,
    node: &Arc<Node>,
    image: Digest,
    instance: Instance,
    swap: Option<&ZramSwap>,
) -> Outcome<Value> {
    let before = Host::now()?;
    let (mut starts, mut points) = (Vec::new(), Vec::new());
    for number in 1..=options.count {
        let spec = spec(image, number)?;
        let began = Instant::now();
        let timings = node.ensure_running(&spec, &mut drop).map_err(|error| with_causes(&error))?;
        let session_ms = began.elapsed().as_secs_f64() * 1000.0;
        let [root, port, init] = [timings.root_us, timings.port_us, timings.start_us].map(|us| us as f64 / 1000.0);
        starts.push([root, port, init, session_ms]);
        if number == 1 || number % (options.count / 40).max(1) == 0 {
            let used_mib = Host::now()?.used_since(&before) / MIB;
            points.push(Point { alive: number, used_mib, session_ms });
            eprintln!("{number} alive, {used_mib:.0} MiB, session after {session_ms:.0} ms");
        }
    }
    let all = |of: fn(&DesktopStatus) -> bool| {
        (1..=options.count).filter(|&number| DesktopId::new(number).is_ok_and(|id| of(&node.status(id)))).count()
    };
    let mut told = json!({
        "desktops": options.count,
        "ports": options.count.min(PORTS_MAX),
        "running": all(|status| status.state == DesktopState::Running),
        "start": starts_told(&starts),
    });
    if options.idle {
        wait_for_rest(|| all(|status| status.resting) == options.count as usize)?;
        told["resting"] = json!(all(|status| status.resting));
    }
    let each = f64::from(options.count);
    let processes = Processes::of(instance)?;
    // The last ones have just been started.
    thread::sleep(SETTLES_WITHIN);
    let cpu_before = processes.cpu_time()?;
    let watched = Instant::now();
    thread::sleep(options.minute);
    let idle_percent =
        processes.cpu_time()?.saturating_sub(cpu_before).as_secs_f64() / watched.elapsed().as_secs_f64() * 100.0;
    let (host, memory) = (Host::now()?, processes.memory()?);
    told["idle_cpu_percent_of_a_core"] = json!(round(idle_percent));
    told["processes_each"] = json!(round(memory.processes as f64 / each));
    told["pss_mib_each"] = json!(round(memory.pss_bytes as f64 / MIB / each));
    let programs = memory.programs.iter().map(|(name, bytes)| (name, round(*bytes as f64 / MIB / each)));
    told["pss_mib_by_program"] = programs.collect::<BTreeMap<_, _>>().into_iter().collect();
    told["swapped_mib_each"] = json!(round(memory.swap_bytes as f64 / MIB / each));
    told["cgroup_mib_each"] = json!(round(memory.charged_bytes as f64 / MIB / each));
    told["cgroup_kernel_mib_each"] = json!(round(memory.kernel_bytes as f64 / MIB / each));
    told["host_kernel_mib_each"] = json!(round((host.kernel_bytes as f64 - before.kernel_bytes as f64) / MIB / each));
    told["host_mib"] = json!(round(host.used_since(&before) / MIB));
    told["host_mib_each"] = json!(round(host.used_since(&before) / MIB / each));
    if let Some(swap) = swap {
        let usage = swap.usage()?;
        told["zram"] = json!({
            "stored_mib": round(usage.stored_bytes as f64 / MIB),
            "used_mib": round(usage.used_bytes as f64 / MIB),
        });
    }
    told["to_full_frame_ms"] = frames(options, node)?;
    if let Some(path) = &options.picture {
        std::fs::write(path, picture::draw(&points))?;
    }
    Ok(told)
}

/// From a connection to a full frame: the first time, and again while awake.
fn frames(options: &Options, node: &Node) -> Outcome<Value> {
    const ASKED: u32 = 10;
    let (mut first, mut warm) = (Vec::new(), Vec::new());
    let kind = DisplayKind::Rfb { geometry: Geometry::default() };
    let stride = (options.count / ASKED).max(1);
    for number in (1..=options.count).step_by(stride as usize).take(ASKED as usize) {
        let id = DesktopId::new(number)?;
        for times in [&mut first, &mut warm] {
            let began = Instant::now();
            let display = node.attach(id, kind, &mut drop).map_err(|error| with_causes(&error))?;
            Screen::open(display.stream())?.read_whole()?;
            times.push(began.elapsed().as_secs_f64() * 1000.0);
        }
    }
    let name = if options.idle { "from_rest" } else { "first" };
    Ok(json!({ name: round(median(&mut first)), "again": round(median(&mut warm)) }))
}

/// Steps of a start: of the first, and the medians of the first ten and the last ten.
fn starts_told(starts: &[[f64; STEPS.len()]]) -> Value {
    let parts = [
        ("first", &starts[..1]),
        ("first_ten", &starts[..starts.len().min(10)]),
        ("last_ten", &starts[starts.len().saturating_sub(10)..]),
    ];
    let told = parts.iter().flat_map(|(part, starts)| {
        let steps = STEPS.iter().enumerate();
        steps.map(move |(at, step)| {
            let mut times: Vec<_> = starts.iter().map(|start| start[at]).collect();
            (format!("{part}_{step}_ms"), json!(round(median(&mut times))))
        })
    });
    Value::Object(told.collect())
}

fn wait_for_rest(rests: impl Fn() -> bool) -> Outcome<()> {
    const LIMIT: Duration = Duration::from_secs(600);
    let began = Instant::now();
    while !rests() {
        if began.elapsed() > LIMIT {
            return Err(format!("not all of them rest after {LIMIT:?}").into());
        }
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

fn spec(image: Digest, number: u32) -> Outcome<DesktopSpec> {
    desktop::spec(image, number, NetPolicy { port: number <= PORTS_MAX, ..NetPolicy::default() })
}

fn with_causes(error: &(dyn Error + 'static)) -> String {
    qvd_core::causes(error).join(": ")
}

fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
    if let Err(error) = rustix::process::setrlimit(rustix::process::Resource::Nofile, raised) {
        eprintln!("descriptors stay limited: {error}");
    }
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
