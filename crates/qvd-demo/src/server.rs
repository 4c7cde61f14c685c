//! A server of our own: `qvd up` as a child, and the command to talk to it.

use std::{
    ffi::OsStr,
    io::{BufRead as _, BufReader, Write as _},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::mpsc,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use serde::de::DeserializeOwned;

/// How long `qvd up` may take to say that it listens.
const READY: Duration = Duration::from_secs(30);

/// How long it may take to end after SIGTERM, with all its desktops.
const END: Duration = Duration::from_secs(60);

/// Where the programs are and where the server keeps things.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The command `qvd`.
    pub qvd: PathBuf,
    /// The static init for desktops.
    pub init: PathBuf,
    /// Directory for state, as `--root` takes it.
    pub root: PathBuf,
    /// Address to listen on; port 0 takes a free one.
    pub listen: String,
    /// Whether desktops end with the server.
    pub ephemeral: bool,
    /// Further arguments of `qvd up`.
    pub arguments: Vec<String>,
    /// Socket of who manages it as a service, if anybody does.
    pub manager: Option<PathBuf>,
    /// File for what the server logs; `None` is our own standard error.
    pub log: Option<PathBuf>,
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    setup: Setup,
    child: Option<Child>,
    url: String,
}

impl Setup {
    /// The command with the global options that lead to this server.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.qvd);
        command.arg("--root").arg(&self.root).stdin(Stdio::null());
        command
    }

    /// Starts the server and waits until it listens.
    ///
    /// # Errors
    /// It ended, or did not say within half a minute that it listens; what it
    /// said on standard error went to ours.
    pub fn start(&self) -> anyhow::Result<Server> {
        let mut command = self.command();
        command.args(["--json", "up", "--listen", &self.listen, "--init"]).arg(&self.init).args(&self.arguments);
        if self.ephemeral {
            command.arg("--ephemeral");
        }
        command.envs(self.manager.iter().map(|socket| ("NOTIFY_SOCKET", socket)));
        if let Some(log) = &self.log {
            command.stderr(std::fs::File::create(log).with_context(|| format!("cannot create `{}`", log.display()))?);
        }
        let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start `qvd up`")?;
        let stdout = child.stdout.take().context("`qvd up` has no standard output")?;
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stdout).lines();
            // Nobody may be listening any more; the rest is read all the same,
            // so that the server never waits for its output to be read.
            let _gone = tell.send(lines.next());
            lines.for_each(drop);
        });
        let mut server = Server { setup: self.clone(), child: Some(child), url: String::new() };
        let line = told.recv_timeout(READY).context("`qvd up` did not say in time that it listens")?;
        let Some(line) = line else { bail!("`qvd up` ended: {}", server.wait()?) };
        let ready: serde_json::Value = serde_json::from_str(&line?).context("`qvd up` said something unexpected")?;
        ready["url"].as_str().context("`qvd up` did not say its address")?.clone_into(&mut server.url);
        Ok(server)
    }
}

impl Server {
    /// Address for browsers: `https://HOST:PORT`.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The programs and directories it was started with.
    #[must_use]
    pub const fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Process id of `qvd up`.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Runs a command against this server to its end.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn run<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> anyhow::Result<Output> {
        self.setup.command().args(args).output().context("cannot run `qvd`")
    }

    /// Runs a command with `--json` and reads what it prints.
    ///
    /// # Errors
    /// It failed; the error holds what it said.
    pub fn json<T: DeserializeOwned>(&self, args: &[&str]) -> anyhow::Result<T> {
        let output = self.setup.command().arg("--json").args(args).output().context("cannot run `qvd`")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`qvd {}` failed: {said}", args.join(" "));
        serde_json::from_slice(&output.stdout).with_context(|| format!("`qvd {}` printed no JSON", args.join(" ")))
    }

    /// Adds a user with a password that only its standard input sees.
    ///
    /// # Errors
    /// It failed; the error holds what it said.
    pub fn add_user(&self, name: &str, password: &str) -> anyhow::Result<()> {
        let mut child = self
            .setup
            .command()
            .args(["user", "add", name, "--password-stdin"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("no standard input")?.write_all(password.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "cannot add user: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Kills the server as a crash would: no chance to clean up.
    ///
    /// # Errors
    /// It was gone already.
    pub fn kill(mut self) -> anyhow::Result<()> {
        let mut child = self.child.take().context("the server is gone")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Ends the server in good order.
    ///
    /// # Errors
    /// It did not end in time, or said that something went wrong.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.terminate()?;
        let status = self.wait()?;
        ensure!(status.success(), "`qvd up` ended with {status}");
        Ok(())
    }

    /// Waits for an interrupt from the keyboard, then ends the server in good
    /// order. A terminal interrupts the server too; hearing it twice is fine.
    ///
    /// # Errors
    /// As [`Server::stop`].
    pub fn stop_at_interrupt(self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(tokio::signal::ctrl_c())?;
        self.stop()
    }

    fn terminate(&self) -> anyhow::Result<()> {
        let child = self.child.as_ref().context("the server is gone")?;
        let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw).context("no process id")?;
        Ok(rustix::process::kill_process(pid, rustix::process::Signal::TERM)?)
    }

    /// Waits for its end on a pidfd, so that the wait has a deadline.
    fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut child = self.child.take().context("the server is gone")?;
        let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw).context("no process id")?;
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
        let limit = Timespec::try_from(END)?;
        if poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit))? == 0 {
            child.kill()?;
            child.wait()?;
            bail!("`qvd up` did not end within {END:?} and was killed");
        }
        Ok(child.wait()?)
    }
}

impl Drop for Server {
    /// Ends the server when a test or the demonstration fails half-way.
    fn drop(&mut self) {
        if self.child.is_some() && (self.terminate().is_err() || self.wait().is_err()) {
            // Already gone, or killed by the wait: nothing is left to do.
            self.child = None;
        }
    }
}
