//! Errors as the caller meets them: one line, and an exit status.

use std::{io, io::Write, process::ExitCode};

use anyhow::Error;
use qvd_farm::{ErrorKind, FarmError};
use qvd_gateway::{GatewayError, api::ClientError};
use qvd_node::{HostError, HostErrorKind};
use serde_json::json;

use crate::output::{Output, one_line};

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// It was tried and failed.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// This host cannot do it.
    Unsupported = 3,
    /// There is no such thing.
    NotFound = 4,
    /// Somebody holds it; later it may work.
    Busy = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        // The discriminants are the statuses.
        Self::from(exit as u8)
    }
}

/// An error of the command itself, with the status that fits it.
#[derive(Debug)]
pub(crate) struct Refusal {
    exit: Exit,
    text: String,
}

impl Refusal {
    pub(crate) fn new(exit: Exit, text: impl Into<String>) -> Self {
        Self { exit, text: text.into() }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Refusal {}

/// The status that fits an error: that of the first in its chain that knows.
fn exit_of(error: &Error) -> Exit {
    error.chain().find_map(exit_of_one).unwrap_or(Exit::Failed)
}

fn exit_of_one(error: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if let Some(refusal) = error.downcast_ref::<Refusal>() {
        return Some(refusal.exit);
    }
    if let Some(error) = error.downcast_ref::<FarmError>() {
        return match error.kind() {
            ErrorKind::Invalid => Some(Exit::Usage),
            ErrorKind::NotFound => Some(Exit::NotFound),
            ErrorKind::Busy | ErrorKind::Conflict | ErrorKind::TooMany { .. } => Some(Exit::Busy),
            ErrorKind::Unsupported => Some(Exit::Unsupported),
            _ => Some(Exit::Failed),
        };
    }
    if let Some(error) = error.downcast_ref::<HostError>() {
        return match error.kind() {
            HostErrorKind::Invalid => Some(Exit::Usage),
            HostErrorKind::NotFound => Some(Exit::NotFound),
            HostErrorKind::Busy => Some(Exit::Busy),
            HostErrorKind::Unsupported => Some(Exit::Unsupported),
            _ => Some(Exit::Failed),
        };
    }
    if let Some(error) = error.downcast_ref::<qvd_storage::Error>() {
        return match error.kind() {
            qvd_storage::ErrorKind::Invalid => Some(Exit::Usage),
            qvd_storage::ErrorKind::NotFound => Some(Exit::NotFound),
            qvd_storage::ErrorKind::Busy => Some(Exit::Busy),
            qvd_storage::ErrorKind::Unsupported => Some(Exit::Unsupported),
            _ => Some(Exit::Failed),
        };
    }
    if error.is::<qvd_storage::RecipeError>() {
        return Some(Exit::Usage);
    }
    if let Some(error) = error.downcast_ref::<ClientError>() {
        return Some(error.code().map_or(Exit::Failed, exit_of_code));
    }
    match error.downcast_ref::<GatewayError>()? {
        GatewayError::PortInUse { .. } => Some(Exit::Busy),
        GatewayError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => Some(Exit::NotFound),
        _ => Some(Exit::Failed),
    }
}

/// The status that fits a word of the daemon's: a failure half-way has no HTTP
/// status of its own, so the words decide everywhere.
fn exit_of_code(code: &str) -> Exit {
    match code {
        "not_found" => Exit::NotFound,
        "busy" | "conflict" | "too_many_attempts" | "user_has_desktops" | "desktop_removing" | "desktop_blocked" => {
            Exit::Busy
        }
        "invalid" => Exit::Usage,
        "unsupported" => Exit::Unsupported,
        _ if code.starts_with("unknown_") => Exit::NotFound,
        _ if code.starts_with("invalid_") => Exit::Usage,
        _ if code.ends_with("_taken") || code.ends_with("_exists") => Exit::Busy,
        _ => Exit::Failed,
    }
}

/// The error and its causes, those that the daemon tells of included.
fn message(error: &Error) -> String {
    let mut message = qvd_core::causes(error.as_ref()).join(": ");
    for client in error.chain().filter_map(|e| e.downcast_ref::<ClientError>()) {
        match client {
            ClientError::Refused { info, .. } => info.cause.iter().for_each(|cause| message += &format!(": {cause}")),
            ClientError::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                message += "; this takes root";
            }
            ClientError::Connect { .. } => message += "; does `qvd up` run?",
            _ => {}
        }
    }
    one_line(&message)
}

/// Tells why a command failed and what its status is.
pub(crate) fn report(error: &Error, output: &Output) -> ExitCode {
    // Whoever reads our output left: there is nobody to tell and nothing failed.
    if error.chain().any(|e| e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe))
        && output.is_closed()
    {
        return ExitCode::SUCCESS;
    }
    let exit = exit_of(error);
    say(&message(error), exit, output.is_json());
    exit.into()
}

/// Tells what is wrong with a command line; help and version are no errors.
pub(crate) fn usage(error: &clap::Error, json: bool) -> ExitCode {
    if !error.use_stderr() {
        // As above: a reader that left is no error.
        return error.print().map_or(ExitCode::SUCCESS, |()| ExitCode::SUCCESS);
    }
    if json {
        let text = error.to_string();
        let first = text.split("\n\n").next().unwrap_or_default();
        say(&one_line(first.strip_prefix("error: ").unwrap_or(first)), Exit::Usage, true);
    } else if error.print().is_err() {
        return ExitCode::FAILURE;
    }
    Exit::Usage.into()
}

fn say(message: &str, exit: Exit, json: bool) {
    let word = match exit {
        Exit::Failed => "failed",
        Exit::Usage => "usage",
        Exit::Unsupported => "unsupported",
        Exit::NotFound => "not_found",
        Exit::Busy => "busy",
    };
    let line = if json {
        json!({"error": {"kind": word, "exit": exit as u8, "message": message}}).to_string()
    } else {
        format!("qvd: {message}")
    };
    // Without a standard error the status has to do.
    drop(writeln!(io::stderr(), "{line}"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    fn in_context(error: impl std::error::Error + Send + Sync + 'static) -> Error {
        Err::<(), _>(error).context("cannot start desktop 7").unwrap_err()
    }

    #[test]
    fn the_status_is_that_of_the_cause() {
        let host = |kind| exit_of(&in_context(HostError::new(kind, "no such thing")));
        assert_eq!(host(HostErrorKind::NotFound), Exit::NotFound);
        assert_eq!(host(HostErrorKind::Unsupported), Exit::Unsupported);
        assert_eq!(host(HostErrorKind::Timeout), Exit::Failed);
        let farm = |kind| exit_of(&in_context(FarmError::new(kind, "no such thing")));
        assert_eq!(farm(ErrorKind::Invalid), Exit::Usage);
        assert_eq!(farm(ErrorKind::Conflict), Exit::Busy);
        assert_eq!(exit_of(&in_context(io::Error::other("disk"))), Exit::Failed);
        assert_eq!(exit_of(&in_context(Refusal::new(Exit::Busy, "held"))), Exit::Busy);
    }

    #[test]
    fn an_error_is_one_line_with_its_causes() {
        let error = in_context(io::Error::other("first\nsecond"));
        assert_eq!(message(&error), "cannot start desktop 7: first second");
    }
}
