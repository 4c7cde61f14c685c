//! The user's portal: sign in, desktops with their state, open, stop, sign out; and administration.

mod admin;
mod assets;
mod door;
mod guard;
mod pages;
mod screen;

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Form, Json, Router,
    body::Body,
    extract::{DefaultBodyLimit, Path, Query, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Redirect, Response},
    routing::{any, get, post},
};
use futures_util::stream;
use qvd_core::DesktopId;
use qvd_farm::{ErrorKind, Farm, FarmError, Progress, Secret, SessionKind};
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::{sync::mpsc, time::timeout};

use self::{
    guard::{
        FORM_COOKIE, RequestId, SESSION_COOKIE, SignedIn, cookie, forget_cookie, same_origin, set_cookie, wants_json,
    },
    pages::{is_own_page, refusal, render},
};
use crate::{
    api,
    server::{Peer, Shared},
    wire,
};

/// For a page's request, its form included, to be answered.
const PAGE_DEADLINE: Duration = Duration::from_secs(60);
/// Longest form in bytes.
const FORM_MAX: usize = 16 * 1024;

/// Everything that is not the QVD wire protocol.
pub(crate) fn router(shared: Arc<Shared>) -> Router {
    let portal = Router::new()
        .route("/", get(|| async { Redirect::to("/desktops") }))
        .route("/sign-in", get(sign_in_page).post(sign_in))
        .route("/sign-out", post(sign_out))
        .route("/desktops", get(desktops))
        .route("/desktops/state", get(desktops_state))
        .route("/desktops/{id}", get(desktop))
        .route("/desktops/{id}/stop", post(stop))
        .route("/desktops/{id}/open", post(open))
        .route("/licences", get(licences))
        .route("/assets/{version}/{*path}", get(assets::serve))
        .merge(admin::router(Arc::clone(&shared)))
        .layer(DefaultBodyLimit::max(FORM_MAX))
        .layer(middleware::from_fn(in_time))
        .route("/desktops/{id}/display", any(screen::display))
        .fallback(not_found)
        .with_state(Arc::clone(&shared));
    let api = api::router(api::ApiState { farm: shared.farm.clone() })
        .layer(middleware::from_fn_with_state(Arc::clone(&shared), door::caller));
    portal.merge(api).layer(middleware::from_fn_with_state(shared, guard::around))
}

/// Bounds how long a request may take, also one whose form comes drop by drop.
async fn in_time(request: Request, next: Next) -> Response {
    timeout(PAGE_DEADLINE, next.run(request))
        .await
        .unwrap_or_else(|_| (StatusCode::REQUEST_TIMEOUT, "this took too long\n").into_response())
}

async fn not_found(headers: HeaderMap) -> Response {
    refusal(&headers, StatusCode::NOT_FOUND, "unknown_path", "there is no such page", "")
}

#[derive(Debug, Deserialize)]
struct SignInQuery {
    #[serde(default)]
    next: String,
    #[serde(default)]
    bye: Option<String>,
}

#[derive(Debug, Deserialize)]
struct SignInForm {
    user: String,
    password: Secret,
    csrf: String,
    #[serde(default)]
    next: String,
}

/// A form's token follows from a cookie that other sites can neither read nor
/// set, and does not give it away.
fn form_token(cookie: &str) -> String {
    let hash = Sha256::new().chain_update("qvd form ").chain_update(cookie).finalize();
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A new value for such a cookie, and its token.
fn form_cookie() -> (String, String) {
    let random: [u8; 32] = rand::random();
    let value: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let token = form_token(&value);
    (value, token)
}

fn sign_in_answer(status: StatusCode, next: &str, user: &str, error: Option<&str>, notice: Option<&str>) -> Response {
    let (value, csrf) = form_cookie();
    let next = if is_own_page(next) { next } else { "/desktops" };
    let page = pages::SignIn { assets: &assets::BASE, csrf: &csrf, next, user, error, notice };
    with_cookies(render(status, &page), &[set_cookie(FORM_COOKIE, &value, "Strict")])
}

fn with_cookies(mut response: Response, cookies: &[String]) -> Response {
    for cookie in cookies {
        if let Ok(value) = HeaderValue::from_str(cookie) {
            response.headers_mut().append(header::SET_COOKIE, value);
        }
    }
    response
}

async fn sign_in_page(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    Query(query): Query<SignInQuery>,
) -> Response {
    if let Some(token) = cookie(&headers, SESSION_COOKIE)
        && shared.farm.find_session(&Secret::from(token), SessionKind::Web).await.is_ok()
    {
        return Redirect::to(if is_own_page(&query.next) { &query.next } else { "/desktops" }).into_response();
    }
    let notice = query.bye.is_some().then_some("You are signed out. Your desktops keep running.");
    sign_in_answer(StatusCode::OK, &query.next, "", None, notice)
}

async fn sign_in(
    State(shared): State<Arc<Shared>>,
    Extension(peer): Extension<Peer>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    Form(form): Form<SignInForm>,
) -> Response {
    if !is_own_form(&headers, FORM_COOKIE, &form.csrf) {
        tracing::warn!(reference = id.0, "sign-in form of another site, or too old");
        let text = "This page was open for too long. Please sign in again.";
        return sign_in_answer(StatusCode::FORBIDDEN, &form.next, &form.user, Some(text), None);
    }
    let address = Some(peer.address.ip());
    let session = match shared.farm.authenticate(login_name(&form.user), &form.password, address).await {
        Ok(user) => shared.farm.create_session(&user.name, SessionKind::Web).await,
        Err(error) => Err(error),
    };
    match session {
        Ok(session) => {
            let next = if is_own_page(&form.next) { &*form.next } else { "/desktops" };
            let cookies = [set_cookie(SESSION_COOKIE, session.token.expose(), "Lax"), forget_cookie(FORM_COOKIE)];
            with_cookies(Redirect::to(next).into_response(), &cookies)
        }
        Err(error) => {
            let page = |status, text: &str| sign_in_answer(status, &form.next, &form.user, Some(text), None);
            not_signed_in(&error, &id, "The user name or the password is wrong.", page)
        }
    }
}

/// The user's name in what was typed, which may name the tenant too.
fn login_name(typed: &str) -> &str {
    let (name, tenant) = wire::split_tenant(typed.trim());
    if tenant.is_none_or(|tenant| tenant == wire::TENANT) { name } else { "" }
}

/// Whether a sign-in form is from a page of ours that gave the browser `form_cookie`.
fn is_own_form(headers: &HeaderMap, form_cookie: &str, csrf: &str) -> bool {
    same_origin(headers) != Some(false) && cookie(headers, form_cookie).map(form_token).as_deref() == Some(csrf)
}

/// The page that says why nobody was signed in; `wrong` says that name or password are.
fn not_signed_in(
    error: &FarmError,
    id: &RequestId,
    wrong: &str,
    page: impl FnOnce(StatusCode, &str) -> Response,
) -> Response {
    let text = match (error.kind(), error.retry_after()) {
        (_, Some(wait)) => format!("Too many failed attempts. Try again in {} seconds.", wait.as_secs() + 1),
        (ErrorKind::Unauthenticated, _) => wrong.to_owned(),
        _ => {
            tracing::error!(reference = id.0, %error, cause = wire::causes(error), "sign-in failed");
            format!("Signing in does not work at the moment (reference {}).", id.0)
        }
    };
    let mut answer = page(pages::status_of(error), &text);
    if let Some(wait) = error.retry_after() {
        answer.headers_mut().insert(header::RETRY_AFTER, (wait.as_secs() + 1).into());
    }
    answer
}

#[derive(Debug, Deserialize)]
struct CsrfForm {
    #[serde(default)]
    csrf: Option<String>,
}

/// What a changing request gets that no page of ours has sent.
fn foreign(headers: &HeaderMap, id: &RequestId) -> Response {
    tracing::warn!(reference = id.0, "request without the page's token refused");
    let text = "this page is too old, or another site sent it; reload and try again";
    refusal(headers, StatusCode::FORBIDDEN, "csrf", text, &id.0)
}

async fn sign_out(
    State(shared): State<Arc<Shared>>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    who: SignedIn,
    Form(form): Form<CsrfForm>,
) -> Response {
    if !who.allows(&headers, form.csrf.as_deref()) {
        return foreign(&headers, &id);
    }
    // Who leaves the portal does not go on administering.
    let admin = cookie(&headers, admin::ADMIN_COOKIE).map(Secret::from);
    for token in [Some(who.token), admin].into_iter().flatten() {
        if let Err(error) = shared.farm.end_session(&token).await {
            return failure(&headers, &id, &error);
        }
    }
    let cookies = [SESSION_COOKIE, admin::ADMIN_COOKIE].map(forget_cookie);
    with_cookies(Redirect::to("/sign-in?bye=1").into_response(), &cookies)
}

fn failure(headers: &HeaderMap, id: &RequestId, error: &FarmError) -> Response {
    let mut extensions = axum::http::Extensions::new();
    extensions.insert(id.clone());
    pages::failure(headers, &extensions, error)
}

async fn rows(farm: &Farm, who: &SignedIn) -> Result<Vec<pages::Row>, FarmError> {
    let desktops = farm.desktop_infos(Some(&who.session.user.name)).await?;
    Ok(desktops.into_iter().map(pages::Row::from).collect())
}

async fn desktops(
    State(shared): State<Arc<Shared>>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    who: SignedIn,
) -> Response {
    let (desktops, problem) = match rows(&shared.farm, &who).await {
        Ok(rows) => (rows, None),
        Err(error) => return failure(&headers, &id, &error),
    };
    let user = who.session.user.name.as_str();
    let initial = user.chars().next().unwrap_or('?');
    let csrf = who.session.csrf_token();
    let admin = who.session.user.admin;
    render(StatusCode::OK, &pages::Desktops { assets: &assets::BASE, csrf, user, initial, admin, problem, desktops })
}

async fn desktops_state(
    State(shared): State<Arc<Shared>>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    who: SignedIn,
) -> Response {
    match rows(&shared.farm, &who).await {
        Ok(rows) => Json(rows).into_response(),
        Err(error) => failure(&headers, &id, &error),
    }
}

/// A desktop's number in a path; anything else is no page.
fn number(text: &str) -> Result<DesktopId, FarmError> {
    text.parse::<DesktopId>()
        .map_err(|error| FarmError::new(ErrorKind::NotFound, "there is no such desktop").because(error))
}

async fn desktop(
    State(shared): State<Arc<Shared>>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    who: SignedIn,
    Path(desktop): Path<String>,
) -> Response {
    let found = match number(&desktop) {
        Ok(number) => shared.farm.desktop_of(&who.session.user.name, number).await,
        Err(error) => Err(error),
    };
    match found {
        Ok(desktop) => {
            let csrf = who.session.csrf_token();
            let (id, name) = (desktop.id.number(), &*desktop.name);
            let preload = &assets::MODULES;
            render(StatusCode::OK, &pages::Desktop { assets: &assets::BASE, csrf, id, name, preload })
        }
        Err(error) => failure(&headers, &id, &error),
    }
}

async fn stop(
    State(shared): State<Arc<Shared>>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    who: SignedIn,
    Path(desktop): Path<String>,
    Form(form): Form<CsrfForm>,
) -> Response {
    if !who.allows(&headers, form.csrf.as_deref()) {
        return foreign(&headers, &id);
    }
    let stopped = async {
        let desktop = shared.farm.desktop_of(&who.session.user.name, number(&desktop)?).await?;
        shared.farm.stop(desktop.id).await
    };
    match stopped.await {
        Ok(()) if wants_json(&headers) => StatusCode::NO_CONTENT.into_response(),
        Ok(()) => Redirect::to("/desktops").into_response(),
        Err(error) => failure(&headers, &id, &error),
    }
}

/// Makes a desktop run and tells the steps as they begin, one JSON object a
/// line: `{"step", "text"}`, then `{"ready": true}` or `{"error": {…}}`.
async fn open(
    State(shared): State<Arc<Shared>>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    who: SignedIn,
    Path(desktop): Path<String>,
) -> Response {
    if !who.allows(&headers, None) {
        return foreign(&headers, &id);
    }
    let found = match number(&desktop) {
        Ok(number) => shared.farm.desktop_of(&who.session.user.name, number).await,
        Err(error) => Err(error),
    };
    let desktop = match found {
        Ok(desktop) => desktop.id,
        Err(error) => return failure(&headers, &id, &error),
    };
    let (lines, told) = mpsc::channel::<String>(16);
    tokio::spawn(async move {
        let (tell, mut news) = mpsc::channel(16);
        let tell_lines = lines.clone();
        let passing = async move {
            while let Some(progress) = news.recv().await {
                // A browser that left does not keep a start from going on.
                let _gone = tell_lines.send(line(&progress)).await;
            }
        };
        let (started, ()) = tokio::join!(shared.farm.start(desktop, tell), passing);
        let last = match started {
            Ok(_timings) => json!({ "ready": true }),
            Err(error) => {
                tracing::warn!(reference = id.0, %desktop, %error, cause = wire::causes(&error), "start failed");
                json!({ "error": { "code": error.code(), "message": wire::explained(&error), "id": id.0 } })
            }
        };
        let _gone = lines.send(format!("{last}\n")).await;
    });
    let lines = stream::unfold(told, |mut told| async {
        told.recv().await.map(|line| (Ok::<_, std::convert::Infallible>(line), told))
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

fn line(progress: &Progress) -> String {
    let step = match progress {
        Progress::Step(step) => json!(step),
        _ => json!("news"),
    };
    format!("{}\n", json!({ "step": step, "text": progress.text() }))
}

async fn licences() -> Response {
    let page = pages::Licences { assets: &assets::BASE, version: assets::NOVNC_VERSION, texts: assets::LICENCES };
    render(StatusCode::OK, &page)
}
