//! What this host can do, found by trying.

use std::process::ExitCode;

use comfy_table::{ContentArrangement, Table, presets};
use qvd_core::Support;
use qvd_node::{Probe, Survey, VmConfig};
use qvd_storage::{DiskSurvey, Recommendation};
use serde::Serialize;

use crate::{
    failure::Exit,
    machines::{Doctor, check_kernel},
    output::{Output, one_line},
    paths::Paths,
};

/// Everything that was found.
#[derive(Serialize)]
struct Found {
    checks: Vec<Probe>,
    /// Ways to make roots; none when nothing could be tried.
    roots: Option<Survey>,
    /// Ways to make disks; none likewise.
    disks: Option<DiskSurvey>,
    /// What filters of frames cannot stop.
    filters: Vec<FilterGaps>,
}

#[derive(Serialize)]
struct FilterGaps {
    back_end: qvd_net::Backend,
    gaps: &'static [&'static str],
}

/// Prints what was found. The status says whether containers can run here:
/// without the rest desktops are only slower or poorer.
pub(crate) fn run(paths: &Paths, args: &Doctor, output: &Output) -> anyhow::Result<ExitCode> {
    check_kernel(args.vm_kernel.as_deref())?;
    let mut checks = qvd_node::probe(&paths.root);
    checks.extend(machines(paths, args)?);
    let fit = checks.iter().all(|check| !check.required || check.support.is_yes());
    let roots = tried(qvd_node::survey(&paths.root), "roots");
    let disks = tried(qvd_node::survey_disks(&paths.root), "disks");
    let filters = qvd_net::Backend::ALL.map(|back_end| FilterGaps { back_end, gaps: back_end.gaps() }).into();
    output.result(&Found { checks, roots, disks, filters }, |found| {
        let next = found.checks.iter().skip(1).map(Some).chain([None]);
        let mut text: Vec<String> = found.checks.iter().zip(next).map(|(probe, next)| check(probe, next)).collect();
        text.extend(found.roots.iter().map(roots_table));
        text.extend(found.disks.iter().map(disks_table));
        text.extend(found.filters.iter().filter(|filter| !filter.gaps.is_empty()).map(gaps));
        text.join("\n")
    })?;
    Ok(if fit { ExitCode::SUCCESS } else { Exit::Unsupported.into() })
}

/// What is found about virtual machines, where there is an init to try them with.
fn machines(paths: &Paths, args: &Doctor) -> anyhow::Result<Vec<Probe>> {
    let init = match crate::up::find_init(args.init.as_deref()) {
        Ok(init) => init,
        Err(error) if args.init.is_some() => return Err(error),
        Err(error) => {
            tracing::info!(error = %error, "virtual machines were not tried");
            return Ok(Vec::new());
        }
    };
    let mut config = VmConfig::default();
    config.kernel.clone_from(&args.vm_kernel);
    Ok(qvd_node::probe_vms(&config, &init, &paths.root))
}

/// What a filter lets by, a line each.
fn gaps(filter: &FilterGaps) -> String {
    let lines: String = filter.gaps.iter().map(|gap| format!("\n       {gap}")).collect();
    format!("filter {}, where it has to take the place of nft:{lines}", filter.back_end)
}

/// A line, and what to do about a no below it: once for all that come one after the other
/// and take the same.
fn check(probe: &Probe, next: Option<&Probe>) -> String {
    let Probe { name, support, .. } = probe;
    let said_below = next.is_some_and(|next| !next.support.is_yes() && next.remedy == probe.remedy);
    match support {
        Support::Yes => format!("yes  {name}"),
        Support::No(missing) => {
            let word = if probe.required { "NO " } else { "no " };
            let details =
                [("", missing.to_string()), ("cost: ", probe.cost.clone()), ("remedy: ", probe.remedy.clone())];
            let shown = if said_below { 2 } else { details.len() };
            let details = details.iter().take(shown).map(|(label, text)| format!("\n       {label}{}", one_line(text)));
            format!("{word}  {name}{}", details.collect::<String>())
        }
        // A later version of the vocabulary may know more answers.
        other => format!("?    {name}: {other:?}"),
    }
}

fn tried<T>(survey: Result<T, qvd_storage::Error>, what: &str) -> Option<T> {
    survey
        .inspect_err(|error| {
            tracing::warn!(error = error as &dyn std::error::Error, "back ends for {what} were not tried");
        })
        .ok()
}

/// What one back end says to each capability, by name.
type Answers = (&'static str, Vec<(&'static str, Support)>);

fn roots_table(survey: &Survey) -> String {
    let answers = survey.back_ends.iter().map(|back_end| {
        let answers = back_end.capabilities.iter().map(|(capability, support)| (capability.name(), support));
        (back_end.name, answers.collect())
    });
    let mut text = table("roots", &answers.collect::<Vec<_>>());
    let chosen = survey.back_ends.iter().filter_map(|back_end| Some((back_end.name, back_end.options.as_ref()?)));
    text.extend(chosen.map(|(name, options)| format!("  {name} mounts with {options}")));
    text.extend(survey.historic.iter().map(|old| format!("  no {}: {}; use {}", old.name, old.was, old.instead)));
    text.extend(recommendation("root", survey.recommended.as_ref()));
    text.join("\n")
}

fn disks_table(survey: &DiskSurvey) -> String {
    let answers = survey.back_ends.iter().map(|back_end| {
        let answers = back_end.capabilities.iter().map(|(capability, support)| (capability.name(), support));
        (back_end.name, answers.collect())
    });
    let mut text = table("disks", &answers.collect::<Vec<_>>());
    text.extend(recommendation("disk", survey.recommended.as_ref()));
    text.join("\n")
}

/// The table of back ends, and the reason for each no.
fn table(what: &str, back_ends: &[Answers]) -> Vec<String> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(std::iter::once("").chain(back_ends.iter().map(|(name, _)| *name)));
    let capabilities = back_ends.first().map(|(_, answers)| answers.as_slice()).unwrap_or_default();
    for (row, (capability, _)) in capabilities.iter().enumerate() {
        let yes = |answers: &[(_, Support)]| answers.get(row).is_some_and(|(_, support)| support.is_yes());
        let answers = back_ends.iter().map(|(_, answers)| if yes(answers) { "yes" } else { "-" });
        table.add_row(std::iter::once(*capability).chain(answers));
    }
    let mut text = vec![String::new(), format!("Ways to make {what}:")];
    text.extend(table.lines().map(|line| line.trim_end().to_owned()));
    for (name, answers) in back_ends {
        for (reason, capabilities) in reasons(answers) {
            let list = if capabilities.len() == answers.len() { "all".to_owned() } else { capabilities.join(", ") };
            text.push(format!("  no {list} with {name}: {}", one_line(&reason)));
        }
    }
    text
}

/// Which one to take, and why.
fn recommendation(what: &str, recommended: Option<&Recommendation>) -> Vec<String> {
    let Some(recommended) = recommended else { return vec![format!("No {what} can be made in this directory.")] };
    let mut text = vec![format!("Recommended for this directory: {}", recommended.back_end)];
    text.extend(recommended.because.iter().map(|why| format!("  because {why}")));
    text.extend(recommended.but.iter().map(|what| format!("  but {what}")));
    text
}

/// What a back end cannot do, by reason, in the order in which they appear.
fn reasons(answers: &[(&'static str, Support)]) -> Vec<(String, Vec<&'static str>)> {
    let mut found: Vec<(String, Vec<&'static str>)> = Vec::new();
    for (capability, support) in answers {
        let Support::No(missing) = support else { continue };
        let reason = missing.to_string();
        match found.iter_mut().find(|(known, _)| *known == reason) {
            Some((_, capabilities)) => capabilities.push(capability),
            None => found.push((reason, vec![capability])),
        }
    }
    found
}
