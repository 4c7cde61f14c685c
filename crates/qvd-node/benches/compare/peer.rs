//! What QVD is compared with, and the namespaces in which that happens.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    os::{fd::AsFd as _, unix::fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use qvd_net::loopback_up;
use qvd_sys::netns;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{CWD, FileType, Mode, OFlags, mknodat},
    process::{Pid, PidfdFlags, pidfd_open},
};
use serde_json::json;

use crate::{Contestant, INIT, LIMIT, Outcome, Sample, bed::micros};

/// The peers' bridge. Source: `floor.c`, which knows no other name.
const BRIDGE: &str = "pf0";

/// Name of the peers' containers.
const NAME: &str = "qvd-bench";

/// FIFO in the peers' root that process 1 writes a byte to.
const STAMP: &str = "stamp";

/// A network with the peers' bridge, and what they leave on the host.
pub(crate) struct Host {
    groups: BTreeSet<PathBuf>,
    links: BTreeSet<OsString>,
    sys: tempfile::TempDir,
}

impl Host {
    /// Makes the bridge in this network namespace. `lxc-start` looks for it in
    /// `/sys`, which shows the namespace it was mounted in: so a new one is
    /// put over the parts in question, in this mount namespace.
    pub(crate) fn new() -> Outcome<Self> {
        let sys = tempfile::tempdir()?;
        let at = sys.path().to_str().ok_or("the temporary directory's name is not UTF-8")?;
        for line in [
            format!("ip link add {BRIDGE} type bridge"),
            format!("ip addr add 10.66.0.1/16 dev {BRIDGE}"),
            format!("ip link set {BRIDGE} up"),
            format!("mount -t sysfs none {at}"),
            format!("mount --bind {at}/class/net /sys/class/net"),
            format!("mount --bind {at}/devices /sys/devices"),
        ] {
            let mut words = line.split(' ');
            finish(Command::new(words.next().unwrap_or_default()).args(words))?;
        }
        Ok(Self { groups: groups()?, links: links()?, sys })
    }

    /// Waits until the kernel has removed what the last turn left to it: the
    /// links of a network namespace that ended. It holds the lock meanwhile
    /// that whoever makes a link waits for, so that one would pay for another.
    pub(crate) fn settle(&self) -> Outcome<()> {
        let began = Instant::now();
        while links()? != self.links {
            if began.elapsed() > LIMIT {
                return Err(format!("links stay: {:?}", links()?.difference(&self.links)).into());
            }
            thread::sleep(Duration::from_millis(1));
        }
        // Takes that lock, after whoever has it.
        Ok(loopback_up(netns::current()?.as_fd())?)
    }

    /// Removes the cgroups that the peers leave.
    pub(crate) fn close(self) -> Outcome<()> {
        for group in groups()?.difference(&self.groups) {
            // What another's container is in stays: the kernel refuses.
            if let Err(error) = fs::remove_dir(group) {
                eprintln!("cannot remove `{}`: {error}", group.display());
            }
        }
        finish(Command::new("umount").arg(self.sys.path()))
    }
}

/// The links of this network namespace.
fn links() -> Outcome<BTreeSet<OsString>> {
    Ok(fs::read_dir("/sys/class/net")?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?)
}

/// The cgroups that a peer would make, of those there are.
fn groups() -> Outcome<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for hierarchy in fs::read_dir("/sys/fs/cgroup")? {
        for name in ["pf".to_owned(), "lxc.pivot".to_owned(), format!("lxc.payload.{NAME}"), NAME.to_owned()] {
            found.extend(
                Some(hierarchy.as_ref().map_err(ToString::to_string)?.path().join(name)).filter(|p| p.exists()),
            );
        }
    }
    Ok(found)
}

/// A tree with the directories that containers mount on, and process 1.
pub(crate) fn plant(tree: &Path, program: &Path) -> io::Result<()> {
    for name in ["dev", "etc", "proc", "run", "sys", "tmp"] {
        fs::create_dir_all(tree.join(name))?;
    }
    fs::copy(program, tree.join(INIT)).map(drop)
}

/// A tree for a peer that writes into it, with the FIFO.
fn plant_with_stamp(tree: &Path, program: &Path) -> Outcome<()> {
    plant(tree, program)?;
    Ok(mknodat(CWD, tree.join(STAMP), FileType::Fifo, Mode::from_raw_mode(0o666), 0)?)
}

pub(crate) fn compile(source: &Path, to: &Path, how: &str) -> Outcome<()> {
    finish(Command::new("cc").args(["-O2", "-w", "-o"]).arg(to).arg(source).arg(how))
}

/// Runs a command to its end, and says what it said when that is a bad one.
fn finish(command: &mut Command) -> Outcome<()> {
    let said = tempfile::tempfile()?;
    let mut child = command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said.try_clone()?).spawn()?;
    reap(&mut child, said, command)
}

fn reap(child: &mut Child, mut said: File, command: &Command) -> Outcome<()> {
    let ended = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    if poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&Timespec::try_from(LIMIT)?))? == 0 {
        child.kill()?;
    }
    let status = child.wait()?;
    if status.success() {
        return Ok(());
    }
    let mut text = String::new();
    io::Seek::rewind(&mut said)?;
    said.read_to_string(&mut text)?;
    Err(format!("{} ended with {status}: {}", command.get_program().display(), text.trim()).into())
}

/// Runs a container tool until its container has ended: "start" is until the
/// program's byte comes through the FIFO in `tree`.
fn stamped(tree: &Path, command: &mut Command) -> Outcome<Sample> {
    let nonblock = OFlags::NONBLOCK.bits().cast_signed();
    let mut stamp = OpenOptions::new().read(true).custom_flags(nonblock).open(tree.join(STAMP))?;
    let said = tempfile::tempfile()?;
    command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said.try_clone()?);
    let began = Instant::now();
    let mut child = command.spawn()?;
    let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
    poll(
        &mut [PollFd::new(&stamp, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)],
        Some(&Timespec::try_from(LIMIT)?),
    )?;
    let start_us = micros(began);
    let byte = stamp.read(&mut [0]);
    reap(&mut child, said, command)?;
    let cycle_us = micros(began);
    if byte? == 1 { Ok(Sample { start_us, cycle_us }) } else { Err("its program did not run".into()) }
}

/// The least: `floor.c`, in its own process, which takes its own time.
pub(crate) struct Floor {
    program: PathBuf,
    work: PathBuf,
    root: PathBuf,
    cgroups: bool,
}

impl Floor {
    pub(crate) const NAME: &'static str = "floor";

    /// Without `cgroups` it leaves out what costs it most where these are v1:
    /// it moves its child into them, which waits for an RCU grace period.
    pub(crate) fn build(source: &Path, dir: &Path, root: &Path, cgroups: bool) -> Outcome<Box<dyn Contestant>> {
        if !source.exists() {
            return Err(format!("`{}` is not there: name it with FLOOR=PATH", source.display()).into());
        }
        let program = dir.join(Self::NAME);
        compile(source, &program, "-lpthread")?;
        Ok(Box::new(Self { program, work: dir.join("floor.work"), root: root.to_owned(), cgroups }))
    }

    /// Overlay, volatile; veth on the bridge, left to the end of its namespace;
    /// user namespace; system call filter; cgroups.
    fn once(&self) -> Command {
        // As it knows them: the v1 controllers, or the v2 tree beside them.
        let known = [("cpuset/cpuset.cpus", "2"), ("unified/cgroup.procs", "1")];
        let found = known.iter().find(|(file, _)| self.cgroups && Path::new("/sys/fs/cgroup").join(file).exists());
        let cgroups = found.map_or("0", |(_, how)| how);
        let mut command = Command::new(&self.program);
        command.arg("-r").arg(&self.root).arg("-W").arg(&self.work);
        command.args(["-o", "-V", "-n", "2", "-A", "-u", "-s", "-c", cgroups, "-q", "-N", "1"]);
        command.arg("--").arg(Path::new("/").join(INIT));
        command
    }
}

impl Contestant for Floor {
    fn name(&self) -> &'static str {
        if self.cgroups { Self::NAME } else { "floor, no cgroups" }
    }

    fn run(&self) -> Outcome<Sample> {
        let output = self.once().stdin(Stdio::null()).output()?;
        let (said, bad) = (String::from_utf8(output.stdout)?, String::from_utf8_lossy(&output.stderr));
        if !output.status.success() || !bad.is_empty() {
            return Err(format!("it ended with {}: {}", output.status, bad.trim()).into());
        }
        // `CYCLE LEAST MOST start_med=START rate=...`, in microseconds.
        let mut words = said.split_ascii_whitespace();
        let cycle = words.next().ok_or("it said nothing")?;
        let start = words.find_map(|word| word.strip_prefix("start_med=")).ok_or("it named no start")?;
        Ok(Sample { start_us: start.parse()?, cycle_us: cycle.parse()? })
    }

    fn command(&self) -> Option<Command> {
        Some(self.once())
    }
}

/// `runc run` of what `runc spec` gives: no user namespace, no system call
/// filter, and a network namespace with nothing in it.
pub(crate) struct Runc {
    dir: PathBuf,
}

impl Runc {
    pub(crate) fn build(dir: &Path, program: &Path) -> Outcome<Box<dyn Contestant>> {
        let dir = dir.join("runc");
        plant_with_stamp(&dir.join("rootfs"), program)?;
        finish(Command::new("runc").args(["spec", "--bundle"]).arg(&dir))?;
        let config = dir.join("config.json");
        let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&config)?)?;
        spec["process"]["terminal"] = json!(false);
        spec["process"]["args"] = json!([format!("/{INIT}")]);
        fs::write(config, spec.to_string())?;
        Ok(Box::new(Self { dir }))
    }
}

impl Contestant for Runc {
    fn name(&self) -> &'static str {
        "runc run, no port"
    }

    fn run(&self) -> Outcome<Sample> {
        stamped(&self.dir.join("rootfs"), &mut self.command().ok_or("no command")?)
    }

    fn command(&self) -> Option<Command> {
        let mut command = Command::new("runc");
        command.arg("--root").arg(self.dir.join("run")).args(["run", "--bundle"]).arg(&self.dir).arg(NAME);
        Some(command)
    }
}

/// `lxc-start` with a veth on the bridge, address and route: no user
/// namespace, no system call filter.
pub(crate) struct Lxc {
    dir: PathBuf,
}

impl Lxc {
    pub(crate) fn build(dir: &Path, program: &Path) -> Outcome<Box<dyn Contestant>> {
        let dir = dir.join("lxc");
        let root = dir.join("rootfs");
        plant_with_stamp(&root, program)?;
        let config = format!(
            "lxc.uts.name = {NAME}\n\
             lxc.rootfs.path = dir:{}\n\
             lxc.init.cmd = /{INIT}\n\
             lxc.net.0.type = veth\n\
             lxc.net.0.link = {BRIDGE}\n\
             lxc.net.0.flags = up\n\
             lxc.net.0.ipv4.address = 10.66.255.1/16\n\
             lxc.net.0.ipv4.gateway = 10.66.0.1\n\
             lxc.mount.auto = proc:mixed sys:ro\n\
             lxc.console.path = none\n\
             lxc.log.level = ERROR\n",
            root.display()
        );
        fs::write(dir.join("config"), config)?;
        Ok(Box::new(Self { dir }))
    }
}

impl Contestant for Lxc {
    fn name(&self) -> &'static str {
        "lxc-start"
    }

    fn run(&self) -> Outcome<Sample> {
        stamped(&self.dir.join("rootfs"), &mut self.command().ok_or("no command")?)
    }

    fn command(&self) -> Option<Command> {
        let mut command = Command::new("lxc-start");
        command.args(["-F", "-n", NAME, "-P"]).arg(&self.dir).arg("-f").arg(self.dir.join("config"));
        Some(command)
    }
}

/// What any program costs.
pub(crate) struct Fork;

impl Contestant for Fork {
    fn name(&self) -> &'static str {
        "fork, exec, wait"
    }

    fn run(&self) -> Outcome<Sample> {
        let began = Instant::now();
        let mut child = Command::new("/bin/true").stdin(Stdio::null()).spawn()?;
        let start_us = micros(began);
        child.wait()?;
        Ok(Sample { start_us, cycle_us: micros(began) })
    }
}

/// How many system calls the process makes that becomes the container's
/// process 1, until it executes that. Needs `strace`.
pub(crate) fn calls_before_exec(command: &Command, dir: &Path) -> Outcome<usize> {
    let trace = dir.join("trace");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-s", "64", "-o"]).arg(&trace).arg(command.get_program()).args(command.get_args());
    finish(&mut strace)?;
    let trace = fs::read(&trace)?;
    let trace = String::from_utf8_lossy(&trace);
    let lines: Vec<_> = trace.lines().filter_map(|line| line.split_once(' ')).collect();
    let executes = |call: &str| {
        let call = call.trim_start();
        call.starts_with(&format!("execve(\"/{INIT}\"")) || (call.starts_with("execveat(") && call.contains(INIT))
    };
    let at = lines.iter().rposition(|(_, call)| executes(call)).ok_or("the program was not executed")?;
    let (pid, _) = lines.get(at).ok_or("the program was not executed")?;
    let begins = |call: &str| call.trim_start().starts_with(|c: char| c.is_ascii_lowercase());
    Ok(lines.iter().take(at).filter(|(of, call)| of == pid && begins(call)).count())
}
