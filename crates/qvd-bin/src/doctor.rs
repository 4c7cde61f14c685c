//! What this host can do, found by trying.

use std::process::ExitCode;

use comfy_table::{ContentArrangement, Table, presets};
use qvd_core::Support;
use qvd_node::{Probe, Survey, VmConfig};
use qvd_storage::Capability;
use serde::Serialize;

use crate::{
    failure::Exit,
    machines::Doctor,
    output::{Output, one_line},
    paths::Paths,
};

/// Everything that was found.
#[derive(Serialize)]
struct Found {
    checks: Vec<Probe>,
    /// Ways to make roots; none when nothing could be tried.
    roots: Option<Survey>,
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
    let mut checks = qvd_node::probe(&paths.root);
    checks.extend(machines(paths, args)?);
    let fit = checks.iter().all(|check| !check.required || check.support.is_yes());
    let roots = match qvd_node::survey(&paths.root) {
        Ok(survey) => Some(survey),
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "back ends for roots were not tried");
            None
        }
    };
    let filters = qvd_net::Backend::ALL.map(|back_end| FilterGaps { back_end, gaps: back_end.gaps() }).into();
    output.result(&Found { checks, roots, filters }, |found| {
        let mut text: Vec<String> = found.checks.iter().map(check).collect();
        text.extend(found.roots.iter().map(survey));
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

/// A line, and what to do about a no below it.
fn check(probe: &Probe) -> String {
    let Probe { name, support, .. } = probe;
    match support {
        Support::Yes => format!("yes  {name}"),
        Support::No(missing) => {
            let word = if probe.required { "NO " } else { "no " };
            let details =
                [("", missing.to_string()), ("cost: ", probe.cost.clone()), ("remedy: ", probe.remedy.clone())];
            let details = details.iter().map(|(label, text)| format!("\n       {label}{}", one_line(text)));
            format!("{word}  {name}{}", details.collect::<String>())
        }
        // A later version of the vocabulary may know more answers.
        other => format!("?    {name}: {other:?}"),
    }
}

/// The table of back ends, the reason for each no, and the recommendation.
fn survey(survey: &Survey) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(std::iter::once("").chain(survey.back_ends.iter().map(|b| b.name)));
    for capability in Capability::ALL {
        let answers =
            survey.back_ends.iter().map(|b| if b.capabilities.get(capability).is_yes() { "yes" } else { "-" });
        table.add_row(std::iter::once(capability.name()).chain(answers));
    }
    let mut text = vec![String::new(), "Ways to make roots:".to_owned()];
    text.extend(table.lines().map(|line| line.trim_end().to_owned()));
    for back_end in &survey.back_ends {
        for (reason, capabilities) in reasons(back_end) {
            let list =
                if capabilities.len() == Capability::ALL.len() { "all".to_owned() } else { capabilities.join(", ") };
            text.push(format!("  no {list} with {}: {}", back_end.name, one_line(&reason)));
        }
    }
    text.extend(survey.historic.iter().map(|old| format!("  no {}: {}; use {}", old.name, old.was, old.instead)));
    match &survey.recommended {
        Some(recommended) => {
            text.push(format!("Recommended for this directory: {}", recommended.back_end));
            text.extend(recommended.because.iter().map(|why| format!("  because {why}")));
            text.extend(recommended.but.iter().map(|what| format!("  but {what}")));
        }
        None => text.push("No root can be made in this directory.".to_owned()),
    }
    text.join("\n")
}

/// What a back end cannot do, by reason, in the order in which they appear.
fn reasons(back_end: &qvd_storage::Surveyed) -> Vec<(String, Vec<&'static str>)> {
    let mut found: Vec<(String, Vec<&'static str>)> = Vec::new();
    for (capability, support) in back_end.capabilities.iter() {
        let Support::No(missing) = support else { continue };
        let reason = missing.to_string();
        match found.iter_mut().find(|(known, _)| *known == reason) {
            Some((_, capabilities)) => capabilities.push(capability.name()),
            None => found.push((reason, vec![capability.name()])),
        }
    }
    found
}
