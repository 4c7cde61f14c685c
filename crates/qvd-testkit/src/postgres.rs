//! A PostgreSQL server of a test's own.

#![expect(clippy::expect_used, reason = "a test that has no server has failed")]

use std::{
    fs, io,
    os::unix::{fs::chown, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// Where distributions keep the programs of each version.
const VERSIONS: &str = "/usr/lib/postgresql";

/// Who runs the server, which refuses to be run by root: an account that is everywhere.
const NOBODY: u32 = 65_534;

/// Longest wait for a server to answer.
const START: Duration = Duration::from_secs(60);

/// A server on a socket in a directory of its own, which nobody else reaches, without
/// passwords. Dropping it ends it.
#[derive(Debug)]
pub struct Postgres {
    programs: PathBuf,
    directory: TempDir,
    server: Child,
}

/// The programs of the newest version that is installed.
pub(crate) fn programs() -> Option<PathBuf> {
    let versions = fs::read_dir(VERSIONS).ok()?.filter_map(Result::ok);
    let mut found: Vec<_> =
        versions.map(|version| version.path().join("bin")).filter(|bin| bin.join("postgres").is_file()).collect();
    found.sort();
    found.pop()
}

impl Postgres {
    /// Makes and starts one.
    ///
    /// # Panics
    /// This is not root, PostgreSQL is not installed, or does not start.
    #[must_use]
    pub fn start() -> Self {
        let programs = programs().expect("PostgreSQL is installed");
        let directory = TempDir::new().expect("a directory for a database");
        chown(directory.path(), Some(NOBODY), Some(NOBODY)).expect("give a database's directory away");
        let made = as_nobody(&programs.join("initdb"), directory.path())
            .args(["--pgdata=data", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-sync"])
            .output()
            .expect("run initdb");
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let server = serve(&programs, directory.path()).expect("run postgres");
        let started = Self { programs, directory, server };
        started.answers();
        started
    }

    /// Makes an empty database unless there is one of this name, and returns its address.
    ///
    /// # Panics
    /// The server does not make it.
    #[must_use]
    pub fn database(&self, name: &str) -> String {
        if !self.asks("postgres", &format!("SELECT 1 FROM pg_database WHERE datname = '{name}'")).contains('1') {
            let _made = self.asks("postgres", &format!("CREATE DATABASE \"{name}\""));
        }
        format!("postgres://postgres@localhost/{name}?host={}", self.directory.path().display())
    }

    /// Has the server carry out a statement; returns what it answers, a line for each row.
    ///
    /// # Panics
    /// The server refuses it.
    #[must_use]
    pub fn asks(&self, database: &str, statement: &str) -> String {
        let host = format!("--host={}", self.directory.path().display());
        let answer = Command::new(self.programs.join("psql"))
            .args([&host, "--username=postgres", "--no-psqlrc", "--tuples-only", "--no-align", "--quiet"])
            .args(["--set=ON_ERROR_STOP=1", "--command", statement, database])
            .output()
            .expect("run psql");
        assert!(answer.status.success(), "{statement}: {}", String::from_utf8_lossy(&answer.stderr));
        String::from_utf8_lossy(&answer.stdout).into_owned()
    }

    /// Kills the server and starts it again, as after a power failure.
    ///
    /// # Panics
    /// It does not come back.
    pub fn crash(&mut self) {
        self.server.kill().and_then(|()| self.server.wait()).expect("kill postgres");
        // Its own processes notice that it is gone before another one can begin.
        let deadline = Instant::now() + START;
        loop {
            self.server = serve(&self.programs, self.directory.path()).expect("run postgres");
            thread::sleep(Duration::from_millis(200));
            if self.server.try_wait().expect("wait for postgres").is_none() {
                break;
            }
            assert!(Instant::now() < deadline, "postgres does not start again");
        }
        self.answers();
    }

    fn answers(&self) {
        let deadline = Instant::now() + START;
        let host = format!("--host={}", self.directory.path().display());
        let is_ready = || Command::new(self.programs.join("pg_isready")).args([&host, "--quiet"]).status();
        while !is_ready().expect("run pg_isready").success() {
            assert!(Instant::now() < deadline, "postgres does not answer");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // What it holds is thrown away with its directory.
        let _ended = self.server.kill().and_then(|()| self.server.wait());
    }
}

fn as_nobody(program: &Path, directory: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(directory).uid(NOBODY).gid(NOBODY).env_clear().env("LC_ALL", "C.UTF-8");
    command
}

fn serve(programs: &Path, directory: &Path) -> io::Result<Child> {
    as_nobody(&programs.join("postgres"), directory)
        .args(["-D", "data", "-h", "", "-c", "fsync=off", "-c", "max_connections=40"])
        .arg("-k")
        .arg(directory)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
}
