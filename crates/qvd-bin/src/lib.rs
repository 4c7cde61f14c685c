//! Commands of QVD: the daemon of one machine, and the clients of its API.
#![forbid(unsafe_code)]

mod cli;
mod failure;
mod generate;
mod output;
mod password;
mod paths;
mod terminal;

use std::{ffi::OsString, process::ExitCode};

use clap::Parser;

use cli::{Cli, Command};
pub use failure::Exit;
use output::Output;

/// Carries out a command line, its first word being the program's name.
///
/// Results go to standard output, errors as one line to standard error.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return failure::usage(&error, args.iter().any(|arg| arg == "--json")),
    };
    let mut output = Output::new(cli.global.json);
    match dispatch(cli, &mut output) {
        Ok(code) => code,
        Err(error) => failure::report(&error, &output),
    }
}

fn dispatch(cli: Cli, output: &mut Output) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Completions { shell } => generate::completions(shell, output)?,
        Command::Man { directory } => generate::man(&directory, output)?,
        _ => anyhow::bail!("x"),
    }
    Ok(ExitCode::SUCCESS)
}
