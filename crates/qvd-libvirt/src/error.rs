//! What this crate reports.

use std::{error::Error as StdError, io, time::Duration};

use qvd_core::DesktopId;

/// What went wrong. `Display` is one line and never repeats the cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What was asked for is wrong, or libvirt has nothing like it; asking again
    /// will not help.
    #[error("{what} is not usable: {reason}")]
    Invalid {
        /// Which part of the specification, with its value.
        what: String,
        /// The rule it breaks.
        reason: &'static str,
    },
    /// The specification is wrong for any virtualizer.
    #[error("the specification of desktop {id} is wrong")]
    Spec {
        /// Which desktop.
        id: DesktopId,
        /// What is wrong about it.
        source: qvd_virt::Error,
    },
    /// A file or system call failed.
    #[error("cannot {op}")]
    Io {
        /// What was tried: our verb and the object.
        op: String,
        /// Why it failed.
        source: io::Error,
    },
    /// libvirt refused or failed; its words are the cause.
    #[error("libvirt cannot {op}")]
    Libvirt {
        /// What was tried: our verb and the object.
        op: String,
        /// What libvirt says.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// There is a domain of that name that runs.
    #[error("desktop {0} has a domain that runs already")]
    Busy(DesktopId),
    /// Something took too long.
    #[error("cannot {op} within {limit:?}")]
    Timeout {
        /// What was tried.
        op: String,
        /// How long it could have taken.
        limit: Duration,
    },
}

/// Wraps what the standard library and rustix report.
pub(crate) fn io_error<E: Into<io::Error>>(op: impl Into<String>) -> impl FnOnce(E) -> Error {
    let op = op.into();
    move |source| Error::Io { op, source: source.into() }
}
