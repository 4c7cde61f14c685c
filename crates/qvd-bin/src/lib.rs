//! Commands of QVD: the daemon of one machine, and the clients of its API.
#![forbid(unsafe_code)]

mod bisect;
mod cli;
mod doctor;
mod exec;
mod failure;
mod flavour;
mod generate;
mod graph;
mod history;
mod image;
mod logging;
mod machines;
mod memory;
mod net;
mod output;
mod password;
mod paths;
mod remote;
mod s3;
mod signing;
mod tenants;
mod terminal;
mod transfer;
mod up;

use std::{ffi::OsString, process::ExitCode};

use anyhow::Context;
use clap::Parser;
use tracing_subscriber::filter::LevelFilter;

use cli::{Cli, Command, Global};
pub use failure::Exit;
use output::Output;
use paths::Paths;
use qvd_node::NewVersion;

/// Carries out a command line, its first word being the program's name.
///
/// Results go to standard output, errors as one line to standard error.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return failure::usage(&error, args.iter().any(|arg| arg == "--json")),
    };
    let output = Output::new(cli.global.json);
    let level = if matches!(cli.command, Command::Up(_)) { LevelFilter::INFO } else { LevelFilter::WARN };
    logging::start(level, cli.global.verbose, cli.global.json);
    match dispatch(&cli.global, cli.command, &output) {
        Ok(code) => code,
        Err(error) => failure::report(&error, &output),
    }
}

fn dispatch(global: &Global, command: Command, output: &Output) -> anyhow::Result<ExitCode> {
    let paths = || {
        Paths::of(&global.root).with_context(|| format!("cannot find the state directory `{}`", global.root.display()))
    };
    match command {
        Command::Up(up) => up::run(&paths()?, &up, output)?,
        Command::Doctor(doctor) => return doctor::run(&paths()?, &doctor, output),
        Command::Completions { shell } => generate::completions(shell, output)?,
        Command::Man { directory } => generate::man(&directory, output)?,
        Command::Image(cli::Image::Bisect(search)) => {
            return bisect::search(&paths()?, global.server.as_deref(), search, output);
        }
        Command::Image(cli::Image::Commit { id, message, flavour, publish }) => {
            let client = remote::connect(&paths()?, global.server.as_deref())?;
            let new = NewVersion { flavour, author: history::author(), message, publish };
            remote::wait(remote::commit(&client, id, &new, output))??;
        }
        Command::Image(command) => image::run(&paths()?, global.server.as_deref(), command, output)?,
        Command::Desktop(command) => {
            let client = remote::connect(&paths()?, global.server.as_deref())?;
            return remote::wait(remote::desktop(&client, command, output))?;
        }
        Command::Memory => {
            let client = remote::connect(&paths()?, global.server.as_deref())?;
            remote::wait(memory::show(&client, output))??;
        }
        Command::Net(command) => {
            let client = remote::connect(&paths()?, global.server.as_deref())?;
            remote::wait(net::run(&client, command, output))??;
        }
        Command::Flavour(command) => {
            let client = remote::connect(&paths()?, global.server.as_deref())?;
            remote::wait(flavour::run(&client, command, output))??;
        }
        Command::User(command) => {
            let client = remote::connect(&paths()?, global.server.as_deref())?;
            remote::wait(remote::user(&client, command, output))??;
        }
    }
    Ok(ExitCode::SUCCESS)
}
