//! Plans as children execute them; no privilege is needed.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{fs::File, io::Read, os::fd::OwnedFd, time::Duration};

use super::*;

const SOON: Duration = Duration::from_secs(20);

fn run(mut plan: Plan, script: &str, fds: &[i32]) -> (Exit, String) {
    let (ours, theirs) = std::io::pipe().unwrap();
    let out = plan.own(theirs.into()).unwrap();
    for &to in fds {
        plan.step("place a descriptor", Op::Dup { from: out, to });
    }
    let program = plan.own(File::open("/bin/sh").unwrap().into()).unwrap();
    let argv = ["sh", "-c", script].map(|text| std::ffi::CString::new(text).unwrap()).to_vec();
    plan.step("report", Op::Ready);
    plan.step("wait", Op::Wait);
    plan.step("execute", Op::Exec { program, args: ExecArgs::new(argv, vec![]) });
    let child = spawn(plan, Namespaces::NONE, None).unwrap();
    // Closing all but the gaps' ends takes some calls, then the plan's own.
    let Event::Ready { calls } = child.event(SOON).unwrap() else { panic!("the plan reports") };
    assert!((2..64).contains(&calls), "{calls}");
    child.release().unwrap();
    assert_eq!(child.event(SOON).unwrap(), Event::Closed);
    let mut process = child.into_process();
    let mut text = String::new();
    File::from(OwnedFd::from(ours)).read_to_string(&mut text).unwrap();
    (process.wait(SOON).unwrap().unwrap(), text)
}

#[test]
fn a_program_gets_the_descriptors_of_the_plan_and_no_others() {
    let (exit, text) =
        run(Plan::new(), "for n in 0 1 2 3 4 5 9; do test -e /dev/fd/$n && echo $n; done; exit 4", &[1, 3]);
    assert_eq!((exit, text.as_str()), (Exit::Code(4), "1\n3\n"));
}

#[test]
fn signals_that_we_ignore_are_not_ignored_by_programs() {
    // Rust ignores SIGPIPE in every program's main.
    assert_eq!(run(Plan::new(), "kill -PIPE $$; echo alive", &[1]), (Exit::Signal(libc::SIGPIPE), String::new()));
}

#[test]
fn a_failed_step_is_named() {
    let mut plan = Plan::new();
    plan.step("make a directory", Op::MakeDir { dir: PlanFd::CWD, path: c"/proc/x".to_owned(), mode: 0o755 });
    let mut child = spawn(plan, Namespaces::NONE, None).unwrap();
    let error = child.event(SOON).unwrap_err();
    assert_eq!(error.to_string(), "cannot make a directory");
    assert_eq!(child.event(SOON).unwrap(), Event::Closed);
    assert_eq!(child.process_mut().wait(SOON).unwrap(), Some(Exit::Code(127)));
}

#[test]
fn a_failure_is_told_even_when_the_child_was_released_too_late() {
    let mut plan = Plan::new();
    plan.step("fail", Op::MakeDir { dir: PlanFd::CWD, path: c"/proc/x".to_owned(), mode: 0o755 });
    let mut child = spawn(plan, Namespaces::NONE, None).unwrap();
    // What it never reads makes its end of the socket reset ours.
    let _maybe_gone = child.release();
    child.process_mut().wait(SOON).unwrap().unwrap();
    assert_eq!(child.event(SOON).unwrap_err().to_string(), "cannot fail");
}

#[test]
fn a_child_that_waits_goes_with_its_owner() {
    let mut plan = Plan::new();
    plan.step("report", Op::Ready);
    plan.step("wait", Op::Wait);
    let child = spawn(plan, Namespaces::NONE, None).unwrap();
    child.event(SOON).unwrap();
    let pid = child.process().pid();
    drop(child);
    assert!(Process::open(pid).is_err());
}

#[test]
fn a_child_that_waits_ends_when_its_parent_is_gone() {
    let mut plan = Plan::new();
    plan.step("report", Op::Ready);
    plan.step("wait", Op::Wait);
    let child = spawn(plan, Namespaces::NONE, None).unwrap();
    child.event(SOON).unwrap();
    // Closes the socket, as the kernel does for a parent that is killed.
    assert_eq!(child.into_process().wait(SOON).unwrap(), Some(Exit::Code(0)));
}

#[test]
fn signals_that_we_block_reach_programs_when_the_plan_says_so() {
    // SAFETY: sets are plain values, and only this test's thread is changed.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
    let script = "kill -TERM $$; echo alive";
    assert_eq!(run(Plan::new(), script, &[1]), (Exit::Code(0), "alive\n".to_owned()));
    let mut plan = Plan::new();
    plan.step("unblock signals", Op::UnblockSignals);
    assert_eq!(run(plan, script, &[1]), (Exit::Signal(libc::SIGTERM), String::new()));
}
