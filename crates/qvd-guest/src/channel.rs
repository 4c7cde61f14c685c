//! Frames with descriptors over a unix stream socket.

use std::{
    collections::VecDeque,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
};
use serde::{Serialize, de::DeserializeOwned};

/// Longest frame, in bytes without its length. Requests are a few hundred
/// bytes; an argument list may be longer.
pub const MAX_FRAME: usize = 64 * 1024;

/// Most descriptors with one frame: standard input, output and error.
pub const MAX_FDS: usize = 3;

/// Why a frame was not sent or received.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The socket failed.
    #[error("cannot {op} the desktop's init")]
    Io {
        /// What was tried.
        op: &'static str,
        /// Why it failed.
        source: Errno,
    },
    /// The peer closed the connection, perhaps in the middle of a frame.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer sent something that is no frame of this protocol.
    #[error("the peer sent a bad frame: {0}")]
    Bad(String),
    /// Nothing came within the time allowed.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

/// One end of a connection. Blocking, with a deadline on each call.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    buffer: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

impl Channel {
    /// Wraps a connected unix stream socket.
    #[must_use]
    pub const fn new(socket: OwnedFd) -> Self {
        Self { socket, buffer: Vec::new(), fds: VecDeque::new() }
    }

    /// Sends `message` and, with it, `fds`.
    ///
    /// # Errors
    /// The socket failed, or the message is longer than [`MAX_FRAME`].
    pub fn send<T: Serialize>(&mut self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let body = serde_json::to_vec(message).map_err(|e| ChannelError::Bad(e.to_string()))?;
        let length =
            u32::try_from(body.len()).ok().filter(|_| body.len() <= MAX_FRAME && fds.len() <= MAX_FDS).ok_or_else(
                || ChannelError::Bad(format!("{} bytes and {} descriptors are too much", body.len(), fds.len())),
            )?;
        let mut frame = length.to_le_bytes().to_vec();
        frame.extend_from_slice(&body);

        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(ChannelError::Bad("too many descriptors".to_owned()));
        }
        let mut sent = 0;
        while sent < frame.len() {
            match rustix::net::sendmsg(&self.socket, &[IoSlice::new(&frame[sent..])], &mut control, SendFlags::NOSIGNAL)
            {
                Ok(n) => sent += n,
                Err(Errno::INTR) => continue,
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ChannelError::Closed),
                Err(source) => return Err(ChannelError::Io { op: "write to", source }),
            }
            // The descriptors went with the first byte.
            control.clear();
        }
        Ok(())
    }

    /// Receives one message and the descriptors that came with it.
    ///
    /// # Errors
    /// The peer closed the connection, sent something else, or nothing came
    /// within `timeout`. After an error the connection is of no use.
    pub fn recv<T: DeserializeOwned>(&mut self, timeout: Duration) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(message) = self.next_frame()? {
                return Ok((message, self.fds.drain(..).collect()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let mut wait = [PollFd::new(&self.socket, PollFlags::IN)];
            let limit = Timespec::try_from(left).map_err(|_| ChannelError::Timeout(timeout))?;
            match rustix::event::poll(&mut wait, Some(&limit)) {
                Ok(0) => return Err(ChannelError::Timeout(timeout)),
                Ok(_) => drop(self.fill()?),
                Err(Errno::INTR) => {}
                Err(source) => return Err(ChannelError::Io { op: "wait for", source }),
            }
        }
    }

    /// Receives what is there without waiting: for an event loop that polled
    /// this channel's descriptor. `None` means that a whole frame is not there.
    ///
    /// # Errors
    /// As [`Channel::recv`], but never a timeout.
    pub fn try_recv<T: DeserializeOwned>(&mut self) -> Result<Option<(T, Vec<OwnedFd>)>, ChannelError> {
        loop {
            if let Some(message) = self.next_frame()? {
                return Ok(Some((message, self.fds.drain(..).collect())));
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    /// Length of the frame at the front of the buffer, once its head is there.
    fn frame_length(&self) -> Result<Option<usize>, ChannelError> {
        let Some(&head) = self.buffer.first_chunk::<4>() else { return Ok(None) };
        usize::try_from(u32::from_le_bytes(head))
            .ok()
            .filter(|&length| length <= MAX_FRAME)
            .map(Some)
            .ok_or_else(|| ChannelError::Bad(format!("a frame of {} bytes", u32::from_le_bytes(head))))
    }

    fn next_frame<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ChannelError> {
        let Some(length) = self.frame_length()? else { return Ok(None) };
        let Some(body) = self.buffer.get(4..4 + length) else { return Ok(None) };
        let message = serde_json::from_slice(body).map_err(|e| ChannelError::Bad(e.to_string()))?;
        self.buffer.drain(..4 + length);
        Ok(Some(message))
    }

    /// Reads once, without waiting; says whether something was there. Never
    /// reads beyond the frame that is due: the kernel hands over descriptors
    /// with whatever was read along with their first byte, and those of the
    /// next frame would be taken for this one's.
    fn fill(&mut self) -> Result<bool, ChannelError> {
        let due = self.frame_length()?.map_or(4, |length| 4 + length) - self.buffer.len();
        let mut bytes = [0; 4096];
        let end = due.min(bytes.len());
        let bytes = &mut bytes[..end];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let got = match rustix::net::recvmsg(&self.socket, &mut [IoSliceMut::new(bytes)], &mut control, flags) {
            Ok(got) => got,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(false),
            Err(Errno::CONNRESET) => return Err(ChannelError::Closed),
            Err(source) => return Err(ChannelError::Io { op: "read from", source }),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if self.fds.len() > MAX_FDS {
            return Err(ChannelError::Bad(format!("{} descriptors", self.fds.len())));
        }
        if got.bytes == 0 {
            return Err(ChannelError::Closed);
        }
        self.buffer.extend_from_slice(bytes.get(..got.bytes).unwrap_or_default());
        Ok(true)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream};

    use super::*;
    use crate::{Reply, Request};

    const SOON: Duration = Duration::from_secs(5);

    fn pair() -> (Channel, UnixStream) {
        let (a, b) = UnixStream::pair().unwrap();
        (Channel::new(a.into()), b)
    }

    #[test]
    fn descriptors_stay_with_their_message_when_several_wait() {
        let (mut here, there) = pair();
        let mut sender = Channel::new(there.into());
        let (give, _keep) = UnixStream::pair().unwrap();
        sender.send(&Reply::Progress("resume the session".to_owned()), &[]).unwrap();
        sender.send(&Reply::Display, &[give.as_fd()]).unwrap();
        sender.send(&Reply::Stopping, &[]).unwrap();
        let counts: Vec<_> = (0..3).map(|_| here.recv::<Reply>(SOON).unwrap().1.len()).collect();
        assert_eq!(counts, [0, 1, 0]);
    }

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (mut here, there) = pair();
        let mut there = Channel::new(there.into());
        let (keep, give) = UnixStream::pair().unwrap();
        here.send(&Request::Stop { grace_ms: 7 }, &[give.as_fd()]).unwrap();
        drop(give);
        let (request, mut fds) = there.recv::<Request>(SOON).unwrap();
        assert_eq!(request, Request::Stop { grace_ms: 7 });
        let mut other = UnixStream::from(fds.pop().unwrap());
        other.write_all(b"x").unwrap();
        assert_eq!(rustix::io::read(&keep, &mut [0; 8]).unwrap(), 1);
    }

    #[test]
    fn a_frame_cut_anywhere_is_closed_and_never_a_message() {
        let mut whole = Vec::new();
        let body = serde_json::to_vec(&Reply::Stopping).unwrap();
        whole.extend_from_slice(&u32::try_from(body.len()).unwrap().to_le_bytes());
        whole.extend_from_slice(&body);
        for cut in 0..whole.len() {
            let (mut here, mut there) = pair();
            there.write_all(&whole[..cut]).unwrap();
            drop(there);
            let error = here.recv::<Reply>(SOON).unwrap_err();
            assert!(matches!(error, ChannelError::Closed), "{cut}: {error}");
        }
    }

    #[test]
    fn a_huge_length_is_refused_before_anything_is_stored() {
        let (mut here, mut there) = pair();
        there.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(matches!(here.recv::<Reply>(SOON), Err(ChannelError::Bad(_))));
    }

    #[test]
    fn silence_is_a_timeout() {
        let (mut here, _there) = pair();
        let wait = Duration::from_millis(1);
        assert!(matches!(here.recv::<Reply>(wait), Err(ChannelError::Timeout(_))));
    }

    #[test]
    fn two_messages_in_one_segment_are_two() {
        let (mut here, there) = pair();
        let mut there = Channel::new(there.into());
        there.send(&Request::Watch, &[]).unwrap();
        there.send(&Request::Stats, &[]).unwrap();
        assert_eq!(here.recv::<Request>(SOON).unwrap().0, Request::Watch);
        assert_eq!(here.try_recv::<Request>().unwrap().unwrap().0, Request::Stats);
        assert!(here.try_recv::<Request>().unwrap().is_none());
    }
}
