//! Shell completions and man pages, made of the command line's definition.

use std::{fs, path::Path};

use anyhow::Context;
use clap::CommandFactory;

use crate::{cli::Cli, output::Output};

pub(crate) fn completions(shell: clap_complete::Shell, output: &Output) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "qvd", &mut script);
    output.line(String::from_utf8_lossy(&script).trim_end())
}

pub(crate) fn man(directory: &Path, output: &Output) -> anyhow::Result<()> {
    let cannot = || format!("cannot write man pages to `{}`", directory.display());
    fs::create_dir_all(directory).with_context(cannot)?;
    clap_mangen::generate_to(Cli::command(), directory).with_context(cannot)?;
    output.result(&serde_json::json!({ "directory": directory }), |_| String::new())
}
