//! The packages of a tree: what its package manager says is installed.

use std::{collections::BTreeMap, io::Read, path::Path};

use serde::{Deserialize, Serialize};

use super::{Node, Repository, Tree, rpm};
use crate::Error;

/// Largest list that is read, in bytes.
const LIST_MAX_BYTES: u64 = 256 << 20;
const MAGIC: &str = "qvd-packages-1";
const DPKG_STATUS: &str = "var/lib/dpkg/status";

/// Whose packages they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum PackageKind {
    /// Debian's.
    Dpkg,
    /// Red Hat's.
    Rpm,
}

/// Installed packages and their versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packages {
    /// Whose they are.
    pub kind: PackageKind,
    /// Version by name and architecture, as in `libc6:amd64` or `glibc.x86_64`.
    pub versions: BTreeMap<String, String>,
}

impl Packages {
    /// Reads the status file of dpkg. Paragraphs that are not of an installed
    /// package are passed over, as dpkg does.
    #[must_use]
    pub fn of_dpkg(status: &str) -> Self {
        let mut versions = BTreeMap::new();
        for paragraph in status.split("\n\n") {
            let field = |name: &str| {
                paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
            };
            let installed = field("Status").is_some_and(|status| status.ends_with(" installed"));
            if let (true, Some(name), Some(version)) = (installed, field("Package"), field("Version")) {
                let name = format!("{name}:{}", field("Architecture").unwrap_or("all"));
                // No package is called so, and our list could not say it.
                if !name.contains(char::is_whitespace) {
                    versions.insert(name, version.to_owned());
                }
            }
        }
        Self { kind: PackageKind::Dpkg, versions }
    }

    /// One line for the kind, one for each package.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let kind = match self.kind {
            PackageKind::Dpkg => "dpkg",
            PackageKind::Rpm => "rpm",
        };
        let mut text = format!("{MAGIC} {kind}\n");
        for (name, version) in &self.versions {
            text.push_str(&format!("{name} {version}\n"));
        }
        text.into_bytes()
    }

    /// Reads what [`Packages::encode`] wrote.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut lines = std::str::from_utf8(bytes).ok()?.strip_suffix('\n')?.split('\n');
        let kind = match lines.next()?.strip_prefix(MAGIC)? {
            " dpkg" => PackageKind::Dpkg,
            " rpm" => PackageKind::Rpm,
            _ => return None,
        };
        let versions =
            lines.map(|line| line.split_once(' ').map(|(name, version)| (name.to_owned(), version.to_owned())));
        Some(Self { kind, versions: versions.collect::<Option<_>>()? })
    }
}

/// The packages of a tree whose contents are there.
pub(crate) fn read(repository: &Repository, tree: &Tree) -> Result<Option<Packages>, Error> {
    match content(repository, tree, DPKG_STATUS)? {
        Some(status) => Ok(Some(Packages::of_dpkg(&String::from_utf8_lossy(&status)))),
        None => read_rpm(repository, tree),
    }
}

fn read_rpm(repository: &Repository, tree: &Tree) -> Result<Option<Packages>, Error> {
    for path in rpm::FILES {
        if let Some(database) = content(repository, tree, path)? {
            let packages = Packages::of_rpm(&database);
            if packages.is_none() {
                tracing::warn!(path, "the list of packages of an image cannot be read; it has none then");
            }
            return Ok(packages);
        }
    }
    Ok(None)
}

/// A file of a tree; none if there is no such file, or it is empty.
pub(crate) fn content(repository: &Repository, tree: &Tree, path: &str) -> Result<Option<Vec<u8>>, Error> {
    let Some(Node::File { object: Some(object), .. }) = tree.get(Path::new(path)).map(|entry| &entry.node) else {
        return Ok(None);
    };
    let mut bytes = Vec::new();
    let file = repository.object(*object)?;
    file.take(LIST_MAX_BYTES).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    Ok(Some(bytes))
}

impl Repository {
    /// The packages of a commit; none if its tree has no list that is known.
    ///
    /// # Errors
    /// The list is missing or damaged.
    pub fn packages(&self, commit: &super::Commit) -> Result<Option<Packages>, Error> {
        let Some(object) = commit.packages else { return Ok(None) };
        let mut bytes = Vec::new();
        let file = self.object(object)?;
        file.take(LIST_MAX_BYTES).read_to_end(&mut bytes).map_err(Error::io("read", self.objects.path(object)))?;
        let damaged =
            || Error::DamagedPart { what: format!("object {object}"), reason: "it is no list of packages".to_owned() };
        Packages::decode(&bytes).ok_or_else(damaged).map(Some)
    }
}
