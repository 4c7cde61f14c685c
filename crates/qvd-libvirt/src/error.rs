//! What this crate reports.

use std::error::Error as StdError;

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
    /// What every virtualizer may meet: a file or a system call failed.
    #[error(transparent)]
    Host(#[from] qvd_virt::Error),
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
}
