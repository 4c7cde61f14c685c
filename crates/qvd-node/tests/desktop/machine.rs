//! The same image as a virtual machine: what a container promises, it keeps too.

use std::time::Duration;

use qvd_core::{DesktopId, DesktopSpec, DesktopState, RootPolicy, StartStep, Virtualizer};
use qvd_node::{AccelChoice, EndReason, Exit, Host as _, HostErrorKind, Node, NodeConfig};
use qvd_testkit::{Need, bed_directory, privileged};

use super::{Host, RFB, greeting, on_a_host, run, stands_still, wait_for_rest};

fn config(host: &Host) -> NodeConfig {
    let mut config = host.config.clone();
    config.vm.kernel = Some(bed_directory().unwrap());
    config.vm.accel = AccelChoice::Tcg;
    config
}

fn machine(host: &Host, number: u32) -> DesktopSpec {
    DesktopSpec { virtualizer: Virtualizer::Qemu, root: RootPolicy::Persistent, ..host.spec(number) }
}

fn said(node: &Node, id: DesktopId, script: &str) -> String {
    let (exit, said) = run(node, id, false, script);
    assert_eq!(exit, Exit::Code(0), "{script}: {said}");
    said
}

fn with_machines(test: impl FnOnce(&Host) + Send) {
    privileged(&[Need::Bed], || on_a_host(test));
}

#[test]
fn the_same_image_runs_as_a_machine_is_adopted_and_keeps_its_home() {
    with_machines(|host| {
        let (mut config, spec) = (config(host), machine(host, 1));
        let id = spec.id;
        let node = Node::open(config.clone()).unwrap();
        let mut steps = Vec::new();
        node.ensure_running(&spec, &mut |step| steps.push(step)).unwrap();
        assert_eq!(steps.first(), Some(&StartStep::Root));
        assert_eq!(steps.last(), Some(&StartStep::Session));

        // The image's programs on a kernel of its own, as the image's user.
        let host_kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let about = said(&node, id, "id -u; hostname; uname -r; cat /sys/class/net/eth0/address; ls -A ~ | wc -l");
        let lines: Vec<_> = about.lines().collect();
        assert_eq!(lines[..2], ["1000", "desk-1"], "{about}");
        assert_ne!(lines[2], host_kernel);
        let port = node.network(id, &[]).unwrap().expect("it has a port");
        assert_eq!(lines[3], port.mac.to_string());
        assert!(lines[4].parse::<u32>().unwrap() > 0, "the skeleton is in the new home: {about}");
        let heard = said(&node, id, &format!("ip -4 -o addr show eth0 2>/dev/null || hostname -I; echo {}", port.ipv4));
        assert!(heard.contains(&port.ipv4.to_string()), "{heard}");
        let stats = node.stats(id).unwrap();
        assert!(stats.memory.is_some_and(|memory| memory.total > 900 << 20), "{stats:?}");

        let display = node.attach(id, RFB, &mut drop).unwrap();
        assert_eq!(greeting(display.stream()), "RFB 003.008\n");
        said(&node, id, "echo kept > ~/mark; echo here > /tmp/mark; sync");
        let (exit, _) = run(&node, id, true, "echo system > /etc/mark; sync");
        assert_eq!(exit, Exit::Code(0));

        // The node dies; the machine runs on, even at rest, and is taken over.
        drop(display);
        drop(node);
        config.rest_after = Duration::ZERO;
        let node = Node::open(config.clone()).unwrap();
        assert_eq!(node.status(id).state, DesktopState::Running);
        assert_eq!(said(&node, id, "cat /tmp/mark"), "here\n");
        wait_for_rest(&node, id);
        assert!(stands_still(config.instance, id));
        drop(node);
        let node = Node::open(config).unwrap();
        assert_eq!(node.status(id).state, DesktopState::Running);
        let display = node.attach(id, RFB, &mut drop).unwrap();
        assert_eq!(greeting(display.stream()), "RFB 003.008\n");

        // What was written is there after a stop; what was in memory is not.
        node.stop(id, Duration::from_secs(10)).unwrap();
        assert_eq!(display.end_reason(), EndReason::Stopped);
        assert_eq!(node.status(id).state, DesktopState::Stopped);
        node.ensure_running(&spec, &mut |_| {}).unwrap();
        assert_eq!(said(&node, id, "cat ~/mark /etc/mark; test ! -e /tmp/mark"), "kept\nsystem\n");
        node.remove(id).unwrap();
        node.shut_down(Duration::ZERO).unwrap();
    });
}

/// What tells a machine from others, as its programs see it, once it has its
/// place in the network.
fn who(node: &Node, id: DesktopId) -> Vec<String> {
    let script = "until hostname -I | grep -q '[0-9]'; do sleep 0.2; done; hostname -I; hostname; cat /etc/machine-id \
                  /proc/sys/kernel/random/uuid /sys/class/net/eth0/address";
    said(node, id, script).lines().map(|line| line.trim().to_owned()).collect()
}

#[test]
fn machines_born_from_a_template_are_others_and_have_homes_of_their_own() {
    with_machines(|host| {
        let mut config = config(host);
        config.vm.templates = true;
        let [one, other] = [1, 2].map(|number| DesktopSpec { root: RootPolicy::Volatile, ..machine(host, number) });
        let node = Node::open(config.clone()).unwrap();
        node.ensure_running(&one, &mut |_| {}).unwrap();
        // The second start has a template: no kernel boots.
        node.ensure_running(&other, &mut |_| {}).unwrap();
        for spec in [&one, &other] {
            assert_eq!(
                said(&node, spec.id, "cat /sys/block/vd*/serial").trim(),
                "qvd-home",
                "its system is in its memory"
            );
        }

        let seen = [who(&node, one.id), who(&node, other.id)];
        for (first, second) in seen[0].iter().zip(&seen[1]) {
            assert_ne!(first, second, "{seen:?}");
        }
        for (spec, about) in [&one, &other].into_iter().zip(&seen) {
            let port = node.network(spec.id, &[]).unwrap().expect("it has a port");
            assert_eq!(about[..2], [port.ipv4.to_string(), spec.hostname.to_string()], "{about:?}");
            assert_eq!(about[4], port.mac.to_string());
            let display = node.attach(spec.id, RFB, &mut drop).unwrap();
            assert_eq!(greeting(display.stream()), "RFB 003.008\n");
        }
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let clock: u64 = said(&node, one.id, "date +%s").trim().parse().unwrap();
        assert!(clock.abs_diff(now) < 60, "its clock says {clock}, the host's {now}");

        // Programs of the session began in the home that is the desktop's own.
        let script = "home=$(stat -Lc %d:%i ~); for dir in /proc/[0-9]*; do [ \"$(cat $dir/comm 2>/dev/null)\" = icewm ] && \
                      stat -Lc %d:%i $dir/cwd; done | sort -u; echo $home; ls -A ~ | wc -l";
        let places = said(&node, one.id, script);
        let places: Vec<_> = places.lines().collect();
        assert_eq!(places[0], places[1], "{places:?}");
        assert_ne!(places[2], "0", "the skeleton is in the new home");

        // The node dies: a clone is taken over as well.
        said(&node, one.id, "echo kept > ~/mark; echo here > /tmp/mark; sync");
        run(&node, one.id, true, "echo system > /etc/mark; sync");
        drop(node);
        let node = Node::open(config).unwrap();
        assert_eq!(said(&node, one.id, "cat ~/mark /tmp/mark"), "kept\nhere\n");
        node.stop(one.id, Duration::from_secs(10)).unwrap();
        node.ensure_running(&one, &mut |_| {}).unwrap();
        assert_eq!(said(&node, one.id, "cat ~/mark; test ! -e /etc/mark; test ! -e /tmp/mark"), "kept\n");
        for spec in [&one, &other] {
            node.remove(spec.id).unwrap();
        }
        node.shut_down(Duration::ZERO).unwrap();
    });
}

#[test]
fn a_machine_that_cannot_be_says_why_and_leaves_nothing() {
    with_machines(|host| {
        let spec = machine(host, 2);
        let refused = |config: NodeConfig, spec: &DesktopSpec| {
            let node = Node::open(config).unwrap();
            let error = node.ensure_running(spec, &mut |_| {}).unwrap_err();
            assert_eq!(node.status(spec.id).state, DesktopState::Stopped);
            node.remove(spec.id).unwrap();
            node.shut_down(Duration::ZERO).unwrap();
            (error.kind(), qvd_core::causes(&error).join(": "))
        };
        let home = tempfile::tempdir().unwrap();
        let elsewhere = DesktopSpec { home: Some(home.path().into()), ..spec.clone() };
        let (kind, error) = refused(config(host), &elsewhere);
        assert_eq!(kind, HostErrorKind::Unsupported, "{error}");
        assert!(error.contains("home on a disk of its own"), "{error}");

        let mut without = config(host);
        without.vm.kernel = Some(home.path().into());
        let (kind, error) = refused(without, &spec);
        assert_eq!(kind, HostErrorKind::Unsupported, "{error}");
        assert!(error.contains("--vm-kernel") && error.contains(&home.path().display().to_string()), "{error}");

        // What is wished for falls back; what is required does not.
        let mut strict = config(host);
        strict.vm.accel = AccelChoice::Kvm;
        let node = Node::open(strict).unwrap();
        match node.ensure_running(&spec, &mut |_| {}) {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.kind(), HostErrorKind::Unsupported, "{error}");
                let error = qvd_core::causes(&error).join(": ");
                assert!(error.contains("/dev/kvm"), "{error}");
            }
        }
        node.remove(spec.id).unwrap();
        node.shut_down(Duration::ZERO).unwrap();
    });
}
