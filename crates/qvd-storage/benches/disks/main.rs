//! What each way to make a disk costs, on file systems of its own, beside
//! `qemu-img create` run as a command in the same run.
//!
//! All take turns in each round, so that whatever else the machine does falls on
//! all of them: the ratios mean more than the times. I/O goes through QEMU's block
//! layer (`qemu-img bench`), as that of a virtual machine does.
//!
//! Options: `--rounds N`, `--json`, `--svg FILE` for a picture.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "../common/mod.rs"]
mod common;
mod subject;

use std::{collections::BTreeMap, fs};

use qvd_testkit::chart::Bars;
use serde_json::{Value, json};

use crate::{
    common::{Options, Outcome, figures, short},
    subject::{Bed, Subject, subjects},
};

/// What one turn of one subject gave: a number for each [`Measure`].
type Turn = BTreeMap<Measure, f64>;

/// What is measured, in the order of the table's columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Measure {
    Create,
    Used,
    RandomRead,
    RandomWrite,
    Read,
    Write,
    RemoveNew,
    RemoveFull,
}

impl Measure {
    const ALL: [Self; 8] = [
        Self::Create,
        Self::Used,
        Self::RandomRead,
        Self::RandomWrite,
        Self::Read,
        Self::Write,
        Self::RemoveNew,
        Self::RemoveFull,
    ];

    /// Name in JSON, with its unit.
    const fn name(self) -> &'static str {
        match self {
            Self::Create => "create_us",
            Self::Used => "used_kib",
            Self::RandomRead => "random_read_kiops",
            Self::RandomWrite => "random_write_kiops",
            Self::Read => "read_mb_s",
            Self::Write => "write_mb_s",
            Self::RemoveNew => "remove_new_us",
            Self::RemoveFull => "remove_written_us",
        }
    }
}

struct Row {
    subject: Box<dyn Subject>,
    turns: Vec<Turn>,
}

impl Row {
    /// Median and least of its turns.
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
        eprintln!("SKIPPED: file systems of one's own need root");
        return Ok(());
    }
    qvd_sys::mount::in_private_namespace(|| run(&options))?
}

fn run(options: &Options) -> Outcome<()> {
    let bed = Bed::new()?;
    let mut rows: Vec<Row> = subjects(&bed)?.into_iter().map(|subject| Row { subject, turns: Vec::new() }).collect();
    for round in 0..=options.rounds {
        // A new order each time: nobody always follows the same one.
        let length = rows.len();
        for number in 0..length {
            let row = &mut rows[(number + round * 3) % length];
            let turn = subject::turn(row.subject.as_ref())?;
            // The first round warms up.
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

/// What others are compared with.
const PEER: &str = "qemu-img create";

fn print_table(rows: &[Row]) {
    print!("{:<20} {:>10}", "", "least us");
    Measure::ALL.iter().for_each(|measure| print!(" {:>18}", measure.name()));
    println!();
    for row in rows {
        let least = row.figures(Measure::Create).map_or("-".to_owned(), |(_, least)| short(least));
        print!("{:<20} {least:>10}", row.subject.name());
        for measure in Measure::ALL {
            print!(" {:>18}", row.median(measure).map_or("-".to_owned(), short));
        }
        println!();
    }
    let of = |name: &str| rows.iter().find(|row| row.subject.name() == name)?.median(Measure::Create);
    if let Some(peer) = of(PEER) {
        for row in rows {
            if let Some(own) = row.median(Measure::Create) {
                println!("{:<20} makes a disk {:.2} times as fast as {PEER}", row.subject.name(), peer / own);
            }
        }
    }
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
            line
        })
        .collect();
    println!("{}", json!({ "disks": rows }));
}

fn picture(rows: &[Row]) -> Outcome<String> {
    let ms = |row: &Row, measure| row.median(measure).map(|us| (us / 1000.0).max(0.001));
    let bars = Bars {
        title: "Making and removing a disk (median)".to_owned(),
        axis: "milliseconds".to_owned(),
        series: vec!["make".to_owned(), "remove (return), 256 MiB written".to_owned()],
        rows: rows
            .iter()
            .map(|row| {
                let values = [Measure::Create, Measure::RemoveFull].map(|measure| ms(row, measure));
                (row.subject.name().to_owned(), values.to_vec())
            })
            .collect(),
    };
    Ok(bars.svg().map_err(|error| error.to_string())?)
}
