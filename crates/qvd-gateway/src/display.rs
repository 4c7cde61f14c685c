//! A client's hold on a display.

use std::{io, net::Shutdown};

use qvd_core::{DesktopId, DisplayKind};
use qvd_farm::{ErrorKind, Farm, FarmError, Progress};
use qvd_node::{Attachment, EndReason};
use tokio::{
    net::UnixStream,
    sync::{mpsc, oneshot},
};

/// Bytes copied at once in each direction. Measured: below 64 KiB a busy
/// relay spends its time in system calls, above it gains nothing.
pub(crate) const CHUNK: usize = 64 * 1024;

/// An open display. The node keeps a descriptor of the stream as well, so
/// dropping ours would not end it: this shuts it down.
#[derive(Debug)]
pub(crate) struct Display(Attachment);

impl Display {
    /// Starts the desktop if needed and opens its display. When the caller
    /// stops waiting, the display is closed as soon as it is there.
    pub(crate) async fn open(
        farm: &Farm,
        id: DesktopId,
        kind: DisplayKind,
        who: String,
        progress: mpsc::Sender<Progress>,
    ) -> Result<Self, FarmError> {
        let (farm, (tell, told)) = (farm.clone(), oneshot::channel());
        tokio::spawn(async move {
            let opened = farm.attach(id, kind, &who, progress).await.map(Self);
            if tell.send(opened).is_err() {
                tracing::info!(desktop = %id, who, "the client left before its display was there");
            }
        });
        told.await.unwrap_or_else(|lost| {
            Err(FarmError::new(ErrorKind::Failed, format!("cannot open the display of desktop {id}")).because(lost))
        })
    }

    /// The stream, for one task to read and write.
    pub(crate) fn stream(&self) -> io::Result<UnixStream> {
        let stream = self.0.stream().try_clone()?;
        stream.set_nonblocking(true)?;
        UnixStream::from_std(stream)
    }

    /// Why the stream ended; meaningful once a read returned nothing.
    pub(crate) fn end_reason(&self) -> EndReason {
        self.0.end_reason()
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Err(error) = self.0.stream().shutdown(Shutdown::Both) {
            tracing::trace!(%error, "the display was closed already");
        }
    }
}
