//! The end of a group: what is in it is killed, and it is removed.

use std::{
    io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use qvd_sys::process::Process;
use rustix::process::Signal;

use super::{Controller, Hierarchy, Tree};
use crate::{Error, error::io_error};

/// How long the kernel may take to empty a group whose processes were killed.
const EMPTY_WITHIN: Duration = Duration::from_secs(5);

/// Numbers of the processes in a group and, in version 2, in those below it.
pub(super) fn members(tree: &dyn Tree, hierarchy: &Hierarchy, path: &Path) -> io::Result<Vec<u32>> {
    if !hierarchy.unified {
        return tree.processes(path);
    }
    let mut all = Vec::new();
    for group in below(tree, path)? {
        all.extend(tree.processes(&group)?);
    }
    Ok(all)
}

/// A group and those below it, each after the one that it is in. There are no more
/// than [`super::DESCENDANTS_MAX`].
fn below(tree: &dyn Tree, path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut groups = vec![path.to_owned()];
    let mut next = 0;
    while let Some(group) = groups.get(next) {
        let names = tree.list(group)?;
        let inner: Vec<_> = names.iter().map(|name| group.join(name)).collect();
        groups.extend(inner);
        next += 1;
    }
    Ok(groups)
}

/// Removes a group without processes, and those below it.
pub(super) fn remove_all(tree: &dyn Tree, hierarchy: &Hierarchy, path: &Path) -> io::Result<()> {
    let groups = if hierarchy.unified { below(tree, path)? } else { vec![path.to_owned()] };
    for group in groups.iter().rev() {
        match tree.remove(group) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

pub(super) fn empty(tree: &dyn Tree, hierarchy: &Hierarchy, path: &Path) -> Result<(), Error> {
    let op = || format!("remove cgroup `{}`", path.display());
    let deadline = Instant::now() + EMPTY_WITHIN;
    let mut pause = Duration::from_micros(100);
    loop {
        match tree.remove(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.raw_os_error() != Some(libc::EBUSY) => return Err(io_error(op())(error)),
            Err(_) => {}
        }
        if Instant::now() >= deadline {
            return Err(Error::Timeout { op: op(), limit: EMPTY_WITHIN });
        }
        let processes = members(tree, hierarchy, path).map_err(io_error(op()))?;
        if processes.is_empty() && hierarchy.unified {
            // What a container made of its own group.
            match remove_all(tree, hierarchy, path) {
                Err(error) if error.raw_os_error() != Some(libc::EBUSY) => return Err(io_error(op())(error)),
                _ => {}
            }
        }
        if processes.is_empty() {
            // What has ended leaves its group a moment later, without an event
            // that v1 would tell.
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
            continue;
        }
        kill(tree, hierarchy, path, &processes, deadline).map_err(io_error(op()))?;
    }
}

fn kill(tree: &dyn Tree, hierarchy: &Hierarchy, path: &Path, found: &[u32], deadline: Instant) -> io::Result<()> {
    if hierarchy.unified {
        match tree.write(&path.join("cgroup.kill"), "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
    } else if hierarchy.controllers.contains(&Controller::Pids) {
        // Nobody can fork away from the loop below.
        tree.write(&path.join("pids.max"), "0")?;
    }
    for &pid in found {
        let Ok(mut process) = Process::open(pid) else { continue };
        // The number may have come to mean another process since it was read.
        if members(tree, hierarchy, path)?.contains(&pid) {
            process.signal(Signal::KILL)?;
            process.wait(deadline.saturating_duration_since(Instant::now()))?;
        }
    }
    Ok(())
}
