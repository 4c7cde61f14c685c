//! Why a call failed.

use std::{error::Error as StdError, time::Duration};

use axum::http::StatusCode;

use crate::api::dto::ErrorInfo;

/// Why a call of the API gave no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody answers there: the daemon does not run, or this user may not.
    #[error("cannot connect to the daemon at `{at}`")]
    Connect {
        /// Address of the daemon.
        at: String,
        /// Why.
        source: std::io::Error,
    },
    /// The daemon refused, or failed.
    #[error("{}", info.message)]
    Refused {
        /// HTTP status of the answer.
        status: StatusCode,
        /// What the daemon says.
        info: ErrorInfo,
    },
    /// The daemon said nothing for too long.
    #[error("the daemon did not answer within {0:?}")]
    Timeout(Duration),
    /// The connection ended, or what came is not of this API.
    #[error("cannot {op} the daemon")]
    Protocol {
        /// What was tried.
        op: &'static str,
        /// Why it failed.
        source: Box<dyn StdError + Send + Sync>,
    },
}

impl ClientError {
    /// The daemon's stable word for what went wrong, if it was the daemon that refused.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { info, .. } => Some(&info.code),
            _ => None,
        }
    }

    /// HTTP status of a refusal.
    #[must_use]
    pub const fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    pub(in crate::api) fn protocol(op: &'static str) -> impl Fn(Box<dyn StdError + Send + Sync>) -> Self {
        move |source| Self::Protocol { op, source }
    }
}
