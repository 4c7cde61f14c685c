use std::{collections::BTreeSet, net::Ipv4Addr};

use qvd_core::{
    Calls, DesktopId, Device, Digest, FlavourName, Limits, NetPolicy, RootPolicy, StartStep, Tag, TenantName, UserName,
    Virtualizer,
};
use qvd_node::DesktopStatus;
use serde::{Deserialize, Serialize};

/// A person who signs in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Name at sign-in.
    pub name: UserName,
    /// Whether this user administers the farm.
    pub admin: bool,
    /// Whose user it is: desktops get this tenant's addresses.
    #[serde(default)]
    pub tenant: TenantName,
    /// When the user was added, in seconds since 1970.
    pub created_unix_s: u64,
}

/// What becomes of a removed user's desktops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnedDesktops {
    /// A user who has some is not removed.
    Refuse,
    /// They are removed first, homes included.
    Remove,
}

/// What new desktops of a flavour get unless their creator says otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FlavourDefaults {
    /// What they may use.
    pub limits: Limits,
    /// What becomes of their roots at stop.
    pub root: RootPolicy,
    /// What they may reach.
    pub net: NetPolicy,
}

impl FlavourDefaults {
    /// What the recipe of an image says, and what is usual of what it does not say.
    #[must_use]
    pub fn of(recipe: &qvd_storage::Defaults) -> Self {
        let net = recipe.net.clone().unwrap_or_else(NetPolicy::internet);
        Self { limits: recipe.limits, root: recipe.root, net }
    }
}

impl Default for FlavourDefaults {
    /// A desktop on the network: people expect a browser to work.
    fn default() -> Self {
        Self { limits: Limits::default(), root: RootPolicy::default(), net: NetPolicy::internet() }
    }
}

/// A line of images with its defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flavour {
    /// Its name.
    pub name: FlavourName,
    /// Content of its newest image.
    pub digest: Digest,
    /// When that was made, in seconds since 1970.
    pub created_unix_s: u64,
    /// What new desktops get.
    pub defaults: FlavourDefaults,
}

/// A desktop to make. What is `None` comes from the flavour's defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewDesktop {
    /// Whose it is.
    pub user: UserName,
    /// The line of images it runs.
    pub flavour: FlavourName,
    /// Name among this user's desktops, and host name inside; `None` derives
    /// one from the flavour.
    #[serde(default)]
    pub name: Option<String>,
    /// The version it follows; `None` is `default`.
    #[serde(default)]
    pub tag: Option<Tag>,
    /// What runs it; `None` is a container.
    #[serde(default)]
    pub virtualizer: Option<Virtualizer>,
    /// What it may use.
    #[serde(default)]
    pub limits: Option<Limits>,
    /// What becomes of its root at stop.
    #[serde(default)]
    pub root: Option<RootPolicy>,
    /// What it may reach.
    #[serde(default)]
    pub net: Option<NetPolicy>,
    /// Which of the host's devices it has, beside those that its image names.
    #[serde(default)]
    pub devices: BTreeSet<Device>,
    /// Which system calls its programs may make; `None` is what its image says.
    #[serde(default)]
    pub calls: Option<Calls>,
    /// An address of its own; `None` lets the node choose at each start.
    #[serde(default)]
    pub address: Option<Ipv4Addr>,
}

impl NewDesktop {
    /// A desktop with the defaults of `flavour`.
    #[must_use]
    pub const fn new(user: UserName, flavour: FlavourName) -> Self {
        Self {
            user,
            flavour,
            name: None,
            tag: None,
            virtualizer: None,
            limits: None,
            root: None,
            net: None,
            devices: BTreeSet::new(),
            calls: None,
            address: None,
        }
    }
}

/// A desktop as the farm knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Desktop {
    /// Its number.
    pub id: DesktopId,
    /// Whose it is.
    pub user: UserName,
    /// Its name, unique among this user's, and its host name inside.
    pub name: String,
    /// The line of images it runs.
    pub flavour: FlavourName,
    /// The version it follows; resolved at each start.
    pub tag: Tag,
    /// What runs it.
    pub virtualizer: Virtualizer,
    /// What it may use.
    pub limits: Limits,
    /// What becomes of its root at stop.
    pub root: RootPolicy,
    /// What it may reach.
    pub net: NetPolicy,
    /// Which of the host's devices it has, beside those that its image names.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub devices: BTreeSet<Device>,
    /// Which system calls its programs may make; `None` is what its image says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calls: Option<Calls>,
    /// Its fixed address.
    pub address: Option<Ipv4Addr>,
    /// Whether it is closed for maintenance: nobody may start or open it.
    pub blocked: bool,
    /// When it was created, in seconds since 1970.
    pub created_unix_s: u64,
}

/// A desktop and what it is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DesktopInfo {
    /// The desktop.
    #[serde(flatten)]
    pub desktop: Desktop,
    /// What it is doing.
    pub status: DesktopStatus,
}

/// What the person who waits for a desktop hears.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// A step of the start begins.
    Step(StartStep),
    /// News from inside the desktop: one printable line, shortened.
    Text(String),
}

impl Progress {
    /// A line for a person.
    #[must_use]
    pub fn text(&self) -> &str {
        match self {
            Self::Step(step) => step.text(),
            Self::Text(text) => text,
        }
    }
}

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SessionKind {
    /// A browser's cookie: ends when unused for a while, and in any case after a day.
    Web,
    /// A native client's or a program's token: ends after a day.
    Bearer,
    /// The cookie of somebody who administers in a browser, beside [`SessionKind::Web`]: ends
    /// when unused for half an hour, and in any case after eight.
    Admin,
}

impl SessionKind {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Web => "web",
            Self::Bearer => "bearer",
            Self::Admin => "admin",
        }
    }
}

/// Somebody who is signed in, without the token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionInfo {
    /// Number of the session.
    pub id: i64,
    /// Who.
    pub user: UserName,
    /// With what.
    pub kind: SessionKind,
    /// Since when, in seconds since 1970.
    pub created_unix_s: u64,
    /// Last seen, in seconds since 1970; exact to a minute.
    pub last_used_unix_s: u64,
    /// Until when at most, in seconds since 1970.
    pub expires_unix_s: u64,
}
