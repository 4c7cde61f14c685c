//! The pages of administration, and the words that several of them have.

use std::{
    fmt::Display,
    str::FromStr,
    time::{SystemTime, UNIX_EPOCH},
};

use askama::Template;
use axum::{
    http::{HeaderValue, StatusCode, header},
    response::Response,
};
use qvd_core::{Bytes, DesktopState, Limits, MilliCpu, NetPolicy, RootPolicy, Virtualizer};
use qvd_farm::{DesktopInfo, ErrorKind, FarmError, SessionKind, User};
use serde::Deserialize;

use super::{
    Who,
    work::{Object, Seen, Works, told},
};
use crate::portal::{
    assets,
    pages::{render, status_of},
};

/// How soon a page asks again while something is under way, in seconds.
const REFRESH_S: u32 = 2;

#[derive(Template)]
#[template(path = "admin/sign_in.html")]
pub(super) struct SignIn<'a> {
    pub(super) assets: &'a str,
    pub(super) csrf: &'a str,
    pub(super) user: &'a str,
    pub(super) error: Option<&'a str>,
    pub(super) notice: Option<&'a str>,
}

/// What every page has around it.
#[derive(Debug)]
pub(super) struct Frame {
    /// Which part of administration it is of.
    pub(super) place: &'static str,
    pub(super) who: String,
    pub(super) csrf: String,
    pub(super) problem: Option<String>,
    pub(super) notice: Option<&'static str>,
}

impl Frame {
    pub(super) fn new(who: &Who, place: &'static str) -> Self {
        Self {
            place,
            who: who.session.user.name.to_string(),
            csrf: who.session.csrf_token().to_owned(),
            problem: None,
            notice: None,
        }
    }

    /// The same with what went wrong.
    pub(super) fn with(self, problem: Option<&FarmError>) -> Self {
        Self { problem: problem.map(sentence), ..self }
    }

    pub(super) fn noting(self, notice: Option<&'static str>) -> Self {
        Self { notice, ..self }
    }
}

/// An error and its causes as a sentence.
pub(super) fn sentence(error: &FarmError) -> String {
    let mut text = told(error);
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    text
}

/// A page, with the status of what went wrong in it.
pub(super) fn answer(problem: Option<&FarmError>, page: &impl Template) -> Response {
    render(problem.map_or(StatusCode::OK, status_of), page)
}

/// The same page again in a moment, from `path`, if something is under way in it.
pub(super) fn refreshing(mut response: Response, is_under_way: bool, path: &str) -> Response {
    if is_under_way && let Ok(value) = HeaderValue::from_str(&format!("{REFRESH_S}; url={path}")) {
        response.headers_mut().insert(header::REFRESH, value);
    }
    response
}

/// The page of what cannot be shown.
pub(super) fn failure(who: &Who, place: &'static str, error: &FarmError) -> Response {
    tracing::info!(administrator = %who.session.user.name, code = error.code(), error = told(error), "cannot show a page");
    answer(Some(error), &Message { assets: &assets::BASE, frame: Frame::new(who, place).with(Some(error)) })
}

#[derive(Template)]
#[template(path = "admin/message.html")]
struct Message<'a> {
    assets: &'a str,
    frame: Frame,
}

/// A value with its name.
pub(super) type Fact = (&'static str, String);

/// A list of values, or why there is none.
pub(super) type Facts = Result<Vec<Fact>, String>;

#[derive(Template)]
#[template(path = "admin/overview.html")]
pub(super) struct Overview<'a> {
    pub(super) assets: &'a str,
    pub(super) frame: Frame,
    /// How many desktops are in which state.
    pub(super) states: Vec<(&'static str, usize)>,
    pub(super) desktops: usize,
    pub(super) users: usize,
    pub(super) sessions: usize,
    pub(super) memory: Facts,
    pub(super) shares: Vec<Share>,
    pub(super) images: Result<Vec<ImageRow>, String>,
}

/// A desktop's part of the memory.
#[derive(Debug)]
pub(super) struct Share {
    pub(super) id: u32,
    pub(super) activity: String,
    pub(super) has: String,
    pub(super) uses: String,
    pub(super) owed: String,
    pub(super) most: String,
}

#[derive(Template)]
#[template(path = "admin/desktops.html")]
pub(super) struct Desktops<'a> {
    pub(super) assets: &'a str,
    pub(super) frame: Frame,
    pub(super) users: Vec<String>,
    pub(super) user: String,
    pub(super) state: &'static str,
    pub(super) desktops: Vec<Row>,
    /// How many there are, on this page and others.
    pub(super) all: usize,
    pub(super) before: Option<usize>,
    pub(super) after: Option<usize>,
}

/// States that can be asked for.
pub(super) const STATES: [DesktopState; 5] = [
    DesktopState::Stopped,
    DesktopState::Starting,
    DesktopState::Running,
    DesktopState::Stopping,
    DesktopState::Zombie,
];

/// A desktop in a list.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) id: u32,
    pub(super) name: String,
    pub(super) user: String,
    pub(super) image: String,
    pub(super) runtime: &'static str,
    pub(super) state: &'static str,
    pub(super) label: String,
    pub(super) addresses: String,
    /// What failed at it of late.
    pub(super) failed: Option<String>,
    pub(super) under_way: bool,
    pub(super) blocked: bool,
    pub(super) stopped: bool,
}

impl Row {
    pub(super) fn new(info: &DesktopInfo, works: &Works) -> Self {
        let DesktopInfo { desktop, status } = info;
        let seen = works.at(&Object::Desktop(desktop.id));
        let mut label = match status.state {
            DesktopState::Running if status.lacks_room => "running, waits for room on the host's disk".to_owned(),
            DesktopState::Running if status.attached => "running, in use".to_owned(),
            DesktopState::Running if status.resting => "running, at rest".to_owned(),
            DesktopState::Stopped => {
                status.ended.as_ref().map_or_else(|| "stopped".to_owned(), |why| format!("stopped: {why}"))
            }
            DesktopState::Zombie => "zombie: something of it could not be removed; the host keeps trying".to_owned(),
            other => other.to_string(),
        };
        if let Some(Seen::UnderWay(what)) = &seen {
            label = (*what).to_owned();
        }
        if let Some(step) = status.step {
            label = format!("{label}: {}", step.text());
        }
        if desktop.blocked {
            label = format!("{label}; under maintenance");
        }
        Self {
            id: desktop.id.number(),
            name: desktop.name.clone(),
            user: desktop.user.to_string(),
            image: format!("{}:{}", desktop.flavour, desktop.tag),
            runtime: runtime(desktop.virtualizer),
            state: status.state.as_str(),
            label,
            addresses: desktop.address.map_or_else(String::new, |address| address.to_string()),
            under_way: matches!(seen, Some(Seen::UnderWay(_)))
                || matches!(status.state, DesktopState::Starting | DesktopState::Stopping),
            failed: match seen {
                Some(Seen::Failed(why)) => Some(why),
                _ => None,
            },
            blocked: desktop.blocked,
            stopped: status.state == DesktopState::Stopped,
        }
    }

    /// What can be done with it at once.
    const fn verb(&self) -> &'static str {
        if self.stopped { "start" } else { "stop" }
    }
}

#[derive(Template)]
#[template(path = "admin/desktop.html")]
pub(super) struct Desktop<'a> {
    pub(super) assets: &'a str,
    pub(super) frame: Frame,
    pub(super) row: Row,
    pub(super) facts: Vec<Fact>,
    /// What it uses, while it runs.
    pub(super) stats: Option<Facts>,
    /// Its port, while it runs.
    pub(super) network: Option<Facts>,
    /// Whether it has one.
    pub(super) has_port: bool,
    /// Why frames of it were dropped, and how many.
    pub(super) drops: Vec<(String, u64)>,
    /// Frames that were asked about, and what would become of each.
    pub(super) frames: String,
    pub(super) explained: Vec<String>,
}

#[derive(Template)]
#[template(path = "admin/new_desktop.html")]
pub(super) struct NewDesktop<'a> {
    pub(super) assets: &'a str,
    pub(super) frame: Frame,
    pub(super) users: Vec<String>,
    pub(super) flavours: Vec<String>,
    pub(super) form: &'a super::desktops::NewForm,
}

/// What is asked before something is lost.
#[derive(Template)]
#[template(path = "admin/remove.html")]
pub(super) struct Remove<'a> {
    pub(super) assets: &'a str,
    pub(super) frame: Frame,
    /// What is removed: `desktop 7`.
    pub(super) what: String,
    /// What is lost.
    pub(super) lost: Vec<String>,
    /// Where it is sent to, and where its page is.
    pub(super) action: String,
    pub(super) back: String,
    /// Whether desktops go with a user.
    pub(super) with_desktops: bool,
}

#[derive(Template)]
#[template(path = "admin/users.html")]
pub(super) struct Users<'a> {
    pub(super) assets: &'a str,
    pub(super) frame: Frame,
    pub(super) users: Vec<UserRow>,
    pub(super) form: &'a super::users::AddForm,
}

/// A user in a list.
#[derive(Debug)]
pub(super) struct UserRow {
    pub(super) name: String,
    pub(super) role: &'static str,
    pub(super) tenant: String,
    pub(super) added: String,
    pub(super) desktops: usize,
    pub(super) under_way: Option<&'static str>,
    pub(super) failed: Option<String>,
}

impl UserRow {
    pub(super) fn new(user: &User, desktops: usize, works: &Works) -> Self {
        let (under_way, failed) = match works.at(&Object::User(user.name.clone())) {
            Some(Seen::UnderWay(what)) => (Some(what), None),
            Some(Seen::Failed(why)) => (None, Some(why)),
            None => (None, None),
        };
        Self {
            name: user.name.to_string(),
            role: if user.admin { "administrator" } else { "user" },
            tenant: user.tenant.to_string(),
            added: ago(user.created_unix_s),
            desktops,
            under_way,
            failed,
        }
    }
}

#[derive(Template)]
#[template(path = "admin/user.html")]
pub(super) struct OneUser<'a> {
    pub(super) assets: &'a str,
    pub(super) frame: Frame,
    pub(super) name: &'a str,
    pub(super) admin: bool,
    /// Whether it is the administrator who looks.
    pub(super) own: bool,
    pub(super) facts: Vec<Fact>,
    pub(super) desktops: Vec<Row>,
}

#[derive(Template)]
#[template(path = "admin/sessions.html")]
pub(super) struct Sessions<'a> {
    pub(super) assets: &'a str,
    pub(super) frame: Frame,
    pub(super) sessions: Vec<SessionRow>,
}

/// A session in a list.
#[derive(Debug)]
pub(super) struct SessionRow {
    pub(super) id: i64,
    pub(super) user: String,
    pub(super) kind: &'static str,
    pub(super) since: String,
    pub(super) used: String,
    pub(super) own: bool,
}

#[derive(Template)]
#[template(path = "admin/flavours.html")]
pub(super) struct Flavours<'a> {
    pub(super) assets: &'a str,
    pub(super) frame: Frame,
    pub(super) flavours: Vec<FlavourRow>,
}

/// A flavour in a list.
#[derive(Debug)]
pub(super) struct FlavourRow {
    pub(super) name: String,
    pub(super) memory: String,
    pub(super) cpu: u32,
    pub(super) pids: u32,
    pub(super) io: String,
    pub(super) root: &'static str,
    pub(super) network: String,
    pub(super) image: String,
}

#[derive(Template)]
#[template(path = "admin/flavour.html")]
pub(super) struct OneFlavour<'a> {
    pub(super) assets: &'a str,
    pub(super) frame: Frame,
    pub(super) name: &'a str,
    pub(super) network: String,
    pub(super) form: super::images::DefaultsForm,
}

#[derive(Template)]
#[template(path = "admin/images.html")]
pub(super) struct Images<'a> {
    pub(super) assets: &'a str,
    pub(super) frame: Frame,
    pub(super) images: Vec<ImageRow>,
}

/// An image in a list.
#[derive(Debug)]
pub(super) struct ImageRow {
    pub(super) flavour: String,
    pub(super) digest: String,
    pub(super) made: String,
    pub(super) size: String,
    pub(super) damaged: Option<String>,
}

#[derive(Template)]
#[template(path = "admin/image.html")]
pub(super) struct OneImage<'a> {
    pub(super) assets: &'a str,
    pub(super) frame: Frame,
    pub(super) flavour: &'a str,
    pub(super) tags: Vec<(String, String, String)>,
    pub(super) versions: Vec<VersionRow>,
    /// How many there are, also such as are not shown.
    pub(super) all: usize,
}

/// A version of a flavour.
#[derive(Debug)]
pub(super) struct VersionRow {
    pub(super) id: String,
    pub(super) tags: String,
    pub(super) made: String,
    pub(super) author: String,
    pub(super) message: String,
    pub(super) size: String,
}

/// The state that a word names.
pub(super) fn state_of(word: &str) -> Option<DesktopState> {
    STATES.into_iter().find(|state| state.as_str() == word)
}

pub(super) const fn runtime(virtualizer: Virtualizer) -> &'static str {
    match virtualizer {
        Virtualizer::Qemu => "QEMU",
        Virtualizer::Libvirt => "libvirt",
        _ => "container",
    }
}

pub(super) const fn kind_word(kind: SessionKind) -> &'static str {
    match kind {
        SessionKind::Web => "browser",
        SessionKind::Bearer => "client or program",
        SessionKind::Admin => "administration",
        _ => "other",
    }
}

/// An amount of memory in whole MiB.
pub(super) fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// How long ago a moment was.
pub(super) fn ago(unix_s: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    match now.saturating_sub(unix_s) {
        seconds @ 0..60 => format!("{seconds} s ago"),
        seconds @ 60..3_600 => format!("{} min ago", seconds / 60),
        seconds @ 3_600..172_800 => format!("{} h ago", seconds / 3_600),
        seconds => format!("{} days ago", seconds / 86_400),
    }
}

/// The beginning of a digest, as other commands show it.
pub(super) fn short(hex: &str) -> String {
    hex.chars().take(12).collect()
}

fn wrong(field: &str, why: impl Display) -> FarmError {
    FarmError::new(ErrorKind::Invalid, format!("{field}: {why}"))
}

/// What stands in a field; an error names the field.
pub(super) fn field<T: FromStr<Err: Display>>(field: &str, text: &str) -> Result<T, FarmError> {
    text.trim().parse().map_err(|why| wrong(field, why))
}

/// What stands in a field that may be left empty.
pub(super) fn given<T: FromStr<Err: Display>>(name: &str, text: &str) -> Result<Option<T>, FarmError> {
    if text.trim().is_empty() { Ok(None) } else { field(name, text).map(Some) }
}

/// A whole number in a field that may be left empty.
pub(super) fn number(name: &str, text: &str) -> Result<Option<u32>, FarmError> {
    let read = |text: &str| text.parse().map_err(|_| wrong(name, format!("`{}` is no whole number", shown(text))));
    Some(text.trim()).filter(|text| !text.is_empty()).map(read).transpose()
}

/// What a choice offers; anything else was not sent by our page.
pub(super) fn choice<T>(name: &str, text: &str, known: &[(&str, T)]) -> Result<Option<T>, FarmError>
where
    T: Clone,
{
    match known.iter().find(|(word, _)| *word == text) {
        Some((_, value)) => Ok(Some(value.clone())),
        None if text.is_empty() => Ok(None),
        None => Err(wrong(name, format!("there is no `{}`", shown(text)))),
    }
}

/// A text from outside, short and in one line.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(64).flat_map(char::escape_default).collect()
}

/// What a desktop may use, as forms have it: what is empty stays as it is.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
pub(super) struct LimitsForm {
    pub(super) memory: String,
    pub(super) cpu: String,
    pub(super) pids: String,
    pub(super) io: String,
}

impl LimitsForm {
    pub(super) fn of(limits: &Limits) -> Self {
        Self {
            memory: limits.memory.to_string(),
            cpu: limits.cpu.0.to_string(),
            pids: limits.pids.to_string(),
            io: limits.io.map_or_else(String::new, |io| io.to_string()),
        }
    }

    /// `limits` with what was said instead; none if nothing was.
    pub(super) fn over(&self, limits: Limits) -> Result<Option<Limits>, FarmError> {
        let memory = given::<Bytes>("memory", &self.memory)?;
        let cpu = number("processor", &self.cpu)?;
        let pids = number("processes", &self.pids)?;
        let io = given::<Bytes>("disks", &self.io)?;
        let is_said = memory.is_some() || cpu.is_some() || pids.is_some() || io.is_some();
        Ok(is_said.then(|| Limits {
            memory: memory.unwrap_or(limits.memory),
            cpu: cpu.map_or(limits.cpu, MilliCpu),
            pids: pids.unwrap_or(limits.pids),
            io: io.or(limits.io),
        }))
    }
}

/// The policies that a form offers.
pub(super) fn network(text: &str) -> Result<Option<NetPolicy>, FarmError> {
    let known =
        [("internet", NetPolicy::internet()), ("isolated", NetPolicy::host_only()), ("none", NetPolicy::none())];
    choice("network", text, &known)
}

pub(super) fn root(text: &str) -> Result<Option<RootPolicy>, FarmError> {
    choice("root", text, &[RootPolicy::Volatile, RootPolicy::Persistent].map(|policy| (policy.as_str(), policy)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_empty_stays_and_what_is_wrong_is_named() {
        let limits = Limits::default();
        assert_eq!(LimitsForm::default().over(limits).unwrap(), None);
        let form = LimitsForm { memory: " 512M ".to_owned(), ..LimitsForm::default() };
        assert_eq!(form.over(limits).unwrap(), Some(Limits { memory: Bytes::mib(512), ..limits }));
        assert_eq!(LimitsForm::of(&limits).over(Limits::LEAST).unwrap(), Some(limits));
        for (form, word) in [
            (LimitsForm { memory: "lots".to_owned(), ..LimitsForm::default() }, "memory: `lots`"),
            (LimitsForm { cpu: "-1".to_owned(), ..LimitsForm::default() }, "processor: `-1`"),
            (LimitsForm { pids: "many".to_owned(), ..LimitsForm::default() }, "processes: `many`"),
        ] {
            let error = form.over(limits).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn a_choice_that_was_not_offered_is_refused() {
        assert_eq!(root("persistent").unwrap(), Some(RootPolicy::Persistent));
        assert_eq!(root("").unwrap(), None);
        assert!(root("other").is_err() && network("\u{1b}[31m").unwrap_err().to_string().contains("\\u{1b}"));
    }
}
