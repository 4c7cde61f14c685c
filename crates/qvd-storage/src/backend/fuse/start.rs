//! Starting a program that serves a root, in a place that holds nothing but
//! what it needs.

use std::{
    ffi::CString,
    fs::{File, read_link},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use qvd_core::Missing;
use qvd_sys::{
    mount::{self, FsContext, MountError, Restrictions},
    process::{self, Event, ExecArgs, Namespaces, Op, Plan, Process, SpawnError, Spawned},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{
        AtFlags, MemfdFlags, Mode, OFlags, SealFlags, StatxFlags, fcntl_add_seals, ftruncate, memfd_create, mkdirat,
        openat, statx, symlinkat,
    },
    io::Errno,
    mount::{UnmountFlags, unmount},
    process::{Signal, chdir, fchdir, pivot_root},
};

use super::{
    Layers, lacks,
    server::{self, Note, Server},
    union::{BASE, CONNECTION, FILES, MOUNT, Union},
};
use crate::{Error, backend::RootId};

/// How long a program may take from its start to its first answer: reading a
/// program from a busy disk takes seconds.
const ANSWERS_WITHIN: Duration = Duration::from_secs(30);

/// What is kept of a program's complaints.
const SAID_BYTES: u64 = 16 << 10;

/// Starts the program and makes a detached mount of what it serves.
pub(super) fn start(
    union: Union,
    root: &RootId,
    dir: &Path,
    layers: Layers,
    volatile: bool,
) -> Result<((Server, Process), OwnedFd), Error> {
    let executable = union.find()?;
    let failed = |error: io::Error| Error::Program {
        op: "serve roots",
        program: union.program().name,
        reason: format!("cannot be started: {error}"),
    };
    let program = File::options().read(true).custom_flags(OFlags::PATH.bits().cast_signed()).open(executable);
    let given = Given {
        union,
        root,
        layers,
        volatile,
        program: program.map_err(failed)?.into(),
        device: open_device()?,
        said: said().map_err(failed)?,
        last_capability: last_capability().map_err(failed)?,
    };
    thread::scope(|scope| {
        // Notes are written by a thread that still sees the host's files.
        let (ask, asked) = mpsc::channel::<(u32, Option<u32>)>();
        let (answer, answered) = mpsc::channel();
        let write = move || {
            for (pid, connection) in asked {
                let note = Note::new(union.program().name, pid, connection);
                if answer.send(note.and_then(|note| note.write(dir).map(|()| note))).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new().name("fuse-note".to_owned()).spawn_scoped(scope, write).map_err(failed)?;
        let note = move |pid, connection| {
            let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
            ask.send((pid, connection)).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
            answered.recv().map_err(gone)?
        };
        mount::in_private_namespace(move || given.start(note)).map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::PERM) => lacks(Missing::Privilege("make mount namespaces".to_owned())),
            _ => failed(error),
        })?
    })
}

fn open_device() -> Result<OwnedFd, Error> {
    let device = File::options().read(true).write(true).open("/dev/fuse");
    device.map(Into::into).map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::PERM | Errno::ACCESS) => lacks(Missing::Privilege("open /dev/fuse".to_owned())),
        Some(Errno::NOENT | Errno::NODEV | Errno::NXIO) => lacks(Missing::Device("/dev/fuse".to_owned())),
        _ => Error::io("open", "/dev/fuse")(error),
    })
}

/// A file in memory that cannot grow: a program that lives as long as a desktop
/// may complain as often as it likes.
fn said() -> io::Result<File> {
    let file = memfd_create("said", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, SAID_BYTES)?;
    fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file.into())
}

struct Given<'a> {
    union: Union,
    root: &'a RootId,
    layers: Layers,
    volatile: bool,
    program: OwnedFd,
    device: OwnedFd,
    said: File,
    last_capability: u8,
}

impl Given<'_> {
    /// Runs on a thread in a mount namespace that the program shares. `note`
    /// writes down which process serves the root over which connection.
    fn start(self, note: impl Fn(u32, Option<u32>) -> io::Result<Note>) -> Result<((Server, Process), OwnedFd), Error> {
        let deadline = Instant::now() + ANSWERS_WITHIN;
        // Where the kernel tells that mounts have changed.
        let changes = File::open("/proc/thread-self/mountinfo").map_err(|e| self.failed(e))?;
        let stage = self.stage().map_err(|error| self.failed(error))?;
        let made = if self.union.takes_connection() { Some(self.connect()?) } else { None };
        let connection = made.as_ref().map(connection_of).transpose().map_err(|e| self.failed(e))?;

        let spawned = self.spawn(&stage)?;
        let pid = spawned.process().pid();
        let mut noted = note(pid, connection).map_err(|error| self.failed(error))?;
        // From here on the program does not need us.
        spawned.release().map_err(|error| self.explain(error))?;
        match spawned.event(ANSWERS_WITHIN) {
            Ok(Event::Closed) => {}
            Ok(_) => return Err(self.failed(io::ErrorKind::InvalidData.into())),
            Err(error) => return Err(self.explain(error)),
        }
        let mut process = spawned.into_process();
        let Self { union, root, device, said, .. } = self;
        // The connection is the program's alone now: it goes with the process.
        drop(device);
        let died = |process: &mut Process| Failure { union, said: &said }.of(process, root);
        let served = (|| {
            let mount = match made {
                Some(mount) => mount,
                None => await_mount(&stage, &changes, &process, deadline)?,
            };
            answers(&mount, &process, deadline)?;
            Ok(mount)
        })();
        let mount = match served {
            Ok(mount) => mount,
            Err(error) => return Err(died(&mut process).unwrap_or_else(|| failed(union, error))),
        };
        if noted.connection.is_none() {
            let again = connection_of(&mount).and_then(|connection| note(pid, Some(connection)));
            noted = again.map_err(|error| failed(union, error))?;
        }
        Ok(((Server::new(noted, Some(said))?, process), mount))
    }

    fn failed(&self, error: io::Error) -> Error {
        failed(self.union, error)
    }

    fn explain(&self, error: SpawnError) -> Error {
        let io = match &error {
            SpawnError::Clone(source) | SpawnError::Step { source, .. } => Errno::from_io_error(source),
            _ => None,
        };
        if io == Some(Errno::PERM) {
            return lacks(Missing::Privilege(format!("start a program in namespaces of its own ({error})")));
        }
        failed(self.union, io::Error::other(error))
    }

    /// Makes the namespace hold what the program needs alone, and returns its
    /// root, which is this thread's too.
    fn stage(&self) -> io::Result<OwnedFd> {
        let tmpfs = FsContext::open("tmpfs").and_then(|context| {
            context.set("mode", "755")?;
            context.mount(Restrictions { nosuid: true, ..Restrictions::default() })
        });
        let stage = tmpfs.map_err(io::Error::other)?;
        // Any directory can be covered: the namespace is ours.
        mount::attach(stage.as_fd(), mount::open_dir_path(Path::new("/sys"))?.as_fd())?;
        for name in [BASE, FILES, MOUNT, "proc", "dev"] {
            mkdirat(&stage, name, Mode::from_raw_mode(0o755))?;
        }
        for name in ["usr", "lib", "lib64"] {
            share_system(&stage, name)?;
        }
        attach(&stage, BASE, &self.layers.base)?;
        attach(&stage, FILES, &self.layers.files)?;
        symlinkat("/proc/self/fd", &stage, "dev/fd")?;
        if !self.union.takes_connection() {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            drop(openat(&stage, "dev/fuse", flags, Mode::RUSR)?);
            // Opened in this namespace, or it could not be shown in it.
            let device =
                File::options().read(true).custom_flags(OFlags::PATH.bits().cast_signed()).open("/dev/fuse")?;
            attach(&stage, "dev/fuse", &mount::clone_dir(device.as_fd())?)?;
        }
        fchdir(&stage)?;
        pivot_root(".", ".")?;
        unmount(".", UnmountFlags::DETACH)?;
        chdir("/")?;
        Ok(stage)
    }

    /// Makes the mount that the program is to serve; nothing is asked of it yet.
    fn connect(&self) -> Result<OwnedFd, Error> {
        let mounted = || {
            let context = FsContext::open("fuse")?;
            context.set("source", self.union.program().name)?;
            context.set("subtype", self.union.program().name)?;
            context.set("fd", &self.device.as_raw_fd().to_string())?;
            // A directory: Linux `include/uapi/linux/stat.h`, `S_IFDIR`.
            context.set("rootmode", "40000")?;
            context.set("user_id", "0")?;
            context.set("group_id", "0")?;
            context.set_flag("allow_other")?;
            context.set_flag("default_permissions")?;
            context.mount(Restrictions { nodev: true, ..Restrictions::default() })
        };
        mounted().map_err(|source: MountError| match Errno::from_io_error(source.io()) {
            Some(Errno::NODEV) => lacks(Missing::Kernel("the file system fuse".to_owned())),
            Some(Errno::PERM) => lacks(Missing::Privilege("mount file systems".to_owned())),
            _ => Error::Mount { what: format!("root {}", self.root), source },
        })
    }

    /// Makes the process, which waits until it is released.
    fn spawn(&self, stage: &OwnedFd) -> Result<Spawned, Error> {
        let plan = self.plan(stage).map_err(|error| self.failed(error))?;
        let namespaces = Namespaces::PID.and(Namespaces::NET).and(Namespaces::IPC).and(Namespaces::UTS);
        process::spawn(plan, namespaces, None).map_err(|error| self.explain(error))
    }

    fn plan(&self, stage: &OwnedFd) -> io::Result<Plan> {
        let mut plan = Plan::new();
        let own = |plan: &mut Plan, fd: BorrowedFd<'_>| plan.own(fd.try_clone_to_owned()?);
        let stage = own(&mut plan, stage.as_fd())?;
        let program = own(&mut plan, self.program.as_fd())?;
        let said = own(&mut plan, self.said.as_fd())?;
        let device = own(&mut plan, self.device.as_fd())?;
        let wanted = self.union.capabilities();
        let bits = wanted.iter().fold(0, |bits, capability| bits | 1_u64 << capability);
        let (uid, gid) = self.layers.owner;

        plan.step("wait to be released", Op::Wait);
        plan.step("start a session", Op::NewSession);
        // The union sets modes itself, as they were asked for.
        plan.step("clear the mask of modes", Op::Umask(0));
        let proc = plan.scratch();
        let (kind, options) = (c"proc".to_owned(), vec![]);
        plan.step("make /proc", Op::MakeFs { kind, options, attributes: 0, into: proc });
        plan.step("mount /proc", Op::Attach { mount: proc, dir: stage, path: c"proc".to_owned() });
        let unwanted = (0..=self.last_capability).filter(|capability| !wanted.contains(capability)).collect();
        plan.step("give up capabilities for good", Op::DropBounding(unwanted));
        plan.step("leave all groups", Op::ClearGroups);
        plan.step("keep capabilities", Op::KeepCapabilities);
        plan.step("change the group", Op::SetGid(gid));
        plan.step("change the user", Op::SetUid(uid));
        plan.step("set capabilities", Op::Capabilities(bits));
        plan.step("gain nothing again", Op::NoNewPrivileges);
        plan.step("take signals", Op::UnblockSignals);
        // What it reads from is at its end.
        for number in 0..=2 {
            plan.step("place a standard stream", Op::Dup { from: said, to: number });
        }
        if self.union.takes_connection() {
            plan.step("place the connection", Op::Dup { from: device, to: CONNECTION });
        }
        plan.step("keep other descriptors", Op::CloseOnExecFrom(CONNECTION.cast_unsigned() + 1));
        let words = self.union.arguments(self.volatile).into_iter().map(CString::new);
        let argv = words.collect::<Result<_, _>>()?;
        let envp = vec![c"PATH=/usr/bin".to_owned(), c"LC_ALL=C.UTF-8".to_owned()];
        plan.step("execute the program", Op::Exec { program, args: ExecArgs::new(argv, envp) });
        Ok(plan)
    }
}

fn failed(union: Union, error: io::Error) -> Error {
    Error::Program { op: "serve roots", program: union.program().name, reason: format!("cannot be used: {error}") }
}

/// Source: proc_sys_kernel(5).
fn last_capability() -> io::Result<u8> {
    let text = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap")?;
    text.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Shows a directory of the system's programs and libraries, for reading.
fn share_system(stage: &OwnedFd, name: &str) -> io::Result<()> {
    let path = Path::new("/").join(name);
    if let Ok(target) = read_link(&path) {
        return Ok(symlinkat(target, stage, name)?);
    }
    let dir = match mount::open_dir_path(&path) {
        Ok(dir) => dir,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let shared = mount::clone_dir(dir.as_fd())?;
    let restrictions = Restrictions { read_only: true, nosuid: true, nodev: true, noexec: false };
    mount::restrict(shared.as_fd(), restrictions, None)?;
    mkdirat(stage, name, Mode::from_raw_mode(0o755))?;
    attach(stage, name, &shared)
}

fn attach(stage: &OwnedFd, name: &str, mount: &OwnedFd) -> io::Result<()> {
    mount::attach(mount.as_fd(), openat(stage, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?.as_fd())
}

/// The kernel's number of a connection, found without asking the program.
fn connection_of(mount: &OwnedFd) -> io::Result<u32> {
    let found = statx(mount, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::empty())?;
    Ok(found.stx_dev_minor)
}

/// Waits until the program has mounted, and takes the mount out of the
/// namespace that it would keep it alive in.
fn await_mount(stage: &OwnedFd, changes: &File, process: &Process, deadline: Instant) -> io::Result<OwnedFd> {
    let device = |path: &str| -> io::Result<(u32, u32)> {
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::SYMLINK_NOFOLLOW;
        let found = statx(stage, path, flags, StatxFlags::empty())?;
        Ok((found.stx_dev_major, found.stx_dev_minor))
    };
    let here = device(".")?;
    while device(MOUNT)? == here {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))
            .map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut events = [PollFd::new(changes, PollFlags::PRI), PollFd::new(process, PollFlags::IN)];
        match poll(&mut events, Some(&left)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) if !events.get(1).is_none_or(|process| process.revents().is_empty()) => {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let top = openat(stage, MOUNT, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mount = mount::clone_dir(top.as_fd())?;
    mount::restrict(mount.as_fd(), Restrictions { nodev: true, ..Restrictions::default() }, None)?;
    drop(top);
    unmount(format!("/{MOUNT}"), UnmountFlags::DETACH)?;
    Ok(mount)
}

/// Waits until the program has answered once. A program that does not answer
/// in time is ended, with which the kernel lets go of who waits for it.
fn answers(mount: &OwnedFd, process: &Process, deadline: Instant) -> io::Result<()> {
    thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        thread::Builder::new().name("fuse-first".to_owned()).spawn_scoped(scope, move || {
            let answer = statx(mount, "", AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC, StatxFlags::BASIC_STATS);
            // Nobody listens after the deadline.
            let _told = tell.send(answer.map(drop).map_err(io::Error::from));
        })?;
        told.recv_timeout(deadline.saturating_duration_since(Instant::now())).unwrap_or_else(|_| {
            process.signal(Signal::KILL)?;
            Err(io::ErrorKind::TimedOut.into())
        })
    })
}

/// What a process that did not come to serving says about it.
struct Failure<'a> {
    union: Union,
    said: &'a File,
}

impl Failure<'_> {
    /// Ends the process; `None` if it was not its end that was the failure.
    fn of(&self, process: &mut Process, root: &RootId) -> Option<Error> {
        /// A program that fails ends at once.
        const FAILED_WITHIN: Duration = Duration::from_secs(1);
        let exit = process.wait(FAILED_WITHIN).ok().flatten();
        if exit.is_none()
            && let Err(error) = process.signal(Signal::KILL).and_then(|()| process.wait(ANSWERS_WITHIN).map(drop))
        {
            tracing::warn!(%root, %error, pid = process.pid(), "program left behind");
        }
        let said = server::last_line(self.said).map(|line| format!("; it said: {line}")).unwrap_or_default();
        let reason = format!("(process {}) {}{said}", process.pid(), server::how(exit?));
        Some(Error::Program { op: "serve roots", program: self.union.program().name, reason })
    }
}
