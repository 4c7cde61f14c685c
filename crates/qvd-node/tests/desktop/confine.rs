//! What a desktop may do more or less than its image says, and desktops that do
//! not end when they are asked to.

use std::time::{Duration, Instant};

use qvd_core::{Calls, DesktopSpec, DesktopState, Device, Instance, Virtualizer};
use qvd_node::{ExecRequest, Exit, Host as _, HostErrorKind};
use rustix::process::{Pid, Signal, kill_process};

use crate::{RFB, SOON, cgroup_procs, greeting, on_a_host, run};

/// What the kernel says of it, by the version of cgroups that this host has.
fn limit_of_writing(instance: Instance, desktop: u32) -> String {
    let group = format!("{}/{desktop}", instance.cgroup_name());
    let v1 = std::fs::read_to_string(format!("/sys/fs/cgroup/blkio/{group}/blkio.throttle.write_bps_device"));
    v1.or_else(|_| std::fs::read_to_string(format!("/sys/fs/cgroup/{group}/io.max"))).unwrap()
}

#[test]
fn a_session_runs_as_an_application_with_a_device_that_its_image_does_not_name() {
    on_a_host(|host| {
        let (node, mut spec) = (host.open(), host.spec(1));
        spec.calls = Some(Calls::Application);
        spec.devices = [Device::Fuse].into();
        spec.limits.io = Some(qvd_core::Bytes::mib(200));
        node.ensure_running(&spec, &mut drop).unwrap();
        assert!(limit_of_writing(host.config.instance, 1).contains(&format!("{}", 200 << 20)));
        let display = node.attach(spec.id, RFB, &mut drop).unwrap();
        assert_eq!(greeting(display.stream()), "RFB 003.008\n");
        // A terminal on the session's screen, and in it another shell.
        let (exit, said) =
            run(&node, spec.id, false, "xterm -e sh -c 'echo from a terminal >/tmp/mark'; cat /tmp/mark");
        assert_eq!((exit, said.as_str()), (Exit::Code(0), "from a terminal\n"));
        let script = "unshare --user true 2>/dev/null && echo namespace; test -c /dev/fuse && echo fuse; test -e /dev/snd || echo silent";
        assert_eq!(run(&node, spec.id, false, script).1, "fuse\nsilent\n");
        node.stop(spec.id, Duration::from_secs(3)).unwrap();

        // As its image says, it may.
        let usual = DesktopSpec { calls: None, devices: [].into(), ..spec.clone() };
        node.ensure_running(&usual, &mut drop).unwrap();
        assert_eq!(run(&node, spec.id, false, script).1, "namespace\nsilent\n");
        node.remove(spec.id).unwrap();

        for refused in [
            DesktopSpec { calls: Some(Calls::System), ..usual.clone() },
            DesktopSpec { virtualizer: Virtualizer::Qemu, calls: Some(Calls::Application), ..usual.clone() },
            DesktopSpec { virtualizer: Virtualizer::Qemu, devices: [Device::Fuse].into(), ..usual },
        ] {
            let error = node.ensure_running(&refused, &mut drop).unwrap_err();
            assert_eq!(error.kind(), HostErrorKind::Unsupported, "{error}");
            node.remove(refused.id).unwrap();
        }
        node.shut_down(Duration::ZERO).unwrap();
    });
}

#[test]
fn an_init_that_stands_still_is_given_up_on_and_ended() {
    on_a_host(|host| {
        let (node, spec) = (host.open(), host.spec(1));
        node.ensure_running(&spec, &mut drop).unwrap();
        let pids = std::fs::read_to_string(cgroup_procs(host.config.instance, spec.id)).unwrap();
        let init = pids.lines().map(|line| line.parse().unwrap()).min().unwrap();
        kill_process(Pid::from_raw(init).unwrap(), Signal::STOP).unwrap();
        let began = Instant::now();
        let request = ExecRequest { argv: vec!["true".into()], env: [].into(), root: false, tty: None };
        let error = node.exec(spec.id, request).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::Timeout, "{error}");
        node.stop(spec.id, Duration::from_millis(200)).unwrap();
        assert!(began.elapsed() < 2 * SOON, "{:?}", began.elapsed());
        assert_eq!(node.status(spec.id).state, DesktopState::Stopped);
        // What it keeps on disk goes also once it has shut down.
        node.shut_down(Duration::ZERO).unwrap();
        node.remove(spec.id).unwrap();
    });
}
