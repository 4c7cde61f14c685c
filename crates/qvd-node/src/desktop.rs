//! One desktop, made of what storage, runtime and network give, in order; and
//! taken apart in the reverse order.

use std::{
    error::Error as StdError,
    fmt,
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use qvd_core::{DesktopId, DesktopSpec, Digest, ErrorKind, FlavourName, RestPolicy, Tag, UidRange};
use qvd_net::{Network, Port, PortView};
use qvd_storage::{BuildOptions, HomeId, Image, Recipe, Repository, RootId, Store};
use qvd_virt::{Exit, Runtime, seal};

use crate::{
    HostError, HostErrorKind, ImageSummary, NodeConfig,
    forks::ForkWatch,
    guest::Guest,
    machine::{Failure, InContainer, InVm, Machine, MachineRecord, Machines},
    network::Networks,
    ranges::Ranges,
    record::{Record, Records},
    rest::Rest,
};

/// What programs begin with. Source: elf(5), `EI_MAG0` to `EI_MAG3`.
const ELF_MAGIC: &[u8] = b"\x7fELF";

/// A desktop that runs, or of which something is left.
#[derive(Debug)]
pub(crate) struct Desktop {
    /// What it was asked to be.
    pub(crate) spec: DesktopSpec,
    pub(crate) uid_slot: u32,
    pub(crate) guest: Guest,
    pub(crate) machine: Box<dyn Machine>,
    pub(crate) port: Option<Port>,
    pub(crate) rest: RestPolicy,
    /// How long a browser's head stays after it has left.
    pub(crate) linger: Duration,
    pub(crate) forks: ForkWatch,
    /// Why its node ended it, if it did.
    pub(crate) verdict: Option<String>,
}

/// Why a desktop could not be taken apart whole; what is left stays owned.
#[derive(Debug, thiserror::Error)]
#[error("{} of its parts are left, first: {}", .0.len(), .0.first().map_or(String::new(), ToString::to_string))]
pub(crate) struct Left(Vec<Failure>);

impl Desktop {
    pub(crate) const fn id(&self) -> DesktopId {
        self.spec.id
    }

    pub(crate) const fn guest(&self) -> &Guest {
        &self.guest
    }

    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.machine.container().pidfd()
    }

    /// Whether its first process still runs.
    pub(crate) fn is_alive(&mut self) -> bool {
        matches!(self.machine.exit(), Ok(None))
    }

    /// How it rests; `usual` is the node's own idea of when.
    pub(crate) fn rest(&self, usual: Duration) -> Rest {
        Rest::new(self.rest, self.rest.after(usual, self.linger), self.machine.container().freezer())
    }

    /// What was asked about it, or `else_` when that cannot be said.
    fn known<T>(&self, what: &str, found: Result<T, impl Into<Failure>>, else_: T) -> T {
        found.map_err(Into::into).unwrap_or_else(|error: Failure| {
            tracing::debug!(desktop = %self.id(), error = &*error as &dyn StdError, "{what} not known");
            else_
        })
    }

    /// Processor time that its programs have used; what cannot be read counts
    /// as none.
    pub(crate) fn cpu_time(&self) -> Duration {
        self.known("processor time", self.machine.container().cpu_time(), Duration::ZERO)
    }

    /// Whether somebody may be listening to it; what is not known counts as yes.
    pub(crate) fn uses_sound(&self) -> bool {
        self.known("use of sound", self.machine.uses_sound(), true)
    }

    /// Whether its programs talk with other hosts; what is not known counts as yes.
    pub(crate) fn has_streams(&self) -> bool {
        self.known("use of the network", self.machine.has_streams(&self.guest), true)
    }

    /// Gives back the memory that it can do without while nobody looks.
    pub(crate) fn page_out(&self) {
        match self.machine.container().page_out() {
            Ok(asked_bytes) => tracing::debug!(desktop = %self.id(), asked_bytes, "desktop rests"),
            Err(error) => {
                tracing::info!(desktop = %self.id(), error = &error as &dyn StdError, "desktop keeps its memory")
            }
        }
    }

    /// Gives back what the kernel keeps for it, while it stands still.
    pub(crate) fn reclaim_all(&self) {
        if let Err(error) = self.machine.container().reclaim_all() {
            tracing::debug!(desktop = %self.id(), error = &error as &dyn StdError, "the kernel keeps what it has of it");
        }
    }

    /// Begins to end it if its programs fork without end: nothing less keeps
    /// them from holding up the neighbours.
    pub(crate) fn end_bomb(&mut self) {
        let refused = self.known("refused processes", self.machine.refused_processes(), 0);
        if self.verdict.is_some() || !self.forks.is_bomb(refused, Instant::now()) {
            return;
        }
        tracing::warn!(desktop = %self.id(), refused, "its programs fork without end: it is ended");
        self.condemn("its programs went on forking at their limit");
    }

    /// Whether it stands still for want of room on the host; lets it go on once there is some.
    pub(crate) fn lacks_room(&mut self) -> bool {
        let stands = self.machine.stands_still(&self.guest);
        self.known("whether it stands still", stands, false)
    }

    /// Begins to end it if nobody can talk with its init any more, nor see it.
    pub(crate) fn end_cut_off(&mut self) {
        if let Some(why) = self.machine.cut_off() {
            tracing::warn!(desktop = %self.id(), why, "its init cannot be talked with any more: it is ended");
            self.condemn(&format!("its init cannot be talked with any more: {why}"));
        }
    }

    fn condemn(&mut self, why: &str) {
        match self.machine.container().kill() {
            Ok(()) => self.verdict = Some(format!("was ended: {why}")),
            Err(error) => tracing::warn!(desktop = %self.id(), error = &error as &dyn StdError, "it runs on"),
        }
    }

    /// Lets go of it: it runs on, and the next node adopts it.
    pub(crate) fn leave(self) {
        let id = self.id();
        if let Some(port) = self.port {
            port.leave();
        }
        if let Err(error) = self.machine.leave() {
            tracing::warn!(desktop = %id, error = &*error as &dyn StdError, "cannot leave the desktop running");
        }
    }

    /// Lets its programs end by themselves, within a limit. What came of it, if they
    /// did not.
    pub(crate) fn ask_to_end(&mut self, grace: Duration) -> Option<String> {
        if grace.is_zero() {
            return None;
        }
        let asked = self.guest.stop(grace).map_err(Failure::from);
        let why = match asked.and_then(|()| self.machine.wait_end(grace)) {
            Ok(true) => return None,
            Ok(false) => format!("it had {} s", grace.as_secs()),
            // It had ended already.
            Err(_) if !self.is_alive() => return None,
            Err(error) => qvd_core::causes(&*error).join(": "),
        };
        tracing::warn!(desktop = %self.id(), why, "the desktop did not end by itself: it is ended");
        Some(format!("did not end when it was asked to ({why}): what its programs had not written is lost"))
    }

    /// Takes note if it has ended because the kernel ended it for want of memory.
    fn find_lack_of_memory(&mut self) {
        // Source: signal(7); the kernel's choice is killed by this one.
        const KILL: i32 = 9;
        if self.verdict.is_none()
            && matches!(self.machine.exit(), Ok(Some(Exit::Signal(KILL))))
            && self.known("killed processes", self.machine.container().killed_for_memory(), 0) > 0
        {
            self.verdict = Some("was ended by the kernel: memory was used up".to_owned());
        }
    }
}

/// What every desktop of a node is made from.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) store: Store,
    pub(crate) runtime: Arc<Runtime>,
    /// Virtual ones.
    pub(crate) machines: Machines,
    pub(crate) networks: Networks,
    pub(crate) records: Records,
    /// The init program, sealed: one copy in memory for all desktops.
    pub(crate) init: OwnedFd,
    pub(crate) ranges: Ranges,
    /// How long a session may take until its window manager is up.
    pub(crate) session_limit: Duration,
    /// How long it may take until a container gives a display.
    pub(crate) attach_limit: Duration,
}

pub(crate) fn failed<E>(kind: HostErrorKind, what: impl fmt::Display) -> impl FnOnce(E) -> HostError
where
    E: Into<Box<dyn StdError + Send + Sync>>,
{
    move |source| HostError::because(kind, what.to_string(), source)
}

impl Parts {
    /// Opens everything, adopts what runs, removes what nobody owns.
    pub(crate) fn open(config: &NodeConfig) -> Result<(Self, Vec<Desktop>), HostError> {
        let path = config.init.display();
        let program = std::fs::read(&config.init)
            .map_err(failed(HostErrorKind::NotFound, format!("cannot read the desktops' init `{path}`")))?;
        if !program.starts_with(ELF_MAGIC) {
            let what = format!("cannot use the desktops' init `{path}`: it is not a program for this machine");
            return Err(HostError::new(HostErrorKind::Invalid, what));
        }
        let init = seal(c"qvd-init", &program)
            .map_err(failed(HostErrorKind::Failed, format!("cannot seal the desktops' init `{path}`")))?;
        // Every desktop takes one; better to know before anything is made.
        drop(user_namespace(0, "cannot run desktops")?);
        let store = Store::open(&config.root).map_err(storage("cannot open the store"))?;
        let runtime = Runtime::new(config.instance).map_err(virt("cannot make the container runtime"))?;
        let runtime = Arc::new(runtime);
        let machines = Machines::new(Arc::clone(&runtime), config);
        let networks = Networks::open(config)?;
        let records = Records::open(&config.run).map_err(failed(
            HostErrorKind::Failed,
            format!("cannot open the records below `{}`", config.run.display()),
        ))?;
        let (session_limit, attach_limit) = (config.session_limit, config.attach_limit);
        let ranges = Ranges::default();
        let parts = Self { store, runtime, machines, networks, records, init, ranges, session_limit, attach_limit };
        let adopted = parts.adopt_all()?;
        Ok((parts, adopted))
    }

    /// Compares records with the kernel.
    fn adopt_all(&self) -> Result<Vec<Desktop>, HostError> {
        let mut adopted = Vec::new();
        let all = self.records.all().map_err(failed(HostErrorKind::Failed, "cannot list the desktops that ran"))?;
        for id in all {
            match self.adopt(id) {
                Ok(desktop) => {
                    tracing::info!(desktop = %id, "adopted");
                    adopted.push(desktop);
                }
                Err(error) => {
                    tracing::info!(desktop = %id, error, "not adopted; what is left of it goes");
                    self.records
                        .end(id)
                        .map_err(failed(HostErrorKind::Failed, format!("cannot remove the record of desktop {id}")))?;
                }
            }
        }
        let keep: Vec<_> = adopted.iter().map(Desktop::id).collect();
        self.runtime.sweep(&keep).map_err(virt("cannot end what earlier desktops left running"))?;
        let ports = keep.iter().copied().collect();
        let swept = self.networks.each(|network| network.sweep(&ports).map(drop));
        swept.map_err(net("cannot remove ports that nobody owns"))?;
        // Persistent ones go when their desktops are removed, and not before.
        // A root that something else has mounted is no reason not to run others.
        if let Err(error) = self.store.sweep_volatile(&keep) {
            tracing::warn!(error = &error as &dyn StdError, "roots that earlier desktops left are left again");
        }
        Ok(adopted)
    }

    fn adopt(&self, id: DesktopId) -> Result<Desktop, Failure> {
        let Record { spec, uid_slot, machine, address, merges, .. } = self.records.read(id)?;
        let guest = Guest::at(self.records.socket(id));
        let image = self.store.image(spec.image)?;
        let ids = UidRange::of_slot(uid_slot)?;
        let mut machine = self.adopt_machine(&spec, &image, ids, (&machine, merges), &guest)?;
        // One that stands still cannot answer yet.
        if !machine.stands_still(&guest)? {
            guest.check()?;
        }
        let port = match address {
            None => None,
            Some(address) => {
                let policy = self.networks.allowed(&spec.tenant, &spec.net);
                let adopt = |network: &Network| network.adopt(id, address, &policy).map_err(net("cannot adopt"));
                Some(self.networks.with(&spec.tenant, adopt)?)
            }
        };
        if !self.ranges.claim(uid_slot) {
            return Err("its range of ids is another's".into());
        }
        let (rest, linger) = rest_of(&image);
        let forks = ForkWatch::default();
        Ok(Desktop { spec, uid_slot, guest, machine, port, rest, linger, forks, verdict: None })
    }

    /// Takes over the processes of a desktop, and lets them go on if it was at
    /// rest when its node died.
    fn adopt_machine(
        &self,
        spec: &DesktopSpec,
        image: &Image,
        ids: UidRange,
        (record, merges): (&MachineRecord, bool),
        guest: &Guest,
    ) -> Result<Box<dyn Machine>, Failure> {
        const ENDED: &str = "its first process has ended";
        match record {
            MachineRecord::Container(record) => {
                let container = self.runtime.adopt(record)?.ok_or(ENDED)?;
                container.freezer().map_or(Ok(()), |freezer| freezer.thaw())?;
                let root = self.store.root(image, &RootId::from(spec.id), spec.root)?;
                Ok(Box::new(InContainer::new(container, root, ids, merges)))
            }
            MachineRecord::Vm(record) => {
                let vm = self.machines.qemu()?.adopt(record)?.ok_or(ENDED)?;
                let disks = self.guest_disks(spec, image, record.is_clone())?;
                Ok(Box::new(InVm::adopt(vm, disks, guest.listen()?)?))
            }
        }
    }

    /// Takes a desktop apart, last made first, and goes on after a failure.
    /// Tells how its first process ended.
    pub(crate) fn close(&self, desktop: &mut Desktop) -> Result<String, Left> {
        let mut errors = Vec::new();
        desktop.find_lack_of_memory();
        errors.extend(desktop.machine.end().err());
        if errors.is_empty()
            && let Some(port) = &mut desktop.port
        {
            match port.release() {
                Ok(()) => desktop.port = None,
                Err(error) => errors.push(error.into()),
            }
        }
        // While a process may be left, the root may be mounted.
        if errors.is_empty() {
            errors.extend(desktop.machine.close_storage().err());
        }
        if errors.is_empty() {
            errors.extend(self.records.end(desktop.id()).err().map(Into::into));
        }
        if !errors.is_empty() {
            return Err(Left(errors));
        }
        self.ranges.free(desktop.uid_slot);
        if let Some(verdict) = &desktop.verdict {
            return Ok(verdict.clone());
        }
        Ok(match desktop.machine.exit().ok().flatten() {
            Some(Exit::Code(0)) => "ended by itself".to_owned(),
            Some(Exit::Code(code)) => format!("ended with status {code}"),
            Some(Exit::Signal(signal)) => format!("was killed by signal {signal}"),
            _ => "ended".to_owned(),
        })
    }

    /// Deletes the root and the home that this node keeps for a desktop.
    pub(crate) fn forget(&self, id: DesktopId) -> Result<(), HostError> {
        let what = format!("cannot remove desktop {id}");
        self.store.remove_guest_root(id).map_err(storage(&what))?;
        self.store.remove_root(&RootId::from(id)).map_err(storage(&what))?;
        self.store.remove_guest_home(id).map_err(storage(&what))?;
        self.store.remove_home(&HomeId::from(id)).map_err(storage(&what))?;
        self.networks.forget(id)
    }

    /// The port of a desktop, and what would become of frames that it sent.
    pub(crate) fn port_view(desktop: &Desktop, frames: &[Vec<u8>]) -> Result<Option<PortView>, HostError> {
        let view = desktop.port.as_ref().map(|port| port.view(frames)).transpose();
        view.map_err(net(format!("cannot look at the port of desktop {}", desktop.id())))
    }

    pub(crate) fn build_image(
        &self,
        recipe: &Path,
        options: &BuildOptions,
        progress: &mut dyn FnMut(&str),
    ) -> Result<ImageSummary, HostError> {
        let what = format!("cannot build the image of `{}`", recipe.display());
        let text = std::fs::read_to_string(recipe).map_err(|error| {
            let found = error.kind() != std::io::ErrorKind::NotFound;
            HostError::because(if found { HostErrorKind::Failed } else { HostErrorKind::NotFound }, &what, error)
        })?;
        let recipe = Recipe::parse(&text).map_err(failed(HostErrorKind::Invalid, &what))?;
        let built = self.store.build(&recipe, options, progress).map_err(storage(&what))?;
        Ok(ImageSummary::of(&built.image, built.reused))
    }

    pub(crate) fn images(&self) -> Result<Vec<ImageSummary>, HostError> {
        ImageSummary::all(self.store.repository()).map_err(storage("cannot list the images"))
    }

    pub(crate) fn repository(&self) -> Arc<Repository> {
        Arc::clone(self.store.repository())
    }

    pub(crate) fn follow(
        &self,
        flavour: &FlavourName,
        tag: &Tag,
        desktop: Option<DesktopId>,
    ) -> Result<Digest, HostError> {
        // Who does not exist yet gets what most have.
        let who = desktop.map_or_else(String::new, |id| id.to_string());
        let commit = self.store.repository().follow(flavour, tag, &who);
        Ok(commit.map_err(storage(format!("cannot find what follows `{tag}` of {flavour}")))?.digest())
    }
}

/// The user namespace of a range of ids. A refusal says what this host lacks.
pub(crate) fn user_namespace(slot: u32, what: &str) -> Result<OwnedFd, HostError> {
    let ids = UidRange::of_slot(slot).map_err(failed(HostErrorKind::Busy, what))?;
    qvd_sys::userns::create(ids.base(), UidRange::LEN).map_err(|error| {
        // Source: user_namespaces(7) and clone(2). Their usual texts, such as
        // "no space left on device", would lead elsewhere.
        let why = match error.kind() {
            std::io::ErrorKind::StorageFull => {
                "this host allows no more user namespaces; raise the sysctl `user.max_user_namespaces`"
            }
            std::io::ErrorKind::PermissionDenied => "this process may not make user namespaces with desktops' ids",
            std::io::ErrorKind::InvalidInput => "the kernel has no user namespaces",
            _ => return HostError::because(HostErrorKind::Failed, what, error),
        };
        HostError::new(HostErrorKind::Unsupported, format!("{what}: {why}"))
    })
}

/// A failed undo must not hide the failure that it follows.
pub(crate) fn note<E: StdError + 'static>(id: DesktopId, undone: Result<(), E>) {
    if let Err(error) = undone {
        tracing::warn!(desktop = %id, error = &error as &dyn StdError, "left behind by a start that failed");
    }
}

pub(crate) fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// How desktops of an image rest, and how long a browser's head stays.
pub(crate) fn rest_of(image: &Image) -> (RestPolicy, Duration) {
    let linger = image.config().session.as_ref().map_or(0, |session| session.head_linger_s);
    (image.config().defaults.rest, Duration::from_secs(linger.into()))
}

pub(crate) fn storage(what: impl fmt::Display) -> impl FnOnce(qvd_storage::Error) -> HostError {
    move |error| HostError::because(host_kind(error.kind()), what.to_string(), error)
}

pub(crate) fn net(what: impl fmt::Display) -> impl FnOnce(qvd_net::Error) -> HostError {
    move |error| HostError::because(host_kind(error.kind()), what.to_string(), error)
}

const fn host_kind(kind: ErrorKind) -> HostErrorKind {
    match kind {
        ErrorKind::Invalid => HostErrorKind::Invalid,
        ErrorKind::NotFound => HostErrorKind::NotFound,
        ErrorKind::Busy => HostErrorKind::Busy,
        ErrorKind::Unsupported => HostErrorKind::Unsupported,
        _ => HostErrorKind::Failed,
    }
}

pub(crate) fn virt(what: impl fmt::Display) -> impl FnOnce(qvd_virt::Error) -> HostError {
    move |error| {
        let kind = match &error {
            qvd_virt::Error::Invalid { .. } => HostErrorKind::Invalid,
            qvd_virt::Error::Unsupported { .. } => HostErrorKind::Unsupported,
            qvd_virt::Error::Busy(_) => HostErrorKind::Busy,
            qvd_virt::Error::Timeout { .. } => HostErrorKind::Timeout,
            _ => HostErrorKind::Failed,
        };
        HostError::because(kind, what.to_string(), error)
    }
}
