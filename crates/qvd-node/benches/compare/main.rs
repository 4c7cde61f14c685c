//! How long a confined container on the network takes to start, beside the
//! least that the kernel asks for the same (`floor.c`), `runc` and `lxc-start`.
//!
//! Configurations take turns in a new order each round, so that whatever else
//! the machine does falls on all of them: the ratios mean more than the times.
//! What is compared, and why that is fair, is in `docs/benchmarks.md`.
//!
//! Options: `--floor PATH` of `floor.c`, `--rounds N`, `--json`.
//!
//! It is in this crate because this is the least that has storage, runtime and
//! network: the package at the root would build the gateway too.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod bed;
mod peer;

use std::{
    env,
    error::Error,
    fs,
    hash::{BuildHasher as _, RandomState},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::json;

use crate::{
    bed::{Bed, Qvd},
    peer::{Floor, Fork, Host, Lxc, Runc},
};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Process 1 of all of them, in whatever root.
const INIT: &str = "bench-init";

/// How long anything may take before the benchmark gives up.
const LIMIT: Duration = Duration::from_secs(20);

/// What one run took.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// From the request until the program runs.
    start_us: f64,
    /// Until nothing of it is left that anybody waits for.
    cycle_us: f64,
}

/// What is compared.
trait Contestant {
    fn name(&self) -> &'static str;

    /// Starts a container, lets it end and removes it.
    fn run(&self) -> Outcome<Sample>;

    /// A command that does so once, to count the system calls of.
    fn command(&self) -> Option<Command> {
        None
    }
}

struct Row<'a> {
    contestant: &'a dyn Contestant,
    samples: Vec<Sample>,
    /// System calls of the child until it is process 1's program.
    calls: Option<usize>,
}

impl Row<'_> {
    /// Median and least of what `part` takes of the samples.
    fn figures(&self, part: fn(&Sample) -> f64) -> (f64, f64) {
        let values: Vec<_> = self.samples.iter().map(part).collect();
        (median(&values), values.iter().copied().fold(f64::INFINITY, f64::min))
    }
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

struct Options {
    floor: PathBuf,
    rounds: usize,
    json: bool,
    /// In namespaces of its own already.
    inside: bool,
    /// One container and nothing else, to be traced.
    once: bool,
}

impl Options {
    fn parse() -> Outcome<Self> {
        let floor = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/bench/floor.c");
        let mut options = Self { floor, rounds: 40, json: false, inside: false, once: false };
        let mut args = env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--floor" => options.floor = args.next().ok_or("--floor needs a path")?.into(),
                "--rounds" => options.rounds = args.next().ok_or("--rounds needs a number")?.parse()?,
                "--json" => options.json = true,
                "--inside" => options.inside = true,
                "--once" => options.once = true,
                // What `cargo bench` itself passes.
                "--bench" => {}
                other => return Err(format!("unknown option `{other}`").into()),
            }
        }
        Ok(options)
    }
}

fn main() -> Outcome<()> {
    let options = Options::parse()?;
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: starting containers needs root");
        return Ok(());
    }
    match (options.once, options.inside) {
        (true, _) => Bed::new()?.cycle(true).map(drop),
        (false, true) => compare(&options),
        (false, false) => {
            let mut again = Command::new("nice");
            again.args(["-n", "-10", "unshare", "--net", "--mount"]).arg(env::current_exe()?);
            let status = again.args(env::args_os().skip(1)).arg("--inside").status()?;
            if status.success() { Ok(()) } else { Err(format!("the benchmark ended with {status}").into()) }
        }
    }
}

fn compare(options: &Options) -> Outcome<()> {
    let bed = Bed::new()?;
    let host = Host::new()?;
    let mut contestants: Vec<Box<dyn Contestant + '_>> =
        vec![Box::new(Qvd::new(&bed, true)), Box::new(Qvd::new(&bed, false)), Box::new(Fork)];
    let peers: [(&str, Outcome<Box<dyn Contestant>>); 4] = [
        (Floor::NAME, Floor::build(&options.floor, bed.dir(), &bed.tree(), true)),
        ("floor, no cgroups", Floor::build(&options.floor, bed.dir(), &bed.tree(), false)),
        ("runc", Runc::build(bed.dir(), &bed.program())),
        ("lxc", Lxc::build(bed.dir(), &bed.program())),
    ];
    for (name, made) in peers {
        match made {
            // What does not work here is found now and not in some round.
            Ok(peer) => match peer.run() {
                Ok(_) => contestants.push(peer),
                Err(error) => eprintln!("LEFT OUT: {name}: {error}"),
            },
            Err(error) => eprintln!("LEFT OUT: {name}: {error}"),
        }
    }
    let mut rows: Vec<_> =
        contestants.iter().map(|c| Row { contestant: c.as_ref(), samples: Vec::new(), calls: None }).collect();
    let load = load()?;
    for _ in 0..options.rounds {
        // Each hasher has keys of its own: a new order.
        rows.sort_by_cached_key(|row| RandomState::new().hash_one(row.contestant.name()));
        for row in &mut rows {
            host.settle()?;
            let sample = row.contestant.run().map_err(|error| format!("{}: {error}", row.contestant.name()))?;
            row.samples.push(sample);
        }
    }
    let load = [load, self::load()?];
    for row in &mut rows {
        row.calls = row.contestant.command().and_then(|command| peer::calls_before_exec(&command, bed.dir()).ok());
    }
    rows.sort_by(|a, b| a.figures(|s| s.start_us).0.total_cmp(&b.figures(|s| s.start_us).0));
    if options.json {
        println!("{}", as_json(&rows, &bed, options.rounds, &load));
    } else {
        print(&rows, &bed, options.rounds, &load);
    }
    drop(rows);
    drop(contestants);
    host.close()?;
    bed.close()
}

/// Processes that ran or wanted to, the mean of a minute.
fn load() -> Outcome<String> {
    Ok(fs::read_to_string("/proc/loadavg")?.split(' ').next().unwrap_or_default().to_owned())
}

fn floor_start(rows: &[Row<'_>]) -> Option<f64> {
    rows.iter().find(|row| row.contestant.name() == Floor::NAME).map(|row| row.figures(|s| s.start_us).0)
}

fn print(rows: &[Row<'_>], bed: &Bed, rounds: usize, load: &[String; 2]) {
    println!("{rounds} rounds, load {} before and {} after; microseconds", load[0], load[1]);
    println!("{:18} {:>8} {:>8} {:>8} {:>8} {:>8} {:>7}", "", "start", "least", "cycle", "least", "x floor", "calls");
    let floor = floor_start(rows);
    for row in rows {
        let (start, cycle) = (row.figures(|s| s.start_us), row.figures(|s| s.cycle_us));
        let ratio = floor.map_or_else(|| "-".to_owned(), |floor| format!("{:.2}", start.0 / floor));
        let calls = row.calls.map_or_else(|| "-".to_owned(), |calls| calls.to_string());
        println!(
            "{:18} {:8.0} {:8.0} {:8.0} {:8.0} {ratio:>8} {calls:>7}",
            row.contestant.name(),
            start.0,
            start.1,
            cycle.0,
            cycle.1
        );
    }
    println!("qvd, median of each step: {}", bed.steps().map(|(name, us)| format!("{name} {us:.0}")).join(", "));
    println!("qvd, netlink requests of a port: {}", bed.port_requests());
}

fn as_json(rows: &[Row<'_>], bed: &Bed, rounds: usize, load: &[String; 2]) -> serde_json::Value {
    let floor = floor_start(rows);
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            let (start, cycle) = (row.figures(|s| s.start_us), row.figures(|s| s.cycle_us));
            json!({
                "name": row.contestant.name(),
                "start_us": start.0.round(), "start_min_us": start.1.round(),
                "cycle_us": cycle.0.round(), "cycle_min_us": cycle.1.round(),
                "start_to_floor": floor.map(|floor| start.0 / floor),
                "calls_before_exec": row.calls,
            })
        })
        .collect();
    let steps: serde_json::Map<_, _> =
        bed.steps().into_iter().map(|(name, us)| (name.to_owned(), us.round().into())).collect();
    json!({ "rounds": rounds, "load": load, "rows": rows, "qvd_steps_us": steps, "port_requests": bed.port_requests() })
}
