//! Start, end, failure, adoption.

use std::{
    fs,
    io::{BufRead, Read, Write},
    os::fd::AsFd,
    path::PathBuf,
};

use qvd_core::{Bytes, DesktopId, MilliCpu, UidRange};
use qvd_sys::{
    mount::{clone_dir, in_private_namespace, open_dir_path},
    process::{Event, Namespaces, Op, Plan, spawn},
};
use qvd_testkit::{Need, privileged};
use qvd_virt::{ContainerMount, ContainerRecord, Error, Exit, InheritedFd, Runtime, seal};

use crate::bed::{Bed, SOON, listen, plant_link};

pub const NEEDS: &[Need] = &[Need::Root, Need::UserNamespaces, Need::Cgroup];

fn id(number: u32) -> DesktopId {
    DesktopId::new(number).unwrap()
}

/// An error with all its causes.
pub fn whole(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[test]
fn process_one_runs_and_its_exit_status_arrives() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let (exit, output) = bed.run(1, &["/bin/sh", "-c", "echo pid $$; exit 7"]);
        assert_eq!((exit, output.as_str()), (Exit::Code(7), "pid 1\n"));
        bed.assert_empty();
    });
}

#[test]
fn a_signal_is_told_from_a_status_and_an_end_at_once_is_no_failure() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let (mut container, _input) = bed.waiting(1);
        assert_eq!(container.try_wait().unwrap(), None);
        container.kill().unwrap();
        assert_eq!(container.wait(SOON).unwrap(), Some(Exit::Signal(9)));
        container.close().unwrap();
        container.close().unwrap();

        let mut quick = bed.runtime.prepare(bed.spec(2, &["/bin/sh", "-c", "exit 3"])).unwrap().start().unwrap();
        assert_eq!(quick.wait(SOON).unwrap(), Some(Exit::Code(3)));
        quick.close().unwrap();
        bed.assert_empty();
    });
}

#[test]
fn a_sealed_program_runs_with_what_it_inherits_and_nothing_else() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let mut spec = bed.spec(1, &["/bin/sh", "-c", "cat=$(read line <&3; echo $line); echo $cat; exec /usr/bin/perl -e \
            'opendir(D, \"/proc/self/fd\"); print join(\" \", sort grep { /\\d/ } readdir(D)), \"\\n\"; print readlink(\"/proc/1/exe\")'"]);
        spec.program.file = seal(c"shell", &fs::read(bed.path("/bin/sh")).unwrap()).unwrap();
        spec.fds.push(InheritedFd { number: 3, fd: seal(c"config", b"content\n").unwrap() });
        let (exit, output) = bed.run_spec(spec);
        // 4 is the directory that is being listed.
        assert_eq!(output.lines().take(2).collect::<Vec<_>>(), ["content", "0 1 2 3 4"]);
        assert_eq!(exit, Exit::Code(0));
    });
}

#[test]
fn mounts_arrive_where_they_should_and_the_host_sees_none() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        // A mount table that nobody else changes meanwhile.
        in_private_namespace(|| {
            let table = || fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            let home = tempfile::tempdir().unwrap();
            fs::write(home.path().join("file"), "mine").unwrap();
            let before = table();
            let mut spec = bed.spec(
                1,
                &["/bin/sh", "-c", "read x < /home/user/a/file; echo $x; test -d /run/sub; echo $?; read stop"],
            );
            for target in ["/home/user/a", "/run/sub"] {
                let mount = clone_dir(open_dir_path(home.path()).unwrap().as_fd()).unwrap();
                spec.mounts.push(ContainerMount { target: PathBuf::from(target), mount });
            }
            let (input, stop) = std::io::pipe().unwrap();
            spec.fds.push(InheritedFd { number: 0, fd: input.into() });
            let mut output = listen(&mut spec);
            let mut container = bed.runtime.prepare(spec).unwrap().start().unwrap();
            assert_eq!(table(), before, "while it runs");
            drop(stop);
            let mut text = String::new();
            output.read_to_string(&mut text).unwrap();
            assert_eq!(text, "mine\n0\n");
            container.close().unwrap();
            assert_eq!(table(), before, "after its end");
        })
        .unwrap();
    });
}

#[test]
fn a_failed_step_is_named_and_nothing_is_left() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let mut spec = bed.spec(1, &["/bin/sh"]);
        spec.program.file = seal(c"text", b"no program").unwrap();
        let error = bed.runtime.prepare(spec).unwrap().start().unwrap_err();
        assert!(whole(&error).contains("cannot execute the program: Exec format error"), "{}", whole(&error));
        bed.assert_empty();

        // Nobody may make directories in this root.
        let bed = Bed::new();
        std::os::unix::fs::chown(bed.tree.path(), Some(0), Some(0)).unwrap();
        let error = bed.runtime.prepare(bed.spec(1, &["/bin/sh"])).unwrap().start().unwrap_err();
        assert!(whole(&error).contains("cannot make directory /dev: Permission denied"), "{}", whole(&error));
        bed.assert_empty();
    });
}

#[test]
fn a_prepared_container_that_is_dropped_is_gone() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let prepared = bed.runtime.prepare(bed.spec(1, &["/bin/sh"])).unwrap();
        let process = format!("/proc/{}", prepared.pid());
        assert!(fs::exists(&process).unwrap());
        assert_ne!(fs::read_link(format!("{process}/ns/net")).unwrap(), fs::read_link("/proc/self/ns/net").unwrap());
        prepared.netns().unwrap();
        drop(prepared);
        assert!(!fs::exists(&process).unwrap());
        bed.assert_empty();
    });
}

#[test]
fn links_where_we_mount_are_refused() {
    privileged(NEEDS, || {
        for name in ["proc", "sys", "dev", "tmp", "home"] {
            let bed = Bed::new();
            plant_link(&bed, name, "/var");
            let mut spec = bed.spec(1, &["/bin/sh"]);
            let mount = clone_dir(open_dir_path(bed.tree.path()).unwrap().as_fd()).unwrap();
            spec.mounts.push(ContainerMount { target: PathBuf::from("/home/user"), mount });
            let error = bed.runtime.prepare(spec).unwrap_err();
            assert!(matches!(&error, Error::Invalid { what, .. } if what.contains(name)), "{name}: {error}");
            bed.assert_empty();
        }
    });
}

#[test]
fn what_is_wrong_is_refused_before_anything_is_made() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let refused = |change: &dyn Fn(&mut qvd_virt::ContainerSpec)| {
            let mut spec = bed.spec(1, &["/bin/sh"]);
            change(&mut spec);
            assert!(matches!(bed.runtime.prepare(spec), Err(Error::Invalid { .. })));
        };
        refused(&|spec| spec.hostname = "a b".to_owned());
        refused(&|spec| spec.program.argv.clear());
        refused(&|spec| spec.program.env.push("A=\0".to_owned()));
        refused(&|spec| spec.limits.memory = Bytes::new(0));
        for target in ["relative", "/", "/a/../b", "/proc/x", "/dev"] {
            refused(&|spec| {
                let mount = bed.root();
                spec.mounts.push(ContainerMount { target: PathBuf::from(target), mount });
            });
        }
        bed.assert_empty();
    });
}

#[test]
fn a_number_runs_once() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let (mut container, _input) = bed.waiting(1);
        assert!(matches!(bed.runtime.prepare(bed.spec(1, &["/bin/sh"])), Err(Error::Busy(_))));
        // Another process's runtime finds out by the cgroup.
        let other = Runtime::new(bed.instance).unwrap();
        assert!(matches!(other.prepare(bed.spec(1, &["/bin/sh"])), Err(Error::Busy(_))));
        assert_eq!(container.try_wait().unwrap(), None, "the first one was left alone");
        container.close().unwrap();
        bed.sh(1, "true");
        bed.assert_empty();
    });
}

#[test]
fn a_container_outlives_its_runtime_and_is_adopted() {
    privileged(NEEDS, || {
        let mut bed = Bed::new();
        let (container, input) = bed.waiting(1);
        let pid = container.pid();
        let record = container.detach().unwrap();
        bed.runtime = Runtime::new(bed.instance).unwrap();
        // The record goes through a file.
        let text = serde_json::to_string(&record).unwrap();
        let record: ContainerRecord = serde_json::from_str(&text).unwrap();
        let mut adopted = bed.runtime.adopt(&record).unwrap().expect("it runs");
        assert_eq!(adopted.pid(), pid);
        assert!(matches!(bed.runtime.adopt(&record), Err(Error::Busy(_))));
        assert_eq!(adopted.enforced().unwrap().uid_map, [[0, bed.ids.base(), UidRange::LEN]]);
        drop(input);
        assert_eq!(adopted.wait(SOON).unwrap(), Some(Exit::Code(1)));
        adopted.close().unwrap();
        assert!(bed.runtime.adopt(&record).unwrap().is_none(), "it has ended");
        bed.assert_empty();
    });
}

#[test]
fn a_process_that_is_not_the_recorded_one_is_not_adopted() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let (container, _input) = bed.waiting(1);
        let record = container.detach().unwrap();
        let mut forged = serde_json::to_value(&record).unwrap();
        for (key, value) in [
            ("start_time_ticks", serde_json::json!(1)),
            ("boot_id", serde_json::json!("00000000-0000-0000-0000-000000000000")),
            ("pid", serde_json::json!(std::process::id())),
            ("id", serde_json::json!(2)),
        ] {
            let mut one = forged.clone();
            one[key] = value;
            let one: ContainerRecord = serde_json::from_value(one).unwrap();
            assert!(bed.runtime.adopt(&one).unwrap().is_none(), "{key}");
        }
        forged["id"] = serde_json::json!(1);
        bed.runtime.adopt(&record).unwrap().expect("the true record").close().unwrap();
        bed.assert_empty();
    });
}

#[test]
fn a_sweep_removes_what_nobody_owns_and_nothing_else() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let (mut held, _input) = bed.waiting(1);
        let (kept, _input) = bed.waiting(2);
        let (stray, _input) = bed.waiting(3);
        let (kept, stray) = (kept.detach().unwrap(), stray.detach().unwrap());
        assert_eq!(bed.runtime.sweep(&[id(2)]).unwrap(), ["3"]);
        assert!(bed.runtime.adopt(&stray).unwrap().is_none());
        assert_eq!(held.try_wait().unwrap(), None);
        held.close().unwrap();
        bed.runtime.adopt(&kept).unwrap().expect("it was kept").close().unwrap();
        // The stray one was our child; its owner is gone, so reap it here.
        let _reaped = rustix::process::wait(rustix::process::WaitOptions::NOHANG);
        bed.assert_empty();
    });
}

#[test]
fn limits_are_written_and_hold() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let mut spec = bed.spec(1, &["/bin/sh", "-c", "read line"]);
        let (input, _stop) = std::io::pipe().unwrap();
        spec.fds.push(InheritedFd { number: 0, fd: input.into() });
        spec.limits.memory = Bytes::mib(64);
        spec.limits.cpu = MilliCpu(500);
        spec.limits.pids = 20;
        let mut container = bed.runtime.prepare(spec).unwrap().start().unwrap();
        let limits = container.enforced().unwrap().limits;
        let has = |value: &str| limits.values().any(|found| found == value);
        assert!(has("20") && has("67108864") && (has("50000") || has("50000 100000")), "{limits:?}");
        container.close().unwrap();
    });
}

#[test]
fn a_fork_bomb_stays_within_its_limit() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let bomb =
            "$n = 0; while (1) { my $pid = fork; last unless defined $pid; if (!$pid) { sleep 60 } $n++ } print $n";
        let mut spec = bed.spec(1, &["/usr/bin/perl", "-e", bomb]);
        spec.limits.pids = 20;
        assert_eq!(bed.run_spec(spec), (Exit::Code(0), "19".to_owned()));
        bed.assert_empty();
    });
}

#[test]
fn who_takes_too_much_memory_is_killed_alone() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let hog = "/usr/bin/perl -e '$x = \"a\" x (256 << 20); print \"had it\"'; echo status $?";
        let mut spec = bed.spec(1, &["/bin/sh", "-c", hog]);
        spec.limits.memory = Bytes::mib(32);
        let (exit, output) = bed.run_spec(spec);
        assert_eq!(exit, Exit::Code(0), "the init lives on");
        assert!(output.contains("status 137"), "{output}");
    });
}

#[test]
fn an_init_that_hears_no_signal_is_ended_all_the_same() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let deaf = "$SIG{$_} = 'IGNORE' for grep { !/KILL|STOP|NUM|CHLD|CLD/ } keys %SIG; $| = 1; print qq(deaf\n);
            if (!fork) { sleep 600 } sleep 600 while 1;";
        let mut spec = bed.spec(1, &["/usr/bin/perl", "-e", deaf]);
        let mut output = std::io::BufReader::new(listen(&mut spec));
        let mut container = bed.runtime.prepare(spec).unwrap().start().unwrap();
        output.read_line(&mut String::new()).unwrap();
        for signal in [rustix::process::Signal::TERM, rustix::process::Signal::INT, rustix::process::Signal::HUP] {
            container.signal(signal).unwrap();
        }
        container.ask_to_halt().unwrap();
        assert_eq!(container.wait(std::time::Duration::from_millis(300)).unwrap(), None);
        container.close().unwrap();
        assert_eq!(container.try_wait().unwrap(), Some(Exit::Signal(9)));
        bed.assert_empty();
    });
}

#[test]
fn a_child_can_be_born_in_a_fresh_v2_group() {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let unified = table.lines().find(|line| line.contains(" - cgroup2 ")).and_then(|line| line.split(' ').nth(4));
    let Some(root) = unified.map(PathBuf::from) else { return };
    privileged(NEEDS, || {
        let group = root.join(format!("qvd-born-{}", std::process::id()));
        fs::create_dir(&group).unwrap();
        let dir = fs::File::open(&group).unwrap();
        let mut plan = Plan::new();
        plan.step("report", Op::Ready);
        plan.step("wait", Op::Wait);
        let child = spawn(plan, Namespaces::NONE, Some(dir.as_fd())).unwrap();
        let event = child.event(SOON).unwrap();
        let inside = fs::read_to_string(group.join("cgroup.procs")).unwrap();
        let pid = child.process().pid();
        drop(child);
        fs::remove_dir(&group).unwrap();
        // Closed instead: this process's own group was once killed, see
        // `Runtime`, which then moves children in.
        assert!(matches!(event, Event::Ready { .. }), "{event:?}");
        assert_eq!(inside.trim(), pid.to_string());
    });
}

#[test]
fn a_frozen_container_stands_still_goes_on_and_can_be_ended() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let mut spec = bed.spec(1, &["/bin/sh", "-c", "while read line; do echo got $line; done"]);
        let (theirs, mut input) = std::io::pipe().unwrap();
        spec.fds.push(InheritedFd { number: 0, fd: theirs.into() });
        let mut output = std::io::BufReader::new(listen(&mut spec));
        let mut container = bed.runtime.prepare(spec).unwrap().start().unwrap();
        let freezer = container.freezer().expect("this host can freeze");
        let mut answer = |text: &str| {
            input.write_all(text.as_bytes()).unwrap();
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            line
        };
        assert_eq!(answer("one\n"), "got one\n");
        assert!(!container.uses_sound().unwrap());
        freezer.freeze().unwrap();
        assert!(freezer.is_frozen().unwrap());
        freezer.thaw().unwrap();
        assert!(!freezer.is_frozen().unwrap());
        assert_eq!(answer("two\n"), "got two\n");
        freezer.freeze().unwrap();
        // Frozen, it is adopted by nobody but ended all the same.
        container.close().unwrap();
        assert_eq!(container.try_wait().unwrap(), Some(Exit::Signal(9)));
        bed.assert_empty();
    });
}

#[test]
fn a_start_takes_few_system_calls() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        // What every image has; a directory that is missing takes two calls more.
        for dir in ["proc", "sys", "dev", "tmp", "run"] {
            fs::create_dir(bed.path(dir)).unwrap();
        }
        let (mut container, _input) = bed.waiting(1);
        let calls = container.start_calls().unwrap();
        assert!((60..=115).contains(&calls), "{calls} system calls from clone to exec");
        container.close().unwrap();
    });
}
