//! Why a gateway could not be made.

use std::{error::Error as StdError, io, net::SocketAddr, path::PathBuf};

type Cause = Box<dyn StdError + Send + Sync>;

/// Why a gateway could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GatewayError {
    /// Somebody else listens there.
    #[error("cannot listen on {address}: the port is in use; stop what listens there or choose another port")]
    PortInUse {
        /// What was asked for.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The address is not ours, or the port needs a privilege.
    #[error("cannot listen on {address}")]
    Listen {
        /// What was asked for.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// A file of the certificate could not be handled.
    #[error("cannot {op} `{}`", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file is not the PEM that it should be.
    #[error("cannot {op} `{}`", path.display())]
    Pem {
        /// What was tried.
        op: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Cause,
    },
    /// Certificate and key cannot be used, or do not belong together.
    #[error("cannot use the certificate `{}`", path.display())]
    Certificate {
        /// The certificate's file.
        path: PathBuf,
        /// What is wrong with it.
        source: Cause,
    },
    /// No certificate could be made.
    #[error("cannot make a self-signed certificate")]
    MakeCertificate(#[source] Cause),
}
