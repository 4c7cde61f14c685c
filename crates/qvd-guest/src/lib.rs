//! Protocol between a node and the init inside one of its desktops.
//!
//! The node makes a listening unix socket outside of the desktop's sight and
//! hands its descriptor to the init, so whoever can reach the socket is the
//! node, and a node process that comes back after a restart just connects
//! again. Each connection carries one [`Request`] and then a stream of
//! [`Reply`]s until either end closes it. Frames are a little-endian `u32`
//! length and that many bytes of JSON, at most [`MAX_FRAME`]; descriptors ride
//! along with a frame (`SCM_RIGHTS`).
//!
//! Displays need no path and no network: the init connects to the session's
//! socket from inside and passes the connected descriptor out.
//!
//! A virtual machine has one serial port instead of a socket. A [`Link`] makes
//! the same of it: whoever connects to a socket of the node's talks with the
//! init inside, and descriptors become streams on the way.
//!
//! What a node asks, and a client of any desktop may:
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::{os::unix::net::UnixStream, time::Duration};
//! use qvd_guest::{Channel, Reply, Request};
//!
//! let socket = UnixStream::connect("/run/qvd/desktops/7/init.sock")?;
//! let mut channel = Channel::new(socket.into());
//! channel.send(&Request::Stats, &[])?;
//! let (reply, _descriptors) = channel.recv::<Reply>(Duration::from_secs(5))?;
//! if let Reply::Stats(stats) = reply {
//!     println!("{} bytes in {} processes", stats.pss_bytes, stats.processes);
//! }
//! # Ok(()) }
//! ```
#![forbid(unsafe_code)]

mod boot;
mod bridge;
mod channel;
mod connections;
mod frame;
mod link;
mod message;
mod stream;

pub use boot::{
    BASE_SERIAL, Base, BootConfig, Booted, HOME_SERIAL, Identity, Network, Network6, ROOT_SERIAL, Writable,
};
pub use channel::{Channel, ChannelError, MAX_FDS, MAX_FRAME};
pub use connections::has_streams;
pub use frame::{LinkError, frames_of};
pub use link::{Carrier, GuestLink, Link, carry_in_guest};
pub use message::{
    ExecRequest, Exit, GuestError, GuestMemory, InitConfig, Reply, Request, STILL_MAX, SessionConfig, SessionState,
    Stats, VERSION,
};

/// Descriptors that the init inherits besides standard input, output and error.
pub mod fds {
    /// The listening unix socket that the node's orders arrive on.
    pub const CONTROL: u8 = 3;
    /// A sealed memory file with [`crate::InitConfig`] as JSON.
    pub const CONFIG: u8 = 4;
}
