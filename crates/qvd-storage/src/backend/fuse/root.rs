//! One root, served or not.

use std::{
    os::fd::{BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
};

use qvd_core::RootPolicy;
use rustix::{
    fs::{AtFlags, CWD, Mode, chmodat, mkdirat},
    io::Errno,
};

use super::{FILES, Layers, UPPER, WORK, server::Servers, start, union::Union};
use crate::{
    Error,
    backend::{BaseTree, Place, Root, RootId},
};

#[derive(Debug)]
pub(super) struct Served {
    pub(super) id: RootId,
    pub(super) dir: PathBuf,
    pub(super) base: BaseTree,
    pub(super) policy: RootPolicy,
    pub(super) union: Union,
    pub(super) place: Place,
    pub(super) servers: Arc<Servers>,
    pub(super) closed: bool,
}

impl Served {
    fn prepare(&self) -> Result<(), Error> {
        let files = self.dir.join(FILES);
        // The upper's mode is that of `/` inside; the umask must not show there.
        for (path, mode) in [(files.clone(), 0o755), (files.join(UPPER), 0o755), (files.join(WORK), 0o700)] {
            let mode = Mode::from_raw_mode(mode);
            match mkdirat(CWD, &path, mode) {
                Ok(()) => chmodat(CWD, &path, mode, AtFlags::empty()).map_err(Error::io("make root", &self.dir))?,
                Err(Errno::EXIST) => {}
                Err(error) => return Err(Error::io("make root", &self.dir)(error)),
            }
        }
        Ok(())
    }
}

impl Root for Served {
    fn id(&self) -> &RootId {
        &self.id
    }

    fn mount(&self, idmap: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
        self.servers.expect_unused(&self.id, &self.dir)?;
        let volatile = self.policy == RootPolicy::Volatile;
        if volatile {
            self.place.discard(&self.dir.join(FILES))?;
        }
        self.prepare()?;
        let layers = Layers::open(&self.base, &self.dir, idmap)?;
        let (server, mount) = start::start(self.union, &self.id, &self.dir, layers, volatile)?;
        self.servers.watch(&self.id, server)?;
        Ok(mount)
    }

    fn check(&self) -> Result<(), Error> {
        self.servers.check(&self.id, &self.dir)
    }

    fn close(&mut self) -> Result<(), Error> {
        if self.closed {
            return Ok(());
        }
        self.servers.expect_unused(&self.id, &self.dir)?;
        if self.policy == RootPolicy::Volatile {
            self.place.discard(&self.dir)?;
        }
        self.closed = true;
        Ok(())
    }
}
