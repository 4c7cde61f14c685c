//! Other repositories: how they are named, and how they are reached.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use qvd_farm::{ErrorKind, FarmError, Secret};
use qvd_storage::{
    Repository,
    repository::{
        Directory, Source, Transferred, Wanted,
        wire::{self, Streams},
    },
};
use serde::{Deserialize, Serialize};

use crate::api::{Direction, RepositoryDoor, dto, trusting, trusting_pem};

/// Where a gateway listens unless told otherwise.
const GATEWAY_PORT: u16 = 8443;

/// What a text names as another repository.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// A directory of this host.
    Directory(PathBuf),
    /// The daemon at `https://USER@HOST[:PORT]`.
    Daemon {
        /// As whom.
        user: String,
        /// Name or address.
        host: String,
        /// Its port.
        port: u16,
    },
    /// A store that speaks the protocol of S3: `s3://BUCKET[/PREFIX]`.
    Store(String),
}

impl Place {
    /// What `text` names.
    ///
    /// # Errors
    /// It is the address of a daemon, and wrong.
    pub fn of(text: &str) -> Result<Self, FarmError> {
        if text.starts_with("s3://") {
            return Ok(Self::Store(text.to_owned()));
        }
        let Some(address) = text.strip_prefix("https://") else { return Ok(Self::Directory(text.into())) };
        let usage = |what: &str| FarmError::new(ErrorKind::Invalid, format!("`{text}` {what}"));
        let address = address.trim_end_matches('/');
        let (user, at) = address.rsplit_once('@').ok_or_else(|| usage("names no user: https://USER@HOST[:PORT]"))?;
        if user.is_empty() || user.contains(':') {
            return Err(usage("holds no plain user name; passwords are asked for"));
        }
        let (host, port) = match at.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => {
                (host, port.parse().map_err(|_| usage("has no number for its port"))?)
            }
            _ => (at, GATEWAY_PORT),
        };
        Ok(Self::Daemon { user: user.to_owned(), host: host.to_owned(), port })
    }
}

/// Key of a store. Shown, it has no secret in it.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreKeys {
    /// Name of the key.
    pub key_id: String,
    /// The key.
    #[serde(serialize_with = "dto::expose")]
    pub secret_key: Secret,
    /// What comes with a key that ends soon.
    #[serde(default, serialize_with = "dto::expose_option", skip_serializing_if = "Option::is_none")]
    pub session_token: Option<Secret>,
    /// Region of the bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Address of the store, if it is not Amazon's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
}

impl fmt::Debug for StoreKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreKeys")
            .field("region", &self.region)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

/// Another repository, and what it asks of whoever uses it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoteAccess {
    /// See [`Place`]; a directory by its absolute path.
    pub address: String,
    /// Password of the user at a daemon.
    #[serde(default, serialize_with = "dto::expose_option", skip_serializing_if = "Option::is_none")]
    pub password: Option<Secret>,
    /// Certificates to trust, in PEM, instead of those that the host trusts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trusted_pem: Option<String>,
    /// Key of a store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keys: Option<StoreKeys>,
}

impl RemoteAccess {
    /// The directory of this host that it is, if it is one.
    #[must_use]
    pub fn directory(&self) -> Option<&Path> {
        let elsewhere = self.address.starts_with("s3://") || self.address.starts_with("https://");
        (!elsewhere).then(|| Path::new(&self.address))
    }
}

/// Another repository, ready to be used.
#[derive(Debug)]
#[non_exhaustive]
pub enum Remote {
    /// In a directory of this host.
    Directory(PathBuf),
    /// Of a daemon, over HTTPS.
    Daemon(Arc<RepositoryDoor>),
    /// A store that speaks the protocol of S3.
    Store(Box<qvd_s3::Store>),
}

impl Remote {
    /// Makes it ready; nothing is asked of it yet.
    ///
    /// # Errors
    /// Its address is wrong, or what it asks for is missing or unusable.
    pub fn open(access: &RemoteAccess) -> Result<Self, FarmError> {
        let address = &access.address;
        let invalid = |what: String| FarmError::new(ErrorKind::Invalid, what);
        match Place::of(address)? {
            Place::Directory(path) => {
                // An installation's, or its own.
                let images = path.join("images");
                Ok(Self::Directory(if images.join("format").exists() { images } else { path }))
            }
            Place::Daemon { user, host, port } => {
                let tls = match &access.trusted_pem {
                    Some(pem) => trusting_pem(pem.as_bytes()),
                    None => trusting(None),
                };
                let tls = tls.map_err(|e| FarmError::new(ErrorKind::Failed, "cannot tell whom to trust").because(e))?;
                let password = access.password.as_ref();
                let password = password.ok_or_else(|| invalid(format!("`{address}` takes a password")))?;
                let door = RepositoryDoor::https(&host, port, &user, password, tls);
                let door = door.map_err(|_| invalid(format!("`{address}` names neither a host nor an address")))?;
                Ok(Self::Daemon(Arc::new(door)))
            }
            Place::Store(address) => {
                let keys = access.keys.as_ref().ok_or_else(|| invalid(format!("`{address}` takes a key")))?;
                let mut with = qvd_s3::Access::new(keys.key_id.as_str(), keys.secret_key.expose());
                with.session_token = keys.session_token.as_ref().map(|token| token.expose().to_owned());
                (with.region, with.endpoint) = (keys.region.clone(), keys.endpoint.clone());
                with.trusted_pem = access.trusted_pem.as_ref().map(|pem| pem.as_bytes().to_vec());
                let store = qvd_s3::Store::open(&address, &with).map_err(|error| match error {
                    qvd_s3::OpenError::Address(_) => invalid(error.to_string()),
                    error => FarmError::new(ErrorKind::Failed, format!("cannot use `{address}`")).because(error),
                })?;
                Ok(Self::Store(Box::new(store)))
            }
        }
    }

    /// To get things from it.
    ///
    /// # Errors
    /// There is no repository in the directory that it is.
    pub fn source(self) -> Result<Box<dyn Source>, qvd_storage::Error> {
        match self {
            Self::Store(store) => Ok(store),
            Self::Directory(path) => Ok(Box::new(Directory::new(Repository::open_existing(&path)?))),
            Self::Daemon(door) => {
                let name = door.name();
                let streams = Streams::new(move || door.open(Direction::Pull));
                Ok(Box::new(wire::Remote::new(name, streams)))
            }
        }
    }

    /// Gives it what is wanted.
    pub(super) fn push(
        &self,
        from: &Repository,
        wanted: &Wanted,
        who: &str,
        progress: &mut (dyn FnMut(&Transferred) + Send),
    ) -> Result<Transferred, qvd_storage::Error> {
        match self {
            Self::Directory(path) => {
                let there = Repository::open(path)?;
                there.pull(&Directory::new(Repository::open_existing(from.dir())?), wanted, who, progress)
            }
            Self::Store(store) => from.push(&**store, wanted, who, progress),
            Self::Daemon(door) => {
                let stream = door.open(Direction::Push).map_err(|source| qvd_storage::Error::Io {
                    op: "connect to",
                    path: door.name().into(),
                    source,
                })?;
                wire::give(from, stream, wanted, progress)
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_cannot_be_is_refused_before_anything_is_asked() {
        for bad in ["https://host", "https://a:b@host", "https://@host", "https://a@host:port"] {
            assert_eq!(Place::of(bad).unwrap_err().kind(), ErrorKind::Invalid, "{bad}");
        }
        let daemon = |port| Place::Daemon { user: "ana".to_owned(), host: "farm".to_owned(), port };
        assert_eq!(Place::of("https://ana@farm/").unwrap(), daemon(8443));
        assert_eq!(Place::of("https://ana@farm:1").unwrap(), daemon(1));
    }

    #[test]
    fn no_secret_shows() {
        let json = r#"{"address":"s3://b","password":"hush","keys":{"key_id":"k","secret_key":"hush"}}"#;
        let access: RemoteAccess = serde_json::from_str(json).unwrap();
        assert!(!format!("{access:?}").contains("hush"), "{access:?}");
    }
}
