//! What a desktop cannot do. For each protection there is an assertion that
//! fails when it is taken out.

use std::fs;

use qvd_core::UidRange;
use qvd_testkit::{Need, privileged};
use qvd_virt::{Exit, InheritedFd, Profile};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

use crate::bed::Bed;

const NEEDS: &[Need] = &[Need::Root, Need::UserNamespaces, Need::Cgroup];

#[test]
fn the_kernel_says_what_is_enforced() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let (mut container, _input) = bed.waiting(1);
        let enforced = container.enforced().unwrap();
        assert!(enforced.no_new_privileges);
        assert!(enforced.seccomp_filter);
        let profile: caps::CapsHashSet = Profile::default().capabilities.into_iter().collect();
        assert_eq!(enforced.bounding, profile);
        assert_eq!(enforced.effective, profile);
        assert_eq!(enforced.ambient, 0);
        assert_eq!(enforced.own_namespaces, ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"]);
        for map in [enforced.uid_map, enforced.gid_map] {
            assert_eq!(map, [[0, bed.ids.base(), UidRange::LEN]]);
        }
        container.close().unwrap();
    });
}

#[test]
fn inside_looks_like_a_machine_of_its_own() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let mut spec = bed.spec(7, &["/usr/bin/perl", "-e", "
            open(F, '/proc/sys/kernel/hostname'); print <F>;
            open(F, '/proc/self/cgroup'); print grep { !m{:/$} } <F>; print qq(cgroups end\\n);
            print join(' ', $<, $>, $(), qq(\\n);
            opendir(D, '/proc'); print scalar(grep { /^\\d+$/ } readdir D), qq(\\n);
            open(F, '/proc/mounts'); print join(' ', sort map { (split)[1] } grep { !m{^\\S+ /(proc|sys)/} } <F>), qq(\\n);
            print +(-c '/dev/null' && -w '/dev/null' ? 'null' : 'none'), qq(\\n);
            open(F, '>/dev/null') or die $!; print F 'x' or die $!; close F or die $!;
            print -p '/dev/ptmx' ? '' : (open(F, '+<', '/dev/ptmx') ? 'pty' : $!), qq(\\n);
            print umask, qq(\\n); print qq($$ ), getppid, ' ', getpgrp, qq(\\n);
            open(F, '/sys/class/net/lo/flags'); print <F>;
            opendir(D, '/sys/class/net'); print join(' ', sort grep { !/^\\./ } readdir D), qq(\\n);
        "]);
        spec.hostname = "desk.example".to_owned();
        // A group of ours that must not go along; this thread ends with the test.
        rustix::thread::set_thread_groups(&[rustix::thread::Gid::from_raw(4242)]).unwrap();
        let (exit, output) = bed.run_spec(spec);
        let expected = [
            "desk.example",
            "cgroups end",
            "0 0 0",
            "1",
            "/ /dev /dev/mqueue /dev/pts /dev/shm /proc /run /sys /tmp",
            "null",
            "pty",
            "18",
            "1 0 1",
            // Up and loopback, and no other interface.
            "0x9",
            "lo",
        ];
        assert_eq!(output.lines().collect::<Vec<_>>(), expected, "{output}");
        assert_eq!(exit, Exit::Code(0));
    });
}

#[test]
fn masked_files_tell_nothing_and_read_only_ones_stay() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let output = bed.perl(
            1,
            "
            for my $f (qw(kcore keys kallsyms sysrq-trigger timer_list latency_stats interrupts)) {
                next unless -e qq(/proc/$f);
                print qq($f is no null device\\n) unless -c qq(/proc/$f) && (stat(_))[6] == (1 << 8 | 3);
                open(F, '<', qq(/proc/$f)) or next; my @l = <F>; print qq($f tells\\n) if @l;
            }
            for my $d (qw(/proc/acpi /proc/pressure /proc/scsi /sys/firmware /sys/module)) {
                next unless -d $d;
                opendir(D, $d); print qq($d tells\\n) if grep { !/^\\.\\.?$/ } readdir D;
            }
            for my $f (qw(/proc/sys/kernel/hostname /proc/sys/net/ipv4/ip_forward /proc/sys/vm/overcommit_memory
                          /sys/kernel/mm/ksm/run)) {
                print qq($f can be written\\n) if open(F, '>', $f);
                print qq($f: $!\\n) unless grep { $_ == $! } 30, 13, 2;
            }
            # Truncating asks the mount before it asks for the mode.
            for my $f (qw(/proc/sys/kernel/hostname /sys/class/net/lo/ifalias)) {
                open(F, '>', $f); print qq($f: $!\\n) unless $! == 30;
            }
            for my $d (qw(/dev /sys)) { mkdir qq($d/x); print qq($d: $!\\n) unless $! == 30 }
        ",
        );
        assert_eq!(output, "");
        // The masks are on what exists; this host must have some of it.
        assert!(fs::exists("/proc/keys").unwrap() || fs::exists("/proc/kallsyms").unwrap());
    });
}

#[test]
fn capabilities_are_few_and_a_user_has_none() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let output = bed.perl(
            1,
            "
            $( = $) = 1000; $< = $> = 1000; die $! if $< != 1000;
            open(F, '/proc/self/status'); print grep { /^Cap(Inh|Prm|Eff|Amb)/ && !/0{16}/ } <F>;
            print 'chown' if chown 0, 0, '/tmp';
        ",
        );
        assert_eq!(output, "");
        // Not in the bounding set: even root cannot make devices or raise its limits.
        let output = bed.perl(
            2,
            "
            require 'syscall.ph' if 0;
            print 'mknod' if syscall(133, my $p = '/tmp/dev', 0020666, 0x103) == 0;
        ",
        );
        if cfg!(target_arch = "x86_64") {
            assert_eq!(output, "");
        }
    });
}

#[test]
fn set_user_id_programs_gain_nothing() {
    privileged(NEEDS, || {
        use std::os::unix::fs::PermissionsExt;
        let bed = Bed::new();
        let program = bed.path("/bin/setuid");
        fs::copy(bed.path("/usr/bin/perl"), &program).unwrap();
        std::os::unix::fs::chown(&program, Some(bed.ids.base()), Some(bed.ids.base())).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
        let become_user = "$( = $) = 1000; $< = $> = 1000; exec '/bin/setuid', '-e', 'print $>'";
        assert_eq!(bed.perl(1, become_user), "1000");
        // The counter-proof: it is the profile that stops it.
        let mut spec = bed.spec(2, &["/usr/bin/perl", "-e", become_user]);
        spec.profile.no_new_privileges = false;
        assert_eq!(bed.run_spec(spec).1, "0");
    });
}

#[test]
fn device_nodes_of_an_image_are_dead() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let node = bed.path("/zero");
        mknodat(CWD, &node, FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(1, 5)).unwrap();
        rustix::fs::chmod(&node, Mode::from_raw_mode(0o666)).unwrap();
        let output = bed.perl(1, "print open(F, '/zero') ? 'open' : $! == 13 ? 'refused' : $!");
        assert_eq!(output, "refused");
    });
}

#[test]
fn temporary_file_systems_are_bounded_and_inert() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let mut spec = bed.spec(
            1,
            &[
                "/usr/bin/perl",
                "-e",
                "
            for my $d (qw(/tmp /dev/shm /run)) {
                my $n = 0; for (1..200) { open(F, '>', qq($d/$_)) or last; $n++ } print qq($d $n\\n) if $n > 100;
                unlink map { qq($d/$_) } 1..200;
                open(F, '>', qq($d/big)); my $w = 0; while (syswrite(F, 'x' x 65536)) { $w++; last if $w > 1000 }
                print qq($d took $w\\n) if $w > 20; unlink qq($d/big);
            }
            open(F, '/proc/mounts');
            print grep { m{ /(tmp|run|dev/shm) } && !/nosuid,nodev/ } <F>;
            printf qq(%o %o\\n), map { (stat)[2] & 07777 } '/tmp', '/run';
            print join(' ', map { (stat)[4] } '/tmp', '/run');
        ",
            ],
        );
        spec.profile.tmp = qvd_core::Bytes::mib(1);
        spec.profile.shm = qvd_core::Bytes::mib(1);
        spec.profile.run = qvd_core::Bytes::mib(1);
        spec.profile.inodes = 100;
        assert_eq!(bed.run_spec(spec), (Exit::Code(0), "1777 755\n0 0".to_owned()));
    });
}

/// System calls that must fail, with the error they must fail with.
#[cfg(target_arch = "x86_64")]
#[test]
fn forbidden_system_calls_fail_as_documented() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let (eperm, enosys) = (libc::EPERM, libc::ENOSYS);
        let calls = [
            ("mount", libc::SYS_mount, 0, eperm),
            ("bpf", libc::SYS_bpf, 0, eperm),
            ("keyctl", libc::SYS_keyctl, 0, eperm),
            ("perf_event_open", libc::SYS_perf_event_open, 0, eperm),
            ("init_module", libc::SYS_init_module, 0, eperm),
            ("reboot", libc::SYS_reboot, 0, eperm),
            ("setns", libc::SYS_setns, 0, eperm),
            ("userfaultfd", libc::SYS_userfaultfd, 0, eperm),
            ("io_uring_setup", libc::SYS_io_uring_setup, 0, enosys),
            ("fsopen", libc::SYS_fsopen, 0, enosys),
            ("open_tree", libc::SYS_open_tree, 0, enosys),
            ("clone3", libc::SYS_clone3, 0, enosys),
            ("x32 getpid", 0x4000_0000 + libc::SYS_getpid, 0, enosys),
            ("unshare(NEWNS)", libc::SYS_unshare, libc::CLONE_NEWNS, eperm),
            ("socket(VSOCK)", libc::SYS_socket, libc::AF_VSOCK, libc::EAFNOSUPPORT),
            ("socket(PACKET)", libc::SYS_socket, libc::AF_PACKET, libc::EAFNOSUPPORT),
        ];
        for (name, number, first, expected) in calls {
            let program = format!("print syscall({number}, {first}, 3, 0, 0, 0) == -1 ? $!+0 : 'done'");
            assert_eq!(bed.perl(1, &program), expected.to_string(), "{name}");
        }
        // What a browser's sandbox is made of works, and gives no way around.
        let sandbox = format!(
            "print syscall({unshare}, {flags}) == 0 ? 'sandbox ' : qq($! );
             print syscall({mount}, my $a = 'none', my $b = '/', my $c = 'tmpfs', 0, 0) == -1 ? $!+0 : 'mounted'",
            unshare = libc::SYS_unshare,
            flags = libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::CLONE_NEWNET,
            mount = libc::SYS_mount,
        );
        assert_eq!(bed.perl(1, &sandbox), format!("sandbox {eperm}"));
    });
}

#[test]
fn descriptors_of_the_host_do_not_leak() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        // Not close-on-exec, as a careless embedder leaves it.
        let leak = fs::File::open("/etc").unwrap();
        let leak = rustix::io::dup(&leak).unwrap();
        rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
        let list = "opendir(D, '/proc/self/fd'); print join(' ', sort grep { /\\d/ } readdir D)";
        let mut spec = bed.spec(1, &["/usr/bin/perl", "-e", list]);
        for number in [3, 4] {
            spec.fds.push(InheritedFd { number, fd: fs::File::open("/dev/null").unwrap().into() });
        }
        // 5 is the directory that is being listed.
        assert_eq!(bed.run_spec(spec).1, "0 1 2 3 4 5");
        drop(leak);
    });
}
