//! A program inside a desktop, with our standard streams as its own.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    env,
    io::{self, Read, Write},
    process::ExitCode,
    thread,
};

use anyhow::Context;
use qvd_gateway::api::{Client, ExecOutput, ExecReader, ExecWriter};
use qvd_guest::{ExecRequest, Exit};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
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
    let request =
        ExecRequest { argv: command.command, env: variables, root: command.as_root, tty: tty.then(terminal::size) };
    let (writer, reader) = client.exec(command.id, &request).await?;
    let raw = if tty && interactive { Some(Raw::enter().context("cannot set up the terminal")?) } else { None };
    // Before anybody can have seen output: from then on a signal is the program's.
    let sources = Sources::new(tty).context("cannot watch the terminal")?;
    let ended = tokio::select! {
        ended = output(reader) => ended,
        never = input(writer, sources) => match never {},
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
            // News that a later daemon may have, and nothing to print.
            _ => Ok(()),
        };
        written.context("cannot write the program's output")?;
    }
}

fn print(to: &mut dyn Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

/// Sends what is typed, the terminal's size and our signals, for ever.
async fn input(mut writer: ExecWriter, mut sources: Sources) -> Infallible {
    loop {
        let sent = match sources.next().await {
            Input::Bytes(bytes) if bytes.is_empty() => writer.end_stdin().await,
            Input::Bytes(bytes) => writer.stdin(&bytes).await,
            Input::Resized((rows, columns)) => writer.resize(rows, columns).await,
            Input::Signal(kind) => writer.signal(kind.as_raw_value()).await,
        };
        if let Err(error) = sent {
            // The program ended while we wrote, or the daemon did: the reader
            // learns which.
            tracing::debug!(%error, "input goes nowhere");
            return std::future::pending().await;
        }
    }
}

/// What goes to the program.
enum Input {
    /// Standard input; empty at its end.
    Bytes(Vec<u8>),
    Resized((u16, u16)),
    Signal(SignalKind),
}

struct Sources {
    tty: bool,
    stdin: Option<mpsc::Receiver<Vec<u8>>>,
    resized: Signal,
    interrupted: Signal,
    terminated: Signal,
    hung_up: Signal,
}

impl Sources {
    fn new(tty: bool) -> io::Result<Self> {
        Ok(Self {
            tty,
            stdin: Some(standard_input()?),
            resized: signal(SignalKind::window_change())?,
            interrupted: signal(SignalKind::interrupt())?,
            terminated: signal(SignalKind::terminate())?,
            hung_up: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Input {
        let stdin = &mut self.stdin;
        let bytes = async {
            match stdin {
                Some(stdin) => stdin.recv().await.unwrap_or_default(),
                None => std::future::pending().await,
            }
        };
        let input = tokio::select! {
            bytes = bytes => Input::Bytes(bytes),
            Some(()) = self.resized.recv(), if self.tty => Input::Resized(terminal::size()),
            Some(()) = self.interrupted.recv() => Input::Signal(SignalKind::interrupt()),
            Some(()) = self.terminated.recv() => Input::Signal(SignalKind::terminate()),
            Some(()) = self.hung_up.recv() => Input::Signal(SignalKind::hangup()),
        };
        if matches!(&input, Input::Bytes(bytes) if bytes.is_empty()) {
            self.stdin = None;
        }
        input
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
