//! Questions and answers over connections that carry bytes both ways.
//!
//! A message is its length (4 bytes, little-endian) and so many bytes. A
//! question is one message. An answer is any number of them, ended by an empty one.
//!
//! Who gets something asks: [`Streams`], and the other side [`serve`]s. Where
//! the side that can connect is the one that has something to give, roles are
//! exchanged: it [`give`]s, and the other side [`receive`]s. Then the first
//! message says what is offered, and each question comes in a [`Turn`].

use std::{
    fmt,
    io::{self, Read, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

use super::{Channel, QUESTION_MAX_BYTES, Question, Remote, answer};
use crate::{
    Error,
    repository::{Repository, Transferred, Wanted},
};

/// Bytes that are gathered before they become a message.
const MESSAGE_BYTES: usize = 64 << 10;
/// Largest turn: a question and figures.
const TURN_MAX_BYTES: u64 = QUESTION_MAX_BYTES + (4 << 10);
/// So much of an answer that nobody wants is read over, to keep the connection.
const SKIP_MAX_BYTES: u64 = 1 << 20;

/// A connection.
pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// A way to make connections.
type Open = dyn Fn() -> io::Result<Box<dyn Stream>> + Send + Sync;

/// What happens where roles are exchanged, told by the side that receives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Turn {
    /// It asks.
    Ask {
        /// What it asks for.
        question: Question,
        /// How far it is.
        so_far: Transferred,
    },
    /// It has all, and its tags have moved.
    Done(Transferred),
    /// It gave up; why, in one line.
    Failed(String),
}

/// A channel of as many connections as are needed at once, each used again.
pub struct Streams {
    open: Box<Open>,
    idle: Mutex<Vec<Box<dyn Stream>>>,
}

impl Streams {
    /// Makes connections by `open`, when they are needed.
    pub fn new(open: impl Fn() -> io::Result<Box<dyn Stream>> + Send + Sync + 'static) -> Self {
        Self { open: Box::new(open), idle: Mutex::default() }
    }
}

impl fmt::Debug for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streams").field("idle", &lock(&self.idle).len()).finish_non_exhaustive()
    }
}

impl Channel for Streams {
    fn ask(&self, question: &[u8]) -> io::Result<Box<dyn Read + '_>> {
        // One that stood idle may be gone: its other side has patience of its own.
        let known = lock(&self.idle).pop();
        if let Some(mut stream) = known
            && let Ok(left) = put(&mut *stream, question).and_then(|()| length(&mut *stream))
        {
            return Ok(Box::new(Answer { stream: Some(stream), left, ended: left == 0, home: self }));
        }
        let mut stream = (self.open)()?;
        put(&mut *stream, question)?;
        let left = length(&mut *stream)?;
        Ok(Box::new(Answer { stream: Some(stream), left, ended: left == 0, home: self }))
    }
}

/// Where a connection goes when its answer was read.
trait Home: Sync {
    fn back(&self, stream: Option<Box<dyn Stream>>);
}

impl Home for Streams {
    fn back(&self, stream: Option<Box<dyn Stream>>) {
        lock(&self.idle).extend(stream);
    }
}

/// An answer as it arrives.
struct Answer<'a> {
    stream: Option<Box<dyn Stream>>,
    /// Of the message that is being read.
    left: u32,
    ended: bool,
    home: &'a dyn Home,
}

impl Read for Answer<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let Some(stream) = self.stream.as_mut() else { return Ok(0) };
        if self.left == 0 && !self.ended {
            self.left = length(&mut **stream)?;
            self.ended = self.left == 0;
        }
        let most = to.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let Some(to) = to.get_mut(..most).filter(|to| !to.is_empty()) else { return Ok(0) };
        let len = stream.read(to)?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= u32::try_from(len).unwrap_or(self.left);
        Ok(len)
    }
}

impl Drop for Answer<'_> {
    fn drop(&mut self) {
        // What is left is usually the empty message alone.
        let skipped = io::copy(&mut self.by_ref().take(SKIP_MAX_BYTES), &mut io::sink());
        let stream = self.stream.take().filter(|_| skipped.is_ok() && self.ended && self.left == 0);
        self.home.back(stream);
    }
}

/// Answers questions until the other side leaves.
///
/// # Errors
/// The connection broke, or something can no longer be read after its answer
/// has begun.
pub fn serve(repository: &Repository, stream: &mut dyn Stream) -> io::Result<()> {
    while let Some(question) = message(stream, QUESTION_MAX_BYTES)? {
        let mut to = Messages { to: stream, gathered: Vec::with_capacity(MESSAGE_BYTES) };
        answer(repository, &question, &mut to)?;
        to.end()?;
    }
    Ok(())
}

/// Offers `wanted` of this repository and answers until the other side has it.
///
/// # Errors
/// The connection broke, or the other side gave up; [`Error::Refused`] says why.
pub fn give(
    repository: &Repository,
    mut stream: Box<dyn Stream>,
    wanted: &Wanted,
    progress: &mut dyn FnMut(&Transferred),
) -> Result<Transferred, Error> {
    let mut turns = || -> io::Result<Result<Transferred, String>> {
        put(&mut *stream, &serde_json::to_vec(wanted)?)?;
        loop {
            let turn = message(&mut *stream, TURN_MAX_BYTES)?.ok_or(io::ErrorKind::UnexpectedEof)?;
            let question = match serde_json::from_slice(&turn)? {
                Turn::Ask { question, so_far } => {
                    progress(&so_far);
                    question
                }
                Turn::Done(done) => return Ok(Ok(done)),
                Turn::Failed(reason) => return Ok(Err(reason)),
            };
            let mut to = Messages { to: &mut *stream, gathered: Vec::with_capacity(MESSAGE_BYTES) };
            answer(repository, &question.encode()?, &mut to)?;
            to.end()?;
        }
    };
    match turns() {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(reason)) => Err(Error::Refused(reason)),
        Err(error) => Err(Error::io("give from", repository.dir())(error)),
    }
}

/// Gets into this repository what the other side offers. `name` is what the
/// other side is called, `who` who moves tags.
///
/// # Errors
/// The connection broke. What fails otherwise is told to the other side.
pub fn receive(repository: &Repository, mut stream: Box<dyn Stream>, name: &str, who: &str) -> io::Result<()> {
    let Some(wanted) = message(&mut *stream, TURN_MAX_BYTES)? else { return Ok(()) };
    let so_far = Arc::new(Mutex::new(Transferred::default()));
    let back = Back(Arc::new(Shared { stream: Mutex::new(Place::Here(stream)), here: Condvar::new() }));
    let told = Arc::clone(&so_far);
    let source = Remote::new(name, Turns { back: Back(Arc::clone(&back.0)), so_far });
    let end = match serde_json::from_slice::<Wanted>(&wanted) {
        Ok(wanted) => match repository.pull(&source, &wanted, who, &mut |now| *lock(&told) = *now) {
            Ok(done) => Turn::Done(done),
            Err(error) => Turn::Failed(qvd_core::causes(&error).join(": ")),
        },
        Err(error) => Turn::Failed(format!("what is offered is not understood: {error}")),
    };
    let mut stream = back.take()?;
    put(&mut *stream, &serde_json::to_vec(&end)?)
}

/// The only connection there is: who asks waits for it.
struct Back(Arc<Shared>);

struct Shared {
    stream: Mutex<Place>,
    here: Condvar,
}

enum Place {
    Here(Box<dyn Stream>),
    Used,
    Lost,
}

impl Back {
    fn take(&self) -> io::Result<Box<dyn Stream>> {
        let mut place = lock(&self.0.stream);
        loop {
            match std::mem::replace(&mut *place, Place::Used) {
                Place::Here(stream) => return Ok(stream),
                Place::Used => place = self.0.here.wait(place).unwrap_or_else(PoisonError::into_inner),
                Place::Lost => {
                    *place = Place::Lost;
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
            }
        }
    }
}

impl Home for Back {
    fn back(&self, stream: Option<Box<dyn Stream>>) {
        *lock(&self.0.stream) = stream.map_or(Place::Lost, Place::Here);
        self.0.here.notify_all();
    }
}

/// The channel of the side that receives.
struct Turns {
    back: Back,
    so_far: Arc<Mutex<Transferred>>,
}

impl fmt::Debug for Turns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turns").finish_non_exhaustive()
    }
}

impl Channel for Turns {
    fn ask(&self, question: &[u8]) -> io::Result<Box<dyn Read + '_>> {
        let question = Question::decode(question).map_err(io::Error::other)?;
        let mut stream = self.back.take()?;
        let so_far = *lock(&self.so_far);
        let asked = serde_json::to_vec(&Turn::Ask { question, so_far })
            .map_err(io::Error::from)
            .and_then(|turn| put(&mut *stream, &turn))
            .and_then(|()| length(&mut *stream));
        match asked {
            Ok(left) => Ok(Box::new(Answer { stream: Some(stream), left, ended: left == 0, home: &self.back })),
            Err(error) => {
                self.back.back(None);
                Err(error)
            }
        }
    }
}

/// Bytes on their way as messages.
struct Messages<'a> {
    to: &'a mut dyn Stream,
    gathered: Vec<u8>,
}

impl Messages<'_> {
    fn end(mut self) -> io::Result<()> {
        self.flush()?;
        put(self.to, &[])
    }
}

impl Write for Messages<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let now = bytes.len().min(MESSAGE_BYTES - self.gathered.len());
        self.gathered.extend_from_slice(bytes.get(..now).unwrap_or_default());
        if self.gathered.len() == MESSAGE_BYTES {
            self.flush()?;
        }
        Ok(now)
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.gathered.is_empty() {
            put(self.to, &self.gathered)?;
            self.gathered.clear();
        }
        Ok(())
    }
}

/// Sends a message.
fn put(to: &mut dyn Stream, bytes: &[u8]) -> io::Result<()> {
    let len = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // In one piece: two small writes would wait for each other's acknowledgement.
    let mut all = Vec::with_capacity(bytes.len() + 4);
    all.extend_from_slice(&len.to_le_bytes());
    all.extend_from_slice(bytes);
    to.write_all(&all)?;
    to.flush()
}

fn length(from: &mut dyn Stream) -> io::Result<u32> {
    let mut len = [0; 4];
    from.read_exact(&mut len)?;
    Ok(u32::from_le_bytes(len))
}

/// Receives a message; none if the other side has left.
fn message(from: &mut dyn Stream, max: u64) -> io::Result<Option<Vec<u8>>> {
    let mut first = [0; 1];
    if from.read(&mut first)? == 0 {
        return Ok(None);
    }
    let mut rest = [0; 3];
    from.read_exact(&mut rest)?;
    let len = u64::from(u32::from_le_bytes([first[0], rest[0], rest[1], rest[2]]));
    if len > max {
        let what = format!("a message has {len} bytes, more than {max}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let mut bytes = Vec::new();
    if from.take(len).read_to_end(&mut bytes)? as u64 != len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(bytes))
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
