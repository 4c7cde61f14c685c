//! What each way to make a root costs, on file systems of its own, beside
//! `cp -a` and the `btrfs` command in the same run.
//!
//! All take turns in each round, so that whatever else the machine does falls on
//! all of them: the ratios mean more than the times. What is measured is said in
//! `docs/benchmarks.md`.
//!
//! Options: `--rounds N`, `--json`, `--svg FILE` for a picture.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod bed;
#[path = "../common/mod.rs"]
mod common;
mod look;
mod subject;

use std::{collections::BTreeMap, fs};

use qvd_testkit::chart::Bars;
use serde_json::{Value, json};

use crate::{
    bed::Bed,
    common::{Options, Outcome, figures, short},
    look::Sharing,
    subject::{Subject, subjects},
};

/// What one turn of one subject gave: a number for each [`Measure`] that it has.
type Turn = BTreeMap<Measure, f64>;

/// What is measured, in the order of the table's columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Measure {
    Create,
    Write1,
    Write100,
    Unmount,
    Remove,
    RandomRead,
    RandomWrite,
    Read,
    Write,
    Walk,
    Untar,
    Used,
}

impl Measure {
    const ALL: [Self; 12] = [
        Self::Create,
        Self::Write1,
        Self::Write100,
        Self::Unmount,
        Self::Remove,
        Self::RandomRead,
        Self::RandomWrite,
        Self::Read,
        Self::Write,
        Self::Walk,
        Self::Untar,
        Self::Used,
    ];

    /// Name in JSON, with its unit.
    const fn name(self) -> &'static str {
        match self {
            Self::Create => "create_us",
            Self::Write1 => "first_write_1mb_us",
            Self::Write100 => "first_write_100mb_us",
            Self::Unmount => "unmount_us",
            Self::Remove => "remove_us",
            Self::RandomRead => "random_read_kiops",
            Self::RandomWrite => "random_write_kiops",
            Self::Read => "read_mb_s",
            Self::Write => "write_mb_s",
            Self::Walk => "walk_ms",
            Self::Untar => "untar_ms",
            Self::Used => "used_kib",
        }
    }
}

struct Row {
    subject: Box<dyn Subject>,
    turns: Vec<Turn>,
    sharing: Option<Sharing>,
}

impl Row {
    /// Median and least of the turns that have it.
    fn figures(&self, measure: Measure) -> Option<(f64, f64)> {
        figures(self.turns.iter().filter_map(|turn| turn.get(&measure).copied()))
    }

    fn median(&self, measure: Measure) -> Option<f64> {
        self.figures(measure).map(|(median, _)| median)
    }
}

fn main() -> Outcome<()> {
    let options = Options::parse()?;
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: making roots of every kind needs root");
        return Ok(());
    }
    qvd_sys::mount::in_private_namespace(|| run(&options))?
}

fn run(options: &Options) -> Outcome<()> {
    let bed = Bed::new()?;
    let mut rows: Vec<Row> =
        subjects(&bed)?.into_iter().map(|subject| Row { subject, turns: Vec::new(), sharing: None }).collect();
    for row in &mut rows {
        row.sharing = look::sharing(row.subject.as_ref())?;
    }
    for round in 0..=options.rounds {
        // A new order each time: nobody always follows the same one.
        let length = rows.len();
        for number in 0..length {
            let row = &mut rows[(number * 7 + round * 3) % length];
            let turn = look::turn(row.subject.as_ref())?;
            // The first round warms up: bases are copied, templates made.
            if round > 0 {
                row.turns.push(turn);
            }
        }
    }
    if let Some(path) = &options.svg {
        fs::write(path, picture(&rows)?)?;
    }
    if options.json {
        print_json(&rows)
    } else {
        print_table(&rows)
    }
    Ok(())
}

/// What others are compared with: the `btrfs` command on the same machine.
const PEER: &str = "btrfs command";

fn print_table(rows: &[Row]) {
    println!(
        "{:<22} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8} {:>7} {:>7} {:>7} {:>7} {:>8}  cache mmaps",
        "",
        "make us",
        "least",
        "1MB us",
        "100MB us",
        "unmount",
        "remove",
        "rr kiops",
        "rw kiops",
        "rd MB/s",
        "wr MB/s",
        "walk ms",
        "untar",
        "used KiB"
    );
    for row in rows {
        let cell = |measure: Measure| row.median(measure).map_or("-".to_owned(), short);
        let least = row.figures(Measure::Create).map_or("-".to_owned(), |(_, least)| short(least));
        let (cache, mmaps) = row.sharing.as_ref().map_or(("-", "-"), |s| (yes(s.cache()), yes(s.mmaps())));
        println!(
            "{:<22} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8} {:>7} {:>7} {:>7} {:>7} {:>8}  {cache:<5} {mmaps}",
            row.subject.name(),
            cell(Measure::Create),
            least,
            cell(Measure::Write1),
            cell(Measure::Write100),
            cell(Measure::Unmount),
            cell(Measure::Remove),
            cell(Measure::RandomRead),
            cell(Measure::RandomWrite),
            cell(Measure::Read),
            cell(Measure::Write),
            cell(Measure::Walk),
            cell(Measure::Untar),
            cell(Measure::Used),
        );
    }
    let of = |name: &str| rows.iter().find(|row| row.subject.name() == name)?.median(Measure::Create);
    if let Some(peer) = of(PEER) {
        for row in rows {
            if let Some(own) = row.median(Measure::Create) {
                println!("{:<22} makes a root {:.2} times as fast as the {PEER}", row.subject.name(), peer / own);
            }
        }
    }
}

const fn yes(answer: bool) -> &'static str {
    if answer { "yes" } else { "no" }
}

fn print_json(rows: &[Row]) {
    let rows: Vec<Value> = rows
        .iter()
        .map(|row| {
            let mut line = json!({ "name": row.subject.name(), "rounds": row.turns.len() });
            for measure in Measure::ALL {
                if let Some((median, least)) = row.figures(measure) {
                    line[measure.name()] = json!({ "median": median, "least": least });
                }
            }
            if let Some(sharing) = &row.sharing {
                line["sharing"] = json!({
                    "resident_share": sharing.resident,
                    "pss_share": sharing.pss,
                    "page_cache": sharing.cache(),
                    "mmaps": sharing.mmaps(),
                });
            }
            line
        })
        .collect();
    println!("{}", json!({ "roots": rows }));
}

fn picture(rows: &[Row]) -> Outcome<String> {
    let ms = |row: &Row, measure| row.median(measure).map(|us| (us / 1000.0).max(0.001));
    let bars = Bars {
        title: "Making, first writing to and removing a root (median)".to_owned(),
        axis: "milliseconds".to_owned(),
        series: vec!["make".to_owned(), "first write to 100 MB".to_owned(), "remove (return)".to_owned()],
        rows: rows
            .iter()
            .map(|row| {
                let values = [Measure::Create, Measure::Write100, Measure::Remove].map(|measure| ms(row, measure));
                (row.subject.name().to_owned(), values.to_vec())
            })
            .collect(),
    };
    Ok(bars.svg().map_err(|error| error.to_string())?)
}
