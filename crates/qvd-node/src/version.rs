//! Desktops that become the next version of an image.

use std::{
    io::{self, Read, Write},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use qvd_core::{DesktopId, Digest, UidRange};
use qvd_guest::{ExecRequest, STILL_MAX};
use qvd_storage::{
    KeptRoot, RootId,
    repository::{CommitId, NewVersion, TELL, Version, archive::IMPORT_MAX_BYTES},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use crate::{
    ExecStdio, HostError, HostErrorKind,
    desktop::{Desktop, Parts, failed, storage},
    guest::Guest,
    rest::Awake,
};

/// How long a machine may say nothing while it tells what is in it: it looks
/// through a whole system, perhaps by emulation.
const SILENCE: Duration = Duration::from_secs(120);
/// How long its programs may take to go on then.
const ENDED: Duration = Duration::from_secs(60);

fn cannot(id: DesktopId) -> String {
    format!("cannot make a version of desktop {id}")
}

impl Parts {
    /// The root of a desktop as it is now, and the range of its owners; none if only
    /// its machine can read it.
    pub(crate) fn root_of(desktop: &Desktop) -> Result<Option<(OwnedFd, UidRange)>, HostError> {
        desktop.machine.root().map_err(failed(HostErrorKind::Failed, &cannot(desktop.id())))
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

    /// Makes a version of what a machine on the commit `base` tells of its root. Its
    /// file system is read by nobody but itself: the host's kernel is not to meet what
    /// it has made of it.
    pub(crate) fn commit_told(
        &self,
        (id, base): (DesktopId, Digest),
        guest: &Guest,
        awake: Awake,
        new: &NewVersion,
    ) -> Result<Version, HostError> {
        let what = cannot(id);
        let argv = ["/bin/sh", "-c", TELL].map(str::to_owned).to_vec();
        let request = ExecRequest { argv, env: Default::default(), root: true, tty: None };
        let session = guest.exec_still(request).map_err(|error| error.into_host_error(what.clone()))?;
        // While this is there, the desktop does not come to rest.
        let mut control = session.control;
        control.keep_awake(awake);
        let ExecStdio::Pipes { stdin, stdout, .. } = session.stdio else {
            return Err(HostError::new(HostErrorKind::Failed, format!("{what}: it gave no pipes")));
        };
        let until = Instant::now() + STILL_MAX;
        let (mut told, ask) = (Patient { pipe: stdout, until }, Patient { pipe: stdin, until });
        let repository = self.store.repository();
        let made = repository.capture_told(CommitId::new(base), &mut told, ask, IMPORT_MAX_BYTES, new);
        let made = made.map_err(storage(&what))?;
        // Everybody goes on when it has ended, which it does now that nobody listens.
        drop(told);
        control
            .wait(ENDED)
            .map_err(failed(HostErrorKind::Failed, &format!("{what}, which is made: it does not go on")))?;
        Ok(made)
    }

    /// Makes a version of the root that a desktop which does not run has kept.
    pub(crate) fn commit_stopped(&self, id: DesktopId, new: &NewVersion) -> Result<Version, HostError> {
        let what = format!("cannot make a version of desktop {id}");
        let kept = self.store.kept_root(&RootId::from(id)).map_err(storage(&what))?;
        let Some(KeptRoot { commit: base, mut root }) = kept else {
            let why = format!("desktop {id} does not run, and no root of it is kept that the host can read");
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

/// A pipe to somebody who may not keep us waiting for ever.
struct Patient {
    pipe: OwnedFd,
    until: Instant,
}

impl Patient {
    fn wait(&self, flags: PollFlags) -> io::Result<()> {
        loop {
            let left = self.until.saturating_duration_since(Instant::now()).min(SILENCE);
            let limit = Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: 0 };
            match poll(&mut [PollFd::new(&self.pipe, flags)], Some(&limit)) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "the machine does not go on")),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.wait(PollFlags::IN)?;
        Ok(rustix::io::read(&self.pipe, buffer)?)
    }
}

impl Write for Patient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // So much does not wait where there is room. Source: POSIX.1-2024, `write`; Linux `pipe(7)`.
        const PIPE_BUF: usize = 4096;
        self.wait(PollFlags::OUT)?;
        Ok(rustix::io::write(&self.pipe, bytes.get(..PIPE_BUF).unwrap_or(bytes))?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
