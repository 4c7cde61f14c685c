//! The same containers where cgroups are of version 2 alone.

use std::time::Duration;

use qvd_core::{Bytes, MilliCpu};
use qvd_testkit::in_bed;
use qvd_virt::Exit;

use crate::bed::{Bed, SOON};

#[test]
fn a_container_is_born_limited_frozen_and_killed_in_a_group_of_version_2() {
    in_bed(&qvd_testkit::Bed::new().limit(Duration::from_secs(150)), || {
        let bed = Bed::new();
        let mut spec = bed.spec(1, &["/bin/sh", "-c", "while :; do :; done"]);
        spec.limits.memory = Bytes::mib(64);
        spec.limits.cpu = MilliCpu(500);
        spec.limits.pids = 20;
        let mut container = bed.runtime.prepare(spec).unwrap().start().unwrap();
        let limits = container.enforced().unwrap().limits;
        let limit = |file: &str| limits.get(file).map(String::as_str);
        assert_eq!(limit("memory.max"), Some("67108864"), "{limits:?}");
        assert_eq!(limit("pids.max"), Some("20"));
        assert_eq!(limit("cpu.max"), Some("50000 100000"));
        let group = std::fs::read_to_string(format!("/proc/{}/cgroup", container.pid())).unwrap();
        assert_eq!(group.trim(), format!("0::/{}/1", bed.instance.cgroup_name()));

        let freezer = container.freezer().unwrap();
        freezer.freeze().unwrap();
        assert!(freezer.is_frozen().unwrap());
        let stood = container.cpu_time().unwrap();
        assert_eq!(container.cpu_time().unwrap(), stood);
        // A kill reaches what stands still.
        container.close().unwrap();
        assert_eq!(container.try_wait().unwrap(), Some(Exit::Signal(9)));
        bed.assert_empty();

        let bomb = "$n = 0; while (defined($p = fork)) { if (!$p) { sleep 600 } $n++ } print $n";
        let mut spec = bed.spec(2, &["/usr/bin/perl", "-e", bomb]);
        spec.limits.pids = 20;
        assert_eq!(bed.run_spec(spec), (Exit::Code(0), "19".to_owned()));
        let hog = "/usr/bin/perl -e '$x = \"a\" x (256 << 20); print \"had it\"'; echo status $?";
        let mut spec = bed.spec(3, &["/bin/sh", "-c", hog]);
        spec.limits.memory = Bytes::mib(32);
        assert!(bed.run_spec(spec).1.contains("status 137"));

        // A number is used again, in a group that kills nobody.
        for _ in 0..3 {
            let (mut again, input) = bed.waiting(1);
            drop(input);
            assert_eq!(again.wait(SOON).unwrap(), Some(Exit::Code(1)));
            again.close().unwrap();
        }
        bed.assert_empty();
    });
}
