//! Names of a machine's sockets.

use std::{
    fs::{self, Permissions},
    io,
    os::unix::{fs::PermissionsExt as _, net::UnixListener},
    path::{Path, PathBuf},
};

use crate::{Error, error::io_error};

/// How far the names have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// They are others until the machine runs: a start that fails because one
    /// runs already takes nothing away from that.
    New,
    /// They are there.
    Named,
    /// They are somebody else's from here on, or gone.
    Over,
}

/// The sockets that a machine is driven and talked with by. Dropping it removes
/// their names.
#[derive(Debug)]
pub(crate) struct Sockets {
    dir: PathBuf,
    control: PathBuf,
    link: PathBuf,
    stage: Stage,
}

impl Sockets {
    /// Those of a machine that is to be started.
    pub(crate) fn new(dir: &Path) -> Self {
        Self::at(dir, Stage::New)
    }

    /// Those of a machine that runs.
    pub(crate) fn of_running(dir: &Path) -> Self {
        Self::at(dir, Stage::Named)
    }

    fn at(dir: &Path, stage: Stage) -> Self {
        Self { dir: dir.to_owned(), control: dir.join("qmp.sock"), link: dir.join("link.sock"), stage }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn control(&self) -> &Path {
        &self.control
    }

    pub(crate) fn link(&self) -> &Path {
        &self.link
    }

    /// Listens on both, under names that nobody knows yet.
    pub(crate) fn listen(&self) -> Result<[UnixListener; 2], Error> {
        Ok([listen(&fresh(&self.control))?, listen(&fresh(&self.link))?])
    }

    /// Gives them their names.
    pub(crate) fn publish(&mut self) -> Result<(), Error> {
        for path in [&self.control, &self.link] {
            fs::rename(fresh(path), path).map_err(io_error(format!("name `{}`", path.display())))?;
        }
        self.stage = Stage::Named;
        Ok(())
    }

    /// Moves their names into `dir`, of the same file system.
    pub(crate) fn move_to(&mut self, dir: &Path) -> Result<(), Error> {
        let moved = Self::at(dir, Stage::Named);
        for (from, to) in [(&self.control, &moved.control), (&self.link, &moved.link)] {
            fs::rename(from, to).map_err(io_error(format!("name `{}`", to.display())))?;
        }
        *self = moved;
        Ok(())
    }

    /// They are somebody else's from here on.
    pub(crate) const fn leave(&mut self) {
        self.stage = Stage::Over;
    }

    /// Removes the names. Those of absent ones are gone as well.
    pub(crate) fn close(&mut self) -> Result<(), Error> {
        for path in [&self.control, &self.link] {
            match self.stage {
                Stage::New => remove(&fresh(path))?,
                Stage::Named => remove(path)?,
                Stage::Over => {}
            }
        }
        self.stage = Stage::Over;
        Ok(())
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(%error, "socket left behind");
        }
    }
}

/// The name before it has its name: not longer than that.
fn fresh(path: &Path) -> PathBuf {
    path.with_extension("new")
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error(format!("remove `{}`", path.display()))(error))
        }
        _ => Ok(()),
    }
}

/// A socket that nobody else can connect to: its directory is root's.
fn listen(path: &Path) -> Result<UnixListener, Error> {
    remove(path)?;
    let listener = UnixListener::bind(path).map_err(io_error(format!("listen on `{}`", path.display())))?;
    fs::set_permissions(path, Permissions::from_mode(0o600))
        .map_err(io_error(format!("restrict `{}`", path.display())))?;
    Ok(listener)
}
