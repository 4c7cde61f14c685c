//! What is said over the API, both ways. Fields are only ever added.

use std::{collections::BTreeSet, net::Ipv4Addr};

use qvd_core::{
    Calls, Device, FlavourName, Limits, NetPolicy, RootPolicy, StartStep, Tag, TenantName, UserName, Virtualizer,
};
use qvd_farm::{NewDesktop, Secret};
use serde::{Deserialize, Serialize, Serializer};

use crate::images::Amount;

/// Body of every refusal: `{"error": {…}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorInfo,
}

/// What went wrong, for a program and for a person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorInfo {
    /// A stable word: `unknown_flavour`, `address_taken`, ….
    pub code: String,
    /// One line.
    pub message: String,
    /// The causes behind it, nearest first; only administrators see them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cause: Vec<String>,
    /// What the daemon's log calls this failure.
    pub id: String,
    /// When to try again, in seconds, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_s: Option<u64>,
}

/// One line of a long answer (`application/x-ndjson`): any number of
/// `progress`, then one `done` or one `failed`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event<T> {
    /// It goes on.
    Progress {
        /// The step of a start that begins.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        step: Option<StartStep>,
        /// A line for a person.
        text: String,
        /// How much of how much is done, if that is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        amount: Option<Amount>,
    },
    /// It is done.
    Done {
        /// What came of it.
        result: T,
    },
    /// It failed; nothing is left of it.
    Failed {
        /// Why.
        error: ErrorInfo,
    },
}

/// `GET /api/v1/health`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// `ok`.
    pub status: String,
    /// Version of the daemon.
    pub version: String,
}

/// `GET /api/v1/whoami`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WhoAmI {
    /// The user; `None` for the administrator of the host itself.
    pub user: Option<UserName>,
    /// Whether this caller administers the farm.
    pub admin: bool,
}

/// Body of `POST /api/v1/users`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddUser {
    /// Name at sign-in.
    pub name: UserName,
    /// Password at sign-in.
    #[serde(serialize_with = "expose")]
    pub password: Secret,
    /// Whether this user administers the farm.
    #[serde(default)]
    pub admin: bool,
    /// Whose user it is.
    #[serde(default)]
    pub tenant: TenantName,
}

/// Body of `PATCH /api/v1/users/{name}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeUser {
    /// Whether this user administers the farm.
    pub admin: bool,
}

/// Body of `PUT /api/v1/users/{name}/password`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetPassword {
    /// The new password.
    #[serde(serialize_with = "expose")]
    pub password: Secret,
    /// The one until now; an administrator need not know it.
    #[serde(default, serialize_with = "expose_option", skip_serializing_if = "Option::is_none")]
    pub current: Option<Secret>,
}

/// Body of `POST /api/v1/images`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BuildImage {
    /// Absolute path of the recipe on the daemon's host.
    pub recipe: std::path::PathBuf,
    /// Who builds it; whoever has signed in, if somebody has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// Body of `POST /api/v1/desktops`. What is left out comes from the flavour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateDesktop {
    /// Whose it is; `None` is the caller, who must then be a user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<UserName>,
    /// The line of images it runs.
    pub flavour: FlavourName,
    /// Name among this user's desktops, and host name inside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The version it follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<Tag>,
    /// What runs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtualizer: Option<Virtualizer>,
    /// What it may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// What becomes of its root at stop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<RootPolicy>,
    /// What it may reach.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<NetPolicy>,
    /// Which of the host's devices it has, beside those that its image names.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub devices: BTreeSet<Device>,
    /// Which system calls its programs may make.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calls: Option<Calls>,
    /// An address of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
}

impl CreateDesktop {
    /// A desktop with the defaults of `flavour`.
    #[must_use]
    pub const fn new(user: Option<UserName>, flavour: FlavourName) -> Self {
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

    pub(super) fn into_new(self, user: UserName) -> NewDesktop {
        NewDesktop {
            user,
            flavour: self.flavour,
            name: self.name,
            tag: self.tag,
            virtualizer: self.virtualizer,
            limits: self.limits,
            root: self.root,
            net: self.net,
            devices: self.devices,
            calls: self.calls,
            address: self.address,
        }
    }
}

/// Body of `PATCH /api/v1/desktops/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeDesktop {
    /// Whether it is closed for maintenance.
    pub blocked: bool,
}

pub(crate) fn expose<S: Serializer>(secret: &Secret, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(secret.expose())
}

// The signature is serde's.
#[allow(clippy::ref_option)]
pub(crate) fn expose_option<S: Serializer>(secret: &Option<Secret>, serializer: S) -> Result<S::Ok, S::Error> {
    match secret {
        Some(secret) => serializer.serialize_some(secret.expose()),
        None => serializer.serialize_none(),
    }
}
/// Frames of a desktop that one wants to know the fate of.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct ExplainFrames {
    /// Each from its Ethernet header on, as digits of base 16; colons and spaces
    /// between them mean nothing.
    pub frames: Vec<String>,
}

impl ExplainFrames {
    /// Longest frame that is looked at.
    const OCTETS_MAX: usize = 65_536;

    /// Of these texts.
    #[must_use]
    pub const fn new(frames: Vec<String>) -> Self {
        Self { frames }
    }

    /// The frames themselves.
    ///
    /// # Errors
    /// One is no frame; the text says which and why.
    pub fn octets(&self) -> Result<Vec<Vec<u8>>, String> {
        self.frames
            .iter()
            .enumerate()
            .map(|(n, text)| octets(text).map_err(|why| format!("frame {}: {why}", n + 1)))
            .collect()
    }
}

fn octets(text: &str) -> Result<Vec<u8>, &'static str> {
    let digits: Option<Vec<u8>> = text
        .chars()
        .filter(|&c| c != ':' && !c.is_ascii_whitespace())
        .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect();
    let digits = digits.ok_or("write it as digits of base 16")?;
    let (pairs, []) = digits.as_chunks::<2>() else { return Err("it ends within an octet") };
    if pairs.len() > ExplainFrames::OCTETS_MAX {
        return Err("it is longer than any frame");
    }
    Ok(pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_people_write_them() {
        let read = |text: &str| ExplainFrames::new(vec![text.to_owned()]).octets();
        assert_eq!(read("52:c0 ff00"), Ok(vec![vec![0x52, 0xc0, 0xff, 0]]));
        assert_eq!(read(""), Ok(vec![vec![]]));
        assert_eq!(read("5"), Err("frame 1: it ends within an octet".to_owned()));
        assert_eq!(read("zz"), Err("frame 1: write it as digits of base 16".to_owned()));
    }
}
