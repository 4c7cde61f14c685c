//! Hears samples of what is dropped, and tells of them now and then.

use std::{
    collections::BTreeMap,
    fmt, io,
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use netlink_sys::{Socket, SocketAddr, protocols};
use qvd_core::{DesktopId, Instance};
use qvd_sys::netns;
use rustix::{io::Errno, net::RecvFlags};

use super::{
    DropReason, Sample,
    sample::{Logged, SNAP_OCTETS, logged},
};
use crate::{
    Error, Network,
    network::{Inner, lock},
    waiter::{End, Waiter},
};

/// What was dropped of a desktop in a span of time, for one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Dropped {
    /// Whose frames.
    pub desktop: DesktopId,
    /// Why.
    pub reason: DropReason,
    /// How many frames.
    pub frames: u64,
    /// In which time.
    pub within: Duration,
    /// One of them.
    pub sample: Sample,
}

impl fmt::Display for Dropped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { desktop, reason, frames, within, sample } = self;
        write!(
            f,
            "desktop {desktop}: {frames} frames dropped in {} s: {reason} (one: {sample})",
            within.as_secs().max(1)
        )
    }
}

/// What hears of it.
pub type DropReport = dyn Fn(&Dropped) + Send;

/// Tells of what is dropped until it is closed. Dropping it ends it as well.
#[derive(Debug)]
#[must_use = "dropping it ends the watch"]
pub struct DropWatch(Waiter);

/// The group of the kernel's log that a network's samples go to.
pub(crate) fn log_group(instance: Instance) -> u16 {
    u16::from_str_radix(&instance.to_string(), 16).unwrap_or_default()
}

impl Network {
    /// Tells `report` of what is dropped, at most once in `interval` for each
    /// desktop and reason: how many frames, and one of them. The kernel gives
    /// some samples a minute of each, so a flood costs no more than a drop.
    ///
    /// # Errors
    /// This process may not listen, or this kernel has no such log
    /// (`nfnetlink_log`); what is dropped is counted all the same.
    pub fn watch_drops(&self, interval: Duration, report: Box<DropReport>) -> Result<DropWatch, Error> {
        let (inner, name) = (Arc::clone(self.inner()), self.bridge_name());
        let group = log_group(inner.config.instance);
        let log = netns::in_netns(inner.netns(), || listen(group)).and_then(|opened| opened);
        let log = log.map_err(Error::io("listen to what is dropped on", &*name))?;
        let known = inner.filter.all_drops()?;
        let mut watch = Watch { inner, known, waiting: BTreeMap::new() };
        let watched = name.clone();
        Waiter::start("qvd-net-drops", "the watch over what is dropped", &name, move |end| {
            if let Err(error) = watch.run(&log, end, interval, &*report) {
                tracing::error!(%error, network = watched, "what is dropped is no longer told");
            }
        })
        .map(DropWatch)
    }
}

impl DropWatch {
    /// Ends the watch and waits for that. Done already is done.
    ///
    /// # Errors
    /// It could not be told; it still watches, and closing may be tried again.
    pub fn close(&mut self) -> Result<(), Error> {
        self.0.close()
    }
}

/// Who is counted: a port's link, or a MAC behind the bridge; and the mark.
pub(crate) type Counted = BTreeMap<(String, u32), u64>;

struct Watch {
    inner: Arc<Inner>,
    /// What was counted when it was last told.
    known: Counted,
    /// What has to be told.
    waiting: BTreeMap<(DesktopId, DropReason), Sample>,
}

impl Watch {
    fn run(&mut self, log: &Socket, end: &End, interval: Duration, report: &DropReport) -> io::Result<()> {
        let (mut tell_at, mut buffer) = (None::<Instant>, vec![0; 64 * 1024]);
        while end.wait(&[log.as_fd()], tell_at)? {
            self.hear(log, &mut buffer)?;
            if !self.waiting.is_empty() {
                let at = *tell_at.get_or_insert_with(|| Instant::now() + interval);
                if Instant::now() >= at {
                    tell_at = None;
                    self.tell(interval, report);
                }
            }
        }
        Ok(())
    }

    fn hear(&mut self, log: &Socket, buffer: &mut [u8]) -> io::Result<()> {
        loop {
            match rustix::net::recv(log.as_fd(), &mut *buffer, RecvFlags::empty()) {
                Ok((_, length)) => {
                    for Logged { mark, link, sample } in logged(buffer.get(..length).unwrap_or_default()) {
                        let reason = DropReason::of_mark(mark);
                        if let Some((desktop, reason)) = self.whose(link, &sample).zip(reason) {
                            self.waiting.insert((desktop, reason), sample);
                        }
                    }
                }
                Err(Errno::AGAIN) => return Ok(()),
                // Some were lost: they were samples anyway.
                Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn whose(&self, link: u32, sample: &Sample) -> Option<DesktopId> {
        let open = lock(&self.inner.open);
        let from = sample.macs.map(|(_, from)| from);
        let by_link = || open.iter().find(|(_, record)| record.index == link);
        let by_mac = || open.iter().find(|(_, record)| Some(record.identity.mac.octets()) == from);
        by_link().or_else(by_mac).map(|(&desktop, _)| desktop)
    }

    fn tell(&mut self, within: Duration, report: &DropReport) {
        let now = match self.inner.filter.all_drops() {
            Ok(now) => now,
            Err(error) => {
                tracing::warn!(%error, "cannot count what was dropped");
                Counted::new()
            }
        };
        for ((desktop, reason), sample) in std::mem::take(&mut self.waiting) {
            let of = |record: &crate::mend::Record| {
                let identity = &record.identity;
                if reason.is_behind_bridge() { identity.mac.to_string() } else { identity.link.clone() }
            };
            let Some(who) = lock(&self.inner.open).get(&desktop).map(of) else { continue };
            let key = (who, reason.mark());
            let counted = |all: &Counted| all.get(&key).copied().unwrap_or_default();
            let frames = counted(&now).saturating_sub(counted(&self.known)).max(1);
            report(&Dropped { desktop, reason, frames, within, sample });
        }
        self.known = now;
    }
}

/// A configuration of the log, and its parts. Source: Linux
/// `include/uapi/linux/netfilter/nfnetlink_log.h`, `NFULNL_MSG_CONFIG`; the
/// upper octet is `NFNL_SUBSYS_ULOG`.
const CONFIG: u16 = 4 << 8 | 1;
const CONFIG_COMMAND: u16 = 1;
const CONFIG_MODE: u16 = 2;
const CONFIG_THRESHOLD: u16 = 5;
const COMMAND_BIND: u8 = 1;
const COPY_PACKET: u8 = 2;

/// Source: Linux `include/uapi/linux/netlink.h`, `NLM_F_REQUEST | NLM_F_ACK`, `NLMSG_ERROR`.
const REQUEST: u16 = 5;
const NLMSG_ERROR: u16 = 2;

/// Whether this kernel has such a log. One whose group somebody listens to has.
pub(crate) fn has_log(group: u16) -> bool {
    let lacks = [Errno::INVAL, Errno::OPNOTSUPP, Errno::PROTONOSUPPORT].map(|errno| Some(errno.raw_os_error()));
    listen(group).err().is_none_or(|error| !lacks.contains(&error.raw_os_error()))
}

/// Listens to a group of the log in the calling thread's namespace.
fn listen(group: u16) -> io::Result<Socket> {
    let mut socket = Socket::new(protocols::NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    configure(&socket, group, CONFIG_COMMAND, &[COMMAND_BIND])?;
    let [a, b, c, d] = SNAP_OCTETS.to_be_bytes();
    configure(&socket, group, CONFIG_MODE, &[a, b, c, d, COPY_PACKET, 0])?;
    // Each at once: there are few.
    configure(&socket, group, CONFIG_THRESHOLD, &1_u32.to_be_bytes())?;
    socket.set_non_blocking(true)?;
    Ok(socket)
}

fn configure(socket: &Socket, group: u16, kind: u16, value: &[u8]) -> io::Result<()> {
    let attribute = u16::try_from(4 + value.len()).map_err(io::Error::other)?;
    let mut message = vec![0; 4];
    for part in [CONFIG, REQUEST] {
        message.extend(part.to_ne_bytes());
    }
    // Sequence and sender; family, version and group; the attribute.
    message.extend([0; 8]);
    message.extend([0, 0]);
    message.extend(group.to_be_bytes());
    message.extend(attribute.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
    let length = u32::try_from(message.len()).map_err(io::Error::other)?.to_ne_bytes();
    if let Some(room) = message.get_mut(..4) {
        room.copy_from_slice(&length);
    }
    socket.send(&message, 0)?;
    // Packets of a group that is bound already may come first.
    for _ in 0..64 {
        let (answer, _) = socket.recv_from_full()?;
        for (header, message) in crate::netlink::messages(&answer) {
            if header.kind == NLMSG_ERROR {
                let code =
                    message.get(16..20).and_then(|code| code.first_chunk()).map_or(0, |&c| i32::from_ne_bytes(c));
                return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
            }
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel did not answer"))
}
