//! What roots stand on.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use qvd_core::{Digest, Missing};

use super::layer;
use crate::Error;

/// A read-only tree that roots stand on: one or more layers, uppermost first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseTree {
    digest: Digest,
    layers: Vec<Layer>,
}

/// One layer of a base.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layer {
    /// A directory that holds its files as they are.
    Dir(PathBuf),
    /// A file with an EROFS, mounted without a loop device where the kernel can.
    Erofs(PathBuf),
    /// A directory of content: its files show only where a layer above
    /// redirects to them ("data-only" in overlayfs). Below all others.
    Data(PathBuf),
}

impl Layer {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        let (Self::Dir(path) | Self::Erofs(path) | Self::Data(path)) = self;
        path
    }
}

impl BaseTree {
    /// The tree in `dir`, whose content is known by `digest`. Nobody may change
    /// it while roots stand on it.
    #[must_use]
    pub fn new(digest: Digest, dir: impl Into<PathBuf>) -> Self {
        Self::layered(digest, vec![Layer::Dir(dir.into())])
    }

    /// The tree that these layers make together, uppermost first.
    #[must_use]
    pub const fn layered(digest: Digest, layers: Vec<Layer>) -> Self {
        Self { digest, layers }
    }

    /// What its content is known by.
    #[must_use]
    pub const fn digest(&self) -> Digest {
        self.digest
    }

    /// Its layers, uppermost first.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Makes a detached mount of all of it together, for reading: what is to be
    /// copied or bound by those who do not stack layers themselves.
    ///
    /// # Errors
    /// A layer is not there, or the kernel cannot stack them.
    pub fn open(&self) -> Result<OwnedFd, Error> {
        layer::stack(&self.layers, None).map_err(|source| match source.lacks() {
            Some(what) => {
                Error::Unsupported { op: "mount images", missing: Missing::Kernel(format!("{what}: {source}")) }
            }
            None => Error::Mount { what: format!("base `{}`", self.path().display()), source },
        })
    }

    /// What names it to a person: its uppermost layer.
    pub(crate) fn path(&self) -> &Path {
        self.layers.first().map_or(Path::new(""), Layer::path)
    }

    /// Where it is, when it is one plain directory.
    #[must_use]
    pub fn dir(&self) -> Option<&Path> {
        match self.layers.as_slice() {
            [Layer::Dir(dir)] => Some(dir),
            _ => None,
        }
    }
}
