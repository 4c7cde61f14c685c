//! Which calls: the list that desktops of Debian, browsers and office
//! programs included, get along with.

use std::collections::BTreeMap;

use qvd_core::Calls;

use super::{Check, Rule, Test};

macro_rules! numbers {
    ($($name:ident)*) => { vec![$(number(libc::$name)),*] };
}

fn number(call: libc::c_long) -> u32 {
    // Numbers of system calls are small and positive on every architecture.
    u32::try_from(call).unwrap_or(u32::MAX)
}

/// The table for `calls`.
pub(super) fn of(calls: Calls, merging: bool) -> BTreeMap<u32, Rule> {
    let mut rules = desktop();
    match calls {
        Calls::Application => restrict(&mut rules),
        Calls::System => extend(&mut rules),
        _ => {}
    }
    if merging {
        rules.insert(number(libc::SYS_madvise), Rule::Allow);
    }
    rules
}

/// Takes out what applications do without.
fn restrict(rules: &mut BTreeMap<u32, Rule>) {
    // Looking into other processes, roots and namespaces of one's own, names of the
    // machine: refused as to somebody without the privilege.
    let refused = numbers! {
        SYS_ptrace SYS_process_vm_readv SYS_process_vm_writev SYS_process_madvise SYS_kcmp SYS_pidfd_getfd SYS_chroot
        SYS_unshare SYS_sethostname SYS_setdomainname SYS_mlockall
    };
    rules.extend(refused.iter().map(|&number| (number, Rule::Refuse(libc::EPERM))));
    // Rare and intricate; there is something else for all that they do.
    let absent = numbers! {
        SYS_io_setup SYS_io_destroy SYS_io_submit SYS_io_cancel SYS_io_getevents SYS_vmsplice SYS_remap_file_pages
        SYS_name_to_handle_at SYS_msgget SYS_msgsnd SYS_msgrcv SYS_msgctl SYS_mq_open SYS_mq_unlink SYS_mq_timedsend
        SYS_mq_timedreceive SYS_mq_notify SYS_mq_getsetattr
    };
    absent.iter().for_each(|number| drop(rules.remove(number)));

    let is = |argument, value: i32| Test::Is(argument, value.cast_unsigned());
    let allow = |when| Check { when, then: Rule::Allow };
    let deny = |when, error| Check { when, then: Rule::Refuse(error) };
    let all = libc::CLONE_NEWNS
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC;
    let clone = vec![deny(vec![Test::Any(0, all.cast_unsigned())], libc::EPERM)];
    let mut socket = vec![allow(vec![is(0, libc::AF_UNIX)])];
    for family in [libc::AF_INET, libc::AF_INET6] {
        socket.extend([0, libc::IPPROTO_TCP, libc::IPPROTO_UDP].map(|one| allow(vec![is(0, family), is(2, one)])));
    }
    // `getifaddrs` and name resolution ask for addresses by it.
    socket.push(allow(vec![is(0, libc::AF_NETLINK), is(2, libc::NETLINK_ROUTE)]));
    // Reading it, and plain Linux.
    let personality = [-1, 0].map(|value| allow(vec![is(0, value)])).to_vec();
    // Source: stat(2): the bit is set for character and block devices alone.
    let device = |argument| vec![deny(vec![Test::Any(argument, 0o020_000)], libc::EPERM)];
    let checked = [
        (libc::SYS_clone, Rule::Check(clone, Box::new(Rule::Allow))),
        (libc::SYS_socket, Rule::Check(socket, Box::new(Rule::Refuse(libc::EAFNOSUPPORT)))),
        (libc::SYS_personality, Rule::Check(personality, Box::new(Rule::Refuse(libc::EPERM)))),
        (libc::SYS_mknodat, Rule::Check(device(2), Box::new(Rule::Allow))),
        #[cfg(target_arch = "x86_64")]
        (libc::SYS_mknod, Rule::Check(device(1), Box::new(Rule::Allow))),
    ];
    rules.extend(checked.map(|(call, rule)| (number(call), rule)));
}

/// Adds what an image's own init and its services do beside.
fn extend(rules: &mut BTreeMap<u32, Rule>) {
    let allowed = numbers! { SYS_umount2 SYS_pivot_root SYS_setns SYS_clone SYS_unshare };
    rules.extend(allowed.iter().map(|&number| (number, Rule::Allow)));
    // Source: Linux `include/uapi/linux/mount.h`, MS_NODEV and MS_REMOUNT. Mounts
    // that are new are of the container's own user namespace, where no device can
    // be opened; those that are there would open them if they lost their flag.
    let (nodev, remount) = (Test::Any(3, 4), Test::Any(3, 32));
    let mount = vec![
        Check { when: vec![remount, nodev], then: Rule::Allow },
        Check { when: vec![remount], then: Rule::Refuse(libc::EPERM) },
    ];
    rules.insert(number(libc::SYS_mount), Rule::Check(mount, Box::new(Rule::Allow)));
}

/// The table of a desktop.
fn desktop() -> BTreeMap<u32, Rule> {
    let mut rules = BTreeMap::new();
    let mut set = |numbers: &[u32], rule: &Rule| rules.extend(numbers.iter().map(|&n| (n, rule.clone())));
    set(&files(), &Rule::Allow);
    set(&memory_and_time(), &Rule::Allow);
    set(&processes(), &Rule::Allow);
    set(&sockets_and_ipc(), &Rule::Allow);
    #[cfg(target_arch = "x86_64")]
    set(&legacy(), &Rule::Allow);
    set(&privileged(), &Rule::Refuse(libc::EPERM));
    for (call, rule) in checked() {
        set(&[number(call)], &rule);
    }
    rules
}

fn files() -> Vec<u32> {
    numbers! {
        SYS_read SYS_write SYS_close SYS_fstat SYS_lseek SYS_pread64 SYS_pwrite64 SYS_readv SYS_writev SYS_preadv
        SYS_pwritev SYS_preadv2 SYS_pwritev2 SYS_dup SYS_dup3 SYS_pipe2 SYS_fcntl SYS_flock SYS_fsync SYS_fdatasync
        SYS_sync SYS_syncfs SYS_sync_file_range SYS_truncate SYS_ftruncate SYS_fallocate SYS_fadvise64 SYS_readahead
        SYS_getdents64 SYS_getcwd SYS_chdir SYS_fchdir SYS_chroot SYS_fchmod SYS_fchmodat SYS_fchmodat2 SYS_fchown
        SYS_fchownat SYS_umask SYS_openat SYS_openat2 SYS_close_range SYS_mkdirat SYS_mknodat SYS_newfstatat
        SYS_unlinkat SYS_renameat SYS_renameat2 SYS_linkat SYS_symlinkat SYS_readlinkat SYS_faccessat SYS_faccessat2
        SYS_utimensat SYS_statx SYS_statfs SYS_fstatfs SYS_sendfile SYS_splice SYS_tee SYS_vmsplice
        SYS_copy_file_range SYS_setxattr SYS_lsetxattr SYS_fsetxattr SYS_getxattr SYS_lgetxattr SYS_fgetxattr
        SYS_listxattr SYS_llistxattr SYS_flistxattr SYS_removexattr SYS_lremovexattr SYS_fremovexattr
        SYS_inotify_init1 SYS_inotify_add_watch SYS_inotify_rm_watch SYS_name_to_handle_at SYS_io_setup SYS_io_destroy
        SYS_io_submit SYS_io_cancel SYS_io_getevents SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait SYS_epoll_pwait2
        SYS_ppoll SYS_pselect6 SYS_eventfd2 SYS_signalfd4 SYS_timerfd_create SYS_timerfd_settime SYS_timerfd_gettime
        SYS_memfd_create
    }
}

fn memory_and_time() -> Vec<u32> {
    numbers! {
        SYS_mmap SYS_mprotect SYS_munmap SYS_mremap SYS_brk SYS_msync SYS_mincore SYS_madvise SYS_process_madvise
        SYS_mlock SYS_mlock2 SYS_munlock SYS_mlockall SYS_munlockall SYS_membarrier SYS_get_mempolicy
        SYS_remap_file_pages SYS_pkey_alloc SYS_pkey_free SYS_pkey_mprotect SYS_clock_gettime SYS_clock_getres
        SYS_clock_nanosleep SYS_nanosleep SYS_gettimeofday SYS_getitimer SYS_setitimer SYS_timer_create
        SYS_timer_settime SYS_timer_gettime SYS_timer_getoverrun SYS_timer_delete SYS_times SYS_getrandom SYS_sysinfo
        SYS_uname SYS_getcpu
    }
}

fn processes() -> Vec<u32> {
    numbers! {
        SYS_execve SYS_execveat SYS_exit SYS_exit_group SYS_wait4 SYS_waitid SYS_kill SYS_tkill SYS_tgkill
        SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_rt_sigpending SYS_rt_sigtimedwait SYS_rt_sigqueueinfo
        SYS_rt_tgsigqueueinfo SYS_rt_sigsuspend SYS_sigaltstack SYS_restart_syscall SYS_pidfd_open
        SYS_pidfd_send_signal SYS_pidfd_getfd SYS_getpid SYS_getppid SYS_gettid SYS_getpgid SYS_setpgid SYS_getsid
        SYS_setsid SYS_getuid SYS_geteuid SYS_getgid SYS_getegid SYS_getresuid SYS_getresgid SYS_setuid SYS_setgid
        SYS_setreuid SYS_setregid SYS_setresuid SYS_setresgid SYS_setfsuid SYS_setfsgid SYS_getgroups SYS_setgroups
        SYS_capget SYS_capset SYS_prctl SYS_seccomp SYS_landlock_create_ruleset SYS_landlock_add_rule
        SYS_landlock_restrict_self SYS_getrlimit SYS_setrlimit SYS_prlimit64 SYS_getrusage SYS_getpriority
        SYS_setpriority SYS_ioprio_get SYS_ioprio_set SYS_sched_yield SYS_sched_getaffinity SYS_sched_setaffinity
        SYS_sched_getparam SYS_sched_setparam SYS_sched_getscheduler SYS_sched_setscheduler SYS_sched_getattr
        SYS_sched_setattr SYS_sched_get_priority_max SYS_sched_get_priority_min SYS_sched_rr_get_interval
        SYS_set_tid_address SYS_set_robust_list SYS_get_robust_list SYS_rseq SYS_futex SYS_futex_waitv
        SYS_ptrace SYS_process_vm_readv SYS_process_vm_writev SYS_kcmp
        SYS_sethostname SYS_setdomainname
    }
}

fn sockets_and_ipc() -> Vec<u32> {
    numbers! {
        SYS_bind SYS_connect SYS_listen SYS_accept SYS_accept4 SYS_getsockname SYS_getpeername SYS_getsockopt SYS_sendto
        SYS_recvfrom SYS_sendmsg SYS_recvmsg SYS_sendmmsg SYS_recvmmsg SYS_shutdown SYS_shmget SYS_shmat SYS_shmdt
        SYS_shmctl SYS_semget SYS_semop SYS_semtimedop SYS_semctl SYS_msgget SYS_msgsnd SYS_msgrcv SYS_msgctl
        SYS_mq_open SYS_mq_unlink SYS_mq_timedsend SYS_mq_timedreceive SYS_mq_notify SYS_mq_getsetattr
    }
}

/// Calls that newer architectures never had.
#[cfg(target_arch = "x86_64")]
fn legacy() -> Vec<u32> {
    numbers! {
        SYS_open SYS_creat SYS_stat SYS_lstat SYS_access SYS_poll SYS_select SYS_pipe SYS_dup2 SYS_alarm SYS_pause
        SYS_fork SYS_vfork SYS_getdents SYS_rename SYS_mkdir SYS_rmdir SYS_link SYS_unlink SYS_symlink SYS_readlink
        SYS_chmod SYS_chown SYS_lchown SYS_utime SYS_utimes SYS_futimesat SYS_mknod SYS_getpgrp SYS_time
        SYS_epoll_create SYS_epoll_wait SYS_inotify_init SYS_eventfd SYS_signalfd SYS_arch_prctl
    }
}

/// Calls that need a privilege no desktop has, or are a way to get one: the
/// caller hears what it would hear without the privilege.
fn privileged() -> Vec<u32> {
    numbers! {
        SYS_mount SYS_umount2 SYS_pivot_root SYS_setns SYS_bpf SYS_perf_event_open SYS_kexec_load SYS_kexec_file_load
        SYS_init_module SYS_finit_module SYS_delete_module SYS_reboot SYS_swapon SYS_swapoff SYS_acct SYS_quotactl
        SYS_settimeofday SYS_clock_settime SYS_clock_adjtime SYS_adjtimex SYS_syslog SYS_open_by_handle_at
        SYS_fanotify_init SYS_fanotify_mark SYS_userfaultfd SYS_add_key SYS_request_key SYS_keyctl SYS_mbind
        SYS_set_mempolicy SYS_migrate_pages SYS_move_pages SYS_vhangup
    }
}

/// Calls whose arguments decide.
fn checked() -> Vec<(libc::c_long, Rule)> {
    let deny = |when, error| Check { when, then: Rule::Refuse(error) };
    let allow = |when| Check { when, then: Rule::Allow };
    let is = |argument, value: i32| Test::Is(argument, value.cast_unsigned());

    // Mounts and views of the cgroup tree, of the host's name and clock are
    // the container's own business; browsers' sandboxes do without.
    let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;
    // In `clone` the bit of CLONE_NEWTIME belongs to the exit signal.
    let with_time = namespaces | libc::CLONE_NEWTIME;
    let without = |bits: i32| {
        Rule::Check(vec![deny(vec![Test::Any(0, bits.cast_unsigned())], libc::EPERM)], Box::new(Rule::Allow))
    };

    // Every other family or protocol is kernel code that nothing here needs;
    // AF_VSOCK would reach the host. Netlink: routes for `getifaddrs`, events
    // for libudev; not packet filters.
    let mut socket = vec![allow(vec![is(0, libc::AF_UNIX)])];
    for family in [libc::AF_INET, libc::AF_INET6] {
        for protocol in [0, libc::IPPROTO_TCP, libc::IPPROTO_UDP, libc::IPPROTO_ICMP, libc::IPPROTO_ICMPV6] {
            socket.push(allow(vec![is(0, family), is(2, protocol)]));
        }
        socket.push(deny(vec![is(0, family)], libc::EPROTONOSUPPORT));
    }
    for protocol in [libc::NETLINK_ROUTE, libc::NETLINK_KOBJECT_UEVENT] {
        socket.push(allow(vec![is(0, libc::AF_NETLINK), is(2, protocol)]));
    }
    socket.push(deny(vec![is(0, libc::AF_NETLINK)], libc::EPROTONOSUPPORT));
    let no_family = || Box::new(Rule::Refuse(libc::EAFNOSUPPORT));

    // Tables of iptables, arptables and ebtables: Linux `ip_tables.h`,
    // `ip6_tables.h`, `arp_tables.h`, `ebtables.h`, *_SO_SET_*.
    let tables = [(0, 64), (0, 65), (41, 64), (41, 65), (0, 96), (0, 97), (0, 128), (0, 129)];
    let setsockopt = tables.iter().map(|&(level, name)| deny(vec![is(1, level), is(2, name)], libc::EPERM)).collect();

    // Typing into the terminal of another: Linux `asm-generic/ioctls.h`,
    // TIOCSTI and TIOCLINUX.
    let ioctl = [0x5412, 0x541c].iter().map(|&request| deny(vec![is(1, request)], libc::EPERM)).collect();

    // Reading it, plain Linux, its 32-bit look, and debuggers' fixed addresses.
    let personality = [-1, 0, 8, 0x0002_0000, 0x0002_0008, 0x0004_0000];
    let personality = personality.iter().map(|&value| allow(vec![is(0, value)])).collect();

    // Source: Linux `include/uapi/asm-generic/mman-common.h`, MADV_MERGEABLE, and
    // `include/uapi/linux/prctl.h`, PR_SET_MEMORY_MERGE.
    let merge =
        |argument, value| Rule::Check(vec![deny(vec![is(argument, value)], libc::EINVAL)], Box::new(Rule::Allow));

    vec![
        (libc::SYS_madvise, merge(2, 12)),
        (libc::SYS_prctl, merge(0, 67)),
        (libc::SYS_clone, without(namespaces)),
        (libc::SYS_unshare, without(with_time)),
        (libc::SYS_socket, Rule::Check(socket, no_family())),
        (libc::SYS_socketpair, Rule::Check(vec![allow(vec![is(0, libc::AF_UNIX)])], no_family())),
        (libc::SYS_setsockopt, Rule::Check(setsockopt, Box::new(Rule::Allow))),
        (libc::SYS_ioctl, Rule::Check(ioctl, Box::new(Rule::Allow))),
        (libc::SYS_personality, Rule::Check(personality, Box::new(Rule::Refuse(libc::EPERM)))),
    ]
}
