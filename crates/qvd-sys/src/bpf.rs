//! Programs that the kernel runs on each packet of a link, for what no rule can tell.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// Commands. Source: Linux `include/uapi/linux/bpf.h`, `enum bpf_cmd`.
const LOAD: libc::c_int = 5;
const INFO_OF: libc::c_int = 15;

/// A classifier of packets. Source: as above, `BPF_PROG_TYPE_SCHED_CLS`.
const CLASSIFIER: u32 = 3;

/// `bpf_check_mtu`, and that it looks at the segments of what is still to be cut.
/// Source: as above, `___BPF_FUNC_MAPPER`, `BPF_MTU_CHK_SEGS`. Linux 5.12 has both.
const CHECK_MTU: i32 = 163;
const EACH_SEGMENT: i32 = 1;

/// What a classifier that acts directly says of a packet: go on with the next one, or
/// drop it. Source: Linux `include/uapi/linux/pkt_cls.h`, `TC_ACT_UNSPEC`, `TC_ACT_SHOT`.
const GO_ON: i32 = -1;
const DROP: i32 = 2;

/// The kernel offers what looks at an MTU to programs under its own licence alone.
/// Source: Linux `include/linux/license.h`, `license_is_gpl_compatible`.
const LICENCE: &std::ffi::CStr = c"Dual MIT/GPL";

/// One instruction. Source: Linux `include/uapi/linux/bpf.h`, `struct bpf_insn`.
#[repr(C)]
struct Instruction {
    code: u8,
    /// The register that is written, then the one that is read: four bits each, as a compiler
    /// of C lays them out.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn op(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    let registers = if cfg!(target_endian = "little") { from << 4 | to } else { to << 4 | from };
    Instruction { code, registers, offset, immediate }
}

/// Drops what is longer than the link that it comes in by, and so are segments that it
/// is to be cut into. The packet is in register 1 and the end of the stack in 10;
/// arguments stand in 1 to 5, and what is returned in 0.
static NO_GIANTS: [Instruction; 12] = [
    // The link of the packet, and no length but the packet's own.
    op(0xb7, 2, 0, 0, 0),
    op(0x62, 10, 0, -4, 0),
    op(0xbf, 3, 10, 0, 0),
    op(0x07, 3, 0, 0, -4),
    op(0xb7, 4, 0, 0, 0),
    op(0xb7, 5, 0, 0, EACH_SEGMENT),
    op(0x85, 0, 0, 0, CHECK_MTU),
    // Whatever else than zero it says, the packet does not fit.
    op(0xbf, 1, 0, 0, 0),
    op(0xb7, 0, 0, 0, GO_ON),
    op(0x15, 1, 0, 1, 0),
    op(0xb7, 0, 0, 0, DROP),
    op(0x95, 0, 0, 0, 0),
];

/// What a program is loaded from: the beginning of `union bpf_attr`, the rest of which is zero.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    licence: u64,
    log: [u32; 4],
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// What is asked about a program, and the beginning of the answer, `struct bpf_prog_info`.
#[repr(C)]
struct Ask {
    fd: u32,
    length: u32,
    answer: u64,
}

#[repr(C)]
#[derive(Default)]
struct Answer {
    kind: u32,
    number: u32,
}

/// A program that the kernel has checked and taken.
#[derive(Debug)]
pub struct Program {
    fd: OwnedFd,
    number: u32,
}

impl Program {
    /// Loads the classifier that drops what is longer than its link's MTU, for a direct action
    /// where packets come in. What a network card leaves to the host to cut passes if each
    /// segment fits.
    ///
    /// # Errors
    /// This process may not load programs, or the kernel is older than 5.12.
    pub fn no_giants() -> io::Result<Self> {
        let address = |pointer: *const u8| pointer.addr() as u64;
        let mut name = [0; 16];
        name.iter_mut().zip(b"qvd_no_giants").for_each(|(to, from)| *to = *from);
        let load = Load {
            kind: CLASSIFIER,
            count: u32::try_from(NO_GIANTS.len()).map_err(io::Error::other)?,
            instructions: address(NO_GIANTS.as_ptr().cast()),
            licence: address(LICENCE.as_ptr().cast()),
            log: [0; 4],
            kernel_version: 0,
            flags: 0,
            name,
        };
        // SAFETY: the request is the beginning of what the command takes, of the length that is
        // told, and both places that it points to outlive the call.
        let fd = unsafe { libc::syscall(libc::SYS_bpf, LOAD, &raw const load, size_of::<Load>()) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the kernel just made it, and nobody else knows of it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut answer = Answer::default();
        let ask = Ask {
            fd: u32::try_from(fd.as_raw_fd()).map_err(io::Error::other)?,
            length: u32::try_from(size_of::<Answer>()).map_err(io::Error::other)?,
            answer: (&raw mut answer).expose_provenance() as u64,
        };
        // SAFETY: as above; the kernel writes no more than the length that is told.
        match unsafe { libc::syscall(libc::SYS_bpf, INFO_OF, &raw const ask, size_of::<Ask>()) } {
            0 => Ok(Self { fd, number: answer.number }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// By which a link is given it.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.fd)
    }

    /// By which the kernel names it, as long as it is loaded.
    #[must_use]
    pub const fn number(&self) -> u32 {
        self.number
    }
}
