//! Administration in the browser: what an administrator does every day, by pages and forms alone.
//!
//! A portal session does not open it. Who enters gives name and password again and gets a session of its own
//! ([`SessionKind::Admin`]), whose cookie is looked at nowhere else. [`admitted`] stands before every page but
//! that of signing in, and before every form: a handler cannot forget to ask.

mod desktops;
mod images;
mod overview;
mod pages;
mod users;
mod work;

use std::{ops::Deref, sync::Arc};

use axum::{
    Extension, Form, Router,
    body::{self, Body},
    extract::{FromRequest as _, Query, Request, State},
    http::{HeaderMap, Method, StatusCode},
    middleware::{self, Next},
    response::{IntoResponse as _, Redirect, Response},
    routing::{get, post},
};
use qvd_farm::{ErrorKind, Farm, FarmError, Secret, SessionKind};
use serde::Deserialize;

use self::work::Works;
use super::{
    CsrfForm, FORM_MAX, assets, foreign, form_cookie,
    guard::{RequestId, SESSION_COOKIE, SignedIn, cookie, forget_cookie, set_cookie},
    is_own_form, login_name, not_found, not_signed_in, pages as portal_pages, with_cookies,
};
use crate::server::{Peer, Shared};

/// The cookie of a session that administers.
pub(super) const ADMIN_COOKIE: &str = "__Host-qvd-admin";
/// The cookie that the token of this sign-in form follows from.
const FORM_COOKIE: &str = "__Host-qvd-admin-form";
const SIGN_IN: &str = "/admin/sign-in";

/// What the handlers share.
#[derive(Debug)]
pub(super) struct AdminState {
    shared: Arc<Shared>,
    works: Works,
}

impl AdminState {
    fn farm(&self) -> &Farm {
        &self.shared.farm
    }
}

/// The administrator whose request it is.
#[derive(Debug, Clone)]
pub(super) struct Who(Arc<SignedIn>);

impl Deref for Who {
    type Target = SignedIn;
    fn deref(&self) -> &SignedIn {
        &self.0
    }
}

/// Everything below `/admin`.
pub(super) fn router<S: Clone + Send + Sync + 'static>(shared: Arc<Shared>) -> Router<S> {
    let state = Arc::new(AdminState { shared, works: Works::default() });
    Router::new()
        .route("/admin", get(overview::overview))
        .route("/admin/sign-out", post(sign_out))
        .route("/admin/desktops", get(desktops::list).post(desktops::create))
        .route("/admin/desktops/new", get(desktops::new))
        .route("/admin/desktops/{id}", get(desktops::show))
        .route("/admin/desktops/{id}/start", post(desktops::start))
        .route("/admin/desktops/{id}/stop", post(desktops::stop))
        .route("/admin/desktops/{id}/maintenance", post(desktops::maintenance))
        .route("/admin/desktops/{id}/explain", post(desktops::explain))
        .route("/admin/desktops/{id}/remove", get(desktops::confirm_removal).post(desktops::remove))
        .route("/admin/users", get(users::list).post(users::add))
        .route("/admin/users/{name}", get(users::show))
        .route("/admin/users/{name}/password", post(users::set_password))
        .route("/admin/users/{name}/administrator", post(users::set_admin))
        .route("/admin/users/{name}/remove", get(users::confirm_removal).post(users::remove))
        .route("/admin/sessions", get(overview::sessions))
        .route("/admin/sessions/{id}/end", post(overview::end_session))
        .route("/admin/flavours", get(images::flavours))
        .route("/admin/flavours/{name}", get(images::flavour).post(images::set_defaults))
        .route("/admin/flavours/{name}/reset", post(images::reset_defaults))
        .route("/admin/images", get(images::images))
        .route("/admin/images/{flavour}", get(images::image))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&state), admitted))
        .route(SIGN_IN, get(sign_in_page).post(sign_in))
        .method_not_allowed_fallback(not_found)
        .with_state(state)
}

/// Lets administrators through, and of what changes something only what our own pages have sent.
async fn admitted(State(state): State<Arc<AdminState>>, mut request: Request, next: Next) -> Response {
    let (headers, path) = (request.headers().clone(), request.uri().path().to_owned());
    let who = match administrator(&state, &headers, &path).await {
        Ok(who) => who,
        Err(refused) => return refused,
    };
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        request = match ours(&who, request).await {
            Ok(request) => request,
            Err(refused) => return refused,
        };
    }
    request.extensions_mut().insert(Who(Arc::new(who)));
    next.run(request).await
}

/// Who administers with this cookie. Administrators without one are sent to sign in; to everybody else
/// there is nothing here.
async fn administrator(state: &AdminState, headers: &HeaderMap, path: &str) -> Result<SignedIn, Response> {
    let find = async |token: &Secret, kind| match state.farm().find_session(token, kind).await {
        Ok(session) => Ok(Some(session)),
        Err(error) if error.kind() == ErrorKind::Unauthenticated => Ok(None),
        Err(error) => Err(portal_pages::failure(headers, &axum::http::Extensions::new(), &error)),
    };
    let token = cookie(headers, ADMIN_COOKIE).map(Secret::from);
    let ended = token.is_some();
    if let Some(token) = token
        && let Some(session) = find(&token, SessionKind::Admin).await?
    {
        return Ok(SignedIn { session, token });
    }
    let portal = match cookie(headers, SESSION_COOKIE) {
        Some(token) => find(&Secret::from(token), SessionKind::Web).await?,
        None => None,
    };
    let is_asked = portal.map_or(ended || path == "/admin", |session| session.user.admin);
    Err(match (is_asked, ended) {
        (false, _) => not_found(headers.clone()).await,
        (true, false) => Redirect::to(SIGN_IN).into_response(),
        (true, true) => Redirect::to("/admin/sign-in?ended=1").into_response(),
    })
}

/// The request, if it carries the token of our page.
async fn ours(who: &SignedIn, request: Request) -> Result<Request, Response> {
    let (parts, body) = request.into_parts();
    let id = parts.extensions.get::<RequestId>().cloned().unwrap_or_else(|| RequestId(String::new()));
    let Ok(bytes) = body::to_bytes(body, FORM_MAX).await else {
        let text = "the form is too long";
        return Err(portal_pages::refusal(&parts.headers, StatusCode::PAYLOAD_TOO_LARGE, "too_long", text, &id.0));
    };
    let copy = Request::from_parts(parts.clone(), Body::from(bytes.clone()));
    let token = Form::<CsrfForm>::from_request(copy, &()).await.ok().and_then(|Form(form)| form.csrf);
    if !who.allows(&parts.headers, token.as_deref()) {
        return Err(foreign(&parts.headers, &id));
    }
    Ok(Request::from_parts(parts, Body::from(bytes)))
}

#[derive(Debug, Deserialize)]
struct SignInQuery {
    ended: Option<String>,
}

#[derive(Debug, Deserialize)]
struct SignInForm {
    user: String,
    password: Secret,
    csrf: String,
}

fn sign_in_answer(status: StatusCode, user: &str, error: Option<&str>, notice: Option<&str>) -> Response {
    let (value, csrf) = form_cookie();
    let page = pages::SignIn { assets: &assets::BASE, csrf: &csrf, user, error, notice };
    with_cookies(portal_pages::render(status, &page), &[set_cookie(FORM_COOKIE, &value, "Strict")])
}

async fn sign_in_page(
    State(state): State<Arc<AdminState>>,
    headers: HeaderMap,
    Query(query): Query<SignInQuery>,
) -> Response {
    let find = async |name, kind| {
        let token = cookie(&headers, name).map(Secret::from)?;
        state.farm().find_session(&token, kind).await.ok()
    };
    if find(ADMIN_COOKIE, SessionKind::Admin).await.is_some() {
        return Redirect::to("/admin").into_response();
    }
    let user = find(SESSION_COOKIE, SessionKind::Web).await.map(|session| session.user.name.to_string());
    let notice = query.ended.is_some().then_some("The session has ended. Sign in again to go on.");
    sign_in_answer(StatusCode::OK, user.as_deref().unwrap_or_default(), None, notice)
}

async fn sign_in(
    State(state): State<Arc<AdminState>>,
    Extension(peer): Extension<Peer>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    Form(form): Form<SignInForm>,
) -> Response {
    if !is_own_form(&headers, FORM_COOKIE, &form.csrf) {
        tracing::warn!(reference = id.0, "administrator's sign-in form of another site, or too old");
        let text = "This page was open for too long. Please sign in again.";
        return sign_in_answer(StatusCode::FORBIDDEN, &form.user, Some(text), None);
    }
    let source = peer.address.ip();
    let session = match state.farm().authenticate(login_name(&form.user), &form.password, Some(source)).await {
        Ok(user) if user.admin => state.farm().create_session(&user.name, SessionKind::Admin).await,
        Ok(user) => {
            tracing::warn!(user = %user.name, %source, "administration refused: no administrator");
            // In the words for a wrong password: the answer tells nobody who administers.
            Err(FarmError::new(ErrorKind::Unauthenticated, "no administrator"))
        }
        Err(error) => Err(error),
    };
    match session {
        Ok(session) => {
            if let Some(before) = cookie(&headers, ADMIN_COOKIE)
                && let Err(error) = state.farm().end_session(&Secret::from(before)).await
            {
                tracing::warn!(%error, "an administrator's former session was not ended");
            }
            tracing::info!(administrator = %session.session.user.name, %source, "administration entered");
            let cookies = [set_cookie(ADMIN_COOKIE, session.token.expose(), "Strict"), forget_cookie(FORM_COOKIE)];
            with_cookies(Redirect::to("/admin").into_response(), &cookies)
        }
        Err(error) => {
            let wrong = "The user name or the password is wrong, or this user is no administrator.";
            let page = |status, text: &str| sign_in_answer(status, &form.user, Some(text), None);
            not_signed_in(&error, &id, wrong, page)
        }
    }
}

async fn sign_out(State(state): State<Arc<AdminState>>, Extension(who): Extension<Who>) -> Response {
    match state.farm().end_session(&who.token).await {
        Ok(()) => {
            tracing::info!(administrator = %who.session.user.name, "administration left");
            with_cookies(Redirect::to("/desktops").into_response(), &[forget_cookie(ADMIN_COOKIE)])
        }
        Err(error) => pages::failure(&who, "", &error),
    }
}
