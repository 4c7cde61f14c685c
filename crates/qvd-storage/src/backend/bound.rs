//! Roots put together from parts: what programs only read is bound from the
//! base, what they write is a copy of the root's own.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use qvd_sys::mount::{self, MountError, Restrictions};
use rustix::{
    fs::{Mode, OFlags, ResolveFlags, mkdirat, openat2},
    io::Errno,
};
use serde::Deserialize;

use super::BaseTree;
use crate::{
    Error,
    copytree::{Content, copy_tree},
    fsio,
};

/// Where an image says which of its directories are written to.
const MANIFEST: &str = "usr/share/qvd/bind.toml";

/// Largest manifest read, in bytes.
const MANIFEST_MAX_BYTES: u64 = 64 << 10;

/// Most directories that a manifest may name: each is a mount of every root.
const PARTS_MAX: usize = 64;

/// What is written to in an image that says nothing, as far as it has it.
const USUAL: [&str; 6] = ["/etc", "/home", "/opt", "/root", "/srv", "/var"];

/// The writable directories of an image, in alphabetical order: relative, and
/// none in another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Parts(Vec<PathBuf>);

/// The manifest as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    /// Absolute directories.
    writable: Vec<PathBuf>,
}

impl Parts {
    /// What the image in the mount `base` says, or else what is usual.
    pub(super) fn of(base: &BaseTree, mount: BorrowedFd<'_>) -> Result<Self, Error> {
        let path = base.path().join(MANIFEST);
        let read = || -> io::Result<String> {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let file = File::from(openat2(mount, MANIFEST, flags, Mode::empty(), below())?);
            if !file.metadata()?.is_file() {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no file"));
            }
            let mut text = String::new();
            file.take(MANIFEST_MAX_BYTES + 1).read_to_string(&mut text)?;
            Ok(text)
        };
        match read() {
            Ok(text) => {
                let parts = Self::parse(&text).map_err(|reason| invalid(&path, reason))?;
                parts.0.iter().try_for_each(|part| {
                    open(mount, part).map(drop).map_err(|error| {
                        invalid(&path, format!("`/{}` is no directory of the image: {error}", part.display()))
                    })
                })?;
                Ok(parts)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let usual = USUAL.iter().map(|part| PathBuf::from(part.trim_start_matches('/')));
                // Some images have links where others have directories.
                Ok(Self(usual.filter(|part| open(mount, part).is_ok()).collect()))
            }
            Err(error) => Err(Error::io("read", &path)(error)),
        }
    }

    fn parse(text: &str) -> Result<Self, String> {
        if text.len() as u64 > MANIFEST_MAX_BYTES {
            return Err(format!("it has more than {MANIFEST_MAX_BYTES} bytes"));
        }
        let manifest: Manifest = toml::from_str(text).map_err(|error| error.message().to_owned())?;
        if manifest.writable.len() > PARTS_MAX {
            return Err(format!("it names {} directories; {PARTS_MAX} are possible", manifest.writable.len()));
        }
        let mut parts = BTreeSet::new();
        for path in manifest.writable {
            let plain = path.components().skip(1).all(|part| matches!(part, Component::Normal(_)));
            let Ok(part) = path.strip_prefix("/") else {
                return Err(format!("`{}` is not absolute", path.display()));
            };
            if !plain || part == Path::new("") {
                return Err(format!("`{}` is not a directory below `/`", path.display()));
            }
            if !parts.insert(part.to_path_buf()) {
                return Err(format!("`{}` is there twice", path.display()));
            }
        }
        let nested = parts.iter().find(|part| part.ancestors().skip(1).any(|above| parts.contains(above)));
        if let Some(part) = nested {
            return Err(format!("`/{}` is in another directory that it names", part.display()));
        }
        Ok(Self(parts.into_iter().collect()))
    }

    /// Copies the parts of a base to the empty directory `to`.
    pub(super) fn copy(&self, base: &BaseTree, from: BorrowedFd<'_>, to: &Path) -> Result<(), Error> {
        for (number, part) in self.0.iter().enumerate() {
            let own = to.join(number.to_string());
            let source = open(from, part).map_err(Error::io("open", base.path().join(part)))?;
            mkdirat(rustix::fs::CWD, &own, Mode::RWXU).map_err(Error::io("make root", &own))?;
            let target = fsio::open_dir(&own).map_err(Error::io("make root", &own))?;
            copy_tree(&base.path().join(part), source.as_fd(), target.as_fd(), Content::Cheapest)?;
        }
        Ok(())
    }

    /// Mounts parts of `own` over those of `base`, a detached mount of it.
    pub(super) fn mount(
        &self,
        base: OwnedFd,
        own: &Path,
        idmap: Option<BorrowedFd<'_>>,
    ) -> Result<OwnedFd, MountError> {
        let failed = |op: &str| {
            let op = format!("{op} of a root");
            move |error: io::Error| MountError::new(op, error)
        };
        let read_only = Restrictions { read_only: true, nodev: true, ..Restrictions::default() };
        mount::restrict(base.as_fd(), read_only, idmap).map_err(failed("restrict the base"))?;
        let mut parts = Vec::new();
        for (number, part) in self.0.iter().enumerate() {
            let dir = mount::open_dir_path(&own.join(number.to_string())).map_err(failed("open a part"))?;
            let mount = mount::clone_dir(dir.as_fd()).map_err(failed("clone a part"))?;
            mount::restrict(mount.as_fd(), Restrictions { nodev: true, ..Restrictions::default() }, idmap)
                .map_err(failed("restrict a part"))?;
            parts.push((part, mount));
        }
        let compose = || {
            // Any directory can be covered: the namespace is ours alone.
            let at = mount::open_dir_path(Path::new("/sys"))?;
            mount::attach(base.as_fd(), at.as_fd())?;
            for (part, mount) in &parts {
                mount::attach(mount.as_fd(), open(base.as_fd(), part)?.as_fd())?;
            }
            mount::clone_tree(base.as_fd())
        };
        mount::in_private_namespace(compose).flatten().map_err(failed("put together the mounts"))
    }
}

/// Opens a directory below a mount, reached without any link.
fn open(mount: BorrowedFd<'_>, part: &Path) -> io::Result<OwnedFd> {
    Ok(openat2(mount, part, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), below())?)
}

fn below() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

fn invalid(path: &Path, reason: String) -> Error {
    let source = io::Error::new(Errno::INVAL.kind(), reason);
    Error::Io { op: "use the manifest", path: path.to_path_buf(), source }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn reason(text: &str) -> String {
        Parts::parse(text).unwrap_err()
    }

    #[test]
    fn a_manifest_names_directories() {
        let parts = Parts::parse("writable = [\"/var\", \"/etc\", \"/usr/local\"]").unwrap();
        assert_eq!(parts.0, ["etc", "usr/local", "var"].map(PathBuf::from));
        assert_eq!(Parts::parse("writable = []").unwrap().0, Vec::<PathBuf>::new());
    }

    #[test]
    fn a_wrong_manifest_says_what_is_wrong() {
        assert!(reason("writable = [\"etc\"]").contains("`etc` is not absolute"));
        for bad in ["/", "/var/../etc", "/./"] {
            assert!(reason(&format!("writable = [\"{bad}\"]")).contains("below `/`"), "{bad}");
        }
        assert!(reason("writable = [\"/var\", \"/var/lib\"]").contains("`/var/lib` is in another"));
        assert!(reason("writable = [\"/var\", \"/var/\"]").contains("twice"));
        assert!(reason("writabel = []").contains("writabel"));
        assert!(reason("").contains("writable"));
        let many: Vec<_> = (0..65).map(|n| format!("\"/d{n}\"")).collect();
        assert!(reason(&format!("writable = [{}]", many.join(","))).contains("64 are possible"));
        assert!(reason(&" ".repeat(70_000)).contains("bytes"));
    }
}
