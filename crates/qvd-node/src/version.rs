//! Desktops that become the next version of an image.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use qvd_core::{DesktopId, UidRange};
use qvd_storage::{
    KeptRoot, RootId,
    repository::{CommitId, NewVersion, Version},
};

use crate::{
    HostError, HostErrorKind,
    desktop::{Desktop, Parts, failed, storage},
};

fn cannot(id: DesktopId) -> String {
    format!("cannot make a version of desktop {id}")
}

impl Parts {
    /// The root of a desktop as it is now, and the range of its owners.
    pub(crate) fn root_of(desktop: &Desktop) -> Result<(OwnedFd, UidRange), HostError> {
        desktop.machine.root().map_err(failed(HostErrorKind::Unsupported, &cannot(desktop.id())))
    }

    /// Makes a version of what a desktop's root holds; it stands still meanwhile.
    pub(crate) fn commit(
        &self,
        desktop: &Desktop,
        root: BorrowedFd<'_>,
        ids: UidRange,
        new: &NewVersion,
    ) -> Result<Version, HostError> {
        let base = CommitId::new(desktop.spec.image);
        self.store.repository().capture(base, root, Some(ids), new).map_err(storage(cannot(desktop.id())))
    }

    /// Makes a version of the root that a desktop which does not run has kept.
    pub(crate) fn commit_stopped(&self, id: DesktopId, new: &NewVersion) -> Result<Version, HostError> {
        let what = format!("cannot make a version of desktop {id}");
        let kept = self.store.kept_root(&RootId::from(id)).map_err(storage(&what))?;
        let Some(KeptRoot { commit: base, mut root }) = kept else {
            let why = format!("desktop {id} does not run, and no root of it is kept");
            return Err(HostError::new(HostErrorKind::NotRunning, why));
        };
        // On disk ids are those of inside.
        let mount = root.mount(None).map_err(storage(&what))?;
        let made = self.store.repository().capture(base, mount.as_fd(), None, new);
        drop(mount);
        let closed = root.close();
        let made = made.map_err(storage(&what))?;
        closed.map_err(storage(&what))?;
        Ok(made)
    }
}
