//! What a container is asked to be.

use std::{
    collections::BTreeSet,
    ffi::CString,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
};

use caps::Capability;
use qvd_core::{Bytes, Calls, DesktopId, Device, Limits, UidRange};

use crate::{Error, Protection};

/// A program in a descriptor, with its arguments and environment.
#[derive(Debug)]
pub struct Program {
    /// The program, for instance from [`seal`](crate::seal). A script needs an
    /// interpreter that is inside, and cannot be a sealed file.
    pub file: OwnedFd,
    /// Its arguments, its own name first.
    pub argv: Vec<String>,
    /// Its environment, each `NAME=value`.
    pub env: Vec<String>,
}

/// A mount for the container to have.
#[derive(Debug)]
pub struct ContainerMount {
    /// Where inside. Directories that are missing are made.
    pub target: PathBuf,
    /// A detached mount. It is made `nosuid`, `nodev` and private.
    pub mount: OwnedFd,
}

/// A descriptor for the program to inherit.
#[derive(Debug)]
pub struct InheritedFd {
    /// Its number inside, below 16. 0, 1 and 2 are `/dev/null` unless given.
    pub number: u8,
    /// The descriptor.
    pub fd: OwnedFd,
}

/// A file system that a program of the container serves. It is mounted before
/// anything inside runs, as no program there may mount; nobody outside ever looks
/// at it. Its profile has to allow [`Device::Fuse`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FuseMount {
    /// Where inside. Directories that are missing are made.
    pub target: PathBuf,
    /// Number of the descriptor at which the program gets the kernel's requests,
    /// below 16; libfuse takes it as the mount point `/dev/fd/<number>`.
    pub number: u8,
    /// Inside, the user and group that it belongs to.
    pub owner: u32,
}

/// Each takes one of the places that a plan has for descriptors.
const FUSE_MAX: usize = 3;

/// Which pages of a container the kernel may merge with equal ones of others that may be.
/// Who shares a page with another can tell by the time of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Merging {
    /// None, and no program inside can change that.
    #[default]
    None,
    /// Those that a program inside offers.
    Offered,
    /// All anonymous ones of all its programs, from its birth on, and no program inside
    /// can change that. Needs a host of which [`Runtime::can_merge`](crate::Runtime::can_merge) says so.
    All,
}

/// How a container is confined, as far as there is a choice.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Profile {
    /// Whether no program inside can gain privileges by being executed. `sudo`
    /// and `su` do not work then.
    pub no_new_privileges: bool,
    /// All the capabilities, over its own user namespace, that root inside and
    /// programs it starts can ever have.
    pub capabilities: Vec<Capability>,
    /// Size of `/tmp`; what is in it counts as memory of the container.
    pub tmp: Bytes,
    /// Size of `/dev/shm`; counts as memory too.
    pub shm: Bytes,
    /// Size of `/run`; counts as memory too.
    pub run: Bytes,
    /// Files, directories and links in each of these.
    pub inodes: u32,
    /// Whether the host's device for virtual machines can be opened.
    pub kvm: bool,
    /// Which of the host's devices everybody inside can open.
    pub devices: BTreeSet<Device>,
    /// Which system calls programs may make. With [`Calls::System`], root inside may
    /// change what is mounted, masks of `/proc` included.
    pub calls: Calls,
    /// Which pages may be merged with equal ones of others.
    pub merging: Merging,
    /// Whether memory comes in small pages even where programs ask for huge ones,
    /// which are faster, and take 2 MiB where a byte is used.
    pub small_pages: bool,
    /// Whether it has a part of the cgroup tree of its own at `/sys/fs/cgroup`, below
    /// the group that its limits are on. Needs cgroups of version 2 alone.
    pub cgroups: bool,
    /// What has to be enforced; a host that cannot is refused.
    pub require: BTreeSet<Protection>,
}

impl Profile {
    /// For an image whose own init runs, such as systemd: root inside may mount, may
    /// divide its cgroup among services and is root over all users inside; programs
    /// can gain privileges over the container. What keeps it in are its namespaces,
    /// its range of ids and its limits: those are the same.
    ///
    /// Beyond the default it has, over its own namespaces, what such an init uses:
    /// `SYS_ADMIN` (mounts, namespaces), `SYS_RESOURCE` (limits of services),
    /// `SYS_NICE`, `DAC_READ_SEARCH`, `IPC_OWNER`, `LEASE`, `SETFCAP`,
    /// `SYS_TTY_CONFIG`, `AUDIT_WRITE`.
    #[must_use]
    pub fn system() -> Self {
        let mut profile = Self { no_new_privileges: false, calls: Calls::System, cgroups: true, ..Self::default() };
        profile.capabilities.extend([
            Capability::CAP_SYS_ADMIN,
            Capability::CAP_SYS_RESOURCE,
            Capability::CAP_SYS_NICE,
            Capability::CAP_DAC_READ_SEARCH,
            Capability::CAP_IPC_OWNER,
            Capability::CAP_LEASE,
            Capability::CAP_SETFCAP,
            Capability::CAP_SYS_TTY_CONFIG,
            Capability::CAP_AUDIT_WRITE,
        ]);
        profile
    }
}

impl Default for Profile {
    /// Nothing gains privileges, and root has what `qvd-init` and the services
    /// of a desktop need: file owners and modes (`CHOWN`, `DAC_OVERRIDE`,
    /// `FOWNER`, `FSETID`), other users' processes (`KILL`), becoming a user
    /// (`SETUID`, `SETGID`, and `SETPCAP` to give up the rest), low ports
    /// (`NET_BIND_SERVICE`), sshd's and browsers' empty root (`SYS_CHROOT`).
    /// Not even over its own namespaces has it `SYS_ADMIN`, `NET_ADMIN`,
    /// `NET_RAW`, `MKNOD`, `SYS_PTRACE` or `SETFCAP`.
    fn default() -> Self {
        Self {
            no_new_privileges: true,
            capabilities: vec![
                Capability::CAP_CHOWN,
                Capability::CAP_DAC_OVERRIDE,
                Capability::CAP_FOWNER,
                Capability::CAP_FSETID,
                Capability::CAP_KILL,
                Capability::CAP_SETGID,
                Capability::CAP_SETUID,
                Capability::CAP_SETPCAP,
                Capability::CAP_NET_BIND_SERVICE,
                Capability::CAP_SYS_CHROOT,
            ],
            tmp: Bytes::mib(512),
            shm: Bytes::mib(512),
            run: Bytes::mib(64),
            inodes: 1 << 16,
            kvm: false,
            devices: BTreeSet::new(),
            calls: Calls::Desktop,
            merging: Merging::None,
            small_pages: false,
            cgroups: false,
            require: BTreeSet::new(),
        }
    }
}

/// All that is needed to start a container.
#[derive(Debug)]
#[non_exhaustive]
pub struct ContainerSpec {
    /// Its number; names its cgroup.
    pub id: DesktopId,
    /// Host name inside.
    pub hostname: String,
    /// Detached mount of the root. Its files belong to `ids`. It is made
    /// `nodev` and private.
    pub root: OwnedFd,
    /// What else is mounted, in this order, after `/tmp` and `/run`.
    pub mounts: Vec<ContainerMount>,
    /// Host ids of 0 to 65535 inside.
    pub ids: UidRange,
    /// What it may use.
    pub limits: Limits,
    /// File systems that programs inside serve, mounted after `mounts`.
    pub fuse: Vec<FuseMount>,
    /// Process 1.
    pub program: Program,
    /// What process 1 inherits.
    pub fds: Vec<InheritedFd>,
    /// The terminal that it has as `/dev/console`: the end of a pseudo-terminal that
    /// programs have. It will belong to root inside. Keep another descriptor of it
    /// open: while nobody has one, whoever reads its other end gets an error.
    pub console: Option<OwnedFd>,
    /// How it is confined.
    pub profile: Profile,
}

impl ContainerSpec {
    /// A container named after its number, with default limits and profile,
    /// nothing mounted but its root, and nothing inherited.
    #[must_use]
    pub fn new(id: DesktopId, root: OwnedFd, ids: UidRange, program: Program) -> Self {
        Self {
            id,
            hostname: format!("desktop-{id}"),
            root,
            mounts: Vec::new(),
            fuse: Vec::new(),
            ids,
            limits: Limits::default(),
            program,
            fds: Vec::new(),
            console: None,
            profile: Profile::default(),
        }
    }

    /// Everything that can be found wrong without touching the kernel.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let refuse = |what: String, reason| Err(Error::Invalid { what, reason });
        let label = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.');
        if self.hostname.is_empty() || self.hostname.len() > 64 || !self.hostname.bytes().all(label) {
            return refuse(format!("host name {:?}", self.hostname), "use 1 to 64 of a-z A-Z 0-9 . -");
        }
        if self.program.argv.is_empty() {
            return refuse("an empty argument list".to_owned(), "the program's own name comes first");
        }
        if self.limits.memory.get() == 0 || self.limits.cpu.0 == 0 || self.limits.pids == 0 {
            return refuse("a limit of zero".to_owned(), "a desktop needs memory, processor time and processes");
        }
        if self.limits.io.is_some_and(|io| io.get() == 0) {
            return refuse("a limit of zero".to_owned(), "a desktop has to read and write");
        }
        if !self.fuse.is_empty() && !self.profile.devices.contains(&Device::Fuse) {
            return refuse("a file system of a program".to_owned(), "the profile has to allow the device `fuse`");
        }
        let nested = |a: &FuseMount| self.fuse.iter().any(|b| a.number != b.number && a.target.starts_with(&b.target));
        if self.fuse.len() > FUSE_MAX || self.fuse.iter().any(nested) {
            let reason = "have three at most, and none below another, as nobody answers yet when it is attached";
            return refuse("file systems of programs".to_owned(), reason);
        }
        let mut numbers = BTreeSet::new();
        for number in self.fds.iter().map(|fd| fd.number).chain(self.fuse.iter().map(|fuse| fuse.number)) {
            if number >= 16 || !numbers.insert(number) {
                return refuse(format!("descriptor number {number}"), "use each of 0 to 15 once at most");
            }
        }
        for target in self.mounts.iter().map(|mount| &mount.target).chain(self.fuse.iter().map(|fuse| &fuse.target)) {
            let whole = target.is_absolute()
                && target.components().skip(1).all(|c| matches!(c, Component::Normal(_)))
                && target.components().nth(1).is_some();
            let ours = ["/proc", "/sys", "/dev"].iter().any(|own| target.starts_with(own));
            if !whole || ours {
                let reason = "name an absolute directory outside of /proc, /sys and /dev, without `..`";
                return refuse(format!("mount target {target:?}"), reason);
            }
        }
        Ok(())
    }
}

/// Text for the kernel, which ends at the first NUL.
pub(crate) fn c_string(text: &str) -> Result<CString, Error> {
    CString::new(text).map_err(|_| Error::Invalid { what: format!("{text:?}"), reason: "it contains a NUL" })
}

/// The components of a checked target.
pub(crate) fn components(target: &Path) -> Vec<&std::ffi::OsStr> {
    target.components().filter_map(|c| if let Component::Normal(name) = c { Some(name) } else { None }).collect()
}
