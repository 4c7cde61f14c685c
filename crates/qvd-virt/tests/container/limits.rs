//! Limits and other protections, as they are read back and as a policy requires them.

use std::fs;

use qvd_core::Bytes;
use qvd_testkit::{Need, privileged};
use qvd_virt::{Error, Protection};

use crate::{
    bed::Bed,
    lifecycle::{NEEDS, whole},
};

#[test]
fn what_is_read_and_written_is_limited_and_all_that_is_required_is_enforced() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let mut spec = bed.spec(1, &["/bin/sh", "-c", "read line"]);
        let (theirs, _ours) = std::io::pipe().unwrap();
        spec.fds.push(qvd_virt::InheritedFd { number: 0, fd: theirs.into() });
        spec.limits.io = Some(Bytes::mib(8));
        spec.profile.require = Protection::ALL.into();
        let mut container = bed.runtime.prepare(spec).unwrap().start().unwrap();
        let enforced = container.enforced().unwrap();
        assert!(enforced.landlock && enforced.seccomp_filter);
        let limit = ["io.max", "blkio.throttle.write_bps_device"]
            .iter()
            .find_map(|file| enforced.limits.get(*file).filter(|text| !text.is_empty()))
            .expect("a limit of writing");
        assert!(limit.lines().all(|line| line.contains("8388608")), "{limit}");
        let record = container.detach().unwrap();
        container = bed.runtime.adopt(&record).unwrap().expect("it runs");
        assert!(container.enforced().unwrap().landlock, "also after an adoption");
        container.close().unwrap();

        // Without that limit, a policy that requires one is not met.
        let mut spec = bed.spec(1, &["/bin/sh", "-c", "true"]);
        spec.profile.require = [Protection::IoLimit].into();
        let error = bed.runtime.prepare(spec).unwrap().start().unwrap_err();
        assert!(matches!(error, Error::Weaker { .. }), "{error}");
        assert!(error.to_string().contains("a limit of reading and writing"), "{error}");
        bed.assert_empty();
    });
}

#[test]
fn when_the_host_has_no_process_left_one_hears_so_and_later_starts() {
    const GROUPS: &str = "/sys/fs/cgroup/pids";
    privileged(&[Need::Root, Need::UserNamespaces, Need::Cgroup, Need::Path(GROUPS)], || {
        let bed = Bed::new();
        let group = format!("{GROUPS}/qvd-test-{}", std::process::id());
        let before = fs::read_to_string("/proc/thread-self/cgroup").unwrap();
        let before = before.lines().find_map(|line| line.split_once(":pids:")).unwrap().1.to_owned();
        let spec = bed.spec(1, &["/bin/sh", "-c", "true"]);
        fs::create_dir(&group).unwrap();
        // This thread alone, which is all that there is room for.
        fs::write(format!("{group}/pids.max"), "1").unwrap();
        fs::write(format!("{group}/tasks"), "0").unwrap();
        let error = bed.runtime.prepare(spec).unwrap_err();
        fs::write(format!("{GROUPS}{before}/tasks"), "0").unwrap();
        fs::remove_dir(&group).unwrap();
        assert!(
            whole(&error).contains("cannot make the process: Resource temporarily unavailable"),
            "{}",
            whole(&error)
        );
        bed.sh(1, "true");
        bed.assert_empty();
    });
}

#[test]
fn in_a_container_without_room_for_a_process_programs_hear_so() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let try_twice = "print defined(my $p = fork) ? q(made) : $!+0; exit if defined $p && !$p";
        let mut spec = bed.spec(1, &["/usr/bin/perl", "-e", try_twice]);
        spec.limits.pids = 1;
        assert_eq!(bed.run_spec(spec).1, libc::EAGAIN.to_string());
        bed.assert_empty();
    });
}
