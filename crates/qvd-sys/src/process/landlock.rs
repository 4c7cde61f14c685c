//! Rules of Landlock for a container: nobody makes a device, changes what is mounted,
//! or reaches a process or a nameless socket of those who do not keep to them.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

/// The first version that lets files move between directories at all.
const LEAST: u32 = 2;

// Source: Linux `include/uapi/linux/landlock.h`.
const CREATE_RULESET_VERSION: libc::c_long = 1;
const ACCESS_FS_MAKE_CHAR: u64 = 1 << 6;
const ACCESS_FS_MAKE_BLOCK: u64 = 1 << 11;
const ACCESS_FS_REFER: u64 = 1 << 13;
const SCOPE_ABSTRACT_UNIX_SOCKET: u64 = 1;
const SCOPE_SIGNAL: u64 = 2;
const RULE_PATH_BENEATH: libc::c_long = 1;

/// Rules that a process can keep to, by [`Op::Landlock`](super::Op::Landlock).
#[derive(Debug)]
pub struct LandlockRules(OwnedFd);

impl LandlockRules {
    /// The version of Landlock that this kernel has; `None` if it has none, it is
    /// switched off, or it is so old that it would keep programs from moving files.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn version() -> io::Result<Option<u32>> {
        // SAFETY: all numbers; asked for its version, the kernel reads nothing.
        let version = unsafe {
            libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0, CREATE_RULESET_VERSION)
        };
        if version < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::ENOSYS | libc::EOPNOTSUPP) => Ok(None),
                _ => Err(error),
            };
        }
        Ok(u32::try_from(version).ok().filter(|version| *version >= LEAST))
    }

    /// Rules for processes whose root directory is `root`, on a kernel with
    /// [`version`](Self::version).
    ///
    /// # Errors
    /// The kernel refuses, or there are no descriptors left.
    pub fn new(version: u32, root: BorrowedFd<'_>) -> io::Result<Self> {
        // To move a file to another directory is denied unless it is named, and
        // allowed, everywhere.
        let access = ACCESS_FS_MAKE_CHAR | ACCESS_FS_MAKE_BLOCK | ACCESS_FS_REFER;
        let attributes = [access, 0, SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL];
        // Since version 6 the kernel knows the last one.
        let size = if version >= 6 { size_of_val(&attributes) } else { size_of::<u64>() };
        // SAFETY: the kernel reads as much as the stated size.
        let rules = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, attributes.as_ptr(), size, 0) };
        let rules = RawFd::try_from(rules).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the kernel has just opened it for us, close-on-exec, and nobody else knows it.
        let rules = unsafe { OwnedFd::from_raw_fd(rules) };
        // `struct landlock_path_beneath_attr`, which is packed.
        let rule: Vec<u8> = [&ACCESS_FS_REFER.to_ne_bytes()[..], &root.as_raw_fd().to_ne_bytes()].concat();
        // SAFETY: the rule is as long as the kernel reads, and outlives the call.
        let added = unsafe {
            libc::syscall(libc::SYS_landlock_add_rule, rules.as_raw_fd(), RULE_PATH_BENEATH, rule.as_ptr(), 0)
        };
        if added < 0 { Err(io::Error::last_os_error()) } else { Ok(Self(rules)) }
    }
}

impl From<LandlockRules> for OwnedFd {
    fn from(rules: LandlockRules) -> Self {
        rules.0
    }
}

impl AsFd for LandlockRules {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
