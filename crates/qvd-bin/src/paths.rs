//! Where an installation keeps things, from the one directory it is told.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use qvd_core::Instance;

use crate::failure::{Exit, Refusal};

/// State directory whose run-time directory bears no instance.
const DEFAULT_ROOT: &str = "/var/lib/qvd";

/// Directories and names of one installation.
#[derive(Debug)]
pub(crate) struct Paths {
    /// What lasts: images, roots, homes, database, certificate.
    pub(crate) root: PathBuf,
    /// What lasts until the next boot: records and sockets.
    pub(crate) run: PathBuf,
    /// What stands in the names of its kernel objects.
    pub(crate) instance: Instance,
}

impl Paths {
    /// Those of the installation below `root`, which need not exist yet.
    pub(crate) fn of(root: &Path) -> io::Result<Self> {
        // One directory is one installation, by whichever path it is named.
        let root = match fs::canonicalize(root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => std::path::absolute(root)?,
            found => found?,
        };
        let instance = Instance::of_root(root.as_os_str().as_encoded_bytes());
        let run = if root == Path::new(DEFAULT_ROOT) { "/run/qvd".into() } else { format!("/run/qvd-{instance}") };
        Ok(Self { root, run: run.into(), instance })
    }

    /// The socket that commands talk to.
    pub(crate) fn socket(&self) -> PathBuf {
        self.run.join("api.sock")
    }
}

/// The text of a file that a person named, `what` being what it is for: `key`.
pub(crate) fn read_text(what: &str, file: &Path) -> Result<String, Refusal> {
    fs::read_to_string(file).map_err(|error| {
        let exit = if error.kind() == io::ErrorKind::NotFound { Exit::NotFound } else { Exit::Failed };
        Refusal::new(exit, format!("cannot read the {what} `{}`: {error}", file.display()))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn one_directory_is_one_installation() {
        let dir = tempfile::tempdir().unwrap();
        let (root, link) = (dir.path().join("root"), dir.path().join("link"));
        fs::create_dir(&root).unwrap();
        std::os::unix::fs::symlink(&root, &link).unwrap();
        let paths = [root.clone(), link, root.join("../root/.")].map(|path| Paths::of(&path).unwrap());
        assert!(paths.windows(2).all(|pair| pair[0].run == pair[1].run), "{paths:?}");
        assert_ne!(paths[0].run, Paths::of(dir.path()).unwrap().run);
    }

    #[test]
    fn the_default_installation_has_the_plain_name() {
        assert_eq!(Paths::of(Path::new(DEFAULT_ROOT)).unwrap().run, Path::new("/run/qvd"));
    }
}
