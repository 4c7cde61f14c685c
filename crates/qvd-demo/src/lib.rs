//! What a browser does, done by a program: signs in over HTTPS, opens the
//! display's WebSocket as noVNC does, and looks at what it shows. The
//! demonstration runs on it, and so do the tests of the whole.
#![forbid(unsafe_code)]

mod browser;
mod native;
pub mod rfb;
mod server;

pub use browser::{Browser, Display};
pub use native::{Listed, Native, Nx};
pub use server::{Server, Setup};
