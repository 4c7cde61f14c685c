//! Control plane: users and their sign-in, flavours, desktops, sessions.
//!
//! A [`Farm`] keeps records in a database and asks a [`qvd_node::Host`] to act.
//! Everything that a client may do passes through it, whichever protocol the
//! client speaks, so the rules (who may, what is taken, how often) are here.
//!
//! ```no_run
//! # async fn example(node: std::sync::Arc<qvd_node::Node>) -> Result<(), qvd_farm::FarmError> {
//! use qvd_farm::{Database, Farm, NewDesktop, Secret};
//!
//! let farm = Farm::open(&Database::File("/var/lib/qvd/qvd.sqlite".into()), node).await?;
//! # let (ana, icewm): (qvd_core::UserName, qvd_core::FlavourName) = ("ana".parse().unwrap(), "icewm".parse().unwrap());
//! farm.add_user(&ana, &Secret::from("correct horse"), false).await?;
//! let desktop = farm.create_desktop(NewDesktop::new(ana, icewm)).await?;
//! let (news, _) = tokio::sync::mpsc::channel(16);
//! let timings = farm.start(desktop.id, news).await?;
//! println!("its session was ready after {} µs", timings.session_us);
//! # Ok(()) }
//! ```
//!
//! A [`FarmError`] has a kind, a word for programs that stays the same
//! ([`FarmError::code`]), and one line for people.
#![forbid(unsafe_code)]

mod clock;
mod database;
mod desktop;
mod error;
mod farm;
mod flavour;
mod limiter;
mod password;
mod row;
mod secret;
mod session;
mod store;
mod types;
mod user;

pub use clock::{Clock, SystemClock};
pub use database::{Database, PostgresUrl};
pub use error::{ErrorKind, FarmError};
pub use farm::Farm;
pub use secret::Secret;
pub use session::{NewSession, Session};
pub use types::{
    Desktop, DesktopInfo, Flavour, FlavourDefaults, NewDesktop, OwnedDesktops, Progress, SessionInfo, SessionKind, User,
};
