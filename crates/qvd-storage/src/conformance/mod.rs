//! The conformance suite: what every back end has to do, to run on one's own.
//!
//! ```no_run
//! use qvd_storage::{PlainCopy, conformance::Suite};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = tempfile::tempdir()?;
//! let report = Suite::new("mine", |place| Ok(Box::new(PlainCopy::new(place)))).run(dir.path())?;
//! assert!(report.passed(), "{report}");
//! # Ok(())
//! # }
//! ```
//!
//! It makes roots of the back end in a directory and does with them what desktops
//! do. A back end is held to what a plain directory does, but for the
//! [`Deviation`]s that it declares; and these have to occur. It is held to its
//! [`Capability`](crate::Capability)s too: what it offers has to work, and what it does not offer has
//! to be refused instead of ignored.
//!
//! The suite has to run as root, or as root of a user namespace with 65536 ids.
//! It forks: while it runs, other threads of the process should hold no lock for
//! long that the back end takes.

mod base;
mod bench;
mod cases;
mod crash;
mod manifest;
mod model;
mod report;
mod tree;

use std::{fmt, path::Path, sync::Arc, time::Duration};

use rustix::fs::Mode;

pub use self::{
    base::BaseForm,
    report::{Case, Outcome, Report},
};
use self::{
    bench::Bench,
    report::{Checked, Failure, Seen},
};
use crate::{Backends, Deviation, Error, Factory, Place, RootBackend};

/// How much is tried of what can be tried for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Effort {
    /// Some crashes of each operation, evenly spread, and some dozens of random
    /// sequences: seconds.
    #[default]
    Quick,
    /// A crash after every system call, and hundreds of sequences: minutes.
    Thorough,
}

/// How long the background may take for its work unless somebody says more.
const PATIENCE: Duration = Duration::from_secs(10);

/// Who is told of each case.
type Watch = Box<dyn Fn(&Case) + Send + Sync>;

/// The cases, and the back end that they are for.
pub struct Suite {
    name: String,
    factory: Arc<Factory>,
    form: BaseForm,
    effort: Effort,
    only: Vec<String>,
    patience: Duration,
    watch: Option<Watch>,
}

impl Suite {
    /// All cases, for the back end that `factory` makes. It is called often: for
    /// a new place, and again for one that is opened anew.
    pub fn new(
        name: impl Into<String>,
        factory: impl Fn(Place) -> Result<Box<dyn RootBackend>, Error> + Send + Sync + 'static,
    ) -> Self {
        let (form, effort) = (BaseForm::default(), Effort::default());
        let (name, factory, only) = (name.into(), Arc::new(factory), Vec::new());
        Self { name, factory, form, effort, only, patience: PATIENCE, watch: None }
    }

    /// All cases, for one of the back ends of a list.
    #[must_use]
    pub fn of(backends: &Backends, name: &str) -> Self {
        let (backends, owned) = (backends.clone(), name.to_owned());
        Self::new(name, move |place| backends.make(&owned, place))
    }

    /// On bases of this form.
    #[must_use]
    pub fn on(mut self, form: BaseForm) -> Self {
        self.form = form;
        self
    }

    /// With this much effort.
    #[must_use]
    pub fn effort(mut self, effort: Effort) -> Self {
        self.effort = effort;
        self
    }

    /// Only the cases whose name begins so; said again, those whose name begins so too.
    #[must_use]
    pub fn only(mut self, prefix: impl Into<String>) -> Self {
        self.only.push(prefix.into());
        self
    }

    /// Lets what a back end does in the background take so long, instead of ten
    /// seconds: for one that goes by commands of the host, or a host that is slow.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Calls `watch` with what became of each case when it ends: for one who waits.
    #[must_use]
    pub fn watch(mut self, watch: impl Fn(&Case) + Send + Sync + 'static) -> Self {
        self.watch = Some(Box::new(watch));
        self
    }

    /// Runs the cases in `dir`, which should be empty: there the bases are made,
    /// and the roots. What a back end keeps for roots to come stays there.
    ///
    /// # Errors
    /// The suite itself could not do its work; what is wrong with the back end is
    /// in the report.
    pub fn run(&self, dir: &Path) -> Result<Report, Error> {
        let dir = dir.canonicalize().map_err(Error::io("run the suite in", dir))?;
        // What modes the cases see must not depend on who runs them.
        let umask = Umask(rustix::process::umask(Mode::WGRP | Mode::WOTH));
        let mut report = Report::new(&self.name);
        let mut bench = match Bench::set_up(self, &dir) {
            Ok(bench) => bench,
            Err(Failure { expected, seen }) => {
                report.add("set-up", Outcome::Failed { expected, seen });
                return Ok(report);
            }
        };
        for case in cases::all() {
            if !self.only.is_empty() && !self.only.iter().any(|only| case.name.starts_with(only.as_str())) {
                continue;
            }
            tracing::debug!(case = case.name, back_end = %self.name, "conformance");
            let outcome = judge(&case, bench.declared(), (case.run)(&bench));
            report.add(case.name, outcome);
            if let (Some(watch), Some(ended)) = (&self.watch, report.cases.last()) {
                watch(ended);
            }
            bench.tidy();
        }
        drop((bench, umask));
        Ok(report)
    }
}

impl fmt::Debug for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Suite").field("name", &self.name).field("form", &self.form).finish_non_exhaustive()
    }
}

/// The process's mask, put back when dropped.
struct Umask(Mode);

impl Drop for Umask {
    fn drop(&mut self) {
        rustix::process::umask(self.0);
    }
}

/// One thing that is looked at.
struct CaseDef {
    name: &'static str,
    /// In what a back end may differ here.
    deviation: Option<Deviation>,
    run: fn(&Bench) -> Checked,
}

/// Whether a case tries something else each time, or when threads take turns
/// otherwise: what is wrong need not show each time.
fn goes_by_chance(case: &str) -> bool {
    case.starts_with("random-") || case.starts_with("crash-")
}

/// Holds what was seen against what was declared, both ways.
fn judge(case: &CaseDef, declared: &[Deviation], result: Checked) -> Outcome {
    let deviation = case.deviation.filter(|deviation| declared.contains(deviation));
    let whole = Deviation::Case(case.name);
    let deviation = deviation.or(declared.contains(&whole).then_some(whole));
    match (result, deviation) {
        (Err(Failure { expected, seen }), Some(deviation @ Deviation::Case(_))) => {
            Outcome::Declared { deviation, seen: format!("not that {expected}, but {seen}") }
        }
        (Ok(Seen::Plain), None) => Outcome::Passed,
        (Ok(Seen::Plain), Some(Deviation::Case(name))) if goes_by_chance(name) => Outcome::Passed,
        (Ok(Seen::Plain), Some(deviation)) => Outcome::Failed {
            expected: format!("what is declared: {deviation}"),
            seen: "it does what a plain directory does".to_owned(),
        },
        (Ok(Seen::Deviates(seen)), Some(deviation)) => Outcome::Declared { deviation, seen },
        (Ok(Seen::Deviates(seen)), None) => {
            let name = case.deviation.map_or("nothing", Deviation::text);
            Outcome::Failed { expected: format!("what a plain directory does, or a declaration: {name}"), seen }
        }
        (Ok(Seen::NotOffered(why)), _) => Outcome::NotOffered { why },
        (Err(Failure { expected, seen }), _) => Outcome::Failed { expected, seen },
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_declaration_is_checked_both_ways() {
        let case = CaseDef { name: "x", deviation: Some(Deviation::NoTmpfile), run: |_| Ok(Seen::Plain) };
        let declared = [Deviation::NoTmpfile];
        let deviates = || Ok(Seen::Deviates("refused".to_owned()));
        assert_eq!(judge(&case, &[], Ok(Seen::Plain)), Outcome::Passed);
        assert!(matches!(judge(&case, &declared, deviates()), Outcome::Declared { .. }));
        assert!(matches!(judge(&case, &declared, Ok(Seen::Plain)), Outcome::Failed { .. }));
        assert!(matches!(judge(&case, &[], deviates()), Outcome::Failed { .. }));
        assert!(matches!(judge(&case, &[Deviation::NoAcls], deviates()), Outcome::Failed { .. }));
        let failure = || Err(Failure::new("a", "b"));
        assert!(matches!(judge(&case, &[Deviation::Case("x")], failure()), Outcome::Declared { .. }));
        assert!(matches!(judge(&case, &[Deviation::Case("x")], Ok(Seen::Plain)), Outcome::Failed { .. }));
        assert!(matches!(judge(&case, &[Deviation::Case("y")], failure()), Outcome::Failed { .. }));
        assert!(matches!(judge(&case, &declared, failure()), Outcome::Failed { .. }));
    }

    #[test]
    fn every_deviation_has_a_case_and_every_case_its_own_name() {
        let cases = cases::all();
        for deviation in Deviation::ALL {
            assert!(cases.iter().any(|case| case.deviation == Some(deviation)), "{deviation}");
        }
        let mut names: Vec<_> = cases.iter().map(|case| case.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), cases.len());
    }
}
