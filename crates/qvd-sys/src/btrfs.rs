//! The parts of btrfs that only its ioctls offer.
//!
//! Numbers and layouts come from Linux `include/uapi/linux/btrfs.h` and
//! `btrfs_tree.h`; the tests compare the sizes with what the kernel encodes
//! in the request numbers.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use rustix::{
    fs::fstatfs,
    ioctl::{self, Getter, Setter, Updater, opcode},
};

/// `BTRFS_IOCTL_MAGIC`.
const GROUP: u8 = 0x94;
/// `BTRFS_FIRST_FREE_OBJECTID`: inode number of the root of every subvolume.
pub const SUBVOLUME_INODE: u64 = 256;
/// `BTRFS_SUPER_MAGIC` of `include/uapi/linux/magic.h`.
const SUPER_MAGIC: rustix::fs::FsWord = 0x9123_683E;
/// Longest name, in bytes (`BTRFS_SUBVOL_NAME_MAX`, less the NUL).
const NAME_MAX: usize = 4039;

const SUBVOL_RDONLY: u64 = 1 << 1;
const SUBVOL_SPEC_BY_ID: u64 = 1 << 4;

/// `struct btrfs_ioctl_vol_args_v2`: for what makes and removes subvolumes.
#[repr(C)]
#[derive(Clone, Copy)]
struct VolumeArgs {
    fd: i64,
    transid: u64,
    flags: u64,
    unused: [u64; 4],
    /// The name, or a little-endian subvolume id with `SUBVOL_SPEC_BY_ID`.
    name: [u8; NAME_MAX + 1],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct QuotaControl {
    cmd: u64,
    status: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct QgroupCreate {
    create: u64,
    qgroup: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct QgroupAssign {
    assign: u64,
    member: u64,
    parent: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct QgroupLimit {
    qgroup: u64,
    flags: u64,
    max_referenced: u64,
    max_exclusive: u64,
    reserved: [u64; 2],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SendArgs {
    fd: i64,
    clone_sources_count: u64,
    clone_sources: *const u64,
    parent_root: u64,
    flags: u64,
    version: u32,
    reserved: [u8; 28],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct InodeLookup {
    tree: u64,
    inode: u64,
    name: [u8; 4080],
}

/// `struct btrfs_ioctl_search_args`: a key, then room for what is found.
#[repr(C)]
#[derive(Clone, Copy)]
struct Search {
    tree: u64,
    min_object: u64,
    max_object: u64,
    min_offset: u64,
    max_offset: u64,
    min_transid: u64,
    max_transid: u64,
    min_type: u32,
    max_type: u32,
    items: u32,
    unused: u32,
    unused_words: [u64; 4],
    found: [u8; 4096 - 104],
}

const SUBVOL_CREATE: ioctl::Opcode = opcode::write::<VolumeArgs>(GROUP, 24);
const SNAP_CREATE: ioctl::Opcode = opcode::write::<VolumeArgs>(GROUP, 23);
const SNAP_DESTROY: ioctl::Opcode = opcode::write::<VolumeArgs>(GROUP, 63);
const SUBVOL_GETFLAGS: ioctl::Opcode = opcode::read::<u64>(GROUP, 25);
const SUBVOL_SETFLAGS: ioctl::Opcode = opcode::write::<u64>(GROUP, 26);
const QUOTA_CTL: ioctl::Opcode = opcode::read_write::<QuotaControl>(GROUP, 40);
const QGROUP_ASSIGN: ioctl::Opcode = opcode::write::<QgroupAssign>(GROUP, 41);
const QGROUP_CREATE: ioctl::Opcode = opcode::write::<QgroupCreate>(GROUP, 42);
const QGROUP_LIMIT: ioctl::Opcode = opcode::read::<QgroupLimit>(GROUP, 43);
const SEND: ioctl::Opcode = opcode::write::<SendArgs>(GROUP, 38);
const INO_LOOKUP: ioctl::Opcode = opcode::read_write::<InodeLookup>(GROUP, 18);
const TREE_SEARCH: ioctl::Opcode = opcode::read_write::<Search>(GROUP, 17);

/// Whether `file` is on a btrfs.
///
/// # Errors
/// The file system cannot be asked.
pub fn is_btrfs(file: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(fstatfs(file)?.f_type == SUPER_MAGIC)
}

fn volume_args(fd: i64, flags: u64, name: &[u8]) -> io::Result<VolumeArgs> {
    let mut args = VolumeArgs { fd, transid: 0, flags, unused: [0; 4], name: [0; NAME_MAX + 1] };
    let room = args.name.get_mut(..name.len()).filter(|room| room.len() <= NAME_MAX);
    room.ok_or(io::ErrorKind::InvalidFilename)?.copy_from_slice(name);
    Ok(args)
}

/// Makes an empty subvolume `name` in the directory `parent`.
///
/// # Errors
/// The kernel refuses: `ENOTTY` where it is not a btrfs.
pub fn create_subvolume(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let args = volume_args(0, 0, name.to_bytes())?;
    // SAFETY: the request reads a `VolumeArgs`, which outlives the call.
    Ok(unsafe { ioctl::ioctl(parent, Setter::<SUBVOL_CREATE, _>::new(args)) }?)
}

/// Makes a snapshot of the subvolume `of` as `name` in the directory `parent`.
///
/// # Errors
/// The kernel refuses: `EXDEV` when they are on different file systems.
pub fn snapshot(of: BorrowedFd<'_>, parent: BorrowedFd<'_>, name: &CStr, read_only: bool) -> io::Result<()> {
    let flags = if read_only { SUBVOL_RDONLY } else { 0 };
    let args = volume_args(of.as_raw_fd().into(), flags, name.to_bytes())?;
    // SAFETY: the request reads a `VolumeArgs`, which outlives the call.
    Ok(unsafe { ioctl::ioctl(parent, Setter::<SNAP_CREATE, _>::new(args)) }?)
}

/// Removes the subvolume `name` of the directory `parent`. The kernel frees its
/// space later.
///
/// # Errors
/// `ENOTEMPTY` while other subvolumes are in it, `EPERM` while it is being sent.
pub fn delete_subvolume(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let args = volume_args(0, 0, name.to_bytes())?;
    // SAFETY: the request reads a `VolumeArgs`, which outlives the call.
    Ok(unsafe { ioctl::ioctl(parent, Setter::<SNAP_DESTROY, _>::new(args)) }?)
}

/// As [`delete_subvolume`], by number, wherever it is on the file system of `any`.
///
/// # Errors
/// As [`delete_subvolume`]; `ENOENT` when there is none.
pub fn delete_subvolume_by_id(any: BorrowedFd<'_>, id: u64) -> io::Result<()> {
    let args = volume_args(0, SUBVOL_SPEC_BY_ID, &id.to_ne_bytes())?;
    // SAFETY: the request reads a `VolumeArgs`, which outlives the call.
    Ok(unsafe { ioctl::ioctl(any, Setter::<SNAP_DESTROY, _>::new(args)) }?)
}

/// Forbids writing to a subvolume, or allows it.
///
/// # Errors
/// `EPERM` while it is being sent; `EINVAL` when it is no subvolume.
pub fn set_read_only(subvolume: BorrowedFd<'_>, read_only: bool) -> io::Result<()> {
    // SAFETY: the request writes a `u64`.
    let before = unsafe { ioctl::ioctl(subvolume, Getter::<SUBVOL_GETFLAGS, u64>::new()) }?;
    let after = if read_only { before | SUBVOL_RDONLY } else { before & !SUBVOL_RDONLY };
    // SAFETY: the request reads a `u64`.
    Ok(unsafe { ioctl::ioctl(subvolume, Setter::<SUBVOL_SETFLAGS, _>::new(after)) }?)
}

/// Whether writing to a subvolume is forbidden.
///
/// # Errors
/// `EINVAL` when it is no subvolume, `ENOTTY` when it is not on a btrfs.
pub fn is_read_only(subvolume: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: the request writes a `u64`.
    let flags = unsafe { ioctl::ioctl(subvolume, Getter::<SUBVOL_GETFLAGS, u64>::new()) }?;
    Ok(flags & SUBVOL_RDONLY != 0)
}

/// Number of the subvolume that holds `file`. Numbers are not used twice.
///
/// # Errors
/// `ENOTTY` where it is not a btrfs.
pub fn subvolume_id(file: BorrowedFd<'_>) -> io::Result<u64> {
    let mut args = InodeLookup { tree: 0, inode: SUBVOLUME_INODE, name: [0; 4080] };
    // SAFETY: the request reads and writes an `InodeLookup`, which outlives the call.
    unsafe { ioctl::ioctl(file, Updater::<INO_LOOKUP, _>::new(&mut args)) }?;
    Ok(args.tree)
}

/// Numbers of the subvolumes directly in the subvolume `parent`.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`.
pub fn subvolumes_in(any: BorrowedFd<'_>, parent: u64) -> io::Result<Vec<u64>> {
    // BTRFS_ROOT_TREE_OBJECTID, BTRFS_ROOT_REF_KEY: parent, child.
    search(any, 1, parent, 156)
}

/// Whether there is a subvolume with this number.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`.
pub fn subvolume_exists(any: BorrowedFd<'_>, id: u64) -> io::Result<bool> {
    // BTRFS_ROOT_ITEM_KEY. A deleted one stays until its space is freed.
    Ok(!search(any, 1, id, 132)?.is_empty())
}

/// Numbers of all quota groups; none where quotas are off.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`.
pub fn qgroups(any: BorrowedFd<'_>) -> io::Result<Vec<u64>> {
    // BTRFS_QUOTA_TREE_OBJECTID, BTRFS_QGROUP_INFO_KEY: zero, group.
    match search(any, 8, 0, 242) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        found => found,
    }
}

/// Offsets of all keys of one object and type in a tree.
fn search(any: BorrowedFd<'_>, tree: u64, object: u64, kind: u32) -> io::Result<Vec<u64>> {
    /// `struct btrfs_ioctl_search_header`: transid, object, offset, type, length.
    const HEADER: usize = 32;
    let mut offsets = Vec::new();
    let mut next = 0;
    loop {
        let mut args = Search {
            tree,
            min_object: object,
            max_object: object,
            min_offset: next,
            max_offset: u64::MAX,
            min_transid: 0,
            max_transid: u64::MAX,
            min_type: kind,
            max_type: kind,
            items: u32::MAX,
            unused: 0,
            unused_words: [0; 4],
            found: [0; 4096 - 104],
        };
        // SAFETY: the request reads and writes a `Search`, which outlives the call.
        unsafe { ioctl::ioctl(any, Updater::<TREE_SEARCH, _>::new(&mut args)) }?;
        let mut rest: &[u8] = &args.found;
        for _ in 0..args.items {
            let (Some(offset), Some(len)) = (rest.get(16..24), rest.get(28..HEADER)) else { break };
            let offset = u64::from_ne_bytes(offset.try_into().unwrap_or_default());
            let len = u32::from_ne_bytes(len.try_into().unwrap_or_default()) as usize;
            offsets.push(offset);
            rest = rest.get(HEADER + len..).unwrap_or_default();
        }
        match offsets.last() {
            Some(&last) if args.items > 0 && last < u64::MAX => next = last + 1,
            _ => return Ok(offsets),
        }
    }
}

/// Switches simple quotas on: space is charged to who wrote it first, without
/// the cost of full accounting. The file system then needs Linux 6.7.
///
/// # Errors
/// `EINVAL` before Linux 6.7. That they are on already is no error.
pub fn enable_simple_quota(any: BorrowedFd<'_>) -> io::Result<()> {
    // BTRFS_QUOTA_CTL_ENABLE_SIMPLE_QUOTA
    let mut args = QuotaControl { cmd: 4, status: 0 };
    // SAFETY: the request reads and writes a `QuotaControl`, which outlives the call.
    match unsafe { ioctl::ioctl(any, Updater::<QUOTA_CTL, _>::new(&mut args)) } {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Makes an empty quota group.
///
/// # Errors
/// `ENOTCONN` where quotas are off, `EEXIST`.
pub fn create_qgroup(any: BorrowedFd<'_>, qgroup: u64) -> io::Result<()> {
    // SAFETY: the request reads a `QgroupCreate`, which outlives the call.
    Ok(unsafe { ioctl::ioctl(any, Setter::<QGROUP_CREATE, _>::new(QgroupCreate { create: 1, qgroup })) }?)
}

/// Removes a quota group.
///
/// # Errors
/// `EBUSY` while it has members or charges, `ENOENT`.
pub fn delete_qgroup(any: BorrowedFd<'_>, qgroup: u64) -> io::Result<()> {
    // SAFETY: the request reads a `QgroupCreate`, which outlives the call.
    Ok(unsafe { ioctl::ioctl(any, Setter::<QGROUP_CREATE, _>::new(QgroupCreate { create: 0, qgroup })) }?)
}

/// Puts the group `member` into the group `parent`, of a higher level.
///
/// # Errors
/// `ENOENT`, `EEXIST` when it is there already.
pub fn assign_qgroup(any: BorrowedFd<'_>, member: u64, parent: u64) -> io::Result<()> {
    // SAFETY: the request reads a `QgroupAssign`, which outlives the call.
    Ok(unsafe { ioctl::ioctl(any, Setter::<QGROUP_ASSIGN, _>::new(QgroupAssign { assign: 1, member, parent })) }?)
}

/// Limits what the members of a quota group hold together, in bytes.
///
/// # Errors
/// `ENOTCONN` where quotas are off, `ENOENT`.
pub fn limit_qgroup(any: BorrowedFd<'_>, qgroup: u64, max_bytes: u64) -> io::Result<()> {
    // BTRFS_QGROUP_LIMIT_MAX_RFER
    let args = QgroupLimit { qgroup, flags: 1, max_referenced: max_bytes, max_exclusive: 0, reserved: [0; 2] };
    // SAFETY: the request reads a `QgroupLimit` (its number says otherwise), which outlives the call.
    Ok(unsafe { ioctl::ioctl(any, Setter::<QGROUP_LIMIT, _>::new(args)) }?)
}

/// Writes the subvolume `of`, which must be read-only, to `out` as a stream that
/// `btrfs receive` takes. Blocks until everything is written.
///
/// # Errors
/// `EPERM` when it is writable; what writing to `out` gives.
pub fn send(of: BorrowedFd<'_>, out: BorrowedFd<'_>) -> io::Result<()> {
    let args = SendArgs {
        fd: out.as_raw_fd().into(),
        clone_sources_count: 0,
        clone_sources: std::ptr::null(),
        parent_root: 0,
        flags: 0,
        version: 0,
        reserved: [0; 28],
    };
    // SAFETY: the request reads a `SendArgs`, which outlives the call, and no
    // list of clone sources, whose count is zero.
    Ok(unsafe { ioctl::ioctl(of, Setter::<SEND, _>::new(args)) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_kernel() {
        // Source: Linux `include/uapi/linux/btrfs.h`; the size is in bits 16 to 29.
        assert_eq!(size_of::<VolumeArgs>(), 4096);
        assert_eq!(size_of::<InodeLookup>(), 4096);
        assert_eq!(size_of::<Search>(), 4096);
        assert_eq!(size_of::<SendArgs>(), 72);
        assert_eq!(size_of::<QgroupLimit>(), 48);
        assert_eq!(size_of::<QgroupAssign>(), 24);
    }

    #[test]
    fn a_name_that_does_not_fit_is_refused_not_cut() {
        assert!(volume_args(0, 0, &[b'x'; NAME_MAX + 1]).is_err());
        assert!(volume_args(0, 0, &[b'x'; NAME_MAX]).is_ok());
    }
}
