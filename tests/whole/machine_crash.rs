//! The server may be killed at any instant, also while machines are made and ended.

use std::{
    thread,
    time::{Duration, Instant},
};

use qvd_core::StartStep;
use qvd_demo::Server;
use qvd_testkit::{Need, bed_directory, privileged};

use crate::{
    crash::{Lasting, first_process, has_ended, start, starting, state},
    harness::{Host, PASSWORD, SOON, create_desktop, expect_ok, inside, on_a_host, remove_user},
};

/// How many clones stand ready.
const READY: usize = 2;

/// How long after the first step of a start the server is killed, while a kernel boots, and
/// after the beginning of a stop, in milliseconds.
const MOMENTS_MS: [u64; 2] = [0, 1500];
const MANY_MOMENTS_MS: [u64; 8] = [0, 200, 500, 1000, 2000, 4000, 8000, 16_000];

/// Processes that run machines of this host.
fn machines(host: &Host) -> Vec<u32> {
    let group = format!("/{}/", host.instance.cgroup_name());
    let pids = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid: u32 = entry.unwrap().file_name().to_str()?.parse().ok()?;
        let about = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).ok();
        let ours = about("cgroup")?.contains(&group) && about("comm")?.starts_with("qemu");
        ours.then_some(pid)
    });
    pids.collect()
}

fn wait_for_machines(host: &Host, count: usize) {
    let end = Instant::now() + SOON;
    while machines(host).len() != count {
        assert!(Instant::now() < end, "{:?} are not {count}", machines(host));
        thread::sleep(Duration::from_millis(50));
    }
}

fn stop(server: &Server, desktop: u32) {
    expect_ok(&server.run(["desktop", "stop", &desktop.to_string()]).unwrap());
    assert_eq!(state(server, desktop), "stopped");
}

/// Kills servers at steps and moments of a machine's life.
fn kill_at(moments_ms: &[u64], steps: &[StartStep]) {
    privileged(&[Need::Bed], || {
        let kernel = bed_directory().unwrap().display().to_string();
        let ready = READY.to_string();
        on_a_host(|host| {
            let arguments = ["--vm-kernel", &kernel, "--accel", "tcg", "--vm-disk", "2G", "--vm-pool", &ready];
            let lasting = Lasting::with(host, &[&arguments[..], &["--vm-templates"]].concat());
            let mut server = lasting.start();
            let user = format!("machine-crash-{}", std::process::id());
            server.add_user(&user, PASSWORD).unwrap();
            let born = create_desktop(&server, &user, &["--virtualizer", "qemu"]);
            let booted = create_desktop(&server, &user, &["--virtualizer", "qemu", "--persistent"]);

            // While it is made, or a template for it, nothing is left of either.
            let moments = moments_ms.iter().map(|&ms| (StartStep::Init, ms));
            let both = steps.iter().map(|&step| (step, 0)).chain(moments);
            for ((step, ms), desktop) in both.zip([born, booted].into_iter().cycle()) {
                let (mut client, news) = starting(&server, desktop);
                while news.recv_timeout(SOON).unwrap() != step.text() {}
                thread::sleep(Duration::from_millis(ms));
                server.kill().unwrap();
                client.wait().unwrap();
                server = lasting.start();
                let found = state(&server, desktop);
                eprintln!("killed {ms} ms after {step:?} of {desktop}: {found}");
                match &*found {
                    "stopped" => {}
                    // Its session was about to come: whoever killed it was late.
                    "running" => stop(&server, desktop),
                    other => panic!("the desktop is {other}"),
                }
                assert_eq!(machines(host), Vec::<u32>::new(), "killed {ms} ms after {step:?}");
            }

            // One that runs is found again; those that stood ready are nobody's.
            start(&server, born);
            wait_for_machines(host, 1 + READY);
            let process = first_process(host, born);
            inside(&server, born, "echo here > /tmp/mark");
            server.kill().unwrap();
            assert_eq!(machines(host).len(), 1 + READY);
            server = lasting.start();
            assert_eq!(state(&server, born), "running");
            assert_eq!(machines(host).len(), 1);
            assert_eq!(inside(&server, born, "cat /tmp/mark"), "here\n");

            // While it is ended, it runs on, or nothing is left of it.
            for &ms in moments_ms {
                let mut client = server.setup().command().args(["desktop", "stop", &born.to_string()]).spawn().unwrap();
                thread::sleep(Duration::from_millis(ms));
                server.kill().unwrap();
                client.wait().unwrap();
                server = lasting.start();
                let found = state(&server, born);
                eprintln!("killed {ms} ms after a stop began: {found}");
                match &*found {
                    "running" => {}
                    "stopped" => {
                        assert!(has_ended(&process, Duration::ZERO) && machines(host).is_empty());
                        break;
                    }
                    other => panic!("the desktop is {other}"),
                }
            }
            stop(&server, born);
            assert!(has_ended(&process, Duration::ZERO), "it was stopped and runs on");
            remove_user(&server, &user);
            server.stop().unwrap();
        });
    });
}

#[test]
fn killed_while_a_machine_is_made_and_ended_it_is_found_again_or_gone() {
    kill_at(&MOMENTS_MS, &[StartStep::Confinement, StartStep::Port]);
}

#[test]
#[ignore = "takes a minute and more: two machines at every step, and more moments"]
fn killed_at_each_step_and_at_many_moments_machines_are_found_again_or_gone() {
    let steps = [StartStep::Root, StartStep::Confinement, StartStep::Port, StartStep::Init];
    kill_at(&MANY_MOMENTS_MS, &steps.map(|step| [step; 2]).concat());
}
