//! The portal's pages.

use askama::Template;
use axum::{
    http::{Extensions, HeaderMap, StatusCode},
    response::{Html, IntoResponse, Response},
};
use qvd_core::DesktopState;
use qvd_farm::{DesktopInfo, ErrorKind, FarmError};
use serde::Serialize;

use super::{
    assets,
    guard::{RequestId, wants_json},
};
use crate::wire;

#[derive(Template)]
#[template(path = "sign_in.html")]
pub(super) struct SignIn<'a> {
    pub(super) assets: &'a str,
    pub(super) csrf: &'a str,
    pub(super) next: &'a str,
    pub(super) user: &'a str,
    pub(super) error: Option<&'a str>,
    pub(super) notice: Option<&'a str>,
}

#[derive(Template)]
#[template(path = "desktops.html")]
pub(super) struct Desktops<'a> {
    pub(super) assets: &'a str,
    pub(super) csrf: &'a str,
    pub(super) user: &'a str,
    pub(super) initial: char,
    /// Whether to show the way to administration.
    pub(super) admin: bool,
    pub(super) problem: Option<&'a str>,
    pub(super) desktops: Vec<Row>,
}

/// A desktop as the list shows it and as its script updates it.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) id: u32,
    pub(super) name: String,
    pub(super) flavour: String,
    pub(super) state: &'static str,
    pub(super) label: String,
    pub(super) attached: bool,
    pub(super) blocked: bool,
    /// Whether there is something to stop.
    pub(super) running: bool,
}

impl From<DesktopInfo> for Row {
    fn from(info: DesktopInfo) -> Self {
        let DesktopInfo { desktop, status } = info;
        let label = match status.state {
            _ if desktop.blocked => "Under maintenance".to_owned(),
            DesktopState::Running if status.attached => "Running, in use".to_owned(),
            DesktopState::Running => "Running".to_owned(),
            DesktopState::Starting => status.step.map_or("Starting", |step| step.text()).to_owned(),
            DesktopState::Stopping => "Stopping".to_owned(),
            DesktopState::Stopped => status.ended.map_or_else(|| "Stopped".to_owned(), |why| format!("Stopped: {why}")),
            _ => "Needs the administrator".to_owned(),
        };
        Self {
            id: desktop.id.number(),
            name: desktop.name,
            flavour: desktop.flavour.to_string(),
            state: status.state.as_str(),
            label,
            attached: status.attached,
            blocked: desktop.blocked,
            running: !matches!(status.state, DesktopState::Stopped | DesktopState::Stopping),
        }
    }
}

#[derive(Template)]
#[template(path = "desktop.html")]
pub(super) struct Desktop<'a> {
    pub(super) assets: &'a str,
    pub(super) csrf: &'a str,
    pub(super) id: u32,
    pub(super) name: &'a str,
    pub(super) preload: &'a [String],
}

#[derive(Template)]
#[template(path = "licences.html")]
pub(super) struct Licences<'a> {
    pub(super) assets: &'a str,
    pub(super) version: &'a str,
    pub(super) texts: &'a [(&'a str, &'a str)],
}

#[derive(Template)]
#[template(path = "message.html")]
struct Message<'a> {
    assets: &'a str,
    title: &'a str,
    text: &'a str,
    reference: Option<&'a str>,
}

/// A page, or a plain excuse when it cannot be written.
pub(super) fn render(status: StatusCode, page: &impl Template) -> Response {
    match page.render() {
        Ok(html) => (status, Html(html)).into_response(),
        Err(error) => {
            tracing::error!(%error, "cannot write a page");
            (StatusCode::INTERNAL_SERVER_ERROR, "the page cannot be written\n").into_response()
        }
    }
}

/// Whether a person may be sent to `path` after signing in.
pub(super) fn is_own_page(path: &str) -> bool {
    path == "/desktops" || path.strip_prefix("/desktops/").is_some_and(|id| id.parse::<qvd_core::DesktopId>().is_ok())
}

/// Tells a person, or a script, that something was refused or failed.
pub(super) fn failure(headers: &HeaderMap, extensions: &Extensions, error: &FarmError) -> Response {
    let reference = extensions.get::<RequestId>().map_or("", |id| &id.0);
    let cause = wire::causes(error);
    tracing::info!(reference, code = error.code(), %error, cause, "refused");
    refusal(headers, status_of(error), error.code(), &wire::explained(error), reference)
}

/// The same for what is refused before the farm is asked.
pub(super) fn refusal(headers: &HeaderMap, status: StatusCode, code: &str, text: &str, reference: &str) -> Response {
    if wants_json(headers) {
        let body = serde_json::json!({ "error": { "code": code, "message": text, "id": reference } });
        return (status, axum::Json(body)).into_response();
    }
    let title = match status {
        StatusCode::NOT_FOUND => "Not found",
        StatusCode::FORBIDDEN => "Not allowed",
        _ => "That did not work",
    };
    let reference = Some(reference).filter(|reference| !reference.is_empty());
    let mut sentence = text.to_owned();
    if let Some(first) = sentence.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    sentence.push('.');
    render(status, &Message { assets: &assets::BASE, title, text: &sentence, reference })
}

pub(super) fn status_of(error: &FarmError) -> StatusCode {
    match error.kind() {
        ErrorKind::Invalid => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorKind::Unauthenticated => StatusCode::UNAUTHORIZED,
        ErrorKind::Forbidden => StatusCode::FORBIDDEN,
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::Conflict => StatusCode::CONFLICT,
        ErrorKind::TooMany { .. } => StatusCode::TOO_MANY_REQUESTS,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_own_pages_are_gone_to() {
        assert!(is_own_page("/desktops") && is_own_page("/desktops/7"));
        for foreign in
            ["", "/", "//evil.example", "https://evil.example", "/desktops/7/../..", "/desktops/x", "/sign-out"]
        {
            assert!(!is_own_page(foreign), "{foreign}");
        }
    }

    #[test]
    fn pages_escape_what_they_show() {
        let page = Message { assets: "", title: "<script>", text: "\"><img onerror=x>", reference: None };
        let html = page.render().unwrap();
        assert!(!html.contains("<script>") && !html.contains("<img onerror"), "{html}");
    }
}
