//! Carries conversations over a link, at either end of it.
//!
//! On the host, whoever connects to the machine's control socket talks with
//! the init inside as if it were the init of a container; in the guest, the
//! init is connected to by this. Descriptors that ride along with a message
//! become streams of the link, and new descriptors at the other end.

use std::{
    collections::{BTreeMap, VecDeque},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::PathBuf,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::SocketFlags,
};
use serde_json::Value;

use crate::{
    Channel, MAX_FDS,
    frame::{Frame, Kind, LinkError, Parser},
    stream::{Got, Stream, Ways},
};

/// Most conversations and streams of one guest.
const MAX_STREAMS: usize = 256;

/// Bytes waiting for the link above which nothing more is read for it.
const HIGH: usize = 512 * 1024;

/// Between two looks whether the host is there again; a virtio port has no
/// event for it that could be waited for together with others.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Which end of a link this is.
#[derive(Debug)]
pub(crate) enum End {
    /// The host's: a socket that conversations begin at.
    Host(OwnedFd),
    /// The guest's: where its init listens.
    Guest(PathBuf),
}

/// A conversation with the init.
#[derive(Debug)]
struct Talk {
    channel: Channel,
    /// Streams that its messages brought.
    streams: Vec<u32>,
    /// A message that waits until those are drained: who hears that a program
    /// has ended believes that all its output has come.
    held: Option<(Value, bool)>,
    /// Whether it ends once nothing is held.
    over: bool,
}

/// Why a bridge ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It was told to.
    Stopped,
    /// The other end is gone.
    Gone,
}

/// One end of a link, with all that it carries.
#[derive(Debug)]
pub(crate) struct Bridge {
    link: OwnedFd,
    /// Becomes readable when the bridge is to end.
    stop: OwnedFd,
    end: End,
    parser: Parser,
    out: VecDeque<u8>,
    talks: BTreeMap<u32, Talk>,
    streams: BTreeMap<u32, Stream>,
    /// Next number of ours; even on the host, odd in the guest.
    next: u32,
    /// Numbers of the other end that are used up.
    seen: u32,
    /// Whether a guest's port has nobody at its other end.
    alone: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Link,
    Stop,
    Listener,
    Talk(u32),
    Stream(u32),
}

impl Bridge {
    /// `parser` holds what was read of the link already.
    pub(crate) fn new(link: OwnedFd, stop: OwnedFd, end: End, parser: Parser) -> Self {
        let next = if matches!(end, End::Host(_)) { 2 } else { 1 };
        Self {
            link,
            stop,
            end,
            parser,
            out: VecDeque::new(),
            talks: BTreeMap::new(),
            streams: BTreeMap::new(),
            next,
            seen: 0,
            alone: false,
        }
    }

    /// Works until it is told to stop or, on the host, the guest is gone.
    pub(crate) fn run(&mut self) -> Result<Ended, LinkError> {
        self.parse()?;
        loop {
            let ready = self.wait()?;
            if ready.iter().any(|(source, _)| *source == Source::Stop) {
                // What was said before that is still passed on.
                self.last_round()?;
                return Ok(Ended::Stopped);
            }
            for (source, flags) in ready {
                match source {
                    Source::Link => {
                        if flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) && self.read_link()? {
                            return Ok(Ended::Gone);
                        }
                    }
                    Source::Stop => {}
                    Source::Listener => self.accept(),
                    Source::Talk(number) => self.hear(number),
                    Source::Stream(number) => self.carry(number, flags),
                }
            }
            self.settle();
            self.write_link()?;
        }
    }

    /// Passes on what has been said, without waiting for more.
    fn last_round(&mut self) -> Result<(), LinkError> {
        for number in self.talks.keys().copied().collect::<Vec<_>>() {
            self.hear(number);
        }
        self.settle();
        self.write_link()
    }

    fn wait(&mut self) -> Result<Vec<(Source, PollFlags)>, LinkError> {
        let roomy = self.out.len() < HIGH;
        let mut sources = vec![Source::Stop];
        let mut fds = vec![PollFd::new(&self.stop, PollFlags::IN)];
        if !self.alone {
            sources.push(Source::Link);
            let out = if self.out.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            fds.push(PollFd::new(&self.link, PollFlags::IN | out));
        }
        if let End::Host(listener) = &self.end
            && self.talks.len() + self.streams.len() < MAX_STREAMS
        {
            sources.push(Source::Listener);
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        for (&number, talk) in self.talks.iter().filter(|(_, talk)| roomy && talk.held.is_none() && !talk.over) {
            sources.push(Source::Talk(number));
            fds.push(PollFd::new(&talk.channel, PollFlags::IN));
        }
        for (&number, stream) in &self.streams {
            let interest = stream.interest(roomy);
            if !interest.is_empty() {
                sources.push(Source::Stream(number));
                fds.push(PollFd::new(stream.fd(), interest));
            }
        }
        let limit = self.alone.then(|| Timespec::try_from(LOOK_AGAIN).ok()).flatten();
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(LinkError::Io { op: "wait for", source: error.into() }),
        }
        let ready = fds.iter().zip(sources).filter(|(fd, _)| !fd.revents().is_empty());
        let ready = ready.map(|(fd, source)| (source, fd.revents())).collect();
        drop(fds);
        if self.alone {
            self.alone = self.is_alone();
        }
        Ok(ready)
    }

    fn is_alone(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::new(&self.link, PollFlags::IN)];
        poll(&mut fds, Some(&now)).is_ok() && fds.iter().any(|fd| fd.revents().contains(PollFlags::HUP))
    }

    /// Reads what came; says whether the other end is gone for good.
    fn read_link(&mut self) -> Result<bool, LinkError> {
        let mut bytes = [0; 32 * 1024];
        let got = match rustix::io::read(&self.link, &mut bytes) {
            Ok(0) | Err(Errno::CONNRESET | Errno::PIPE) => {
                if matches!(self.end, End::Host(_)) {
                    return Ok(true);
                }
                // The node died. Its next life says hello.
                self.forget();
                self.alone = true;
                return Ok(false);
            }
            Ok(got) => got,
            Err(Errno::AGAIN | Errno::INTR) => {
                self.alone = matches!(self.end, End::Guest(_)) && self.is_alone();
                return Ok(false);
            }
            Err(error) => return Err(LinkError::Io { op: "read from", source: error.into() }),
        };
        self.parser.feed(bytes.get(..got).unwrap_or_default());
        self.parse()?;
        Ok(false)
    }

    fn parse(&mut self) -> Result<(), LinkError> {
        while let Some(frame) = self.parser.next()? {
            self.heard(frame)?;
        }
        Ok(())
    }

    fn write_link(&mut self) -> Result<(), LinkError> {
        while !self.out.is_empty() && !self.alone {
            let (piece, _) = self.out.as_slices();
            match rustix::io::write(&self.link, piece) {
                Ok(0) | Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                Ok(sent) => drop(self.out.drain(..sent)),
                // Reading says it too, and what to do about it.
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(()),
                Err(error) => return Err(LinkError::Io { op: "write to", source: error.into() }),
            }
        }
        Ok(())
    }

    fn say(&mut self, kind: Kind, stream: u32, body: Vec<u8>) {
        self.out.extend(Frame::new(kind, stream, body).bytes());
    }

    /// Forgets all that is under way.
    fn forget(&mut self) {
        self.talks.clear();
        self.streams.clear();
        self.out.clear();
        self.parser = Parser::default();
        self.seen = 0;
    }

    /// A new number of the other end: never one that it had before.
    fn fresh(&mut self, number: u32) -> Result<(), LinkError> {
        let theirs = number % 2 != self.next % 2;
        if !theirs || number <= self.seen || self.talks.len() + self.streams.len() >= MAX_STREAMS {
            return Err(LinkError::Bad("a stream that cannot be opened"));
        }
        self.seen = number;
        Ok(())
    }

    fn take_number(&mut self) -> u32 {
        let number = self.next;
        // After two thousand million streams the link begins anew.
        self.next = self.next.wrapping_add(2);
        number
    }

    fn heard(&mut self, frame: Frame) -> Result<(), LinkError> {
        let Frame { kind, stream: number, body } = frame;
        let guest = matches!(self.end, End::Guest(_));
        match kind {
            Kind::Hello if guest => {
                self.forget();
                self.say(Kind::Welcome, 0, body);
            }
            Kind::Open if guest => self.open(number)?,
            Kind::Message => self.pass(number, &body)?,
            Kind::Data => {
                if let Some(stream) = self.streams.get_mut(&number)
                    && !stream.take(&body)
                {
                    return Err(LinkError::Bad("more bytes than it may send"));
                }
                self.flush(number);
            }
            Kind::Credit => {
                let credit = body.try_into().map(u32::from_le_bytes).ok().and_then(|n| usize::try_from(n).ok());
                let credit = credit.ok_or(LinkError::Bad("a credit that is no number"))?;
                if let Some(stream) = self.streams.get_mut(&number)
                    && !stream.give(credit)
                {
                    return Err(LinkError::Bad("more credit than there is"));
                }
            }
            Kind::End => {
                if let Some(stream) = self.streams.get_mut(&number) {
                    stream.end();
                }
                self.flush(number);
            }
            Kind::Enough => {
                if let Some(stream) = self.streams.get_mut(&number) {
                    stream.reads = false;
                }
                self.flush(number);
            }
            Kind::Close => match self.talks.get_mut(&number) {
                Some(talk) if talk.held.is_some() => talk.over = true,
                _ => drop(self.talks.remove(&number)),
            },
            Kind::Hello | Kind::Welcome | Kind::Boot | Kind::Booted | Kind::Failed | Kind::Open => {
                return Err(LinkError::Bad("a frame that only the other end may send"));
            }
        }
        Ok(())
    }

    /// Begins a conversation with the init here.
    fn open(&mut self, number: u32) -> Result<(), LinkError> {
        self.fresh(number)?;
        let End::Guest(path) = &self.end else { return Ok(()) };
        let connected = UnixStream::connect(path).and_then(|stream| {
            stream.set_nonblocking(true)?;
            Ok(stream)
        });
        match connected {
            Ok(stream) => drop(self.talks.insert(number, talk(stream.into()))),
            Err(_) => self.say(Kind::Close, number, Vec::new()),
        }
        Ok(())
    }

    /// Begins a conversation with the init at the other end.
    fn accept(&mut self) {
        let End::Host(listener) = &self.end else { return };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // An error is the caller's that is gone, or passes.
        let Ok(socket) = rustix::net::accept_with(listener, flags) else { return };
        let number = self.take_number();
        self.talks.insert(number, talk(socket));
        self.say(Kind::Open, number, Vec::new());
    }

    /// Passes a message of the other end on to whoever talks here.
    fn pass(&mut self, number: u32, body: &[u8]) -> Result<(), LinkError> {
        let bad = || LinkError::Bad("a message that is cut short");
        let (&count, rest) = body.split_first().ok_or_else(bad)?;
        let count = usize::from(count);
        if count > MAX_FDS {
            return Err(LinkError::Bad("a message with too many streams"));
        }
        let (list, text) = rest.split_at_checked(count * 5).ok_or_else(bad)?;
        let message: Value = serde_json::from_slice(text)
            .map_err(|e| LinkError::Message { expected: "message", reason: e.to_string() })?;
        let mut given = Vec::new();
        for entry in list.chunks_exact(5) {
            let (ways, stream) = entry.split_first().ok_or_else(bad)?;
            let stream = stream.try_into().map(u32::from_le_bytes).map_err(|_| bad())?;
            let ways = Ways::from_byte(*ways).ok_or(LinkError::Bad("a stream that goes nowhere"))?;
            self.fresh(stream)?;
            let (ours, theirs) =
                Stream::announced(ways).map_err(|e| LinkError::Io { op: "carry", source: e.into() })?;
            self.streams.insert(stream, ours);
            given.push((stream, theirs));
        }
        let Some(talk) = self.talks.get_mut(&number) else {
            // It has hung up; so does what came for it.
            given.iter().for_each(|(stream, _)| drop(self.streams.remove(stream)));
            return Ok(());
        };
        talk.streams.extend(given.iter().map(|(stream, _)| *stream));
        if is_last(&message) && given.is_empty() {
            talk.held = Some((message, true));
            return Ok(());
        }
        let fds: Vec<_> = given.iter().map(|(_, fd)| std::os::fd::AsFd::as_fd(fd)).collect();
        if talk.channel.send(&message, &fds).is_err() {
            self.hang_up(number);
        }
        Ok(())
    }

    /// Reads what is said here.
    fn hear(&mut self, number: u32) {
        loop {
            let Some(talk) = self.talks.get_mut(&number) else { return };
            if talk.held.is_some() || talk.over {
                return;
            }
            match talk.channel.try_recv::<Value>() {
                Ok(Some((message, fds))) if is_last(&message) && fds.is_empty() => talk.held = Some((message, false)),
                Ok(Some((message, fds))) => self.tell(number, &message, fds),
                Ok(None) => return,
                Err(_) => talk.over = true,
            }
        }
    }

    /// Tells the other end what was said here.
    fn tell(&mut self, number: u32, message: &Value, fds: Vec<OwnedFd>) {
        // A terminal can be read by whatever holds it: what a program gets as
        // its output is only written to.
        let exec = ["exec", "exec_still"].iter().any(|name| message.get(name).is_some()) && fds.len() == MAX_FDS;
        let mut body = vec![u8::try_from(fds.len()).unwrap_or(u8::MAX)];
        for (index, fd) in fds.into_iter().enumerate() {
            let ways = match (exec, index) {
                (true, 0) => Ways { out: true, back: false },
                (true, _) => Ways { out: false, back: true },
                (false, _) => Ways::of(&fd),
            };
            let stream = self.take_number();
            body.push(ways.to_byte());
            body.extend_from_slice(&stream.to_le_bytes());
            self.streams.insert(stream, Stream::new(fd, ways));
            if let Some(talk) = self.talks.get_mut(&number) {
                talk.streams.push(stream);
            }
        }
        body.extend_from_slice(message.to_string().as_bytes());
        self.say(Kind::Message, number, body);
    }

    fn hang_up(&mut self, number: u32) {
        if self.talks.remove(&number).is_some() {
            self.say(Kind::Close, number, Vec::new());
        }
    }

    /// Moves the bytes of a stream that is ready.
    fn carry(&mut self, number: u32, flags: PollFlags) {
        let Some(stream) = self.streams.get_mut(&number) else { return };
        if stream.reads && flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            match stream.read() {
                Got::Bytes(bytes) => self.say(Kind::Data, number, bytes),
                Got::End => self.say(Kind::End, number, Vec::new()),
                Got::Nothing => {}
            }
        }
        self.flush(number);
    }

    /// Writes what waits in a stream, and forgets it once it is over.
    fn flush(&mut self, number: u32) {
        let Some(stream) = self.streams.get_mut(&number) else { return };
        let (back, broken) = stream.write();
        let over = stream.is_over();
        if let Some(back) = back {
            self.say(Kind::Credit, number, back.to_le_bytes().to_vec());
        }
        if broken {
            self.say(Kind::Enough, number, Vec::new());
        }
        if over {
            self.streams.remove(&number);
        }
    }

    /// Passes on what was held back, where it need not be any more, and ends
    /// what is over.
    fn settle(&mut self) {
        for number in self.talks.keys().copied().collect::<Vec<_>>() {
            let Some(talk) = self.talks.get_mut(&number) else { continue };
            let streams = &self.streams;
            if talk.held.is_some() && talk.streams.iter().all(|s| streams.get(s).is_none_or(Stream::is_drained)) {
                match talk.held.take() {
                    Some((message, true)) => talk.over |= talk.channel.send(&message, &[]).is_err(),
                    Some((message, false)) => self.tell(number, &message, Vec::new()),
                    None => {}
                }
                // What was behind it may be there already.
                self.hear(number);
            }
            if self.talks.get(&number).is_some_and(|talk| talk.over && talk.held.is_none()) {
                self.hang_up(number);
            }
        }
    }
}

fn talk(socket: OwnedFd) -> Talk {
    Talk { channel: Channel::new(socket), streams: Vec::new(), held: None, over: false }
}

/// Whether a message says that a program has ended.
fn is_last(message: &Value) -> bool {
    message.get("exited").is_some()
}
