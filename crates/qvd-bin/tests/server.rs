//! The commands against a daemon whose host is a strict fake.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "common/daemon.rs"]
mod daemon;

use std::process::Command;

use daemon::Daemon;
use qvd_guest::Exit;
use qvd_node::{
    HostError, HostErrorKind,
    fake::{Op, Script},
};
use serde_json::Value;

#[test]
fn a_user_is_added_with_a_password_from_a_pipe_and_removed() {
    let daemon = Daemon::start();
    let output = daemon.run_with_input(&["user", "add", "ana", "--password-stdin"], b"correct horse\n");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!String::from_utf8_lossy(&output.stdout).contains("horse"));

    let users = daemon.json(&["user", "ls"]);
    assert_eq!((&users[0]["name"], &users[0]["admin"]), (&"ana".into(), &false.into()));
    assert!(daemon.text(&["user", "admin", "ana"]).contains("user ana administers the farm"));
    assert_eq!(daemon.json(&["user", "ls"])[0]["admin"], true);
    assert_eq!(daemon.json(&["user", "admin", "ana", "--revoke"])["admin"], false);
    assert_eq!(daemon.json(&["user", "ls"])[0]["admin"], false);
    assert_eq!(daemon.refusal(&["user", "admin", "bob"]).0, 4);
    let (status, text) = daemon.refusal(&["user", "add", "ana", "--generate"]);
    assert!(status == 5 && text.contains("ana"), "{status} {text}");

    assert!(daemon.text(&["user", "rm", "ana"]).contains("removed"));
    assert_eq!(daemon.json(&["user", "ls"]), Value::Array(vec![]));
    assert_eq!(daemon.refusal(&["user", "rm", "ana"]).0, 4);
}

#[test]
fn a_generated_password_is_shown_once() {
    let daemon = Daemon::start();
    let shown = daemon.json(&["user", "add", "ana", "--generate"]);
    let password = shown["password"].as_str().unwrap();
    assert!(password.len() >= 16, "{password}");
    assert!(!daemon.text(&["--json", "user", "ls"]).contains(password));
    let again = daemon.json(&["user", "passwd", "ana", "--generate"]);
    assert_ne!(again["password"].as_str().unwrap(), password);
}

#[test]
fn an_empty_password_is_refused() {
    let daemon = Daemon::start();
    let (status, text) = daemon.refusal(&["user", "add", "ana", "--password-stdin"]);
    assert!(status == 2 && text.contains("empty"), "{status} {text}");
}

#[test]
fn a_desktop_goes_through_its_life() {
    let daemon = Daemon::with_desktop();
    let table = daemon.text(&["desktop", "ls"]);
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["ID", "USER", "NAME", "FLAVOUR", "STATE", "CLIENT"]);
    assert_eq!((rows[1][0], rows[1][1], rows[1][3], rows[1][4]), ("1", "ana", "icewm", "stopped"));

    let started = daemon.run(&["desktop", "start", "1"]);
    assert!(started.status.success());
    assert!(String::from_utf8_lossy(&started.stderr).contains("Starting the session"), "{started:?}");
    assert_eq!(daemon.json(&["desktop", "show", "1"])["status"]["state"], "running");
    assert!(daemon.text(&["desktop", "show", "1"]).contains("state      running"));

    assert_eq!(daemon.text(&["desktop", "stop", "1"]), "desktop 1 stopped\n");
    assert_eq!(daemon.text(&["desktop", "rm", "1"]), "desktop 1 removed\n");
    assert_eq!(daemon.host.removed().len(), 1);
    assert_eq!(daemon.refusal(&["desktop", "show", "1"]).0, 4);
}

#[test]
fn a_desktop_is_made_as_asked() {
    let daemon = Daemon::start();
    daemon.text(&["user", "add", "ana", "--generate"]);
    let line = "desktop create ana icewm --name work --memory 512M --pids 99 --persistent --isolated";
    let desktop = daemon.json(&line.split(' ').collect::<Vec<_>>());
    assert_eq!(desktop["name"], "work");
    assert_eq!(desktop["limits"]["memory"], 512 << 20);
    assert_eq!(desktop["limits"]["pids"], 99);
    // What was not named keeps the flavour's default.
    assert_eq!(desktop["limits"]["cpu"], 2000);
    assert_eq!(desktop["root"], "persistent");
    assert_eq!(desktop["net"], serde_json::json!({ "port": true, "internet": false }));
    assert_eq!((&desktop["devices"], &desktop["calls"]), (&Value::Null, &Value::Null));

    let line = "desktop create ana icewm --device sound --device fuse --calls application --io 50M";
    let desktop = daemon.json(&line.split(' ').collect::<Vec<_>>());
    assert_eq!(desktop["devices"], serde_json::json!(["fuse", "sound"]));
    assert_eq!(desktop["calls"], "application");
    assert_eq!(desktop["limits"]["io"], 50 << 20);
    let shown = daemon.text(&["desktop", "show", "2"]);
    for line in ["devices    fuse, sound", "calls      application", "disks      50MiB a second"] {
        assert!(shown.contains(line), "no `{line}` in:\n{shown}");
    }
    for (option, value, says) in
        [("--device", "tape", "one of fuse, dri, sound, camera"), ("--calls", "all", "desktop, application or system")]
    {
        let output = daemon.run(&["desktop", "create", "ana", "icewm", option, value]);
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains(says), "{output:?}");
    }
    let (_, error) = daemon.refusal(&["desktop", "create", "ana", "icewm", "--io", "4K"]);
    assert!(error.contains("too little"), "{error}");
    let (_, error) = daemon.refusal(&["desktop", "create", "ana", "icewm", "--calls", "system"]);
    assert!(error.contains("own init"), "{error}");
}

#[test]
fn what_does_not_exist_has_status_4() {
    let daemon = Daemon::with_desktop();
    for args in [
        &["desktop", "create", "ana", "nothing"][..],
        &["desktop", "create", "bob", "icewm"],
        &["desktop", "start", "77"],
        &["desktop", "exec", "77", "true"],
        &["user", "passwd", "bob", "--generate"],
    ] {
        assert_eq!(daemon.refusal(args).0, 4, "{args:?}");
    }
}

#[test]
fn a_failed_start_says_why_with_the_status_of_its_cause() {
    let daemon = Daemon::with_desktop();
    let fail =
        |kind| daemon.host.fail_next(Op::EnsureRunning, HostError::because(kind, "cannot make its root", "disk full"));
    for (kind, expected) in [(HostErrorKind::Failed, 1), (HostErrorKind::Unsupported, 3), (HostErrorKind::Busy, 5)] {
        fail(kind);
        let output = daemon.run(&["desktop", "start", "1"]);
        assert_eq!(output.status.code(), Some(expected));
        let text = String::from_utf8(output.stderr).unwrap();
        let last = text.lines().last().unwrap();
        assert!(last.starts_with("qvd: cannot start desktop 1") && last.ends_with("disk full"), "{text}");
    }
    fail(HostErrorKind::Failed);
    let output = daemon.run(&["--json", "desktop", "start", "1"]);
    let error: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(error["error"]["exit"], 1);
}

#[test]
fn the_status_of_a_program_is_ours() {
    let daemon = Daemon::with_desktop();
    daemon.text(&["desktop", "start", "1"]);
    let say = |exit| Script::Say { stdout: b"out\n".to_vec(), stderr: b"err\n".to_vec(), exit };
    for (exit, status) in [(Exit::Code(0), 0), (Exit::Code(7), 7), (Exit::Signal(15), 143)] {
        daemon.host.script(say(exit));
        let output = daemon.run(&["desktop", "exec", "1", "--", "whatever", "--json"]);
        assert_eq!(output.status.code(), Some(status));
        assert_eq!((&output.stdout[..], &output.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
    }
}

#[test]
fn input_reaches_a_program_and_so_does_its_end() {
    let daemon = Daemon::with_desktop();
    daemon.text(&["desktop", "start", "1"]);
    daemon.host.script(Script::Echo);
    // More than a pipe holds, and bytes that are no text.
    let input: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    let output = daemon.run_with_input(&["desktop", "exec", "1", "cat"], &input);
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stdout == input, "{} of {} bytes came back", output.stdout.len(), input.len());
}

#[test]
fn images_are_built_by_the_daemon_and_listed() {
    let daemon = Daemon::start();
    let recipe = daemon.socket.with_file_name("lxde.toml");
    daemon.host.add_recipe(&recipe, "lxde".parse().unwrap());
    let built = daemon.json(&["image", "build", recipe.to_str().unwrap()]);
    assert_eq!(built["flavour"], "lxde");
    let table = daemon.text(&["image", "ls"]);
    assert!(table.lines().any(|line| line.starts_with("lxde")), "{table}");
    assert_eq!(daemon.refusal(&["image", "build", "/nonexistent.toml"]).0, 4);
}

#[test]
fn flavours_are_listed_set_and_reset() {
    let daemon = Daemon::start();
    let before = daemon.json(&["flavour", "show", "icewm"]);
    let table = daemon.text(&["flavour", "ls"]);
    assert!(table.lines().any(|line| line.starts_with("icewm") && line.contains("internet")), "{table}");
    let policy = daemon.socket.with_file_name("net.toml");
    std::fs::write(&policy, "port = true\ndestinations = [\"192.0.2.0/24 tcp 443\"]\n").unwrap();
    let set = ["flavour", "set", "icewm", "--memory", "256M", "--root-policy", "persistent", "--net-policy"];
    let shown = daemon.text(&[&set[..], &[policy.to_str().unwrap()]].concat());
    for line in ["memory     at most 256MiB", "root       persistent", "to 192.0.2.0/24 tcp 443"] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    let after = daemon.json(&["flavour", "show", "icewm"]);
    assert_eq!(after["defaults"]["limits"]["pids"], before["defaults"]["limits"]["pids"]);
    assert_eq!(daemon.json(&["flavour", "reset", "icewm"]), before);

    let (status, said) = daemon.refusal(&["flavour", "set", "kde", "--pids", "50"]);
    assert!(status == 4 && said.contains("kde"), "{status}: {said}");
    assert_eq!(daemon.run(&["flavour", "set", "icewm"]).status.code(), Some(2));
    assert_eq!(daemon.refusal(&["flavour", "set", "icewm", "--memory", "1M"]).0, 2);
}

#[test]
fn an_url_is_refused_in_words() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_qvd")).args(["--server", "https://farm:8443", "user", "ls"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("unix socket"));
}
