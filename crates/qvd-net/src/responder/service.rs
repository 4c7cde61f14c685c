//! The thread that listens and answers.

use std::{
    io,
    net::Ipv4Addr,
    os::fd::AsFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use qvd_sys::packet::{Instruction, PacketSocket};
use rustix::io::Errno;

use super::{Guest, Site, answer, frame, guests::Guests, router};
use crate::{
    Error, Mac,
    waiter::{End, Waiter},
};

/// Pause between two advertisements to a guest. Source: RFC 4861, 6.2.1,
/// `MaxRtrAdvInterval`.
const ADVERTISE_EVERY: Duration = Duration::from_secs(600);

/// Ethertypes.
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;

/// Name of the thread that answers; the kernel keeps fifteen octets.
pub(crate) const WORKER: &str = "qvd-answers";

/// Pause before another takes its place.
const RESTART_AFTER: Duration = Duration::from_millis(200);

/// Most frames that are taken from one socket before the other has its turn.
const TURN: usize = 64;

/// Answers the guests of one bridge until it is closed.
///
/// Dropping it ends it as well.
#[derive(Debug)]
#[must_use = "dropping it leaves guests without answers"]
pub struct Responder {
    shared: Arc<Shared>,
    thread: Waiter,
}

#[derive(Debug)]
struct Shared {
    site: Site,
    guests: Mutex<Guests>,
    /// The next frame is the worker's death.
    #[cfg(test)]
    doomed: std::sync::atomic::AtomicBool,
}

impl Shared {
    fn guests(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Responder {
    /// Listens on `bridge` of the calling thread's network namespace.
    ///
    /// # Errors
    /// There is no such bridge, or this process may not listen there.
    pub fn open(bridge: &str, site: Site) -> Result<Self, Error> {
        let sockets = listen(bridge, &site).map_err(Error::io("listen for questions on", bridge))?;
        let shared = Arc::new(Shared {
            site,
            guests: Mutex::default(),
            #[cfg(test)]
            doomed: std::sync::atomic::AtomicBool::default(),
        });
        let (of_thread, name) = (Arc::clone(&shared), bridge.to_owned());
        let run = move |end: &End| supervise(&of_thread, end, &name, sockets);
        Ok(Self { thread: Waiter::start("qvd-responder", "the responder", bridge, run)?, shared })
    }

    /// What guests are told alike.
    #[must_use]
    pub fn site(&self) -> &Site {
        &self.shared.site
    }

    /// Answers `guest` from now on; one with the same MAC is replaced.
    pub fn answer(&self, guest: Guest) {
        self.shared.guests().insert(guest, Instant::now());
    }

    /// Answers the guest with this MAC no longer.
    pub fn forget(&self, mac: Mac) {
        self.shared.guests().remove(mac);
    }

    /// Lets whoever answers die at the next question.
    #[cfg(test)]
    pub(crate) fn doom(&self) {
        self.shared.doomed.store(true, std::sync::atomic::Ordering::Relaxed);
    }

    /// Ends the thread and waits for that. Done already is done.
    ///
    /// # Errors
    /// It could not be told; it still runs, and closing may be tried again.
    pub fn close(&mut self) -> Result<(), Error> {
        self.thread.close()
    }
}

fn listen(bridge: &str, site: &Site) -> io::Result<Vec<PacketSocket>> {
    let mut sockets = vec![PacketSocket::open_filtered(bridge, IPV4, DHCP4)?];
    if site.gateway_ipv6.is_some() {
        sockets.push(PacketSocket::open_filtered(bridge, IPV6, DHCP6_OR_SOLICITATION)?);
    }
    Ok(sockets)
}

/// Has a thread answer that can do nothing else, and another when it dies: what
/// it reads, hostile desktops wrote.
fn supervise(shared: &Arc<Shared>, end: &End, bridge: &str, sockets: Vec<PacketSocket>) {
    let mut sockets = Some(sockets);
    loop {
        let opened = sockets.take().map_or_else(|| listen(bridge, &shared.site), Ok);
        let answered = opened.and_then(|sockets| {
            let (shared, end) = (Arc::clone(shared), end.clone());
            let worker = std::thread::Builder::new().name(WORKER.to_owned()).spawn(move || {
                qvd_sys::thread::confine_to_sockets()?;
                serve(&shared, &end, &sockets)
            })?;
            worker.join().unwrap_or_else(|_| Err(io::Error::other("it panicked")))
        });
        match answered {
            Ok(()) => return,
            Err(error) => tracing::error!(%error, bridge, "guests are not answered for a moment"),
        }
        // Not at once: whatever it was may still be so.
        if !matches!(end.wait(&[], Some(Instant::now() + RESTART_AFTER)), Ok(true)) {
            return;
        }
    }
}

fn serve(shared: &Shared, end: &End, sockets: &[PacketSocket]) -> io::Result<()> {
    let mut advertise_at = Instant::now() + ADVERTISE_EVERY;
    let heard: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
    while end.wait(&heard, Some(advertise_at))? {
        for socket in sockets {
            turn(shared, socket)?;
        }
        if Instant::now() >= advertise_at {
            advertise_at += ADVERTISE_EVERY;
            advertise(shared, sockets);
        }
    }
    Ok(())
}

fn turn(shared: &Shared, socket: &PacketSocket) -> io::Result<()> {
    for _ in 0..TURN {
        let frame = match socket.receive(Duration::ZERO) {
            Ok(Some(frame)) => frame,
            Ok(None) => return Ok(()),
            // The bridge is down for now.
            Err(error) if error.raw_os_error() == Some(Errno::NETDOWN.raw_os_error()) => return Ok(()),
            Err(error) => return Err(error),
        };
        #[cfg(test)]
        if shared.doomed.swap(false, std::sync::atomic::Ordering::Relaxed) {
            return Err(io::Error::other("a test wanted it"));
        }
        let Some((from, heard)) = frame::open(&frame) else { continue };
        let Some(guest) = shared.guests().admit(from, Instant::now()).cloned() else { continue };
        if let Some(said) = answer(&shared.site, &guest, &heard) {
            say(socket, &guest, &said);
        }
    }
    Ok(())
}

fn advertise(shared: &Shared, sockets: &[PacketSocket]) {
    let Some(socket) = sockets.last() else { return };
    let guests: Vec<_> = shared.guests().all().cloned().collect();
    for guest in guests {
        if let Some(said) = router::advertisement(&shared.site, &guest) {
            say(socket, &guest, &said);
        }
    }
}

/// A guest that did not hear it asks again.
fn say(socket: &PacketSocket, guest: &Guest, frame: &[u8]) {
    let to: Ipv4Addr = guest.ipv4;
    if let Err(error) = socket.send(frame) {
        tracing::debug!(%error, %to, "an answer was not sent");
    }
}

/// UDP to port 67, behind an IPv4 header without options.
const DHCP4: &[Instruction] = &[
    Instruction::load_octet(23),
    Instruction::skip_unless(17, 3),
    Instruction::load_two_octets(36),
    Instruction::skip_unless(67, 1),
    Instruction::ACCEPT,
    Instruction::REJECT,
];

/// UDP to port 547, or a router solicitation, behind a plain IPv6 header.
const DHCP6_OR_SOLICITATION: &[Instruction] = &[
    Instruction::load_octet(20),
    Instruction::skip_unless(17, 3),
    Instruction::load_two_octets(56),
    Instruction::skip_unless(547, 5),
    Instruction::ACCEPT,
    Instruction::skip_unless(58, 3),
    Instruction::load_octet(54),
    Instruction::skip_unless(133, 1),
    Instruction::ACCEPT,
    Instruction::REJECT,
];
