//! Real desktops on a real image: what a node promises, and what it leaves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod commit;
mod confine;
mod full;
mod home;
mod machine;
mod tenants;
mod told;

use std::{
    collections::BTreeMap,
    error::Error as _,
    io::{BufRead as _, BufReader, Read as _},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use qvd_core::{
    DesktopId, DesktopSpec, DesktopState, DisplayKind, Geometry, Instance, Limits, NetPolicy, RootPolicy, StartStep,
    TenantName, Virtualizer,
};
use qvd_node::{
    EndReason, ExecRequest, ExecStdio, Exit, Host as _, HostErrorKind, ImageSummary, Node, NodeConfig, Swap,
};
use qvd_testkit::{Census, Need, Scope, privileged};

const NEEDS: &[Need] = &[Need::Root, Need::Env("QVD_TEST_STORE"), Need::Env("QVD_INIT")];
const SOON: Duration = Duration::from_secs(20);

/// The store takes one process at a time, and one test at a time here.
static STORE: Mutex<()> = Mutex::new(());

struct Host {
    config: NodeConfig,
    image: ImageSummary,
}

impl Host {
    fn open(&self) -> Arc<Node> {
        Node::open(self.config.clone()).unwrap()
    }

    fn spec(&self, number: u32) -> DesktopSpec {
        DesktopSpec {
            id: DesktopId::new(number).unwrap(),
            user: "alice".parse().unwrap(),
            tenant: TenantName::default(),
            hostname: format!("desk-{number}"),
            image: self.image.digest,
            virtualizer: Virtualizer::Container,
            root: RootPolicy::Volatile,
            limits: Limits::default(),
            net: NetPolicy::host_only(),
            devices: std::collections::BTreeSet::new(),
            calls: None,
            address: None,
            home: None,
        }
    }
}

/// Runs `test` in a network namespace of its own, on the shared store, and
/// demands that it leaves nothing.
fn on_a_host(test: impl FnOnce(&Host) + Send) {
    privileged(NEEDS, || {
        let _one = STORE.lock().unwrap_or_else(PoisonError::into_inner);
        let root = PathBuf::from(std::env::var_os("QVD_TEST_STORE").unwrap()).canonicalize().unwrap();
        let run = tempfile::tempdir().unwrap();
        let instance = Instance::of_root(run.path().as_os_str().as_encoded_bytes());
        let marks = [instance.bridge_name(), instance.cgroup_name(), run.path().display().to_string()];
        let scope = Scope::marked(marks).files_under(run.path());
        let scope =
            ["roots/overlayfs", "disks/qcow2", "home-disks"].iter().fold(scope, |s, dir| s.files_under(root.join(dir)));
        let netns = qvd_sys::netns::create().unwrap();
        let init = std::env::var_os("QVD_INIT").unwrap().into();
        let config = NodeConfig::new(&root, run.path(), init, instance);
        qvd_sys::netns::in_netns(netns.as_fd(), || {
            let images = {
                let node = Node::open(config.clone()).unwrap();
                let images = node.images().unwrap();
                node.shut_down(Duration::ZERO).unwrap();
                images
            };
            let image = images.into_iter().find(|image| image.flavour.as_str() == "icewm").expect("an icewm image");
            let before = Census::take(&scope);
            test(&Host { config, image });
            before.assert_unchanged();
        })
        .unwrap();
    });
}

fn run(node: &Node, id: DesktopId, root: bool, script: &str) -> (Exit, String) {
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    let mut program = node.exec(id, ExecRequest { argv, env: BTreeMap::new(), root, tty: None }).unwrap();
    let ExecStdio::Pipes { stdin, stdout, .. } = program.stdio else { panic!("asked for pipes") };
    drop(stdin);
    let mut said = String::new();
    std::fs::File::from(stdout).read_to_string(&mut said).unwrap();
    (program.control.wait(SOON).unwrap(), said)
}

fn greeting(stream: &std::os::unix::net::UnixStream) -> String {
    stream.set_read_timeout(Some(SOON)).unwrap();
    let mut bytes = [0; 12];
    let mut stream = stream;
    stream.read_exact(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

const RFB: DisplayKind = DisplayKind::Rfb { geometry: Geometry::MIN };

#[test]
fn a_desktop_runs_confined_shows_itself_and_leaves_nothing() {
    on_a_host(|host| {
        let (node, spec) = (host.open(), host.spec(1));
        let mut steps = Vec::new();
        let timings = node.ensure_running(&spec, &mut |step| steps.push(step)).unwrap();
        assert_eq!(steps.first(), Some(&StartStep::Root));
        assert_eq!(steps.last(), Some(&StartStep::Session));
        assert!(timings.session_us >= timings.start_us);
        assert_eq!(node.status(spec.id).state, DesktopState::Running);

        let (exit, said) =
            run(&node, spec.id, false, "id -u; hostname; echo $DISPLAY; grep NoNewPrivs /proc/self/status");
        assert_eq!(exit, Exit::Code(0));
        assert_eq!(said, "1000\ndesk-1\n:1\nNoNewPrivs:\t1\n");
        assert_eq!(run(&node, spec.id, false, "exit 7").0, Exit::Code(7));
        let (_, range) = run(&node, spec.id, true, "cat /proc/self/uid_map");
        assert!(!range.split_whitespace().nth(1).unwrap().starts_with('0'), "root inside is root outside: {range}");

        let display = node.attach(spec.id, RFB, &mut drop).unwrap();
        assert_eq!(greeting(display.stream()), "RFB 003.008\n");
        // What kept the head until its client came may still be seen for a moment.
        let stats = std::iter::repeat_with(|| node.stats(spec.id).unwrap()).take(1000);
        let stats = stats.inspect(|_| std::thread::sleep(Duration::from_millis(10))).find(|stats| stats.clients == 1);
        assert!(stats.as_ref().is_some_and(|stats| stats.processes >= 4 && stats.pss_bytes > 0), "{stats:?}");

        // Asking again finds it running.
        node.ensure_running(&spec, &mut |step| panic!("{step:?} although it runs")).unwrap();
        node.stop(spec.id, Duration::from_secs(3)).unwrap();
        assert_eq!(node.status(spec.id).state, DesktopState::Stopped);
        assert_eq!(display.end_reason(), EndReason::Stopped);
        let gone =
            node.exec(spec.id, ExecRequest { argv: vec!["true".into()], env: BTreeMap::new(), root: false, tty: None });
        assert_eq!(gone.unwrap_err().kind(), HostErrorKind::NotRunning);
        node.remove(spec.id).unwrap();
        node.shut_down(Duration::ZERO).unwrap();
    });
}

#[test]
fn a_second_client_takes_over_and_the_first_is_told() {
    on_a_host(|host| {
        let (node, spec) = (host.open(), host.spec(2));
        node.ensure_running(&spec, &mut drop).unwrap();
        let first = node.attach(spec.id, RFB, &mut drop).unwrap();
        greeting(first.stream());
        let second = node.attach(spec.id, RFB, &mut drop).unwrap();
        let mut rest = Vec::new();
        first.stream().read_to_end(&mut rest).unwrap();
        assert_eq!(first.end_reason(), EndReason::TakenOver);
        assert_eq!(greeting(second.stream()), "RFB 003.008\n");
        assert_eq!(second.end_reason(), EndReason::Closed);
        node.remove(spec.id).unwrap();
        node.shut_down(Duration::ZERO).unwrap();
    });
}

#[test]
fn a_desktop_outlives_its_node_and_is_adopted() {
    on_a_host(|host| {
        let spec = host.spec(3);
        let node = host.open();
        node.ensure_running(&spec, &mut drop).unwrap();
        let (_, shell) = run(&node, spec.id, false, "echo here > /tmp/mark; cat /proc/1/stat | cut -d' ' -f22");
        drop(node);
        let node = host.open();
        assert_eq!(node.status(spec.id).state, DesktopState::Running);
        let (_, again) = run(&node, spec.id, false, "cat /tmp/mark; cat /proc/1/stat | cut -d' ' -f22");
        assert_eq!(again, format!("here\n{shell}"));
        let display = node.attach(spec.id, RFB, &mut drop).unwrap();
        assert_eq!(greeting(display.stream()), "RFB 003.008\n");
        node.remove(spec.id).unwrap();
        node.shut_down(Duration::ZERO).unwrap();
    });
}

#[test]
fn an_end_that_nobody_asked_for_is_noticed_and_cleaned() {
    on_a_host(|host| {
        let (node, spec) = (host.open(), host.spec(4));
        node.ensure_running(&spec, &mut drop).unwrap();
        let display = node.attach(spec.id, RFB, &mut drop).unwrap();
        // SIGKILL to process 1 from inside does nothing; from the host it ends all.
        let pids = std::fs::read_to_string(cgroup_procs(host.config.instance, spec.id)).unwrap();
        // Not the lowest number: the kernel begins again from below at times.
        let is_first = |pid: &&str| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.lines().any(|line| line.starts_with("NSpid:") && line.ends_with("\t1"))
        };
        let init: i32 = pids.lines().find(is_first).unwrap().parse().unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_raw(init).unwrap(), rustix::process::Signal::KILL)
            .unwrap();
        // The display ends with the desktop: that is the event to wait for.
        display.stream().set_read_timeout(Some(SOON)).unwrap();
        if let Err(error) = display.stream().read_to_end(&mut Vec::new()) {
            // So it ends when something that was sent had not been read.
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
        }
        let deadline = std::time::Instant::now() + SOON;
        while node.status(spec.id).state != DesktopState::Stopped {
            assert!(std::time::Instant::now() < deadline, "{:?}", node.status(spec.id));
            std::thread::yield_now();
        }
        assert!(node.status(spec.id).ended.unwrap().contains("signal 9"));
        node.remove(spec.id).unwrap();
        node.shut_down(Duration::ZERO).unwrap();
    });
}

#[test]
fn a_desktop_whose_programs_fork_without_end_is_ended() {
    on_a_host(|host| {
        // Few processes do as well as the usual thousand, and harm no other test.
        let mut spec = host.spec(3);
        spec.limits.pids = 48;
        let node = host.open();
        node.ensure_running(&spec, &mut drop).unwrap();
        let argv = ["perl", "-e", "while (1) { fork }"].map(str::to_owned).to_vec();
        let bomb = node.exec(spec.id, ExecRequest { argv, env: BTreeMap::new(), root: false, tty: None }).unwrap();
        let deadline = std::time::Instant::now() + 3 * SOON;
        while node.status(spec.id).state != DesktopState::Stopped {
            assert!(std::time::Instant::now() < deadline, "{:?}", node.status(spec.id));
            std::thread::park_timeout(Duration::from_millis(50));
        }
        let ended = node.status(spec.id).ended.unwrap();
        assert!(ended.contains("forking"), "{ended}");
        drop(bomb);
        node.ensure_running(&spec, &mut drop).unwrap();
        assert_eq!(run(&node, spec.id, false, "exit 3").0, Exit::Code(3), "the next start is as any other");
        node.remove(spec.id).unwrap();
        node.shut_down(Duration::ZERO).unwrap();
    });
}

#[test]
fn what_cannot_start_says_why_and_leaves_nothing() {
    on_a_host(|host| {
        let node = host.open();
        let unknown = DesktopSpec { image: qvd_core::Digest::new([7; 32]), ..host.spec(5) };
        let error = node.ensure_running(&unknown, &mut drop).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::NotFound, "{error}");

        let first = DesktopSpec { address: Some(address(host)), ..host.spec(6) };
        node.ensure_running(&first, &mut drop).unwrap();
        let second = DesktopSpec { address: first.address, ..host.spec(7) };
        let error = node.ensure_running(&second, &mut drop).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::Invalid, "{error}");
        assert!(error.source().is_some_and(|cause| cause.to_string().contains("desktop 6")), "{error:?}");
        assert_eq!(node.status(second.id).state, DesktopState::Stopped);
        node.remove(first.id).unwrap();
        node.remove(second.id).unwrap();
        node.shut_down(Duration::ZERO).unwrap();
    });
}

fn address(host: &Host) -> std::net::Ipv4Addr {
    std::net::Ipv4Addr::from_bits(host.config.network.subnet.gateway().to_bits() + 77)
}

/// Where the processes of a desktop are listed, under whichever version of
/// cgroups this host has.
fn cgroup_procs(instance: Instance, id: DesktopId) -> PathBuf {
    ["/sys/fs/cgroup/pids", "/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .iter()
        .flat_map(|mount| {
            let outer = Path::new(mount).join(instance.cgroup_name()).join(id.to_string());
            [outer.join("cgroup.procs"), outer.join("desktop/cgroup.procs")]
        })
        .find(|path| std::fs::read_to_string(path).is_ok_and(|text| !text.is_empty()))
        .expect("the cgroup of the desktop")
}

/// Whether the kernel holds all processes of a desktop, in either hierarchy.
fn stands_still(instance: Instance, id: DesktopId) -> bool {
    let tops = std::fs::read_dir("/sys/fs/cgroup").unwrap().map(|entry| entry.unwrap().path());
    let says = |path: PathBuf, text: &str| std::fs::read_to_string(path).is_ok_and(|state| state.contains(text));
    tops.chain([PathBuf::from("/sys/fs/cgroup")]).any(|top| {
        let group = top.join(instance.cgroup_name()).join(id.to_string());
        says(group.join("freezer.state"), "FROZEN") || says(group.join("cgroup.events"), "frozen 1")
    })
}

fn wait_for_rest(node: &Node, id: DesktopId) {
    let deadline = std::time::Instant::now() + 3 * SOON;
    while !node.status(id).resting {
        assert!(std::time::Instant::now() < deadline, "desktop {id} does not rest");
        std::thread::park_timeout(Duration::from_millis(100));
    }
}

#[test]
fn a_desktop_that_nobody_looks_at_stands_still_until_somebody_comes() {
    on_a_host(|host| {
        let (mut config, spec) = (host.config.clone(), host.spec(1));
        config.rest_after = Duration::ZERO;
        let still = || stands_still(config.instance, spec.id);
        let node = Node::open(config.clone()).unwrap();
        node.ensure_running(&spec, &mut drop).unwrap();
        assert!(!still());
        wait_for_rest(&node, spec.id);
        assert!(still());

        // Asking how it is does not wake it.
        assert!(node.stats(spec.id).unwrap().processes >= 4);
        assert!(still() && node.status(spec.id).resting);

        // A client does, and a program that somebody runs.
        let display = node.attach(spec.id, RFB, &mut drop).unwrap();
        assert!(!still() && !node.status(spec.id).resting);
        assert_eq!(greeting(display.stream()), "RFB 003.008\n");
        drop(display);
        wait_for_rest(&node, spec.id);
        assert_eq!(run(&node, spec.id, false, "exit 3").0, Exit::Code(3));
        assert!(!still());

        // The next node finds it at rest, and takes it over all the same.
        wait_for_rest(&node, spec.id);
        drop(node);
        assert!(still());
        let node = Node::open(config.clone()).unwrap();
        assert_eq!(node.status(spec.id).state, DesktopState::Running);
        assert!(!still());
        node.stop(spec.id, Duration::from_secs(3)).unwrap();
        node.remove(spec.id).unwrap();
        node.shut_down(Duration::ZERO).unwrap();
    });
}

#[test]
fn swap_is_made_once_found_again_and_taken_away() {
    privileged(&[Need::Root, Need::Path("/sys/class/zram-control/hot_add")], || {
        let swaps = || std::fs::read_to_string("/proc/swaps").unwrap();
        let before = swaps();
        let run = tempfile::tempdir().unwrap();
        let size = qvd_core::Bytes::mib(64);
        let Some(swap) = Swap::open(run.path(), size).unwrap() else {
            // This host swaps already: then nothing is added.
            assert!(before.lines().count() > 1);
            assert_eq!(swaps(), before);
            return;
        };
        assert_eq!(swaps().lines().count(), before.lines().count() + 1);
        // A daemon that ends leaves it to the next.
        drop(swap);
        let with = swaps();
        let mut swap = Swap::open(run.path(), size).unwrap().unwrap();
        assert_eq!(swaps(), with);
        swap.close().unwrap();
        swap.close().unwrap();
        assert_eq!(swaps(), before);
        assert_eq!(std::fs::read_dir(run.path()).unwrap().count(), 0);
        // Somebody else's swap is not ours to find.
        std::fs::write(run.path().join("zram"), "4242").unwrap();
        let mut other = Swap::open(run.path(), size).unwrap().unwrap();
        other.close().unwrap();
        assert_eq!(swaps(), before);
    });
}

/// What another program takes away of the rules cuts the desktop until it is back.
#[test]
fn a_desktop_is_cut_until_its_rules_are_back() {
    on_a_host(|host| {
        let (node, spec) = (host.open(), host.spec(1));
        node.ensure_running(&spec, &mut |_| {}).unwrap();
        let port = node.network(spec.id, &[]).unwrap().expect("it has a port");
        let mut monitor =
            Command::new("ip").args(["-o", "monitor", "link"]).stdout(Stdio::piped()).spawn().expect("ip, of iproute2");
        let lines = BufReader::new(monitor.stdout.take().unwrap()).lines();
        let (tell, told) = mpsc::channel();
        let listener = thread::spawn(move || lines.map_while(Result::ok).for_each(|line| drop(tell.send(line))));
        // Until the monitor listens, it hears nothing: so change something until it does.
        let of_port = |line: &str| line.contains(&format!("{}@", port.link)) && !line.contains("Deleted");
        let alias = |text: &str| {
            let status = Command::new("ip").args(["link", "set", &port.link, "alias", text]).status().unwrap();
            assert!(status.success());
        };
        let listens = (0..200).any(|number| {
            alias(&number.to_string());
            told.recv_timeout(SOON / 200).is_ok_and(|line| of_port(&line))
        });
        assert!(listens, "the monitor does not listen");

        assert!(Command::new("nft").args(["flush", "ruleset"]).status().unwrap().success());
        let hear = |state: &str| {
            let deadline = Instant::now() + SOON;
            loop {
                let line = told.recv_timeout(deadline.saturating_duration_since(Instant::now())).expect(state);
                if of_port(&line) && line.contains(state) {
                    return;
                }
            }
        };
        hear("state DOWN");
        hear("state UP");
        let shown = Command::new("nft").args(["list", "ruleset"]).output().unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        assert!(shown.contains(&port.ipv4.to_string()) && shown.contains("policy drop"), "{shown}");
        monitor.kill().unwrap();
        monitor.wait().unwrap();
        listener.join().unwrap();
        node.remove(spec.id).unwrap();
        node.shut_down(Duration::ZERO).unwrap();
    });
}
