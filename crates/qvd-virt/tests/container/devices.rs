//! Devices of the host: none, unless the policy says so.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::fd::AsFd as _,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::Instant,
};

use qvd_core::Device;
use qvd_sys::mount::{FsContext, Restrictions, attach, clone_dir, in_private_namespace, open_dir_path};
use qvd_testkit::{Need, privileged};
use qvd_virt::{ContainerMount, ContainerSpec, Error, Exit, FuseMount};
use rustix::process::{Pid, Signal, kill_process};

use crate::bed::{Bed, SOON, listen};

const NEEDS: &[Need] = &[Need::Root, Need::UserNamespaces, Need::Cgroup, Need::Path("/dev/fuse")];

/// Serves a directory with one file. The formats are those of Linux
/// `include/uapi/linux/fuse.h`, spoken as version 7.12.
const SERVER: &str = r#"
    $| = 1; open(F, '+<&=FD') or die "no descriptor: $!";
    sub attr { pack 'Q6 L10', $_[0], length $text, 1, 0, 1234567890, 0, 0, 0, 0, $_[1], 1, 0, 0, 0, 4096, 0 }
    sub answer { my ($unique, $error, $data) = @_; syswrite F, pack('L l Q', 16 + length $data, $error, $unique) . $data }
    sub serve {
        while (sysread F, my $request, 1 << 18) {
            my (undef, $call, $unique, $node) = unpack 'L L Q Q', $request;
            next if $call == 2 || $call == 36;
            if ($call == 26) { answer($unique, 0, pack 'L4 S2 L', 7, 12, 65536, 0, 8, 8, 65536) }
            elsif ($call == 3 && $hangs) { print "asked\n" }
            elsif ($call == 3) { answer($unique, 0, pack('Q L2', 0, 0, 0) . ($node == 1 ? attr(1, 040755) : attr(2, 0100444))) }
            elsif ($call == 1) { answer($unique, 0, pack('Q4 L2', 2, 0, 0, 0, 0, 0) . attr(2, 0100444)) }
            elsif ($call == 14) { answer($unique, 0, pack 'Q L2', 1, 0, 0) }
            elsif ($call == 15) { my $at = unpack 'x48 Q', $request; answer($unique, 0, substr $text, $at) }
            elsif ($call == 18 || $call == 25) { answer($unique, 0, '') }
            else { answer($unique, -38, '') }
        }
    }
    $text = "served\n";
"#;

fn with_fuse(bed: &Bed, program: &str) -> ContainerSpec {
    let mut spec = bed.spec(1, &["/usr/bin/perl", "-e", &format!("{}{program}", SERVER.replace("FD", "5"))]);
    spec.profile.devices.insert(Device::Fuse);
    spec.fuse.push(FuseMount { target: PathBuf::from("/mnt/fuse"), number: 5, owner: 0 });
    spec
}

#[test]
fn a_container_has_no_device_that_was_not_given_to_it() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let list = "opendir(D, q(/dev)); print join(q( ), sort grep { !/^[.]/ } readdir D), qq(\\n);
            print open(F, q(+<), q(/dev/fuse)) ? q(open) : $!+0;";
        let bare = "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero";
        assert_eq!(bed.perl(1, list), format!("{bare}\n2"));
        let mut spec = bed.spec(2, &["/usr/bin/perl", "-e", list]);
        spec.profile.devices.insert(Device::Fuse);
        let with = bare.replace("full", "full fuse");
        assert_eq!(bed.run_spec(spec), (Exit::Code(0), format!("{with}\nopen")));
        bed.assert_empty();
    });
}

#[test]
fn a_program_serves_a_file_system_where_the_policy_allows_it() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let read = "
            if (!fork) { serve(); exit }
            print join(q( ), (stat q(/mnt/fuse))[2, 4, 9]), qq(\\n);
            open(G, q(</mnt/fuse/file)) or die qq(open: $!); print <G>;
            # As a user, too, who may not write.
            $( = $) = 1000; $< = $> = 1000;
            open(G, q(</mnt/fuse/file)) or die qq(open: $!); print <G>;
            print open(G, q(>>/mnt/fuse/file)) ? q(writes) : $!+0;";
        let (exit, said) = bed.run_spec(with_fuse(&bed, read));
        assert_eq!((exit, said.as_str()), (Exit::Code(0), "16877 0 1234567890\nserved\nserved\n13"));

        let mut refused = with_fuse(&bed, read);
        refused.profile.devices.clear();
        let error = bed.runtime.prepare(refused).unwrap_err();
        assert!(matches!(&error, Error::Invalid { reason, .. } if reason.contains("`fuse`")), "{error}");
        let mut nested = with_fuse(&bed, read);
        nested.fuse.push(FuseMount { target: PathBuf::from("/mnt/fuse/below"), number: 6, owner: 0 });
        assert!(matches!(bed.runtime.prepare(nested), Err(Error::Invalid { .. })));
        bed.assert_empty();
    });
}

#[cfg(target_arch = "x86_64")]
#[test]
fn with_the_device_alone_nothing_can_be_mounted() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let attack = format!(
            "open(F, q(+<), q(/dev/fuse)) or die; my ($a, $b, $c) = (q(none), q(/tmp), q(fuse));
             my $o = q(rootmode=40000,user_id=0,group_id=0,fd=) . fileno F;
             print syscall({mount}, $a, $b, $c, 0, $o) == -1 ? $!+0 : q(mounted);",
            mount = libc::SYS_mount
        );
        let mut spec = bed.spec(1, &["/usr/bin/perl", "-e", &attack]);
        spec.profile.devices.insert(Device::Fuse);
        assert_eq!(bed.run_spec(spec), (Exit::Code(0), "1".to_owned()));
    });
}

#[test]
fn a_process_that_cannot_be_disturbed_does_not_keep_its_container() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let mut spec =
            with_fuse(&bed, "$hangs = 1; if (!fork) { stat q(/mnt/fuse); print qq(back\\n); exit } serve();");
        let mut output = BufReader::new(listen(&mut spec));
        let mut container = bed.runtime.prepare(spec).unwrap().start().unwrap();
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "asked\n");
        // Who was asked is alive, so not even a kill ends the wait of who asks.
        let group = fs::read_to_string(bed.cgroups().first().unwrap().join("1/cgroup.procs")).unwrap();
        let asks = group.lines().find(|pid| **pid != container.pid().to_string()).unwrap();
        let pid = Pid::from_raw(asks.parse().unwrap()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
        let began = Instant::now();
        while !fs::read_to_string(format!("/proc/{asks}/stat")).unwrap().contains(") D ") {
            assert!(began.elapsed() < SOON, "it never got stuck");
            std::thread::yield_now();
        }
        // It holds the other end itself, so it would wait for ever.
        container.close().unwrap();
        assert!(!fs::exists(format!("/proc/{asks}")).unwrap());
        bed.assert_empty();
    });
}

#[test]
fn a_file_system_of_the_host_that_hangs_keeps_a_container_and_nobody_else() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        // In a mount table that ends with the test.
        in_private_namespace(|| {
            let dir = tempfile::tempdir().unwrap();
            let device = fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
            let fs = FsContext::open("fuse").unwrap();
            let fd = std::os::fd::AsRawFd::as_raw_fd(&device).to_string();
            for (key, value) in [("fd", &*fd), ("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")] {
                fs.set(key, value).unwrap();
            }
            fs.set_flag("allow_other").unwrap();
            attach(fs.mount(Restrictions::default()).unwrap().as_fd(), open_dir_path(dir.path()).unwrap().as_fd())
                .unwrap();
            let server = format!("{}$hangs = 1; serve();", SERVER.replace("FD", "0"));
            let mut server =
                Command::new("perl").args(["-e", &server]).stdin(device).stdout(Stdio::piped()).spawn().unwrap();

            let mut spec = bed.spec(1, &["/usr/bin/perl", "-e", "stat q(/mnt/dead)"]);
            let mount = clone_dir(open_dir_path(dir.path()).unwrap().as_fd()).unwrap();
            spec.mounts.push(ContainerMount { target: PathBuf::from("/mnt/dead"), mount });
            let mut container = bed.runtime.prepare(spec).unwrap().start().unwrap();
            let mut asked = String::new();
            BufReader::new(server.stdout.take().unwrap()).read_line(&mut asked).unwrap();
            assert_eq!(asked, "asked\n");

            let (mut container, closed) = thread::scope(|scope| {
                let closing = scope.spawn(move || {
                    let closed = container.close();
                    (container, closed)
                });
                // Meanwhile others come and go.
                for number in 2..5 {
                    bed.sh(number, "true");
                }
                closing.join().unwrap()
            });
            assert!(matches!(closed, Err(Error::Timeout { .. })), "{closed:?}");
            // It is the host's, and others may use it: it was not ended for this one.
            assert_eq!(server.try_wait().unwrap(), None);
            assert_eq!(container.try_wait().unwrap(), None);
            assert!(matches!(bed.runtime.prepare(bed.spec(1, &["/bin/sh"])), Err(Error::Busy(_))));
            server.kill().unwrap();
            server.wait().unwrap();
            container.close().unwrap();
            assert_eq!(container.try_wait().unwrap(), Some(Exit::Signal(9)));
            bed.assert_empty();
        })
        .unwrap();
    });
}
