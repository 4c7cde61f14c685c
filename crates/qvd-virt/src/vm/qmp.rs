//! QEMU's control socket: one line of JSON each way, and events in between.
//!
//! The peer is a process that a hostile guest may have taken over. Lines are
//! bounded, nesting is bounded by the parser, every wait has a deadline, and
//! nothing of an answer is believed beyond its type.

mod message;

use std::{
    collections::VecDeque,
    io::IoSlice,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

pub use self::message::{Command, Event, QemuVersion, QmpError};
use self::message::{Line, Refusal};

/// Longest line taken, in bytes. The longest answer that is asked for, a ring
/// buffer of the console, is a tenth of this.
const MAX_LINE: usize = 1 << 20;

/// Most events kept for whoever asks. A guest can cause some of them at will.
const MAX_EVENTS: usize = 1024;

/// A connection to QEMU's control socket, past its greeting.
#[derive(Debug)]
pub struct Qmp {
    socket: UnixStream,
    buffer: Vec<u8>,
    /// How much of the buffer is known to hold no line's end.
    searched: usize,
    events: VecDeque<Event>,
    next_id: u64,
    version: QemuVersion,
}

impl Qmp {
    /// Connects, and waits for QEMU to greet.
    ///
    /// # Errors
    /// Nobody listens, or the one who does is not QEMU.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self, QmpError> {
        let socket = UnixStream::connect(path).map_err(|source| QmpError::Io { op: "connect to", source })?;
        Self::greet(socket, limit)
    }

    /// Takes over a connected socket, and waits for QEMU to greet.
    ///
    /// # Errors
    /// As [`Qmp::connect`].
    pub fn greet(socket: UnixStream, limit: Duration) -> Result<Self, QmpError> {
        socket.set_nonblocking(true).map_err(|source| QmpError::Io { op: "set up", source })?;
        let version = QemuVersion::none();
        let mut qmp = Self { socket, buffer: Vec::new(), searched: 0, events: VecDeque::new(), next_id: 0, version };
        let deadline = Instant::now() + limit;
        let line = qmp.line(deadline)?.ok_or(QmpError::Timeout { command: "greeting", limit })?;
        let Some(greeting) = line.greeting else { return Err(QmpError::Garbage("no greeting".to_owned())) };
        qmp.version = QemuVersion { package: greeting.version.package, ..greeting.version.qemu };
        qmp.execute::<Value>("qmp_capabilities", &json!({}), &[], deadline.saturating_duration_since(Instant::now()))?;
        Ok(qmp)
    }

    /// What QEMU says its version is.
    #[must_use]
    pub const fn version(&self) -> &QemuVersion {
        &self.version
    }

    /// Carries out `command` and waits for its answer.
    ///
    /// # Errors
    /// QEMU refuses, does not answer within `limit`, or is gone.
    pub fn call<C: Command>(&mut self, command: &C, limit: Duration) -> Result<C::Answer, QmpError> {
        self.call_with(command, &[], limit)
    }

    /// As [`Qmp::call`], with descriptors for QEMU.
    ///
    /// # Errors
    /// As [`Qmp::call`].
    pub fn call_with<C: Command>(
        &mut self,
        command: &C,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<C::Answer, QmpError> {
        let arguments = serde_json::to_value(command).map_err(|e| QmpError::Garbage(e.to_string()))?;
        // A unit struct becomes null; QEMU wants an object.
        let arguments = if arguments.is_null() { json!({}) } else { arguments };
        self.execute(C::NAME, &arguments, fds, limit)
    }

    fn execute<A: DeserializeOwned>(
        &mut self,
        command: &'static str,
        arguments: &Value,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<A, QmpError> {
        let deadline = Instant::now() + limit;
        let id = self.next_id;
        self.next_id += 1;
        // QEMU reads a byte per call: nothing is said that need not be.
        let mut line = if arguments.as_object().is_some_and(serde_json::Map::is_empty) {
            json!({ "execute": command, "id": id })
        } else {
            json!({ "execute": command, "arguments": arguments, "id": id })
        }
        .to_string();
        line.push('\n');
        self.send(line.as_bytes(), fds, deadline, command, limit)?;
        loop {
            let Some(line) = self.line(deadline)? else { return Err(QmpError::Timeout { command, limit }) };
            // An answer to a command that was given up on is nobody's.
            if line.id != Some(id) {
                continue;
            }
            if let Some(Refusal { class, desc }) = line.error {
                return Err(QmpError::Refused { command, class, reason: shown(&desc) });
            }
            let answer = line.answer.ok_or_else(|| QmpError::Garbage("an answer without content".to_owned()))?;
            return serde_json::from_value(answer)
                .map_err(|e| QmpError::Garbage(format!("the answer to `{command}`: {e}")));
        }
    }

    fn send(
        &self,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
        command: &'static str,
        limit: Duration,
    ) -> Result<(), QmpError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(QmpError::Garbage("more than four descriptors at once".to_owned()));
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            match sendmsg(&self.socket, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    rest = rest.get(sent..).unwrap_or_default();
                    // They went with the first byte.
                    control.clear();
                }
                Err(Errno::AGAIN) => {
                    if !self.wait(PollFlags::OUT, deadline)? {
                        return Err(QmpError::Timeout { command, limit });
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(QmpError::Closed),
                Err(error) => return Err(QmpError::Io { op: "write to", source: error.into() }),
            }
        }
        Ok(())
    }

    /// The next event, waiting for it at most `limit`.
    ///
    /// # Errors
    /// QEMU is gone, or what came is not QMP.
    pub fn event(&mut self, limit: Duration) -> Result<Option<Event>, QmpError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            if self.line(deadline)?.is_none() {
                return Ok(None);
            }
        }
    }

    /// The next line; an event among them is kept as well. `None`: nothing
    /// came in time.
    fn line(&mut self, deadline: Instant) -> Result<Option<Line>, QmpError> {
        loop {
            if let Some(line) = self.buffered()? {
                if let Some(name) = &line.event {
                    if self.events.len() == MAX_EVENTS {
                        return Err(QmpError::Garbage(format!("{MAX_EVENTS} events that nobody asked for")));
                    }
                    let data = line.data.clone().unwrap_or(Value::Null);
                    self.events.push_back(Event { name: name.clone(), data });
                }
                return Ok(Some(line));
            }
            if !self.wait(PollFlags::IN, deadline)? {
                return Ok(None);
            }
            self.fill()?;
        }
    }

    fn buffered(&mut self) -> Result<Option<Line>, QmpError> {
        let fresh = self.buffer.get(self.searched..).unwrap_or_default();
        let Some(end) = fresh.iter().position(|&byte| byte == b'\n') else {
            self.searched = self.buffer.len();
            return Ok(None);
        };
        let rest = self.buffer.split_off(self.searched + end + 1);
        let line = std::mem::replace(&mut self.buffer, rest);
        self.searched = 0;
        match serde_json::from_slice::<Line>(&line) {
            Ok(line) => Ok(Some(line)),
            Err(error) => Err(QmpError::Garbage(error.to_string())),
        }
    }

    fn fill(&mut self) -> Result<(), QmpError> {
        let mut bytes = [0; 4096];
        match rustix::io::read(&self.socket, &mut bytes) {
            Ok(0) | Err(Errno::CONNRESET) => Err(QmpError::Closed),
            Ok(got) => {
                self.buffer.extend_from_slice(bytes.get(..got).unwrap_or_default());
                // What is beyond the first line may hold more of them.
                if self.buffer.len() > MAX_LINE && !self.buffer.contains(&b'\n') {
                    return Err(QmpError::Garbage(format!("a line of more than {MAX_LINE} bytes")));
                }
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(QmpError::Io { op: "read from", source: error.into() }),
        }
    }

    /// Whether the socket became ready before the deadline.
    fn wait(&self, flags: PollFlags, deadline: Instant) -> Result<bool, QmpError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
            match poll(&mut [PollFd::new(&self.socket, flags)], Some(&left)) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(error) => return Err(QmpError::Io { op: "wait for", source: error.into() }),
            }
        }
    }
}

impl AsFd for Qmp {
    /// Becomes readable when [`Qmp::event`] may have something to say.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A text of the peer's, fit for one line of a log.
fn shown(text: &str) -> String {
    text.chars().take(300).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Takes bytes as if they came from QEMU: for fuzzing. Says how many lines of
/// QMP were in them before something else was.
#[doc(hidden)]
#[must_use]
pub fn lines_of(bytes: &[u8]) -> usize {
    let mut lines = 0;
    for line in bytes.split(|&byte| byte == b'\n').filter(|line| line.len() <= MAX_LINE) {
        if serde_json::from_slice::<Line>(line).is_err() {
            break;
        }
        lines += 1;
    }
    lines
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        io::{self, BufRead, BufReader, Read, Write},
        thread::{self, JoinHandle},
    };

    use serde::Serialize;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);
    const GREETING: &str =
        r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "x"}, "capabilities": []}}"#;

    #[derive(Serialize)]
    struct QueryStatus;
    impl Command for QueryStatus {
        const NAME: &'static str = "query-status";
        type Answer = Value;
    }

    /// A peer that greets, accepts the capabilities and then says `then`.
    fn peer(then: impl FnOnce(&mut BufReader<UnixStream>) + Send + 'static) -> (UnixStream, JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let thread = thread::spawn(move || {
            let mut peer = BufReader::new(theirs);
            writeln!(peer.get_mut(), "{GREETING}").unwrap();
            let mut line = String::new();
            peer.read_line(&mut line).unwrap();
            assert_eq!(line, "{\"execute\":\"qmp_capabilities\",\"id\":0}\n");
            writeln!(peer.get_mut(), r#"{{"return": {{}}, "id": 0}}"#).unwrap();
            then(&mut peer);
        });
        (ours, thread)
    }

    #[test]
    fn an_answer_finds_its_command_between_events_and_answers_that_came_too_late() {
        let (socket, thread) = peer(|peer| {
            peer.read_line(&mut String::new()).unwrap();
            let said = b"{\"return\": 1, \"id\": 0}\r\n{\"event\": \"STOP\", \"timestamp\": {}}\r\n\
                {\"return\": {\"running\": true}, \"id\": 1}\r\n";
            for byte in said {
                peer.get_mut().write_all(&[*byte]).unwrap();
            }
        });
        let mut qmp = Qmp::greet(socket, SOON).unwrap();
        assert_eq!((qmp.version().major, qmp.version().package.as_str()), (7, "x"));
        assert_eq!(qmp.call(&QueryStatus, SOON).unwrap(), json!({ "running": true }));
        assert_eq!(qmp.event(SOON).unwrap().unwrap().name, "STOP");
        thread.join().unwrap();
        assert!(matches!(qmp.event(SOON), Err(QmpError::Closed)));
    }

    #[test]
    fn a_refusal_keeps_the_words_of_qemu_on_one_line() {
        let (socket, thread) = peer(|peer| {
            peer.read_line(&mut String::new()).unwrap();
            let said = r#"{"error": {"class": "GenericError", "desc": "no\nsuch"}, "id": 1}"#;
            writeln!(peer.get_mut(), "{said}").unwrap();
        });
        let error = Qmp::greet(socket, SOON).unwrap().call(&QueryStatus, SOON).unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused `query-status`: no such");
        thread.join().unwrap();
    }

    #[test]
    fn descriptors_travel_with_a_command() {
        let (socket, thread) = peer(|peer| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
            let mut bytes = [0; 512];
            let mut parts = [io::IoSliceMut::new(&mut bytes)];
            let flags = rustix::net::RecvFlags::empty();
            rustix::net::recvmsg(peer.get_ref(), &mut parts, &mut control, flags).unwrap();
            assert_eq!(control.drain().count(), 1);
            writeln!(peer.get_mut(), r#"{{"return": {{}}, "id": 1}}"#).unwrap();
        });
        let mut qmp = Qmp::greet(socket, SOON).unwrap();
        qmp.call_with(&QueryStatus, &[io::stdin().as_fd()], SOON).unwrap();
        thread.join().unwrap();
    }

    #[test]
    fn a_hostile_peer_is_given_up_on() {
        let endless = |peer: &mut BufReader<UnixStream>| {
            peer.read_line(&mut String::new()).unwrap();
            let piece = [b'['; 65_536];
            while peer.get_mut().write_all(&piece).is_ok() {}
        };
        let nested = |peer: &mut BufReader<UnixStream>| {
            peer.get_mut().write_all(&[b"{\"data\": ", [b'['; 1000].as_slice(), b"\n"].concat()).unwrap();
            drop(peer.read(&mut [0; 100]));
        };
        let silent = |peer: &mut BufReader<UnixStream>| while peer.read(&mut [0; 100]).is_ok_and(|n| n > 0) {};
        let flood = |peer: &mut BufReader<UnixStream>| {
            while peer.get_mut().write_all(b"{\"event\": \"X\"}\n").is_ok() {}
        };
        let cut = |peer: &mut BufReader<UnixStream>| peer.get_mut().write_all(b"{\"ret").unwrap();
        type Peer = fn(&mut BufReader<UnixStream>);
        let peers: [(Peer, &str, Duration); 5] = [
            (endless, "more than", SOON),
            (nested, "recursion limit", SOON),
            (silent, "did not answer", Duration::from_millis(20)),
            (flood, "nobody asked for", SOON),
            (cut, "closed", SOON),
        ];
        for (then, expected, limit) in peers {
            let (socket, thread) = peer(then);
            let mut qmp = Qmp::greet(socket, SOON).unwrap();
            let error = qmp.call(&QueryStatus, limit).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            drop(qmp);
            thread.join().unwrap();
        }
    }

    #[test]
    fn what_does_not_greet_is_not_qemu() {
        for said in ["{}\n", "SSH-2.0-OpenSSH\n", "{\"QMP\": 1}\n", "\n"] {
            let (socket, mut peer) = UnixStream::pair().unwrap();
            peer.write_all(said.as_bytes()).unwrap();
            assert!(matches!(Qmp::greet(socket, SOON), Err(QmpError::Garbage(_))), "{said}");
        }
    }
}
