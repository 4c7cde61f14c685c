//! A root as the cases work with it: paths below its mount, and words for what
//! should have worked.

use std::{
    collections::BTreeSet,
    fs::{self, File, Metadata},
    io::{Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, Mode, OFlags, XattrFlags};

use super::{
    manifest,
    report::{Failure, Step, equal},
};

/// A mounted root.
#[derive(Debug)]
pub(super) struct Tree {
    mount: OwnedFd,
    dir: PathBuf,
}

impl Tree {
    pub(super) fn new(mount: OwnedFd) -> Self {
        Self { dir: format!("/proc/self/fd/{}", mount.as_raw_fd()).into(), mount }
    }

    /// Its top, by a path that leads through the descriptor.
    pub(super) fn dir(&self) -> PathBuf {
        self.dir.join("")
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }

    pub(super) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.join(name)
    }

    pub(super) fn open(&self, name: &str, flags: OFlags) -> Result<File, Failure> {
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
        let opened = rustix::fs::open(self.path(name), flags | OFlags::CLOEXEC, mode);
        Ok(opened.step(format!("`{name}` can be opened ({flags:?})"))?.into())
    }

    pub(super) fn read(&self, name: &str) -> Result<String, Failure> {
        let mut text = Vec::new();
        self.open(name, OFlags::RDONLY)?.read_to_end(&mut text).step(format!("`{name}` can be read"))?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Demands that a file has this content.
    pub(super) fn expect(&self, name: &str, content: &str) -> Result<(), Failure> {
        equal(format!("`{name}` holds"), &*self.read(name)?, content)
    }

    /// Writes a file anew.
    pub(super) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> Result<(), Failure> {
        let mut file = self.open(name, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC)?;
        file.write_all(content.as_ref()).step(format!("`{name}` can be written"))
    }

    pub(super) fn mkdir(&self, name: &str) -> Result<(), Failure> {
        fs::create_dir(self.path(name)).step(format!("directory `{name}` can be made"))
    }

    pub(super) fn remove(&self, name: &str) -> Result<(), Failure> {
        fs::remove_file(self.path(name)).step(format!("`{name}` can be removed"))
    }

    pub(super) fn remove_all(&self, name: &str) -> Result<(), Failure> {
        fs::remove_dir_all(self.path(name)).step(format!("`{name}` can be removed with what is in it"))
    }

    pub(super) fn rename(&self, from: &str, to: &str) -> Result<(), Failure> {
        fs::rename(self.path(from), self.path(to)).step(format!("`{from}` can be renamed to `{to}`"))
    }

    pub(super) fn link(&self, from: &str, to: &str) -> Result<(), Failure> {
        fs::hard_link(self.path(from), self.path(to)).step(format!("`{from}` can be linked to `{to}`"))
    }

    pub(super) fn stat(&self, name: &str) -> Result<Metadata, Failure> {
        fs::symlink_metadata(self.path(name)).step(format!("`{name}` is there"))
    }

    /// Demands that there is nothing of this name.
    pub(super) fn expect_absent(&self, name: &str) -> Result<(), Failure> {
        match fs::symlink_metadata(self.path(name)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => Err(Failure::new(format!("`{name}` is not there"), format!("{other:?}"))),
        }
    }

    /// The names in a directory; each is to be there once.
    pub(super) fn names(&self, name: &str) -> Result<BTreeSet<String>, Failure> {
        let mut found = BTreeSet::new();
        for entry in fs::read_dir(self.path(name)).step(format!("`{name}` can be listed"))? {
            let entry = entry.step(format!("`{name}` can be listed"))?.file_name().to_string_lossy().into_owned();
            if !found.insert(entry.clone()) {
                return Err(Failure::new(
                    format!("`{name}` lists each name once"),
                    format!("`{entry}` is there twice"),
                ));
            }
        }
        Ok(found)
    }

    /// Demands that a directory holds these names.
    pub(super) fn expect_names(&self, name: &str, names: &[&str]) -> Result<(), Failure> {
        let expected: BTreeSet<String> = names.iter().map(|&name| name.to_owned()).collect();
        equal(format!("`{name}` lists"), self.names(name)?, expected)
    }

    pub(super) fn chmod(&self, name: &str, mode: u32) -> Result<(), Failure> {
        rustix::fs::chmodat(CWD, self.path(name), Mode::from_raw_mode(mode), rustix::fs::AtFlags::empty())
            .step(format!("the mode of `{name}` can be changed"))
    }

    pub(super) fn chown(&self, name: &str, uid: u32, gid: u32) -> Result<(), Failure> {
        std::os::unix::fs::lchown(self.path(name), Some(uid), Some(gid))
            .step(format!("`{name}` can be given to {uid}:{gid}"))
    }

    pub(super) fn xattr(&self, name: &str, key: &str) -> Result<Vec<u8>, Failure> {
        manifest::xattr(&self.path(name), key).step(format!("`{name}` has an attribute `{key}`"))
    }

    pub(super) fn set_xattr(&self, name: &str, key: &str, value: &[u8]) -> Result<(), Failure> {
        rustix::fs::lsetxattr(self.path(name), key, value, XattrFlags::empty())
            .step(format!("`{name}` can be given an attribute `{key}`"))
    }
}
