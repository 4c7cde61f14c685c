//! Events on standard error.

use std::io::{self, IsTerminal};

use tracing_subscriber::filter::{EnvFilter, LevelFilter};

/// Shows events from `level` on, more for each `-v`. `RUST_LOG` overrides both.
pub(crate) fn start(level: LevelFilter, verbose: u8, json: bool) {
    let level = match (level, verbose) {
        (level, 0) => level,
        (LevelFilter::WARN, 1) => LevelFilter::INFO,
        (LevelFilter::INFO, 1) | (LevelFilter::WARN, _) => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let filter = EnvFilter::builder().with_default_directive(level.into()).from_env_lossy();
    let subscriber =
        tracing_subscriber::fmt().with_writer(io::stderr).with_ansi(io::stderr().is_terminal()).with_env_filter(filter);
    if json { subscriber.json().init() } else { subscriber.with_target(false).init() }
}
