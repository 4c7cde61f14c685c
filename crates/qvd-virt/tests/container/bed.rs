//! A small tree with a shell and perl, and containers on it.

use std::{
    fs::{self, File},
    io::Read,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{PermissionsExt, chown, symlink},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use qvd_core::{DesktopId, Instance, UidRange};
use qvd_sys::mount::{clone_dir, open_dir_path};
use qvd_testkit::copy_program;
use qvd_virt::{Container, ContainerSpec, Exit, InheritedFd, Program, Runtime};
use tempfile::TempDir;

/// Longer than anything here takes on a busy host.
pub const SOON: Duration = Duration::from_secs(60);

/// Fields drop in order: the runtime before what it ran on.
#[derive(Debug)]
pub struct Bed {
    pub runtime: Runtime,
    pub instance: Instance,
    pub ids: UidRange,
    pub tree: TempDir,
}

impl Bed {
    pub fn new() -> Self {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // Other test processes may run at the same time.
        let pid = u16::try_from(std::process::id() & 0xfff).unwrap();
        let instance = Instance::new(pid.wrapping_mul(16).wrapping_add(number));
        let ids = UidRange::of_slot(40_000 + u32::from(number)).unwrap();
        let tree = tempfile::tempdir().unwrap();
        fs::set_permissions(tree.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for program in ["/bin/sh", "/usr/bin/perl"] {
            copy_program(program, tree.path());
        }
        chown(tree.path(), Some(ids.base()), Some(ids.base())).unwrap();
        Self { runtime: Runtime::new(instance).unwrap(), instance, ids, tree }
    }

    pub fn path(&self, inside: &str) -> PathBuf {
        self.tree.path().join(inside.trim_start_matches('/'))
    }

    pub fn root(&self) -> OwnedFd {
        clone_dir(open_dir_path(self.tree.path()).unwrap().as_fd()).unwrap()
    }

    pub fn program(&self, argv: &[&str]) -> Program {
        Program {
            file: File::open(self.path(argv[0])).unwrap().into(),
            argv: argv.iter().map(|&s| s.to_owned()).collect(),
            env: vec!["PATH=/bin:/usr/bin".to_owned()],
        }
    }

    pub fn spec(&self, number: u32, argv: &[&str]) -> ContainerSpec {
        ContainerSpec::new(DesktopId::new(number).unwrap(), self.root(), self.ids, self.program(argv))
    }

    /// Runs a program to its end; what it wrote to its output and error.
    pub fn run(&self, number: u32, argv: &[&str]) -> (Exit, String) {
        self.run_spec(self.spec(number, argv))
    }

    pub fn run_spec(&self, mut spec: ContainerSpec) -> (Exit, String) {
        let mut output = listen(&mut spec);
        let mut container = self.runtime.prepare(spec).unwrap().start().unwrap();
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        let exit = container.wait(SOON).unwrap().expect("it ends");
        container.close().unwrap();
        (exit, text)
    }

    /// Output of a shell script that must succeed.
    pub fn sh(&self, number: u32, script: &str) -> String {
        let (exit, text) = self.run(number, &["/bin/sh", "-c", script]);
        assert_eq!(exit, Exit::Code(0), "{script}: {text}");
        text
    }

    /// Output of a perl program that must succeed.
    pub fn perl(&self, number: u32, program: &str) -> String {
        let (exit, text) = self.run(number, &["/usr/bin/perl", "-e", program]);
        assert_eq!(exit, Exit::Code(0), "{program}: {text}");
        text
    }

    /// A container that waits until its standard input is closed, and the
    /// other end of that.
    pub fn waiting(&self, number: u32) -> (Container, OwnedFd) {
        let mut spec = self.spec(number, &["/bin/sh", "-c", "read line"]);
        let (theirs, ours) = std::io::pipe().unwrap();
        spec.fds.push(InheritedFd { number: 0, fd: theirs.into() });
        (self.runtime.prepare(spec).unwrap().start().unwrap(), ours.into())
    }

    /// Cgroup directories of this installation.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let name = self.instance.cgroup_name();
        let tops = fs::read_dir("/sys/fs/cgroup").unwrap().map(|entry| entry.unwrap().path());
        let mut found: Vec<_> = tops.map(|top| top.join(&name)).filter(|path| path.exists()).collect();
        let whole = Path::new("/sys/fs/cgroup").join(&name);
        found.extend(whole.exists().then_some(whole));
        found
    }

    /// Asserts that no container of this installation is left.
    pub fn assert_empty(&self) {
        for group in self.cgroups() {
            let below = fs::read_dir(&group).unwrap().map(|entry| entry.unwrap());
            let left: Vec<_> = below.filter(|e| e.file_type().unwrap().is_dir()).map(|e| e.path()).collect();
            assert!(left.is_empty(), "{left:?}");
        }
        assert_eq!(children(), Vec::<u32>::new(), "child processes");
    }
}

/// Children of this thread's process group that have not been reaped. Tests
/// run one per process or serialised, see `gate`.
fn children() -> Vec<u32> {
    let text = fs::read_to_string("/proc/thread-self/children").unwrap();
    text.split_ascii_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// Connects standard output and error of `spec` to a pipe.
pub fn listen(spec: &mut ContainerSpec) -> File {
    let (ours, theirs) = std::io::pipe().unwrap();
    spec.fds.push(InheritedFd { number: 1, fd: theirs.try_clone().unwrap().into() });
    spec.fds.push(InheritedFd { number: 2, fd: theirs.into() });
    File::from(OwnedFd::from(ours))
}

/// A tree in which `/proc` leads elsewhere.
pub fn plant_link(bed: &Bed, name: &str, target: &str) {
    symlink(target, bed.path(name)).unwrap();
}
