//! What a child is to do, prepared so that doing it needs no memory.

use std::{
    ffi::{CString, c_char},
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::Arc,
};

use rustix::io::fcntl_dupfd_cloexec;

/// Descriptors of a plan are numbered from here, so that [`Op::Dup`] to a
/// small number never overwrites one that a later step needs.
const FIRST_FD: RawFd = 16;

/// How many descriptors the child's own steps may open.
pub(super) const SLOTS: usize = 9;

/// A descriptor that a step uses: given by the parent, or opened by an
/// earlier step of the child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanFd(pub(super) Place);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Given(RawFd),
    Slot(usize),
}

/// Gives `fd` a number that no [`Op::Dup`] takes.
pub(super) fn lift(fd: OwnedFd) -> io::Result<OwnedFd> {
    if fd.as_raw_fd() < FIRST_FD { Ok(fcntl_dupfd_cloexec(&fd, FIRST_FD)?) } else { Ok(fd) }
}

impl PlanFd {
    /// The working directory, for steps that take an absolute path.
    pub const CWD: Self = Self(Place::Given(libc::AT_FDCWD));
}

/// One instruction of a socket filter, laid out as the kernel's `sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct BpfInstruction {
    /// Operation.
    pub code: u16,
    /// How many instructions to skip when a comparison holds.
    pub jt: u8,
    /// How many to skip when it does not.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// Namespaces that a child is born with or makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Namespaces(pub(super) u64);

impl Namespaces {
    /// Ids and capabilities.
    pub const USER: Self = Self(libc::CLONE_NEWUSER.cast_unsigned() as u64);
    /// Mounts.
    pub const MOUNT: Self = Self(libc::CLONE_NEWNS.cast_unsigned() as u64);
    /// Process numbers; the child is number 1.
    pub const PID: Self = Self(libc::CLONE_NEWPID.cast_unsigned() as u64);
    /// Network.
    pub const NET: Self = Self(libc::CLONE_NEWNET.cast_unsigned() as u64);
    /// Host name.
    pub const UTS: Self = Self(libc::CLONE_NEWUTS.cast_unsigned() as u64);
    /// System V objects and message queues.
    pub const IPC: Self = Self(libc::CLONE_NEWIPC.cast_unsigned() as u64);
    /// View of the cgroup tree.
    pub const CGROUP: Self = Self(libc::CLONE_NEWCGROUP.cast_unsigned() as u64);
    /// None.
    pub const NONE: Self = Self(0);

    /// These and those.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of those are among these.
    pub(super) const fn has(self, others: Self) -> bool {
        self.0 & others.0 == others.0
    }
}

/// Arguments and environment of a program, in the form the kernel takes.
#[derive(Debug)]
pub struct ExecArgs {
    argv: CStrings,
    envp: CStrings,
}

impl ExecArgs {
    /// Prepares them.
    #[must_use]
    pub fn new(argv: Vec<CString>, envp: Vec<CString>) -> Self {
        Self { argv: CStrings::new(argv), envp: CStrings::new(envp) }
    }

    pub(super) fn argv(&self) -> *const *const c_char {
        self.argv.pointers.as_ptr()
    }

    pub(super) fn envp(&self) -> *const *const c_char {
        self.envp.pointers.as_ptr()
    }
}

/// Strings and the null-terminated array of pointers to them.
#[derive(Debug)]
struct CStrings {
    /// Owns what `pointers` point to.
    _strings: Vec<CString>,
    pointers: Vec<*const c_char>,
}

impl CStrings {
    fn new(strings: Vec<CString>) -> Self {
        let pointers = strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect();
        Self { _strings: strings, pointers }
    }
}

// SAFETY: the pointers lead to heap memory that the value owns, never changes
// and does not move; only the kernel reads through them.
unsafe impl Send for CStrings {}
// SAFETY: as above; nothing is ever written.
unsafe impl Sync for CStrings {}

/// One step of a child. Paths are resolved by the kernel as the step says;
/// nothing is resolved in user space.
#[derive(Debug)]
#[non_exhaustive]
pub enum Op {
    /// Waits for the parent's [`release`](super::Spawned::release), and exits
    /// quietly if the parent is gone.
    Wait,
    /// Tells the parent [`Event::Ready`](super::Event::Ready).
    Ready,
    /// Enters the v1 cgroup whose `tasks` file this is, open for writing.
    EnterGroup(PlanFd),
    /// Drops all supplementary groups.
    ClearGroups,
    /// Sets real, effective and saved group.
    SetGid(u32),
    /// Sets real, effective and saved user.
    SetUid(u32),
    /// Keeps what the process may do when the next step changes its user.
    KeepCapabilities,
    /// Has exactly the capabilities with these bits set, and hands them on to
    /// the program, whoever runs it. All of them have to be in the bounding set.
    Capabilities(u64),
    /// Offers all memory of the process, of its children and of whatever they execute to
    /// be merged with equal pages of others that do.
    OfferMemory,
    /// Starts a session without a terminal.
    NewSession,
    /// Leaves the parent's session keyring for a new one.
    NewKeyring,
    /// Makes namespaces.
    Unshare(Namespaces),
    /// Brings the loopback interface of the network namespace up.
    LoopbackUp,
    /// Sets the host name.
    SetHostname(Vec<u8>),
    /// Sets the mask of file modes.
    Umask(u32),
    /// Blocks no signal.
    UnblockSignals,
    /// Blocks these signals and no others; bit 0 is signal 1.
    BlockSignals(u64),
    /// Gives a signal its default action.
    DefaultSignal(i32),
    /// Makes a directory; one that is there is as good.
    MakeDir {
        /// Directory that `path` starts from.
        dir: PlanFd,
        /// The new directory.
        path: CString,
        /// Its mode.
        mode: u32,
    },
    /// Opens a directory below another without following any link.
    OpenDir {
        /// Directory that `path` must stay below.
        dir: PlanFd,
        /// What to open.
        path: CString,
        /// Where the descriptor goes; from [`Plan::slot`].
        into: PlanFd,
    },
    /// Opens a device for reading and writing, no link followed.
    OpenDevice {
        /// Directory that `path` starts from.
        dir: PlanFd,
        /// The device's node.
        path: CString,
        /// Where the descriptor goes; from [`Plan::slot`].
        into: PlanFd,
    },
    /// Makes a file system in the child's own namespaces, detached.
    MakeFs {
        /// Its type.
        kind: CString,
        /// Its options; one with an empty value is a flag.
        options: Vec<(CString, CString)>,
        /// `MOUNT_ATTR_*` of the mount.
        attributes: u32,
        /// Where the descriptor goes; from [`Plan::slot`].
        into: PlanFd,
    },
    /// Makes a file system in the child's own namespaces on a directory that nobody
    /// else can have put there: two calls instead of four and one for each option.
    /// The working directory is `dir` afterwards.
    MakeFsAt {
        /// Its type.
        kind: CString,
        /// Its options, with commas between them.
        options: CString,
        /// `MOUNT_ATTR_RDONLY`, `NOSUID`, `NODEV`, `NOEXEC` of the mount: the older flags
        /// with these names are the same bits.
        attributes: u32,
        /// Directory that it is mounted in.
        dir: PlanFd,
        /// The name there.
        name: CString,
    },
    /// Mounts a second view of something that is mounted here, detached.
    CloneTree {
        /// Directory that `path` starts from.
        dir: PlanFd,
        /// What to clone; empty means `dir` itself.
        path: CString,
        /// `MOUNT_ATTR_*` to add.
        attributes: u64,
        /// Where the descriptor goes; from [`Plan::slot`].
        into: PlanFd,
    },
    /// Attaches a detached mount.
    Attach {
        /// The mount.
        mount: PlanFd,
        /// Directory that `path` starts from.
        dir: PlanFd,
        /// Where to attach it; empty means `dir` itself.
        path: CString,
    },
    /// Makes the directory the root of everything, and detaches what was.
    PivotRoot(PlanFd),
    /// Takes these capabilities out of what a program can ever gain.
    DropBounding(Vec<u8>),
    /// No program gains privileges when it is executed, from here on.
    NoNewPrivileges,
    /// Memory comes in small pages alone from here on, whatever programs ask for.
    SmallPages,
    /// Restricts the system calls from here on.
    Seccomp(Arc<[BpfInstruction]>),
    /// Keeps to these rules of Landlock from here on; they are made by
    /// [`LandlockRules`](super::LandlockRules).
    Landlock(PlanFd),
    /// Does what those rules forbid, and fails if it is forbidden for another reason
    /// or not at all.
    TryLandlock,
    /// Gives a descriptor this number and lets programs inherit it.
    Dup {
        /// The descriptor.
        from: PlanFd,
        /// Its number, below 16.
        to: RawFd,
    },
    /// No program inherits descriptors from this number on.
    CloseOnExecFrom(u32),
    /// Executes the program in a descriptor.
    Exec {
        /// The program.
        program: PlanFd,
        /// Arguments and environment.
        args: ExecArgs,
    },
}

/// What a child is to do, and the descriptors it does it with.
#[derive(Debug, Default)]
pub struct Plan {
    pub(super) steps: Vec<(String, Op)>,
    pub(super) fds: Vec<OwnedFd>,
    slots: usize,
}

impl Plan {
    /// A plan without steps.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a descriptor for later steps to use. It is closed in the parent
    /// once the child exists.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn own(&mut self, fd: OwnedFd) -> io::Result<PlanFd> {
        let fd = lift(fd)?;
        let place = PlanFd(Place::Given(fd.as_raw_fd()));
        self.fds.push(fd);
        Ok(place)
    }

    /// A place for a descriptor that a step opens. A plan has eight; opening
    /// into one again replaces what was there.
    ///
    /// # Errors
    /// All are taken.
    pub fn slot(&mut self) -> io::Result<PlanFd> {
        if self.slots == SLOTS - 1 {
            return Err(io::Error::other("a plan has only eight slots"));
        }
        self.slots += 1;
        Ok(PlanFd(Place::Slot(self.slots - 1)))
    }

    /// The place for a descriptor that the next step but none after it uses.
    #[must_use]
    pub const fn scratch(&self) -> PlanFd {
        PlanFd(Place::Slot(SLOTS - 1))
    }

    /// Adds a step. `name` is what an error calls it: a verb and its object.
    pub fn step(&mut self, name: impl Into<String>, op: Op) {
        self.steps.push((name.into(), op));
    }

    /// Keeps the steps for which `keep` says so; it is given each step's name,
    /// and may change the step. For tests, which take one thing out of a
    /// confinement and see what becomes of it.
    pub fn retain(&mut self, mut keep: impl FnMut(&str, &mut Op) -> bool) {
        self.steps.retain_mut(|(name, op)| keep(name, op));
    }

    /// Whether there is a step that `is` says so of.
    pub fn has(&self, is: impl Fn(&Op) -> bool) -> bool {
        self.steps.iter().any(|(_, op)| is(op))
    }

    /// How many steps there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Whether there is no step.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }
}
