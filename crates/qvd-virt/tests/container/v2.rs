//! The same containers where cgroups are of version 2 alone.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::{fd::AsFd as _, unix::fs::chown},
    path::PathBuf,
    process::Command,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use qvd_core::{Bytes, MilliCpu};
use qvd_sys::mount::{clone_tree, open_dir_path};
use qvd_testkit::{copy_program, in_bed};
use qvd_virt::{Container, ContainerMount, Exit, InheritedFd};
use rustix::time::ClockId;

use crate::bed::{Bed, SOON, listen};

/// Has the guest do something that is not of the product.
fn host(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

#[test]
fn a_container_is_born_limited_frozen_and_killed_in_a_group_of_version_2() {
    let machine = qvd_testkit::Bed::new().disk_mib(64).disk_mib(32).limit(Duration::from_secs(170));
    in_bed(&machine, || {
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
        waits_do_not_follow_the_clock(&bed);
        a_frozen_container_gives_back_what_it_keeps(&bed);
        a_disk_is_written_as_fast_as_allowed(&bed);
        bed.assert_empty();
    });
}

/// Whoever sets the clock neither ends a wait nor makes it longer.
fn waits_do_not_follow_the_clock(bed: &Bed) {
    let (mut container, input) = bed.waiting(2);
    let (stop, stopped) = mpsc::channel::<()>();
    let stepper = thread::spawn(move || {
        let mut by = 86_400;
        while stopped.recv_timeout(Duration::from_millis(50)) == Err(mpsc::RecvTimeoutError::Timeout) {
            let mut now = rustix::time::clock_gettime(ClockId::Realtime);
            now.tv_sec += by;
            rustix::time::clock_settime(ClockId::Realtime, now).unwrap();
            by = -by;
        }
    });
    let began = Instant::now();
    assert_eq!(container.wait(Duration::from_secs(2)).unwrap(), None);
    assert!(began.elapsed() >= Duration::from_secs(2) && began.elapsed() < SOON, "{:?}", began.elapsed());
    let freezer = container.freezer().unwrap();
    freezer.freeze().unwrap();
    freezer.thaw().unwrap();
    bed.sh(3, "true");
    drop(input);
    assert_eq!(container.wait(SOON).unwrap(), Some(Exit::Code(1)));
    container.close().unwrap();
    drop(stop);
    stepper.join().unwrap();
    bed.assert_empty();
}

/// A program that says `ready` once it has done `first`, and does `then` for each
/// line that it gets.
fn answering(bed: &Bed, number: u32, first: &str, then: &str) -> (Container, impl FnMut() -> String) {
    let program = format!("$| = 1; {first}; print qq(ready\n); while (<STDIN>) {{ {then} }}");
    let mut spec = bed.spec(number, &["/usr/bin/perl", "-e", &program]);
    let (theirs, mut input) = std::io::pipe().unwrap();
    spec.fds.push(InheritedFd { number: 0, fd: theirs.into() });
    let mut output = BufReader::new(listen(&mut spec));
    let container = bed.runtime.prepare(spec).unwrap().start().unwrap();
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let answer = move || {
        input.write_all(b"go\n").unwrap();
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        line
    };
    (container, answer)
}

/// What stands still gives back its memory, and has it again when it goes on.
fn a_frozen_container_gives_back_what_it_keeps(bed: &Bed) {
    const KEPT: Bytes = Bytes::mib(24);
    host("mkswap", &["/dev/vda"]);
    host("swapon", &["/dev/vda"]);
    let keep = format!("$x = join '', map {{ chr(65 + $_ % 26) x 4096 }} 1 .. {}", KEPT.get() / 4096);
    let (mut container, mut answer) = answering(bed, 4, &keep, "print length($x), substr($x, -1), qq(\n)");
    let freezer = container.freezer().unwrap();
    freezer.freeze().unwrap();
    let before = container.memory().unwrap();
    assert!(before > KEPT, "{before}");
    container.reclaim(Bytes::mib(20)).unwrap();
    let after = container.memory().unwrap();
    assert!(after.get() + (16 << 20) < before.get(), "{before} became {after}");
    container.reclaim_all().unwrap();
    freezer.thaw().unwrap();
    let last = char::from(b'A' + u8::try_from(KEPT.get() / 4096 % 26).unwrap());
    assert_eq!(answer(), format!("{}{last}\n", KEPT.get()));
    // The kernel sums up every two seconds.
    let began = Instant::now();
    while container.pressure().unwrap().expect("this kernel counts it").io.some_total.is_zero() {
        assert!(began.elapsed() < SOON, "it waited for its memory: {:?}", container.pressure());
        std::thread::sleep(Duration::from_millis(100));
    }
    container.close().unwrap();
    host("swapoff", &["/dev/vda"]);
}

/// A limit of four megabytes a second lets eight through in two seconds at the least.
fn a_disk_is_written_as_fast_as_allowed(bed: &Bed) {
    host("mkfs.ext4", &["-q", "-E", "nodiscard", "/dev/vdb"]);
    let at = tempfile::tempdir().unwrap();
    let path = at.path().to_str().unwrap();
    host("mount", &["/dev/vdb", path]);
    chown(at.path(), Some(bed.ids.base()), Some(bed.ids.base())).unwrap();
    copy_program("/bin/dd", bed.tree.path());
    let write = |number, io| {
        let mut spec =
            bed.spec(number, &["/bin/dd", "if=/dev/zero", "of=/disk/file", "bs=1M", "count=8", "oflag=direct"]);
        spec.limits.io = io;
        let mount = clone_tree(open_dir_path(at.path()).unwrap().as_fd()).unwrap();
        spec.mounts.push(ContainerMount { target: PathBuf::from("/disk"), mount });
        let began = Instant::now();
        let (exit, said) = bed.run_spec(spec);
        assert_eq!(exit, Exit::Code(0), "{said}");
        assert_eq!(fs::metadata(at.path().join("file")).unwrap().len(), 8 << 20);
        began.elapsed()
    };
    let limited = write(5, Some(Bytes::mib(4)));
    assert!(limited >= Duration::from_millis(1500), "{limited:?}");
    host("umount", &[path]);
}
