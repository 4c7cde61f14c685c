//! Detached mounts: the parts of the new mount API that rustix lacks, and
//! the kernel's own words when it refuses one.
//!
//! A detached mount is a descriptor. It is in nobody's mount table, and it
//! is gone when the descriptor is closed. Option strings of `mount(2)` are
//! never built: the kernel cuts them at a page and mounts what is left.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    thread,
};

use rustix::{
    fs::CWD,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
        fsconfig_create, fsconfig_set_fd, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_change,
        move_mount, open_tree,
    },
    thread::{UnshareFlags, capabilities, set_capabilities},
};

/// What is forbidden on a mount, whatever its file system says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Restrictions {
    /// Nothing may be written.
    pub read_only: bool,
    /// Set-user-id bits and file capabilities have no effect.
    pub nosuid: bool,
    /// Device nodes cannot be opened.
    pub nodev: bool,
    /// Programs cannot be run.
    pub noexec: bool,
}

impl Restrictions {
    fn flags(self) -> MountAttrFlags {
        let mut flags = MountAttrFlags::empty();
        flags.set(MountAttrFlags::MOUNT_ATTR_RDONLY, self.read_only);
        flags.set(MountAttrFlags::MOUNT_ATTR_NOSUID, self.nosuid);
        flags.set(MountAttrFlags::MOUNT_ATTR_NODEV, self.nodev);
        flags.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, self.noexec);
        flags
    }
}

/// Makes a detached mount of the directory `dir` and of nothing mounted below it.
///
/// # Errors
/// The kernel refuses: `EPERM` without the privilege, `EINVAL` for a directory
/// of another mount namespace.
pub fn clone_dir(dir: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(open_tree(dir, "", flags)?)
}

/// Makes a detached copy of the mount `top` and of everything mounted below it.
///
/// # Errors
/// As [`clone_dir`].
pub fn clone_tree(top: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(open_tree(top, "", flags | OpenTreeFlags::AT_RECURSIVE)?)
}

/// Restricts a detached mount, makes it private and, with `idmap`, shows its files with their
/// owners shifted by that user namespace's maps.
///
/// # Errors
/// `EINVAL` when the file system cannot be id-mapped or the mount is attached
/// already, `ENOSYS` before Linux 5.12.
pub fn restrict(mount: BorrowedFd<'_>, restrictions: Restrictions, idmap: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut attr = libc::mount_attr {
        attr_set: u64::from(restrictions.flags().bits()),
        attr_clr: 0,
        // A clone of a shared mount would show what is later mounted on it to
        // everybody else who has it, the host included.
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    if let Some(userns) = idmap {
        attr.attr_set |= libc::MOUNT_ATTR_IDMAP;
        attr.userns_fd = u64::try_from(userns.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?;
    }
    // SAFETY: the path is an empty C string, `attr` is valid for its stated
    // size, and both descriptors are borrowed for the length of the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Attaches a detached mount over the directory `at`.
///
/// # Errors
/// The kernel refuses.
pub fn attach(mount: BorrowedFd<'_>, at: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, "", at, "", flags)?)
}

/// The kernel would not mount a file system.
#[derive(Debug, thiserror::Error)]
#[error("cannot {op}{}", said(log))]
pub struct MountError {
    /// What was tried.
    op: String,
    /// What the kernel wrote to the context's log, one line each.
    log: Vec<String>,
    /// What the kernel has to have for it.
    lacks: Option<&'static str>,
    source: io::Error,
}

impl MountError {
    /// An error of one step; `op` is a verb and its object.
    pub fn new(op: impl Into<String>, source: io::Error) -> Self {
        Self { op: op.into(), log: vec![], lacks: None, source }
    }

    /// It failed because the kernel lacks `what`.
    #[must_use]
    pub fn lacking(self, what: &'static str) -> Self {
        Self { lacks: Some(what), ..self }
    }

    /// What the kernel lacks, where that is known.
    #[must_use]
    pub const fn lacks(&self) -> Option<&'static str> {
        self.lacks
    }

    /// It was tried for `what`.
    #[must_use]
    pub fn about(self, what: &str) -> Self {
        Self { op: format!("{} for {what}", self.op), ..self }
    }

    /// The error number.
    #[must_use]
    pub const fn io(&self) -> &io::Error {
        &self.source
    }
}

fn said(log: &[String]) -> String {
    if log.is_empty() { String::new() } else { format!(" (the kernel says: {})", log.join("; ")) }
}

/// A file system being configured.
#[derive(Debug)]
pub struct FsContext {
    name: &'static str,
    fd: OwnedFd,
}

impl FsContext {
    /// Begins to configure a file system of the type `name`.
    ///
    /// # Errors
    /// `ENODEV` when the kernel has no such type.
    pub fn open(name: &'static str) -> Result<Self, MountError> {
        match fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC) {
            Ok(fd) => Ok(Self { name, fd }),
            Err(source) => Err(MountError::new(format!("open file system {name}"), source.into())),
        }
    }

    /// Sets `key` to a text of at most 255 bytes (Linux `fs/fsopen.c`).
    ///
    /// # Errors
    /// The kernel does not know the key or the value.
    pub fn set(&self, key: &str, value: &str) -> Result<(), MountError> {
        fsconfig_set_string(&self.fd, key, value).map_err(|e| self.error(&format!("set {key}={value} for"), e))
    }

    /// Sets an option that has no value.
    ///
    /// # Errors
    /// The kernel does not know it.
    pub fn set_flag(&self, key: &str) -> Result<(), MountError> {
        fsconfig_set_flag(&self.fd, key).map_err(|e| self.error(&format!("set {key} for"), e))
    }

    /// Sets `key` to a descriptor. Overlay layers take one since Linux 6.13.
    ///
    /// # Errors
    /// The kernel does not know the key or does not take a descriptor for it.
    pub fn set_fd(&self, key: &str, value: BorrowedFd<'_>) -> Result<(), MountError> {
        fsconfig_set_fd(&self.fd, key, value).map_err(|e| self.error(&format!("set {key} for"), e))
    }

    /// Makes the file system and a detached mount of it.
    ///
    /// # Errors
    /// The kernel refuses what was set.
    pub fn mount(self, restrictions: Restrictions) -> Result<OwnedFd, MountError> {
        fsconfig_create(&self.fd).map_err(|e| self.error("make", e))?;
        fsmount(&self.fd, FsMountFlags::FSMOUNT_CLOEXEC, restrictions.flags()).map_err(|e| self.error("mount", e))
    }

    fn error(&self, verb: &str, source: rustix::io::Errno) -> MountError {
        let error = MountError::new(format!("{verb} file system {}", self.name), source.into());
        MountError { log: self.log(), ..error }
    }

    /// Reads the messages that the kernel keeps with the context: one a read,
    /// each with a letter for its severity in front.
    fn log(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut buffer = [0_u8; 1024];
        // The kernel keeps eight messages (Linux `include/linux/fs_context.h`).
        while lines.len() < 8 {
            match rustix::io::read(&self.fd, &mut buffer) {
                Ok(len @ 1..) => {
                    let text = String::from_utf8_lossy(buffer.get(..len).unwrap_or_default());
                    lines.push(text.trim().trim_start_matches(['e', 'w', 'i']).trim_start().to_owned());
                }
                Ok(0) | Err(_) => break,
            }
        }
        lines
    }
}

impl AsFd for FsContext {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Runs `f` on a thread with a mount namespace of its own, in which mounts
/// may be attached without anybody seeing them. Detached mounts that `f`
/// returns stay; what it attached goes when the thread ends.
///
/// # Errors
/// The namespace cannot be made.
pub fn in_private_namespace<T: Send>(f: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().name("private-mounts".to_owned()).spawn_scoped(scope, || {
            // SAFETY: the thread is ours alone and ends with the closure; it
            // shares no file system state with others once CLONE_FS is undone.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS) }?;
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
            Ok(f())
        })?;
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs `f` on a thread whose files belong to `uid` and `gid`, with the same
/// capabilities as the caller's. A file system that is made in `f` remembers
/// these: an overlay on id-mapped layers can write only as an id that the map
/// knows, which root is not.
///
/// # Errors
/// This process may not take these ids.
pub fn with_fs_ids<T: Send>(uid: u32, gid: u32, f: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().name("fs-ids".to_owned()).spawn_scoped(scope, || {
            let before = capabilities(None)?;
            // Both calls change this thread only, and tell what was before
            // instead of whether they succeeded: so each is asked again.
            // SAFETY: they take and return plain numbers.
            let taken = unsafe {
                libc::setfsgid(gid);
                libc::setfsuid(uid);
                (libc::setfsgid(u32::MAX), libc::setfsuid(u32::MAX))
            };
            if taken != (gid.cast_signed(), uid.cast_signed()) {
                return Err(rustix::io::Errno::PERM.into());
            }
            // Leaving uid 0 took the capabilities about files away.
            set_capabilities(None, before)?;
            Ok(f())
        })?;
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A descriptor of a directory that can be used as a base for paths and
/// mounts but not read.
///
/// # Errors
/// It is not there, is not a directory or is a symbolic link.
pub fn open_dir_path(path: &std::path::Path) -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?)
}
