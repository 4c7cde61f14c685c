//! What is known by its digest: contents, trees, commits.

use std::{fmt, str::FromStr};

use qvd_core::{Digest, IdError};
use serde::{Deserialize, Serialize};

/// A digest that can be of one kind of thing only, so that a tree is never
/// looked for among commits.
macro_rules! id {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $type(Digest);

        impl $type {
            /// Wraps a digest.
            #[must_use]
            pub const fn new(digest: Digest) -> Self {
                Self(digest)
            }

            /// The digest.
            #[must_use]
            pub const fn digest(&self) -> Digest {
                self.0
            }

            /// The 64 hexadecimal digits: fit for a file name.
            #[must_use]
            pub fn hex(&self) -> String {
                self.0.hex()
            }

            /// From 64 hexadecimal digits, such as a file name.
            pub(crate) fn from_hex(hex: &str) -> Option<Self> {
                format!("sha256:{hex}").parse().ok().map(Self)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl FromStr for $type {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                text.parse().map(Self)
            }
        }
    };
}

id!(
    /// A file's content, known by its fs-verity digest: see [`ObjectHasher`](super::ObjectHasher).
    ObjectId
);
id!(
    /// A file tree, known by the SHA-256 of its canonical encoding.
    TreeId
);
id!(
    /// A version of an image, known by the SHA-256 of its canonical encoding.
    CommitId
);
