//! A stream of bytes on a link, and the descriptor it ends at here.

use std::{collections::VecDeque, os::fd::OwnedFd};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FileType, OFlags},
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown},
};

/// Bytes that may be on the way or waiting in one stream.
pub(crate) const WINDOW: usize = 256 * 1024;

/// Bytes given back at once, so that a frame for it is worth it.
const GIVEN_BACK: usize = WINDOW / 4;

/// Bytes read at once, and so in one frame.
const PIECE: usize = 16 * 1024;

/// What a pipe takes without waiting once it can be written to.
///
/// Source: pipe(7), `PIPE_BUF` on Linux.
const PIPE_PIECE: usize = 4096;

/// Which ways bytes go, seen from the end that says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ways {
    /// From here to the other end.
    pub(crate) out: bool,
    /// From the other end to here.
    pub(crate) back: bool,
}

impl Ways {
    pub(crate) const fn to_byte(self) -> u8 {
        self.out as u8 | (self.back as u8) << 1
    }

    pub(crate) const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1..=3 => Some(Self { out: byte & 1 != 0, back: byte & 2 != 0 }),
            _ => None,
        }
    }

    /// What can be done with a descriptor.
    pub(crate) fn of(fd: &OwnedFd) -> Self {
        let mode = rustix::fs::fcntl_getfl(fd).map_or(OFlags::RDWR, |flags| flags & OFlags::RWMODE);
        Self { out: mode != OFlags::WRONLY, back: mode != OFlags::RDONLY }
    }
}

/// What reading came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Got {
    Bytes(Vec<u8>),
    Nothing,
    End,
}

/// A stream.
#[derive(Debug)]
pub(crate) struct Stream {
    fd: OwnedFd,
    socket: bool,
    /// Whether more may be read here.
    pub(crate) reads: bool,
    /// Whether more may be written here.
    pub(crate) writes: bool,
    /// How much the other end takes.
    credit: usize,
    waiting: VecDeque<u8>,
    no_more: bool,
    written: usize,
}

impl Stream {
    /// A stream whose bytes go to and come from `fd`.
    pub(crate) fn new(fd: OwnedFd, ways: Ways) -> Self {
        let socket = rustix::fs::fstat(&fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket);
        Self {
            fd,
            socket,
            reads: ways.out,
            writes: ways.back,
            credit: WINDOW,
            waiting: VecDeque::new(),
            no_more: false,
            written: 0,
        }
    }

    /// The two ends of a stream that the other end announced: ours, and the
    /// one for whoever the message is for.
    pub(crate) fn announced(ways: Ways) -> Result<(Self, OwnedFd), Errno> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        use rustix::pipe::{PipeFlags, pipe_with};
        // What goes out there comes in here.
        let (ours, theirs) = match ways {
            Ways { out: true, back: true } => {
                socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?
            }
            Ways { out: true, .. } => {
                let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
                (writer, reader)
            }
            Ways { .. } => pipe_with(PipeFlags::CLOEXEC)?,
        };
        Ok((Self::new(ours, Ways { out: ways.back, back: ways.out }), theirs))
    }

    pub(crate) const fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// What to wait for; empty for nothing.
    pub(crate) fn interest(&self, may_read: bool) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, may_read && self.reads && self.credit > 0);
        flags.set(PollFlags::OUT, self.writes && !self.waiting.is_empty());
        flags
    }

    pub(crate) const fn is_over(&self) -> bool {
        !self.reads && !self.writes
    }

    /// Whether all that came is written, and all that is there to be read is
    /// read.
    pub(crate) fn is_drained(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let more = || {
            let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
            poll(&mut fds, Some(&now)).is_ok() && fds.iter().any(|fd| fd.revents().contains(PollFlags::IN))
        };
        self.waiting.is_empty() && !(self.reads && more())
    }

    /// Reads what the other end would take. Only once waiting for it said
    /// that something is there.
    pub(crate) fn read(&mut self) -> Got {
        let mut bytes = [0; PIECE];
        let Some(room) = bytes.get_mut(..self.credit.min(PIECE)).filter(|room| !room.is_empty()) else {
            return Got::Nothing;
        };
        let got = if self.socket {
            rustix::net::recv(&self.fd, &mut *room, RecvFlags::DONTWAIT).map(|(got, _)| got)
        } else {
            rustix::io::read(&self.fd, &mut *room)
        };
        match got {
            Err(Errno::AGAIN | Errno::INTR) => Got::Nothing,
            // EIO: nobody has the terminal open any more.
            Ok(0) | Err(_) => {
                self.reads = false;
                Got::End
            }
            Ok(got) => {
                self.credit -= got;
                Got::Bytes(room.get(..got).unwrap_or_default().to_vec())
            }
        }
    }

    /// Takes bytes from the other end; `false` if it sent more than it may.
    #[must_use]
    pub(crate) fn take(&mut self, bytes: &[u8]) -> bool {
        if !self.writes {
            return true;
        }
        self.waiting.extend(bytes);
        self.waiting.len() + self.written <= WINDOW && !self.no_more
    }

    /// No more will come from the other end.
    pub(crate) fn end(&mut self) {
        self.no_more = true;
    }

    /// The other end takes so much more; `false` if that is absurd.
    #[must_use]
    pub(crate) fn give(&mut self, credit: usize) -> bool {
        self.credit = self.credit.saturating_add(credit);
        self.credit <= WINDOW
    }

    /// Writes what the descriptor takes. Says how much may be given back to
    /// the other end, and whether it need not send any more.
    pub(crate) fn write(&mut self) -> (Option<u32>, bool) {
        let mut broken = false;
        while self.writes && !self.waiting.is_empty() {
            let (piece, _) = self.waiting.as_slices();
            let sent = if self.socket {
                rustix::net::send(&self.fd, piece, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            } else {
                let piece = piece.get(..piece.len().min(PIPE_PIECE)).unwrap_or_default();
                if !self.is_writable() {
                    break;
                }
                rustix::io::write(&self.fd, piece)
            };
            match sent {
                Ok(sent) => {
                    drop(self.waiting.drain(..sent));
                    self.written += sent;
                }
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(_) => {
                    self.writes = false;
                    self.waiting.clear();
                    broken = true;
                }
            }
        }
        if self.writes && self.no_more && self.waiting.is_empty() {
            self.writes = false;
            if self.socket {
                // It may be gone already.
                let _done = rustix::net::shutdown(&self.fd, Shutdown::Write);
            }
        }
        let back = (self.written >= GIVEN_BACK || (self.written > 0 && self.waiting.is_empty()))
            .then(|| u32::try_from(std::mem::take(&mut self.written)).unwrap_or(0));
        (back, broken)
    }

    fn is_writable(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&self.fd, PollFlags::OUT)], Some(&now)).is_ok_and(|ready| ready > 0)
    }
}
