//! Machines come, are driven and go.

use std::{fs, path::Path, time::Duration};

use qvd_virt::{
    Error, Exit,
    vm::{Down, Memory, StopLimits, StoppedBy, VmState},
};

use crate::bed::{SOON, wait_for, with_bed};

#[test]
fn a_machine_is_confined_driven_adopted_and_leaves_nothing() {
    with_bed(|bed| {
        // Nothing of it runs before it is resumed.
        let kernel = bed.kernel(Path::new("/bin/true"));
        let spec = bed.spec(1, &kernel);
        let vm = bed.qemu.start(spec).unwrap();
        assert_eq!(vm.state(), VmState::Waiting);

        let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_ascii_whitespace().next().unwrap().to_owned()
        };
        assert_ne!(field("Uid:"), "0");
        for set in ["CapEff:", "CapPrm:", "CapBnd:", "CapAmb:"] {
            assert_eq!(field(set), "0000000000000000", "{set}");
        }
        assert_eq!(field("NoNewPrivs:"), "1");
        // One of ours, one of QEMU's own.
        assert_eq!((field("Seccomp:").as_str(), field("Seccomp_filters:").as_str()), ("2", "2"));
        let seen = format!("/proc/{}/root", vm.pid());
        assert!(!Path::new(&seen).join("usr/bin").exists() && !Path::new(&seen).join("etc").exists());
        let links = fs::read_to_string(format!("/proc/{}/net/dev", vm.pid())).unwrap();
        assert_eq!(links.lines().count(), 3, "only the loopback interface: {links}");
        let listens = fs::read_to_string(format!("/proc/{}/net/tcp", vm.pid())).unwrap();
        assert_eq!(listens.lines().count(), 1, "{listens}");

        // As after a restart of the node.
        let record = vm.detach().unwrap();
        let mut vm = bed.qemu.adopt(&record).unwrap().unwrap();
        assert_eq!(vm.state(), VmState::Waiting);
        vm.resume().unwrap();
        assert_eq!(vm.state(), VmState::Running);
        vm.pause().unwrap();
        assert_eq!(vm.state(), VmState::Paused);

        // Its first instructions do not hear a button.
        let limits = StopLimits { guest: Duration::ZERO, button: Duration::ZERO };
        assert_eq!(vm.stop(limits, || false).unwrap(), StoppedBy::Kill);
        assert_eq!(vm.wait(SOON).unwrap(), Some(Exit::Code(0)));
        vm.close().unwrap();
        vm.close().unwrap();
        assert!(bed.qemu.adopt(&record).unwrap().is_none());
    });
}

#[test]
fn a_guest_whose_first_process_ends_is_down_by_panic() {
    with_bed(|bed| {
        let kernel = bed.kernel(Path::new("/bin/true"));
        let mut vm = bed.qemu.start(bed.spec(2, &kernel)).unwrap();
        vm.resume().unwrap();
        wait_for(&mut vm, |state| matches!(state, VmState::Down(_)));
        assert!(matches!(vm.state(), VmState::Down(Down::Panic | Down::Guest)), "{:?}", vm.state());
        assert_eq!(vm.wait(SOON).unwrap(), Some(Exit::Code(0)));
        vm.close().unwrap();
    });
}

#[test]
fn what_qemu_refuses_is_said_in_its_words_and_nothing_is_left() {
    with_bed(|bed| {
        let kernel = bed.kernel(Path::new("/bin/true"));
        let mut spec = bed.spec(3, &kernel);
        spec.memory = Memory::Saved(fs::File::open("/dev/null").unwrap().into());
        let error = bed.qemu.start(spec).unwrap_err();
        assert!(matches!(error, Error::Hypervisor { .. }), "{error:?}");
        assert!(error.to_string().contains("guest RAM"), "{error}");

        // Killed from outside, as by the OOM killer.
        let mut vm = bed.qemu.start(bed.spec(3, &kernel)).unwrap();
        vm.resume().unwrap();
        vm.container().kill().unwrap();
        wait_for(&mut vm, |state| state == VmState::Down(Down::Lost));
        assert_eq!(vm.wait(SOON).unwrap(), Some(Exit::Signal(9)));
        assert!(vm.pause().is_err());
        vm.close().unwrap();
    });
}
