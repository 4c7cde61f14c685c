//! What a person or a script meets: exit status, one line of error, output.
#![allow(clippy::unwrap_used, missing_docs)]

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

fn qvd(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qvd"))
        .args(args)
        .env_remove("QVD_ROOT")
        .env_remove("QVD_SERVER")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn is_one_line(text: &str) -> bool {
    text.ends_with('\n') && text.matches('\n').count() == 1
}

#[test]
fn help_and_version_are_no_errors() {
    for args in [&["--help"][..], &["desktop", "--help"], &["--version"], &["help", "up"]] {
        let output = qvd(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn a_wrong_command_line_has_status_2() {
    for args in [&[][..], &["fly"], &["desktop", "start", "seven"], &["up", "--listen", "here"]] {
        let output = qvd(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn a_program_gets_its_errors_as_json() {
    let output = qvd(&["--json", "desktop", "start", "seven"]);
    assert_eq!(output.status.code(), Some(2));
    let text = stderr(&output);
    assert!(is_one_line(&text), "{text}");
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["error"]["exit"], 2);
    assert_eq!(json["error"]["kind"], "usage");
    assert!(json["error"]["message"].as_str().unwrap().contains("seven"), "{json}");
}

#[test]
fn without_a_daemon_a_command_says_where_it_looked() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock");
    let output = qvd(&["--server", socket.to_str().unwrap(), "desktop", "ls"]);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(is_one_line(&text) && text.starts_with("qvd: cannot "), "{text}");
    assert!(text.contains(socket.to_str().unwrap()) && text.contains("qvd up"), "{text}");
}

#[test]
fn man_pages_and_completions_know_the_commands() {
    let dir = tempfile::tempdir().unwrap();
    assert!(qvd(&["man", dir.path().to_str().unwrap()]).status.success());
    let page = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
    assert!(page("qvd.1").contains("Exit status"));
    assert!(page("qvd-desktop-exec.1").contains("NAME=VALUE"));
    for shell in ["bash", "zsh", "fish"] {
        let output = qvd(&["completions", shell]);
        assert!(output.status.success());
        assert!(String::from_utf8(output.stdout).unwrap().contains("passwd"), "{shell}");
    }
    let output = qvd(&["man", "/proc/nowhere"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(is_one_line(&stderr(&output)), "{}", stderr(&output));
}

#[test]
fn a_reader_that_left_is_no_error() {
    let (ours, theirs) = std::io::pipe().unwrap();
    drop(ours);
    let mut child = Command::new(env!("CARGO_BIN_EXE_qvd"))
        .args(["completions", "bash"])
        .stdout(theirs)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn the_manual_of_every_command_says_what_it_does() {
    let dir = tempfile::tempdir().unwrap();
    assert!(qvd(&["man", dir.path().to_str().unwrap()]).status.success());
    let names = |dir: &Path| fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let pages = names(dir.path());
    assert!(pages.len() > 15, "{pages:?}");
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        assert!(text.contains(" \\- "), "{} has no summary", page.display());
    }
}
