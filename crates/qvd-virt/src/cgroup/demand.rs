//! What a group asks of the kernel beyond its limits, and what it can give back.

use std::io;

use super::{Cgroup, Controller, Hierarchy};

impl Cgroup {
    fn of(&self, controller: Controller) -> Option<&Hierarchy> {
        self.all.hierarchies.iter().find(|hierarchy| hierarchy.controllers.contains(&controller))
    }

    /// How often a process or thread was refused because there were as many as
    /// there may be. Source: Linux `Documentation/admin-guide/cgroup-v2.rst`,
    /// `pids.events`; v1 has the same file.
    pub(crate) fn refused_processes(&self) -> io::Result<u64> {
        let Some(hierarchy) = self.of(Controller::Pids) else { return Ok(0) };
        let events = match self.all.tree.read(&self.path(hierarchy).join("pids.events")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            events => events?,
        };
        Ok(events.lines().find_map(|line| line.strip_prefix("max ")?.parse().ok()).unwrap_or(0))
    }

    /// How often the kernel ended one of its processes because memory was used up: the
    /// group's, or all of the host's. Source: Linux
    /// `Documentation/admin-guide/cgroup-v2.rst`, `memory.events`; v1 has the same line in
    /// `memory.oom_control` since Linux 4.13 (`mm/memcontrol.c`, `mem_cgroup_oom_control_read`).
    pub(crate) fn killed_for_memory(&self) -> io::Result<u64> {
        let Some(hierarchy) = self.of(Controller::Memory) else { return Ok(0) };
        let file = if hierarchy.unified { "memory.events" } else { "memory.oom_control" };
        let events = match self.all.tree.read(&self.path(hierarchy).join(file)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            events => events?,
        };
        Ok(events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0))
    }

    /// Asks the kernel for whatever memory is charged to it and can be had: pages,
    /// and what the kernel remembers of files for its processes. Where the kernel
    /// cannot be asked, nothing happens.
    ///
    /// In v1 the kernel goes on for as long as it finds something, so this is for
    /// a group that stands still.
    ///
    /// Source: Linux `Documentation/admin-guide/cgroup-v2.rst`, `memory.reclaim`,
    /// and `cgroup-v1/memory.rst`, `memory.force_empty`.
    pub(crate) fn reclaim_all(&self) -> io::Result<()> {
        let Some(hierarchy) = self.of(Controller::Memory) else { return Ok(()) };
        let path = self.path(hierarchy);
        if hierarchy.unified {
            let used = self.all.tree.read(&path.join("memory.current"))?;
            return self.reclaim(used.trim().parse().map_err(io::Error::other)?).map(drop);
        }
        match self.all.tree.write(&path.join("memory.force_empty"), "0") {
            // It may be compiled out, or the group be in use by its kernel's lights.
            Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::EBUSY) => {
                Ok(())
            }
            asked => asked,
        }
    }
}
