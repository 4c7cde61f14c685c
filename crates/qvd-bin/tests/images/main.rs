//! Commands about images: with a daemon and without one, and with a store that
//! speaks the protocol of S3.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

#[allow(dead_code)]
#[path = "../common/daemon.rs"]
mod daemon;
mod store;
mod trust;
mod verbs;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
};

use daemon::Daemon;
use qvd_storage::Repository;
use serde_json::Value;

/// Where commands are tried: an installation, and maybe a daemon that has its images.
struct World {
    dir: tempfile::TempDir,
    daemon: Option<Daemon>,
}

impl World {
    fn without_a_daemon() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir, daemon: None }
    }

    fn with_a_daemon() -> Self {
        let world = Self::without_a_daemon();
        let repository = Repository::open(&world.at("state/images")).unwrap();
        let daemon = Daemon::start();
        daemon.host.keep_images_in(Arc::new(repository));
        Self { daemon: Some(daemon), ..world }
    }

    /// One of each.
    fn both() -> [Self; 2] {
        [Self::without_a_daemon(), Self::with_a_daemon()]
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.at(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qvd"));
        command.current_dir(self.dir.path()).env_remove("QVD_ROOT").env_remove("QVD_SERVER").env("USER", "ana");
        match &self.daemon {
            // Its images are not those of --root: nothing happens behind its back.
            Some(daemon) => command.args(["--root", "nowhere", "--server"]).arg(&daemon.socket),
            None => command.args(["--root", "state"]),
        };
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command().arg("image").args(args).output().unwrap()
    }

    /// What a command that succeeds prints.
    fn text(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.text(&[args, &["--json"]].concat())).unwrap()
    }

    /// Status and only line of error of a command that fails.
    fn refusal(&self, args: &[&str]) -> (i32, String) {
        let output = self.run(args);
        let text = String::from_utf8(output.stderr).unwrap();
        let last = text.lines().last().unwrap_or_default().to_owned();
        assert!(last.starts_with("qvd: "), "{args:?}: {text}");
        (output.status.code().unwrap(), last)
    }

    /// Imports `tree`; the id of the commit.
    fn import(&self, message: &str) -> String {
        let made = self.json(&["import", "tree", "--flavour", "tiny", "-m", message]);
        made["id"].as_str().unwrap().to_owned()
    }
}

/// The file that a directory has first.
fn first_file(dir: &Path) -> PathBuf {
    let mut at = dir.to_path_buf();
    while at.is_dir() {
        at = fs::read_dir(&at).unwrap().next().unwrap().unwrap().path();
    }
    at
}

/// Turns a bit of a file around.
fn flip(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    bytes[0] ^= 1;
    fs::remove_file(file).unwrap();
    fs::write(file, bytes).unwrap();
}
