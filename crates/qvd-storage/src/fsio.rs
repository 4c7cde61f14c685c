//! Files that are whole after any crash, and directories by descriptor.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

/// Opens a directory for reading and as a base of paths; a symbolic link in
/// its place is refused.
pub(crate) fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Opens a directory below `dir` that is on the same mount, reached without
/// any symbolic link.
pub(crate) fn open_dir_below(dir: impl AsFd, name: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    Ok(openat2(dir, name, flags, Mode::empty(), resolve)?)
}

/// Makes a directory that only root may enter, or finds it.
pub(crate) fn ensure_private_dir(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let dir = open_dir(path)?;
            Ok(rustix::fs::fchmod(dir, Mode::RWXU)?)
        }
        other => other,
    }
}

/// Replaces a file by another at once: readers see the old or the new
/// content, also after a crash.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut temporary = std::ffi::OsString::from(".new-");
    temporary.push(name);
    let temporary = parent.join(temporary);
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        sync_dir(parent)
    };
    write().inspect_err(|_| {
        if let Err(error) = std::fs::remove_file(&temporary)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %temporary.display(), %error, "temporary file left behind");
        }
    })
}

/// Whether what is in a directory is gone when the host restarts.
pub(crate) fn in_memory(path: &Path) -> io::Result<bool> {
    // Source: Linux `include/uapi/linux/magic.h`, `TMPFS_MAGIC` and `RAMFS_MAGIC`.
    const IN_MEMORY: [rustix::fs::FsWord; 2] = [0x0102_1994, 0x8584_58f6];
    Ok(IN_MEMORY.contains(&rustix::fs::statfs(path)?.f_type))
}

/// Makes the names in a directory survive a crash.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    File::from(open_dir(path)?).sync_all()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        std::fs::write(&path, "a longer old content").unwrap();
        let old = File::open(&path).unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(io::read_to_string(old).unwrap(), "a longer old content");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_replacement_keeps_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        std::fs::create_dir(&path).unwrap();
        replace(&path, b"new").unwrap_err();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
