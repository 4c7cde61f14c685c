//! A root as a stream, for another host.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    process::Stdio,
    time::Duration,
};

use qvd_sys::btrfs;

use super::Btrfs;
use crate::{BaseTree, Error, Quota, RootId, backend::record::Record, fsio, program::Program};

const BTRFS: Program = Program { name: "btrfs", package: "btrfs-progs" };

impl Btrfs {
    /// Writes a kept root as it is now, all its files included, to `out` as a
    /// stream that [`Btrfs::receive`] and `btrfs receive` take. It may be in use.
    ///
    /// # Errors
    /// [`Error::NoSuchRoot`]; `out` cannot be written to.
    pub fn send(&self, id: &RootId, out: BorrowedFd<'_>) -> Result<(), Error> {
        self.kept(id)?;
        let (volumes, dir) = (&self.volumes, self.volumes.dir(id));
        let scratch = volumes.place.dir().join(format!(".send-{id}"));
        let sent = || {
            volumes.delete(&scratch)?;
            let own = fsio::open_dir(&dir).map_err(Error::io("send root", &dir))?;
            volumes.copy(own.as_fd(), &scratch, true)?;
            let still = fsio::open_dir(&scratch).map_err(Error::io("send root", &dir))?;
            btrfs::send(still.as_fd(), out).map_err(Error::io("send root", &dir))
        };
        let sent = sent();
        let removed = volumes.delete(&scratch);
        sent.and(removed)
    }

    /// Makes the kept root `id` of a stream that [`Btrfs::send`] wrote, within
    /// `deadline`. The sender is trusted with what is in the root, as the
    /// builder of an image is; not with anything beside it.
    ///
    /// # Errors
    /// [`Error::RootExists`], [`Error::OtherBase`] when it stood on another
    /// image; [`Error::Program`] when it is not such a stream.
    pub fn receive(&self, base: &BaseTree, id: &RootId, stream: OwnedFd, deadline: Duration) -> Result<(), Error> {
        self.expect_absent(id)?;
        let volumes = &self.volumes;
        let scratch = volumes.place.dir().join(format!(".receive-{id}"));
        let received = || {
            self.empty(&scratch)?;
            fsio::ensure_private_dir(&scratch).map_err(Error::io("receive root", &scratch))?;
            // Confined to the directory, one error is enough.
            let args =
                [Path::new("receive"), Path::new("-C"), Path::new("-e"), Path::new("-E"), Path::new("1"), &scratch];
            BTRFS.run("receive root", args, Stdio::from(File::from(stream)), deadline)?;
            let found = list(&scratch).map_err(Error::io("receive root", &scratch))?;
            let [found] = found.as_slice() else {
                let source = io::Error::new(io::ErrorKind::InvalidData, "the stream holds no single root");
                return Err(Error::Io { op: "receive root", path: scratch.clone(), source });
            };
            let record = Record::read(found)?.ok_or_else(|| Error::NoSuchRoot(id.clone()))?;
            record.expect_base(id, base)?;
            let own = fsio::open_dir(found).map_err(Error::io("receive root", found))?;
            volumes.make(own.as_fd(), id, Some(&Record { quota: Quota::default(), ..record }))
        };
        let received = received();
        let removed = self.empty(&scratch);
        received.and(removed)
    }

    /// Removes a directory of subvolumes.
    fn empty(&self, dir: &Path) -> Result<(), Error> {
        let found = match list(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            found => found.map_err(Error::io("read", dir))?,
        };
        for path in found {
            self.volumes.delete(&path)?;
        }
        self.volumes.place.discard(dir)
    }
}

fn list(dir: &Path) -> io::Result<Vec<std::path::PathBuf>> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect()
}
