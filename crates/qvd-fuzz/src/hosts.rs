//! What desktops and machines say to the node that runs them.

use std::{
    io::Write,
    net::Shutdown,
    os::{fd::OwnedFd, unix::net::UnixStream},
    time::Duration,
};

use qvd_guest::{BootConfig, Channel, InitConfig, Reply, Request};
use qvd_virt::vm::{Qmp, lines_of};

use crate::World;

/// Less than a socket takes without anybody reading.
const SAID_MAX_BYTES: usize = 64 << 10;
/// All that comes is there already.
const LIMIT: Duration = Duration::from_secs(10);

/// A socket whose other end has said this and says no more, and that end.
fn said(bytes: &[u8]) -> (UnixStream, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    drop(theirs.write(bytes.get(..SAID_MAX_BYTES).unwrap_or(bytes)));
    theirs.shutdown(Shutdown::Write).unwrap();
    (ours, theirs)
}

/// Frames of a machine's link, and messages of an init.
pub(crate) fn guest(_: &World, bytes: &[u8]) -> bool {
    drop(serde_json::from_slice::<InitConfig>(bytes));
    drop(serde_json::from_slice::<BootConfig>(bytes));
    let frames = qvd_guest::frames_of(bytes);
    let (ours, _theirs) = said(bytes);
    let mut replies = Channel::new(OwnedFd::from(ours));
    let mut heard = 0;
    while let Ok((_, fds)) = replies.recv::<Reply>(LIMIT) {
        assert!(fds.is_empty());
        heard += 1;
    }
    let (ours, _theirs) = said(bytes);
    let mut requests = Channel::new(OwnedFd::from(ours));
    while requests.recv::<Request>(LIMIT).is_ok() {
        heard += 1;
    }
    frames + heard > 0
}

/// Lines of QEMU's control socket.
pub(crate) fn qmp(_: &World, bytes: &[u8]) -> bool {
    let lines = lines_of(bytes);
    let (ours, _theirs) = said(bytes);
    if let Ok(mut qmp) = Qmp::greet(ours, LIMIT) {
        while let Ok(Some(_)) = qmp.event(LIMIT) {}
    }
    lines > 0
}

/// Frames that machines send to whoever tells them their addresses.
pub(crate) fn frames(_: &World, bytes: &[u8]) -> bool {
    qvd_net::responder::is_answered(bytes)
}

/// The kernel's log of dropped frames, which desktops wrote.
pub(crate) fn log(_: &World, bytes: &[u8]) -> bool {
    qvd_net::samples_of(bytes) > 0
}
