//! Requests to what is done with images, with who may.

use std::{sync::Arc, thread};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, FromRequest as _, FromRequestParts as _, Request, State},
    http::{Method, StatusCode},
    response::{IntoResponse as _, Response},
    routing::{MethodFilter, on},
};
use qvd_core::FlavourName;
use qvd_farm::{ErrorKind, Farm, FarmError};
use qvd_storage::Repository;
use tokio::sync::{mpsc, oneshot};

use super::{
    Caller,
    dto::Event,
    error::ApiError,
    router::{Admin, Answer, ApiState, Asked, Body, PROGRESS_QUEUE, events},
};
use crate::images::{
    Clone, Compare, Export, Fsck, Gc, ImageCall, Import, Log, News, Pull, Push, PutTag, Reflog, Remove, RemoveTag,
    Revert, Show, Tags,
};

/// Longest request body, in bytes: a recipe and a bundle of certificates fit.
const MAX_BODY: usize = 1 << 20;

/// Everything below `images/`.
pub(super) fn routes() -> Router<ApiState> {
    let router = Router::new();
    let router = with::<Log>(with::<Show>(with::<Compare>(with::<Tags>(with::<Reflog>(router)))));
    let router = with::<PutTag>(with::<RemoveTag>(with::<Remove>(with::<Revert>(router))));
    let router = with::<Import>(with::<Export>(with::<Gc>(with::<Fsck>(router))));
    with::<Push>(with::<Pull>(with::<Clone>(router))).layer(DefaultBodyLimit::max(MAX_BODY))
}

fn with<C: ImageCall>(router: Router<ApiState>) -> Router<ApiState> {
    // Our own methods are all of those that there is a filter for.
    let filter = MethodFilter::try_from(C::METHOD).unwrap_or(MethodFilter::POST);
    router.route(&format!("/images/{}", C::PATH), on(filter, answer::<C>))
}

async fn answer<C: ImageCall>(
    State(ApiState { farm }): State<ApiState>,
    Admin(caller): Admin,
    request: Request,
) -> Answer<Response> {
    let mut call: C = if matches!(C::METHOD, Method::GET | Method::DELETE) {
        Asked::from_request_parts(&mut request.into_parts().0, &()).await?.0
    } else {
        Body::from_request(request, &()).await?.0
    };
    match caller.user() {
        Some(_) if call.host_path().is_some() => {
            let message = "files and directories of the host are for its own administrator: run `qvd image` there";
            return Err(ApiError::plain(StatusCode::FORBIDDEN, "forbidden", message));
        }
        Some(user) => call.asked_by(user),
        None => {}
    }
    if let Some(flavour) = call.removes() {
        unfollowed(&farm, flavour, &call.cannot()).await.map_err(|error| ApiError::new(&caller, &error))?;
    }
    let Some(repository) = farm.repository() else {
        let message = "the images of this host are not on this machine";
        return Err(ApiError::plain(StatusCode::NOT_IMPLEMENTED, "no_repository", message));
    };
    let (sender, news) = mpsc::channel(PROGRESS_QUEUE);
    let work = work(caller.clone(), repository, call, sender);
    if C::LONG {
        let event = |News { text, amount }| Event::Progress { step: None, text, amount };
        return events(caller, news, event, work).await;
    }
    work.await.map(|answer| Json(answer).into_response()).map_err(|error| ApiError::new(&caller, &error))
}

/// Refuses what would take away a flavour that desktops follow.
async fn unfollowed(farm: &Farm, flavour: &FlavourName, cannot: &str) -> Result<(), FarmError> {
    let followers = farm.desktops(None).await?.into_iter().filter(|desktop| desktop.flavour == *flavour);
    let followers: Vec<String> = followers.map(|desktop| desktop.id.to_string()).collect();
    let who = match followers.as_slice() {
        [] => return Ok(()),
        [one] => format!("desktop {one} follows it: remove that first"),
        [some @ .., last] if some.len() < 5 => {
            format!("desktops {} and {last} follow it: remove them first", some.join(", "))
        }
        many => format!("{} desktops follow it: remove them first", many.len()),
    };
    Err(FarmError::new(ErrorKind::Busy, format!("{cannot}: {who}")))
}

/// Carries a call out on a thread of its own: nobody waits for it when the daemon
/// ends, and what it leaves then is what it leaves after a crash: nothing.
async fn work<C: ImageCall>(
    caller: Caller,
    repository: Arc<Repository>,
    call: C,
    news: mpsc::Sender<News>,
) -> Result<C::Answer, FarmError> {
    let cannot = call.cannot();
    let failed = |what: &str| FarmError::with_code(ErrorKind::Failed, "internal", format!("{cannot}: {what}"));
    let (give, answer) = oneshot::channel();
    let run = move || {
        let tell = &mut |one| {
            if let Err(error) = news.try_send(one) {
                tracing::trace!(%error, "news were left out");
            }
        };
        // Whoever asked may have left.
        drop(give.send(call.carry_out(&repository, tell)));
    };
    let started = thread::Builder::new().name("images".to_owned()).spawn(run);
    started.map_err(|error| failed("no thread can be started").because(error))?;
    let answer = answer.await.map_err(|error| failed("it did not end").because(error))??;
    if C::METHOD != Method::GET {
        let who = caller.user().map_or_else(|| "root".to_owned(), ToString::to_string);
        tracing::info!(who, what = cannot.strip_prefix("cannot ").unwrap_or(&cannot), "done with images");
    }
    Ok(answer)
}
