//! What this crate reports.

use std::{io, time::Duration};

use qvd_core::{DesktopId, Missing};
use qvd_sys::process::SpawnError;

/// What went wrong. `Display` is one line and never repeats the cause: that
/// is what `source()` is for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What was asked for is wrong; asking again will not help.
    #[error("{what} is not usable: {reason}")]
    Invalid {
        /// Which part of the specification, with its value.
        what: String,
        /// The rule it breaks.
        reason: &'static str,
    },
    /// A file or system call failed.
    #[error("cannot {op}")]
    Io {
        /// What was tried: our verb and the object.
        op: String,
        /// Why it failed.
        source: io::Error,
    },
    /// This host lacks something without which nothing would be confined.
    #[error("cannot {op} on this host: {missing}")]
    Unsupported {
        /// What was tried.
        op: &'static str,
        /// What is missing.
        missing: Missing,
    },
    /// A container of this number runs already, or something of it is left
    /// that cannot be removed yet.
    #[error("desktop {0} has processes already")]
    Busy(DesktopId),
    /// The container did not get as far as its program.
    #[error("cannot start desktop {id}")]
    Start {
        /// Which one.
        id: DesktopId,
        /// The step that failed.
        source: SpawnError,
    },
    /// This host, or what was asked for, confines less than the policy requires.
    #[error("desktop {id} would run without {missing}, which its policy requires")]
    Weaker {
        /// Which one.
        id: DesktopId,
        /// What is not enforced.
        missing: String,
    },
    /// QEMU ended before the machine was there, or would not have it.
    #[error("QEMU cannot run desktop {id}: {said}")]
    Hypervisor {
        /// Which one.
        id: DesktopId,
        /// What QEMU said.
        said: String,
    },
    /// A machine cannot be driven.
    #[error("cannot drive the machine of desktop {id}")]
    Qmp {
        /// Which one.
        id: DesktopId,
        /// What failed.
        source: crate::vm::QmpError,
    },
    /// Something took too long.
    #[error("cannot {op} within {limit:?}")]
    Timeout {
        /// What was tried.
        op: String,
        /// How long it could have taken.
        limit: Duration,
    },
}

/// Wraps what the standard library and rustix report, for virtualizers: `op` is
/// the verb and the object.
pub fn io_error<E: Into<io::Error>>(op: impl Into<String>) -> impl FnOnce(E) -> Error {
    let op = op.into();
    move |source| Error::Io { op, source: source.into() }
}
