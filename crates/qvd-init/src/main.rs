//! Init of a desktop: PID 1, keeper of the session, the node's hand inside.
#![forbid(unsafe_code)]

mod boot;
mod desktop;
mod exec;
mod graphical;
mod init;
mod keymap;
mod log;
mod options;
mod reap;
mod session;
mod spawn;
mod stats;
mod still;
mod x11;

use std::{env, process::ExitCode};

fn main() -> ExitCode {
    // What the init starts of itself, as the session's user: nothing of that
    // runs in the process that the desktop depends on.
    match env::args().nth(1).as_deref() {
        None => init::run(),
        Some(boot::BOOT) => boot::run(),
        Some(boot::CARRY) => boot::carry(),
        Some(boot::NETWORK) => boot::place_in_network(env::args().nth(2)),
        Some(spawn::ENTER) => spawn::enter(env::args_os().skip(2)),
        Some(x11::WATCH) => x11::finish(x11::watch()),
        Some(x11::FIT) => x11::finish(x11::fit()),
        Some(x11::RESIZE) => x11::finish(x11::resize(env::args().nth(2).as_deref())),
        Some(x11::REDRAW) => x11::finish(x11::redraw()),
        Some(_) => ExitCode::from(2),
    }
}
