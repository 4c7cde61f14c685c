//! What goes on in the farm, and who is signed in.

use std::sync::Arc;

use axum::{
    Extension,
    extract::{Path, State},
    response::{IntoResponse as _, Redirect, Response},
};
use qvd_farm::{ErrorKind, FarmError, SessionInfo};
use qvd_node::MemoryReport;

use super::{
    AdminState, Who,
    images::image_row,
    pages::{
        Fact, Frame, Overview, STATES, SessionRow, Sessions, Share, ago, answer, failure, kind_word, mib, sentence,
    },
};
use crate::portal::assets;

const SESSIONS: &str = "sessions";

pub(super) async fn overview(State(state): State<Arc<AdminState>>, Extension(who): Extension<Who>) -> Response {
    let farm = state.farm();
    let known = async {
        Ok::<_, FarmError>((
            farm.desktop_infos(None).await?,
            farm.users().await?.len(),
            farm.sessions(None).await?.len(),
        ))
    };
    let (desktops, users, sessions) = match known.await {
        Ok(known) => known,
        Err(error) => return failure(&who, "overview", &error),
    };
    let count = |state| desktops.iter().filter(|info| info.status.state == state).count();
    // A host that does not tell of one thing tells of the others.
    let memory = farm.memory().await.map_err(|error| sentence(&error));
    let shares = memory.as_ref().map(|report| report.desktops.iter().map(share).collect()).unwrap_or_default();
    let images = farm.images().await.map_err(|error| sentence(&error));
    let page = Overview {
        assets: &assets::BASE,
        frame: Frame::new(&who, "overview"),
        states: STATES.into_iter().map(|state| (state.as_str(), count(state))).collect(),
        desktops: desktops.len(),
        users,
        sessions,
        memory: memory.map(|report| reported(&report)),
        shares,
        images: images.map(|images| images.iter().map(image_row).collect()),
    };
    answer(None, &page)
}

fn reported(report: &MemoryReport) -> Vec<Fact> {
    let free = format!("{} of {}", mib(report.available.get()), mib(report.total.get()));
    let mut facts = vec![
        ("Free", free),
        ("Free swap", mib(report.swap.get())),
        ("Pressure", format!("something waited in {} % of the last ten seconds", report.pressure_percent)),
    ];
    let merging = match (&report.merging, &report.not_merging) {
        (_, Some(why)) => format!("no: {why}"),
        (Some(cost), None) if cost.running => format!("yes; saves {}", mib(cost.saved_bytes)),
        (Some(cost), None) => format!("not needed now; saves {}", mib(cost.saved_bytes)),
        (None, None) => "not known".to_owned(),
    };
    facts.push(("Merging of equal pages", merging));
    let stock = report.stock;
    if stock.templates > 0 {
        let (all, ready) = (mib(stock.templates_memory.get()), mib(stock.ready_memory.get()));
        facts.push((
            "Templates",
            format!("{} with {all}; {} clones stand ready with {ready}", stock.templates, stock.ready),
        ));
    }
    facts
}

fn share(desktop: &qvd_node::DesktopMemory) -> Share {
    Share {
        id: desktop.id.number(),
        activity: desktop.activity.clone(),
        has: mib(desktop.resident.get()),
        uses: mib(desktop.used.get()),
        owed: mib(desktop.minimum.get()),
        most: mib(desktop.maximum.get()),
    }
}

pub(super) async fn sessions(State(state): State<Arc<AdminState>>, Extension(who): Extension<Who>) -> Response {
    sessions_page(&state, &who, None).await
}

async fn sessions_page(state: &AdminState, who: &Who, problem: Option<&FarmError>) -> Response {
    let row = |session: SessionInfo| SessionRow {
        id: session.id,
        user: session.user.to_string(),
        kind: kind_word(session.kind),
        since: ago(session.created_unix_s),
        used: ago(session.last_used_unix_s),
        own: session.id == who.session.info.id,
    };
    match state.farm().sessions(None).await {
        Ok(sessions) => {
            let sessions = sessions.into_iter().map(row).collect();
            let frame = Frame::new(who, SESSIONS).with(problem);
            answer(problem, &Sessions { assets: &assets::BASE, frame, sessions })
        }
        Err(error) => failure(who, SESSIONS, &error),
    }
}

pub(super) async fn end_session(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Path(id): Path<String>,
) -> Response {
    let ended = async {
        let id: i64 = id
            .parse()
            .map_err(|error| FarmError::new(ErrorKind::NotFound, "there is no such session").because(error))?;
        let open = state.farm().sessions(None).await?;
        let user = open.iter().find(|session| session.id == id).map(|session| session.user.to_string());
        let object = format!("session {id} of user {}", user.as_deref().unwrap_or("?"));
        let farm = state.farm().clone();
        state.carry_out(&who, "end", object, async move { farm.end_session_by_id(id).await }).await
    };
    match ended.await {
        Ok(()) => Redirect::to("/admin/sessions").into_response(),
        Err(error) => sessions_page(&state, &who, Some(&error)).await,
    }
}
