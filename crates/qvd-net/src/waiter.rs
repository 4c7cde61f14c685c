//! Threads that wait for something to do until they are told to end.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    thread::JoinHandle,
    time::Instant,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::Errno,
};

use crate::Error;

/// A thread that runs until it is closed. Dropping it ends it as well.
#[derive(Debug)]
pub(crate) struct Waiter {
    end: End,
    thread: Option<JoinHandle<()>>,
    /// For errors: `the watch over the rules`.
    what: &'static str,
}

/// What tells a thread that it is time to end.
#[derive(Debug, Clone)]
pub(crate) struct End(Arc<OwnedFd>);

impl End {
    /// Waits until one of `sockets` has something, until a time, or for the end.
    /// Says whether to go on.
    pub(crate) fn wait(&self, sockets: &[BorrowedFd<'_>], until: Option<Instant>) -> io::Result<bool> {
        let left = until.map(|until| Timespec::try_from(until.saturating_duration_since(Instant::now())));
        let left = left.transpose().map_err(io::Error::other)?;
        let mut watched = vec![PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN)];
        watched.extend(sockets.iter().map(|&socket| PollFd::from_borrowed_fd(socket, PollFlags::IN)));
        match poll(&mut watched, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(!watched.first().is_some_and(|end| end.revents().contains(PollFlags::IN)))
    }
}

impl Waiter {
    /// Starts a thread of this name, which sees to `what` of a network.
    pub(crate) fn start(
        name: &str,
        what: &'static str,
        network: &str,
        run: impl FnOnce(&End) + Send + 'static,
    ) -> Result<Self, Error> {
        let end = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(io::Error::from);
        let end = End(Arc::new(end.map_err(Error::io("make an event for", network))?));
        let told = end.clone();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || run(&told));
        let thread = thread.map_err(Error::io("start a thread for", network))?;
        Ok(Self { end, thread: Some(thread), what })
    }

    /// Ends the thread and waits for that. Done already is done.
    ///
    /// # Errors
    /// It could not be told; it still runs, and closing may be tried again.
    pub(crate) fn close(&mut self) -> Result<(), Error> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        match rustix::io::retry_on_intr(|| rustix::io::write(&*self.end.0, &1_u64.to_ne_bytes())) {
            // Full: told before.
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(errno) => {
                self.thread = Some(thread);
                return Err(Error::io("end", self.what)(errno.into()));
            }
        }
        if thread.join().is_err() {
            tracing::error!("the thread of {} had panicked", self.what);
        }
        Ok(())
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(%error, "{} is left behind", self.what);
        }
    }
}
