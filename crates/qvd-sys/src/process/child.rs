//! The child's side: walks a plan with raw system calls. No allocation, no
//! lock, no panic may be added here.

use std::{
    cell::Cell,
    ffi::{CStr, CString, c_long},
    os::fd::RawFd,
    sync::atomic::{AtomicU32, Ordering},
};

use super::plan::{BpfInstruction, Op, Place, PlanFd, SLOTS};

/// What a record to the parent begins with instead of a step's number when
/// there was no failure.
pub(super) const READY: u32 = u32::MAX;

/// Exit status after a failed step. Nobody sees it but a debugger: the parent
/// gets the record.
const FAILED: c_long = 127;

/// Source: Linux `include/uapi/linux/prctl.h`.
const PR_SET_MEMORY_MERGE: c_long = 67;

/// Makes a raw system call of a child, which counts it; the error is its number.
macro_rules! call {
    ($child:ident, $name:ident $(, $argument:expr)* $(,)?) => {{
        $child.calls.set($child.calls.get().wrapping_add(1));
        // SAFETY: every pointer among the arguments leads into the plan, which
        // nobody changes any more, or to a local that outlives the call.
        let result = unsafe { libc::syscall(libc::$name $(, $argument)*) };
        if result < 0 { Err(errno()) } else { Ok(result) }
    }};
}

fn errno() -> i32 {
    // SAFETY: the C library's per-thread errno; always readable. Of a child that shares
    // memory it is that of the thread that made it, which sleeps meanwhile.
    unsafe { *libc::__errno_location() }
}

/// Gaps between the descriptors that the child keeps, ends included.
pub(super) type Gaps = [(u32, u32)];

pub(super) struct Child<'a> {
    control: RawFd,
    slots: [RawFd; SLOTS],
    gaps: &'a Gaps,
    /// System calls made so far.
    calls: Cell<u32>,
}

impl<'a> Child<'a> {
    pub(super) const fn new(control: RawFd, gaps: &'a Gaps) -> Self {
        Self { control, slots: [-1; SLOTS], gaps, calls: Cell::new(0) }
    }

    /// Tells whoever waits on `word`, in memory that is shared, by giving it `value`.
    pub(super) fn wake(&self, word: &AtomicU32, value: u32) {
        word.store(value, Ordering::Release);
        let _woken = call!(self, SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, 1);
    }

    /// Executes the steps; returns only by ending the process.
    pub(super) fn run(mut self, steps: &[(String, Op)]) -> ! {
        // What else the parent has open is none of our business, and holding
        // it would keep sockets and pipes of others alive while we wait.
        for &(first, last) in self.gaps {
            if let Err(error) = call!(self, SYS_close_range, first, last, 0) {
                self.report(0, error);
            }
        }
        let mut index = 0_u32;
        for (_, op) in steps {
            if let Err(error) = self.step(op) {
                self.report(index, error);
            }
            index = index.wrapping_add(1);
        }
        // A plan that executes nothing has ended well.
        exit(0)
    }

    fn report(&self, step: u32, error: i32) -> ! {
        let _sent = self.send(step, error);
        exit(FAILED)
    }

    fn send(&self, step: u32, error: i32) -> Result<c_long, i32> {
        let record = [step, error.cast_unsigned()];
        let no_address = std::ptr::null::<u8>();
        call!(self, SYS_sendto, self.control, record.as_ptr(), size_of_val(&record), libc::MSG_NOSIGNAL, no_address, 0)
    }

    const fn fd(&self, fd: PlanFd) -> RawFd {
        match fd.0 {
            Place::Given(fd) => fd,
            Place::Slot(slot) => self.slots[slot],
        }
    }

    fn fill(&mut self, slot: PlanFd, fd: c_long) -> Result<(), i32> {
        let (Place::Slot(slot), Ok(fd)) = (slot.0, RawFd::try_from(fd)) else { return Err(libc::EINVAL) };
        let Some(place) = self.slots.get_mut(slot) else { return Err(libc::EINVAL) };
        // What was there stays open until the exec closes it with the others:
        // a call less for each of some thirty mounts.
        *place = fd;
        Ok(())
    }

    fn step(&mut self, op: &Op) -> Result<(), i32> {
        match op {
            Op::Wait => return self.wait(),
            // With the call that tells it.
            Op::Ready => self.send(READY, self.calls.get().wrapping_add(1).cast_signed())?,
            // Zero is the writer itself.
            Op::EnterGroup(tasks) => call!(self, SYS_write, self.fd(*tasks), c"0".as_ptr(), 1)?,
            Op::ClearGroups => call!(self, SYS_setgroups, 0, std::ptr::null::<libc::gid_t>())?,
            Op::SetGid(id) => call!(self, SYS_setresgid, *id, *id, *id)?,
            Op::SetUid(id) => call!(self, SYS_setresuid, *id, *id, *id)?,
            Op::KeepCapabilities => call!(self, SYS_prctl, libc::PR_SET_KEEPCAPS, 1, 0, 0, 0)?,
            Op::Capabilities(bits) => self.set_capabilities(*bits)?,
            Op::OfferMemory => call!(self, SYS_prctl, PR_SET_MEMORY_MERGE, 1, 0, 0, 0)?,
            Op::NewSession => call!(self, SYS_setsid)?,
            Op::NewKeyring => {
                match call!(self, SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<u8>()) {
                    // Without keyrings in the kernel there is none to leave.
                    Err(libc::ENOSYS) => 0,
                    other => other?,
                }
            }
            Op::Unshare(namespaces) => call!(self, SYS_unshare, namespaces.0)?,
            Op::LoopbackUp => self.loopback_up()?,
            Op::SetHostname(name) => call!(self, SYS_sethostname, name.as_ptr(), name.len())?,
            Op::Umask(mask) => call!(self, SYS_umask, *mask)?,
            Op::UnblockSignals => self.block_signals(0)?,
            Op::BlockSignals(mask) => self.block_signals(*mask)?,
            Op::DefaultSignal(signal) => {
                // The kernel's sigaction: handler, flags, restorer, mask; all
                // zero is SIG_DFL.
                let default = [0_u64; 4];
                call!(self, SYS_rt_sigaction, *signal, default.as_ptr(), std::ptr::null::<u64>(), size_of::<u64>())?
            }
            Op::MakeDir { dir, path, mode } => match call!(self, SYS_mkdirat, self.fd(*dir), path.as_ptr(), *mode) {
                Err(libc::EEXIST) => 0,
                other => other?,
            },
            Op::OpenDir { dir, path, into } => {
                let fd = self.open_dir(self.fd(*dir), path)?;
                return self.fill(*into, fd);
            }
            Op::OpenDevice { dir, path, into } => {
                let flags = libc::O_RDWR | libc::O_NOFOLLOW | libc::O_CLOEXEC;
                let fd = call!(self, SYS_openat, self.fd(*dir), path.as_ptr(), flags)?;
                return self.fill(*into, fd);
            }
            Op::MakeFs { kind, options, attributes, into } => {
                let fd = self.make_fs(kind, options, *attributes)?;
                return self.fill(*into, fd);
            }
            Op::MakeFsAt { kind, options, attributes, dir, name } => {
                call!(self, SYS_fchdir, self.fd(*dir))?;
                let (kind, flags) = (kind.as_ptr(), libc::c_ulong::from(*attributes));
                call!(self, SYS_mount, kind, name.as_ptr(), kind, flags, options.as_ptr())?
            }
            Op::CloneTree { dir, path, attributes, into } => {
                let fd = self.clone_tree(self.fd(*dir), path, *attributes)?;
                return self.fill(*into, fd);
            }
            Op::Attach { mount, dir, path } => self.attach(self.fd(*mount), self.fd(*dir), path)?,
            Op::PivotRoot(root) => self.pivot_root(self.fd(*root))?,
            Op::DropBounding(capabilities) => {
                for &capability in capabilities {
                    call!(self, SYS_prctl, libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0)?;
                }
                0
            }
            Op::NoNewPrivileges => call!(self, SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)?,
            Op::SmallPages => call!(self, SYS_prctl, libc::PR_SET_THP_DISABLE, 1, 0, 0, 0)?,
            Op::Seccomp(filter) => self.load(filter)?,
            Op::Landlock(rules) => call!(self, SYS_landlock_restrict_self, self.fd(*rules), 0)?,
            Op::TryLandlock => self.try_landlock()?,
            Op::Dup { from, to } => call!(self, SYS_dup3, self.fd(*from), *to, 0)?,
            Op::CloseOnExecFrom(first) => call!(self, SYS_close_range, *first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC)?,
            Op::Exec { program, args } => {
                let empty = c"".as_ptr();
                call!(self, SYS_execveat, self.fd(*program), empty, args.argv(), args.envp(), libc::AT_EMPTY_PATH)?
            }
        };
        Ok(())
    }

    fn wait(&self) -> Result<(), i32> {
        let mut byte = 0_u8;
        loop {
            match call!(self, SYS_read, self.control, &raw mut byte, 1) {
                // The parent is gone or has thought better of it.
                Ok(0) => exit(0),
                Ok(_) => return Ok(()),
                Err(libc::EINTR) => {}
                Err(libc::ECONNRESET) => exit(0),
                Err(error) => return Err(error),
            }
        }
    }
}

fn exit(status: c_long) -> ! {
    loop {
        // SAFETY: ends the process without running anything of the parent's.
        unsafe { libc::syscall(libc::SYS_exit_group, status) };
    }
}

/// Steps of more than one call.
impl Child<'_> {
    fn open_dir(&self, dir: RawFd, path: &CStr) -> Result<c_long, i32> {
        // SAFETY: an all-zero open_how is a valid value of a plain C struct.
        let mut how: libc::open_how = unsafe { std::mem::zeroed() };
        how.flags = (libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC).cast_unsigned().into();
        how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_MAGICLINKS;
        call!(self, SYS_openat2, dir, path.as_ptr(), &raw const how, size_of::<libc::open_how>())
    }

    fn block_signals(&self, mask: u64) -> Result<c_long, i32> {
        let (new, old) = (&raw const mask, std::ptr::null::<u64>());
        call!(self, SYS_rt_sigprocmask, libc::SIG_SETMASK, new, old, size_of::<u64>())
    }

    fn loopback_up(&self) -> Result<c_long, i32> {
        let socket = call!(self, SYS_socket, libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0)?;
        // SAFETY: an all-zero ifreq is a valid value of a plain C struct.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (place, byte) in request.ifr_name.iter_mut().zip(b"lo") {
            *place = libc::c_char::from_ne_bytes([*byte]);
        }
        // The kernel keeps what belongs to the device, such as IFF_LOOPBACK. Both
        // flags are small: Linux `include/uapi/linux/if.h`.
        request.ifr_ifru.ifru_flags = 1 | 0x40;
        // The exec closes it with the others.
        call!(self, SYS_ioctl, socket, libc::SIOCSIFFLAGS, &raw const request)
    }

    fn set_capabilities(&self, bits: u64) -> Result<c_long, i32> {
        // Source: Linux `include/uapi/linux/capability.h`: the header with version
        // 3, then effective, permitted and inheritable, lower halves first.
        let header: [u32; 2] = [0x2008_0522, 0];
        let [a, b, c, d, e, f, g, h] = bits.to_le_bytes();
        let (low, high) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        let data = [low, low, low, high, high, high];
        call!(self, SYS_capset, header.as_ptr(), data.as_ptr())?;
        let mut left = bits;
        while left != 0 {
            let capability = libc::c_ulong::from(left.trailing_zeros());
            call!(self, SYS_prctl, libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, capability, 0, 0)?;
            left &= left - 1;
        }
        Ok(0)
    }

    fn make_fs(&self, kind: &CStr, options: &[(CString, CString)], attributes: u32) -> Result<c_long, i32> {
        let context = call!(self, SYS_fsopen, kind.as_ptr(), libc::FSOPEN_CLOEXEC)?;
        let none = std::ptr::null::<u8>();
        for (key, value) in options {
            if value.is_empty() {
                call!(self, SYS_fsconfig, context, libc::FSCONFIG_SET_FLAG, key.as_ptr(), none, 0)?;
            } else {
                call!(self, SYS_fsconfig, context, libc::FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr(), 0)?;
            }
        }
        call!(self, SYS_fsconfig, context, libc::FSCONFIG_CMD_CREATE, none, none, 0)?;
        call!(self, SYS_fsmount, context, libc::FSMOUNT_CLOEXEC, attributes)
    }

    fn clone_tree(&self, dir: RawFd, path: &CStr, attributes: u64) -> Result<c_long, i32> {
        let flags = libc::OPEN_TREE_CLONE | libc::O_CLOEXEC.cast_unsigned() | libc::AT_EMPTY_PATH.cast_unsigned();
        let tree = call!(self, SYS_open_tree, dir, path.as_ptr(), flags)?;
        if attributes != 0 {
            let attr = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
            let size = size_of::<libc::mount_attr>();
            call!(self, SYS_mount_setattr, tree, c"".as_ptr(), libc::AT_EMPTY_PATH, &raw const attr, size)?;
        }
        Ok(tree)
    }

    fn attach(&self, mount: RawFd, dir: RawFd, path: &CStr) -> Result<c_long, i32> {
        let mut flags = libc::MOVE_MOUNT_F_EMPTY_PATH;
        if path.is_empty() {
            flags |= libc::MOVE_MOUNT_T_EMPTY_PATH;
        }
        call!(self, SYS_move_mount, mount, c"".as_ptr(), dir, path.as_ptr(), flags)
    }

    fn pivot_root(&self, root: RawFd) -> Result<c_long, i32> {
        call!(self, SYS_fchdir, root)?;
        // pivot_root(".", ".") stacks the old root on the new one: no directory
        // for it is needed, and it is taken away at once. See pivot_root(2).
        call!(self, SYS_pivot_root, c".".as_ptr(), c".".as_ptr())?;
        // The working directory is the new root, as it was before.
        call!(self, SYS_umount2, c".".as_ptr(), libc::MNT_DETACH)
    }

    /// Asks for what a restriction forbids: a device, which nobody but root of the host
    /// could make anyway, but who is told so for another reason.
    fn try_landlock(&self) -> Result<c_long, i32> {
        // Source: Linux `include/uapi/linux/major.h`: the null device is 1:3.
        let null = (1 << 8) | 3;
        match call!(self, SYS_mknodat, libc::AT_FDCWD, c"/landlock".as_ptr(), libc::S_IFCHR | 0o600, null) {
            Err(libc::EACCES) => Ok(0),
            Ok(_) | Err(libc::EPERM) => Err(libc::EOPNOTSUPP),
            Err(error) => Err(error),
        }
    }

    fn load(&self, filter: &[BpfInstruction]) -> Result<c_long, i32> {
        let Ok(len) = u16::try_from(filter.len()) else { return Err(libc::EINVAL) };
        // The kernel's sock_fprog only reads, whatever its C type says.
        let program = libc::sock_fprog { len, filter: filter.as_ptr().cast_mut().cast() };
        call!(self, SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
    }
}
