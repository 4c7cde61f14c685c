//! Programs run inside from the command line: how they end, what signals reach them,
//! and that their terminal is as large as ours.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Instant,
};

use qvd_demo::Server;
use rustix::{
    process::{Pid, Signal, kill_process},
    pty::OpenptFlags,
    termios::{Winsize, tcgetattr, tcsetwinsize},
};

use crate::harness::{SOON, expect_ok, inside, on_a_host, remove_user, user_with_desktop};

fn command(server: &Server, desktop: u32, how: &str, script: &str) -> Command {
    let mut command = server.setup().command();
    command.args(["desktop", "exec", how, &desktop.to_string(), "--", "sh", "-c", script]);
    command
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_raw(child.id().try_into().unwrap()).unwrap(), signal).unwrap();
}

fn statuses_are_those_of_the_program(server: &Server, desktop: u32) {
    let status = |script: &str| command(server, desktop, "-T", script).output().unwrap();
    for (script, code) in [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137), ("kill $$", 143)] {
        assert_eq!(status(script).status.code(), Some(code), "{script}");
    }
    let both = status("echo out; echo err >&2; exit 3");
    assert_eq!((both.stdout.as_slice(), both.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    let id = desktop.to_string();
    let absent = server.run(["desktop", "exec", "-T", &id, "--", "no-such-program"]).unwrap();
    assert_eq!(absent.status.code(), Some(127));
    assert!(String::from_utf8_lossy(&absent.stderr).contains("cannot run `no-such-program`"), "{absent:?}");
}

fn signals_reach_the_program(server: &Server, desktop: u32) {
    for (number, name) in [(Signal::TERM, "TERM"), (Signal::INT, "INT"), (Signal::HUP, "HUP")] {
        let script = format!("trap 'echo got {name}; exit 5' {name}; echo ready; while :; do sleep 0.1; done");
        let mut child = command(server, desktop, "-T", &script).stdout(Stdio::piped()).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        signal(&child, number);
        output.read_to_string(&mut line).unwrap();
        assert_eq!(line, format!("ready\ngot {name}\n"));
        assert_eq!(child.wait().unwrap().code(), Some(5), "{name}");
    }
    // Whoever ends without a word leaves no program behind. The shell is to write
    // nothing of its own, a sleep that was hung up for one: nobody reads it any more.
    let script = "exec 2>/dev/null; trap 'echo gone >/tmp/gone; exit' HUP; echo ready; while :; do sleep 0.1; done";
    let mut child = command(server, desktop, "-T", script).stdout(Stdio::piped()).spawn().unwrap();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let began = Instant::now();
    while inside(server, desktop, "cat /tmp/gone 2>/dev/null; true") != "gone\n" {
        assert!(began.elapsed() < SOON, "the program goes on");
    }
}

/// A terminal of ours, with what is written to it.
struct Terminal {
    ours: File,
    theirs: OwnedFd,
    heard: mpsc::Receiver<String>,
    all: String,
}

impl Terminal {
    fn open() -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags).unwrap();
        rustix::pty::grantpt(&master).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let theirs = rustix::pty::ioctl_tiocgptpeer(&master, flags).unwrap();
        let ours = File::from(master);
        let (mut from, (tell, heard)) = (ours.try_clone().unwrap(), mpsc::channel());
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(read @ 1..) = from.read(&mut bytes) {
                if tell.send(String::from_utf8_lossy(&bytes[..read]).into_owned()).is_err() {
                    return;
                }
            }
        });
        Self { ours, theirs, heard, all: String::new() }
    }

    fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.theirs, size).unwrap();
    }

    fn wait_for(&mut self, what: &str) {
        while !self.all.contains(what) {
            match self.heard.recv_timeout(SOON) {
                Ok(more) => self.all.push_str(&more),
                Err(error) => panic!("{error} for `{what}`: {:?}", self.all),
            }
        }
    }
}

fn a_terminal_is_as_large_as_ours_and_passes_keys(server: &Server, desktop: u32) {
    let mut terminal = Terminal::open();
    terminal.resize(30, 100);
    let modes = |terminal: &Terminal| {
        let found = tcgetattr(terminal.theirs.as_fd()).unwrap();
        (found.input_modes, found.output_modes, found.local_modes)
    };
    let before = modes(&terminal);
    let stdio = || Stdio::from(terminal.theirs.try_clone().unwrap());
    let script = "tty; trap 'stty size' WINCH; trap 'echo interrupted; exit 9' INT; stty size; echo ready;
        while :; do sleep 0.1; done";
    let mut child =
        command(server, desktop, "-t", script).stdin(stdio()).stdout(stdio()).stderr(stdio()).spawn().unwrap();
    terminal.wait_for("ready");
    assert!(terminal.all.contains("/dev/pts/") && terminal.all.contains("30 100"), "{:?}", terminal.all);
    terminal.resize(41, 123);
    // The kernel tells the foreground of a terminal that it controls; this is none's.
    signal(&child, Signal::WINCH);
    terminal.wait_for("41 123");
    terminal.ours.write_all(b"\x03").unwrap();
    terminal.wait_for("interrupted");
    assert_eq!(child.wait().unwrap().code(), Some(9));
    assert_eq!(modes(&terminal), before, "the terminal is as it was");
}

#[test]
fn a_program_run_inside_ends_hears_and_shows_itself_as_one_run_here() {
    on_a_host(|host| {
        let server = host.setup.start().unwrap();
        let (user, desktop) = user_with_desktop(&server);
        expect_ok(&server.run(["desktop", "start", &desktop.to_string()]).unwrap());
        statuses_are_those_of_the_program(&server, desktop);
        signals_reach_the_program(&server, desktop);
        a_terminal_is_as_large_as_ours_and_passes_keys(&server, desktop);
        remove_user(&server, &user);
        server.stop().unwrap();
    });
}
