//! The system calls that a desktop may make.
//!
//! An allow list: what is not on it does not exist for the desktop (`ENOSYS`,
//! so that programs fall back to what does), and what is known and refused
//! gives the error that a program without the privilege would see.
//!
//! There is one list for desktops, a shorter one for applications, and a longer one
//! for images that bring their own init ([`Calls`]). Three decisions need their reason:
//!
//! * User, process, network and IPC namespaces may be made inside, because the
//!   sandboxes of browsers are built from them and a browser without its
//!   sandbox is the larger risk. What makes user namespaces dangerous is what
//!   root in one can then reach: mounts, packet filters, exotic sockets. So
//!   those are refused here, where the namespaces cannot bring them back.
//! * `clone3` does not exist. A filter cannot see the flags it takes through a
//!   pointer; the C libraries fall back to `clone`, whose flags it can. For the same
//!   reason nobody gets the newer mount calls, not even an image's own init: of
//!   `mount`, a filter sees whether it would allow devices where they are forbidden.
//! * No program offers pages for merging: who measures how long a write takes learns
//!   whether others have the same page.
//!
//! The program is a binary search over ranges of numbers with one instruction
//! per decision. The filter crates compare one number after another instead,
//! five instructions each: the kernel runs a new filter once for every system
//! call there is, which made loading one the dearest step of a start, and they
//! know one refusal only.

mod table;

use std::{collections::BTreeMap, sync::Arc};

use qvd_core::Calls;
use qvd_sys::process::BpfInstruction;

/// What becomes of a system call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Rule {
    Allow,
    Refuse(i32),
    /// The first check that matches decides; if none does, the last value.
    Check(Vec<Check>, Box<Rule>),
}

/// A condition on the low halves of arguments, and what becomes of the call
/// if all of it holds. The kernel takes these arguments as 32 bits too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Check {
    pub(crate) when: Vec<Test>,
    pub(crate) then: Rule,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Test {
    /// The argument equals the value.
    Is(u8, u32),
    /// The argument has one of these bits.
    Any(u8, u32),
}

// Source: Linux `include/uapi/linux/bpf_common.h` and `filter.h`.
const LOAD_WORD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER_EQUAL: u16 = 0x35;
const JUMP_SET: u16 = 0x45;
const RETURN: u16 = 0x06;
// Source: Linux `include/uapi/linux/seccomp.h`.
const RET_ALLOW: u32 = 0x7fff_0000;
const RET_ERRNO: u32 = 0x0005_0000;
/// Offsets in `struct seccomp_data`, of the same header.
const DATA_NR: u32 = 0;
const DATA_ARCH: u32 = 4;
const DATA_ARGS: u32 = 16;

/// Source: Linux `include/uapi/linux/audit.h`, `AUDIT_ARCH_X86_64`.
#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xc000_003e;
/// Source: Linux `include/uapi/linux/audit.h`, `AUDIT_ARCH_AARCH64`.
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xc000_00b7;

const fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> BpfInstruction {
    BpfInstruction { code, jt, jf, k }
}

/// The filter of programs that may make `calls`; `merging` lets them offer pages
/// to be merged with equal ones of others.
pub(crate) fn filter(calls: Calls, merging: bool) -> Arc<[BpfInstruction]> {
    compile(&table::of(calls, merging)).into()
}

fn compile(rules: &BTreeMap<u32, Rule>) -> Vec<BpfInstruction> {
    let absent = Rule::Refuse(libc::ENOSYS);
    // Runs of numbers with one rule; what lies between two of them, and above
    // the last (x32 calls have bit 30 set), is absent.
    let mut runs: Vec<(u32, &Rule)> = vec![(0, &absent)];
    let mut next = 0;
    for (&number, rule) in rules {
        if number != next {
            push_run(&mut runs, next, &absent);
        }
        push_run(&mut runs, number, rule);
        next = number + 1;
    }
    push_run(&mut runs, next, &absent);

    let mut program = vec![
        instruction(LOAD_WORD, 0, 0, DATA_ARCH),
        // Calls by another architecture's numbers, such as i386's, are absent.
        instruction(JUMP_EQUAL, 1, 0, ARCH),
        instruction(RETURN, 0, 0, refuse(libc::ENOSYS)),
        instruction(LOAD_WORD, 0, 0, DATA_NR),
    ];
    program.extend(search(&runs));
    program
}

fn push_run<'a>(runs: &mut Vec<(u32, &'a Rule)>, start: u32, rule: &'a Rule) {
    match runs.last_mut() {
        Some(last) if last.1 == rule => {}
        Some(last) if last.0 == start => last.1 = rule,
        _ => runs.push((start, rule)),
    }
}

fn search(runs: &[(u32, &Rule)]) -> Vec<BpfInstruction> {
    match runs {
        [] => decide(&Rule::Refuse(libc::ENOSYS)),
        [(_, rule)] => decide(rule),
        _ => {
            let (low, high) = runs.split_at(runs.len() / 2);
            let from = high.first().map_or(0, |run| run.0);
            let (low, high) = (search(low), search(high));
            let mut program = match u8::try_from(low.len()) {
                Ok(skip) => vec![instruction(JUMP_GREATER_EQUAL, skip, 0, from)],
                Err(_) => {
                    let skip = u32::try_from(low.len()).unwrap_or(u32::MAX);
                    vec![instruction(JUMP_GREATER_EQUAL, 0, 1, from), instruction(JUMP, 0, 0, skip)]
                }
            };
            program.extend(low);
            program.extend(high);
            program
        }
    }
}

const fn refuse(error: i32) -> u32 {
    RET_ERRNO | (error.cast_unsigned() & 0xffff)
}

fn decide(rule: &Rule) -> Vec<BpfInstruction> {
    match rule {
        Rule::Allow => vec![instruction(RETURN, 0, 0, RET_ALLOW)],
        Rule::Refuse(error) => vec![instruction(RETURN, 0, 0, refuse(*error))],
        Rule::Check(checks, otherwise) => {
            let mut program = Vec::new();
            for check in checks {
                let then = decide(&check.then);
                // Each test is a load and a jump over the rest of the check.
                let mut left = check.when.len() * 2 + then.len();
                for test in &check.when {
                    left -= 2;
                    let past = u8::try_from(left).unwrap_or(u8::MAX);
                    let (argument, jump, value) = match *test {
                        Test::Is(argument, value) => (argument, JUMP_EQUAL, value),
                        Test::Any(argument, bits) => (argument, JUMP_SET, bits),
                    };
                    program.push(instruction(LOAD_WORD, 0, 0, DATA_ARGS + 8 * u32::from(argument)));
                    program.push(instruction(jump, 0, past, value));
                }
                program.extend(then);
            }
            program.extend(decide(otherwise));
            program
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;

    /// Runs a filter as the kernel would; panics where the kernel would have
    /// refused to load it.
    fn run(program: &[BpfInstruction], arch: u32, number: u32, args: [u32; 6]) -> u32 {
        let (mut at, mut value) = (0_usize, 0_u32);
        loop {
            let BpfInstruction { code, jt, jf, k } = program[at];
            at += 1;
            let skip = |holds: bool| usize::from(if holds { jt } else { jf });
            match code {
                LOAD_WORD => {
                    value = match k {
                        DATA_NR => number,
                        DATA_ARCH => arch,
                        k => args[((k - DATA_ARGS) / 8) as usize],
                    }
                }
                JUMP => at += k as usize,
                JUMP_EQUAL => at += skip(value == k),
                JUMP_GREATER_EQUAL => at += skip(value >= k),
                JUMP_SET => at += skip(value & k != 0),
                RETURN => return k,
                code => panic!("instruction {code:#x}"),
            }
        }
    }

    fn number(call: libc::c_long) -> u32 {
        u32::try_from(call).unwrap()
    }

    #[test]
    fn every_number_gets_the_rule_of_the_table() {
        for calls in Calls::ALL {
            each_number_of(&table::of(calls, false));
        }
    }

    fn each_number_of(rules: &BTreeMap<u32, Rule>) {
        let program = compile(rules);
        // Source: Linux `include/uapi/linux/bpf_common.h`, BPF_MAXINSNS.
        assert!(program.len() < 4096, "{}", program.len());
        for nr in (0..1024).chain([0x4000_0000, 0x4000_0000 + 1, u32::MAX]) {
            let expected = match rules.get(&nr) {
                Some(Rule::Allow) => RET_ALLOW,
                Some(Rule::Refuse(error)) => refuse(*error),
                Some(Rule::Check(..)) => continue,
                None => refuse(libc::ENOSYS),
            };
            assert_eq!(run(&program, ARCH, nr, [0; 6]), expected, "system call {nr}");
            assert_eq!(run(&program, 0x4000_0003, nr, [0; 6]), refuse(libc::ENOSYS), "i386 call {nr}");
        }
    }

    #[test]
    fn arguments_decide_where_they_must() {
        let program = filter(Calls::Desktop, false);
        let call = |nr, args| run(&program, ARCH, number(nr), args);
        let flags = |flags: i32| [flags.cast_unsigned(), 0, 0, 0, 0, 0];
        let sandbox = libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::CLONE_NEWNET;
        assert_eq!(call(libc::SYS_clone, flags(sandbox | libc::SIGCHLD)), RET_ALLOW);
        assert_eq!(call(libc::SYS_unshare, flags(libc::CLONE_NEWUSER)), RET_ALLOW);
        for bad in [libc::CLONE_NEWNS, libc::CLONE_NEWCGROUP] {
            assert_eq!(call(libc::SYS_clone, flags(sandbox | bad)), refuse(libc::EPERM));
            assert_eq!(call(libc::SYS_unshare, flags(bad)), refuse(libc::EPERM));
        }
        let socket =
            |domain: i32, protocol: u32| call(libc::SYS_socket, [domain.cast_unsigned(), 1, protocol, 0, 0, 0]);
        assert_eq!(socket(libc::AF_UNIX, 0), RET_ALLOW);
        assert_eq!(socket(libc::AF_INET6, 6), RET_ALLOW);
        assert_eq!(socket(libc::AF_INET, 132), refuse(libc::EPROTONOSUPPORT), "SCTP");
        assert_eq!(socket(libc::AF_NETLINK, 0), RET_ALLOW);
        assert_eq!(socket(libc::AF_NETLINK, 12), refuse(libc::EPROTONOSUPPORT), "netfilter");
        for family in [libc::AF_PACKET, libc::AF_VSOCK, libc::AF_ALG] {
            assert_eq!(socket(family, 0), refuse(libc::EAFNOSUPPORT));
        }
        assert_eq!(call(libc::SYS_ioctl, [0, 0x5412, 0, 0, 0, 0]), refuse(libc::EPERM), "TIOCSTI");
        assert_eq!(call(libc::SYS_ioctl, [0, 0x5401, 0, 0, 0, 0]), RET_ALLOW, "TCGETS");
        assert_eq!(call(libc::SYS_setsockopt, [3, 0, 64, 0, 0, 0]), refuse(libc::EPERM), "IPT_SO_SET_REPLACE");
        assert_eq!(call(libc::SYS_setsockopt, [3, 1, 64, 0, 0, 0]), RET_ALLOW);
        assert_eq!(call(libc::SYS_clone3, [0; 6]), refuse(libc::ENOSYS));
        assert_eq!(call(libc::SYS_bpf, [0; 6]), refuse(libc::EPERM));
        let merge = |program: &[BpfInstruction]| run(program, ARCH, number(libc::SYS_madvise), [0, 0, 12, 0, 0, 0]);
        assert_eq!(merge(&program), refuse(libc::EINVAL));
        assert_eq!(merge(&filter(Calls::Desktop, true)), RET_ALLOW);
        assert_eq!(call(libc::SYS_madvise, [0, 0, 4, 0, 0, 0]), RET_ALLOW, "MADV_DONTNEED");
    }

    #[test]
    fn applications_may_less_than_desktops_and_systems_more() {
        let may = |calls, nr, args| run(&filter(calls, false), ARCH, number(nr), args) == RET_ALLOW;
        for nr in 0..512 {
            let [application, desktop, system] = [Calls::Application, Calls::Desktop, Calls::System]
                .map(|calls| run(&filter(calls, false), ARCH, nr, [0; 6]) == RET_ALLOW);
            assert!(desktop || !application, "{nr}");
            assert!(system || !desktop, "{nr}");
        }
        let new = [libc::CLONE_NEWUSER.cast_unsigned(), 0, 0, 0, 0, 0];
        assert!(may(Calls::Desktop, libc::SYS_unshare, new) && !may(Calls::Application, libc::SYS_unshare, new));
        // What takes "no devices" away from a mount is refused to all.
        let (bind, remount, nodev) = (4096, 32, 4);
        let mount = |flags| may(Calls::System, libc::SYS_mount, [0, 0, 0, flags, 0, 0]);
        assert!(mount(bind) && mount(0) && mount(bind | remount | nodev));
        assert!(!mount(bind | remount) && !mount(remount));
        assert!(!may(Calls::Desktop, libc::SYS_mount, [0; 6]));
        for nr in [libc::SYS_mount_setattr, libc::SYS_fsopen, libc::SYS_bpf, libc::SYS_keyctl, libc::SYS_reboot] {
            assert!(!may(Calls::System, nr, [0; 6]), "{nr}");
        }
    }
}
