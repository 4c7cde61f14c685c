//! Control plane: users and their sign-in, flavours, desktops, sessions.
//!
//! A [`Farm`] keeps records in a database and asks a [`qvd_node::Host`] to act.
//! Everything that a client may do passes through it, whichever protocol the
//! client speaks, so the rules (who may, what is taken, how often) are here.
#![forbid(unsafe_code)]

mod clock;
mod desktop;
mod error;
mod farm;
mod flavour;
mod limiter;
mod password;
mod row;
mod secret;
mod session;
mod types;
mod user;

pub use clock::{Clock, SystemClock};
pub use error::{ErrorKind, FarmError};
pub use farm::Farm;
pub use secret::Secret;
pub use session::{NewSession, Session};
pub use types::{
    Desktop, DesktopInfo, Flavour, FlavourDefaults, NewDesktop, OwnedDesktops, Progress, SessionInfo, SessionKind, User,
};
