//! Blocking netlink: batches of requests in one send, their answers collected.

use std::{fmt, io, os::fd::AsFd, time::Duration};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable, NlasIterator,
};
use netlink_sys::{Socket, SocketAddr, protocols};
use rustix::net::{RecvFlags, sockopt};

/// Longest wait for an answer. The kernel answers within the call that sends,
/// or after the RCU grace periods of a deletion, which take milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Most bytes of one send: the rules of the 1023 ports that a bridge can have.
const SEND_MAX: usize = 1 << 20;

/// What a send buffer has to hold for that, the kernel's own overhead counted.
const SEND_BUFFER: usize = 2 * SEND_MAX;

/// One datagram of answers.
///
/// Source: Linux `net/netlink/af_netlink.c`, `netlink_dump`: at most 32 KiB.
const RECV_MAX: usize = 64 * 1024;

/// Length of `struct nlmsghdr`. Source: Linux `include/uapi/linux/netlink.h`.
pub(crate) const HEADER_LEN: usize = 16;

/// Text of an extended acknowledgement. Source: as above, `NLMSGERR_ATTR_MSG`.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// What the kernel answered to a request, in its own words where it has any.
#[derive(Debug)]
pub struct NetlinkError {
    source: io::Error,
    text: Option<String>,
    /// Which request of the batch failed.
    pub(crate) index: usize,
}

impl NetlinkError {
    /// The error number, when the kernel gave one.
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    pub(crate) fn is(&self, errno: rustix::io::Errno) -> bool {
        self.raw_os_error() == Some(errno.raw_os_error())
    }
}

impl fmt::Display for NetlinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.text {
            Some(text) => write!(f, "{} ({text})", self.source),
            None => self.source.fmt(f),
        }
    }
}

impl std::error::Error for NetlinkError {}

impl From<io::Error> for NetlinkError {
    fn from(source: io::Error) -> Self {
        Self { source, text: None, index: 0 }
    }
}

fn malformed(what: impl fmt::Display) -> NetlinkError {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed netlink answer: {what}")).into()
}

/// One request of a batch.
#[derive(Debug)]
pub(crate) struct Request<M> {
    pub(crate) message: M,
    flags: u16,
}

impl<M> Request<M> {
    /// A request that the kernel acknowledges. `flags` are those beside
    /// `NLM_F_REQUEST`.
    pub(crate) fn new(message: M, flags: u16) -> Self {
        Self { message, flags: flags | NLM_F_ACK }
    }

    /// A request without an acknowledgement: the brackets of an nf_tables batch.
    pub(crate) fn silent(message: M) -> Self {
        Self { message, flags: 0 }
    }
}

/// A netlink socket. It stays in the network namespace it was opened in.
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
    /// Requests sent so far, for the benchmark.
    sent: u64,
}

impl fmt::Debug for Netlink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Netlink").field("sent", &self.sent).finish_non_exhaustive()
    }
}

impl Netlink {
    /// Opens one to routing netlink in the calling thread's namespace.
    pub(crate) fn route() -> io::Result<Self> {
        Self::open(protocols::NETLINK_ROUTE)
    }

    /// Opens one to netfilter in the calling thread's namespace.
    pub(crate) fn netfilter() -> io::Result<Self> {
        Self::open(protocols::NETLINK_NETFILTER)
    }

    fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        sockopt::set_socket_send_buffer_size_force(&socket, SEND_BUFFER)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; RECV_MAX], sent: 0 })
    }

    /// How many requests were sent.
    pub(crate) const fn sent(&self) -> u64 {
        self.sent
    }

    /// Sends `batch` at once and collects what the kernel answers.
    ///
    /// Routing netlink carries out each request, also those after a failed
    /// one; netfilter all or none. The error is that of the first failed one.
    pub(crate) fn batch<M>(&mut self, batch: Vec<Request<M>>) -> Result<Vec<M>, NetlinkError>
    where
        M: NetlinkSerializable + NetlinkDeserializable + fmt::Debug,
    {
        let read = |raw: &[u8]| match NetlinkMessage::<M>::deserialize(raw).map_err(malformed)?.payload {
            NetlinkPayload::InnerMessage(message) => Ok(Some(message)),
            _ => Ok(None),
        };
        let (answers, failed) = self.collect(batch, read)?;
        failed.map_or(Ok(answers), Err)
    }

    /// The same, each answer as the kernel wrote it behind its header; requests
    /// that fail with `tolerated` have none.
    pub(crate) fn batch_raw<M>(
        &mut self,
        batch: Vec<Request<M>>,
        tolerated: rustix::io::Errno,
    ) -> Result<Vec<Vec<u8>>, NetlinkError>
    where
        M: NetlinkSerializable + NetlinkDeserializable + fmt::Debug,
    {
        let (answers, failed) = self.collect(batch, |raw| Ok(raw.get(HEADER_LEN..).map(<[u8]>::to_vec)))?;
        failed.filter(|error| !error.is(tolerated)).map_or(Ok(answers), Err)
    }

    /// The answers to a batch, and the first failure.
    fn collect<M, T>(
        &mut self,
        batch: Vec<Request<M>>,
        read: impl Fn(&[u8]) -> Result<Option<T>, NetlinkError>,
    ) -> Result<(Vec<T>, Option<NetlinkError>), NetlinkError>
    where
        M: NetlinkSerializable + NetlinkDeserializable + fmt::Debug,
    {
        // The kernel refuses to be sent nothing (Linux `net/netlink/af_netlink.c`,
        // `netlink_sendmsg`).
        if batch.is_empty() {
            return Ok((Vec::new(), None));
        }
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        let acknowledged: Vec<bool> = batch.iter().map(|request| request.flags & NLM_F_ACK != 0).collect();
        let mut waiting = acknowledged.iter().filter(|&&yes| yes).count();
        for request in batch {
            self.append(&mut bytes, request);
        }
        if bytes.len() > SEND_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many requests in one batch").into());
        }
        self.send(&bytes)?;
        let (mut answers, mut failed) = (Vec::new(), None::<NetlinkError>);
        while waiting > 0 {
            let datagram = self.receive()?;
            for (header, raw) in messages(&datagram) {
                let index = usize::try_from(header.sequence_number.wrapping_sub(first)).unwrap_or(usize::MAX);
                // An answer to an earlier batch that was given up.
                let Some(&acknowledged) = acknowledged.get(index) else { continue };
                // Types below this are netlink's own: NLMSG_MIN_TYPE.
                if header.kind >= 0x10 {
                    answers.extend(read(raw)?);
                    continue;
                }
                let payload = NetlinkMessage::<M>::deserialize(raw).map_err(malformed)?.payload;
                let NetlinkPayload::Error(error) = payload else { continue };
                waiting -= usize::from(acknowledged);
                if error.code.is_some() {
                    let error = refusal(&error, header.flags, index);
                    // An error of a bracket is the last answer there is.
                    if !acknowledged {
                        return Err(failed.unwrap_or(error));
                    }
                    failed = failed.filter(|other| other.index <= index).or(Some(error));
                }
            }
        }
        Ok((answers, failed))
    }

    /// Everything of a kind, such as all links. Asked again when it changed
    /// under way.
    pub(crate) fn dump<M>(&mut self, message: M) -> Result<Vec<M>, NetlinkError>
    where
        M: NetlinkSerializable + NetlinkDeserializable + fmt::Debug + Clone,
    {
        self.dump_as(message, |raw| match NetlinkMessage::<M>::deserialize(raw).map_err(malformed)?.payload {
            NetlinkPayload::InnerMessage(message) => Ok(Some(message)),
            _ => Ok(None),
        })
    }

    /// The same, each message as the kernel wrote it, behind its header.
    pub(crate) fn dump_raw<M>(&mut self, message: M) -> Result<Vec<Vec<u8>>, NetlinkError>
    where
        M: NetlinkSerializable + NetlinkDeserializable + fmt::Debug + Clone,
    {
        self.dump_as(message, |raw| Ok(raw.get(HEADER_LEN..).map(<[u8]>::to_vec)))
    }

    fn dump_as<M, T>(
        &mut self,
        message: M,
        read: impl Fn(&[u8]) -> Result<Option<T>, NetlinkError>,
    ) -> Result<Vec<T>, NetlinkError>
    where
        M: NetlinkSerializable + NetlinkDeserializable + fmt::Debug + Clone,
    {
        const TRIES: usize = 5;
        for _ in 0..TRIES {
            if let Some(all) = self.dump_once(message.clone(), &read)? {
                return Ok(all);
            }
        }
        Err(io::Error::new(io::ErrorKind::ResourceBusy, "it changed each time it was listed").into())
    }

    fn dump_once<M, T>(
        &mut self,
        message: M,
        read: &impl Fn(&[u8]) -> Result<Option<T>, NetlinkError>,
    ) -> Result<Option<Vec<T>>, NetlinkError>
    where
        M: NetlinkSerializable + NetlinkDeserializable + fmt::Debug,
    {
        let mut bytes = Vec::new();
        self.append(&mut bytes, Request { message, flags: NLM_F_DUMP });
        self.send(&bytes)?;
        let (mut all, mut interrupted) = (Vec::new(), false);
        loop {
            let datagram = self.receive()?;
            for (header, raw) in messages(&datagram) {
                if header.sequence_number != self.sequence {
                    continue;
                }
                interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                // Types below this are netlink's own: NLMSG_MIN_TYPE.
                if header.kind >= 0x10 {
                    all.extend(read(raw)?);
                    continue;
                }
                match NetlinkMessage::<M>::deserialize(raw).map_err(malformed)?.payload {
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(refusal(&error, header.flags, 0));
                    }
                    NetlinkPayload::Done(_) | NetlinkPayload::Error(_) => return Ok((!interrupted).then_some(all)),
                    _ => {}
                }
            }
        }
    }

    fn append<M: NetlinkSerializable>(&mut self, bytes: &mut Vec<u8>, request: Request<M>) {
        self.sequence = self.sequence.wrapping_add(1);
        self.sent += 1;
        let mut header = NetlinkHeader::default();
        header.flags = request.flags | NLM_F_REQUEST;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request.message));
        message.finalize();
        let start = bytes.len();
        // Messages start at multiples of NLMSG_ALIGNTO, 4 bytes.
        bytes.resize((start + message.buffer_len()).next_multiple_of(4), 0);
        if let Some(room) = bytes.get_mut(start..start + message.buffer_len()) {
            message.serialize(room);
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<(), NetlinkError> {
        let sent = self.socket.send(bytes, 0)?;
        if sent == bytes.len() { Ok(()) } else { Err(io::Error::from(io::ErrorKind::WriteZero).into()) }
    }

    fn receive(&mut self) -> Result<Vec<u8>, NetlinkError> {
        // With TRUNC the length is the datagram's, also when it did not fit.
        let (_, length) = rustix::io::retry_on_intr(|| {
            rustix::net::recv(self.socket.as_fd(), self.buffer.as_mut_slice(), RecvFlags::TRUNC)
        })
        .map_err(|errno| match errno {
            rustix::io::Errno::AGAIN => io::Error::new(io::ErrorKind::TimedOut, "the kernel did not answer"),
            other => other.into(),
        })?;
        self.buffer.get(..length).map(<[u8]>::to_vec).ok_or_else(|| malformed("longer than any the kernel sends"))
    }
}

/// Header of a message, as far as needed before its payload is looked at.
pub(crate) struct Header {
    pub(crate) kind: u16,
    flags: u16,
    sequence_number: u32,
}

pub(crate) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = (Header, &[u8])> {
    std::iter::from_fn(move || {
        let (header, _) = datagram.split_first_chunk::<HEADER_LEN>()?;
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *header;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok().filter(|&l| l >= HEADER_LEN)?;
        let message = datagram.get(..length)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((
            Header {
                kind: u16::from_ne_bytes([k0, k1]),
                flags: u16::from_ne_bytes([f0, f1]),
                sequence_number: u32::from_ne_bytes([s0, s1, s2, s3]),
            },
            message,
        ))
    })
}

fn refusal(error: &netlink_packet_core::ErrorMessage, flags: u16, index: usize) -> NetlinkError {
    // With NETLINK_CAP_ACK only the header of our request precedes the text.
    let text = (flags & NLM_F_ACK_TLVS != 0)
        .then(|| error.header.get(HEADER_LEN..))
        .flatten()
        .and_then(|attributes| {
            NlasIterator::new(attributes).filter_map(Result::ok).find(|nla| nla.kind() == NLMSGERR_ATTR_MSG)
        })
        .map(|nla| {
            let text = String::from_utf8_lossy(nla.value());
            text.trim_end_matches('\0').chars().take(200).flat_map(char::escape_default).collect()
        });
    NetlinkError { source: error.to_io(), text, index }
}
/// What was to be done to a link that is gone is done.
pub(crate) fn gone_is_done(result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    result.or_else(|error| if error.is(rustix::io::Errno::NODEV) { Ok(()) } else { Err(error) })
}
