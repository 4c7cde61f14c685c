//! An image's own init: Debian's systemd as process 1, where cgroups are of version 2.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::fs::{chown, symlink},
    },
    sync::mpsc,
    thread,
    time::Duration,
};

use qvd_core::Bytes;
use qvd_testkit::{copy_program, in_bed};
use qvd_virt::{Container, Exit, Profile, Protection};
use rustix::pty::OpenptFlags;

use crate::bed::{Bed, SOON};

const INIT: &str = "/usr/lib/systemd/systemd";

/// What a service sees of its group, what it can do to it, and what it cannot.
const SERVICE: &str = r#"
    echo "group $(cat /proc/self/cgroup)"
    echo "limit $(cat /sys/fs/cgroup/system.slice/ours.service/memory.max)"
    { echo max >/sys/fs/cgroup/memory.max; } 2>/dev/null && echo "freed itself"
    { echo max >/sys/fs/cgroup/pids.max; } 2>/dev/null && echo "freed itself"
    n=0; more=; while [ $n -lt 600 ]; do more="$more /sys/fs/cgroup/more$n"; n=$((n+1)); done
    mkdir $more 2>/dev/null
    set -- /sys/fs/cgroup/more*; [ $# -gt 100 ] && [ $# -lt 600 ] && echo "bounded"
    rmdir "$@"
    mount -t tmpfs none /mnt && echo mounted
    mount -o remount,bind,dev / 2>/dev/null && echo "devices allowed"
    echo "the service ran"
"#;

/// What Debian's packages of systemd and of a shell bring, as far as this goes.
const PROGRAMS: [&str; 9] = [
    INIT,
    "/usr/lib/systemd/systemd-shutdown",
    "/usr/bin/systemctl",
    "/usr/bin/sh",
    "/usr/bin/cat",
    "/usr/bin/mkdir",
    "/usr/bin/rmdir",
    "/usr/bin/rm",
    "/usr/bin/mount",
];
const UNITS: [&str; 16] = [
    "basic.target",
    "sysinit.target",
    "sockets.target",
    "timers.target",
    "paths.target",
    "slices.target",
    "local-fs.target",
    "local-fs-pre.target",
    "swap.target",
    "shutdown.target",
    "umount.target",
    "final.target",
    "halt.target",
    "systemd-halt.service",
    "exit.target",
    "systemd-exit.service",
];

/// A tree of this host's systemd, as its packages have it, with a unit of our own.
fn tree(bed: &Bed) {
    fs::remove_dir_all(bed.path("usr")).unwrap();
    for dir in ["bin", "lib", "lib64", "sbin"] {
        let _copied = fs::remove_dir_all(bed.path(dir));
        fs::create_dir_all(bed.path("usr").join(dir)).unwrap();
        symlink(format!("usr/{dir}"), bed.path(dir)).unwrap();
    }
    for dir in
        ["usr/lib/systemd/system", "etc/systemd/system", "var", "proc", "sys", "dev", "run", "tmp", "mnt", "root"]
    {
        fs::create_dir_all(bed.path(dir)).unwrap();
    }
    // What newer ones start each service by.
    let executor = Some("/usr/lib/systemd/systemd-executor").filter(|path| fs::exists(path).unwrap());
    for program in PROGRAMS.into_iter().chain(executor) {
        copy_program(program, bed.tree.path());
    }
    for unit in UNITS {
        let unit = format!("usr/lib/systemd/system/{unit}");
        fs::copy(format!("/{unit}"), bed.path(&unit)).unwrap();
    }
    fs::write(bed.path("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n").unwrap();
    fs::write(bed.path("etc/group"), "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n").unwrap();
    fs::write(bed.path("etc/machine-id"), "0123456789abcdef0123456789abcdef\n").unwrap();
    // Nothing has to be made anew because of the programs.
    for done in ["etc/.updated", "var/.updated"] {
        fs::write(bed.path(done), "").unwrap();
    }
    fs::write(bed.path("etc/ours"), SERVICE).unwrap();
    let service = "[Service]\nType=oneshot\nRemainAfterExit=yes\nMemoryMax=64M\nStandardOutput=tty\nTTYPath=/dev/console\n\
                   ExecStart=/bin/sh /etc/ours\n";
    fs::write(bed.path("etc/systemd/system/ours.service"), service).unwrap();
    let target = "[Unit]\nRequires=basic.target ours.service\nAfter=basic.target ours.service\n";
    fs::write(bed.path("etc/systemd/system/ours.target"), target).unwrap();
    let own = |path: &str| chown(bed.path(path), Some(bed.ids.base()), Some(bed.ids.base())).unwrap();
    for path in ["etc", "etc/systemd", "var", "run", "tmp", "mnt", "root", "proc", "sys", "dev"] {
        own(path);
    }
}

/// What is written to a terminal, until something that is waited for.
struct Console {
    heard: mpsc::Receiver<String>,
    /// Without it the reader would find nobody at times.
    _terminal: OwnedFd,
    all: String,
}

impl Console {
    fn open() -> (Self, OwnedFd) {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags).unwrap();
        rustix::pty::grantpt(&master).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let terminal = rustix::pty::ioctl_tiocgptpeer(&master, flags).unwrap();
        let (tell, heard) = mpsc::channel();
        thread::spawn(move || {
            let (mut master, mut bytes) = (File::from(master), [0; 4096]);
            while let Ok(read @ 1..) = master.read(&mut bytes) {
                if tell.send(String::from_utf8_lossy(&bytes[..read]).into_owned()).is_err() {
                    return;
                }
            }
        });
        let kept = terminal.try_clone().unwrap();
        (Self { heard, _terminal: kept, all: String::new() }, terminal)
    }

    fn wait_for(&mut self, what: &str) {
        while !self.all.contains(what) {
            match self.heard.recv_timeout(2 * SOON) {
                Ok(more) => {
                    // A failure shows how far it came.
                    std::io::stderr().write_all(more.as_bytes()).unwrap();
                    self.all.push_str(&more);
                }
                Err(error) => panic!("{error} for `{what}`:\n{}", self.all),
            }
        }
    }
}

fn start_systemd(bed: &Bed) -> (Container, Console) {
    let (console, terminal) = Console::open();
    let mut spec = bed.spec(1, &["/etc/ours"]);
    spec.program.file = File::open(bed.path(INIT)).unwrap().into();
    spec.program.argv =
        ["systemd", "--unit=ours.target", "--log-target=console", "--show-status=yes"].map(str::to_owned).to_vec();
    spec.program.env = vec!["container=qvd".to_owned(), "PATH=/usr/bin:/usr/sbin".to_owned()];
    spec.console = Some(terminal);
    spec.limits.io = Some(Bytes::mib(32));
    spec.profile = Profile::system();
    spec.profile.require = Protection::ALL
        .into_iter()
        .filter(|one| !matches!(one, Protection::NoNewPrivileges | Protection::Landlock))
        .collect();
    (bed.runtime.prepare(spec).unwrap().start().unwrap(), console)
}

fn systemd_runs_services_in_its_own_part_of_the_tree(bed: &Bed) {
    tree(bed);
    let (mut container, mut console) = start_systemd(bed);
    console.wait_for("the service ran");
    let said = console.all.clone();
    for line in ["group 0::/system.slice/ours.service", "limit 67108864", "bounded", "mounted"] {
        assert!(said.contains(line), "no `{line}`:\n{said}");
    }
    assert!(!said.contains("freed itself") && !said.contains("devices allowed"), "{said}");
    let enforced = container.enforced().unwrap();
    assert!(enforced.limits["io.max"].contains("wbps=33554432"), "{:?}", enforced.limits);
    let pressure = container.pressure().unwrap().expect("this kernel counts it");
    assert!(pressure.cpu.some_percent >= 0.0 && pressure.cpu.some_total > Duration::ZERO, "{pressure:?}");
    container.ask_to_halt().unwrap();
    assert_eq!(container.wait(2 * SOON).unwrap(), Some(Exit::Code(0)), "{}", console.all);
    container.close().unwrap();
    bed.assert_empty();

    // In the middle of its start, and frozen, it is ended all the same.
    let (mut container, _console) = start_systemd(bed);
    container.freezer().unwrap().freeze().unwrap();
    container.close().unwrap();
    bed.assert_empty();
}

#[test]
fn systemd_is_process_1_where_cgroups_are_of_version_2() {
    let machine = qvd_testkit::Bed::new().memory_mib(1024).disk_mib(16).limit(Duration::from_secs(300));
    in_bed(&machine, || {
        systemd_runs_services_in_its_own_part_of_the_tree(&Bed::new());
    });
}
