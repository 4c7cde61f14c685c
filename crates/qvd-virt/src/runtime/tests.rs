//! Each protection is taken out, one at a time: an inmate that looks at and tries
//! everything then sees something else, or the container does not start. What
//! makes no difference is named here with what makes up for it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../tests/container/bed.rs"]
#[allow(dead_code, missing_docs, unreachable_pub)]
mod bed;

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    os::{
        fd::AsFd,
        unix::fs::{PermissionsExt, symlink},
    },
    path::PathBuf,
};

use qvd_core::Bytes;
use qvd_sys::mount::{clone_dir, in_private_namespace, open_dir_path};
use qvd_testkit::{Need, privileged};
use rustix::fs::{CWD, FileType, Mode, ResolveFlags, makedev, mknodat};

use self::bed::{Bed, SOON, listen};
use super::{Measures, Namespaces, Op, Plan};
use crate::{ContainerMount, Error, Exit, InheritedFd, Protection};

const NEEDS: &[Need] = &[Need::Root, Need::UserNamespaces, Need::Cgroup];

/// Steps without which an inmate sees the same, and why.
const MADE_UP_FOR: &[(&str, &str)] = &[
    ("close other descriptors", "the process closes at birth what its plan does not name, and that is close-on-exec"),
    ("unblock signals", "a thread of the tests blocks none; a test of `qvd-sys` has one that does"),
    ("leave the keyring", "the filter refuses the calls of keyrings"),
    ("wait for its id map", "a step of the protocol: which of the two is first is chance without it"),
    ("wait for the start", "a step of the protocol, like it"),
];

/// Says what it sees and what it can do, one line each.
const INMATE: &str = r#"
    $| = 1; $SIG{__WARN__} = sub {};
    sub tried { my ($what, $done) = @_; print "$what: ", ($done ? 'done' : $!+0), "\n" }
    sub slurp { my $text = ''; sysread(F, $text, 200) if open(F, '<', $_[0]); $text }
    sub entries { opendir(D, $_[0]) ? scalar(grep { !/^\.\.?$/ } readdir D) : 'none' }
    open(F, '/proc/self/status');
    print grep { /^(Umask|Uid|Gid|Groups|Cap...|NoNewPrivs|Seccomp|SigBlk|SigIgn):/ } <F>;
    print "session ", syscall(GETSID, 0), "\n";
    print "pids $$ ", entries('/proc') > 200 ? 'many' : 'few', "\n";
    print "descriptors ", join(' ', sort { $a <=> $b } grep { /\d/ } (opendir(D, '/proc/self/fd'), readdir D)), "\n";
    print "cgroup ", slurp('/proc/self/cgroup');
    print "host name ", slurp('/proc/sys/kernel/hostname');
    print "lo ", slurp('/sys/class/net/lo/flags');
    print "links ", entries('/sys/class/net'), "\n";
    open(F, '/proc/mounts');
    for (<F>) { my ($at, $kind, $how) = (split)[1..3]; print "$at $kind $how\n" unless $at =~ m{^/(proc|sys)/} }
    for my $f (MASKED) { my @s = stat "/proc/$f"; print "$f ", $s[2] >> 12, ' ', $s[6], ' ', length slurp("/proc/$f"), "\n" }
    for my $d (HIDDEN) {
        my ($top) = $d =~ m{^(/[^/]+)}; my $own = (stat($d))[0] == (stat($top))[0];
        print "$d ", entries($d), $own ? ' as it is' : ' covered', "\n";
    }
    for my $d (STILL) { tried("times of $d", utime 0, 0, "/proc/$d") }
    for my $n (0 .. 2) { print "descriptor $n ", -p "/proc/self/fd/$n" ? 'pipe' : 'other', "\n" }
    # Truncating asks the mount before it asks for the mode.
    tried("host name", open(F, '>', '/proc/sys/kernel/hostname'));
    for my $d ('/dev', '/sys') { tried("mkdir in $d", mkdir "$d/x") }
    for my $f ('/zero', '/home/user/zero') { tried("device $f", open(F, '<', $f)) }
    tried('host', -e 'TREE');
    mkdir '/made'; print "mode ", (stat '/made')[2], "\n"; rmdir '/made';
    for my $f ('/dev/null', '/dev/ptmx', '/dev/shm/a') { tried($f, open(F, '+>', $f)); unlink '/dev/shm/a' }
    tried('working directory', (stat '.')[1] == (stat '/')[1]);
    tried('device node', syscall(MKNOD, my $n = '/node', 0020666, 0x103) == 0);
    tried('mount', syscall(MOUNT, my $a = 'none', my $b = '/tmp', my $c = 'tmpfs', 0, 0) == 0);
    # Nobody would hear why it waits.
    print "END\n" or exit 1;
    <STDIN>;
"#;

/// What the files that the layout covers are called, for the inmate.
fn inmate(bed: &Bed) -> String {
    let words = |names: &[&str]| format!("qw({})", names.join(" "));
    let layout = &bed.runtime.layout;
    let hidden: Vec<_> = layout.proc_dirs.iter().map(|d| format!("/proc/{d}")).collect();
    let hidden = hidden.into_iter().chain(layout.sys_dirs.iter().map(|d| format!("/sys/{d}")));
    INMATE
        .replace("GETSID", &libc::SYS_getsid.to_string())
        .replace("MKNOD", &format!("{}, -100", libc::SYS_mknodat))
        .replace("MOUNT", &libc::SYS_mount.to_string())
        .replace("MASKED", &words(&layout.proc_files))
        .replace("HIDDEN", &format!("qw({})", hidden.collect::<Vec<_>>().join(" ")))
        .replace("STILL", &words(&layout.proc_read_only))
        .replace("TREE", bed.tree.path().to_str().unwrap())
}

/// A tree with what an attacker puts there.
fn hostile_bed() -> Bed {
    let bed = Bed::new();
    fs::create_dir_all(bed.path("/home/user")).unwrap();
    for name in ["/zero", "/outside/zero"] {
        fs::create_dir_all(bed.path("/outside")).unwrap();
        let node = bed.path(name);
        mknodat(CWD, &node, FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(1, 5)).unwrap();
        fs::set_permissions(&node, fs::Permissions::from_mode(0o666)).unwrap();
    }
    bed
}

/// What the inmate of a container says that is confined by `measures` and by
/// what `change` leaves of the plan; or why there is none.
fn report(bed: &Bed, measures: &Measures, change: impl FnOnce(&mut Plan)) -> String {
    // Made by the plan, each time anew.
    for dir in ["dev", "proc", "sys", "tmp", "run"] {
        let _absent = fs::remove_dir(bed.path(dir));
    }
    let mut spec = bed.spec(1, &["/usr/bin/perl", "-e", &inmate(bed)]);
    let mount = clone_dir(open_dir_path(&bed.path("/outside")).unwrap().as_fd()).unwrap();
    spec.mounts.push(ContainerMount { target: PathBuf::from("/home/user"), mount });
    (spec.profile.tmp, spec.profile.shm, spec.profile.run) = (Bytes::mib(1), Bytes::mib(1), Bytes::mib(1));
    let (input, stop) = std::io::pipe().unwrap();
    spec.fds.push(InheritedFd { number: 0, fd: input.into() });
    let output = listen(&mut spec);
    let mut container = match bed.runtime.prepare_with(spec, measures, change).and_then(|prepared| prepared.start()) {
        Ok(container) => container,
        Err(error) => return format!("does not start: {}", qvd_core::causes(&error).join(": ")),
    };
    let lines = BufReader::new(output).lines().map(|line| line.unwrap());
    let mut said: Vec<String> = lines.take_while(|line| line != "END").collect();
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", container.pid())).unwrap();
    said.push(format!("in {} groups of ours", groups.matches(&bed.instance.cgroup_name()).count()));
    drop(stop);
    container.wait(SOON).unwrap();
    container.close().unwrap();
    said.join("\n")
}

#[test]
fn every_step_of_the_plan_makes_a_difference() {
    privileged(NEEDS, || {
        // Nothing that goes wrong here may change the host's mounts.
        in_private_namespace(|| {
            let bed = hostile_bed();
            // What children inherit and must not pass on.
            rustix::thread::set_thread_groups(&[rustix::thread::Gid::from_raw(4242)]).unwrap();
            let leak = rustix::io::fcntl_dupfd_cloexec(File::open("/etc").unwrap(), 40).unwrap();
            let _leak = rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty());

            rustix::process::umask(Mode::from_raw_mode(0o027));

            let mut steps: Vec<String> = Vec::new();
            let whole = report(&bed, &Measures::default(), |plan| {
                plan.retain(|name, _| {
                    steps.extend((steps.last().is_none_or(|last| last != name)).then(|| name.to_owned()));
                    true
                });
            });
            assert!(whole.contains("host name desktop-1"), "{whole}");
            assert_eq!(report(&bed, &Measures::default(), |_| {}), whole, "it is always the same");
            assert!(steps.len() > 40, "{steps:?}");

            let mut same = Vec::new();
            for step in steps.iter().filter(|step| MADE_UP_FOR.iter().all(|(name, _)| name != step)) {
                let without = report(&bed, &Measures::default(), |plan| plan.retain(|name, _| name != step));
                if without == whole {
                    same.push(step);
                }
            }
            assert!(same.is_empty(), "nobody notices when it is left out to {same:?}:\n{whole}");
            for (step, reason) in MADE_UP_FOR {
                assert!(steps.iter().any(|name| name == step), "no step is `{step}` any more, which {reason}");
            }
            bed.assert_empty();
        })
        .unwrap();
    });
}

#[test]
fn every_attribute_of_a_file_system_makes_a_difference() {
    privileged(NEEDS, || {
        in_private_namespace(|| {
            let bed = hostile_bed();
            let whole = report(&bed, &Measures::default(), |_| {});
            let mut changed = 0;
            // MOUNT_ATTR_RDONLY, NOSUID, NODEV and NOEXEC.
            for (kind, bit) in
                [c"proc", c"sysfs", c"devpts", c"mqueue"].into_iter().flat_map(|k| (0..4).map(move |b| (k, 1_u32 << b)))
            {
                let mut had = false;
                let without = report(&bed, &Measures::default(), |plan| {
                    plan.retain(|_, op| {
                        if let Op::MakeFs { kind: this, attributes, .. } | Op::MakeFsAt { kind: this, attributes, .. } =
                            op
                            && this.as_c_str() == kind
                        {
                            had = *attributes & bit != 0;
                            *attributes &= !bit;
                        }
                        true
                    });
                });
                if had {
                    changed += 1;
                    assert_ne!(without, whole, "{kind:?} without attribute {bit}");
                }
            }
            assert!(changed > 10, "{changed}");
            // What lies over a directory so that it can only be read.
            let without = report(&bed, &Measures::default(), |plan| {
                plan.retain(|_, op| {
                    if let Op::CloneTree { attributes, .. } = op {
                        *attributes = 0;
                    }
                    true
                });
            });
            assert!(whole.contains("\nhost name: 30") && !without.contains("\nhost name: 30"), "{whole}\n{without}");
            bed.assert_empty();
        })
        .unwrap();
    });
}

#[test]
fn every_namespace_and_restriction_makes_a_difference() {
    privileged(NEEDS, || {
        in_private_namespace(|| {
            let bed = hostile_bed();
            let full = Measures::default();
            let whole = report(&bed, &full, |_| {});
            assert!(whole.contains("device /zero: 13") && whole.contains("device /home/user/zero: 13"), "{whole}");
            let all = [
                Namespaces::USER,
                Namespaces::MOUNT,
                Namespaces::PID,
                Namespaces::NET,
                Namespaces::UTS,
                Namespaces::IPC,
            ];
            for without in all {
                let others = all.into_iter().filter(|&one| one != without);
                let namespaces = others.fold(Namespaces::NONE, Namespaces::and);
                let seen = report(&bed, &Measures { namespaces, ..full }, |_| {});
                assert!(
                    seen != whole && (seen.starts_with("does not start") || !seen.contains("pids 1 few")),
                    "{seen}"
                );
            }
            let open = qvd_sys::mount::Restrictions::default();
            let seen = report(&bed, &Measures { root: open, ..full }, |_| {});
            assert!(seen.contains("device /zero: done"), "{seen}");
            let seen = report(&bed, &Measures { mounts: open, ..full }, |_| {});
            assert!(seen.contains("device /home/user/zero: done"), "{seen}");
            let home = whole.lines().find(|line| line.starts_with("/home/user ")).unwrap();
            assert!(home.contains("nosuid,nodev"), "{home}");
            bed.assert_empty();
        })
        .unwrap();
    });
}

#[test]
fn without_the_rule_about_links_a_mount_lands_where_the_image_says() {
    privileged(NEEDS, || {
        in_private_namespace(|| {
            let bed = Bed::new();
            fs::create_dir_all(bed.path("/elsewhere/user")).unwrap();
            symlink("elsewhere", bed.path("home")).unwrap();
            let mounted = |measures: &Measures| {
                let mut spec = bed.spec(1, &["/bin/sh", "-c", "test -f /elsewhere/user/file"]);
                let home = tempfile::tempdir().unwrap();
                fs::write(home.path().join("file"), "").unwrap();
                let mount = clone_dir(open_dir_path(home.path()).unwrap().as_fd()).unwrap();
                spec.mounts.push(ContainerMount { target: PathBuf::from("/home/user"), mount });
                let mut container = bed.runtime.prepare_with(spec, measures, |_| {})?.start()?;
                let exit = container.wait(SOON)?;
                container.close()?;
                Ok::<_, Error>(exit)
            };
            assert!(matches!(mounted(&Measures::default()), Err(Error::Invalid { .. })));
            let lax = Measures { resolve: ResolveFlags::BENEATH, ..Measures::default() };
            assert_eq!(mounted(&lax).unwrap(), Some(Exit::Code(0)));
            bed.assert_empty();
        })
        .unwrap();
    });
}

#[test]
fn a_container_weaker_than_its_policy_requires_does_not_run() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let start = |measures: &Measures, without: &str, protection: Protection| {
            let mut spec = bed.spec(1, &["/bin/sh", "-c", ": > /ran"]);
            spec.profile.require = [protection].into();
            let prepared = bed.runtime.prepare_with(spec, measures, |plan| plan.retain(|name, _| name != without))?;
            let mut container = prepared.start()?;
            let exit = container.wait(SOON)?;
            container.close()?;
            Ok::<_, Error>(exit)
        };
        let whole = Measures::default();
        for (without, protection) in [
            ("load the system call filter", Protection::SystemCallFilter),
            ("forbid new privileges", Protection::NoNewPrivileges),
            ("drop capabilities", Protection::Capabilities),
            ("restrict itself by Landlock", Protection::Landlock),
            ("make a cgroup namespace", Protection::Namespaces),
        ] {
            if protection == Protection::Landlock && bed.runtime.landlock.is_none() {
                // Then no host of this kind meets that policy.
                assert!(matches!(start(&whole, "", protection), Err(Error::Weaker { .. })));
                continue;
            }
            assert_eq!(start(&whole, "", protection).unwrap(), Some(Exit::Code(0)), "{protection}");
            fs::remove_file(bed.path("/ran")).unwrap();
            let error = start(&whole, without, protection).unwrap_err();
            assert!(matches!(&error, Error::Weaker { missing, .. } if *missing == protection.to_string()), "{error}");
            assert!(!fs::exists(bed.path("/ran")).unwrap(), "it ran without {protection}");
        }
        // Of a limit that somebody raised, one hears as well.
        let mut spec = bed.spec(1, &["/bin/sh"]);
        spec.profile.require = [Protection::PidsLimit, Protection::MemoryLimit].into();
        let prepared = bed.runtime.prepare(spec).unwrap();
        let unlimited = bed.cgroups().into_iter().map(|group| group.join("1/pids.max")).find(|file| file.exists());
        fs::write(unlimited.unwrap(), "max").unwrap();
        let error = prepared.start().unwrap_err();
        assert!(error.to_string().contains("without a limit of processes, which"), "{error}");
        bed.assert_empty();
    });
}
