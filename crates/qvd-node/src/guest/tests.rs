//! Programs that are run inside, where every system call of it fails once: the
//! node's own, those of the init, and those that become the program.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::BTreeMap,
    error::Error as StdError,
    fs::{self, File},
    io::Read as _,
    os::{fd::AsFd as _, unix::fs::chown},
    path::Path,
};

use qvd_core::{DesktopId, Instance, UidRange};
use qvd_guest::{Exit, InitConfig};
use qvd_sys::{
    mount::{clone_dir, open_dir_path},
    process::traced::{self, Counted, End},
};
use qvd_testkit::{Need, copy_program, privileged};
use qvd_virt::{Container, ContainerSpec, InheritedFd, Program, Runtime, seal};

use super::*;

const NEEDS: &[Need] = &[Need::Root, Need::UserNamespaces, Need::Cgroup, Need::Env("QVD_INIT")];
const SOON: Duration = Duration::from_secs(20);
const LIMIT: Duration = Duration::from_secs(120);

/// Each error, and after how many calls the next one fails by it.
const ERRORS: [(i32, u32); 5] =
    [(libc::EIO, 1), (libc::ENOMEM, 5), (libc::EPERM, 7), (libc::EMFILE, 11), (libc::ENOSPC, 13)];

/// A container whose first process is the init of desktops, without a session.
struct Inside {
    container: Container,
    guest: Guest,
    _dir: tempfile::TempDir,
    _runtime: Runtime,
}

impl Inside {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        let pid = u16::try_from(std::process::id() & 0xfff).unwrap();
        let ids = UidRange::of_slot(41_000 + u32::from(pid % 16)).unwrap();
        fs::create_dir(&tree).unwrap();
        copy_program("/bin/sh", &tree);
        chown(&tree, Some(ids.base()), Some(ids.base())).unwrap();
        let guest = Guest::at(dir.path().join("init.sock"));
        let control = guest.listen().unwrap();
        let config = InitConfig {
            version: VERSION,
            env: BTreeMap::new(),
            services: Vec::new(),
            session: None,
            name_servers: Vec::new(),
        };
        let config = seal(c"config", &serde_json::to_vec(&config).unwrap()).unwrap();
        let file = seal(c"init", &fs::read(std::env::var_os("QVD_INIT").unwrap()).unwrap()).unwrap();
        let program = Program { file, argv: vec!["qvd-init".to_owned()], env: Vec::new() };
        let root = clone_dir(open_dir_path(&tree).unwrap().as_fd()).unwrap();
        let mut spec = ContainerSpec::new(DesktopId::new(1).unwrap(), root, ids, program);
        spec.fds = vec![
            InheritedFd { number: qvd_guest::fds::CONTROL, fd: control },
            InheritedFd { number: qvd_guest::fds::CONFIG, fd: config },
        ];
        let runtime = Runtime::new(Instance::new(pid.wrapping_mul(16).wrapping_add(15))).unwrap();
        let container = runtime.prepare(spec).unwrap().start().unwrap();
        guest.check().unwrap();
        Self { container, guest, _dir: dir, _runtime: runtime }
    }

    /// Descriptors and children of the init, and our descriptors.
    fn holds(&self) -> [usize; 3] {
        let process = format!("/proc/{}", self.container.pid());
        let count = |path: &Path| fs::read_dir(path).unwrap().count();
        let children = fs::read_to_string(format!("{process}/task/{}/children", self.container.pid())).unwrap();
        let of_init = count(Path::new(&format!("{process}/fd")));
        [of_init, children.split_whitespace().count(), count(Path::new("/proc/self/fd"))]
    }

    fn run(&self, tty: bool) -> Result<(Exit, String), Box<dyn StdError>> {
        let argv = ["sh", "-c", "echo said; exit 3"].map(str::to_owned).to_vec();
        let tty = tty.then_some((24, 80));
        let mut session = self.guest.exec(ExecRequest { argv, env: BTreeMap::new(), root: true, tty })?;
        let mut said = String::new();
        match session.stdio {
            ExecStdio::Pipes { stdin, stdout, stderr } => {
                drop(stdin);
                for output in [stdout, stderr] {
                    File::from(output).read_to_string(&mut said)?;
                }
            }
            ExecStdio::Tty(terminal) => {
                let mut terminal = File::from(terminal);
                let mut bytes = [0; 256];
                // It ends with an error once nobody has its other side open.
                while let Ok(read @ 1..) = terminal.read(&mut bytes) {
                    said.push_str(&String::from_utf8_lossy(&bytes[..read]));
                }
            }
        }
        Ok((session.control.wait(SOON)?, said))
    }
}

/// Whose calls fail.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Whose {
    Ours,
    /// The init's, and its child's until that is the program.
    Inside,
}

/// Runs a program again and again and lets another call of it fail each time.
/// Returns how many did.
fn fail_every_call(inside: &Inside, whose: Whose, tty: bool, errno: i32, stride: u32) -> usize {
    let says = std::io::Error::from_raw_os_error(errno).to_string();
    inside.run(tty).unwrap();
    let settled = |before: Option<[usize; 3]>| {
        let began = Instant::now();
        loop {
            // Whoever answers has heard of what was closed before.
            inside.guest.check().unwrap();
            let holds = inside.holds();
            let children = holds[1];
            if before.map_or(children == 0, |before| holds == before) {
                return holds;
            }
            assert!(began.elapsed() < SOON, "{before:?} became {holds:?}");
        }
    };
    let before = settled(None);
    for (failed, passing) in (0..).step_by(stride as usize).enumerate() {
        match whose {
            Whose::Ours => traced::fail_after(passing, errno).unwrap(),
            Whose::Inside => traced::fail_after_in(inside.container.pid(), passing, errno).unwrap(),
        }
        let result = inside.run(tty);
        let Some(call) = traced::failed().unwrap() else {
            let (exit, said) = result.expect("without a failed call nothing fails");
            assert_eq!((exit, said.trim_end()), (Exit::Code(3), "said"));
            return failed;
        };
        let place = format!("{whose:?}, terminal {tty}, call {passing}, number {call}, failed: {says}");
        match result {
            Ok((Exit::Code(3), said)) => assert!(said.trim_end() == "said" || tty, "{place}: {said}"),
            // The program did not come to run, and says why as far as it could;
            // or it did, and was told to end when its conversation broke.
            Ok((Exit::Code(127 | 101) | Exit::Signal(_), _)) if whose == Whose::Inside => {}
            Ok(other) => panic!("{place}: {other:?}"),
            Err(error) => {
                let text = qvd_core::causes(&*error).join(": ");
                assert!(!text.contains("no answer within"), "{place}: {text}");
                assert!(whose == Whose::Inside || text.contains(&says), "{place}, but one hears: {text}");
            }
        }
        settled(Some(before));
    }
    unreachable!("a program ends")
}

#[test]
#[cfg(target_arch = "x86_64")]
fn every_call_of_a_program_run_inside_fails_once_and_nothing_is_left() {
    privileged(NEEDS, || {
        let run = traced::run(None, Counted::Every, LIMIT, || {
            let mut inside = Inside::start();
            for (whose, tty) in
                [(Whose::Ours, false), (Whose::Ours, true), (Whose::Inside, false), (Whose::Inside, true)]
            {
                for (errno, stride) in ERRORS {
                    let failed = fail_every_call(&inside, whose, tty, errno, stride);
                    eprintln!("{whose:?}, terminal {tty}, errno {errno}: {failed} calls failed");
                    let least = if whose == Whose::Ours { 8 } else { 25 };
                    assert!(failed > least / stride as usize, "{failed}");
                }
            }
            inside.container.close().unwrap();
            0
        });
        assert_eq!(run.unwrap().end, End::Returned(0));
    });
}
