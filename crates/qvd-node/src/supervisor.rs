//! One thread that learns of every desktop's end by its pidfd.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use qvd_core::DesktopId;
use rustix::{
    event::{EventfdFlags, Timespec, epoll, eventfd},
    io::Errno,
};

/// Tag of the descriptor that ends the thread; no desktop has number 0.
const QUIT: u64 = 0;

/// How often things are tried again that could not be removed.
const RETRY: Duration = Duration::from_secs(2);

/// What the supervisor tells.
pub(crate) trait Watcher: Send + Sync + 'static {
    /// The first process of `id` has ended.
    fn ended(&self, id: DesktopId);
    /// A retry interval has passed.
    fn tick(&self);
}

/// The thread, and what it watches.
#[derive(Debug)]
pub(crate) struct Supervisor {
    epoll: Arc<OwnedFd>,
    quit: OwnedFd,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Supervisor {
    pub(crate) fn start(watcher: impl Watcher) -> io::Result<Self> {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let quit = eventfd(0, EventfdFlags::CLOEXEC)?;
        epoll::add(&epoll, &quit, epoll::EventData::new_u64(QUIT), epoll::EventFlags::IN)?;
        let theirs = Arc::clone(&epoll);
        let thread =
            std::thread::Builder::new().name("qvd-supervisor".to_owned()).spawn(move || run(&theirs, &watcher))?;
        Ok(Self { epoll, quit, thread: Some(thread) })
    }

    /// Watches the first process of a desktop. One-shot: after its end was
    /// told, nothing more is.
    pub(crate) fn watch(&self, id: DesktopId, pidfd: impl AsFd) -> io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ONESHOT;
        Ok(epoll::add(&self.epoll, pidfd, epoll::EventData::new_u64(u64::from(id.number())), flags)?)
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        if let Err(error) = rustix::io::write(&self.quit, &1u64.to_ne_bytes()) {
            tracing::warn!(%error, "the supervisor does not hear that it should end");
            return;
        }
        // The watcher may hold the last reference to its owner, and so this
        // very drop may run on the thread that would be waited for.
        if let Some(thread) = self.thread.take().filter(|t| t.thread().id() != std::thread::current().id())
            && thread.join().is_err()
        {
            tracing::error!("the supervisor panicked");
        }
    }
}

fn run(epoll: &OwnedFd, watcher: &impl Watcher) {
    let timeout = Timespec { tv_sec: RETRY.as_secs().cast_signed(), tv_nsec: 0 };
    let mut events = Vec::with_capacity(64);
    loop {
        events.clear();
        match epoll::wait(epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "cannot wait for the ends of desktops");
                return;
            }
        }
        for event in &events {
            let number = event.data.u64();
            if number == QUIT {
                return;
            }
            if let Ok(id) = u32::try_from(number).map_err(|_| ()).and_then(|n| DesktopId::new(n).map_err(|_| ())) {
                watcher.ended(id);
            }
        }
        watcher.tick();
    }
}
