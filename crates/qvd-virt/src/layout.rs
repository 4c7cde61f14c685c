//! The file system of a container: which mounts go where, and how they get
//! there without a name that the image could have chosen.
//!
//! Directories of the root are opened by the parent below the root's own
//! descriptor, links refused; what has to be made is made by the child, as
//! root of its namespace and so with the right owner. Masks go on paths below
//! descriptors of file systems that the child has just made itself: an image
//! cannot fake those.

mod dev;
mod tree;

use std::{
    collections::BTreeSet,
    ffi::CStr,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use qvd_core::{Bytes, Device};
use qvd_sys::{
    mount::{FsContext, Restrictions, clone_dir, restrict},
    process::{Op, Plan, PlanFd},
};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat};

use self::{
    dev::make_dev,
    tree::{Tree, keep, slot},
};
use crate::{
    ContainerMount, ContainerSpec, Error, FuseMount,
    devices::{Node, find},
    error::io_error,
    measures::Measures,
    spec::c_string,
};

// Source: Linux `include/uapi/linux/mount.h`.
const RDONLY: u32 = 1;
const NOSUID: u32 = 2;
const NODEV: u32 = 4;
const NOEXEC: u32 = 8;

// On the files below, the user namespace alone keeps a desktop from what only
// the host's root may do. Masked is what everybody may read and tells of the
// host or of other desktops (`interrupts` even of their keystrokes), and what
// would be worst if a mode or a check were ever wrong.

/// Files of `/proc` that are masked.
const PROC_FILES: &[&str] = &[
    "interrupts",
    "kallsyms",
    "kcore",
    "keys",
    "kmsg",
    "latency_stats",
    "sched_debug",
    "softirqs",
    "sysrq-trigger",
    "timer_list",
    "timer_stats",
];
/// Directories of `/proc` that are masked.
const PROC_DIRS: &[&str] = &["acpi", "dynamic_debug", "pressure", "scsi"];
/// Directories of `/proc` that may be read. In `sys`, root of a user namespace
/// owns some files.
const PROC_READ_ONLY: &[&str] = &["asound", "bus", "fs", "irq", "sys"];
/// Directories of `/sys` that are masked. All of `/sys` is read-only.
const SYS_DIRS: &[&str] = &["devices/virtual/powercap", "firmware", "hypervisor", "module"];

/// The device for virtual machines.
///
/// Source: Linux `Documentation/admin-guide/devices.txt`.
const KVM: (&str, u32, u32) = ("kvm", 10, 232);

/// Where the host's devices are.
const HOST_DEV: &str = "/dev";

/// What every container of this host gets, found and made once.
#[derive(Debug)]
pub(crate) struct Layout {
    /// Detached read-only tmpfs, cloned for each container.
    dev: OwnedFd,
    /// The same with the device for virtual machines.
    dev_kvm: OwnedFd,
    null: OwnedFd,
    pub(crate) proc_files: Vec<&'static str>,
    pub(crate) proc_dirs: Vec<&'static str>,
    pub(crate) proc_read_only: Vec<&'static str>,
    pub(crate) sys_dirs: Vec<&'static str>,
}

impl Layout {
    pub(crate) fn new() -> Result<Self, Error> {
        let dev = make_dev(&[], false).map_err(io_error("make the device file system"))?;
        let kvm = [Node::new(KVM.0, KVM.1, KVM.2)];
        let dev_kvm = make_dev(&kvm, false).map_err(io_error("make the device file system"))?;
        let null = openat(&dev, "null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(io_error("open the null device"))?;
        let below = |top: &'static str, names: &[&'static str]| {
            names.iter().copied().filter(|name| Path::new(top).join(name).exists()).collect::<Vec<_>>()
        };
        Ok(Self {
            dev,
            dev_kvm,
            null,
            proc_files: below("/proc", PROC_FILES),
            proc_dirs: below("/proc", PROC_DIRS),
            proc_read_only: below("/proc", PROC_READ_ONLY),
            sys_dirs: below("/sys", SYS_DIRS),
        })
    }

    /// The null device, without a way to the host's file system.
    pub(crate) fn null(&self) -> io::Result<OwnedFd> {
        self.null.try_clone()
    }

    /// Adds the steps that build and enter the file system of `spec`.
    pub(crate) fn compile(&self, plan: &mut Plan, spec: &mut Parts<'_>) -> Result<(), Error> {
        let own = io_error("keep a descriptor for the container");
        let root = spec.root.try_clone_to_owned().and_then(|fd| plan.own(fd)).map_err(own)?;
        let mut tree = Tree {
            root_fd: spec.root,
            root,
            work: slot(plan)?,
            mounted: Vec::new(),
            how: spec.resolve,
            cgroups: spec.cgroups,
        };

        plan.step("attach the root", Op::Attach { mount: root, dir: PlanFd::CWD, path: c"/".to_owned() });
        let dev = self.dev(spec)?;
        let dev = keep(plan, dev)?;
        tree.attach(plan, "/dev", dev)?;
        self.proc(plan, &mut tree, dev)?;
        self.sys(plan, &mut tree, dev)?;
        let base = spec.uid;
        let shm = tmpfs(spec.shm, spec.inodes, 0o1777, base)?;
        let shm = keep(plan, shm)?;
        plan.step("mount /dev/shm", Op::Attach { mount: shm, dir: dev, path: c"shm".to_owned() });
        Self::devpts(plan, dev);
        if let Some(console) = spec.console.take() {
            let console = keep(plan, console)?;
            plan.step("attach /dev/console", Op::Attach { mount: console, dir: dev, path: CONSOLE.to_owned() });
        }
        for (target, size, mode) in [("/tmp", spec.tmp, 0o1777), ("/run", spec.run, 0o755)] {
            let mount = tmpfs(size, spec.inodes, mode, base)?;
            let mount = keep(plan, mount)?;
            tree.attach(plan, target, mount)?;
        }
        for (target, mount) in spec.mounts.drain(..) {
            let mount = keep(plan, mount)?;
            tree.attach(plan, &target, mount)?;
        }
        for fuse in std::mem::take(&mut spec.fuse) {
            let target = text(&fuse.target)?;
            let served = serve(plan, dev, &fuse, &target)?;
            tree.attach(plan, &target, served)?;
        }
        plan.step("enter the root", Op::PivotRoot(root));
        Ok(())
    }

    /// The file system for `/dev`: a clone of one that all share, where that has
    /// all that is asked for and the kernel clones what is mounted nowhere (since
    /// Linux 6.15; it was `EINVAL` before).
    fn dev(&self, spec: &Parts<'_>) -> Result<OwnedFd, Error> {
        if spec.devices.is_empty() && spec.console.is_none() {
            match clone_dir(if spec.kvm { &self.dev_kvm } else { &self.dev }.as_fd()) {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                clone => return clone.map_err(io_error("clone the device file system")),
            }
        }
        let kvm = spec.kvm.then(|| Node::new(KVM.0, KVM.1, KVM.2));
        let nodes = find(Path::new(HOST_DEV), &spec.devices)?.into_iter().chain(kvm).collect::<Vec<_>>();
        make_dev(&nodes, spec.console.is_some()).map_err(io_error("make the device file system"))
    }

    /// All processes of the container see each other: `hidepid` would save
    /// nothing from a single user, and breaks session services.
    fn proc(&self, plan: &mut Plan, tree: &mut Tree<'_>, dev: PlanFd) -> Result<(), Error> {
        let proc = slot(plan)?;
        let attributes = NOSUID | NODEV | NOEXEC;
        let fs = Op::MakeFs { kind: c"proc".to_owned(), options: Vec::new(), attributes, into: proc };
        plan.step("mount /proc", fs);
        tree.attach(plan, "/proc", proc)?;
        for name in &self.proc_read_only {
            cover(plan, "make read-only", "/proc", proc, name, Cover { from: proc, path: name, read_only: true })?;
        }
        for name in &self.proc_files {
            cover(plan, "mask", "/proc", proc, name, Cover { from: dev, path: "null", read_only: false })?;
        }
        for name in &self.proc_dirs {
            cover(plan, "mask", "/proc", proc, name, Cover { from: dev, path: EMPTY_DIR, read_only: false })?;
        }
        Ok(())
    }

    fn sys(&self, plan: &mut Plan, tree: &mut Tree<'_>, dev: PlanFd) -> Result<(), Error> {
        let sys = slot(plan)?;
        let attributes = RDONLY | NOSUID | NODEV | NOEXEC;
        plan.step("mount /sys", Op::MakeFs { kind: c"sysfs".to_owned(), options: Vec::new(), attributes, into: sys });
        tree.attach(plan, "/sys", sys)?;
        for name in &self.sys_dirs {
            cover(plan, "mask", "/sys", sys, name, Cover { from: dev, path: EMPTY_DIR, read_only: false })?;
        }
        if tree.cgroups {
            // By a process whose view begins at its own group, it shows nothing above.
            let into = slot(plan)?;
            let attributes = NOSUID | NODEV | NOEXEC;
            let fs = Op::MakeFs { kind: c"cgroup2".to_owned(), options: Vec::new(), attributes, into };
            plan.step("mount /sys/fs/cgroup", fs);
            let path = c"fs/cgroup".to_owned();
            plan.step("attach /sys/fs/cgroup", Op::Attach { mount: into, dir: sys, path });
        }
        Ok(())
    }

    /// `/dev` is this process's own and nobody has changed it.
    fn devpts(plan: &mut Plan, dev: PlanFd) {
        // Group 5 is `tty` in Debian's base-passwd and most others.
        let terminals = (c"devpts", c"pts", c"mode=0620,ptmxmode=0666,gid=5", NOSUID | NOEXEC);
        let queues = (c"mqueue", c"mqueue", c"", NOSUID | NODEV | NOEXEC);
        for (kind, name, options, attributes) in [terminals, queues] {
            let [kind, name, options] = [kind, name, options].map(CStr::to_owned);
            let step = format!("mount /dev/{}", name.to_string_lossy());
            plan.step(step, Op::MakeFsAt { kind, options, attributes, dir: dev, name });
        }
    }
}

/// The parts of a specification that make its file system.
pub(crate) struct Parts<'a> {
    root: BorrowedFd<'a>,
    mounts: Vec<(String, OwnedFd)>,
    uid: u32,
    tmp: Bytes,
    shm: Bytes,
    run: Bytes,
    inodes: u32,
    kvm: bool,
    devices: BTreeSet<Device>,
    fuse: Vec<FuseMount>,
    console: Option<OwnedFd>,
    cgroups: bool,
    resolve: ResolveFlags,
}

impl<'a> Parts<'a> {
    /// Restricts the mounts of `spec` and takes them out of it.
    pub(crate) fn of(spec: &mut ContainerSpec, root: BorrowedFd<'a>, measures: &Measures) -> Result<Self, Error> {
        restrict(root, measures.root, None).map_err(io_error("restrict the root"))?;
        let mut mounts = Vec::new();
        for ContainerMount { target, mount } in spec.mounts.drain(..) {
            let target = text(&target)?;
            restrict(mount.as_fd(), measures.mounts, None)
                .map_err(io_error(format!("restrict the mount for `{target}`")))?;
            mounts.push((target, mount));
        }
        let console = spec.console.take().map(|terminal| console(&terminal, spec.ids.base())).transpose()?;
        let profile = &spec.profile;
        Ok(Self {
            root,
            mounts,
            uid: spec.ids.base(),
            tmp: profile.tmp,
            shm: profile.shm,
            run: profile.run,
            inodes: profile.inodes,
            kvm: profile.kvm,
            devices: profile.devices.clone(),
            fuse: spec.fuse.clone(),
            console,
            cgroups: profile.cgroups,
            resolve: measures.resolve,
        })
    }
}

/// Where a container's own terminal is attached, if it has one.
const CONSOLE: &CStr = c"console";

/// A mount of the terminal alone, whose owner is then `owner`.
fn console(terminal: &OwnedFd, owner: u32) -> Result<OwnedFd, Error> {
    if rustix::termios::tcgetwinsize(terminal).is_err() {
        return Err(Error::Invalid { what: "the console".to_owned(), reason: "give it a terminal" });
    }
    let owner = (rustix::fs::Uid::from_raw(owner), rustix::fs::Gid::from_raw(owner));
    rustix::fs::fchown(terminal, Some(owner.0), Some(owner.1))
        .map_err(io_error("give the console to the container"))?;
    clone_dir(terminal.as_fd()).map_err(io_error("mount the console"))
}

/// Adds the steps that make a file system whose requests come to a descriptor.
/// The process opens the device itself: the kernel wants it opened by the user
/// namespace that mounts (Linux `fs/fuse/inode.c`, `fuse_fill_super`).
fn serve(plan: &mut Plan, dev: PlanFd, fuse: &FuseMount, target: &str) -> Result<PlanFd, Error> {
    let device = plan.scratch();
    plan.step(
        format!("open the device for {target}"),
        Op::OpenDevice { dir: dev, path: c"fuse".to_owned(), into: device },
    );
    let number = fuse.number.into();
    plan.step(format!("place descriptor {number}"), Op::Dup { from: device, to: number });
    let (number, owner) = (number.to_string(), fuse.owner.to_string());
    // A flag has no value. The owner alone could use it without `allow_other`,
    // and the program would have to check modes itself without the other.
    let options = [
        ("fd", number.as_str()),
        ("rootmode", "40000"),
        ("user_id", &owner),
        ("group_id", &owner),
        ("allow_other", ""),
        ("default_permissions", ""),
    ];
    let options = options.map(|(key, value)| Ok((c_string(key)?, c_string(value)?)));
    let options = options.into_iter().collect::<Result<_, Error>>()?;
    let into = slot(plan)?;
    let attributes = NOSUID | NODEV;
    plan.step(format!("make {target}"), Op::MakeFs { kind: c"fuse".to_owned(), options, attributes, into });
    Ok(into)
}

fn text(target: &Path) -> Result<String, Error> {
    target
        .to_str()
        .map(ToOwned::to_owned)
        .ok_or_else(|| Error::Invalid { what: format!("mount target {target:?}"), reason: "it is not UTF-8" })
}

/// An empty directory of the device file system, seen before anything is
/// mounted there: what hides a directory.
const EMPTY_DIR: &str = "mqueue";

/// What is put over something, and from where.
struct Cover<'a> {
    from: PlanFd,
    path: &'a str,
    read_only: bool,
}

fn cover(plan: &mut Plan, verb: &str, top: &str, fs: PlanFd, name: &str, with: Cover<'_>) -> Result<(), Error> {
    let attributes = if with.read_only { u64::from(RDONLY) } else { 0 };
    let into = plan.scratch();
    let path = c_string(with.path)?;
    plan.step(format!("{verb} {top}/{name}"), Op::CloneTree { dir: with.from, path, attributes, into });
    let path = c_string(name)?;
    plan.step(format!("{verb} {top}/{name}"), Op::Attach { mount: into, dir: fs, path });
    Ok(())
}

/// A tmpfs for one container. Made by us, not by the child, so that its
/// limits cannot be changed from inside even by a mount call.
fn tmpfs(size: Bytes, inodes: u32, mode: u32, owner: u32) -> Result<OwnedFd, Error> {
    let make = || {
        let fs = FsContext::open("tmpfs")?;
        fs.set("size", &size.get().to_string())?;
        fs.set("nr_inodes", &inodes.to_string())?;
        fs.set("mode", &format!("{mode:o}"))?;
        fs.set("uid", &owner.to_string())?;
        fs.set("gid", &owner.to_string())?;
        fs.mount(Restrictions { nosuid: true, nodev: true, ..Restrictions::default() })
    };
    make().map_err(|error| Error::Io { op: "make a tmpfs".to_owned(), source: io::Error::other(error) })
}
