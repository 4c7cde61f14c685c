//! Volumes with an ext4 that holds the files of an image: made, and mounted.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    process::Stdio,
    time::Duration,
};

use qvd_core::{Bytes, Missing};
use qvd_sys::mount::{self, FsContext, MountError, Restrictions};
use rustix::{
    fs::{AtFlags, FallocateFlags, Mode, OFlags, chmodat, mkdirat, openat},
    io::Errno,
};

use crate::{
    BaseTree, Error, Place, Quota,
    backend::reserve::{self, RESERVED},
    copytree::{Content, copy_tree},
    fsio,
    lvm::{Making, Pool, Volume},
    program::Program,
};

const MKFS: Program = Program { name: "mkfs.ext4", package: "e2fsprogs" };

/// Making a file system writes a few megabytes; storage that is very busy needs
/// longer for that.
const MADE_WITHIN: Duration = Duration::from_secs(120);

/// The files of a root, in its file system: beside them is what takes the rest.
const FILES: &str = "files";

/// Takes the bytes that a limit forbids.
const SPACE: &str = "space";

/// Bytes of a root that nobody limits; a volume takes what is written.
const UNLIMITED: Bytes = Bytes::gib(16);

/// Source: ext4's layout: its blocks here, and the size of an entry of its
/// inode table.
const BLOCK: u64 = 4096;
const INODE: u64 = 256;

const RESTRICTIONS: Restrictions = Restrictions { read_only: false, nosuid: false, nodev: true, noexec: false };

/// The name of the base volume that roots with this quota on `base` stand on. It
/// says what is in it, so that all stores of a host share it.
pub(super) fn base_name(base: &BaseTree, quota: Quota) -> String {
    let number = |limit: Option<u64>| limit.map_or("any".to_owned(), |limit| limit.to_string());
    let digest = base.digest().hex();
    let digest = digest.get(..32).unwrap_or(&digest);
    format!("qvd.tree.{digest}.{}.{}", number(quota.bytes.map(Bytes::get)), number(quota.inodes))
}

/// Makes the base volume `to`.
pub(super) fn make_base(place: &Place, pool: &Pool, base: &BaseTree, quota: Quota, to: &Volume) -> Result<(), Error> {
    let from = base.open()?;
    let needs = Needs::of(&from, base.path())?;
    let making = Making::begin(place, pool, "new")?;
    let made = || {
        let room = quota.bytes.unwrap_or(UNLIMITED).get();
        let files = quota.inodes.unwrap_or(room / (4 * BLOCK));
        pool.create(&making.volume, needs.volume_bytes(room, files))?;
        make_file_system(&making.volume, needs.inodes.saturating_add(files).saturating_add(32))?;
        let whole = mount_whole(&making.volume, false)?;
        fill(base.path(), from.as_fd(), &whole, quota)?;
        drop(whole);
        Pool::name_base(&making.volume, to)
    };
    match made() {
        Ok(true) => std::fs::remove_dir_all(&making.dir).map_err(Error::io("make base", &making.dir)),
        other => {
            making.give_up(place);
            other.map(drop)
        }
    }
}

/// What the files of an image take.
struct Needs {
    bytes: u64,
    inodes: u64,
}

impl Needs {
    fn of(tree: &OwnedFd, what: &Path) -> Result<Self, Error> {
        use std::os::fd::AsRawFd;
        let mut needs = Self { bytes: 0, inodes: 0 };
        // What is mounted is only known by descriptor; the link is to be followed.
        for entry in walkdir::WalkDir::new(format!("/proc/self/fd/{}/.", tree.as_raw_fd())) {
            let about = entry.and_then(|entry| entry.metadata()).map_err(|error| {
                let error = error.into_io_error().unwrap_or_else(|| io::Error::other("directories in a circle"));
                Error::io("read", what)(error)
            })?;
            needs.inodes += 1;
            // Attributes that do not fit beside the inode take another block.
            needs.bytes += about.size().next_multiple_of(BLOCK) + BLOCK / 4;
        }
        Ok(needs)
    }

    /// How large a volume has to be for them, for `room` bytes and `files` more,
    /// and for what the file system needs itself. What is too much is taken away
    /// again, and costs nothing in a thin pool.
    const fn volume_bytes(&self, room: u64, files: u64) -> u64 {
        let content = self.bytes + self.bytes / 16 + room;
        let tables = (self.inodes + files) * INODE * 2;
        let all = content + content / 32 + tables + (24 << 20);
        all.next_multiple_of(1 << 20)
    }
}

fn make_file_system(volume: &Volume, inodes: u64) -> Result<(), Error> {
    let (inodes, block, inode) = (inodes.to_string(), BLOCK.to_string(), INODE.to_string());
    let device = volume.device();
    // Nothing is kept back for growing or for root, and nothing written that an
    // empty volume says as well. What cannot be written stops the file system.
    let args = ["-q", "-F", "-m", "0", "-O", "^resize_inode", "-e", "remount-ro", "-J", "size=4"];
    let more = ["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", "-b", &block, "-I", &inode, "-N", &inodes];
    let args = args.iter().chain(&more).map(std::ffi::OsStr::new).chain([device.as_os_str()]);
    MKFS.run("make a file system for roots", args, Stdio::null(), MADE_WITHIN).map(drop)
}

/// Copies the files of an image, and leaves no more room than `quota` says.
fn fill(what: &Path, from: BorrowedFd<'_>, own: &OwnedFd, quota: Quota) -> Result<(), Error> {
    let io = |error: Errno| Error::io("make base of", what)(io::Error::from(error));
    for (name, mode) in [(FILES, 0o755), (RESERVED, 0o700)] {
        mkdirat(own, name, Mode::RWXU).map_err(io)?;
        chmodat(own, name, Mode::from_raw_mode(mode), AtFlags::empty()).map_err(io)?;
    }
    let target = fsio::open_dir_below(own, FILES).map_err(Error::io("make base of", what))?;
    copy_tree(what, from, target.as_fd(), Content::Cheapest)?;
    let reserved = fsio::open_dir_below(own, RESERVED).map_err(Error::io("make base of", what))?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let space = openat(&reserved, SPACE, flags, Mode::RUSR).map_err(io)?;
    if let Some(inodes) = quota.inodes {
        reserve::inodes(own, inodes, what)?;
    }
    if let Some(bytes) = quota.bytes {
        rustix::fs::syncfs(&target).map_err(io)?;
        let about = rustix::fs::fstatvfs(own).map_err(io)?;
        let surplus = (about.f_bavail * about.f_frsize).saturating_sub(bytes.get());
        if surplus > 0 {
            // Without being written: the pool gives nothing for it.
            rustix::fs::fallocate(&space, FallocateFlags::empty(), 0, surplus).map_err(io)?;
        }
    }
    rustix::fs::syncfs(&target).map_err(io)
}

/// Mounts the files of a root, and nothing that is beside them.
pub(super) fn mount(
    place: &Place,
    volume: &Volume,
    idmap: Option<BorrowedFd<'_>>,
    volatile: bool,
) -> Result<OwnedFd, Error> {
    let whole = mount_whole(volume, volatile)?;
    let failed = |error: io::Error| match Errno::from_io_error(&error) {
        Some(Errno::PERM) => lacks(Missing::Privilege("mount file systems".to_owned())),
        Some(Errno::INVAL) if idmap.is_some() => lacks(Missing::Filesystem("id-mapped mounts".to_owned())),
        _ => Error::io("mount the files of", volume.device())(error),
    };
    let part = |whole: &OwnedFd| mount::clone_dir(fsio::open_dir_below(whole, FILES)?.as_fd());
    let files = match part(&whole) {
        // Linux before 6.15 clones nothing that is in no namespace.
        Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => mount::in_private_namespace(|| {
            let at = mount::open_dir_path(place.dir())?;
            mount::attach(whole.as_fd(), at.as_fd())?;
            part(&whole)
        })
        .flatten(),
        done => done,
    };
    let files = files.map_err(failed)?;
    mount::restrict(files.as_fd(), RESTRICTIONS, idmap).map_err(failed)?;
    Ok(files)
}

fn mount_whole(volume: &Volume, volatile: bool) -> Result<OwnedFd, Error> {
    let mounted = || {
        let context = FsContext::open("ext4")?;
        context.set("source", &volume.device().to_string_lossy())?;
        // What is deleted goes back to the pool; and what was never written,
        // such as tables, takes nothing of it.
        context.set_flag("discard")?;
        context.set_flag("noinit_itable")?;
        if volatile {
            context.set_flag("nobarrier")?;
        }
        context.mount(RESTRICTIONS)
    };
    mounted().map_err(|source: MountError| match Errno::from_io_error(source.io()) {
        Some(Errno::NODEV) => lacks(Missing::Kernel("the file system ext4".to_owned())),
        Some(Errno::PERM) => lacks(Missing::Privilege("mount file systems".to_owned())),
        _ => Error::Mount { what: format!("volume {}", volume.path()), source },
    })
}

const fn lacks(missing: Missing) -> Error {
    Error::Unsupported { op: "mount volumes", missing }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_base_says_what_is_in_it() {
        let base = BaseTree::new(format!("sha256:{}", "7".repeat(64)).parse().unwrap(), "/nowhere");
        let quota = Quota { bytes: Some(Bytes::mib(1)), inodes: None };
        assert_eq!(base_name(&base, quota), format!("qvd.tree.{}.1048576.any", "7".repeat(32)));
    }

    #[test]
    fn a_volume_has_room_for_all() {
        let needs = Needs { bytes: 1 << 30, inodes: 10_000 };
        let bytes = needs.volume_bytes(1 << 30, 5000);
        assert!(((2 << 30) + (24 << 20)..3 << 30).contains(&bytes), "{bytes}");
    }
}
