//! The test bed is what it says: another kernel, the same programs, a status.
#![allow(clippy::unwrap_used)]

use std::{fs, time::Duration};

use qvd_testkit::{Bed, Census, Need, Scope, in_bed, privileged};

#[test]
fn a_program_runs_in_the_bed_and_its_status_comes_back() {
    privileged(&[Need::Root, Need::Bed], || {
        let census = Census::take(&Scope::marked(["qvd-bed-"]));
        let ran =
            Bed::new().env("SAID", "it's").run(&["sh", "-c", "echo \"$SAID $1\"; echo bad >&2; exit 7", "-", "a 'b'"]);
        let ran = ran.unwrap();
        assert_eq!((ran.status, ran.stdout.as_str(), ran.stderr.as_str()), (7, "it's a 'b'\n", "bad\n"));
        // What it writes stays there.
        let ran =
            Bed::new().run(&["sh", "-c", "echo gone >/etc/qvd-bed-was-here && cat /etc/qvd-bed-was-here"]).unwrap();
        assert_eq!((ran.status, ran.stdout.as_str()), (0, "gone\n"));
        assert!(!fs::exists("/etc/qvd-bed-was-here").unwrap());
        let error = Bed::new().limit(Duration::from_secs(1)).run(&["true"]).unwrap_err();
        assert!(error.to_string().contains("was not done after 1 s"), "{error}");
        census.assert_unchanged();
    });
}

#[test]
fn a_test_finds_there_what_this_host_may_lack() {
    in_bed(&Bed::new().disk_mib(64), || {
        assert_eq!(fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), "bed\n");
        assert_eq!(fs::metadata("/dev/vda").map(|_| fs::read("/sys/block/vda/size").unwrap()).unwrap(), b"131072\n");
        // Version 2 of cgroups, with every controller.
        let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap();
        for controller in ["cpu", "memory", "io", "pids"] {
            assert!(controllers.split_whitespace().any(|has| has == controller), "{controllers}");
        }
        // Modules are loaded when they are asked for.
        for kind in ["btrfs", "xfs", "squashfs", "erofs", "fuse", "overlay"] {
            Need::Filesystem(kind).check().unwrap();
        }
        let thin = std::process::Command::new("/run/busybox").args(["modprobe", "dm-thin-pool"]).status().unwrap();
        assert!(thin.success());
    });
}
