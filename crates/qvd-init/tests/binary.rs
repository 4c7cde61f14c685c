//! The program as whoever starts it sees it.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output, Stdio};

use qvd_testkit::{Need, privileged};

fn init(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qvd-init"));
    command.args(args).stdin(Stdio::null()).env_remove("DISPLAY");
    command
}

fn text(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn without_the_nodes_descriptors_it_says_so_and_ends() {
    let (code, _, error) = text(&init(&[]).output().unwrap());
    assert_eq!(code, Some(1));
    assert!(error.contains("cannot take over the descriptors of the node"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
}

#[test]
fn an_unknown_order_is_a_usage_error() {
    assert_eq!(init(&["dance"]).status().unwrap().code(), Some(2));
}

#[test]
fn a_display_over_the_network_is_refused() {
    let (code, _, error) = text(&init(&["watch"]).env("DISPLAY", "203.0.113.1:1").output().unwrap());
    assert_eq!(code, Some(1));
    assert!(error.contains("not a local one"), "{error}");
}

#[test]
fn a_program_runs_as_the_user_in_a_session_of_its_own() {
    privileged(&[Need::Root], || {
        let script = "id -u; id -g; id -G; pwd; ps -o sid= -p $$ | tr -d ' '; echo $$; grep SigBlk /proc/self/status";
        let output = init(&["enter", "65534", "65533", "4242,4243", "/usr", "", "sh", "-c", script]).output().unwrap();
        let (code, out, error) = text(&output);
        assert_eq!((code, error.as_str()), (Some(0), ""));
        let lines: Vec<_> = out.lines().collect();
        assert_eq!(lines[..4], ["65534", "65533", "65533 4242 4243", "/usr"]);
        assert_eq!(lines[4], lines[5], "it leads its session");
        assert!(lines[6].ends_with("0000000000000000"), "no signal is blocked: {}", lines[6]);
    });
}

#[test]
fn a_program_that_does_not_exist_ends_as_a_shell_says_it() {
    privileged(&[Need::Root], || {
        let (code, _, error) =
            text(&init(&["enter", "65534", "65534", "", "/", "", "no-such-program"]).output().unwrap());
        assert_eq!(code, Some(127));
        assert!(error.starts_with("cannot run `no-such-program`: "), "{error}");
    });
}

#[test]
fn a_user_that_is_none_never_becomes_root() {
    privileged(&[Need::Root], || {
        let refused = |args: &[&str]| {
            let output = init(&[&["enter"][..], args, &["/", "", "sh", "-c", "id -u"]].concat()).output().unwrap();
            let (code, out, error) = text(&output);
            assert_eq!((code, out.as_str()), (Some(127), ""), "{args:?}: {error}");
            assert!(error.starts_with("cannot run"), "{args:?}: {error}");
        };
        for none in ["", "-1", "4294967295", "4294967296", "0x0", "root", "1000:0", " 1", "1 "] {
            refused(&[none, "65534", ""]);
            refused(&["65534", none, ""]);
        }
        for none in ["4294967295", "-1", "tty"] {
            refused(&["65534", "65534", none]);
        }
        refused(&[]);
    });
}
