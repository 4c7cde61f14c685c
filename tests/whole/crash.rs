//! The server may be killed at any instant: its desktops run on, and what was
//! half done is finished or gone once it is back.

use std::{
    io::{BufRead as _, BufReader},
    os::fd::OwnedFd,
    process::{Child, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use qvd_core::StartStep;
use qvd_demo::{Server, Setup};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::Deserialize;
use tokio::time::timeout;

use crate::harness::{Desktop, Host, SOON, browser, expect_ok, inside, on_a_host, remove_user, run, user_with_desktop};

/// How many moments of a start the server is killed at.
const MOMENTS: u32 = 12;

/// And of a stop.
const STOP_MOMENTS: u32 = 6;

#[derive(Debug, Deserialize)]
struct Shown {
    status: Status,
}

#[derive(Debug, Deserialize)]
struct Status {
    state: String,
}

pub(crate) fn state(server: &Server, desktop: u32) -> String {
    let shown: Shown = server.json(&["desktop", "show", &desktop.to_string()]).unwrap();
    shown.status.state
}

/// Servers whose desktops outlive them; a test that fails takes them down.
pub(crate) struct Lasting {
    setup: Setup,
}

impl Lasting {
    fn on(host: &Host) -> Self {
        Self::with(host, &[])
    }

    /// Those that have further arguments.
    pub(crate) fn with(host: &Host, arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        Self { setup: Setup { ephemeral: false, arguments, ..host.setup.clone() } }
    }

    pub(crate) fn start(&self) -> Server {
        self.setup.start().unwrap()
    }

    fn ephemeral(&self) -> Setup {
        Setup { ephemeral: true, ..self.setup.clone() }
    }
}

impl Drop for Lasting {
    fn drop(&mut self) {
        if thread::panicking() {
            drop(self.ephemeral().start());
        }
    }
}

pub(crate) fn start(server: &Server, desktop: u32) {
    expect_ok(&server.run(["desktop", "start", &desktop.to_string()]).unwrap());
}

/// When the desktop's first process began, and the shell in its terminal:
/// both differ in any other desktop, and after any restart.
fn identity(server: &Server, desktop: u32) -> String {
    let end = Instant::now() + SOON;
    loop {
        // The terminal starts when the window manager is up, and has other
        // children before its shell.
        let said = inside(server, desktop, "cut -d' ' -f22 /proc/1/stat; pgrep -P $(pgrep -o xterm) -x bash; true");
        if said.lines().count() == 2 {
            return said;
        }
        assert!(Instant::now() < end, "there is no shell in a terminal: {said:?}");
    }
}

/// Demands that a browser sees the desktop.
fn see(server: &Server, user: &str, desktop: u32) {
    run(async {
        let browser = browser(server, user).await;
        let mut display = timeout(SOON, browser.open(desktop, 1280, 800)).await.unwrap().unwrap();
        let painted = async {
            display.rfb.update(false).await.unwrap();
            while display.rfb.colours() < 16 {
                display.rfb.update(true).await.unwrap();
            }
        };
        timeout(SOON, painted).await.expect("the desktop was not seen in time");
        display.leave();
    });
}

/// The first process of a running desktop, from the record that the next
/// server would read.
pub(crate) fn first_process(host: &Host, desktop: u32) -> OwnedFd {
    let path = format!("/run/qvd-{}/desktops/{desktop}/record.json", host.instance);
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let machine = &record["machine"];
    let container = machine.get("container").unwrap_or_else(|| &machine["vm"]["container"]);
    let pid = i32::try_from(container["pid"].as_u64().unwrap()).unwrap();
    pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap()
}

pub(crate) fn has_ended(pidfd: &OwnedFd, limit: Duration) -> bool {
    let limit = Timespec::try_from(limit).unwrap();
    poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&limit)).unwrap() > 0
}

/// A start under way, and the news of it as they come.
pub(crate) fn starting(server: &Server, desktop: u32) -> (Child, mpsc::Receiver<String>) {
    let mut command = server.setup().command();
    command.args(["desktop", "start", &desktop.to_string()]).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    let (tell, told) = mpsc::channel();
    thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
    (child, told)
}

/// After a crash a desktop runs and can be seen, or is stopped and can be
/// started again. Leaves it stopped.
fn demand_whole_or_gone(server: &Server, user: &str, desktop: u32, when: &str) {
    let state = state(server, desktop);
    eprintln!("killed {when}: {state}");
    match &*state {
        "running" => {}
        "stopped" => start(server, desktop),
        other => panic!("killed {when}, the desktop is {other}"),
    }
    let _identity = identity(server, desktop);
    see(server, user, desktop);
    expect_ok(&server.run(["desktop", "stop", &desktop.to_string()]).unwrap());
}

#[test]
fn a_killed_server_leaves_its_desktops_and_finds_them_again() {
    on_a_host(|host| {
        let lasting = Lasting::on(host);
        let server = lasting.start();
        let (user, desktop) = user_with_desktop(&server);
        see(&server, &user, desktop);
        let before = identity(&server, desktop);
        let init = first_process(host, desktop);
        server.kill().unwrap();
        assert!(!has_ended(&init, Duration::ZERO), "the desktop ended with its server");

        let server = lasting.start();
        assert_eq!(state(&server, desktop), "running");
        assert_eq!(identity(&server, desktop), before);
        see(&server, &user, desktop);
        remove_user(&server, &user);
        assert!(has_ended(&init, SOON), "the desktop was removed and runs on");
        server.stop().unwrap();
    });
}

#[test]
fn killed_in_the_middle_of_a_start_desktops_are_whole_or_gone() {
    on_a_host(|host| {
        let lasting = Lasting::on(host);
        let mut server = lasting.start();
        let (user, volatile) = user_with_desktop(&server);
        let persistent: Desktop = server.json(&["desktop", "create", &user, "icewm", "--persistent"]).unwrap();
        let desktops = [volatile, persistent.id];
        let again = |server: Server, desktop, when: &str| {
            server.kill().unwrap();
            let server = lasting.start();
            demand_whole_or_gone(&server, &user, desktop, when);
            server
        };

        let steps = [StartStep::Root, StartStep::Confinement, StartStep::Port, StartStep::Init, StartStep::Session];
        for (step, desktop) in steps.iter().flat_map(|step| desktops.map(|desktop| (step, desktop))) {
            let (mut client, news) = starting(&server, desktop);
            while news.recv_timeout(SOON).unwrap() != step.text() {}
            server = again(server, desktop, &format!("at {step:?}"));
            client.wait().unwrap();
        }

        // And at moments that no step marks.
        let (mut client, news) = starting(&server, volatile);
        news.recv_timeout(SOON).unwrap();
        let began = Instant::now();
        client.wait().unwrap();
        let whole = began.elapsed();
        expect_ok(&server.run(["desktop", "stop", &volatile.to_string()]).unwrap());
        for moment in 0..MOMENTS {
            let desktop = desktops[usize::from(moment % 2 == 1)];
            let (mut client, news) = starting(&server, desktop);
            news.recv_timeout(SOON).unwrap();
            let after = whole * moment / MOMENTS;
            thread::sleep(after);
            server = again(server, desktop, &format!("{after:?} after the first step"));
            client.wait().unwrap();
        }
        remove_user(&server, &user);
        server.stop().unwrap();
    });
}

#[test]
fn killed_in_the_middle_of_a_stop_desktops_are_gone_once_stopped_again() {
    on_a_host(|host| {
        let lasting = Lasting::on(host);
        let mut server = lasting.start();
        let (user, desktop) = user_with_desktop(&server);
        let id = desktop.to_string();
        start(&server, desktop);
        let began = Instant::now();
        expect_ok(&server.run(["desktop", "stop", &id]).unwrap());
        let whole = began.elapsed();
        for moment in 0..STOP_MOMENTS {
            start(&server, desktop);
            let init = first_process(host, desktop);
            let mut client = server.setup().command().args(["desktop", "stop", &id]).spawn().unwrap();
            let after = whole * moment / STOP_MOMENTS;
            thread::sleep(after);
            server.kill().unwrap();
            client.wait().unwrap();
            server = lasting.start();
            let found = state(&server, desktop);
            eprintln!("killed {after:?} after a stop began: {found}");
            // It runs on, perhaps on its way down, or nothing is left of it.
            assert!(["running", "stopped"].contains(&&*found), "{found}");
            expect_ok(&server.run(["desktop", "stop", &id]).unwrap());
            assert!(has_ended(&init, Duration::ZERO), "it was stopped and runs on");
            assert_eq!(state(&server, desktop), "stopped");
        }
        start(&server, desktop);
        see(&server, &user, desktop);
        remove_user(&server, &user);
        server.stop().unwrap();
    });
}

#[test]
fn a_desktop_that_ended_without_a_server_is_cleaned_up_by_the_next() {
    on_a_host(|host| {
        let lasting = Lasting::on(host);
        let server = lasting.start();
        let (user, desktop) = user_with_desktop(&server);
        start(&server, desktop);
        let init = first_process(host, desktop);
        server.kill().unwrap();
        pidfd_send_signal(&init, Signal::KILL).unwrap();
        assert!(has_ended(&init, SOON));

        let server = lasting.start();
        demand_whole_or_gone(&server, &user, desktop, "with its desktop");
        remove_user(&server, &user);
        server.stop().unwrap();
    });
}

#[test]
fn desktops_outlive_a_server_that_is_told_to_end_unless_it_is_ephemeral() {
    on_a_host(|host| {
        let lasting = Lasting::on(host);
        let server = lasting.start();
        let (user, desktop) = user_with_desktop(&server);
        start(&server, desktop);
        let before = identity(&server, desktop);
        let init = first_process(host, desktop);
        server.stop().unwrap();
        assert!(!has_ended(&init, Duration::ZERO), "the desktop ended with its server");

        let server = lasting.ephemeral().start().unwrap();
        assert_eq!(identity(&server, desktop), before);
        see(&server, &user, desktop);
        server.stop().unwrap();
        assert!(has_ended(&init, Duration::ZERO), "the desktop outlived an ephemeral server");

        let server = lasting.start();
        assert_eq!(state(&server, desktop), "stopped");
        remove_user(&server, &user);
        server.stop().unwrap();
    });
}
