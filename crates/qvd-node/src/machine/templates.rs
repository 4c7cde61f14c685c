//! What machines are born from: one template for each kind of machine of each
//! tenant, made when the first of its kind starts, and clones of it that stand ready.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use qvd_core::{Bytes, DesktopSpec, Digest, FlavourName, Limits, MilliCpu, TenantName};
use qvd_virt::vm::{Template, Vm, VmState};

use super::Failure;
use crate::governor::StockReport;

/// How long a template is kept that nobody asks for, and clones of it stand ready.
const KEPT_FOR: Duration = Duration::from_secs(3600);

/// How long after a clone could not be made the next is tried.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// What has to be the same for machines of one template. What memory shares can
/// be told by its timing, so no two tenants have one in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Kind {
    pub(crate) tenant: TenantName,
    pub(crate) image: Digest,
    memory: Bytes,
    cpu: MilliCpu,
    io: Option<Bytes>,
}

impl Kind {
    /// The kind of a desktop's machine.
    pub(crate) fn of(spec: &DesktopSpec) -> Self {
        let Limits { memory, cpu, io, .. } = spec.limits;
        Self { tenant: spec.tenant.clone(), image: spec.image, memory, cpu, io }
    }

    /// What it may use. Its processes are counted by nobody: they are the guest's.
    pub(crate) fn limits(&self) -> Limits {
        Limits { memory: self.memory, cpu: self.cpu, io: self.io, ..Limits::default() }
    }
}

/// A clone that stands still as its template did: nobody's yet, without disk and
/// interface.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) vm: Vm,
    pub(crate) uid_slot: u32,
}

impl Ready {
    /// Whether QEMU is still there.
    fn is_alive(&mut self) -> bool {
        !matches!(self.vm.watch(Duration::ZERO), Ok(VmState::Down(_)) | Err(_))
    }
}

/// One kind's template and clones. The template is locked for as long as it takes to
/// make it, so that others wait; the clones for a moment.
#[derive(Debug)]
struct Place {
    flavour: FlavourName,
    /// How many are to stand ready.
    wanted: usize,
    template: Mutex<Option<Arc<Template>>>,
    stock: Mutex<Stock>,
}

#[derive(Debug)]
struct Stock {
    ready: VecDeque<Ready>,
    used: Instant,
    not_before: Option<Instant>,
    /// Whether desktops still follow this image.
    followed: bool,
}

impl Place {
    /// Its template, unless it is being made.
    fn template(&self) -> Option<Arc<Template>> {
        self.template.try_lock().ok()?.clone()
    }

    fn take_ready(&self) -> Vec<Ready> {
        lock(&self.stock).ready.drain(..).collect()
    }
}

/// The templates of a node, for as long as it lives: its clones have their memory
/// in any case.
#[derive(Debug, Default)]
pub(crate) struct Templates {
    places: Mutex<HashMap<Kind, Arc<Place>>>,
    /// One is made at a time: a boot takes all there is.
    making: Mutex<()>,
    wake: Mutex<Wake>,
    woken: Condvar,
}

#[derive(Debug, Default)]
struct Wake {
    news: bool,
    closed: bool,
}

impl Templates {
    /// The template of a kind, made by `make` if there is none; `wanted` clones of it
    /// are to stand ready from then on.
    pub(crate) fn of(
        &self,
        kind: &Kind,
        flavour: &FlavourName,
        wanted: usize,
        make: impl FnOnce() -> Result<Template, Failure>,
    ) -> Result<Arc<Template>, Failure> {
        let new = || {
            let stock = Stock { ready: VecDeque::new(), used: Instant::now(), not_before: None, followed: true };
            let (template, stock) = (Mutex::default(), Mutex::new(stock));
            Arc::new(Place { flavour: flavour.clone(), wanted, template, stock })
        };
        let place = Arc::clone(lock(&self.places).entry(kind.clone()).or_insert_with(new));
        lock(&place.stock).used = Instant::now();
        let mut template = lock(&place.template);
        if let Some(template) = template.as_ref() {
            return Ok(Arc::clone(template));
        }
        let alone = lock(&self.making);
        let made = Arc::clone(template.insert(Arc::new(make()?)));
        drop((template, alone));
        self.wake();
        Ok(made)
    }

    /// Forgets a template that does not fit any more. Clones of it run on, but those
    /// that stand ready.
    pub(crate) fn forget(&self, kind: &Kind, template: &Arc<Template>) {
        if let Some(place) = self.place(kind) {
            // Somebody may have made it anew.
            lock(&place.template).take_if(|there| Arc::ptr_eq(there, template));
        }
        self.wake();
    }

    /// The clone of a kind that has waited longest, if one stands ready; and those that
    /// ended meanwhile, for whoever cleans up.
    pub(crate) fn take(&self, kind: &Kind) -> (Option<Ready>, Vec<Ready>) {
        let Some(place) = self.place(kind) else { return (None, Vec::new()) };
        let (mut taken, mut dead) = (None, Vec::new());
        let mut stock = lock(&place.stock);
        stock.used = Instant::now();
        while taken.is_none()
            && let Some(mut ready) = stock.ready.pop_front()
        {
            if ready.is_alive() {
                taken = Some(ready);
            } else {
                dead.push(ready);
            }
        }
        drop(stock);
        self.wake();
        (taken, dead)
    }

    /// Every clone that stands ready.
    pub(crate) fn take_all(&self) -> Vec<Ready> {
        self.all().iter().flat_map(|(_, place)| place.take_ready()).collect()
    }

    /// A kind that is to have one more clone ready, and its template.
    pub(crate) fn lacking(&self) -> Option<(Kind, Arc<Template>)> {
        if lock(&self.wake).closed {
            return None;
        }
        self.all().into_iter().find_map(|(kind, place)| {
            let stock = lock(&place.stock);
            let due = stock.not_before.is_none_or(|at| Instant::now() >= at);
            let lacks = stock.followed && due && stock.ready.len() < place.wanted;
            Some((kind, place.template().filter(|_| lacks)?))
        })
    }

    /// Has one more stand ready; it comes back if none is wanted any more.
    pub(crate) fn add(&self, kind: &Kind, template: &Arc<Template>, ready: Ready) -> Option<Ready> {
        let Some(place) = self.place(kind) else { return Some(ready) };
        let closed = lock(&self.wake);
        if closed.closed || !place.template().is_some_and(|there| Arc::ptr_eq(&there, template)) {
            return Some(ready);
        }
        lock(&place.stock).ready.push_back(ready);
        None
    }

    /// Makes none of this kind for a while.
    pub(crate) fn retry_later(&self, kind: &Kind) {
        if let Some(place) = self.place(kind) {
            lock(&place.stock).not_before = Some(Instant::now() + RETRY_AFTER);
        }
    }

    /// What is not wanted any more: clones of templates that are gone, that nobody has
    /// asked for for a while, or of images that nobody follows. `follows` says whether
    /// desktops of a flavour follow an image.
    pub(crate) fn tidy(&self, follows: impl Fn(&FlavourName, Digest) -> bool) -> Vec<Ready> {
        let mut gone = Vec::new();
        for (kind, place) in self.all() {
            // One that is being made is wanted.
            let Ok(mut template) = place.template.try_lock() else { continue };
            let followed = place.wanted == 0 || follows(&place.flavour, kind.image);
            let mut stock = lock(&place.stock);
            stock.followed = followed;
            if stock.used.elapsed() >= KEPT_FOR {
                *template = None;
            }
            if template.is_none() || !stock.followed {
                gone.extend(stock.ready.drain(..));
            }
        }
        // What somebody else has in hand may be about to be made.
        lock(&self.places).retain(|_, place| {
            Arc::strong_count(place) > 1 || place.template().is_some() || !lock(&place.stock).ready.is_empty()
        });
        gone
    }

    /// What all of it takes.
    pub(crate) fn report(&self) -> StockReport {
        let mut report = StockReport::default();
        for (_, place) in self.all() {
            let used = |bytes: Result<Bytes, qvd_virt::Error>| bytes.map_or(0, Bytes::get);
            if let Some(template) = place.template() {
                report.templates += 1;
                report.templates_memory = Bytes::new(report.templates_memory.get() + used(template.memory_used()));
            }
            for ready in &lock(&place.stock).ready {
                report.ready += 1;
                let memory = used(ready.vm.container().memory());
                report.ready_memory = Bytes::new(report.ready_memory.get() + memory);
            }
        }
        report
    }

    /// Waits until there is something to do: at most so long where templates are kept, and
    /// until there is one where not. False at the end.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        let keeps = !lock(&self.places).is_empty();
        let (wake, idle) = (lock(&self.wake), |wake: &mut Wake| !wake.news && !wake.closed);
        let mut wake = if keeps {
            self.woken.wait_timeout_while(wake, limit, idle).unwrap_or_else(PoisonError::into_inner).0
        } else {
            self.woken.wait_while(wake, idle).unwrap_or_else(PoisonError::into_inner)
        };
        wake.news = false;
        !wake.closed
    }

    fn wake(&self) {
        lock(&self.wake).news = true;
        self.woken.notify_all();
    }

    /// Has nobody make or keep a clone from here on.
    pub(crate) fn close(&self) {
        lock(&self.wake).closed = true;
        self.woken.notify_all();
    }

    fn place(&self, kind: &Kind) -> Option<Arc<Place>> {
        lock(&self.places).get(kind).cloned()
    }

    fn all(&self) -> Vec<(Kind, Arc<Place>)> {
        lock(&self.places).iter().map(|(kind, place)| (kind.clone(), Arc::clone(place))).collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
