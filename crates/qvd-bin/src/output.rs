//! Standard output: a table or lines for a person, JSON for a program.

use std::{
    cell::Cell,
    io::{self, IsTerminal, Write},
    time::{Duration, SystemTime},
};

use anyhow::Context;
use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Where results go.
#[derive(Debug)]
pub(crate) struct Output {
    json: bool,
    closed: Cell<bool>,
}

impl Output {
    pub(crate) const fn new(json: bool) -> Self {
        Self { json, closed: Cell::new(false) }
    }

    pub(crate) const fn is_json(&self) -> bool {
        self.json
    }

    /// Whether the reader of standard output has left.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Prints `value` as one line of JSON, or the `text` made of it.
    pub(crate) fn result<T: Serialize + ?Sized>(
        &self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<()> {
        let line = if self.json { serde_json::to_string(value).context("cannot write JSON")? } else { text(value) };
        self.line(&line)
    }

    /// Prints `rows` as one line of JSON, or as a table.
    pub(crate) fn table<T: Serialize, const COLUMNS: usize>(
        &self,
        rows: &[T],
        header: [&str; COLUMNS],
        row: impl Fn(&T) -> [String; COLUMNS],
    ) -> anyhow::Result<()> {
        self.result(rows, |rows| {
            let mut table = Table::new();
            table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
            table.set_header(header);
            for value in rows {
                table.add_row(row(value).map(|cell| one_line(&cell)));
            }
            let lines: Vec<String> = table.lines().map(|line| line.trim().to_owned()).collect();
            lines.join("\n")
        })
    }

    /// Prints a line; nothing when there is nothing to say.
    pub(crate) fn line(&self, line: &str) -> anyhow::Result<()> {
        if line.is_empty() {
            return Ok(());
        }
        let mut stdout = io::stdout().lock();
        let written = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
        self.closed.set(written.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::BrokenPipe));
        written.context("cannot write to standard output")
    }

    /// Shows how something long goes on: in place on a terminal, line by line
    /// elsewhere, and not at all to a program.
    pub(crate) fn progress(&self) -> Progress {
        if self.json {
            Progress::Silent
        } else if io::stderr().is_terminal() {
            let bar = ProgressBar::new_spinner();
            bar.set_style(
                ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}")
                    .unwrap_or_else(|_| ProgressStyle::default_spinner()),
            );
            bar.enable_steady_tick(Duration::from_millis(100));
            Progress::Bar(bar)
        } else {
            Progress::Lines
        }
    }
}

/// How something long goes on. Ends when dropped.
pub(crate) enum Progress {
    Silent,
    Bar(ProgressBar),
    Lines,
}

impl Progress {
    /// How long to wait until there is something to show again.
    pub(crate) const fn pause(&self) -> Duration {
        match self {
            Self::Bar(_) => Duration::from_millis(100),
            _ => Duration::from_secs(1),
        }
    }

    /// Shows how many bytes of how many are done, and `text` beside it.
    pub(crate) fn amount(&self, bytes: u64, total: u64, text: &str) {
        if let Self::Bar(bar) = self
            && bar.length() != Some(total)
        {
            bar.set_length(total);
            let style = ProgressStyle::with_template("{bar:24} {percent:>3}% {msg} {elapsed}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        }
        if let Self::Bar(bar) = self {
            bar.set_position(bytes);
        }
        self.say(text);
    }

    pub(crate) fn say(&self, text: &str) {
        let text = one_line(text);
        match self {
            Self::Silent => {}
            Self::Bar(bar) => bar.set_message(text),
            // News for a person only: without a reader it is no loss.
            Self::Lines => drop(writeln!(io::stderr(), "{text}")),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// The text on one line and harmless to a terminal: some of what is shown
/// comes from inside desktops.
pub(crate) fn one_line(text: &str) -> String {
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    clean.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// A number of things: `1 commit`, `2 commits`.
pub(crate) fn count(number: u64, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

/// How long ago a moment was: `3 min`, `2 days`.
pub(crate) fn age(unix_s: u64) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    duration(now.saturating_sub(unix_s))
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min", seconds / 60),
        3_600..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_reaches_the_terminal_but_text() {
        assert_eq!(one_line("a\x1b[2Jb\r\nc\u{9b}31m"), "a [2Jb c 31m");
    }

    #[test]
    fn one_is_not_many() {
        assert_eq!(
            [count(0, "commit"), count(1, "commit"), count(2, "commit")],
            ["0 commits", "1 commit", "2 commits"]
        );
    }

    #[test]
    fn ages_read_well() {
        for (seconds, text) in [(0, "0 s"), (59, "59 s"), (60, "1 min"), (7_200, "2 h"), (172_800, "2 days")] {
            assert_eq!(duration(seconds), text);
        }
    }
}
