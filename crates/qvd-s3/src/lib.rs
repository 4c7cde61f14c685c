//! Images in a store that speaks the protocol of S3.
//!
//! A [`Store`] is a prefix of a bucket. Repositories get things from it as from
//! any [`Source`](qvd_storage::repository::Source), and bring things to it as to
//! a [`Destination`](qvd_storage::repository::Destination). It holds
//!
//! - `objects/AB/CDEF…`: contents, each a zstd frame;
//! - `trees/HEX`: encodings of trees, each a zstd frame;
//! - `commits/HEX`: encodings of commits, as they are;
//! - `signatures/HEX`: those of a commit, a list in JSON;
//! - `flavours/F/tags/T`: the last move of a tag, in JSON.
//!
//! Each has its name when it is whole, and what needs something comes after it.
//! A tag is moved by a conditional put, which fails if somebody else moved it;
//! in a store that has none, by a look before. What comes from a store is not
//! trusted: whoever takes it verifies it.
//!
//! It is a crate of its own, because its client brings a runtime and an HTTP
//! library that not everybody who links `qvd-storage` wants. Its calls block;
//! they cannot be made from a task.

mod store;
mod transfer;

use std::fmt;

pub use store::Store;

/// What a store asks of whoever uses it. Shown, it has no secret in it.
#[derive(Clone, Default)]
#[non_exhaustive]
pub struct Access {
    /// Name of the key.
    pub key_id: String,
    /// The key.
    pub secret_key: String,
    /// What comes with a key that ends soon.
    pub session_token: Option<String>,
    /// Region of the bucket; most stores but Amazon's do not care.
    pub region: Option<String>,
    /// Address of the store, if it is not Amazon's: `https://HOST[:PORT]`.
    pub endpoint: Option<String>,
    /// Certificates to trust, in PEM, instead of those that the host trusts.
    pub trusted_pem: Option<Vec<u8>>,
}

impl Access {
    /// Access by a key.
    #[must_use]
    pub fn new(key_id: impl Into<String>, secret_key: impl Into<String>) -> Self {
        Self { key_id: key_id.into(), secret_key: secret_key.into(), ..Self::default() }
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("region", &self.region).field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

/// Why a text is not the address of a store, or nothing can be asked of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// It is not of the form that it should have.
    #[error("`{0}` is no address of a store: s3://BUCKET[/PREFIX]")]
    Address(String),
    /// The certificates cannot be read.
    #[error("cannot use the certificates to trust")]
    Certificates(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The client cannot be made.
    #[error("cannot use the store `{name}`")]
    Client {
        /// Its address.
        name: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
