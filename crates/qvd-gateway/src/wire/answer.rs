//! Answers of the QVD wire protocol, from values to bytes.

use std::{error::Error as StdError, fmt::Write as _};

use qvd_farm::{ErrorKind, FarmError};

use super::{
    head::{HeadError, QueryError, one_line},
    parameters::ParameterError,
};

/// A final answer to one request.
#[derive(Debug)]
pub(crate) struct Answer {
    status: u16,
    content_type: &'static str,
    headers: Vec<(&'static str, String)>,
    body: String,
    close: bool,
}

impl Answer {
    pub(crate) fn text(text: impl Into<String>) -> Self {
        let content_type = "text/plain; charset=utf-8";
        Self { status: 200, content_type, headers: Vec::new(), body: text.into(), close: false }
    }

    pub(crate) fn json(value: &serde_json::Value) -> Self {
        let content_type = "application/json";
        Self { status: 200, content_type, headers: Vec::new(), body: value.to_string(), close: false }
    }

    /// The connection ends after this answer.
    #[must_use]
    pub(crate) const fn closing(mut self) -> Self {
        self.close = true;
        self
    }

    pub(crate) const fn status(&self) -> u16 {
        self.status
    }

    pub(crate) const fn closes(&self) -> bool {
        self.close
    }

    /// The bytes on the wire.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut head = format!(
            "HTTP/1.1 {} {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n",
            self.status,
            reason(self.status),
            self.content_type,
            self.body.len()
        );
        for (name, value) in &self.headers {
            // Writing to a string cannot fail.
            let _written = write!(head, "{name}: {value}\r\n");
        }
        if self.close {
            head.push_str("Connection: close\r\n");
        }
        head.push_str("\r\n");
        head.push_str(&self.body);
        head.into_bytes()
    }
}

/// A request that is not carried out, with a code for programs and a text for
/// people.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    pub(crate) code: &'static str,
    pub(crate) text: String,
    pub(crate) retry_after_s: Option<u64>,
    /// For the log alone.
    pub(crate) cause: String,
}

impl Refusal {
    pub(crate) fn new(status: u16, code: &'static str, text: impl Into<String>) -> Self {
        Self { status, code, text: text.into(), retry_after_s: None, cause: String::new() }
    }

    /// The answer, with the reference under which the log has more.
    pub(crate) fn answer(&self, reference: &str) -> Answer {
        let mut headers = vec![("X-QVD-Error", self.code.to_owned()), ("X-Request-Id", reference.to_owned())];
        match self.status {
            401 => headers.push(("WWW-Authenticate", "Basic realm=\"QVD\"".to_owned())),
            405 => headers.push(("Allow", "GET".to_owned())),
            426 => headers.push(("Upgrade", "QVD/1.0".to_owned())),
            _ => {}
        }
        headers.extend(self.retry_after_s.map(|seconds| ("Retry-After", seconds.to_string())));
        let body = format!("{} (code: {}, reference: {reference})\n", one_line(&self.text), self.code);
        Answer { status: self.status, headers, body, ..Answer::text("") }
    }
}

impl From<FarmError> for Refusal {
    fn from(error: FarmError) -> Self {
        let status = match error.kind() {
            ErrorKind::Invalid => 422,
            ErrorKind::Unauthenticated => 401,
            ErrorKind::Forbidden => 403,
            ErrorKind::NotFound => 404,
            ErrorKind::Conflict => 409,
            ErrorKind::TooMany { .. } => 429,
            _ => 503,
        };
        let retry_after_s = error.retry_after().map(|wait| wait.as_secs() + 1);
        Self { status, code: error.code(), text: explained(&error), retry_after_s, cause: causes(&error) }
    }
}

impl From<ParameterError> for Refusal {
    fn from(error: ParameterError) -> Self {
        let (status, code) = match error {
            ParameterError::NoId | ParameterError::BadId => (422, "bad_id"),
            ParameterError::Forbidden(_) => (403, "forbidden_parameter"),
            ParameterError::Unknown(_) => (403, "unknown_parameter"),
            ParameterError::Value { .. } => (422, "bad_parameter"),
        };
        Self::new(status, code, error.to_string())
    }
}

impl From<QueryError> for Refusal {
    fn from(error: QueryError) -> Self {
        Self::new(400, "bad_query", error.to_string())
    }
}

impl From<HeadError> for Refusal {
    fn from(error: HeadError) -> Self {
        let (status, code) = match error {
            HeadError::TooLarge | HeadError::TooManyHeaders => (431, "head_too_large"),
            HeadError::Version => (505, "http_version"),
            HeadError::Malformed => (400, "bad_request"),
        };
        Self::new(status, code, error.to_string())
    }
}

/// An error for the person at the client. Causes stay in the log: they name
/// paths and addresses of the host.
pub(crate) fn explained(error: &FarmError) -> String {
    let hint = match error.kind() {
        ErrorKind::Busy => "; it is in use, try again in a moment",
        ErrorKind::Timeout => "; it took too long, try again",
        ErrorKind::Unsupported => "; this server cannot do it, ask the administrator",
        ErrorKind::Failed => "; ask the administrator",
        _ => "",
    };
    format!("{}{hint}", one_line(&error.to_string()))
}

/// The causes of an error, nearest first, for the log.
pub(crate) fn causes(error: &dyn StdError) -> String {
    let (mut causes, mut next) = (Vec::new(), error.source());
    while let Some(cause) = next {
        causes.push(cause.to_string());
        next = cause.source();
    }
    causes.join(": ")
}

/// News while a request is carried out.
pub(crate) fn processing(text: &str) -> Vec<u8> {
    // Header values are ASCII here: clients print them as they come.
    let text: String = text.chars().map(|c| if matches!(c, ' '..='~') { c } else { '?' }).take(200).collect();
    format!("HTTP/1.1 102 Processing\r\nX-QVD-VM-Info: {text}\r\n\r\n").into_bytes()
}

/// The answer after which the connection carries NX.
pub(crate) fn switching(slave_key: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: QVD/1.0\r\nX-QVD-Slave-Key: {slave_key}\r\n\r\n"
    )
    .into_bytes()
}

const fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        422 => "Unprocessable Entity",
        426 => "Upgrade Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_from_outside_ends_a_line() {
        let news = processing("a\r\nX-QVD-Slave-Key: stolen\r\n\r\nä");
        let text = String::from_utf8_lossy(&news);
        assert_eq!(text.matches("\r\n").count(), 3, "{text}");
        let refusal = Refusal::new(404, "x", "a\r\n\r\nb").answer("ref").encode();
        assert!(String::from_utf8_lossy(&refusal).ends_with("a    b (code: x, reference: ref)\n"));
    }
}
