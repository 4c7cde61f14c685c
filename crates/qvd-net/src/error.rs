use std::{fmt, io, net::Ipv4Addr};

use qvd_core::{DesktopId, ErrorKind, Missing};

use crate::{Subnet, netlink::NetlinkError};

/// What this crate reports. `Display` is one line and never repeats the cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What was asked for contradicts itself; the text says how.
    #[error("{0}")]
    Invalid(String),
    /// The host uses addresses of the subnet already.
    #[error("subnet {subnet} clashes with {with}: choose another")]
    SubnetClash {
        /// What was asked for.
        subnet: Subnet,
        /// The host's address or route, and its link.
        with: String,
    },
    /// The address is not one that a desktop of this network can have.
    #[error("address {address} is not one for desktops of subnet {subnet}")]
    AddressOutside {
        /// What was asked for.
        address: Ipv4Addr,
        /// Where it would have to be.
        subnet: Subnet,
    },
    /// Another desktop has the address.
    #[error("address {address} is taken by desktop {by}")]
    AddressTaken {
        /// What was asked for.
        address: Ipv4Addr,
        /// Who has it.
        by: DesktopId,
    },
    /// The desktop has a port.
    #[error("desktop {0} has a port already")]
    Attached(DesktopId),
    /// Every address is in use.
    #[error("no address is left in subnet {0}")]
    Exhausted(Subnet),
    /// Every subnet of a range is some tenant's.
    #[error("no subnet is left in {range}: {tenants} tenants have one each")]
    TenantsExhausted {
        /// What there was to give.
        range: String,
        /// To how many.
        tenants: u16,
    },
    /// Every bridge is full.
    #[error("no room is left on network {network}: {bridges} bridges have {ports} ports each")]
    NoRoom {
        /// Name of its first bridge.
        network: String,
        /// How many there are, which is how many there can be.
        bridges: usize,
        /// Ports of each.
        ports: u16,
    },
    /// There is no port to adopt.
    #[error("desktop {0} has no port here")]
    NoPort(DesktopId),
    /// This host lacks something. Retrying will not help.
    #[error("cannot {op} on this host: {missing}")]
    Unsupported {
        /// What was tried.
        op: &'static str,
        /// What would make it work.
        missing: Missing,
    },
    /// The kernel refused a request.
    #[error("cannot {op} `{object}`")]
    Netlink {
        /// What was tried.
        op: &'static str,
        /// On what.
        object: String,
        /// What the kernel said.
        source: NetlinkError,
    },
    /// A system call failed.
    #[error("cannot {op} `{object}`")]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        object: String,
        /// The cause.
        source: io::Error,
    },
    /// The rule set was not accepted as a whole; nothing of it is in force.
    #[error("cannot load the rules of `{table}`: {said}")]
    Rules {
        /// Name of the tables.
        table: String,
        /// First line of what the program said that loads them.
        said: String,
    },
    /// The kernel accepted something and then showed something else, so the
    /// port was not opened.
    #[error("`{object}` is not confined as asked for: {differs}")]
    NotConfined {
        /// The link.
        object: String,
        /// What differs.
        differs: String,
    },
    /// Some of the cleanup failed; the rest was done.
    #[error(transparent)]
    Teardown(#[from] TeardownErrors),
}

impl Error {
    /// What the caller can make of it.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid(_) | Self::SubnetClash { .. } | Self::AddressOutside { .. } | Self::AddressTaken { .. } => {
                ErrorKind::Invalid
            }
            Self::Attached(_) | Self::Exhausted(_) | Self::NoRoom { .. } | Self::TenantsExhausted { .. } => {
                ErrorKind::Busy
            }
            Self::NoPort(_) => ErrorKind::NotFound,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
            Self::Netlink { .. }
            | Self::Io { .. }
            | Self::Rules { .. }
            | Self::NotConfined { .. }
            | Self::Teardown(_) => ErrorKind::Failed,
        }
    }

    pub(crate) fn io(op: &'static str, object: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let object = object.into();
        move |source| Self::Io { op, object, source }
    }

    pub(crate) fn netlink(op: &'static str, object: impl Into<String>) -> impl FnOnce(NetlinkError) -> Self {
        let object = object.into();
        move |source| Self::Netlink { op, object, source }
    }
}

/// Every failure of a cleanup that went on after the first.
#[derive(Debug)]
pub struct TeardownErrors(Vec<Error>);

impl TeardownErrors {
    /// The failures, in the order they happened.
    #[must_use]
    pub fn errors(&self) -> &[Error] {
        &self.0
    }

    pub(crate) fn into_result(errors: Vec<Error>) -> Result<(), Error> {
        if errors.is_empty() { Ok(()) } else { Err(Self(errors).into()) }
    }
}

impl fmt::Display for TeardownErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, error) in self.0.iter().enumerate() {
            write!(f, "{}{error}", if n == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl std::error::Error for TeardownErrors {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.first().and_then(std::error::Error::source)
    }
}
