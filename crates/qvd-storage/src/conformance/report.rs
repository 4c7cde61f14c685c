//! What a run of the suite found.

use std::fmt;

use serde::Serialize;

use crate::Deviation;

/// What became of each case. Displayed as a line per case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// Name of the back end.
    pub back_end: String,
    /// Every case of the suite, in the order in which they ran.
    pub cases: Vec<Case>,
}

/// One case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Case {
    /// What was looked at; never changed once released.
    pub name: &'static str,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What became of a case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Outcome {
    /// It is as with a plain directory.
    Passed,
    /// It is not, as the back end declares.
    Declared {
        /// What was declared.
        deviation: Deviation,
        /// How that showed.
        seen: String,
    },
    /// The back end says that it cannot do this here, so it was not asked to.
    NotOffered {
        /// What is missing.
        why: String,
    },
    /// It is wrong.
    Failed {
        /// What should have been.
        expected: String,
        /// What was.
        seen: String,
    },
}

impl Report {
    pub(super) fn new(back_end: &str) -> Self {
        Self { back_end: back_end.to_owned(), cases: Vec::new() }
    }

    pub(super) fn add(&mut self, name: &'static str, outcome: Outcome) {
        self.cases.push(Case { name, outcome });
    }

    /// Whether no case failed.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.failed().next().is_none()
    }

    /// The cases that failed.
    pub fn failed(&self) -> impl Iterator<Item = &Case> {
        self.cases.iter().filter(|case| matches!(case.outcome, Outcome::Failed { .. }))
    }

    /// What became of the case of this name.
    #[must_use]
    pub fn outcome(&self, name: &str) -> Option<&Outcome> {
        self.cases.iter().find(|case| case.name == name).map(|case| &case.outcome)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "conformance of {}", self.back_end)?;
        self.cases.iter().try_for_each(|case| writeln!(f, "{case}"))
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name;
        match &self.outcome {
            Outcome::Passed => write!(f, "  passed       {name}"),
            Outcome::Declared { deviation, seen } => write!(f, "  declared     {name}: {deviation} ({seen})"),
            Outcome::NotOffered { why } => write!(f, "  not offered  {name}: {why}"),
            Outcome::Failed { expected, seen } => {
                write!(f, "  FAILED       {name}\n    expected: {expected}\n    seen:     {seen}")
            }
        }
    }
}

/// What a case saw when it came to its end.
#[derive(Debug)]
pub(super) enum Seen {
    /// What a plain directory does.
    Plain,
    /// What its deviation describes, in so many words.
    Deviates(String),
    /// Nothing: the back end does not offer it here.
    NotOffered(String),
}

/// Why a case is wrong.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) expected: String,
    pub(super) seen: String,
}

pub(super) type Checked = Result<Seen, Failure>;

impl Failure {
    pub(super) fn new(expected: impl Into<String>, seen: impl Into<String>) -> Self {
        Self { expected: expected.into(), seen: seen.into() }
    }
}

/// Says what should have worked when something did not.
pub(super) trait Step<T> {
    /// `what` is a sentence that should be true.
    fn step(self, what: impl fmt::Display) -> Result<T, Failure>;
}

impl<T, E: std::error::Error + 'static> Step<T> for Result<T, E> {
    fn step(self, what: impl fmt::Display) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(what.to_string(), said(&error)))
    }
}

/// An error with its causes, in a line.
pub(super) fn said(error: &(dyn std::error::Error + 'static)) -> String {
    qvd_core::causes(error).join(": ")
}

/// Demands that two things are the same.
pub(super) fn equal<T: PartialEq + fmt::Debug>(what: impl fmt::Display, seen: T, expected: T) -> Result<(), Failure> {
    if seen == expected {
        return Ok(());
    }
    Err(Failure::new(format!("{what}: {}", short(&expected)), short(&seen)))
}

/// Demands that something is so.
pub(super) fn hold(what: impl fmt::Display, holds: bool, seen: impl fmt::Display) -> Result<(), Failure> {
    if holds { Ok(()) } else { Err(Failure::new(what.to_string(), seen.to_string())) }
}

/// Demands an error.
pub(super) fn refused<T>(
    what: impl fmt::Display,
    result: Result<T, rustix::io::Errno>,
    expected: &[rustix::io::Errno],
) -> Result<(), Failure> {
    match result {
        Err(error) if expected.contains(&error) => Ok(()),
        other => {
            let seen = other.err().map_or_else(|| "it works".to_owned(), |error| said(&error));
            let wanted: Vec<_> = expected.iter().map(ToString::to_string).collect();
            Err(Failure::new(format!("{what} is refused: {}", wanted.join(" or ")), seen))
        }
    }
}

/// A value for a person, who is not helped by a thousand bytes.
fn short(value: &impl fmt::Debug) -> String {
    let text = format!("{value:?}");
    match text.char_indices().nth(300) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text,
    }
}
