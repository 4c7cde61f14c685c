//! A daemon whose host is a strict fake.

use std::{
    io::Write,
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::Arc,
};

use qvd_farm::{Database, Farm};
use qvd_gateway::api::{ApiState, UnixDoor, router};
use qvd_node::fake::FakeHost;
use serde_json::Value;
use tokio::{runtime::Runtime, sync::oneshot, task::JoinHandle};

/// A daemon of its own for each test; ends when dropped.
pub(crate) struct Daemon {
    pub(crate) host: Arc<FakeHost>,
    pub(crate) socket: PathBuf,
    stop: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
    runtime: Runtime,
    _dir: tempfile::TempDir,
}

impl Daemon {
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api.sock");
        let host = Arc::new(FakeHost::new());
        let runtime = Runtime::new().unwrap();
        let (stop, stopped) = oneshot::channel();
        let door = runtime.block_on(async {
            let farm =
                Farm::open(&Database::File(dir.path().join("qvd.sqlite")), Arc::clone(&host) as _).await.unwrap();
            (UnixDoor::bind(&socket).await.unwrap(), router(ApiState { farm }))
        });
        let task = runtime.spawn(async move {
            let until = async move { stopped.await.unwrap_or_default() };
            door.0.serve(door.1, until).await.unwrap();
        });
        Self { host, socket, stop: Some((stop, task)), runtime, _dir: dir }
    }

    pub(crate) fn run_with_input(&self, args: &[&str], input: &[u8]) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_qvd"))
            .arg("--server")
            .arg(&self.socket)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // Written beside the reading: a program that copies waits for both. One
        // that does not read its input may be gone already.
        std::thread::scope(|scope| {
            scope.spawn(move || drop(stdin.write_all(input)));
            child.wait_with_output().unwrap()
        })
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.run_with_input(args, b"")
    }

    /// What a command that succeeds prints.
    pub(crate) fn text(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.text(&[&["--json"], args].concat())).unwrap()
    }

    /// Status and only line of error of a command that fails.
    pub(crate) fn refusal(&self, args: &[&str]) -> (i32, String) {
        let output = self.run(args);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(text.starts_with("qvd: ") && text.ends_with('\n') && text.lines().count() == 1, "{args:?}: {text}");
        (output.status.code().unwrap(), text)
    }

    /// A daemon with user `ana` and her desktop 1.
    pub(crate) fn with_desktop() -> Self {
        let daemon = Self::start();
        daemon.text(&["user", "add", "ana", "--generate"]);
        assert_eq!(daemon.text(&["desktop", "create", "ana", "icewm"]), "1\n");
        daemon
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some((stop, task)) = self.stop.take() {
            // The task may have ended by a panic of its own, which fails the test.
            let _gone = stop.send(());
            self.runtime.block_on(task).unwrap();
        }
    }
}
