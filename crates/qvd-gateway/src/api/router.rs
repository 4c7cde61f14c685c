//! Requests to the farm's methods, with who may.

use std::convert::Infallible;

use axum::{
    Json, Router, body,
    extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Path, Query, Request, State},
    http::{StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
    routing::{delete, get, post, put},
};
use futures_util::{Stream, stream};
use qvd_core::{DesktopId, FlavourName, StartStep, UserName};
use qvd_farm::{
    Desktop, DesktopInfo, Farm, FarmError, Flavour, FlavourDefaults, OwnedDesktops, Progress, Secret, SessionInfo, User,
};
use qvd_guest::Stats;
use qvd_node::{ImageSummary, MemoryReport, NewVersion, PortView, Version};
use qvd_storage::BuildOptions;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    Caller,
    dto::{
        AddUser, BuildImage, ChangeDesktop, ChangeUser, CreateDesktop, Event, ExplainFrames, Health, SetPassword,
        WhoAmI,
    },
    error::ApiError,
    exec, images, repository,
};

/// Longest request body, in bytes: an argument list of a program fits.
const MAX_BODY: usize = 64 * 1024;

/// Progress reports that wait for a slow reader before some are left out.
pub(super) const PROGRESS_QUEUE: usize = 64;

/// What the handlers share.
#[derive(Debug, Clone)]
pub struct ApiState {
    /// The control plane.
    pub farm: Farm,
}

/// The API. Each request must carry a [`Caller`] in its extensions.
pub fn router(state: ApiState) -> Router {
    let v1 = Router::new()
        .route("/health", get(health))
        .route("/whoami", get(who_am_i))
        .route("/users", get(users).post(add_user))
        .route("/users/{name}", delete(remove_user).patch(change_user))
        .route("/users/{name}/password", put(set_password))
        .route("/images", get(newest_images).post(build_image))
        .route("/flavours", get(flavours))
        .route("/flavours/{name}/defaults", put(set_flavour_defaults).delete(forget_flavour_defaults))
        .route("/memory", get(memory))
        .route("/desktops", get(desktops).post(create_desktop))
        .route("/desktops/{id}", get(desktop).patch(change_desktop).delete(remove_desktop))
        .route("/desktops/{id}/start", post(start))
        .route("/desktops/{id}/stop", post(stop))
        .route("/desktops/{id}/commit", post(commit))
        .route("/desktops/{id}/stats", get(stats))
        .route("/desktops/{id}/network", get(network).post(explain))
        .route("/desktops/{id}/exec", post(exec::exec))
        .route("/repository/pull", get(repository::pull))
        .route("/repository/push", get(repository::push))
        .merge(images::routes())
        .route("/sessions", get(sessions))
        .route("/sessions/{id}", delete(end_session))
        .fallback(|| async { ApiError::plain(StatusCode::NOT_FOUND, "unknown_path", "there is no such path") })
        .method_not_allowed_fallback(|| async {
            ApiError::plain(StatusCode::METHOD_NOT_ALLOWED, "wrong_method", "this path does not take that method")
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(state);
    Router::new().nest("/api/v1", v1)
}

pub(super) type Answer<T> = Result<T, ApiError>;

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Response> {
        parts.extensions.get::<Self>().cloned().ok_or_else(|| {
            ApiError::plain(StatusCode::UNAUTHORIZED, "unauthenticated", "sign in first").into_response()
        })
    }
}

/// An administrator; others are refused before their request is looked at.
pub(super) struct Admin(pub(super) Caller);

impl<S: Sync> FromRequestParts<S> for Admin {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Response> {
        let caller = Caller::from_request_parts(parts, state).await?;
        if caller.is_admin() { Ok(Self(caller)) } else { Err(ApiError::forbidden().into_response()) }
    }
}

/// A JSON body, refused in the API's own words.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned, S: Sync + Send> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Answer<Self> {
        let Json(body) = Json::from_request(request, state).await?;
        Ok(Self(body))
    }
}

/// What a path names.
pub(super) struct At<T>(pub(super) T);

impl<T: DeserializeOwned + Send, S: Sync + Send> FromRequestParts<S> for At<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Self> {
        let Path(named) = Path::from_request_parts(parts, state).await?;
        Ok(Self(named))
    }
}

/// What stands behind the `?`.
pub(super) struct Asked<T>(pub(super) T);

impl<T: DeserializeOwned, S: Sync + Send> FromRequestParts<S> for Asked<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Self> {
        let Query(asked) = Query::from_request_parts(parts, state).await?;
        Ok(Self(asked))
    }
}

/// A desktop that this caller may see.
pub(super) async fn visible(farm: &Farm, caller: &Caller, id: DesktopId) -> Answer<Desktop> {
    let found = match caller {
        Caller::Admin { .. } => farm.desktop(id).await,
        Caller::User(user) => farm.desktop_of(user, id).await,
    };
    found.map_err(|e| ApiError::new(caller, &e))
}

async fn health() -> Json<Health> {
    Json(Health { status: "ok".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() })
}

async fn who_am_i(caller: Caller) -> Json<WhoAmI> {
    Json(WhoAmI { user: caller.user().cloned(), admin: caller.is_admin() })
}

async fn users(State(ApiState { farm }): State<ApiState>, Admin(caller): Admin) -> Answer<Json<Vec<User>>> {
    farm.users().await.map(Json).map_err(|e| ApiError::new(&caller, &e))
}

async fn add_user(
    State(ApiState { farm }): State<ApiState>,
    Admin(caller): Admin,
    Body(add): Body<AddUser>,
) -> Answer<(StatusCode, Json<User>)> {
    let user = farm.add_user_of(&add.tenant, &add.name, &add.password, add.admin).await;
    let user = user.map_err(|e| ApiError::new(&caller, &e))?;
    Ok((StatusCode::CREATED, Json(user)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RemoveUser {
    desktops: Option<OwnedWord>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum OwnedWord {
    Refuse,
    Remove,
}

async fn remove_user(
    State(ApiState { farm }): State<ApiState>,
    Admin(caller): Admin,
    At(name): At<UserName>,
    Asked(how): Asked<RemoveUser>,
) -> Answer<StatusCode> {
    let desktops = match how.desktops {
        Some(OwnedWord::Remove) => OwnedDesktops::Remove,
        Some(OwnedWord::Refuse) | None => OwnedDesktops::Refuse,
    };
    done(&caller, farm.remove_user(&name, desktops).await)
}

async fn change_user(
    State(ApiState { farm }): State<ApiState>,
    Admin(caller): Admin,
    At(name): At<UserName>,
    Body(change): Body<ChangeUser>,
) -> Answer<StatusCode> {
    done(&caller, farm.set_admin(&name, change.admin).await)
}

async fn set_password(
    State(ApiState { farm }): State<ApiState>,
    caller: Caller,
    At(name): At<UserName>,
    Body(set): Body<SetPassword>,
) -> Answer<StatusCode> {
    if let Caller::User(user) = &caller {
        if *user != name {
            return Err(ApiError::forbidden());
        }
        // Whoever sits down at an open browser must not lock its user out.
        let current = set.current.unwrap_or_else(|| Secret::from(""));
        farm.authenticate(name.as_str(), &current, None).await.map_err(|e| ApiError::new(&caller, &e))?;
    }
    done(&caller, farm.set_password(&name, &set.password).await)
}

async fn newest_images(State(ApiState { farm }): State<ApiState>, caller: Caller) -> Answer<Json<Vec<ImageSummary>>> {
    farm.images().await.map(Json).map_err(|e| ApiError::new(&caller, &e))
}

async fn build_image(
    State(ApiState { farm }): State<ApiState>,
    Admin(caller): Admin,
    Body(build): Body<BuildImage>,
) -> Answer<Response> {
    if !build.recipe.is_absolute() {
        // The daemon's working directory is not the caller's.
        let message = format!("the recipe's path must be absolute: `{}`", build.recipe.display());
        return Err(ApiError::plain(StatusCode::UNPROCESSABLE_ENTITY, "invalid_path", message));
    }
    let (lines, news) = mpsc::channel(PROGRESS_QUEUE);
    let mut options = BuildOptions::default();
    let author = caller.user().map(ToString::to_string).or(build.author);
    options.author = author.unwrap_or(options.author);
    options.message = build.message.unwrap_or(options.message);
    let work = async move { farm.build_image(&build.recipe, options, lines).await };
    events(caller, news, |text| news_of(None, &text), work).await
}

async fn flavours(State(ApiState { farm }): State<ApiState>, caller: Caller) -> Answer<Json<Vec<Flavour>>> {
    farm.flavours().await.map(Json).map_err(|e| ApiError::new(&caller, &e))
}

async fn set_flavour_defaults(
    State(ApiState { farm }): State<ApiState>,
    Admin(caller): Admin,
    At(name): At<FlavourName>,
    Body(defaults): Body<FlavourDefaults>,
) -> Answer<StatusCode> {
    done(&caller, farm.set_flavour_defaults(&name, defaults).await)
}

async fn forget_flavour_defaults(
    State(ApiState { farm }): State<ApiState>,
    Admin(caller): Admin,
    At(name): At<FlavourName>,
) -> Answer<StatusCode> {
    done(&caller, farm.forget_flavour_defaults(&name).await)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Whose {
    user: Option<UserName>,
}

impl Whose {
    /// Users see what is their own, whatever they ask for.
    fn seen_by(self, caller: &Caller) -> Option<UserName> {
        match caller {
            Caller::Admin { .. } => self.user,
            Caller::User(user) => Some(user.clone()),
        }
    }
}

async fn desktops(
    State(ApiState { farm }): State<ApiState>,
    caller: Caller,
    Asked(whose): Asked<Whose>,
) -> Answer<Json<Vec<DesktopInfo>>> {
    let user = whose.seen_by(&caller);
    if let Some(name) = &user {
        farm.user(name).await.map_err(|e| ApiError::new(&caller, &e))?;
    }
    farm.desktop_infos(user.as_ref()).await.map(Json).map_err(|e| ApiError::new(&caller, &e))
}

async fn create_desktop(
    State(ApiState { farm }): State<ApiState>,
    Admin(caller): Admin,
    Body(create): Body<CreateDesktop>,
) -> Answer<(StatusCode, Json<Desktop>)> {
    let user =
        create.user.clone().or_else(|| caller.user().cloned()).ok_or_else(|| {
            ApiError::plain(StatusCode::UNPROCESSABLE_ENTITY, "no_user", "say whose desktop it is to be")
        })?;
    let desktop = farm.create_desktop(create.into_new(user)).await.map_err(|e| ApiError::new(&caller, &e))?;
    Ok((StatusCode::CREATED, Json(desktop)))
}

async fn desktop(
    State(ApiState { farm }): State<ApiState>,
    caller: Caller,
    At(id): At<DesktopId>,
) -> Answer<Json<DesktopInfo>> {
    visible(&farm, &caller, id).await?;
    farm.desktop_info(id).await.map(Json).map_err(|e| ApiError::new(&caller, &e))
}

async fn change_desktop(
    State(ApiState { farm }): State<ApiState>,
    Admin(caller): Admin,
    At(id): At<DesktopId>,
    Body(change): Body<ChangeDesktop>,
) -> Answer<StatusCode> {
    done(&caller, farm.set_blocked(id, change.blocked).await)
}

async fn remove_desktop(
    State(ApiState { farm }): State<ApiState>,
    Admin(caller): Admin,
    At(id): At<DesktopId>,
) -> Answer<StatusCode> {
    done(&caller, farm.remove_desktop(id).await)
}

async fn start(State(ApiState { farm }): State<ApiState>, caller: Caller, At(id): At<DesktopId>) -> Answer<Response> {
    visible(&farm, &caller, id).await?;
    let (steps, news) = mpsc::channel(PROGRESS_QUEUE);
    let line = |progress: Progress| match progress {
        Progress::Step(step) => news_of(Some(step), step.text()),
        other => news_of(None, other.text()),
    };
    events(caller, news, line, async move { farm.start(id, steps).await }).await
}

async fn stop(State(ApiState { farm }): State<ApiState>, caller: Caller, At(id): At<DesktopId>) -> Answer<StatusCode> {
    visible(&farm, &caller, id).await?;
    done(&caller, farm.stop(id).await)
}

async fn commit(
    State(ApiState { farm }): State<ApiState>,
    Admin(caller): Admin,
    At(id): At<DesktopId>,
    Body(new): Body<NewVersion>,
) -> Answer<(StatusCode, Json<Version>)> {
    let made = farm.commit(id, new).await.map_err(|e| ApiError::new(&caller, &e))?;
    Ok((StatusCode::CREATED, Json(made)))
}

async fn stats(
    State(ApiState { farm }): State<ApiState>,
    caller: Caller,
    At(id): At<DesktopId>,
) -> Answer<Json<Stats>> {
    visible(&farm, &caller, id).await?;
    farm.stats(id).await.map(Json).map_err(|e| ApiError::new(&caller, &e))
}

async fn memory(State(ApiState { farm }): State<ApiState>, Admin(caller): Admin) -> Answer<Json<MemoryReport>> {
    farm.memory().await.map(Json).map_err(|e| ApiError::new(&caller, &e))
}

async fn network(
    State(ApiState { farm }): State<ApiState>,
    caller: Caller,
    At(id): At<DesktopId>,
) -> Answer<Json<Option<PortView>>> {
    visible(&farm, &caller, id).await?;
    farm.network(id, Vec::new()).await.map(Json).map_err(|e| ApiError::new(&caller, &e))
}

async fn explain(
    State(ApiState { farm }): State<ApiState>,
    caller: Caller,
    At(id): At<DesktopId>,
    Body(asked): Body<ExplainFrames>,
) -> Answer<Json<Option<PortView>>> {
    visible(&farm, &caller, id).await?;
    let frames = asked.octets().map_err(|what| ApiError::plain(StatusCode::BAD_REQUEST, "invalid_frame", what))?;
    farm.network(id, frames).await.map(Json).map_err(|e| ApiError::new(&caller, &e))
}

async fn sessions(
    State(ApiState { farm }): State<ApiState>,
    caller: Caller,
    Asked(whose): Asked<Whose>,
) -> Answer<Json<Vec<SessionInfo>>> {
    let user = whose.seen_by(&caller);
    farm.sessions(user.as_ref()).await.map(Json).map_err(|e| ApiError::new(&caller, &e))
}

async fn end_session(State(ApiState { farm }): State<ApiState>, caller: Caller, At(id): At<i64>) -> Answer<StatusCode> {
    if let Caller::User(user) = &caller {
        let own = farm.sessions(Some(user)).await.map_err(|e| ApiError::new(&caller, &e))?;
        if !own.iter().any(|session| session.id == id) {
            return Err(ApiError::forbidden());
        }
    }
    done(&caller, farm.end_session_by_id(id).await)
}

/// News of the kind that has no amount.
fn news_of<T>(step: Option<StartStep>, text: &str) -> Event<T> {
    Event::Progress { step, text: text.to_owned(), amount: None }
}

fn done(caller: &Caller, result: Result<(), FarmError>) -> Answer<StatusCode> {
    result.map(|()| StatusCode::NO_CONTENT).map_err(|e| ApiError::new(caller, &e))
}

/// Answers with progress and then the result, one JSON object a line. What
/// fails before it has news is refused with a status of its own. The work goes
/// on when the caller leaves.
pub(super) async fn events<T, P>(
    caller: Caller,
    mut news: mpsc::Receiver<P>,
    event: fn(P) -> Event<T>,
    work: impl Future<Output = Result<T, FarmError>> + Send + 'static,
) -> Answer<Response>
where
    T: Serialize + Send + 'static,
    P: Send + 'static,
{
    let work = tokio::spawn(work);
    let first = news.recv().await;
    if first.is_none() {
        let result = ended(&caller, work).await?;
        return Ok(ndjson(stream::iter([Ok::<_, Infallible>(to_line(&Event::Done { result }))])));
    }
    let state = (first, news, Some(work), caller);
    Ok(ndjson(stream::unfold(state, move |(mut next, mut news, mut work, caller)| async move {
        if next.is_none() {
            next = news.recv().await;
        }
        let event = match next {
            Some(progress) => event(progress),
            None => match ended(&caller, work.take()?).await {
                Ok(result) => Event::Done { result },
                Err(refusal) => Event::Failed { error: refusal.into_info() },
            },
        };
        Some((Ok::<_, Infallible>(to_line(&event)), (None, news, work, caller)))
    })))
}

async fn ended<T>(caller: &Caller, work: JoinHandle<Result<T, FarmError>>) -> Answer<T> {
    match work.await {
        Ok(result) => result.map_err(|e| ApiError::new(caller, &e)),
        Err(error) => {
            tracing::error!(%error, "a request's work did not end");
            Err(ApiError::plain(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the work did not end"))
        }
    }
}

fn to_line<T: Serialize>(event: &Event<T>) -> Vec<u8> {
    // Our own types have neither maps with odd keys nor failing serialisers.
    let mut line = serde_json::to_vec(event).unwrap_or_default();
    line.push(b'\n');
    line
}

fn ndjson(lines: impl Stream<Item = Result<Vec<u8>, Infallible>> + Send + 'static) -> Response {
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body::Body::from_stream(lines)).into_response()
}
