//! The other end of the API: what the commands use.

mod error;
mod exec;
mod transport;

use std::{fmt, path::Path, sync::Arc};

use axum::http::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use qvd_core::{DesktopId, FlavourName, StartStep, UserName};
use qvd_farm::{Desktop, DesktopInfo, Flavour, FlavourDefaults, OwnedDesktops, Secret, SessionInfo, User};
use qvd_guest::{ExecRequest, Stats};
use qvd_node::{ImageSummary, MemoryReport, NewVersion, PortView, Timings, Version};
use serde::Serialize;

use self::transport::{NOTHING, Transport, refusal};
pub use self::{
    error::ClientError,
    exec::{ExecOutput, ExecReader, ExecWriter},
};
use super::dto::{
    AddUser, BuildImage, ChangeDesktop, ChangeUser, CreateDesktop, ExplainFrames, Health, SetPassword, WhoAmI,
};
use crate::images::{ImageCall, News};

/// Calls the API of one daemon. Cloning is cheap; each call is a connection.
#[derive(Clone)]
pub struct Client {
    transport: Transport,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("at", &self.transport.address()).finish()
    }
}

impl Client {
    /// Calls the daemon of this host over its socket.
    #[must_use]
    pub fn unix(path: &Path) -> Self {
        Self { transport: Transport::Unix(path.to_owned()) }
    }

    /// Calls a daemon over HTTPS with a bearer token. Whom to trust is up to `tls`.
    ///
    /// # Errors
    /// `host` is neither a name nor an address.
    pub fn https(
        host: &str,
        port: u16,
        token: Secret,
        tls: Arc<rustls::ClientConfig>,
    ) -> Result<Self, rustls_pki_types::InvalidDnsNameError> {
        let name = rustls_pki_types::ServerName::try_from(host.to_owned())?;
        Ok(Self { transport: Transport::Https { host: host.to_owned(), port, name, tls, token } })
    }

    /// Whether the daemon is there, and its version.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn health(&self) -> Result<Health, ClientError> {
        self.transport.get("/health").await
    }

    /// Who the daemon takes us for.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn who_am_i(&self) -> Result<WhoAmI, ClientError> {
        self.transport.get("/whoami").await
    }

    /// All users.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn users(&self) -> Result<Vec<User>, ClientError> {
        self.transport.get("/users").await
    }

    /// Adds a user.
    ///
    /// # Errors
    /// [`ClientError`]: `user_exists`, `invalid_password`.
    pub async fn add_user(&self, add: &AddUser) -> Result<User, ClientError> {
        self.transport.send(Method::POST, "/users", Some(add)).await
    }

    /// Removes a user.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_user`, `user_has_desktops`.
    pub async fn remove_user(&self, name: &UserName, desktops: OwnedDesktops) -> Result<(), ClientError> {
        let how = match desktops {
            OwnedDesktops::Refuse => "refuse",
            OwnedDesktops::Remove => "remove",
        };
        self.transport.done(Method::DELETE, &format!("/users/{name}?desktops={how}"), NOTHING).await
    }

    /// Lets a user administer the farm, or no more.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_user`.
    pub async fn set_admin(&self, name: &UserName, admin: bool) -> Result<(), ClientError> {
        self.transport.done(Method::PATCH, &format!("/users/{name}"), Some(&ChangeUser { admin })).await
    }

    /// Gives a user another password.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_user`, `invalid_password`, `wrong_credentials`.
    pub async fn set_password(&self, name: &UserName, set: &SetPassword) -> Result<(), ClientError> {
        self.transport.done(Method::PUT, &format!("/users/{name}/password"), Some(set)).await
    }

    /// The newest image of every flavour.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn images(&self) -> Result<Vec<ImageSummary>, ClientError> {
        self.transport.get("/images").await
    }

    /// Builds the image of a recipe.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn build_image(
        &self,
        build: &BuildImage,
        mut progress: impl FnMut(&str) + Send,
    ) -> Result<ImageSummary, ClientError> {
        self.transport.events("/images", Some(build), |_, line, _| progress(line)).await
    }

    /// Asks for something about images. `news` hears how a long one goes on.
    ///
    /// # Errors
    /// [`ClientError`]: `not_found`, `invalid`, `busy`, `unsupported`, `failed`, `forbidden`, `no_repository`.
    pub async fn image<C: ImageCall + Sync>(
        &self,
        call: &C,
        mut news: impl FnMut(News) + Send,
    ) -> Result<C::Answer, ClientError> {
        let mut path = format!("/images/{}", C::PATH);
        if C::LONG {
            let tell = |_, text: &str, amount| news(News { text: text.to_owned(), amount });
            return self.transport.events(&path, Some(call), tell).await;
        }
        if matches!(C::METHOD, Method::GET | Method::DELETE) {
            path += &query(call)?;
            return self.transport.send(C::METHOD, &path, NOTHING).await;
        }
        self.transport.send(C::METHOD, &path, Some(call)).await
    }

    /// The flavours and their defaults.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn flavours(&self) -> Result<Vec<Flavour>, ClientError> {
        self.transport.get("/flavours").await
    }

    /// Sets what new desktops of a flavour get.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_flavour`, `invalid_limits`.
    pub async fn set_flavour_defaults(
        &self,
        name: &FlavourName,
        defaults: &FlavourDefaults,
    ) -> Result<(), ClientError> {
        self.transport.done(Method::PUT, &format!("/flavours/{name}/defaults"), Some(defaults)).await
    }

    /// Has new desktops of a flavour get again what its recipe says.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_flavour`.
    pub async fn forget_flavour_defaults(&self, name: &FlavourName) -> Result<(), ClientError> {
        self.transport.done(Method::DELETE, &format!("/flavours/{name}/defaults"), NOTHING).await
    }

    /// The desktops of one user or of all.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn desktops(&self, user: Option<&UserName>) -> Result<Vec<DesktopInfo>, ClientError> {
        self.transport.get(&whose("/desktops", user)).await
    }

    /// Makes a desktop.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_user`, `unknown_flavour`, `unknown_tag`,
    /// `name_taken`, `address_taken`, `invalid_name`, `invalid_address`, `invalid_limits`.
    pub async fn create_desktop(&self, create: &CreateDesktop) -> Result<Desktop, ClientError> {
        self.transport.send(Method::POST, "/desktops", Some(create)).await
    }

    /// One desktop.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_desktop`, `not_yours`.
    pub async fn desktop(&self, id: DesktopId) -> Result<DesktopInfo, ClientError> {
        self.transport.get(&format!("/desktops/{id}")).await
    }

    /// Closes a desktop for maintenance, or opens it again.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_desktop`.
    pub async fn set_blocked(&self, id: DesktopId, blocked: bool) -> Result<(), ClientError> {
        self.transport.done(Method::PATCH, &format!("/desktops/{id}"), Some(&ChangeDesktop { blocked })).await
    }

    /// Stops a desktop and deletes its files.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_desktop`.
    pub async fn remove_desktop(&self, id: DesktopId) -> Result<(), ClientError> {
        self.transport.done(Method::DELETE, &format!("/desktops/{id}"), NOTHING).await
    }

    /// Makes a desktop run and waits for its session.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_desktop`, `not_yours`, `desktop_blocked`, `desktop_removing`.
    pub async fn start(
        &self,
        id: DesktopId,
        mut progress: impl FnMut(Option<StartStep>, &str) + Send,
    ) -> Result<Timings, ClientError> {
        self.transport.events(&format!("/desktops/{id}/start"), NOTHING, |step, text, _| progress(step, text)).await
    }

    /// Stops a desktop.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_desktop`, `not_yours`.
    pub async fn stop(&self, id: DesktopId) -> Result<(), ClientError> {
        self.transport.done(Method::POST, &format!("/desktops/{id}/stop"), NOTHING).await
    }

    /// `POST desktops/{id}/commit`: makes the next version of a flavour from what a
    /// running desktop's root holds.
    ///
    /// # Errors
    /// As [`Client::health`].
    pub async fn commit(&self, id: DesktopId, new: &NewVersion) -> Result<Version, ClientError> {
        self.transport.send(Method::POST, &format!("/desktops/{id}/commit"), Some(new)).await
    }

    /// What a running desktop uses.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_desktop`, `not_yours`.
    pub async fn stats(&self, id: DesktopId) -> Result<Stats, ClientError> {
        self.transport.get(&format!("/desktops/{id}/stats")).await
    }

    /// What the host has of memory, who has it, and what was decided about it.
    ///
    /// # Errors
    /// [`ClientError`]: `forbidden`.
    pub async fn memory(&self) -> Result<MemoryReport, ClientError> {
        self.transport.get("/memory").await
    }

    /// The port of a running desktop, and what would become of `frames` that it
    /// sent; `None` if it has no port.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_desktop`, `not_yours`, `invalid_frame`.
    pub async fn network(&self, id: DesktopId, frames: &ExplainFrames) -> Result<Option<PortView>, ClientError> {
        self.transport.send(Method::POST, &format!("/desktops/{id}/network"), Some(frames)).await
    }

    /// Runs a program inside a running desktop: what goes in, and what comes out.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_desktop`, `not_yours`, `invalid_command`.
    pub async fn exec(&self, id: DesktopId, program: &ExecRequest) -> Result<(ExecWriter, ExecReader), ClientError> {
        let response = self.transport.call(Method::POST, &format!("/desktops/{id}/exec"), Some(program), true).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(response).await);
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(|e| ClientError::protocol("talk with")(e.into()))?;
        Ok(exec::split(TokioIo::new(upgraded)))
    }

    /// Who is signed in.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn sessions(&self, user: Option<&UserName>) -> Result<Vec<SessionInfo>, ClientError> {
        self.transport.get(&whose("/sessions", user)).await
    }

    /// Ends a session.
    ///
    /// # Errors
    /// [`ClientError`]: `unknown_session`.
    pub async fn end_session(&self, id: i64) -> Result<(), ClientError> {
        self.transport.done(Method::DELETE, &format!("/sessions/{id}"), NOTHING).await
    }
}

/// What is asked, behind a `?`: fields that are text, escaped.
fn query<C: Serialize>(call: &C) -> Result<String, ClientError> {
    let fields = serde_json::to_value(call).map_err(|e| ClientError::protocol("ask")(e.into()))?;
    let mut text = String::new();
    for (name, value) in fields.as_object().into_iter().flatten() {
        text += &format!("{}{name}=", if text.is_empty() { '?' } else { '&' });
        // Source: RFC 3986, 2.3, "Unreserved Characters".
        for byte in value.as_str().unwrap_or_default().bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => text.push(byte.into()),
                other => text += &format!("%{other:02X}"),
            }
        }
    }
    Ok(text)
}

fn whose(path: &str, user: Option<&UserName>) -> String {
    user.map_or_else(|| path.to_owned(), |user| format!("{path}?user={user}"))
}
