//! What the history of images costs on a tree of 500 MB: import, commit of a
//! small change, mount, diff, a pull of one package's update, garbage
//! collection; at 1, 10 and 100 commits, because none of it may grow with them.
//!
//! Beside the bytes that a pull takes stand those of the changed files,
//! compressed, of a whole layer as registries keep it, and of `rsync` where it
//! is installed. What is measured is said in `docs/benchmarks.md`.
//!
//! Options: `--json`, `--dir DIR` for where 3 GB are written.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod plant;
mod rivals;

use std::{
    collections::BTreeMap,
    error::Error,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use qvd_core::FlavourName;
use qvd_storage::{
    Repository,
    repository::{CommitId, Directory, Keep, NewCommit, Wanted, archive::IMPORT_MAX_BYTES},
};
use serde_json::{Value, json};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Commits at which everything is measured.
const MARKS: [usize; 3] = [1, 10, 100];
/// Times each thing is done at a mark; what is shown is the median.
const TIMES: usize = 5;

/// Goals that were set before anything was measured.
const GOALS: [(&str, f64); 3] = [("mount_ms", 5.0), ("commit_small_ms", 1000.0), ("pull_to_changed", 1.2)];

struct Options {
    json: bool,
    dir: Option<PathBuf>,
}

/// Figures by name, with their units in it.
type Figures = BTreeMap<&'static str, f64>;

struct Bench {
    tree: PathBuf,
    here: Repository,
    there: Repository,
    flavour: FlavourName,
}

fn main() -> Outcome<()> {
    let options = Options::parse()?;
    let dir = match &options.dir {
        Some(dir) => tempfile::tempdir_in(dir)?,
        None => tempfile::tempdir()?,
    };
    let tree = dir.path().join("tree");
    plant::plant(&tree)?;
    let bench = Bench {
        tree,
        here: Repository::open(&dir.path().join("here"))?,
        there: Repository::open(&dir.path().join("there"))?,
        flavour: "bench".parse()?,
    };
    let mut once = Figures::new();
    let (first, import) = timed(|| bench.commit("first"))?;
    once.insert("import_ms", import);
    let (_, clone) = timed(|| bench.pull())?;
    once.insert("clone_ms", clone);
    let before = dir.path().join("before");
    rivals::copy(&bench.tree, &before)?;
    let mut marks = BTreeMap::new();
    for number in 1..=MARKS[MARKS.len() - 1] {
        let changed = plant::update(&bench.tree, number)?;
        let id = bench.commit(&format!("update of package {number}"))?;
        if MARKS.contains(&number) {
            marks.insert(number, bench.mark(id, &changed)?);
        } else {
            bench.pull()?;
        }
        if number == 1 {
            once.insert("rsync_bytes", rivals::rsync(&bench.tree, &before)?.unwrap_or(f64::NAN));
        }
    }
    let layer = dir.path().join("layer.tar.gz");
    bench.here.export(first, &layer, qvd_storage::repository::archive::Format::TarGz)?;
    once.insert("whole_layer_bytes", fs::metadata(&layer)?.len() as f64);
    once.retain(|_, value| value.is_finite());
    if options.json {
        print_json(&once, &marks);
    } else {
        print_table(&once, &marks);
    }
    Ok(())
}

impl Bench {
    fn commit(&self, message: &str) -> Outcome<CommitId> {
        let staging = self.here.stage()?;
        let tree = staging.import(&self.tree, IMPORT_MAX_BYTES)?;
        staging.settle()?;
        let new = NewCommit {
            config: self.here.config_for(&self.flavour, &tree)?,
            author: "bench".to_owned(),
            message: message.to_owned(),
            time: SystemTime::now(),
            recipe: None,
            publish: true,
        };
        Ok(self.here.commit_tree(&staging, &tree, new)?)
    }

    /// Brings what is new to the other repository; returns the bytes that it took.
    fn pull(&self) -> Outcome<u64> {
        let source = Directory::new(Repository::open(self.here.dir())?);
        let wanted = Wanted { flavour: self.flavour.clone(), tag: None, force: false };
        Ok(self.there.pull(&source, &wanted, "bench", &mut |_| {})?.wire_bytes)
    }

    /// Measures everything once there are so many commits, the last of which
    /// the other repository does not have yet.
    fn mark(&self, id: CommitId, changed: &[PathBuf]) -> Outcome<Figures> {
        let mut figures = Figures::new();
        let (wire, pull) = timed(|| self.pull())?;
        let compressed = rivals::compressed(&self.tree, changed)?;
        figures.insert("pull_ms", pull);
        figures.insert("pull_bytes", wire as f64);
        figures.insert("changed_bytes", rivals::plain(&self.tree, changed)? as f64);
        figures.insert("changed_compressed_bytes", compressed as f64);
        figures.insert("pull_to_changed", wire as f64 / compressed as f64);
        if rustix::process::geteuid().is_root() {
            figures.insert("mount_ms", median(|| Ok(timed(|| Ok(self.here.base(id)?.open()?))?.1))?);
        }
        let commit = self.here.commit(id)?;
        let parent = self.here.commit(commit.parents[0])?;
        figures.insert("diff_ms", median(|| Ok(timed(|| Ok(self.here.diff(&parent, &commit)?))?.1))?);
        let mut number = 0;
        let small = median(|| {
            number += 1;
            let content = plant::Random::new(number).content(2000);
            fs::write(self.tree.join("usr/lib/small"), content)?;
            Ok(timed(|| self.commit("a small change"))?.1)
        })?;
        figures.insert("commit_small_ms", small);
        fs::remove_file(self.tree.join("usr/lib/small"))?;
        // Back to where it was: what was committed just now is to be collected.
        let (tag, at) = (qvd_core::Tag::head(), qvd_storage::repository::Expect::Anything);
        for tag in [tag, qvd_core::Tag::default_tag()] {
            self.here.move_tag(&self.flavour, &tag, at, Some(id), ("bench", "measured"))?;
        }
        let keep = Keep { reflog: Duration::ZERO, ..Keep::default() };
        let (collected, gc) = timed(|| Ok(self.here.gc(&keep, false)?))?;
        if collected.commits != TIMES as u64 {
            return Err(format!("collected {collected:?}").into());
        }
        figures.insert("gc_ms", gc);
        Ok(figures)
    }
}

/// Milliseconds that something takes.
fn timed<T>(f: impl FnOnce() -> Outcome<T>) -> Outcome<(T, f64)> {
    let began = Instant::now();
    let result = f()?;
    Ok((result, began.elapsed().as_secs_f64() * 1000.0))
}

fn median(mut f: impl FnMut() -> Outcome<f64>) -> Outcome<f64> {
    let mut values = (0..TIMES).map(|_| f()).collect::<Outcome<Vec<f64>>>()?;
    values.sort_by(f64::total_cmp);
    Ok(values[TIMES / 2])
}

fn print_table(once: &Figures, marks: &BTreeMap<usize, Figures>) {
    println!("history of a tree of 500 MB in 20 000 files");
    for (name, value) in once {
        println!("{name:<26} {value:>12.0}");
    }
    let head: Vec<String> = marks.keys().map(|mark| format!("{:>12}", format!("{mark} commits"))).collect();
    println!("{:<26} {}", "", head.join(" "));
    let names: Vec<&str> = marks.values().flat_map(|figures| figures.keys().copied()).collect();
    let mut shown = Vec::new();
    for name in names {
        if shown.contains(&name) {
            continue;
        }
        shown.push(name);
        let cells: Vec<String> = marks
            .values()
            .map(|figures| figures.get(name).map_or("-".to_owned(), |value| format!("{value:>12.2}")))
            .collect();
        println!("{name:<26} {}", cells.join(" "));
    }
    for (name, goal) in GOALS {
        let worst = worst(marks, name);
        let met = worst.map(|worst| if worst <= goal { "met" } else { "MISSED" });
        println!("goal: {name} at most {goal}: {} ({:.2} at worst)", met.unwrap_or("-"), worst.unwrap_or(f64::NAN));
    }
}

fn worst(marks: &BTreeMap<usize, Figures>, name: &str) -> Option<f64> {
    marks.values().filter_map(|figures| figures.get(name).copied()).reduce(f64::max)
}

fn print_json(once: &Figures, marks: &BTreeMap<usize, Figures>) {
    let goals: Vec<Value> = GOALS
        .iter()
        .map(|(name, goal)| {
            let worst = worst(marks, name);
            json!({ "name": name, "at_most": goal, "worst": worst, "met": worst.map(|worst| worst <= *goal) })
        })
        .collect();
    println!("{}", json!({ "history": { "once": once, "by_commits": marks, "goals": goals } }));
}

impl Options {
    fn parse() -> Outcome<Self> {
        let mut options = Self { json: false, dir: None };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                // Cargo says so to every benchmark.
                "--bench" => {}
                "--json" => options.json = true,
                "--dir" => options.dir = Some(Path::new(&args.next().ok_or("`--dir` needs a directory")?).to_owned()),
                _ => return Err(format!("unknown argument `{arg}`").into()),
            }
        }
        Ok(options)
    }
}
