use std::{error::Error as StdError, fmt, time::Duration};

use qvd_node::{HostError, HostErrorKind};
use sqlx::sqlite::SqliteError;

/// What somebody who has to choose a next step needs to know of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// What was asked for is wrong; asking again will not help.
    Invalid,
    /// Nobody is signed in, or the name or the password is wrong.
    Unauthenticated,
    /// This user may not.
    Forbidden,
    /// There is no such thing.
    NotFound,
    /// It contradicts what exists: a name or an address that is taken.
    Conflict,
    /// Somebody holds it; later it may work.
    Busy,
    /// Asked too often.
    TooMany {
        /// When the next attempt will be heard.
        retry_after: Duration,
    },
    /// This host cannot do it; another may.
    Unsupported,
    /// A step did not end within its deadline.
    Timeout,
    /// It was tried and failed.
    Failed,
}

impl ErrorKind {
    /// The code of errors that have no more precise one.
    const fn code(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::Unauthenticated => "unauthenticated",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::Conflict => "conflict",
            Self::Busy => "busy",
            Self::TooMany { .. } => "too_many_attempts",
            Self::Unsupported => "unsupported",
            Self::Timeout => "timeout",
            Self::Failed => "failed",
        }
    }
}

/// What the control plane reports. `Display` is one line and does not repeat
/// the cause: that is what `source()` is for.
#[derive(Debug)]
pub struct FarmError {
    kind: ErrorKind,
    code: &'static str,
    what: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl FarmError {
    /// An error with the general code of its kind.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self { kind, code: kind.code(), what: what.into(), source: None }
    }

    /// An error with a code of its own: snake case, never changed once released.
    pub fn with_code(kind: ErrorKind, code: &'static str, what: impl Into<String>) -> Self {
        Self { kind, code, what: what.into(), source: None }
    }

    /// The same error with its cause behind it.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What the caller can make of it.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// A stable word for programs: `unknown_flavour`, `address_taken`, ….
    #[must_use]
    pub const fn code(&self) -> &'static str {
        self.code
    }

    /// When to try again, for [`ErrorKind::TooMany`].
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        match self.kind {
            ErrorKind::TooMany { retry_after } => Some(retry_after),
            _ => None,
        }
    }

    pub(crate) fn store(op: &'static str, source: sqlx::Error) -> Self {
        let kind = if is_busy(&source) { ErrorKind::Busy } else { ErrorKind::Failed };
        Self::with_code(kind, "store_failed", format!("cannot {op} in the farm's database")).because(source)
    }

    /// `what` is our verb and its object: `cannot start desktop 7`.
    pub(crate) fn host(what: impl Into<String>, source: HostError) -> Self {
        let kind = match source.kind() {
            HostErrorKind::NotRunning => {
                return Self::with_code(ErrorKind::Conflict, "not_running", what).because(source);
            }
            HostErrorKind::Invalid => ErrorKind::Invalid,
            HostErrorKind::NotFound => ErrorKind::NotFound,
            HostErrorKind::Busy => ErrorKind::Busy,
            HostErrorKind::Unsupported => ErrorKind::Unsupported,
            HostErrorKind::Timeout => ErrorKind::Timeout,
            _ => ErrorKind::Failed,
        };
        Self::new(kind, what).because(source)
    }
}

/// Whether somebody else holds the database, and it may work later.
fn is_busy(error: &sqlx::Error) -> bool {
    let sqlx::Error::Database(error) = error else { return false };
    let Some(code) = error.code() else { return false };
    if error.try_downcast_ref::<SqliteError>().is_some() {
        // SQLITE_BUSY (5) in any of its extended forms: the low byte is the
        // primary code. Source: sqlite.org/rescode.html.
        return code.parse::<i32>().is_ok_and(|code| code & 0xff == 5);
    }
    // Too many connections, a lock not got in time, a server that begins or ends.
    // Source: PostgreSQL's manual, appendix A.
    ["53300", "55P03", "57P01", "57P03"].contains(&&*code)
}

impl fmt::Display for FarmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl StdError for FarmError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
