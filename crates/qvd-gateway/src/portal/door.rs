//! The API's front door over HTTPS: finds out who calls.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use qvd_farm::{Secret, SessionKind};

use super::{
    guard::{SESSION_COOKIE, SignedIn, cookie, same_origin},
    pages::{failure, refusal},
};
use crate::{
    api::Caller,
    server::{Peer, Shared},
    wire::{self, Credentials},
};

/// Puts the [`Caller`] of a password, a `Bearer` token or a session's cookie into the
/// request; without one the API refuses what needs one.
pub(super) async fn caller(State(shared): State<Arc<Shared>>, mut request: Request, next: Next) -> Response {
    // Whatever was there before did not come from here.
    request.extensions_mut().remove::<Caller>();
    if let Some(value) = basic(request.headers()) {
        return with_password(&shared, value.to_owned(), request, next).await;
    }
    let headers = request.headers();
    let (token, kind) = match (bearer(headers), cookie(headers, SESSION_COOKIE)) {
        (Some(token), _) => (token, SessionKind::Bearer),
        (None, Some(token)) => (Secret::from(token), SessionKind::Web),
        (None, None) => return next.run(request).await,
    };
    let session = match shared.farm.find_session(&token, kind).await {
        Ok(session) => session,
        // The API says in its own words that nobody is signed in.
        Err(error) if error.kind() == qvd_farm::ErrorKind::Unauthenticated => return next.run(request).await,
        Err(error) => return failure(request.headers(), request.extensions(), &error),
    };
    let caller = match kind {
        // Who finds a browser open has its user's desktops and not the farm: administration asks for
        // the password again, and so does this.
        SessionKind::Web => Caller::User(session.user.name.clone()),
        _ => Caller::from(&session.user),
    };
    // A browser sends cookies by itself, also for other sites' pages.
    if kind == SessionKind::Web && !matches!(*request.method(), Method::GET | Method::HEAD) {
        let ours = same_origin(headers) == Some(true) || SignedIn { session, token }.allows(headers, None);
        if !ours {
            let body =
                serde_json::json!({ "error": { "code": "csrf", "message": "another site sent this", "id": "" } });
            return (StatusCode::FORBIDDEN, axum::Json(body)).into_response();
        }
    }
    request.extensions_mut().insert(caller);
    next.run(request).await
}

/// Programs that come once sign in with each request. No page asks a browser
/// for this, so none sends it by itself for another site.
async fn with_password(shared: &Shared, value: String, mut request: Request, next: Next) -> Response {
    let Ok(Credentials::Password { user, password }) = wire::basic(&value) else {
        return refusal(request.headers(), StatusCode::UNAUTHORIZED, "bad_credentials", "sign in again", "");
    };
    let source = request.extensions().get::<Peer>().map(|peer| peer.address.ip());
    match shared.farm.authenticate(&user, &password, source).await {
        Ok(user) => {
            request.extensions_mut().insert(Caller::from(&user));
            next.run(request).await
        }
        Err(error) => failure(request.headers(), request.extensions(), &error),
    }
}

fn basic(headers: &HeaderMap) -> Option<&str> {
    let (scheme, value) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("basic").then_some(value.trim())
}

/// The token of an `Authorization: Bearer`; what is no token of ours is one
/// that nobody has.
fn bearer(headers: &HeaderMap) -> Option<Secret> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    scheme.eq_ignore_ascii_case("bearer").then(|| wire::token(token).unwrap_or_else(|| Secret::from(token)))
}
