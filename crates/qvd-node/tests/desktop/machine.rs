//! The same image as a virtual machine: what a container promises, it keeps too.

use std::time::Duration;

use qvd_core::{DesktopId, DesktopSpec, DesktopState, RootPolicy, StartStep, Virtualizer};
use qvd_node::{AccelChoice, EndReason, Exit, Host as _, HostErrorKind, Node, NodeConfig};
use qvd_testkit::{Need, bed_directory, privileged};

use super::{Host, RFB, greeting, on_a_host, run, stands_still, wait_for_rest};

/// As long as a boot by emulation takes on a host that does much else.
const BOOTS: Duration = Duration::from_secs(150);

fn config(host: &Host) -> NodeConfig {
    let mut config = host.config.clone();
    config.vm.kernel = Some(bed_directory().unwrap());
    config.vm.accel = AccelChoice::Tcg;
    config.session_limit = BOOTS;
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
