//! What stands in front of every page: who it is, from where, and whether
//! this site's own page sent it.

use std::sync::Arc;

use axum::{
    extract::{FromRequestParts, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header, request::Parts},
    middleware::Next,
    response::{IntoResponse, Redirect, Response},
};
use qvd_farm::{ErrorKind, Secret, Session, SessionKind};

use super::pages;
use crate::server::{Peer, Shared};

/// The cookie of a session. `__Host-`: this host only, over TLS only, no
/// subdomain can set it (RFC 6265bis, 4.1.3.2).
pub(super) const SESSION_COOKIE: &str = "__Host-qvd-session";
/// The cookie that the sign-in form's token follows from.
pub(super) const FORM_COOKIE: &str = "__Host-qvd-form";
/// Header in which our scripts send the session's CSRF token.
const CSRF_HEADER: &str = "x-csrf-token";

/// `data:` is what noVNC draws its cursors and JPEG rectangles with.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; \
    connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; \
    require-trusted-types-for 'script'";

const HEADERS: &[(&str, &str)] = &[
    ("content-security-policy", POLICY),
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    ("referrer-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    (
        "permissions-policy",
        "clipboard-read=(self), clipboard-write=(self), fullscreen=(self), camera=(), microphone=(), geolocation=()",
    ),
];

/// A request's number, for logs and error pages.
#[derive(Debug, Clone)]
pub(super) struct RequestId(pub(super) String);

/// Numbers and logs requests, refuses foreign hosts, and sets the headers
/// that every answer has.
pub(super) async fn around(State(shared): State<Arc<Shared>>, mut request: Request, next: Next) -> Response {
    let id = crate::request_id();
    let began = tokio::time::Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let peer = request.extensions().get::<Peer>().map(|peer| peer.address);
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = if host_is_ours(&shared, request.headers()) {
        next.run(request).await
    } else {
        (StatusCode::MISDIRECTED_REQUEST, "this server does not answer to that name\n").into_response()
    };
    let headers = response.headers_mut();
    for &(name, value) in HEADERS {
        headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    if shared.strict_transport {
        headers.insert(header::STRICT_TRANSPORT_SECURITY, HeaderValue::from_static("max-age=31536000"));
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    if let Ok(value) = HeaderValue::from_str(&id) {
        headers.insert("x-request-id", value);
    }
    let (status, ms) = (response.status().as_u16(), began.elapsed().as_millis());
    if path.starts_with("/assets/") || path == "/desktops/state" {
        tracing::debug!(reference = id, ?peer, %method, path, status, ms, "http request");
    } else {
        tracing::info!(reference = id, ?peer, %method, path, status, ms, "http request");
    }
    response
}

/// Whether there is one well-formed `Host`, and one of the configured if any are.
fn host_is_ours(shared: &Shared, headers: &HeaderMap) -> bool {
    let Some(host) = host(headers) else { return false };
    let name = host.rsplit_once(':').map_or(host, |(name, port)| if port.ends_with(']') { host } else { name });
    shared.hosts.is_empty()
        || shared.hosts.iter().any(|ours| ours.eq_ignore_ascii_case(host) || ours.eq_ignore_ascii_case(name))
}

/// The one `Host` header, if it is an authority.
fn host(headers: &HeaderMap) -> Option<&str> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return None };
    let host = host.to_str().ok()?;
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':' | b'[' | b']');
    (!host.is_empty() && host.len() <= 300 && host.bytes().all(good)).then_some(host)
}

/// Whether a page of this site sent this. `Origin` decides when there is one
/// (browsers send it with every POST and every WebSocket).
pub(super) fn same_origin(headers: &HeaderMap) -> Option<bool> {
    if let Some(origin) = headers.get(header::ORIGIN) {
        let ours = host(headers).map(|host| format!("https://{host}"));
        return Some(ours.is_some_and(|ours| origin.as_bytes().eq_ignore_ascii_case(ours.as_bytes())));
    }
    headers.get("sec-fetch-site").map(|site| matches!(site.as_bytes(), b"same-origin" | b"none"))
}

/// A cookie by its name; none if it stands twice.
pub(super) fn cookie<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    let mut values = headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .filter(|(found, _)| *found == name)
        .map(|(_, value)| value);
    match (values.next(), values.next()) {
        (Some(value), None) if !value.is_empty() && value.len() <= 256 => Some(value),
        _ => None,
    }
}

/// Sets a cookie that scripts cannot read and other sites cannot send.
pub(super) fn set_cookie(name: &str, value: &str, same_site: &str) -> String {
    format!("{name}={value}; Path=/; Secure; HttpOnly; SameSite={same_site}")
}

/// Makes the browser forget a cookie.
pub(super) fn forget_cookie(name: &str) -> String {
    format!("{name}=; Path=/; Secure; HttpOnly; SameSite=Lax; Max-Age=0")
}

/// Whether a script of ours asks, which wants JSON, or a person, who wants a page.
pub(super) fn wants_json(headers: &HeaderMap) -> bool {
    headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).is_some_and(|v| v.contains("application/json"))
}

/// Somebody signed in with a cookie.
#[derive(Debug)]
pub(super) struct SignedIn {
    pub(super) session: Session,
    pub(super) token: Secret,
}

impl SignedIn {
    /// Whether our own page sent this request, which changes something.
    pub(super) fn allows(&self, headers: &HeaderMap, form: Option<&str>) -> bool {
        let given = form.or_else(|| headers.get(CSRF_HEADER).and_then(|value| value.to_str().ok()));
        same_origin(headers) != Some(false) && given.is_some_and(|given| self.session.csrf_matches(given))
    }
}

impl FromRequestParts<Arc<Shared>> for SignedIn {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, shared: &Arc<Shared>) -> Result<Self, Response> {
        let Some(token) = cookie(&parts.headers, SESSION_COOKIE) else {
            return Err(to_sign_in(parts));
        };
        let token = Secret::from(token);
        match shared.farm.find_session(&token, SessionKind::Web).await {
            Ok(session) => Ok(Self { session, token }),
            Err(error) if error.kind() == ErrorKind::Unauthenticated => Err(to_sign_in(parts)),
            Err(error) => Err(pages::failure(&parts.headers, &parts.extensions, &error)),
        }
    }
}

/// Sends a person to the sign-in page and back afterwards; tells a script.
fn to_sign_in(parts: &Parts) -> Response {
    let socket = parts.headers.contains_key(header::UPGRADE);
    if wants_json(&parts.headers) || socket {
        let body = serde_json::json!({ "error": { "code": "signed_out", "message": "sign in again" } });
        return (StatusCode::UNAUTHORIZED, axum::Json(body)).into_response();
    }
    let path = parts.uri.path();
    if parts.method == Method::GET && path != "/desktops" && pages::is_own_page(path) {
        Redirect::to(&format!("/sign-in?next={path}")).into_response()
    } else {
        Redirect::to("/sign-in").into_response()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|&(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
    }

    #[test]
    fn the_origin_must_be_this_host_and_port() {
        let check = |origin| same_origin(&headers(&[("host", "qvd.example:8443"), ("origin", origin)]));
        assert_eq!(check("https://qvd.example:8443"), Some(true));
        for foreign in ["https://qvd.example", "http://qvd.example:8443", "https://evil.example", "null", ""] {
            assert_eq!(check(foreign), Some(false), "{foreign}");
        }
        assert_eq!(same_origin(&headers(&[("host", "a"), ("sec-fetch-site", "cross-site")])), Some(false));
        assert_eq!(same_origin(&headers(&[("host", "a")])), None);
    }

    #[test]
    fn cookies_are_found_among_others_and_twice_is_none() {
        let one = headers(&[("cookie", "a=b; __Host-qvd-session=x; c=d")]);
        assert_eq!(cookie(&one, SESSION_COOKIE), Some("x"));
        let twice = headers(&[("cookie", "__Host-qvd-session=x; __Host-qvd-session=y")]);
        assert_eq!(cookie(&twice, SESSION_COOKIE), None);
    }

    #[test]
    fn strange_hosts_are_none() {
        assert_eq!(host(&headers(&[("host", "a.example:1")])), Some("a.example:1"));
        assert_eq!(host(&headers(&[("host", "[::1]:8443")])), Some("[::1]:8443"));
        for bad in ["", "a b", "a/b", "a@b", "a\"b"] {
            assert_eq!(host(&headers(&[("host", bad)])), None, "{bad}");
        }
    }
}
