//! Attacks that other runtimes fell for, and which test makes each here.
//!
//! The numbers are those of the project's own list, the names those under which
//! the attacks became known.

use std::{
    fs,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, chown, symlink},
    },
    path::Path,
};

use qvd_core::DesktopId;
use qvd_testkit::privileged;
use qvd_virt::{Error, Exit, Merging, seal};
use rustix::fs::{OFlags, SealFlags};

use crate::{bed::Bed, lifecycle::NEEDS};

/// Where an attack is tried: functions in files, from `crates` on.
type Tried = &'static [(&'static str, &'static str)];

const HERE: &str = "qvd-virt/tests/container/attacks.rs";
const CONFINEMENT: &str = "qvd-virt/tests/container/confinement.rs";
const LIFECYCLE: &str = "qvd-virt/tests/container/lifecycle.rs";
const RACES: &str = "qvd-virt/tests/container/races.rs";
const FAULTS: &str = "qvd-virt/tests/container/faults.rs";
const EVERY_STEP: (&str, &str) = ("qvd-virt/src/runtime/tests.rs", "every_step_of_the_plan_makes_a_difference");

const ATTACKS: [(u8, &str, Tried); 34] = [
    (1, "CVE-2019-5736", &[(HERE, "the_program_that_the_host_gives_cannot_be_overwritten")]),
    (2, "CVE-2024-21626", &[(HERE, "no_descriptor_leads_to_a_directory_of_the_host"), EVERY_STEP]),
    (3, "CVE-2024-21626", &[(CONFINEMENT, "descriptors_of_the_host_do_not_leak")]),
    (
        4,
        "CVE-2023-27561",
        &[
            (LIFECYCLE, "links_where_we_mount_are_refused"),
            (RACES, "whoever_swaps_directories_for_links_gains_nothing"),
        ],
    ),
    (
        5,
        "CVE-2025-31133",
        &[
            (HERE, "what_an_image_puts_where_we_mount_is_neither_used_nor_touched"),
            (CONFINEMENT, "masked_files_tell_nothing_and_read_only_ones_stay"),
        ],
    ),
    (6, "CVE-2025-52565", &[(HERE, "what_an_image_puts_where_we_mount_is_neither_used_nor_touched")]),
    (7, "CVE-2025-52881", &[(HERE, "what_an_image_puts_where_we_mount_is_neither_used_nor_touched")]),
    (
        8,
        "CVE-2026-41579",
        &[
            (LIFECYCLE, "links_where_we_mount_are_refused"),
            (RACES, "whoever_swaps_directories_for_links_gains_nothing"),
        ],
    ),
    (9, "CVE-2026-88264", &[(HERE, "what_an_image_puts_where_we_mount_is_neither_used_nor_touched")]),
    (10, "CVE-2021-30465", &[(RACES, "whoever_swaps_directories_for_links_gains_nothing")]),
    (11, "CVE-2022-29162", &[(HERE, "nobody_has_inheritable_capabilities")]),
    (12, "CVE-2026-30892", &[("qvd-init/tests/binary.rs", "a_user_that_is_none_never_becomes_root")]),
    (13, "CVE-2023-25809", &[(HERE, "no_cgroup_of_the_host_can_be_reached")]),
    (14, "CVE-2014-8989", &[(HERE, "groups_are_those_of_the_range_and_stay")]),
    (15, "CVE-2021-43784", &[(HERE, "no_text_is_too_long_for_whom_it_is_given_to")]),
    (16, "crun 1.28", &[(HERE, "names_that_are_paths_are_refused")]),
    (17, "crun 2262", &[(FAULTS, "every_call_fails_once_and_each_time_one_hears_why_and_nothing_is_left")]),
    (18, "CVE-2026-48749", &[("qvd-storage/tests/hostile.rs", "what_leads_out_or_deceives_is_refused_by_name")]),
    (19, "CVE-2026-48752", &[("qvd-storage/src/treeedit.rs", "nothing_is_written_through_a_link_to_the_host")]),
    (20, "CVE-2026-23954", &[("qvd-storage/src/treeedit.rs", "nothing_is_written_through_a_link_to_the_host")]),
    (21, "CVE-2026-62867", &[("qvd-storage/src/apt.rs", "an_embedded_key_does_not_become_an_option")]),
    (
        22,
        "CVE-2026-33542",
        &[
            ("qvd-storage/tests/hostile.rs", "an_oci_archive_is_what_its_digests_say_or_refused"),
            ("qvd-storage/tests/repository.rs", "what_a_remote_lies_about_does_not_arrive"),
        ],
    ),
    (
        23,
        "GHSA-48q5-w887-33wv",
        &[("qvd-storage/tests/repository.rs", "what_the_policy_does_not_trust_cannot_be_used")],
    ),
    (
        24,
        "CVE-2026-33711",
        &[
            ("qvd-init/src/log.rs", "a_link_in_its_place_is_not_followed"),
            ("qvd-storage/src/treeedit.rs", "nothing_is_written_through_a_link_to_the_host"),
        ],
    ),
    (25, "CVE-2025-64507", &[(HERE, "a_set_user_id_file_of_a_desktop_is_nobodys_on_the_host")]),
    (
        26,
        "CVE-2026-40251",
        &[
            ("qvd-storage/tests/hostile.rs", "broken_archives_are_refused"),
            ("qvd-storage/src/repository/wire/mod.rs", "questions_are_read_back_and_bounded"),
        ],
    ),
    (
        27,
        "CVE-2026-55621",
        &[
            ("qvd-gateway/tests/api.rs", "users_see_and_use_what_is_theirs"),
            ("qvd-gateway/tests/portal.rs", "nobody_runs_a_program_in_anothers_desktop_or_makes_an_image_of_it"),
        ],
    ),
    (28, "CVE-2017-5985", &[(LIFECYCLE, "a_process_that_is_not_the_recorded_one_is_not_adopted")]),
    (
        29,
        "CVE-2017-5226",
        &[
            (CONFINEMENT, "forbidden_system_calls_fail_as_documented"),
            ("qvd-virt/src/seccomp.rs", "arguments_decide_where_they_must"),
            EVERY_STEP,
        ],
    ),
    (30, "CVE-2025-52889", &[("qvd-net/src/tests/attacks.rs", "a_spoof_during_a_rule_update_is_stopped")]),
    (
        31,
        "CVE-2019-18960",
        &[
            ("qvd-virt/src/vm/qmp.rs", "a_hostile_peer_is_given_up_on"),
            ("qvd-guest/tests/link.rs", "a_guest_that_breaks_the_protocol_is_not_talked_with_any_more"),
        ],
    ),
    (
        32,
        "clones of a machine",
        &[("qvd-guest/src/boot.rs", "two_identities_have_nothing_in_common_and_show_no_secret")],
    ),
    (
        33,
        "CVE-2015-2877",
        &[
            (HERE, "nobody_offers_pages_to_be_merged_with_those_of_others"),
            ("qvd-virt/src/vm/arguments.rs", "nobody_shares_pages_unless_allowed_to"),
        ],
    ),
    (
        34,
        "GHSA-8j99-gv74-3j76",
        &[("qvd-storage/tests/repository.rs", "what_the_policy_does_not_trust_cannot_be_used")],
    ),
];

#[test]
fn each_attack_is_tried_where_the_list_says() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for (place, (number, name, tried)) in ATTACKS.iter().enumerate() {
        assert_eq!(usize::from(*number), place + 1, "{name}");
        assert!(!tried.is_empty(), "{name}");
        for (file, test) in *tried {
            let text = fs::read_to_string(crates.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
            assert!(text.contains(&format!("fn {test}() {{")), "{number} {name}: no `{test}` in {file}");
        }
    }
}

#[test]
fn the_program_that_the_host_gives_cannot_be_overwritten() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        // The shell that the host gave holds itself open, becomes another
        // program, and so is not busy any more.
        let attack = "
            exec 8</proc/self/exe 9</proc/1/exe; exec /usr/bin/perl -e '
                for my $n (8, 9) {
                    my $opened = open(F, q(+<), qq(/proc/self/fd/$n));
                    print $opened && defined syswrite(F, q(x)) ? q(written) : q(refused), qq( );
                    print truncate(qq(/proc/self/fd/$n), 0) ? q(cut) : q(refused), qq( );
                }'";
        let mut spec = bed.spec(1, &["/bin/sh", "-c", attack]);
        let content = fs::read(bed.path("/bin/sh")).unwrap();
        spec.program.file = seal(c"shell", &content).unwrap();
        let ours = fs::File::from(spec.program.file.try_clone().unwrap());
        assert_eq!(bed.run_spec(spec), (Exit::Code(0), "refused refused refused refused ".to_owned()));
        let mut now = vec![0; content.len() + 1];
        assert_eq!(ours.read_at(&mut now, 0).unwrap(), content.len());
        assert!(now.starts_with(&content));
        // It is the seals that hold.
        let seals = rustix::fs::fcntl_get_seals(&ours).unwrap();
        assert!(seals.contains(SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL), "{seals:?}");
    });
}

#[test]
fn no_descriptor_leads_to_a_directory_of_the_host() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let dir = rustix::fs::open("/", OFlags::DIRECTORY | OFlags::CLOEXEC, rustix::fs::Mode::empty()).unwrap();
        // As a careless embedder leaves them, at every number that was tried.
        let leaks: Vec<OwnedFd> = (3..64)
            .map(|number| {
                let leak = rustix::io::fcntl_dupfd_cloexec(&dir, number).unwrap();
                rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
                leak
            })
            .collect();
        let attack = "
            for (3 .. 200) { print qq($_ is open ) if chdir qq(/proc/self/fd/$_) }
            chdir q(/proc/self/cwd); print -e q(etc/passwd) ? q(outside) : q(inside);
            print q( ), -e qq(/proc/1/cwd/etc/passwd) ? q(outside) : q(inside);";
        assert_eq!(bed.perl(1, attack), "inside inside");
        assert!(fs::exists("/etc/passwd").unwrap(), "what the attacker would see");
        drop(leaks);
    });
}

#[test]
fn what_an_image_puts_where_we_mount_is_neither_used_nor_touched() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let victim = tempfile::tempdir().unwrap();
        let (file, dir) = (victim.path().join("file"), victim.path().join("dir"));
        fs::write(&file, "the host's").unwrap();
        fs::create_dir(&dir).unwrap();
        for name in ["proc/self/attr", "proc/sys/kernel", "proc/1", "sys/fs", "dev", "run", "tmp"] {
            fs::create_dir_all(bed.path(name)).unwrap();
        }
        // Files that would take what a runtime writes to the kernel, and links
        // in place of what it would mount on, mask with, or unlink.
        let fakes = ["proc/self/attr/exec", "proc/sys/kernel/hostname", "proc/1/uid_map", "proc/kcore", "proc/version"];
        for fake in fakes {
            fs::write(bed.path(fake), "fake").unwrap();
        }
        for link in ["dev/null", "dev/console", "dev/tty", "dev/ptmx", "proc/keys"] {
            symlink(&file, bed.path(link)).unwrap();
        }
        for link in ["dev/pts", "dev/shm", "dev/mqueue", "proc/acpi", "sys/firmware", "run/user"] {
            symlink(&dir, bed.path(link)).unwrap();
        }
        for path in ["proc", "sys", "dev", "run", "tmp"] {
            chown(bed.path(path), Some(bed.ids.base()), Some(bed.ids.base())).unwrap();
        }
        let look = "
            open(F, q(</proc/version)); print join(q( ), (split(q( ), <F>))[0, 1]), qq(\\n);
            for (qw(/dev/null /proc/keys)) { my @s = stat; print $s[6] == 259 ? q(null) : q(other), q( ) }
            open(F, q(>/dev/null)); print F q(x) x 10; close F;
            for (qw(/dev/console /dev/ptmx)) { print -l $_ ? readlink : -e $_ ? q(there) : q(absent), q( ) }
            open(F, q(>/dev/shm/a)) or die; open(F, q(+</dev/ptmx)) or die; opendir(D, q(/run)); print scalar(grep { !/^[.]/ } readdir D);";
        let seen = bed.perl(1, look);
        assert_eq!(seen, "Linux version\nnull null absent pts/ptmx 0");
        assert_eq!(fs::read_to_string(&file).unwrap(), "the host's");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        for fake in fakes {
            assert_eq!(fs::read_to_string(bed.path(fake)).unwrap(), "fake", "{fake}");
        }
        assert_eq!(fs::read_link(bed.path("dev/null")).unwrap(), file);
    });
}

#[test]
fn nobody_has_inheritable_capabilities() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let show = "open(F, q(/proc/self/status)); print grep { /^Cap(Inh|Amb)/ } <F>;";
        let empty = "CapInh:\t0000000000000000\nCapAmb:\t0000000000000000\n";
        assert_eq!(bed.perl(1, show), empty);
        let again = format!("exec q(/usr/bin/perl), q(-e), q({show})");
        assert_eq!(bed.perl(2, &again), empty);
        let of_a_user = format!("$( = $) = 1000; $< = $> = 1000; exec q(/usr/bin/perl), q(-e), q({show})");
        assert_eq!(bed.perl(3, &of_a_user), empty);
    });
}

#[cfg(target_arch = "x86_64")]
#[test]
fn no_cgroup_of_the_host_can_be_reached() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        let attack = format!(
            "open(F, q(/proc/mounts)); print grep {{ /cgroup/ }} <F>;
             for my $kind (map {{ my $copy = $_ }} qw(cgroup cgroup2)) {{
                 print syscall({mount}, my $a = q(none), my $b = q(/tmp), $kind, 0, 0) == -1 ? $!+0 : q(mounted), q( );
             }}
             print mkdir(q(/sys/fs/cgroup/x)) ? q(made) : $!+0;",
            mount = libc::SYS_mount
        );
        // EPERM twice; then the directory is read-only (EROFS), or there is none.
        let seen = bed.perl(1, &attack);
        assert!(["1 1 30", "1 1 2"].contains(&seen.as_str()), "{seen}");
    });
}

#[cfg(target_arch = "x86_64")]
#[test]
fn groups_are_those_of_the_range_and_stay() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        // Executed anew, as the kernel keeps who has changed its user from files
        // of its own process.
        let of_a_user = format!(
            "syscall({unshare}, {user}) == 0 or die $!;
             open(F, q(>/proc/self/gid_map)) or die $!; print defined syswrite(F, q(0 1000 1)) ? q(mapped) : $!+0, q( );
             print syscall({setgroups}, 0, 0) == -1 ? $!+0 : q(dropped);",
            setgroups = libc::SYS_setgroups,
            unshare = libc::SYS_unshare,
            user = libc::CLONE_NEWUSER,
        );
        let attack = format!(
            "$| = 1; my $far = pack q(L), 70000; print syscall({setgroups}, 1, $far) == -1 ? $!+0 : q(taken), q( );
             my $near = pack q(L), 4242; print syscall({setgroups}, 1, $near) == -1 ? $!+0 : q(taken), q( );
             $( = 1000; $) = q(1000 1000); $< = $> = 1000; exec q(/usr/bin/perl), q(-e), q({of_a_user})",
            setgroups = libc::SYS_setgroups,
        );
        // Root may take groups of its range alone (EINVAL else); a user who makes
        // a namespace can map no group while it could drop some (EPERM).
        assert_eq!(bed.perl(1, &attack), "22 taken 1 1");
    });
}

#[cfg(target_arch = "x86_64")]
#[test]
fn nobody_offers_pages_to_be_merged_with_those_of_others() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        // Source: Linux `mman-common.h`, MADV_MERGEABLE, and `prctl.h`, PR_SET_MEMORY_MERGE.
        let attack = format!(
            "my $at = syscall({mmap}, 0, 1 << 20, 3, 0x22, -1, 0); print $at > 0 ? q(memory ) : $!+0;
             print syscall({madvise}, $at, 1 << 20, 12) == -1 ? $!+0 : q(offered), q( );
             print syscall({prctl}, 67, 1, 0, 0, 0) == -1 ? $!+0 : q(offered), q( );
             open(F, q(/proc/self/ksm_stat)); print grep {{ /merge_any|mergeable/i && /yes/ }} <F>;",
            mmap = libc::SYS_mmap,
            madvise = libc::SYS_madvise,
            prctl = libc::SYS_prctl,
        );
        assert_eq!(bed.perl(1, &attack), "memory 22 22 ");
        // Nor does one whose memory its host has offered change that.
        if bed.runtime.can_merge() {
            let mut spec = bed.spec(2, &["/usr/bin/perl", "-e", &attack.replace(", 67, 1,", ", 67, 0,")]);
            spec.profile.merging = Merging::All;
            let (_, said) = bed.run_spec(spec);
            assert!(said.starts_with("memory 22 22 ") && said.contains("merge_any: yes"), "{said}");
        }
    });
}

#[test]
fn no_text_is_too_long_for_whom_it_is_given_to() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        // What would be more than an attribute of netlink, a frame, or a page can hold.
        let long = "x".repeat(70_000);
        let mut spec = bed.spec(1, &["/bin/sh"]);
        spec.hostname.clone_from(&long);
        assert!(matches!(bed.runtime.prepare(spec), Err(Error::Invalid { .. })));
        let mut spec = bed.spec(1, &["/bin/sh"]);
        let mount = bed.root();
        spec.mounts.push(qvd_virt::ContainerMount { target: format!("/{long}").into(), mount });
        let error = bed.runtime.prepare(spec).and_then(qvd_virt::Prepared::start).unwrap_err();
        assert!(crate::lifecycle::whole(&error).contains("File name too long"), "{error}");
        // One argument of the program may be 128 KiB long, all of them no more than
        // the kernel takes: it says so, and nothing is left.
        let mut spec = bed.spec(1, &["/bin/sh"]);
        spec.program.argv.push("x".repeat(200_000));
        let error = bed.runtime.prepare(spec).and_then(qvd_virt::Prepared::start).unwrap_err();
        assert!(crate::lifecycle::whole(&error).contains("Argument list too long"), "{error}");
        bed.assert_empty();
    });
}

#[test]
fn names_that_are_paths_are_refused() {
    privileged(NEEDS, || {
        let bed = Bed::new();
        for name in ["../x", "..", "1/../2", "/", "", "-1", "4294967296"] {
            assert!(name.parse::<DesktopId>().is_err(), "{name}");
        }
        for name in ["../x", "a/b", "", "a\nb"] {
            let mut spec = bed.spec(1, &["/bin/sh"]);
            spec.hostname = name.to_owned();
            assert!(matches!(bed.runtime.prepare(spec), Err(Error::Invalid { .. })), "{name}");
        }
        bed.assert_empty();
    });
}

#[test]
fn a_set_user_id_file_of_a_desktop_is_nobodys_on_the_host() {
    privileged(NEEDS, || {
        use std::os::unix::fs::MetadataExt;
        let bed = Bed::new();
        let plant = "open(F, q(>/bad)); close F; chmod 06755, q(/bad); print((stat q(/bad))[4, 5])";
        assert_eq!(bed.perl(1, plant), "00");
        let made = fs::metadata(bed.path("/bad")).unwrap();
        assert_eq!(made.mode() & 0o7777, 0o6755);
        // Whoever runs it on the host becomes somebody without any right there.
        assert_eq!((made.uid(), made.gid()), (bed.ids.base(), bed.ids.base()));
        assert!(bed.ids.base() >= 1 << 16);
    });
}
