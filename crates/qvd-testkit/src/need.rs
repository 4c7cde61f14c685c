//! What a test needs of its host, and the gate in front of such tests.

use std::{env, ffi::OsStr, fmt, fs, io, path::Path, process::Command};

use rustix::mount::{FsOpenFlags, fsopen};

/// Variable that demands the privileged tests.
const DEMAND: &str = "QVD_TEST_PRIVILEGED";

/// Something that not every host gives to a test.
///
/// Each is checked by trying, where trying leaves nothing behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Need {
    /// Effective uid 0.
    Root,
    /// A new user namespace.
    UserNamespaces,
    /// New mount, network, pid, uts and ipc namespaces.
    Namespaces,
    /// A cgroup hierarchy in which directories can be made.
    Cgroup,
    /// A kernel file system type, such as `overlay`.
    Filesystem(&'static str),
    /// nftables: the program, and the kernel's answer to it.
    Nftables,
    /// Loop devices.
    LoopDevices,
    /// `/dev/kvm`, opened for reading and writing. Some hosts offer the device
    /// and hang in it: a test that runs a guest keeps its own deadline.
    Kvm,
    /// The test bed, see [`in_bed`](crate::in_bed), and the emulator for it.
    Bed,
    /// The disk with Debian on it, see [`debian_disk`](crate::debian_disk).
    DebianDisk,
    /// PostgreSQL, of any version.
    Postgres,
    /// A program in `PATH`.
    Program(&'static str),
    /// An environment variable that names what the test works on.
    Env(&'static str),
    /// A path that exists.
    Path(&'static str),
}

/// A need that this host does not meet, and how that showed.
#[derive(Debug)]
pub struct Lack {
    need: Need,
    reason: String,
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.need, self.reason)
    }
}

impl std::error::Error for Lack {}

impl Need {
    /// Finds out whether this host meets the need.
    ///
    /// # Errors
    /// It does not; the error says how that showed.
    pub fn check(self) -> Result<(), Lack> {
        let result = match self {
            Self::Root if rustix::process::geteuid().is_root() => Ok(()),
            Self::Root => Err("the tests run as another user".to_owned()),
            // util-linux's program, because a user namespace cannot be entered
            // by a process with threads, which every test process is.
            Self::UserNamespaces => succeeds("unshare", &["--user", "--map-root-user", "true"]),
            Self::Namespaces => succeeds("unshare", &["--mount", "--net", "--pid", "--fork", "--uts", "--ipc", "true"]),
            Self::Cgroup => cgroup(),
            Self::Filesystem(name) => {
                fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC).map(drop).map_err(|e| io::Error::from(e).to_string())
            }
            Self::Nftables => succeeds("nft", &["list", "tables"]),
            Self::LoopDevices => open_read_write("/dev/loop-control"),
            Self::Kvm => open_read_write("/dev/kvm"),
            Self::Bed => match crate::bed::directory() {
                Some(_) => program("qemu-system-x86_64"),
                None => Err("it is not built; `make bed` does that".to_owned()),
            },
            Self::DebianDisk => match crate::bed::debian_disk() {
                Some(_) => Ok(()),
                None => Err("it is not made; `make disk` does that".to_owned()),
            },
            Self::Postgres => match crate::postgres::programs() {
                Some(_) => Ok(()),
                None => Err("it is not installed".to_owned()),
            },
            Self::Program(name) => program(name),
            Self::Env(name) => match env::var_os(name) {
                Some(value) if !value.is_empty() => Ok(()),
                _ => Err("it is not set".to_owned()),
            },
            Self::Path(path) => fs::metadata(path).map(drop).map_err(|e| e.to_string()),
        };
        result.map_err(|reason| Lack { need: self, reason })
    }
}

fn succeeds(program: &str, args: &[&str]) -> Result<(), String> {
    match Command::new(program).args(args).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Err(format!("{program}: {error}")),
    }
}

fn open_read_write(path: &str) -> Result<(), String> {
    fs::OpenOptions::new().read(true).write(true).open(path).map(drop).map_err(|e| e.to_string())
}

fn program(name: &str) -> Result<(), String> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).any(|dir| dir.join(name).is_file());
    found.then_some(()).ok_or_else(|| "it is not in PATH".to_owned())
}

fn cgroup() -> Result<(), String> {
    let mut reason = "no cgroup hierarchy is mounted".to_owned();
    for root in cgroup_roots().map_err(|e| e.to_string())? {
        let probe = Path::new(&root).join(format!("qvd-need-{}", std::process::id()));
        match fs::create_dir(&probe).and_then(|()| fs::remove_dir(&probe)) {
            Ok(()) => return Ok(()),
            Err(error) => reason = format!("{}: {error}", probe.display()),
        }
    }
    Err(reason)
}

/// Mount points of every cgroup hierarchy, of version 1 and 2.
pub(crate) fn cgroup_roots() -> io::Result<Vec<String>> {
    // Source: proc_pid_mountinfo(5); the type follows the separator ` - `.
    Ok(fs::read_to_string("/proc/self/mountinfo")?
        .lines()
        .filter_map(|line| {
            let (mount, source) = line.split_once(" - ")?;
            let kind = source.split(' ').next()?;
            matches!(kind, "cgroup" | "cgroup2").then(|| mount.split(' ').nth(4).map(str::to_owned))?
        })
        .collect())
}

/// Runs `test` where the host allows it, and never lets a skip pass for a pass.
///
/// `QVD_TEST_PRIVILEGED` unset: skips, loudly. Set (as `make test` and CI do):
/// a missing need fails, so that the suite cannot quietly shrink to nothing.
///
/// # Panics
/// The tests are demanded and a need is not met; or `test` panics.
pub fn privileged(needs: &[Need], test: impl FnOnce()) {
    gate(env::var_os(DEMAND).as_deref(), needs, test);
}

fn gate(demand: Option<&OsStr>, needs: &[Need], test: impl FnOnce()) {
    if demand.is_none() {
        eprintln!("SKIPPED: set {DEMAND}=1 (needs {needs:?})");
        return;
    }
    let missing: Vec<String> =
        needs.iter().filter_map(|need| need.check().err()).map(|lack| lack.to_string()).collect();
    assert!(missing.is_empty(), "{DEMAND} is set but this host lacks {}", missing.join("; "));
    test();
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::panic::catch_unwind;

    const ABSENT: Need = Need::Program("qvd-no-such-program");

    #[test]
    fn what_is_missing_is_named() {
        assert!(ABSENT.check().unwrap_err().to_string().contains("qvd-no-such-program"));
        assert!(Need::Path("/nonexistent").check().is_err());
        assert!(Need::Env("QVD_NO_SUCH_VARIABLE").check().is_err());
        assert!(Need::Filesystem("qvd-no-such-fs").check().is_err());
        Need::Program("sh").check().unwrap();
        Need::Path("/proc").check().unwrap();
    }

    #[test]
    fn a_demanded_test_that_cannot_run_fails() {
        assert!(catch_unwind(|| gate(Some(OsStr::new("1")), &[ABSENT], || ())).is_err());
    }

    #[test]
    fn a_test_runs_only_when_demanded() {
        let mut ran = false;
        gate(None, &[], || ran = true);
        assert!(!ran);
        gate(Some(OsStr::new("1")), &[Need::Path("/proc")], || ran = true);
        assert!(ran);
    }

    #[test]
    fn root_gets_what_it_asks_for() {
        privileged(&[Need::Root, Need::Namespaces, Need::Cgroup], || {
            assert!(!cgroup_roots().unwrap().is_empty());
        });
    }
}
