//! What this host can do, found by trying.

use std::process::ExitCode;

use qvd_core::Support;
use qvd_node::Probe;

use crate::{
    failure::Exit,
    output::{Output, one_line},
    paths::Paths,
};

/// Prints what was found. The status says whether containers can run here:
/// without the rest desktops are only slower or poorer.
pub(crate) fn run(paths: &Paths, output: &Output) -> anyhow::Result<ExitCode> {
    let probes = qvd_node::probe(&paths.root);
    let fit = probes.iter().all(|probe| !probe.required || probe.support.is_yes());
    output.result(&probes, |probes| probes.iter().map(text).collect::<Vec<_>>().join("\n"))?;
    Ok(if fit { ExitCode::SUCCESS } else { Exit::Unsupported.into() })
}

/// A line, and what to do about a no below it.
fn text(probe: &Probe) -> String {
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
