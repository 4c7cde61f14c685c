//! Frames of a link: several streams over the one line of bytes that leads
//! into a virtual machine.

use serde::{Serialize, de::DeserializeOwned};

use crate::MAX_FRAME;

/// Bytes before a frame's body: kind, three of nothing, stream, length.
pub(crate) const HEAD: usize = 12;

/// Longest body: a message and the numbers of its streams.
pub(crate) const MAX_BODY: usize = MAX_FRAME + 64;

/// So many zeros end whatever frame an earlier writer left unfinished, and
/// are nothing between frames.
pub(crate) const FLUSH: usize = HEAD + MAX_BODY;

/// Length of the random name of a connection.
pub(crate) const NONCE: usize = 16;

/// Why a link is of no use any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// It could not be used.
    #[error("cannot {op} the link to the guest")]
    Io {
        /// What was tried.
        op: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The machine is gone.
    #[error("the guest's end of the link is closed")]
    Closed,
    /// The other end does not keep to the protocol.
    #[error("the other end of the link broke the protocol: {0}")]
    Bad(&'static str),
    /// The guest said something that is no message.
    #[error("the guest sent no {expected}: {reason}")]
    Message {
        /// What was expected.
        expected: &'static str,
        /// Why it is not that.
        reason: String,
    },
    /// The guest did not get that far.
    #[error("the guest did not {step} within {limit:?}")]
    Timeout {
        /// What it was to do.
        step: &'static str,
        /// How long it could have taken.
        limit: std::time::Duration,
    },
    /// The guest cannot boot, in its words.
    #[error("the guest cannot boot: {0}")]
    Refused(String),
}

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The host is there; its body names this connection. Ends all streams.
    Hello = 1,
    /// The guest heard that, with the same body.
    Welcome,
    /// [`crate::BootConfig`].
    Boot,
    /// [`crate::Booted`].
    Booted,
    /// Text: why the guest cannot boot.
    Failed,
    /// The host opens a conversation.
    Open,
    /// A message of a conversation, with streams of bytes that come with it.
    Message,
    /// Bytes of a stream.
    Data,
    /// How many more bytes of a stream may come, a `u32`.
    Credit,
    /// No more bytes of a stream will come.
    End,
    /// No more bytes of a stream are wanted.
    Enough,
    /// A conversation is over.
    Close,
}

impl Kind {
    const ALL: [Self; 12] = [
        Self::Hello,
        Self::Welcome,
        Self::Boot,
        Self::Booted,
        Self::Failed,
        Self::Open,
        Self::Message,
        Self::Data,
        Self::Credit,
        Self::End,
        Self::Enough,
        Self::Close,
    ];
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    pub(crate) stream: u32,
    pub(crate) body: Vec<u8>,
}

impl Frame {
    pub(crate) const fn new(kind: Kind, stream: u32, body: Vec<u8>) -> Self {
        Self { kind, stream, body }
    }

    /// A frame with a message of JSON.
    pub(crate) fn json<T: Serialize>(kind: Kind, message: &T) -> Result<Self, LinkError> {
        let body = serde_json::to_vec(message).ok().filter(|body| body.len() <= MAX_BODY);
        Ok(Self::new(kind, 0, body.ok_or(LinkError::Bad("a message that is too long"))?))
    }

    /// The message in its body.
    pub(crate) fn parse<T: DeserializeOwned>(&self, expected: &'static str) -> Result<T, LinkError> {
        serde_json::from_slice(&self.body).map_err(|e| LinkError::Message { expected, reason: e.to_string() })
    }

    /// Its bytes, behind those that are there.
    pub(crate) fn write_to(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&[self.kind as u8, 0, 0, 0]);
        bytes.extend_from_slice(&self.stream.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(self.body.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend_from_slice(&self.body);
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + self.body.len());
        self.write_to(&mut bytes);
        bytes
    }
}

/// Takes frames out of bytes as they come.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    buffer: Vec<u8>,
}

impl Parser {
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// How many bytes are needed before there can be a frame: who reads no
    /// more leaves the rest to another reader.
    pub(crate) fn due(&self) -> Result<usize, LinkError> {
        let Some((_, length)) = self.head()? else { return Ok(HEAD.saturating_sub(self.buffer.len()).max(1)) };
        Ok((HEAD + length).saturating_sub(self.buffer.len()))
    }

    fn head(&self) -> Result<Option<(Kind, usize)>, LinkError> {
        let Some(head) = self.buffer.first_chunk::<HEAD>() else { return Ok(None) };
        let [kind, a, b, c, _, _, _, _, length @ ..] = *head;
        let known = Kind::ALL.into_iter().find(|&known| known as u8 == kind && [a, b, c] == [0; 3]);
        let kind = known.ok_or(LinkError::Bad("a frame of no known kind"))?;
        let length = usize::try_from(u32::from_le_bytes(length)).ok().filter(|&length| length <= MAX_BODY);
        Ok(Some((kind, length.ok_or(LinkError::Bad("a frame that is too long"))?)))
    }

    /// The next frame, if all of it is there.
    pub(crate) fn next(&mut self) -> Result<Option<Frame>, LinkError> {
        let zeros = self.buffer.iter().position(|&byte| byte != 0).unwrap_or(self.buffer.len());
        self.buffer.drain(..zeros);
        let Some((kind, length)) = self.head()? else { return Ok(None) };
        if self.buffer.len() < HEAD + length {
            return Ok(None);
        }
        let rest = self.buffer.split_off(HEAD + length);
        let whole = std::mem::replace(&mut self.buffer, rest);
        let (head, body) = whole.split_at(HEAD);
        let stream = head.get(4..8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes);
        Ok(Some(Frame::new(kind, stream, body.to_vec())))
    }
}

/// Takes bytes as they could come from a guest: for fuzzing. Says how many
/// frames were in them before something else was.
#[doc(hidden)]
#[must_use]
pub fn frames_of(bytes: &[u8]) -> usize {
    let mut parser = Parser::default();
    let mut frames = 0;
    for piece in bytes.chunks(7) {
        parser.feed(piece);
        while let Ok(Some(frame)) = parser.next() {
            frames += 1;
            drop(frame.parse::<crate::BootConfig>("configuration"));
            drop(frame.parse::<crate::Request>("request"));
            drop(frame.parse::<crate::Reply>("reply"));
        }
    }
    frames
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_whole_however_they_are_cut() {
        let frames = [
            Frame::new(Kind::Data, 7, b"bytes".to_vec()),
            Frame::new(Kind::End, u32::MAX, Vec::new()),
            Frame::new(Kind::Message, 2, vec![0; MAX_BODY]),
        ];
        let mut bytes = vec![0; 5];
        frames.iter().for_each(|frame| frame.write_to(&mut bytes));
        for step in [1, 3, 4096, bytes.len()] {
            let mut parser = Parser::default();
            let mut seen = Vec::new();
            for piece in bytes.chunks(step) {
                parser.feed(piece);
                seen.extend(parser.next().unwrap());
            }
            while let Some(frame) = parser.next().unwrap() {
                seen.push(frame);
            }
            assert_eq!(seen, frames, "{step}");
        }
    }

    #[test]
    fn zeros_end_a_frame_that_another_writer_left_unfinished() {
        let mut whole = Vec::new();
        Frame::new(Kind::Data, 1, vec![9; 100]).write_to(&mut whole);
        for cut in 0..whole.len() {
            let mut parser = Parser::default();
            parser.feed(&whole[..cut]);
            parser.feed(&vec![0; FLUSH]);
            let hello = Frame::new(Kind::Hello, 0, vec![1; NONCE]);
            parser.feed(&hello.bytes());
            let mut last = None;
            while let Some(frame) = parser.next().unwrap() {
                last = Some(frame);
            }
            assert_eq!(last.unwrap(), hello, "{cut}");
        }
    }

    #[test]
    fn no_more_is_due_than_the_frame_needs() {
        let frame = Frame::new(Kind::Boot, 0, b"{}".to_vec()).bytes();
        let mut parser = Parser::default();
        let mut fed = 0;
        while parser.next().unwrap().is_none() {
            let due = parser.due().unwrap();
            parser.feed(&frame[fed..fed + due]);
            fed += due;
        }
        assert_eq!(fed, frame.len());
    }

    #[test]
    fn what_is_no_frame_is_refused_before_it_is_stored() {
        for head in [[200, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]] {
            let mut parser = Parser::default();
            parser.feed(&head);
            assert!(matches!(parser.next(), Err(LinkError::Bad(_))), "{head:?}");
        }
    }
}
