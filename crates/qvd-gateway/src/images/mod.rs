//! What is done with images: each call is carried out on a repository that is
//! here, or asked of the daemon that has one; both give the same answer and the
//! same errors.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use qvd_gateway::images::{ImageCall, Log};
//!
//! let repository = qvd_storage::Repository::open_existing("/var/lib/qvd/images".as_ref())?;
//! let log = Log { image: "icewm".parse()? }.carry_out(&repository, &mut |_| {})?;
//! # Ok(()) }
//! ```

mod change;
mod look;
mod remote;
mod transfer;

use std::path::Path;

use axum::http::Method;
use qvd_core::{FlavourName, UserName};
use qvd_farm::{ErrorKind, FarmError};
use qvd_storage::Repository;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use change::{Export, ExportFormat, Exported, Gc, Import, PutTag, Remove, RemoveTag, Revert};
pub use look::{Compare, Log, Reflog, Show, Shown, Tagged, Tags};
pub use remote::{Place, Remote, RemoteAccess, StoreKeys};
pub use transfer::{Clone, Cloned, Fsck, Pull, Push, Transfer};

/// How much of how much is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amount {
    /// Bytes that are done.
    pub done: u64,
    /// Bytes in all, as far as is known yet.
    pub total: u64,
}

/// How something long goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct News {
    /// A line for a person.
    pub text: String,
    /// How much is done, if that is known.
    pub amount: Option<Amount>,
}

/// Something that is done with images.
pub trait ImageCall: Serialize + DeserializeOwned + Send + 'static {
    /// What comes of it.
    type Answer: Serialize + DeserializeOwned + Send + 'static;

    /// By which method it is asked of a daemon. What is asked stands behind the
    /// `?` of a `GET` or `DELETE`, and else in the body.
    const METHOD: Method;

    /// At which path below `/api/v1/images/`.
    const PATH: &'static str;

    /// Whether it may take long: a daemon then answers with events.
    const LONG: bool = false;

    /// What it does, for errors: `cannot show icewm`.
    fn cannot(&self) -> String;

    /// Carries it out.
    ///
    /// # Errors
    /// Begins with [`ImageCall::cannot`]; nothing is left half done.
    fn carry_out(self, repository: &Repository, news: &mut (dyn FnMut(News) + Send))
    -> Result<Self::Answer, FarmError>;

    /// Notes that a user who has signed in asks for it: nobody signs as another.
    fn asked_by(&mut self, _user: &UserName) {}

    /// A flavour that is gone afterwards: no desktop may follow it.
    fn removes(&self) -> Option<&FlavourName> {
        None
    }

    /// A path of the host that it reads or writes: only the host's own
    /// administrator may name one.
    fn host_path(&self) -> Option<&Path> {
        None
    }
}

/// An error of the repository, behind what was tried.
fn storage(cannot: &str) -> impl FnOnce(qvd_storage::Error) -> FarmError + '_ {
    move |error| {
        let kind = match error.kind() {
            qvd_storage::ErrorKind::Invalid => ErrorKind::Invalid,
            qvd_storage::ErrorKind::NotFound => ErrorKind::NotFound,
            qvd_storage::ErrorKind::Busy => ErrorKind::Busy,
            qvd_storage::ErrorKind::Unsupported => ErrorKind::Unsupported,
            _ => ErrorKind::Failed,
        };
        FarmError::new(kind, cannot).because(error)
    }
}
