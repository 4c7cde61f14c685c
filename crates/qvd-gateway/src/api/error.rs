//! From the farm's errors to HTTP's.

use std::fmt::Write as _;

use axum::{
    Json,
    extract::rejection::{JsonRejection, PathRejection, QueryRejection},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use qvd_farm::{ErrorKind, FarmError};
use rand::RngCore;

use super::{
    Caller,
    dto::{ErrorBody, ErrorInfo},
};

/// A refusal on its way out.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    info: ErrorInfo,
}

impl ApiError {
    /// Writes the whole story to the log under an id and tells the caller as
    /// much as it may know: causes name paths and addresses of the host.
    pub(super) fn new(caller: &Caller, error: &FarmError) -> Self {
        let cause = causes(error);
        let mut refusal = Self::plain(status_of(error.kind()), error.code(), error.to_string());
        let id = &refusal.info.id;
        if refusal.status.is_server_error() {
            tracing::error!(id, code = error.code(), %error, ?cause, "request failed");
        } else {
            tracing::info!(id, code = error.code(), %error, ?cause, "request refused");
        }
        if caller.is_admin() {
            refusal.info.cause = cause;
        }
        refusal.info.retry_after_s = error.retry_after().map(|wait| wait.as_secs() + 1);
        refusal
    }

    /// A refusal by the API itself.
    pub(super) fn plain(status: StatusCode, code: &str, message: impl Into<String>) -> Self {
        let info = ErrorInfo {
            code: code.to_owned(),
            message: message.into(),
            cause: Vec::new(),
            id: correlation_id(),
            retry_after_s: None,
        };
        Self { status, info }
    }

    pub(super) fn forbidden() -> Self {
        Self::plain(StatusCode::FORBIDDEN, "forbidden", "this takes an administrator")
    }

    pub(super) fn into_info(self) -> ErrorInfo {
        self.info
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let retry_after = self.info.retry_after_s;
        let mut response = (self.status, Json(ErrorBody { error: self.info })).into_response();
        if let Some(seconds) = retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        let (status, code) = match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => (StatusCode::PAYLOAD_TOO_LARGE, "body_too_large"),
            StatusCode::UNSUPPORTED_MEDIA_TYPE => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "not_json"),
            // A field that is wrong and a text that is no JSON are the same mistake here.
            _ => (StatusCode::BAD_REQUEST, "invalid_body"),
        };
        Self::plain(status, code, one_line(&rejection.body_text()))
    }
}

impl From<PathRejection> for ApiError {
    fn from(rejection: PathRejection) -> Self {
        Self::plain(StatusCode::BAD_REQUEST, "invalid_path", one_line(&rejection.body_text()))
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> Self {
        Self::plain(StatusCode::BAD_REQUEST, "invalid_query", one_line(&rejection.body_text()))
    }
}

fn status_of(kind: ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::Invalid => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorKind::Unauthenticated => StatusCode::UNAUTHORIZED,
        ErrorKind::Forbidden => StatusCode::FORBIDDEN,
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::Conflict => StatusCode::CONFLICT,
        ErrorKind::Busy => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::TooMany { .. } => StatusCode::TOO_MANY_REQUESTS,
        ErrorKind::Unsupported => StatusCode::NOT_IMPLEMENTED,
        ErrorKind::Timeout => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn causes(error: &FarmError) -> Vec<String> {
    qvd_core::causes(error).iter().skip(1).map(|cause| one_line(cause)).collect()
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Ties what a person reports to a line of the log; not a secret.
fn correlation_id() -> String {
    let mut bytes = [0; 6];
    rand::rng().fill_bytes(&mut bytes);
    bytes.iter().fold(String::new(), |mut id, byte| {
        if write!(id, "{byte:02x}").is_err() {
            // Writing to a string does not fail.
            id.push('-');
        }
        id
    })
}
