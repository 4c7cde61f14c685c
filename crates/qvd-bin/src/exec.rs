//! A program inside a desktop, with our standard streams as its own.

use std::{
    collections::BTreeMap,
    env,
    io::{self, Read, Write},
    process::ExitCode,
    thread,
};

use anyhow::Context;
use qvd_gateway::api::{Client, ExecInput, ExecOutput, ExecReader, ExecWriter};
use qvd_guest::{ExecRequest, Exit};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::{
    cli,
    terminal::{self, Raw},
};

/// Bytes read from standard input at once.
const CHUNK: usize = 16 * 1024;

/// Chunks of standard input that wait for the desktop before we stop reading.
const QUEUE: usize = 4;

/// Runs the program to its end and takes its status for ours.
pub(crate) async fn run(client: &Client, command: cli::Exec) -> anyhow::Result<ExitCode> {
    let interactive = terminal::is_interactive();
    let tty = command.tty || (interactive && !command.no_tty);
    let mut variables: BTreeMap<String, String> = BTreeMap::new();
    if tty {
        variables.extend(env::var("TERM").ok().map(|term| ("TERM".to_owned(), term)));
    }
    variables.extend(command.env);
    let request = ExecRequest {
        argv: command.command,
        env: variables,
        root: command.as_root,
        tty: tty.then(terminal::size),
    };
    let (writer, reader) = client.exec(command.id, &request).await?;
    let raw = if tty && interactive { Some(Raw::enter().context("cannot set up the terminal")?) } else { None };
    let ended = tokio::select! {
        ended = output(reader) => ended,
        error = input(writer, tty) => Err(error),
    };
    // Before anything is printed about what went wrong.
    drop(raw);
    Ok(status(ended?))
}

/// As a shell has it: 128 and the signal's number for who dies of one.
fn status(exit: Exit) -> ExitCode {
    let status = match exit {
        Exit::Code(code) => code,
        Exit::Signal(signal) => 128 + signal,
    };
    // Exit statuses have eight bits; what does not fit is a failure all the same.
    u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from)
}

async fn output(mut reader: ExecReader) -> anyhow::Result<Exit> {
    loop {
        let written = match reader.next().await? {
            ExecOutput::Stdout(bytes) => print(&mut io::stdout(), &bytes),
            ExecOutput::Stderr(bytes) => print(&mut io::stderr(), &bytes),
            ExecOutput::Exit(exit) => return Ok(exit),
        };
        written.context("cannot write the program's output")?;
    }
}

fn print(to: &mut dyn Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

/// Sends what is typed, the terminal's size and our signals, until it fails.
async fn input(mut writer: ExecWriter, tty: bool) -> anyhow::Error {
    match send_all(&mut writer, tty).await {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

async fn send_all(writer: &mut ExecWriter, tty: bool) -> anyhow::Result<std::convert::Infallible> {
    let cannot = "cannot watch for signals";
    let mut resized = signal(SignalKind::window_change()).context(cannot)?;
    // On a terminal these arrive as keys.
    let mut interrupted = signal(SignalKind::interrupt()).context(cannot)?;
    let mut terminated = signal(SignalKind::terminate()).context(cannot)?;
    let mut hung_up = signal(SignalKind::hangup()).context(cannot)?;
    let mut stdin = Some(standard_input().context("cannot read standard input")?);
    loop {
        let next = tokio::select! {
            chunk = async { match &mut stdin { Some(stdin) => stdin.recv().await, None => std::future::pending().await } } => {
                let chunk = chunk.unwrap_or_default();
                if chunk.is_empty() {
                    stdin = None;
                }
                ExecInput::Stdin(chunk)
            }
            Some(()) = resized.recv(), if tty => {
                let (rows, columns) = terminal::size();
                ExecInput::Resize { rows, columns }
            }
            Some(()) = interrupted.recv() => ExecInput::Signal(SignalKind::interrupt().as_raw_value()),
            Some(()) = terminated.recv() => ExecInput::Signal(SignalKind::terminate().as_raw_value()),
            Some(()) = hung_up.recv() => ExecInput::Signal(SignalKind::hangup().as_raw_value()),
        };
        writer.send(next).await?;
    }
}

/// Chunks of standard input; an empty one is its end. A thread of its own,
/// because a read of a terminal cannot be given up: it ends with the process.
fn standard_input() -> io::Result<mpsc::Receiver<Vec<u8>>> {
    let (tell, told) = mpsc::channel(QUEUE);
    thread::Builder::new().name("stdin".to_owned()).spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = vec![0; CHUNK];
        loop {
            let read = match stdin.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // A terminal that went away has no more to say.
                Err(_) => 0,
                Ok(read) => read,
            };
            if tell.blocking_send(buffer[..read].to_vec()).is_err() || read == 0 {
                return;
            }
        }
    })?;
    Ok(told)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_that_of_a_shell() {
        let shown = |exit| format!("{:?}", status(exit));
        assert_eq!(shown(Exit::Code(0)), format!("{:?}", ExitCode::SUCCESS));
        assert_eq!(shown(Exit::Code(7)), format!("{:?}", ExitCode::from(7)));
        assert_eq!(shown(Exit::Signal(9)), format!("{:?}", ExitCode::from(137)));
        assert_eq!(shown(Exit::Code(-1)), format!("{:?}", ExitCode::FAILURE));
    }
}
