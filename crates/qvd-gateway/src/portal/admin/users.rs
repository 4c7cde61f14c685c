//! Users: who there is, who administers, passwords.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Extension, Form,
    extract::{Path, Query, State},
    response::{IntoResponse as _, Redirect, Response},
};
use qvd_core::{TenantName, UserName};
use qvd_farm::{ErrorKind, FarmError, OwnedDesktops, Secret, User};
use serde::Deserialize;

use super::{
    AdminState, Who,
    desktops::lost_with,
    pages::{Frame, OneUser, Remove, Row, UserRow, Users, ago, answer, failure, field, given, refreshing},
    work::{Action, Object, Seen},
};
use crate::portal::assets;

const PLACE: &str = "users";

/// A user who is to be added.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct AddForm {
    pub(super) name: String,
    pub(super) tenant: String,
    pub(super) admin: String,
    password: Option<Secret>,
    again: Option<Secret>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PasswordForm {
    password: Option<Secret>,
    again: Option<Secret>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RoleForm {
    admin: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RemoveForm {
    desktops: String,
}

/// What was just done, for a page to say.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Done {
    done: String,
}

fn page_of(name: &UserName) -> String {
    format!("/admin/users/{name}")
}

fn found(name: &str) -> Result<UserName, FarmError> {
    name.parse().map_err(|error| FarmError::new(ErrorKind::NotFound, "there is no such user").because(error))
}

/// The password that was typed twice.
fn typed(password: Option<Secret>, again: Option<Secret>) -> Result<Secret, FarmError> {
    match (password, again) {
        (Some(password), Some(again)) if password.expose() == again.expose() => Ok(password),
        _ => Err(FarmError::with_code(ErrorKind::Invalid, "invalid_password", "password: the two differ")),
    }
}

pub(super) async fn list(State(state): State<Arc<AdminState>>, Extension(who): Extension<Who>) -> Response {
    list_page(&state, &who, &AddForm::default(), None).await
}

async fn list_page(state: &AdminState, who: &Who, form: &AddForm, problem: Option<&FarmError>) -> Response {
    let known = async {
        let mut desktops = BTreeMap::<_, usize>::new();
        for desktop in state.farm().desktops(None).await? {
            *desktops.entry(desktop.user).or_default() += 1;
        }
        let users = state.farm().users().await?;
        let row = |user: &User| UserRow::new(user, desktops.get(&user.name).copied().unwrap_or(0), state.works());
        Ok(users.iter().map(row).collect::<Vec<_>>())
    };
    match known.await {
        Ok(users) => {
            let is_under_way = problem.is_none() && users.iter().any(|user| user.under_way.is_some());
            let frame = Frame::new(who, PLACE).with(problem);
            let page = answer(problem, &Users { assets: &assets::BASE, frame, users, form });
            refreshing(page, is_under_way, "/admin/users")
        }
        Err(error) => failure(who, PLACE, &error),
    }
}

pub(super) async fn add(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Form(mut form): Form<AddForm>,
) -> Response {
    let (password, again) = (form.password.take(), form.again.take());
    let added = async {
        let name: UserName = field("user name", &form.name)?;
        let tenant = given::<TenantName>("tenant", &form.tenant)?.unwrap_or_default();
        let (password, admin) = (typed(password, again)?, form.admin == "yes");
        let action = if admin { "add as administrator" } else { "add" };
        let (farm, object) = (state.farm().clone(), Object::User(name.clone()));
        let work = async move { farm.add_user_of(&tenant, &name, &password, admin).await };
        state.carry_out(&who, action, object, work).await
    };
    match added.await {
        Ok(user) => Redirect::to(&page_of(&user.name)).into_response(),
        Err(error) => list_page(&state, &who, &form, Some(&error)).await,
    }
}

pub(super) async fn show(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Path(name): Path<String>,
    Query(Done { done }): Query<Done>,
) -> Response {
    let notice = (done == "password").then_some("The password is set, and the user's sessions are ended.");
    match found(&name) {
        Ok(name) => page(&state, &who, &name, None, notice).await,
        Err(error) => failure(&who, PLACE, &error),
    }
}

async fn page(
    state: &AdminState,
    who: &Who,
    name: &UserName,
    problem: Option<&FarmError>,
    notice: Option<&'static str>,
) -> Response {
    let known = async {
        let user = state.farm().user(name).await?;
        Ok((user, state.farm().desktop_infos(Some(name)).await?, state.farm().sessions(Some(name)).await?))
    };
    let (user, desktops, sessions) = match known.await {
        Ok(known) => known,
        Err(error) => return failure(who, PLACE, problem.unwrap_or(&error)),
    };
    let facts = vec![
        ("Role", if user.admin { "administrator" } else { "user" }.to_owned()),
        ("Tenant", user.tenant.to_string()),
        ("Added", ago(user.created_unix_s)),
        ("Sessions", sessions.len().to_string()),
    ];
    let is_under_way = matches!(state.works().at(&Object::User(name.clone())), Some(Seen::UnderWay(_)));
    let page = OneUser {
        assets: &assets::BASE,
        frame: Frame::new(who, PLACE).with(problem).noting(notice),
        name: name.as_str(),
        admin: user.admin,
        own: *name == who.session.user.name,
        facts,
        desktops: desktops.iter().map(|info| Row::new(info, state.works())).collect(),
    };
    refreshing(answer(problem, &page), is_under_way && problem.is_none(), "/admin/users")
}

pub(super) async fn set_password(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Path(name): Path<String>,
    Form(form): Form<PasswordForm>,
) -> Response {
    let name = match found(&name) {
        Ok(name) => name,
        Err(error) => return failure(&who, PLACE, &error),
    };
    let set = async {
        let password = typed(form.password, form.again)?;
        let (farm, user) = (state.farm().clone(), name.clone());
        let work = async move { farm.set_password(&user, &password).await };
        state.carry_out(&who, "set the password of", Object::User(name.clone()), work).await
    };
    match set.await {
        Ok(()) => Redirect::to(&format!("{}?done=password", page_of(&name))).into_response(),
        Err(error) => page(&state, &who, &name, Some(&error), None).await,
    }
}

/// Refuses what would shut out who does it: another administrator, or the host's, can.
fn not_oneself(who: &Who, name: &UserName, what: &str) -> Result<(), FarmError> {
    if who.session.user.name != *name {
        return Ok(());
    }
    let text = format!("cannot {what} user {name}: that is you, another administrator has to");
    Err(FarmError::new(ErrorKind::Conflict, text))
}

pub(super) async fn set_admin(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Path(name): Path<String>,
    Form(form): Form<RoleForm>,
) -> Response {
    let name = match found(&name) {
        Ok(name) => name,
        Err(error) => return failure(&who, PLACE, &error),
    };
    let set = async {
        let admin = form.admin == "yes";
        let action = if admin { "make an administrator of" } else { "take administration from" };
        if !admin {
            not_oneself(&who, &name, action)?;
        }
        let (farm, user) = (state.farm().clone(), name.clone());
        let work = async move { farm.set_admin(&user, admin).await };
        state.carry_out(&who, action, Object::User(name.clone()), work).await
    };
    match set.await {
        Ok(()) => Redirect::to(&page_of(&name)).into_response(),
        Err(error) => page(&state, &who, &name, Some(&error), None).await,
    }
}

pub(super) async fn confirm_removal(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Path(name): Path<String>,
) -> Response {
    let known = async {
        let name = found(&name)?;
        state.farm().user(&name).await?;
        not_oneself(&who, &name, "remove")?;
        let desktops = state.farm().desktop_infos(Some(&name)).await?;
        Ok((desktops, state.farm().sessions(Some(&name)).await?.len(), name))
    };
    let (desktops, sessions, name) = match known.await {
        Ok(known) => known,
        Err(error) => return failure(&who, PLACE, &error),
    };
    let of_each = |info| {
        let desktop: &qvd_farm::DesktopInfo = info;
        format!("Desktop {} ({}). {}", desktop.desktop.id, desktop.desktop.name, lost_with(desktop).join(" "))
    };
    let mut lost: Vec<String> = desktops.iter().map(of_each).collect();
    lost.push(format!("The user's password, and open sessions: {sessions}."));
    answer(
        None,
        &Remove {
            assets: &assets::BASE,
            frame: Frame::new(&who, PLACE),
            what: format!("user {name}"),
            lost,
            action: format!("{}/remove", page_of(&name)),
            back: page_of(&name),
            with_desktops: !desktops.is_empty(),
        },
    )
}

pub(super) async fn remove(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Path(name): Path<String>,
    Form(form): Form<RemoveForm>,
) -> Response {
    let name = match found(&name) {
        Ok(name) => name,
        Err(error) => return failure(&who, PLACE, &error),
    };
    // Desktops that came after the page was read do not go with it unread.
    let desktops = if form.desktops == "remove" { OwnedDesktops::Remove } else { OwnedDesktops::Refuse };
    let removed = async {
        not_oneself(&who, &name, "remove")?;
        state.farm().user(&name).await?;
        let (farm, user) = (state.farm().clone(), name.clone());
        let work = async move { farm.remove_user(&user, desktops).await };
        state.begin(&who, Object::User(name.clone()), Action::Remove, work).await
    };
    match removed.await {
        Ok(()) => Redirect::to("/admin/users").into_response(),
        Err(error) => page(&state, &who, &name, Some(&error), None).await,
    }
}
