//! Limits: a cgroup per container, in the unified hierarchy (v2) or in as many
//! v1 hierarchies as the controllers need.
//!
//! Two levels, `qvd-<instance>/<desktop>`, at the top of the tree: whatever
//! manages services on this host may end the node's own group, and desktops
//! outlive the node. Limits are on files that no process inside can reach, as
//! no cgroup file system is mounted there. A container that is to have one, such as
//! one with systemd, lives a level deeper: it sees, and may divide, its own group
//! below the one that its limits are on.

mod demand;
mod end;
mod freezer;
mod hierarchy;
mod io_limit;
mod pressure;
mod tree;

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use qvd_core::{DesktopId, Instance, Limits, Missing, UidRange};

pub use freezer::Freezer;
pub(crate) use hierarchy::{Controller, Hierarchy, find};
pub use pressure::{Pressure, Waiting};
pub(crate) use tree::{Kernel, Tree};

use crate::{Error, error::io_error};
use end::{empty, members, remove_all};

/// The part of its group that a container may divide.
const INSIDE: &str = "desktop";

/// Most groups that a container may make, and how deep: each takes memory of the
/// kernel. systemd makes some tens, four deep.
const DESCENDANTS_MAX: u32 = 512;
const DEPTH_MAX: u32 = 16;

/// Period of the processor limit. Source: Linux
/// `Documentation/admin-guide/cgroup-v2.rst`, the default of `cpu.max`.
const CPU_PERIOD_US: u64 = 100_000;

/// Smallest quota that the kernel takes: `min_cfs_quota_period`, 1 ms.
const CPU_QUOTA_MIN_US: u64 = 1000;

/// The groups of one installation.
#[derive(Debug)]
pub(crate) struct Cgroups {
    tree: Box<dyn Tree>,
    hierarchies: Vec<Hierarchy>,
    group: String,
}

impl Cgroups {
    pub(crate) fn open(instance: Instance) -> Result<Self, Error> {
        let mountinfo =
            std::fs::read_to_string("/proc/thread-self/mountinfo").map_err(io_error("read the mount table"))?;
        let tree = Box::new(Kernel);
        let hierarchies = find(tree.as_ref(), &mountinfo);
        Self::new(tree, hierarchies, instance)
    }

    fn new(tree: Box<dyn Tree>, hierarchies: Vec<Hierarchy>, instance: Instance) -> Result<Self, Error> {
        for controller in Controller::REQUIRED {
            if !hierarchies.iter().any(|h| h.controllers.contains(&controller)) {
                let missing =
                    Missing::Kernel(format!("the cgroup controller `{}`, or it is not mounted", controller.name()));
                return Err(Error::Unsupported { op: "limit a desktop", missing });
            }
        }
        Ok(Self { tree, hierarchies, group: instance.cgroup_name() })
    }

    /// The hierarchy that a child can be born in: the only one, and v2.
    fn birthplace(&self) -> Option<&Hierarchy> {
        match self.hierarchies.as_slice() {
            [only] if only.unified => Some(only),
            _ => None,
        }
    }

    /// Whether a child can be made in its group at once, in principle.
    pub(crate) fn is_birthplace(&self) -> bool {
        self.birthplace().is_some()
    }

    fn parent(&self, hierarchy: &Hierarchy) -> PathBuf {
        hierarchy.root.join(&self.group)
    }

    fn make_parent(&self, hierarchy: &Hierarchy) -> io::Result<()> {
        let parent = self.parent(hierarchy);
        match self.tree.make(&parent) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        if hierarchy.unified {
            for above in [&hierarchy.root, &parent] {
                self.tree.write(&above.join("cgroup.subtree_control"), &hierarchy.enable())?;
            }
        }
        Ok(())
    }

    /// Makes a fresh group with `limits`. Never one that was there before: a
    /// v2 group whose processes were once killed kills what is born in it.
    ///
    /// With `inside`, there is a group below it that belongs to root of this range.
    pub(crate) fn create(
        self: &Arc<Self>,
        id: DesktopId,
        limits: Limits,
        inside: Option<UidRange>,
    ) -> Result<Cgroup, Error> {
        if inside.is_some() && self.birthplace().is_none() {
            let missing = Missing::Kernel("cgroups of version 2 alone".to_owned());
            return Err(Error::Unsupported { op: "give a container cgroups of its own", missing });
        }
        let disks = match limits.io {
            Some(_) => self.disks()?,
            None => Vec::new(),
        };
        let mut cgroup = Cgroup {
            all: Arc::clone(self),
            name: id.to_string(),
            divided: inside.is_some(),
            limits_io: limits.io.is_some(),
            closed: false,
        };
        let needed = |h: &&Hierarchy| limits.io.is_some() || !h.is_for_io_alone();
        for hierarchy in self.hierarchies.iter().filter(needed) {
            let path = cgroup.path(hierarchy);
            let op = || format!("make cgroup `{}`", path.display());
            let made = match self.tree.make(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.make_parent(hierarchy).and_then(|()| self.tree.make(&path))
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    if !members(self.tree.as_ref(), hierarchy, &path).map_err(io_error(op()))?.is_empty() {
                        // It is another's: leave it alone.
                        cgroup.closed = true;
                        return Err(Error::Busy(id));
                    }
                    remove_all(self.tree.as_ref(), hierarchy, &path).and_then(|()| self.tree.make(&path))
                }
                made => made,
            };
            made.map_err(io_error(op()))?;
            for (file, value, optional) in files(hierarchy, limits, &disks) {
                match self.tree.write(&path.join(file), &value) {
                    Err(error) if optional && error.kind() == io::ErrorKind::NotFound => {}
                    result => result.map_err(io_error(format!("write {value} to `{}`", path.join(file).display())))?,
                }
            }
        }
        if let (Some(ids), Some(hierarchy)) = (inside, self.birthplace()) {
            let path = cgroup.path(hierarchy);
            let divide = || {
                self.tree.write(&path.join("cgroup.max.descendants"), &DESCENDANTS_MAX.to_string())?;
                self.tree.write(&path.join("cgroup.max.depth"), &DEPTH_MAX.to_string())?;
                self.tree.write(&path.join("cgroup.subtree_control"), &hierarchy.enable())?;
                let inside = path.join(INSIDE);
                self.tree.make(&inside)?;
                // Source: Linux `kernel/cgroup/cgroup.c`, files with CFTYPE_NS_DELEGATABLE,
                // as far as every kernel has them.
                let given = ["", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"];
                given.iter().try_for_each(|file| self.tree.give(&inside.join(file), ids.base()))
            };
            divide().map_err(io_error(format!("divide cgroup `{}`", path.display())))?;
        }
        Ok(cgroup)
    }

    /// The disks whose use is limited.
    fn disks(&self) -> Result<Vec<String>, Error> {
        let op = "limit what a desktop reads and writes";
        if !self.hierarchies.iter().any(|h| h.controllers.contains(&Controller::Io)) {
            let missing = "the cgroup controller `io` (`blkio` in version 1), or it is not mounted";
            return Err(Error::Unsupported { op, missing: Missing::Kernel(missing.to_owned()) });
        }
        let disks = io_limit::disks(Path::new("/sys/block")).map_err(io_error("list the disks"))?;
        if disks.is_empty() {
            return Err(Error::Unsupported { op, missing: Missing::Device("any disk".to_owned()) });
        }
        Ok(disks)
    }

    /// The group of a container that runs already.
    pub(crate) fn adopt(self: &Arc<Self>, id: DesktopId) -> Cgroup {
        Cgroup { all: Arc::clone(self), name: id.to_string(), divided: false, limits_io: false, closed: false }
    }

    /// The names of all groups there are.
    pub(crate) fn names(&self) -> Result<BTreeSet<String>, Error> {
        let mut names = BTreeSet::new();
        for hierarchy in &self.hierarchies {
            let parent = self.parent(hierarchy);
            let list = self.tree.list(&parent).map_err(io_error(format!("list `{}`", parent.display())))?;
            names.extend(list);
        }
        Ok(names)
    }

    /// A group by name, to remove it.
    pub(crate) fn stray(self: &Arc<Self>, name: String) -> Cgroup {
        Cgroup { all: Arc::clone(self), name, divided: false, limits_io: false, closed: false }
    }

    /// Whether `pid` is in the group of `id`, in every hierarchy.
    pub(crate) fn holds(&self, id: DesktopId, pid: u32) -> io::Result<bool> {
        for hierarchy in &self.hierarchies {
            let path = self.parent(hierarchy).join(id.to_string());
            if hierarchy.is_for_io_alone() && !self.tree.exists(&path)? {
                continue;
            }
            if !members(self.tree.as_ref(), hierarchy, &path)?.contains(&pid) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for hierarchy in &self.hierarchies {
            // Groups of desktops that live on keep it.
            if let Err(error) = self.tree.remove(&self.parent(hierarchy)) {
                tracing::debug!(group = %self.group, %error, "cgroup of the installation stays");
            }
        }
    }
}

/// Which files get which value, and whether the kernel may lack the file.
fn files(hierarchy: &Hierarchy, limits: Limits, disks: &[String]) -> Vec<(&'static str, String, bool)> {
    let memory = limits.memory.get();
    let quota = (u64::from(limits.cpu.0) * CPU_PERIOD_US / 1000).max(CPU_QUOTA_MIN_US);
    let mut files = Vec::new();
    for controller in &hierarchy.controllers {
        match (controller, hierarchy.unified) {
            (Controller::Memory, true) => {
                files.push(("memory.max", memory.to_string(), false));
                // As much swap again: idle desktops may be swapped out, but
                // none can fill the host's swap.
                files.push(("memory.swap.max", memory.to_string(), true));
            }
            (Controller::Memory, false) => {
                files.push(("memory.limit_in_bytes", memory.to_string(), false));
                files.push(("memory.memsw.limit_in_bytes", memory.saturating_mul(2).to_string(), true));
            }
            (Controller::Cpu, true) => files.push(("cpu.max", format!("{quota} {CPU_PERIOD_US}"), false)),
            (Controller::Cpu, false) => {
                files.push(("cpu.cfs_period_us", CPU_PERIOD_US.to_string(), false));
                files.push(("cpu.cfs_quota_us", quota.to_string(), false));
            }
            (Controller::Pids, _) => files.push(("pids.max", limits.pids.to_string(), false)),
            (Controller::Io, unified) => files.extend(io_limit::files(unified, limits.io, disks)),
            (Controller::Freezer, _) => {}
        }
    }
    files
}

/// The group of one container. Closing it kills what is in it.
#[must_use = "dropping it kills what is in the cgroup and can only log a failure"]
#[derive(Debug)]
pub(crate) struct Cgroup {
    all: Arc<Cgroups>,
    name: String,
    /// Whether its processes are born a level deeper; and whether it was made with
    /// limits of reading and writing. What is adopted or swept needs to know neither.
    divided: bool,
    limits_io: bool,
    closed: bool,
}

impl Cgroup {
    fn path(&self, hierarchy: &Hierarchy) -> PathBuf {
        self.all.parent(hierarchy).join(&self.name)
    }

    /// The group that its processes are in.
    fn home(&self, hierarchy: &Hierarchy) -> PathBuf {
        let path = self.path(hierarchy);
        if self.divided { path.join(INSIDE) } else { path }
    }

    /// The directory that a child can be born in, if there is one.
    pub(crate) fn birthplace(&self) -> Result<Option<OwnedFd>, Error> {
        let Some(hierarchy) = self.all.birthplace() else { return Ok(None) };
        let path = self.home(hierarchy);
        let dir = File::open(&path).map_err(io_error(format!("open `{}`", path.display())))?;
        Ok(Some(dir.into()))
    }

    /// What a process without threads writes to in order to move in, in every
    /// v1 hierarchy. It does that itself because moving another waits for an
    /// RCU grace period, some milliseconds and more under load (Linux 6.18
    /// `kernel/cgroup/cgroup.c`, `cgroup_procs_write_start`).
    pub(crate) fn entrances(&self) -> Result<Vec<OwnedFd>, Error> {
        let v1 = self.all.hierarchies.iter().filter(|hierarchy| !hierarchy.unified);
        let used = v1.filter(|h| self.limits_io || !h.is_for_io_alone());
        used.map(|hierarchy| {
            let path = self.path(hierarchy).join("tasks");
            let tasks = File::options().write(true).open(&path);
            Ok(tasks.map_err(io_error(format!("open `{}`", path.display())))?.into())
        })
        .collect()
    }

    /// Moves a process in, in the v2 hierarchy if it is used.
    pub(crate) fn attach(&self, pid: u32) -> Result<(), Error> {
        for hierarchy in self.all.hierarchies.iter().filter(|hierarchy| hierarchy.unified) {
            let path = self.home(hierarchy).join("cgroup.procs");
            let op = || format!("move process {pid} to `{}`", path.display());
            self.all.tree.write(&path, &pid.to_string()).map_err(io_error(op()))?;
        }
        Ok(())
    }

    /// What stops and resumes it; none on a v1 host without that controller.
    pub(crate) fn freezer(&self, id: DesktopId) -> Option<Freezer> {
        let can = |h: &&Hierarchy| h.unified || h.controllers.contains(&Controller::Freezer);
        let hierarchy = self.all.hierarchies.iter().find(can)?;
        Some(Freezer::new(&self.all, hierarchy, id, self.path(hierarchy)))
    }

    /// Numbers of the processes in it.
    pub(crate) fn processes(&self) -> io::Result<Vec<u32>> {
        let Some(first) = self.all.hierarchies.iter().find(|h| !h.is_for_io_alone()) else { return Ok(Vec::new()) };
        members(self.all.tree.as_ref(), first, &self.path(first))
    }

    /// How long they waited, where the kernel counts it.
    pub(crate) fn pressure(&self) -> io::Result<Option<Pressure>> {
        let Some(hierarchy) = self.all.hierarchies.iter().find(|h| h.unified) else { return Ok(None) };
        Pressure::read(self.all.tree.as_ref(), &self.path(hierarchy))
    }

    /// Processor time that its processes have used. On v1, where time is kept by
    /// another controller than limits are, it is that of those that live.
    pub(crate) fn cpu_time(&self) -> io::Result<Duration> {
        let v2 = self.all.hierarchies.iter().find(|h| h.unified && h.controllers.contains(&Controller::Cpu));
        if let Some(hierarchy) = v2 {
            let stat = self.all.tree.read(&self.path(hierarchy).join("cpu.stat"))?;
            let used = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok());
            return used.map(Duration::from_micros).ok_or_else(|| io::ErrorKind::InvalidData.into());
        }
        self.processes()?.into_iter().try_fold(Duration::ZERO, |sum, pid| Ok(sum + qvd_sys::process::cpu_time(pid)?))
    }

    /// What its processes keep in memory, in bytes: all that is charged to it
    /// but pages of files that nobody used for a while.
    pub(crate) fn memory(&self) -> io::Result<u64> {
        let limits = |h: &&Hierarchy| h.controllers.contains(&Controller::Memory);
        let hierarchy = self.all.hierarchies.iter().find(limits).ok_or(io::ErrorKind::Unsupported)?;
        // Source: Linux `Documentation/admin-guide/cgroup-v2.rst`, "Memory
        // Interface Files", and `cgroup-v1/memory.rst`, section 5.2.
        let (usage, unused) = if hierarchy.unified {
            ("memory.current", "inactive_file ")
        } else {
            ("memory.usage_in_bytes", "total_inactive_file ")
        };
        let path = self.path(hierarchy);
        let used: u64 = self.all.tree.read(&path.join(usage))?.trim().parse().map_err(io::Error::other)?;
        let stat = self.all.tree.read(&path.join("memory.stat"))?;
        let unused = stat.lines().find_map(|line| line.strip_prefix(unused)?.parse().ok());
        Ok(used.saturating_sub(unused.unwrap_or(0)))
    }

    /// Has the kernel take so many bytes from it, as far as they can be had;
    /// false where the kernel cannot (v1, or older than 5.19).
    pub(crate) fn reclaim(&self, bytes: u64) -> io::Result<bool> {
        let v2 = self.all.hierarchies.iter().find(|h| h.unified && h.controllers.contains(&Controller::Memory));
        let Some(hierarchy) = v2 else { return Ok(false) };
        match self.all.tree.write(&self.path(hierarchy).join("memory.reclaim"), &bytes.to_string()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            // There was less to be had than was asked for.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
            written => written.map(|()| true),
        }
    }

    /// What the kernel says the limits are.
    pub(crate) fn limits(&self) -> Result<Vec<(String, String)>, Error> {
        let mut values = Vec::new();
        for hierarchy in &self.all.hierarchies {
            let io = io_limit::FILES.map(|file| (file, String::new(), true));
            for (file, _, optional) in files(hierarchy, Limits::default(), &[]).into_iter().chain(io) {
                let path = self.path(hierarchy).join(file);
                match self.all.tree.read(&path) {
                    Err(error) if optional && error.kind() == io::ErrorKind::NotFound => {}
                    value => {
                        let value = value.map_err(io_error(format!("read `{}`", path.display())))?;
                        values.push((file.to_owned(), value.trim().to_owned()));
                    }
                }
            }
        }
        Ok(values)
    }

    /// Leaves the group as it is, for another to adopt.
    pub(crate) fn leave(&mut self) {
        self.closed = true;
    }

    /// Whether it has been removed or left.
    pub(crate) const fn is_closed(&self) -> bool {
        self.closed
    }

    /// Kills what is in it and removes it. Goes on after a failure in one
    /// hierarchy; still armed after an error.
    pub(crate) fn close(&mut self) -> Result<(), Error> {
        if self.closed {
            return Ok(());
        }
        let mut first = None;
        // What stands still in a v1 group cannot even be killed. A group that
        // nobody froze, or that is gone, takes it as well.
        for hierarchy in self.all.hierarchies.iter().filter(|h| h.controllers.contains(&Controller::Freezer)) {
            let state = self.path(hierarchy).join("freezer.state");
            if let Err(error) = self.all.tree.write(&state, "THAWED") {
                tracing::debug!(path = %state.display(), %error, "nothing to thaw");
            }
        }
        for hierarchy in self.all.hierarchies.iter().rev() {
            if let Err(error) = empty(self.all.tree.as_ref(), hierarchy, &self.path(hierarchy)) {
                tracing::warn!(cgroup = %self.path(hierarchy).display(), %error, "cgroup not removed");
                first.get_or_insert(error);
            }
        }
        self.closed = first.is_none();
        first.map_or(Ok(()), Err)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(cgroup = %self.name, %error, "cgroup left behind");
        }
    }
}
