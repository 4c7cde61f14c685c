//! What becomes of the parent.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    ffi::CString,
    fs::{self, File},
    io::Read,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use super::super::{Event, ExecArgs, Exit, PlanFd, SpawnError, spawn};
use super::*;

const SOON: Duration = Duration::from_secs(60);
const APART: Namespaces = Namespaces::USER.and(Namespaces::PID);

/// A plan that reports and waits, and then runs a script that writes to the pipe.
fn plan(script: &str) -> (Plan, File) {
    let mut plan = Plan::new();
    let (ours, theirs) = std::io::pipe().unwrap();
    let out = plan.own(theirs.into()).unwrap();
    let program = plan.own(File::open("/bin/sh").unwrap().into()).unwrap();
    let argv = ["sh", "-c", script].map(|text| CString::new(text).unwrap()).to_vec();
    plan.step("place a descriptor", Op::Dup { from: out, to: 1 });
    plan.step("report", Op::Ready);
    plan.step("wait", Op::Wait);
    plan.step("execute", Op::Exec { program, args: ExecArgs::new(argv, vec![]) });
    (plan, File::from(OwnedFd::from(ours)))
}

fn fails() -> Plan {
    let mut plan = Plan::new();
    plan.step("fail", Op::MakeDir { dir: PlanFd::CWD, path: c"/proc/x".to_owned(), mode: 0o755 });
    plan
}

fn run(plan: Plan, mut output: File, namespaces: Namespaces) -> (Exit, String) {
    let child = spawn(plan, namespaces, None).unwrap();
    assert!(matches!(child.event(SOON).unwrap(), Event::Ready { .. }));
    child.release().unwrap();
    assert_eq!(child.event(SOON).unwrap(), Event::Closed);
    let mut text = String::new();
    let mut process = child.into_process();
    output.read_to_string(&mut text).unwrap();
    (process.wait(SOON).unwrap().unwrap(), text)
}

/// Whether a child that waits shares our memory, as the kernel says.
fn shares(plan: Plan, namespaces: Namespaces) -> bool {
    /// Source: Linux `include/uapi/linux/kcmp.h`.
    const KCMP_VM: libc::c_int = 1;
    let child = spawn(plan, namespaces, None).unwrap();
    assert!(matches!(child.event(SOON).unwrap(), Event::Ready { .. }));
    // SAFETY: takes numbers.
    match unsafe { libc::syscall(libc::SYS_kcmp, std::process::id(), child.process().pid(), KCMP_VM, 0, 0) } {
        0 => true,
        1.. => false,
        _ => panic!("{}", io::Error::last_os_error()),
    }
}

#[test]
fn only_a_child_that_is_alone_and_leaves_our_memory_as_it_is_shares_it() {
    let with = |op: Option<Op>| {
        let (mut plan, _output) = plan("");
        let at = plan.len() - 3;
        plan.steps.splice(at..at, op.map(|op| ("try".to_owned(), op)));
        plan
    };
    assert!(shares(with(None), APART));
    assert!(shares(with(Some(Op::Unshare(Namespaces::CGROUP))), APART));
    // Where others are who may trace it.
    for namespaces in [Namespaces::NONE, Namespaces::USER, Namespaces::USER.and(Namespaces::NET)] {
        assert!(!shares(with(None), namespaces), "{namespaces:?}");
    }
    assert!(!shares(with(Some(Op::SmallPages)), APART));
    // What not every kernel lets such a child do.
    assert!(!may_share(&with(Some(Op::Unshare(Namespaces::USER))), APART));
    assert!(!may_share(&with(Some(Op::OfferMemory)), APART));
}

#[test]
fn programs_take_the_signals_that_the_caller_takes() {
    // SAFETY: sets are plain values, and only this test's thread is changed.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
    let says = "while read name mask; do case $name in SigBlk:) echo $mask;; esac; done < /proc/self/status";
    for namespaces in [Namespaces::NONE, APART] {
        let (blocked, output) = plan(says);
        // Bit 14 is signal 15.
        assert_eq!(run(blocked, output, namespaces), (Exit::Code(0), format!("{:016x}\n", 1 << 14)));
        let (mut unblocked, output) = plan(says);
        unblocked.steps.insert(0, ("unblock signals".to_owned(), Op::UnblockSignals));
        assert_eq!(run(unblocked, output, namespaces), (Exit::Code(0), format!("{:016x}\n", 0)));
    }
}

#[test]
fn a_child_that_cannot_be_made_and_one_that_fails_say_why() {
    let (apart, _output) = plan("");
    let no_group = File::open("/dev/null").unwrap();
    let Err(SpawnError::Clone(error)) = spawn(apart, APART, Some(no_group.as_fd())) else { panic!("no cgroup") };
    assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    let child = spawn(fails(), APART, None).unwrap();
    assert_eq!(child.event(SOON).unwrap_err().to_string(), "cannot fail");
}

/// What this process would have more of if something were left.
fn held() -> (usize, usize, String) {
    let count = |dir: &str| fs::read_dir(dir).unwrap().count();
    let children = |task: fs::DirEntry| fs::read_to_string(task.path().join("children")).unwrap_or_default();
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    (count("/proc/self/task"), count("/proc/self/fd"), tasks.map(|task| children(task.unwrap())).collect())
}

/// Threads end a moment after their children.
fn wait_until(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < SOON, "{what}: {:?}", held());
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn nothing_is_left_of_a_thousand_children_of_eight_threads() {
    let (before, flag) = (held(), dumpable().unwrap());
    assert_eq!(flag, 1, "what the test compares with");
    let memory = vec![0xa5_u8; 4 << 20];
    thread::scope(|scope| {
        for number in 0..8 {
            let no_group = File::open("/dev/null").unwrap();
            scope.spawn(move || {
                // What this thread's last call failed with is its own.
                fs::metadata("/nowhere").unwrap_err();
                for turn in 0..125 {
                    match (number + turn) % 4 {
                        0 => {
                            let (plan, output) = plan("echo $((6 * 7))");
                            assert_eq!(run(plan, output, APART), (Exit::Code(0), "42\n".to_owned()));
                        }
                        1 => assert_eq!(
                            spawn(fails(), APART, None).unwrap().event(SOON).unwrap_err().to_string(),
                            "cannot fail"
                        ),
                        2 => {
                            let (plan, _output) = plan("");
                            let child = spawn(plan, APART, None).unwrap();
                            // Killed while it waits, or somewhere before.
                            if turn % 2 == 0 {
                                child.event(SOON).unwrap();
                            }
                        }
                        _ => assert!(spawn(plan("").0, APART, Some(no_group.as_fd())).is_err()),
                    }
                }
            });
        }
        let errno = scope.spawn(|| {
            let begun = Instant::now();
            fs::metadata("/nowhere").unwrap_err();
            while begun.elapsed() < Duration::from_millis(200) {
                assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::ENOENT));
                std::hint::spin_loop();
            }
        });
        errno.join().unwrap();
    });
    wait_until("as before", || held() == before && dumpable().unwrap() == flag);
    assert!(memory.iter().all(|byte| *byte == 0xa5));
}
