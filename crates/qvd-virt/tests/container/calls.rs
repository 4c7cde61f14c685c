//! The shorter list of system calls, for applications.
#![cfg(target_arch = "x86_64")]

use std::{os::fd::AsFd as _, path::PathBuf};

use qvd_core::Calls;
use qvd_sys::mount::{Restrictions, clone_tree, open_dir_path, restrict};
use qvd_testkit::{Need, privileged};
use qvd_virt::{ContainerMount, Exit};

use crate::{bed::Bed, lifecycle::NEEDS};

#[test]
fn an_application_is_refused_what_a_desktop_may() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let (eperm, enosys) = (libc::EPERM, libc::ENOSYS);
        let user = libc::CLONE_NEWUSER;
        let calls = [
            ("ptrace", libc::SYS_ptrace, 16, eperm),
            ("process_vm_readv", libc::SYS_process_vm_readv, 1, eperm),
            ("kcmp", libc::SYS_kcmp, 1, eperm),
            ("pidfd_getfd", libc::SYS_pidfd_getfd, 1, eperm),
            ("chroot", libc::SYS_chroot, 0, eperm),
            ("unshare(NEWUSER)", libc::SYS_unshare, user, eperm),
            ("clone(NEWUSER)", libc::SYS_clone, user | libc::SIGCHLD, eperm),
            ("sethostname", libc::SYS_sethostname, 0, eperm),
            ("mknod(device)", libc::SYS_mknodat, 0, eperm),
            ("io_setup", libc::SYS_io_setup, 1, enosys),
            ("vmsplice", libc::SYS_vmsplice, 1, enosys),
            ("remap_file_pages", libc::SYS_remap_file_pages, 0, enosys),
            ("msgget", libc::SYS_msgget, 0, enosys),
            ("mq_open", libc::SYS_mq_open, 0, enosys),
            ("name_to_handle_at", libc::SYS_name_to_handle_at, 0, enosys),
            ("socket(NETLINK, UEVENT)", libc::SYS_socket, libc::AF_NETLINK, libc::EAFNOSUPPORT),
            // And what nobody may.
            ("bpf", libc::SYS_bpf, 0, eperm),
            ("io_uring_setup", libc::SYS_io_uring_setup, 0, enosys),
        ];
        let try_each = |calls: &[(&str, libc::c_long, i32, i32)]| {
            let one = |(_, number, first, _): &(&str, libc::c_long, i32, i32)| {
                // For mknodat the third argument is a mode, for socket a protocol.
                let third = if *number == libc::SYS_mknodat { libc::S_IFCHR } else { 15 };
                format!(
                    "$r = syscall({number}, {first}, 3, {third}, 0, 0, 0); exit if !$r && {number} == {clone}; print $r == -1 ? $!+0 : q(done), q( );",
                    clone = libc::SYS_clone
                )
            };
            let mut spec = bed.spec(1, &["/usr/bin/perl", "-e", &calls.iter().map(one).collect::<String>()]);
            spec.profile.calls = Calls::Application;
            let (exit, said) = bed.run_spec(spec);
            assert_eq!(exit, Exit::Code(0), "{said}");
            said.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        let expected: Vec<_> = calls.iter().map(|(name, .., error)| format!("{name}: {error}")).collect();
        let said = try_each(&calls);
        let found: Vec<_> = calls.iter().zip(&said).map(|((name, ..), said)| format!("{name}: {said}")).collect();
        assert_eq!(found, expected);
        // The counter-proof: a desktop may make a namespace of users.
        let may = format!("print syscall({}, {user}) == 0 ? q(made) : $!+0", libc::SYS_unshare);
        assert_eq!(bed.perl(1, &may), "made");
        bed.assert_empty();
    });
}

/// What programs do: threads and processes, pipes, sockets of each kind that is
/// allowed, files and their attributes, memory that is shared, clocks, signals.
const PYTHON: &str = r#"
import os, sys, socket, threading, subprocess, multiprocessing, tempfile, mmap, select, signal, ssl, sqlite3, time, shutil
def square(n): return n * n
with multiprocessing.get_context('fork').Pool(2) as pool: assert pool.map(square, range(9))[8] == 64
threads = [threading.Thread(target=time.sleep, args=(0.01,)) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
assert subprocess.run(['/usr/bin/bash', '-c', 'echo $((6*7)) | cat'], capture_output=True).stdout == b'42\n'
for family, at in ((socket.AF_INET, ('127.0.0.1', 0)), (socket.AF_UNIX, '/tmp/s')):
    server = socket.socket(family); server.bind(at); server.listen()
    client = socket.socket(family); client.connect(server.getsockname())
    client.send(b'x'); assert server.accept()[0].recv(1) == b'x'
assert socket.getaddrinfo('localhost', 80)
db = sqlite3.connect('/tmp/db'); db.execute('create table t(a)'); db.execute('insert into t values(1)'); db.commit()
os.mkfifo('/tmp/fifo'); os.symlink('fifo', '/tmp/link'); os.rename('/tmp/link', '/tmp/link2')
os.mkdir('/tmp/d'); shutil.move('/tmp/link2', '/tmp/d/link'); os.chmod('/tmp/d', 0o700); os.utime('/tmp/d')
memory = mmap.mmap(-1, 4096); memory[0] = 1
poll = select.epoll(); poll.register(client, select.EPOLLIN); poll.poll(0)
signal.signal(signal.SIGALRM, lambda *_: None); signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()
ssl.create_default_context(); os.urandom(8); os.sched_getaffinity(0); os.getrandom(4)
print('python works')
"#;

#[test]
fn ordinary_programs_run_as_applications() {
    privileged(&[Need::Root, Need::UserNamespaces, Need::Cgroup, Need::Path("/usr/bin/python3")], || {
        let bed = Bed::new();
        let bash = "set -e; diff <(printf 'a\\nb\\n' | sort -r | sort) <(echo a; echo b); ls -la /usr/bin >/tmp/l
            grep -c . /tmp/l >/dev/null; tar -C /etc -cf - passwd | tar -tf -; find /etc -maxdepth 1 | head -3 >/dev/null
            exec 3<>/tmp/f; sleep 0.01 & wait; id -u; exec /usr/bin/python3 -c \"$1\"";
        let mut spec = bed.spec(1, &["/bin/sh", "-c", "exec /usr/bin/bash -c \"$@\"", "sh", bash, "bash", PYTHON]);
        spec.program.env.push("HOME=/tmp".to_owned());
        spec.profile.calls = Calls::Application;
        for target in ["/usr", "/etc"].map(PathBuf::from) {
            let mount = clone_tree(open_dir_path(&target).unwrap().as_fd()).unwrap();
            let limited = Restrictions { read_only: true, nosuid: true, nodev: true, noexec: false };
            restrict(mount.as_fd(), limited, None).unwrap();
            spec.mounts.push(ContainerMount { target, mount });
        }
        let (exit, said) = bed.run_spec(spec);
        assert_eq!((exit, said.as_str()), (Exit::Code(0), "passwd\n0\npython works\n"));
        bed.assert_empty();
    });
}
