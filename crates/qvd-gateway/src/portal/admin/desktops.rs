//! Desktops: all of them, one of them, and what is done with them.

use std::{collections::HashMap, net::Ipv4Addr, sync::Arc, time::Duration};

use axum::{
    Extension, Form,
    extract::{Path, Query, State},
    response::{IntoResponse as _, Redirect, Response},
};
use qvd_core::{Calls, DesktopId, DesktopState, Device, FlavourName, RootPolicy, Tag, UserName, Virtualizer};
use qvd_farm::{DesktopInfo, ErrorKind, FarmError, NewDesktop};
use qvd_node::PortView;
use serde::Deserialize;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};

use super::{
    AdminState, Who,
    pages::{
        self, Desktop, Desktops, Fact, Frame, LimitsForm, Remove, Row, ago, answer, choice, failure, field, given, mib,
        network, refreshing, root, runtime, sentence, short, state_of,
    },
    work::{Action, Object},
};
use crate::{
    api::dto::ExplainFrames,
    portal::{assets, number},
};

const PLACE: &str = "desktops";
/// Desktops on a page: each that runs is asked for its addresses.
const ROWS: usize = 50;
/// How long a page waits for what desktops and the kernel say of themselves.
const PATIENCE: Duration = Duration::from_secs(3);

/// Which desktops to list.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Wanted {
    user: String,
    state: String,
    page: usize,
}

/// A desktop that is to be made, as its form has it: what is empty comes from the flavour.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct NewForm {
    pub(super) user: String,
    pub(super) flavour: String,
    pub(super) name: String,
    pub(super) tag: String,
    pub(super) virtualizer: String,
    #[serde(flatten)]
    pub(super) limits: LimitsForm,
    pub(super) root: String,
    pub(super) network: String,
    pub(super) devices: String,
    pub(super) calls: String,
    pub(super) address: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct MaintenanceForm {
    blocked: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ExplainForm {
    frames: String,
}

fn page_of(id: DesktopId) -> String {
    format!("/admin/desktops/{id}")
}

pub(super) async fn list(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Query(wanted): Query<Wanted>,
) -> Response {
    let users = match state.farm().users().await {
        Ok(users) => users.into_iter().map(|user| user.name.to_string()).collect(),
        Err(error) => return failure(&who, PLACE, &error),
    };
    let (found, problem) = match matching(&state, &wanted).await {
        Ok(found) => (found, None),
        Err(error) => (Vec::new(), Some(error)),
    };
    let all = found.len();
    let first = wanted.page.saturating_mul(ROWS).min(all);
    let shown: Vec<_> = found.into_iter().skip(first).take(ROWS).collect();
    let mut rows: Vec<Row> = shown.iter().map(|info| Row::new(info, state.works())).collect();
    let ports = ports(&state, &shown).await;
    for row in &mut rows {
        if let Some(port) = ports.get(&row.id) {
            row.addresses = addresses(port);
        }
    }
    let is_under_way = rows.iter().any(|row| row.under_way);
    let page = Desktops {
        assets: &assets::BASE,
        frame: Frame::new(&who, PLACE).with(problem.as_ref()),
        users,
        user: wanted.user.parse().map_or_else(|_| String::new(), |name: UserName| name.to_string()),
        state: state_of(&wanted.state).map_or("", DesktopState::as_str),
        desktops: rows,
        all,
        before: wanted.page.checked_sub(1),
        after: (first + ROWS < all).then_some(wanted.page + 1),
    };
    let again = format!("/admin/desktops?user={}&state={}&page={}", page.user, page.state, wanted.page);
    refreshing(answer(problem.as_ref(), &page), is_under_way, &again)
}

/// The desktops that are asked for, by number.
async fn matching(state: &AdminState, wanted: &Wanted) -> Result<Vec<DesktopInfo>, FarmError> {
    let user = given::<UserName>("user", &wanted.user)?;
    if let Some(user) = &user {
        state.farm().user(user).await?;
    }
    let states = pages::STATES.map(|state| (state.as_str(), state));
    let wanted = choice("state", &wanted.state, &states)?;
    let mut found = state.farm().desktop_infos(user.as_ref()).await?;
    found.retain(|info| wanted.is_none_or(|wanted| info.status.state == wanted));
    Ok(found)
}

/// The ports of those that run, as far as they are known soon.
async fn ports(state: &AdminState, desktops: &[DesktopInfo]) -> HashMap<u32, PortView> {
    let mut asked = JoinSet::new();
    let running = desktops.iter().filter(|info| info.status.state == DesktopState::Running);
    for id in running.map(|info| info.desktop.id) {
        let farm = state.farm().clone();
        asked.spawn(async move { (id.number(), farm.network(id, Vec::new()).await) });
    }
    let (mut ports, until) = (HashMap::new(), Instant::now() + PATIENCE);
    while let Ok(Some(answered)) = timeout_at(until, asked.join_next()).await {
        if let Ok((id, Ok(Some(port)))) = answered {
            ports.insert(id, port);
        }
    }
    ports
}

fn addresses(port: &PortView) -> String {
    port.ipv6.map_or_else(|| port.ipv4.to_string(), |ipv6| format!("{}, {ipv6}", port.ipv4))
}

pub(super) async fn new(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Query(form): Query<NewForm>,
) -> Response {
    new_page(&state, &who, &form, None).await
}

async fn new_page(state: &AdminState, who: &Who, form: &NewForm, problem: Option<&FarmError>) -> Response {
    let known = async {
        let users = state.farm().users().await?.into_iter().map(|user| user.name.to_string()).collect();
        let flavours = state.farm().flavours().await?.into_iter().map(|flavour| flavour.name.to_string()).collect();
        Ok((users, flavours))
    };
    match known.await {
        Ok((users, flavours)) => {
            let frame = Frame::new(who, PLACE).with(problem);
            answer(problem, &pages::NewDesktop { assets: &assets::BASE, frame, users, flavours, form })
        }
        Err(error) => failure(who, PLACE, &error),
    }
}

pub(super) async fn create(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Form(form): Form<NewForm>,
) -> Response {
    let created = async {
        let new = asked_for(&state, &form).await?;
        let object = format!("a desktop of user {} with flavour {}", new.user, new.flavour);
        let farm = state.farm().clone();
        state.carry_out(&who, "create", object, async move { farm.create_desktop(new).await }).await
    };
    match created.await {
        Ok(desktop) => Redirect::to(&page_of(desktop.id)).into_response(),
        Err(error) => new_page(&state, &who, &form, Some(&error)).await,
    }
}

/// What a form asks for.
async fn asked_for(state: &AdminState, form: &NewForm) -> Result<NewDesktop, FarmError> {
    let mut new = NewDesktop::new(field("owner", &form.user)?, field::<FlavourName>("flavour", &form.flavour)?);
    let defaults = state.farm().flavour(&new.flavour).await?.defaults;
    new.name = Some(form.name.trim()).filter(|name| !name.is_empty()).map(str::to_owned);
    new.tag = given::<Tag>("tag", &form.tag)?;
    let runtimes =
        [("container", Virtualizer::Container), ("qemu", Virtualizer::Qemu), ("libvirt", Virtualizer::Libvirt)];
    new.virtualizer = choice("runtime", &form.virtualizer, &runtimes)?;
    new.limits = form.limits.over(defaults.limits)?;
    new.root = root(&form.root)?;
    new.net = network(&form.network)?;
    let devices = form.devices.split([' ', ',']).filter(|word| !word.is_empty());
    new.devices = devices.map(|word| field::<Device>("devices", word)).collect::<Result<_, _>>()?;
    new.calls = given::<Calls>("system calls", &form.calls)?;
    new.address = given::<Ipv4Addr>("address", &form.address)?;
    Ok(new)
}

pub(super) async fn show(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Path(id): Path<String>,
) -> Response {
    match number(&id) {
        Ok(id) => {
            let (page, is_under_way) = page(&state, &who, id, None, String::new(), Vec::new()).await;
            refreshing(page, is_under_way, &page_of(id))
        }
        Err(error) => failure(&who, PLACE, &error),
    }
}

/// A desktop's page, and whether something is under way at it.
async fn page(
    state: &AdminState,
    who: &Who,
    id: DesktopId,
    problem: Option<&FarmError>,
    frames: String,
    explained: Vec<String>,
) -> (Response, bool) {
    let info = match state.farm().desktop_info(id).await {
        Ok(info) => info,
        Err(error) => return (failure(who, PLACE, problem.unwrap_or(&error)), false),
    };
    let (stats, port) = if info.status.state == DesktopState::Running {
        let (farm, silent) = (state.farm(), || "it did not say in time".to_owned());
        let stats = timeout(PATIENCE, farm.stats(id));
        let network = timeout(PATIENCE, farm.network(id, Vec::new()));
        let (stats, network) = tokio::join!(stats, network);
        (
            Some(stats.map_err(|_| silent()).and_then(|stats| stats.map_err(|error| sentence(&error)))),
            Some(network.map_err(|_| silent()).and_then(|port| port.map_err(|error| sentence(&error)))),
        )
    } else {
        (None, None)
    };
    let stats = stats.map(|stats| {
        stats.map(|stats| {
            vec![
                ("Memory", mib(stats.pss_bytes)),
                ("Processes", stats.processes.to_string()),
                ("Clients", stats.clients.to_string()),
            ]
        })
    });
    let drops = match &port {
        Some(Ok(Some(port))) => port.drops.iter().map(|(reason, frames)| (reason.to_string(), *frames)).collect(),
        _ => Vec::new(),
    };
    let has_port = matches!(port, Some(Ok(Some(_))));
    let none = || vec![("Port", "none".to_owned())];
    let network = port.map(|port| port.map(|port| port.as_ref().map_or_else(none, ported)));
    let row = Row::new(&info, state.works());
    let is_under_way = row.under_way;
    let page = Desktop {
        assets: &assets::BASE,
        frame: Frame::new(who, PLACE).with(problem),
        row,
        facts: facts(&info),
        stats,
        network,
        has_port,
        drops,
        frames,
        explained,
    };
    (answer(problem, &page), is_under_way)
}

fn ported(port: &PortView) -> Vec<Fact> {
    let counters = port.counters;
    vec![
        ("Port", port.link.clone()),
        ("MAC", port.mac.to_string()),
        ("Addresses", addresses(port)),
        ("Reaches", port.policy.summary()),
        ("Sent", format!("{} bytes in {} packets", counters.sent_bytes, counters.sent_packets)),
        ("Received", format!("{} bytes in {} packets", counters.received_bytes, counters.received_packets)),
        ("Not sent on to it", format!("{} packets", counters.received_dropped)),
        ("Dropped", format!("{} frames of it", port.drops.values().sum::<u64>())),
    ]
}

/// What a desktop is by its record, and what it is doing.
fn facts(info: &DesktopInfo) -> Vec<Fact> {
    let DesktopInfo { desktop, status } = info;
    let mut facts = vec![
        ("Owner", desktop.user.to_string()),
        ("Image", format!("{}:{}", desktop.flavour, desktop.tag)),
        ("Runtime", runtime(desktop.virtualizer).to_owned()),
        ("Memory", format!("at most {}", desktop.limits.memory)),
        ("Processor", format!("at most {} thousandths of a core", desktop.limits.cpu.0)),
        ("Processes", format!("at most {}", desktop.limits.pids)),
        ("Root", desktop.root.as_str().to_owned()),
        ("Network", desktop.net.summary()),
        ("Created", ago(desktop.created_unix_s)),
        ("Client", if status.attached { "attached" } else { "none" }.to_owned()),
    ];
    facts.extend(desktop.limits.io.map(|io| ("Disks", format!("at most {io} a second"))));
    facts.extend(desktop.address.map(|address| ("Fixed address", address.to_string())));
    let devices: Vec<_> = desktop.devices.iter().map(ToString::to_string).collect();
    facts.extend((!devices.is_empty()).then(|| ("Devices", devices.join(", "))));
    facts.extend(desktop.calls.map(|calls| ("System calls", calls.to_string())));
    facts.extend(status.image.map(|commit| ("Runs version", short(&commit.hex()))));
    facts.extend(status.timings.map(|timings| ("Last start", format!("ready after {} ms", timings.session_us / 1000))));
    facts
}

pub(super) async fn start(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Path(id): Path<String>,
) -> Response {
    let farm = state.farm().clone();
    let work = async move |id| {
        // Its steps are in its state.
        let (progress, _unheard) = mpsc::channel(1);
        farm.start(id, progress).await.map(drop)
    };
    begin(&state, &who, &id, Action::Start, work).await
}

pub(super) async fn stop(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Path(id): Path<String>,
) -> Response {
    let farm = state.farm().clone();
    begin(&state, &who, &id, Action::Stop, async move |id| farm.stop(id).await).await
}

pub(super) async fn remove(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Path(id): Path<String>,
) -> Response {
    let farm = state.farm().clone();
    begin(&state, &who, &id, Action::Remove, async move |id| farm.remove_desktop(id).await).await
}

/// Has something done to a desktop and shows where one sees how it goes on.
async fn begin<W, F>(state: &Arc<AdminState>, who: &Who, id: &str, action: Action, work: W) -> Response
where
    W: FnOnce(DesktopId) -> F,
    F: Future<Output = Result<(), FarmError>> + Send + 'static,
{
    let id = match number(id) {
        Ok(id) => id,
        Err(error) => return failure(who, PLACE, &error),
    };
    let begun = async {
        state.farm().desktop(id).await?;
        state.begin(who, Object::Desktop(id), action, work(id)).await
    };
    match begun.await {
        Ok(()) if action == Action::Remove => Redirect::to("/admin/desktops").into_response(),
        Ok(()) => Redirect::to(&page_of(id)).into_response(),
        Err(error) => page(state, who, id, Some(&error), String::new(), Vec::new()).await.0,
    }
}

pub(super) async fn maintenance(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Path(id): Path<String>,
    Form(form): Form<MaintenanceForm>,
) -> Response {
    let id = match number(&id) {
        Ok(id) => id,
        Err(error) => return failure(&who, PLACE, &error),
    };
    let (farm, blocked) = (state.farm().clone(), form.blocked == "yes");
    let action = if blocked { "close for maintenance" } else { "open after maintenance" };
    let work = async move { farm.set_blocked(id, blocked).await };
    match state.carry_out(&who, action, Object::Desktop(id), work).await {
        Ok(()) => Redirect::to(&page_of(id)).into_response(),
        Err(error) => page(&state, &who, id, Some(&error), String::new(), Vec::new()).await.0,
    }
}

/// Tells what would become of frames. Nothing changes, so nothing is redirected: frames are too long
/// for an address.
pub(super) async fn explain(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Path(id): Path<String>,
    Form(form): Form<ExplainForm>,
) -> Response {
    let id = match number(&id) {
        Ok(id) => id,
        Err(error) => return failure(&who, PLACE, &error),
    };
    let explained = async {
        let lines: Vec<_> = form.frames.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let invalid = |what: String| FarmError::with_code(ErrorKind::Invalid, "invalid_frame", what);
        if lines.is_empty() {
            return Err(invalid("write a frame in base 16, one a line".to_owned()));
        }
        let frames = ExplainFrames::new(lines.into_iter().map(str::to_owned).collect()).octets().map_err(invalid)?;
        let port = state.farm().network(id, frames).await?.ok_or_else(|| {
            FarmError::new(ErrorKind::Conflict, format!("cannot explain frames: desktop {id} has no port"))
        })?;
        Ok(port.explained.iter().map(ToString::to_string).collect())
    };
    let (explained, problem) = match explained.await {
        Ok(explained) => (explained, None),
        Err(error) => (Vec::new(), Some(error)),
    };
    page(&state, &who, id, problem.as_ref(), form.frames, explained).await.0
}

pub(super) async fn confirm_removal(
    State(state): State<Arc<AdminState>>,
    Extension(who): Extension<Who>,
    Path(id): Path<String>,
) -> Response {
    let found = match number(&id) {
        Ok(id) => state.farm().desktop_info(id).await,
        Err(error) => Err(error),
    };
    match found {
        Ok(info) => answer(
            None,
            &Remove {
                assets: &assets::BASE,
                frame: Frame::new(&who, PLACE),
                what: format!("desktop {} ({})", info.desktop.id, info.desktop.name),
                lost: lost_with(&info),
                action: format!("{}/remove", page_of(info.desktop.id)),
                back: page_of(info.desktop.id),
                with_desktops: false,
            },
        ),
        Err(error) => failure(&who, PLACE, &error),
    }
}

/// What nobody can bring back.
pub(super) fn lost_with(info: &DesktopInfo) -> Vec<String> {
    let desktop = &info.desktop;
    let mut lost = vec![format!("The home of user {} in it, with all files.", desktop.user)];
    if desktop.root == RootPolicy::Persistent {
        lost.push("Its root, with what was installed or changed in it.".to_owned());
    }
    if info.status.state != DesktopState::Stopped {
        lost.push("It runs: its programs end, and what is not saved is lost.".to_owned());
    }
    lost.extend(desktop.address.map(|address| format!("Its address {address}, which others may get then.")));
    lost
}
