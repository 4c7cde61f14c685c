//! A container's tree of mounts as it grows, from directories of its root.

use std::{
    ffi::{CString, OsStr},
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use qvd_sys::process::{Op, Plan, PlanFd};
use rustix::{
    fs::{Mode, OFlags, ResolveFlags, openat2},
    io::Errno,
};

use crate::{Error, error::io_error, spec::components};

/// The container's tree of mounts as it grows.
pub(super) struct Tree<'a> {
    pub(super) root_fd: BorrowedFd<'a>,
    pub(super) root: PlanFd,
    pub(super) work: PlanFd,
    pub(super) mounted: Vec<(PathBuf, PlanFd)>,
    pub(super) how: ResolveFlags,
    pub(super) cgroups: bool,
}

impl Tree<'_> {
    /// Attaches `mount` at the absolute path `target`, making directories.
    pub(super) fn attach(&mut self, plan: &mut Plan, target: &str, mount: PlanFd) -> Result<(), Error> {
        let path = Path::new(target);
        // The last one mounted above the target is what its path leads through.
        let above = self.mounted.iter().rev().find(|(top, _)| path.starts_with(top));
        let dir = match above {
            Some((top, fd)) => {
                let rest = path.strip_prefix(top).unwrap_or(path);
                descend(plan, *fd, &components_below(rest), self.work, target)
            }
            None => {
                let (found, missing) = self.resolve(path)?;
                let found = match found {
                    Some(fd) => keep(plan, fd)?,
                    None => self.root,
                };
                descend(plan, found, &missing, self.work, target)
            }
        }?;
        plan.step(format!("attach {target}"), Op::Attach { mount, dir, path: CString::default() });
        self.mounted.push((path.to_owned(), mount));
        Ok(())
    }

    /// Opens as much of `target` as there is in the root; the rest has to be
    /// made. A link on the way, or anything but a directory, is refused.
    fn resolve<'p>(&self, target: &'p Path) -> Result<(Option<OwnedFd>, Vec<&'p OsStr>), Error> {
        let names = components(target);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        for there in (1..=names.len()).rev() {
            let (path, missing) = names.split_at(there);
            let path: PathBuf = path.iter().collect();
            match openat2(self.root_fd, &path, flags, Mode::empty(), self.how) {
                Ok(fd) => return Ok((Some(fd), missing.to_vec())),
                Err(Errno::NOENT) => {}
                Err(Errno::LOOP | Errno::NOTDIR | Errno::XDEV) => {
                    return Err(Error::Invalid {
                        what: format!("`/{}` of the image", path.display()),
                        reason: "it must be a directory and not a link, as something is mounted there",
                    });
                }
                Err(error) => return Err(io_error(format!("open `/{}` of the root", path.display()))(error)),
            }
        }
        Ok((None, names))
    }
}

fn components_below(path: &Path) -> Vec<&OsStr> {
    path.iter().collect()
}

/// Makes and opens `names` one below the other, in the child.
fn descend(plan: &mut Plan, from: PlanFd, names: &[&OsStr], work: PlanFd, target: &str) -> Result<PlanFd, Error> {
    let mut dir = from;
    for name in names {
        let path = CString::new(name.as_bytes())
            .map_err(|_| Error::Invalid { what: format!("mount target `{target}`"), reason: "it contains a NUL" })?;
        let make = Op::MakeDir { dir, path: path.clone(), mode: 0o755 };
        plan.step(format!("make directory {target}"), make);
        plan.step(format!("open directory {target}"), Op::OpenDir { dir, path, into: work });
        dir = work;
    }
    Ok(dir)
}

pub(super) fn keep(plan: &mut Plan, fd: OwnedFd) -> Result<PlanFd, Error> {
    plan.own(fd).map_err(io_error("keep a descriptor for the container"))
}

pub(super) fn slot(plan: &mut Plan) -> Result<PlanFd, Error> {
    plan.slot().map_err(io_error("plan the container's file system"))
}
