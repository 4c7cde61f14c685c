//! Watches that the rules stay what they are, and puts them back.

use std::{
    io,
    os::fd::AsFd,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use netlink_packet_core::NlasIterator;
use netlink_sys::{Socket, SocketAddr, protocols};
use qvd_sys::netns;
use rustix::{io::Errno, net::RecvFlags};

use crate::{
    Error, Mended, Network,
    network::Inner,
    waiter::{End, Waiter},
};

/// Group of what changes in `nf_tables`.
///
/// Source: Linux `include/uapi/linux/netfilter/nfnetlink.h`, `NFNLGRP_NFTABLES`.
const NFNLGRP_NFTABLES: u32 = 7;

/// End of a transaction, and the thread whose it was.
///
/// Source: Linux `include/uapi/linux/netfilter/nf_tables.h`, `NFT_MSG_NEWGEN`,
/// `NFTA_GEN_PROC_PID`; the upper octet is `NFNL_SUBSYS_NFTABLES`.
const NEW_GENERATION: u16 = 10 << 8 | 15;
const GENERATION_PID: u16 = 2;

/// Watches one network until it is closed. Dropping it ends it as well.
#[derive(Debug)]
#[must_use = "dropping it ends the watch"]
pub struct Guard(Waiter);

/// What a watch has seen to.
pub type Report = dyn Fn(&Result<Mended, Error>) + Send;

impl Network {
    /// Compares the rules with what they were loaded as whenever another process
    /// has changed any, and every `interval`, and mends them: see
    /// [`Network::mend`]. `report` hears of each time that something differed
    /// or could not be mended.
    ///
    /// # Errors
    /// This process may not listen to changes, or not start a thread.
    pub fn guard(&self, interval: Duration, report: Box<Report>) -> Result<Guard, Error> {
        let inner = Arc::clone(self.inner());
        let name = self.bridge_name();
        let changes = netns::in_netns(inner.netns(), listen).and_then(|opened| opened);
        let changes = changes.map_err(Error::io("listen to changes of the rules of", &*name))?;
        let watched = name.clone();
        Waiter::start("qvd-net-guard", "the watch over the rules", &name, move |end| {
            if let Err(error) = watch(&inner, &changes, end, interval, &*report) {
                tracing::error!(%error, network = watched, "the rules are no longer watched");
            }
        })
        .map(Guard)
    }
}

impl Guard {
    /// Ends the watch and waits for that. Done already is done.
    ///
    /// # Errors
    /// It could not be told; it still watches, and closing may be tried again.
    pub fn close(&mut self) -> Result<(), Error> {
        self.0.close()
    }
}

pub(crate) fn listen() -> io::Result<Socket> {
    let mut socket = Socket::new(protocols::NETLINK_NETFILTER)?;
    socket.bind(&SocketAddr::new(0, 0))?;
    socket.add_membership(NFNLGRP_NFTABLES)?;
    socket.set_non_blocking(true)?;
    Ok(socket)
}

fn watch(inner: &Inner, changes: &Socket, end: &End, interval: Duration, report: &Report) -> io::Result<()> {
    let mut check_at = Instant::now() + interval;
    while end.wait(&[changes.as_fd()], Some(check_at))? {
        let due = Instant::now() >= check_at;
        if changed_by_others(changes)? || due {
            let mended = inner.mend();
            if !matches!(mended, Ok(Mended { differed: None, .. })) {
                report(&mended);
            }
        }
        if due {
            check_at = Instant::now() + interval;
        }
    }
    Ok(())
}

/// Takes every message there is. What was lost may have been anybody's.
pub(crate) fn changed_by_others(changes: &Socket) -> io::Result<bool> {
    let (mut others, mut buffer) = (false, vec![0; 64 * 1024]);
    loop {
        match rustix::net::recv(changes.as_fd(), buffer.as_mut_slice(), RecvFlags::empty()) {
            Ok((_, length)) => others |= buffer.get(..length).is_some_and(is_of_others),
            Err(Errno::AGAIN) => return Ok(others),
            Err(Errno::NOBUFS) => others = true,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Whether a datagram ends a transaction of another process.
fn is_of_others(datagram: &[u8]) -> bool {
    crate::netlink::messages(datagram).any(|(header, message)| {
        let attributes = message.get(crate::netlink::HEADER_LEN + 4..).unwrap_or_default();
        let mut attributes = NlasIterator::new(attributes).filter_map(Result::ok);
        // What the kernel calls the process is a thread (`nf_tables_fill_gen_info` in Linux
        // `net/netfilter/nf_tables_api.c`): any of ours.
        let is_ours = |thread: u32| Path::new(&format!("/proc/self/task/{thread}")).exists();
        let of_us = |value: &[u8]| value.try_into().is_ok_and(|thread| is_ours(u32::from_be_bytes(thread)));
        header.kind == NEW_GENERATION
            && !attributes.any(|attribute| attribute.kind() == GENERATION_PID && of_us(attribute.value()))
    })
}
