//! Every case, in the order in which they run.

mod attributes;
mod contract;
mod data;
mod isolation;
mod leaks;
mod limits;
mod links;
mod names;
mod restart;
mod special;
mod watch;

use super::{CaseDef, crash, model};

pub(super) fn all() -> Vec<CaseDef> {
    [
        contract::CASES,
        names::CASES,
        links::CASES,
        attributes::CASES,
        special::CASES,
        data::CASES,
        watch::CASES,
        isolation::CASES,
        limits::CASES,
        restart::CASES,
        model::CASES,
        crash::CASES,
        leaks::CASES,
        // Last, so that it sees what any of the others did to the base.
        isolation::LAST,
    ]
    .into_iter()
    .flatten()
    .map(|&(name, deviation, run)| CaseDef { name, deviation, run })
    .collect()
}

/// A case as the files beside this one list them.
pub(super) type Listed = (&'static str, Option<crate::Deviation>, fn(&super::bench::Bench) -> super::report::Checked);
