//! The REST API: one router behind two front doors, and the client half.
//!
//! JSON over HTTP/1.1 under `/api/v1`. A front door finds out who calls and
//! puts a [`Caller`] into the request's extensions; a request without one is
//! refused, so a door that forgets lets nobody in. [`serve_unix`] is the door
//! for the commands on the host itself. The HTTPS door belongs to the gateway,
//! which also checks `Origin` or a CSRF token for requests with a cookie.
//!
//! | Method and path | Body | Answer | Who |
//! |---|---|---|---|
//! | `GET health` | | [`dto::Health`] | anybody |
//! | `GET whoami` | | [`dto::WhoAmI`] | users |
//! | `GET users` | | `[User]` | administrators |
//! | `POST users` | [`dto::AddUser`] | 201 `User` | administrators |
//! | `PATCH users/{name}` | [`dto::ChangeUser`] | 204 | administrators |
//! | `DELETE users/{name}[?desktops=remove]` | | 204 | administrators |
//! | `PUT users/{name}/password` | [`dto::SetPassword`] | 204 | users their own, with the current one |
//! | `GET images` | | `[ImageSummary]` | users |
//! | `POST images` | [`dto::BuildImage`] | events of `ImageSummary` | administrators |
//! | `GET images/log?image=F[:TAG\|@ID]` | | `[Logged]`, newest first | administrators |
//! | `GET images/show?image=…` | | [`Shown`](crate::images::Shown) | administrators |
//! | `GET images/diff?from=…&to=…` | | `Diff` | administrators |
//! | `GET images/tags?flavour=F` | | [`[Tagged]`](crate::images::Tagged) | administrators |
//! | `PUT images/tags` | [`PutTag`](crate::images::PutTag) | `Tagged` | administrators |
//! | `DELETE images/tags?flavour=…&tag=…&author=…` | | the tag | administrators |
//! | `GET images/reflog?image=F[:TAG]` | | `[Move]`, newest first | administrators |
//! | `POST images/revert` | [`Revert`](crate::images::Revert) | `Logged` | administrators |
//! | `DELETE images/flavours?flavour=…&author=…` | | the flavour | administrators |
//! | `POST images/import` | [`Import`](crate::images::Import) | events of `Logged` | the host's |
//! | `POST images/export` | [`Export`](crate::images::Export) | events of `Exported` | the host's |
//! | `POST images/gc` | [`Gc`](crate::images::Gc) | events of `Collected` | administrators |
//! | `POST images/fsck` | [`Fsck`](crate::images::Fsck) | events of `Checked` | administrators |
//! | `POST images/push`, `images/pull` | [`Push`](crate::images::Push), [`Pull`](crate::images::Pull) | events of `Transferred` | administrators |
//! | `POST images/clone` | [`Clone`](crate::images::Clone) | events of `[Cloned]` | administrators |
//! | `GET flavours` | | `[Flavour]` | users |
//! | `PUT flavours/{name}/defaults` | `FlavourDefaults` | 204 | administrators |
//! | `DELETE flavours/{name}/defaults` | | 204; the recipe's hold again | administrators |
//! | `GET desktops[?user=…]` | | `[DesktopInfo]` | users their own |
//! | `POST desktops` | [`dto::CreateDesktop`] | 201 `Desktop` | administrators |
//! | `GET desktops/{id}` | | `DesktopInfo` | users their own |
//! | `PATCH desktops/{id}` | [`dto::ChangeDesktop`] | 204 | administrators |
//! | `DELETE desktops/{id}` | | 204 | administrators |
//! | `POST desktops/{id}/start` | | events of `Timings` | users their own |
//! | `POST desktops/{id}/stop` | | 204 | users their own |
//! | `POST desktops/{id}/commit` | `NewVersion` | 201 `Version` | administrators |
//! | `GET desktops/{id}/stats` | | `Stats` | users their own |
//! | `GET desktops/{id}/network` | | `PortView` or null | users their own |
//! | `POST desktops/{id}/network` | [`dto::ExplainFrames`] | the same, with what becomes of the frames | users their own |
//! | `POST desktops/{id}/exec` | `ExecRequest` | 101, then [frames](frame) | administrators |
//! | `GET repository/pull`, `repository/push` | | 101, then [questions](qvd_storage::repository::wire) | administrators |
//! | `GET sessions` | | `[SessionInfo]` | users their own |
//! | `DELETE sessions/{id}` | | 204 | users their own |
//!
//! A browser's cookie makes nobody an administrator here: a password or a token does.
//!
//! Calls about images that name a directory or a file of the host, remotes included, are
//! for the host's own administrator alone: who comes by the unix socket. Whoever has signed
//! in is the author of what is asked for, whatever is said. Each change is in the daemon's log.
//!
//! Events are one JSON object a line, see [`dto::Event`]. Refusals are
//! [`dto::ErrorBody`] with a stable code and an id that the daemon's log has too.

mod client;
mod door;
pub mod dto;
mod error;
mod exec;
pub mod frame;
mod images;
mod repository;
mod router;
mod unix;

pub use client::{Client, ClientError, ExecOutput, ExecReader, ExecWriter};
pub use door::{Direction, RepositoryDoor, trusting, trusting_pem};
pub use router::{ApiState, router};
pub use unix::{UnixDoor, UnixServeError, serve_unix};

use qvd_core::UserName;
use qvd_farm::User;

/// Who calls. A front door puts it into the request's extensions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// Somebody who may do everything.
    Admin {
        /// The user; `None` for the administrator of the host itself.
        user: Option<UserName>,
    },
    /// A user, who sees what is the user's own.
    User(UserName),
}

impl Caller {
    /// Whether this caller may do everything.
    #[must_use]
    pub const fn is_admin(&self) -> bool {
        matches!(self, Self::Admin { .. })
    }

    /// The user, if the caller is one.
    #[must_use]
    pub const fn user(&self) -> Option<&UserName> {
        match self {
            Self::Admin { user } => user.as_ref(),
            Self::User(user) => Some(user),
        }
    }
}

impl From<&User> for Caller {
    fn from(user: &User) -> Self {
        if user.admin { Self::Admin { user: Some(user.name.clone()) } } else { Self::User(user.name.clone()) }
    }
}
