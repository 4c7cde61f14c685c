//! The host itself: which desktops there are, and who may touch each when.

mod memory;
mod slot;
mod stock;

use std::{
    collections::HashMap,
    os::fd::AsFd as _,
    path::Path,
    sync::{Arc, Mutex, Weak},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use qvd_core::{DesktopId, DesktopSpec, DesktopState, Digest, DisplayKind, FlavourName, StartStep, Tag, Virtualizer};
use qvd_guest::{ExecRequest, Stats};
use qvd_net::PortView;
use qvd_storage::{
    BuildOptions, Repository,
    repository::{NewVersion, Version},
};

use self::slot::{Face, Slot, State, lock};
use crate::{
    Attachment, DesktopStatus, EndReason, ExecSession, Host, HostError, HostErrorKind, ImageSummary, MemoryReport,
    NodeConfig, Timings,
    desktop::{Desktop, Parts, micros, virt},
    gate::Gate,
    governor::Governor,
    guest::Guest,
    rest::{Due, Rest},
    start::attach_limit,
    supervisor::{Supervisor, Watcher},
};

/// How many desktops each processor takes apart at once: most of that is the
/// kernel freeing memory, and some is waiting.
const CLOSED_AT_ONCE: usize = 32;

/// A host that runs desktops here, in this kernel.
///
/// Dropping it leaves the desktops running; the next node opened on the same
/// directories adopts them. [`Node::shut_down`] ends them.
#[derive(Debug)]
pub struct Node {
    inner: Arc<Inner>,
    supervisor: Supervisor,
    rounds: Option<JoinHandle<()>>,
    stock: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Inner {
    parts: Parts,
    config: NodeConfig,
    slots: Mutex<HashMap<DesktopId, Arc<Slot>>>,
    /// Where desktops go through that are taken apart.
    exit: Gate,
    /// Who gets how much memory.
    governor: Arc<Governor>,
    /// Held by whoever makes or ends machines that stand ready.
    stock: Mutex<()>,
}

impl Node {
    /// Opens the host: adopts the desktops that an earlier node left running
    /// and removes what nobody owns.
    ///
    /// # Errors
    /// Another node has the directories, the host lacks something that every
    /// desktop needs, or something left behind cannot be removed.
    pub fn open(config: NodeConfig) -> Result<Arc<Self>, HostError> {
        let (parts, adopted) = Parts::open(&config)?;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let exit = Gate::new(processors * CLOSED_AT_ONCE);
        let governor = Arc::new(Governor::open(&config.memory, &config.run));
        let inner = Arc::new(Inner { parts, config, slots: Mutex::default(), exit, governor, stock: Mutex::default() });
        let supervisor = Supervisor::start(Arc::downgrade(&inner))
            .map_err(|e| HostError::because(HostErrorKind::Failed, "cannot start the supervisor", e))?;
        let rounds = memory::govern(&inner)
            .map_err(|e| HostError::because(HostErrorKind::Failed, "cannot start the memory governor", e))?;
        let stock = stock::keep(&inner)
            .map_err(|e| HostError::because(HostErrorKind::Failed, "cannot keep machines ready", e))?;
        let node = Arc::new(Self { inner, supervisor, rounds: Some(rounds), stock: Some(stock) });
        for desktop in adopted {
            let slot = node.inner.slot(desktop.id());
            let mut face = lock(&slot.face);
            face.state = State::Running;
            face.guest = Some(desktop.guest().clone());
            face.image = Some(desktop.spec.image);
            face.attach_limit = attach_limit(node.inner.config.attach_limit, &desktop.spec);
            drop(face);
            let shares = desktop.spec.virtualizer == Virtualizer::Container && desktop.machine.is_mergeable();
            node.inner.governor.found(desktop.id(), &desktop.spec.tenant, shares);
            *lock(&slot.rest) = desktop.rest(node.inner.config.rest_after);
            node.watch(&desktop)?;
            *lock(&slot.live) = Some(desktop);
        }
        Ok(node)
    }

    /// Ends every desktop and removes the bridge and its rules: afterwards
    /// nothing of this node is in the kernel.
    ///
    /// # Errors
    /// Something could not be removed; the rest was.
    pub fn shut_down(&self, grace: Duration) -> Result<(), HostError> {
        let ids: Vec<_> = lock(&self.inner.slots).keys().copied().collect();
        let results: Vec<_> = std::thread::scope(|scope| {
            let stops: Vec<_> = ids.iter().map(|&id| scope.spawn(move || self.stop(id, grace))).collect();
            stops.into_iter().map(|stop| stop.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        let stock = self.inner.close_stock();
        let network = self.inner.parts.networks.close();
        self.inner.governor.stop();
        let memory = self.inner.governor.close();
        let memory = memory.map_err(virt("cannot leave the merging of equal pages as it was found"));
        results.into_iter().chain([stock, network, memory]).collect()
    }

    /// Whether no desktop runs here and nothing is left of one.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        lock(&self.inner.slots).values().all(|slot| lock(&slot.face).state == State::Stopped)
    }

    fn watch(&self, desktop: &Desktop) -> Result<(), HostError> {
        self.supervisor
            .watch(desktop.id(), desktop.pidfd())
            .map_err(|e| HostError::because(HostErrorKind::Failed, format!("cannot watch desktop {}", desktop.id()), e))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.inner.governor.stop();
        if let Err(error) = self.inner.close_stock() {
            tracing::warn!(error = &error as &dyn std::error::Error, "machines that stood ready are left");
        }
        for (thread, what) in [(self.rounds.take(), "the memory governor"), (self.stock.take(), "the stock's keeper")] {
            // The thread may hold the last reference to what this drops.
            if let Some(thread) = thread.filter(|thread| thread.thread().id() != thread::current().id())
                && thread.join().is_err()
            {
                tracing::error!("{what} panicked");
            }
        }
    }
}

impl Drop for Inner {
    /// Leaves every desktop running, for the next node to adopt.
    fn drop(&mut self) {
        for slot in lock(&self.slots).values() {
            if let Some(desktop) = lock(&slot.live).take() {
                desktop.leave();
            }
        }
    }
}

impl Inner {
    fn slot(&self, id: DesktopId) -> Arc<Slot> {
        Arc::clone(lock(&self.slots).entry(id).or_default())
    }

    /// Ends what is left of a desktop and says so on its face.
    fn close(&self, slot: &Slot, live: &mut Option<Desktop>) -> Result<(), HostError> {
        let Some(desktop) = live else { return Ok(()) };
        {
            let mut face = lock(&slot.face);
            face.guest = None;
            if let Some(end) = face.attachment.take() {
                end.end(EndReason::Stopped);
            }
        }
        let id = desktop.id();
        let result = self.exit.through(|| self.parts.close(desktop));
        if result.is_ok() {
            self.governor.forget(id);
        }
        *lock(&slot.rest) = Rest::default();
        let mut face = lock(&slot.face);
        match result {
            Ok(ended) => {
                *live = None;
                face.state = State::Stopped;
                tracing::info!(desktop = %id, ended, "desktop stopped");
                face.ended = Some(ended);
                Ok(())
            }
            Err(error) => {
                face.state = State::Zombie;
                Err(HostError::because(HostErrorKind::Failed, format!("cannot remove all of desktop {id}"), error))
            }
        }
    }

    /// Lets a desktop stand still if it is time; true if it does from now on.
    fn settle(&self, slot: &Slot, desktop: &Desktop, attached: bool) -> bool {
        let mut rest = lock(&slot.rest);
        rest.tick(attached, || desktop.cpu_time()) == Due::Look
            && rest.settle(desktop.cpu_time(), || desktop.has_streams(), || desktop.uses_sound())
    }

    fn guest(&self, id: DesktopId) -> Result<Guest, HostError> {
        let slot = lock(&self.slots).get(&id).cloned();
        slot.and_then(|slot| lock(&slot.face).guest.clone())
            .ok_or_else(|| HostError::new(HostErrorKind::NotRunning, format!("desktop {id} does not run")))
    }
}

impl Watcher for Weak<Inner> {
    fn ended(&self, id: DesktopId) {
        let Some(inner) = self.upgrade() else { return };
        let slot = inner.slot(id);
        // Whoever holds the lock is starting or stopping this very desktop and
        // finds out by itself.
        if let Ok(mut live) = slot.live.try_lock()
            && let Err(error) = inner.close(&slot, &mut live)
        {
            tracing::warn!(desktop = %id, error = &error as &dyn std::error::Error, "desktop ended");
        };
    }

    fn tick(&self) {
        let Some(inner) = self.upgrade() else { return };
        let slots: Vec<_> = lock(&inner.slots).values().cloned().collect();
        for slot in slots {
            let Ok(mut live) = slot.live.try_lock() else { continue };
            let (state, attached) = {
                let face = lock(&slot.face);
                (face.state, face.is_attached())
            };
            if state == State::Running
                && let Some(desktop) = live.as_mut()
            {
                // What stands still forks nothing: of thousands at rest, none is asked.
                if !lock(&slot.rest).is_resting() {
                    let lacks_room = desktop.lacks_room();
                    lock(&slot.face).lacks_room = lacks_room;
                    if lacks_room {
                        continue;
                    }
                    desktop.end_bomb();
                    desktop.end_cut_off();
                }
                if inner.settle(&slot, desktop, attached) {
                    // Without the lock: whoever comes back meanwhile is served at once.
                    desktop.page_out();
                    // With it: this is short, and only for what stands still.
                    lock(&slot.rest).if_still(|| desktop.reclaim_all());
                }
            }
            if state == State::Zombie
                && let Err(error) = inner.close(&slot, &mut live)
            {
                tracing::debug!(error = &error as &dyn std::error::Error, "will try again");
            }
        }
    }
}

impl Host for Node {
    fn ensure_running(&self, spec: &DesktopSpec, progress: &mut dyn FnMut(StartStep)) -> Result<Timings, HostError> {
        let began = Instant::now();
        let slot = self.inner.slot(spec.id);
        let mut live = lock(&slot.live);
        if let Some(desktop) = live.as_mut() {
            if desktop.is_alive() {
                return Ok(lock(&slot.face).timings.unwrap_or_default());
            }
            self.inner.close(&slot, &mut live)?;
        }
        let mut step = |step: StartStep| {
            lock(&slot.face).state = State::Starting(step);
            progress(step);
        };
        step(StartStep::Root);
        let admitted = self.inner.admit(spec);
        let started = admitted
            .and_then(|()| self.inner.parts.start(spec, (began, self.inner.shares(spec)), &mut step))
            .and_then(|(desktop, timings)| {
                step(StartStep::Session);
                let desktop = live.insert(desktop);
                self.watch(desktop)?;
                let waited = desktop.guest().wait_session(self.inner.parts.session_limit(spec));
                waited.map_err(|e| e.into_host_error(format!("the session of desktop {} did not start", spec.id)))?;
                *lock(&slot.rest) = desktop.rest(self.inner.config.rest_after);
                let guest = desktop.guest().clone();
                Ok((guest, Timings { session_us: micros(began), ..timings }))
            });
        match started {
            Ok((guest, timings)) => {
                let mut face = lock(&slot.face);
                *face = Face {
                    state: State::Running,
                    timings: Some(timings),
                    guest: Some(guest),
                    attach_limit: attach_limit(self.inner.config.attach_limit, spec),
                    image: Some(spec.image),
                    ..Face::default()
                };
                tracing::info!(desktop = %spec.id, session_us = timings.session_us, "desktop runs");
                Ok(timings)
            }
            Err(error) => {
                lock(&slot.face).state = State::Stopped;
                match self.inner.close(&slot, &mut live) {
                    Ok(()) => self.inner.governor.forget(spec.id),
                    Err(left) => {
                        tracing::warn!(desktop = %spec.id, error = &left as &dyn std::error::Error, "parts are left");
                    }
                }
                lock(&slot.face).ended = Some(qvd_core::causes(&error).join(": "));
                Err(error)
            }
        }
    }

    fn stop(&self, id: DesktopId, grace: Duration) -> Result<(), HostError> {
        let slot = self.inner.slot(id);
        let mut live = lock(&slot.live);
        // It was asked to end: that alone is nothing to report.
        let mut ended = None;
        if let Some(desktop) = live.as_mut() {
            {
                let mut face = lock(&slot.face);
                face.state = State::Stopping;
                // The display ends with the session, before all is closed: whoever
                // looks at it has to know why, or would come back and start it again.
                if let Some(end) = face.attachment.take() {
                    end.end(EndReason::Stopped);
                }
            }
            // Who is not asked need not hear it: its pages stay where they are.
            if !grace.is_zero() {
                let awake = slot.wake(id)?;
                ended = desktop.ask_to_end(grace);
                drop(awake);
            }
        }
        self.inner.close(&slot, &mut live)?;
        lock(&slot.face).ended = ended;
        Ok(())
    }

    fn remove(&self, id: DesktopId) -> Result<(), HostError> {
        self.stop(id, Duration::ZERO)?;
        let slot = self.inner.slot(id);
        let live = lock(&slot.live);
        if live.is_some() {
            return Err(HostError::new(HostErrorKind::Busy, format!("desktop {id} was started again")));
        }
        self.inner.parts.forget(id)?;
        drop(live);
        lock(&self.inner.slots).remove(&id);
        Ok(())
    }

    fn status(&self, id: DesktopId) -> DesktopStatus {
        let slot = lock(&self.inner.slots).get(&id).cloned().unwrap_or_default();
        let resting = lock(&slot.rest).is_resting();
        let face = lock(&slot.face);
        let (state, step) = match face.state {
            State::Stopped => (DesktopState::Stopped, None),
            State::Starting(step) => (DesktopState::Starting, Some(step)),
            State::Running => (DesktopState::Running, None),
            State::Stopping => (DesktopState::Stopping, None),
            State::Zombie => (DesktopState::Zombie, None),
        };
        DesktopStatus {
            state,
            step,
            timings: face.timings,
            attached: face.is_attached(),
            resting,
            ended: face.ended.clone(),
            image: face.image.filter(|_| state == DesktopState::Running),
            lacks_room: face.lacks_room && state == DesktopState::Running,
        }
    }

    fn attach(
        &self,
        id: DesktopId,
        kind: DisplayKind,
        progress: &mut dyn FnMut(String),
    ) -> Result<Attachment, HostError> {
        let guest = self.inner.guest(id)?;
        let slot = self.inner.slot(id);
        let limit = {
            let mut face = lock(&slot.face);
            if let Some(end) = face.attachment.take() {
                end.end(EndReason::TakenOver);
            }
            face.attach_limit
        };
        // Until the attachment itself says that somebody is there.
        let _awake = slot.wake(id)?;
        let what = || format!("cannot open the display of desktop {id}");
        let stream = guest.attach(kind, limit, progress).map_err(|e| e.into_host_error(what()))?;
        let (attachment, end) =
            Attachment::new(stream).map_err(|e| HostError::because(HostErrorKind::Failed, what(), e))?;
        let mut face = lock(&slot.face);
        if face.guest.is_none() {
            return Err(HostError::new(HostErrorKind::NotRunning, format!("desktop {id} was stopped")));
        }
        // Two clients may have asked at once: the later answer has the display.
        if let Some(other) = face.attachment.replace(end) {
            other.end(EndReason::TakenOver);
        }
        drop(face);
        Ok(attachment)
    }

    fn exec(&self, id: DesktopId, request: ExecRequest) -> Result<ExecSession, HostError> {
        let guest = self.inner.guest(id)?;
        let awake = self.inner.slot(id).wake(id)?;
        let started = guest.exec(request);
        let mut session = started.map_err(|e| e.into_host_error(format!("cannot run a program in desktop {id}")))?;
        session.control.keep_awake(awake);
        Ok(session)
    }

    fn stats(&self, id: DesktopId) -> Result<Stats, HostError> {
        let guest = self.inner.guest(id)?;
        let what = || format!("cannot measure desktop {id}");
        let slot = self.inner.slot(id);
        // Asking is no reason to stay awake.
        let stats = lock(&slot.rest).briefly(|| guest.stats());
        let stats = stats.map_err(|e| HostError::because(HostErrorKind::Failed, what(), e))?;
        stats.map_err(|e| e.into_host_error(what()))
    }

    fn memory(&self) -> Result<MemoryReport, HostError> {
        self.inner.governor.go_round(&*self.inner);
        let none = || HostError::new(HostErrorKind::Unsupported, "cannot tell of memory: this host does not say");
        self.inner.governor.report().ok_or_else(none)
    }

    fn network(&self, id: DesktopId, frames: &[Vec<u8>]) -> Result<Option<PortView>, HostError> {
        let slot = self.inner.slot(id);
        let not_running = || HostError::new(HostErrorKind::NotRunning, format!("desktop {id} does not run"));
        let live = slot.live(id)?;
        Parts::port_view(live.as_ref().ok_or_else(not_running)?, frames)
    }

    fn commit(&self, id: DesktopId, new: &NewVersion) -> Result<Version, HostError> {
        let slot = self.inner.slot(id);
        // While it is held, nobody starts it.
        let live = slot.live(id)?;
        let Some(desktop) = live.as_ref() else { return self.inner.parts.commit_stopped(id, new) };
        let Some((root, ids)) = Parts::root_of(desktop)? else {
            let base = desktop.spec.image;
            // Telling takes long: whoever looks at the desktop, or stops it, does not wait.
            drop(live);
            let (guest, awake) = (self.inner.guest(id)?, slot.wake(id)?);
            return self.inner.parts.commit_told((id, base), &guest, awake, new);
        };
        let made = lock(&slot.rest).still(|| self.inner.parts.commit(desktop, root.as_fd(), ids, new));
        made.map_err(|e| HostError::because(HostErrorKind::Failed, format!("cannot hold desktop {id}"), e))?
    }

    fn build_image(
        &self,
        recipe: &Path,
        options: &BuildOptions,
        progress: &mut dyn FnMut(&str),
    ) -> Result<ImageSummary, HostError> {
        self.inner.parts.build_image(recipe, options, progress)
    }

    fn images(&self) -> Result<Vec<ImageSummary>, HostError> {
        self.inner.parts.images()
    }

    fn follow(&self, flavour: &FlavourName, tag: &Tag, desktop: Option<DesktopId>) -> Result<Digest, HostError> {
        self.inner.parts.follow(flavour, tag, desktop)
    }

    fn repository(&self) -> Option<Arc<Repository>> {
        Some(self.inner.parts.repository())
    }
}
