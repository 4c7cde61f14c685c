//! Makes containers.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::CString,
    fs,
    io::{self, Write},
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use caps::Capability;
use qvd_core::{Calls, DesktopId, Instance, Limits};
use qvd_sys::process::{
    BpfInstruction, Event, ExecArgs, LandlockRules, Namespaces, Op, Plan, Process, boot_id, spawn, start_time,
};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use tracing::{debug, info_span, warn};

use crate::{
    Container, ContainerRecord, ContainerSpec, Error, Merging, Prepared, Profile,
    cgroup::{Cgroup, Cgroups},
    container::Place,
    enforced::Demand,
    error::io_error,
    layout::{Layout, Parts},
    measures::Measures,
    probe, seccomp,
    spec::c_string,
};

/// How long a child may take for its plan. A start takes milliseconds; a host
/// that swaps takes longer, and no host takes this long.
pub(crate) const PLAN_WITHIN: Duration = Duration::from_secs(20);

/// Descriptors that a program may have open without asking for more, and with.
/// The first is what `select(2)` can handle, the second systemd's default.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

/// Desktops go before the node and the host's services when memory is short.
/// Source: proc(5), `oom_score_adj`, from -1000 to 1000.
const OOM_SCORE_ADJ: &str = "300";

/// A system call filter, as the kernel takes it.
type Filter = Arc<[BpfInstruction]>;

/// Makes, adopts and sweeps the containers of one installation.
///
/// Dropping it leaves its containers alone; each is an owner of its own.
#[derive(Debug)]
pub struct Runtime {
    shared: Arc<Shared>,
    layout: Layout,
    /// What desktops may call; others are compiled when they are first asked for.
    filters: Mutex<BTreeMap<(Calls, bool), Filter>>,
    /// The version of Landlock that there is.
    landlock: Option<u32>,
    /// Whether a child can be born in its cgroup.
    born_in_place: bool,
    /// Whether all pages of a container can be offered for merging.
    can_merge: OnceLock<bool>,
}

/// What containers need for as long as they live.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) cgroups: Arc<Cgroups>,
    /// Containers that this runtime's owners hold: not to be swept.
    held: Mutex<BTreeSet<DesktopId>>,
}

impl Shared {
    fn held(&self) -> MutexGuard<'_, BTreeSet<DesktopId>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn release(&self, id: DesktopId) {
        self.held().remove(&id);
    }
}

/// A desktop's number, taken until dropped or handed on.
struct Claim<'a> {
    shared: &'a Shared,
    id: DesktopId,
    armed: bool,
}

impl<'a> Claim<'a> {
    fn new(shared: &'a Shared, id: DesktopId) -> Result<Self, Error> {
        if shared.held().insert(id) { Ok(Self { shared, id, armed: true }) } else { Err(Error::Busy(id)) }
    }

    fn hand_on(mut self) {
        self.armed = false;
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.shared.release(self.id);
        }
    }
}

impl Runtime {
    /// Makes what all containers of `instance` share: the device file system,
    /// the system call filter, the place of their cgroups.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when this host cannot limit a container;
    /// [`Error::Io`] when this process may not mount.
    pub fn new(instance: Instance) -> Result<Self, Error> {
        let cgroups = Arc::new(Cgroups::open(instance)?);
        let born_in_place = cgroups.can_be_born_in()?;
        let shared = Arc::new(Shared { cgroups, held: Mutex::default() });
        let landlock = probe::landlock().map_err(io_error("try Landlock"))?;
        Ok(Self {
            shared,
            layout: Layout::new()?,
            filters: Mutex::default(),
            landlock,
            born_in_place,
            can_merge: OnceLock::new(),
        })
    }

    /// Makes the process of a container and lets it set up its file system and
    /// confinement, while the caller makes its network. Nothing of the image
    /// runs before [`Prepared::start`]. If this process dies, so does that one.
    ///
    /// # Errors
    /// The specification is wrong, the number is taken, or the kernel refuses;
    /// nothing is left.
    pub fn prepare(&self, spec: ContainerSpec) -> Result<Prepared, Error> {
        self.prepare_with(spec, &Measures::default(), |_| {})
    }

    /// With `measures` and what `change` makes of the plan. Only tests ask for
    /// less than all there is.
    fn prepare_with(
        &self,
        mut spec: ContainerSpec,
        measures: &Measures,
        change: impl FnOnce(&mut Plan),
    ) -> Result<Prepared, Error> {
        let id = spec.id;
        let _span = info_span!("prepare", desktop = %id).entered();
        spec.check()?;
        let claim = Claim::new(&self.shared, id)?;
        let cgroup = {
            let _span = info_span!("cgroup").entered();
            self.shared.cgroups.create(id, spec.limits, spec.profile.cgroups.then_some(spec.ids))?
        };
        let mut plan = {
            let _span = info_span!("compile").entered();
            self.compile(&mut spec, cgroup.entrances()?, measures)?
        };
        change(&mut plan);
        let (steps, landlocked) = (plan.len(), plan.has(|op| matches!(op, Op::Landlock(_))));
        let birthplace = if self.born_in_place { cgroup.birthplace()? } else { None };
        let spawned = {
            let _span = info_span!("clone").entered();
            spawn(plan, measures.namespaces, birthplace.as_ref().map(AsFd::as_fd))
                .map_err(|source| Error::Start { id, source })?
        };
        debug!(pid = spawned.process().pid(), steps, "process made");
        claim.hand_on();
        // From here on the owner undoes everything.
        let place = Place::new(Arc::clone(&self.shared), cgroup, id, spec.ids);
        let demand = Demand {
            require: spec.profile.require.clone(),
            kept: spec.profile.capabilities.clone(),
            limits: spec.limits,
        };
        let prepared = Prepared::new(place, spawned, landlocked, demand);
        {
            let _span = info_span!("maps").entered();
            let placed = self.place(&prepared, birthplace.is_some(), &spec);
            placed.map_err(|error| prepared.reason().unwrap_or(error))?;
        }
        prepared.release().map_err(|error| prepared.reason().unwrap_or(error))?;
        Ok(prepared)
    }

    /// What has to be done to the child from outside before it may go on.
    fn place(&self, prepared: &Prepared, born_in_place: bool, spec: &ContainerSpec) -> Result<(), Error> {
        let pid = prepared.pid();
        if !born_in_place {
            prepared.cgroup().attach(pid)?;
        }
        // Supplementary groups stay allowed: they are those of the range, and
        // programs inside that become a user need them.
        let map = format!("0 {} {}", spec.ids.base(), qvd_core::UidRange::LEN);
        for (file, value) in [("uid_map", map.as_str()), ("gid_map", &map), ("oom_score_adj", OOM_SCORE_ADJ)] {
            let path = format!("/proc/{pid}/{file}");
            let write = || fs::OpenOptions::new().write(true).open(&path)?.write_all(value.as_bytes());
            write().map_err(io_error(format!("write {value} to `{path}`")))?;
        }
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let hard = getrlimit(Resource::Nofile).maximum.map_or(OPEN_FILES.1, |own| own.min(OPEN_FILES.1));
        let limits = [
            (Resource::Nofile, OPEN_FILES.0.min(hard), hard),
            // One byte, not zero: the host's core handler, which runs outside
            // of the container, is started with zero but not with one (Linux
            // `fs/coredump.c`).
            (Resource::Core, 1, 1),
        ];
        for (resource, current, maximum) in limits {
            let limit = Rlimit { current: Some(current), maximum: Some(maximum) };
            prlimit(number, resource, limit).map_err(io_error(format!("limit process {pid}")))?;
        }
        Ok(())
    }

    fn compile(&self, spec: &mut ContainerSpec, groups: Vec<OwnedFd>, measures: &Measures) -> Result<Plan, Error> {
        let mut plan = Plan::new();
        let root = spec.root.try_clone().map_err(io_error("keep the root"))?;
        let mut parts = Parts::of(spec, root.as_fd(), measures)?;

        for tasks in groups {
            let tasks = plan.own(tasks).map_err(io_error("keep a cgroup"))?;
            plan.step("enter its cgroup", Op::EnterGroup(tasks));
        }
        plan.step("wait for its id map", Op::Wait);
        plan.step("drop the groups", Op::ClearGroups);
        plan.step("become group 0", Op::SetGid(0));
        plan.step("become user 0", Op::SetUid(0));
        plan.step("start a session", Op::NewSession);
        plan.step("leave the keyring", Op::NewKeyring);
        // Not by the clone: the root of this namespace is the group that the
        // process is in when it is made.
        plan.step("make a cgroup namespace", Op::Unshare(Namespaces::CGROUP));
        plan.step("bring the loopback interface up", Op::LoopbackUp);
        plan.step("set the host name", Op::SetHostname(spec.hostname.clone().into_bytes()));
        plan.step("set the file mode mask", Op::Umask(0o022));
        plan.step("unblock signals", Op::UnblockSignals);
        if spec.profile.merging == Merging::All {
            plan.step("offer its memory for merging", Op::OfferMemory);
        }
        self.layout.compile(&mut plan, &mut parts)?;

        let own = |fd| move |plan: &mut Plan| plan.own(fd).map_err(io_error("keep a descriptor for the container"));
        let program = spec.program.file.try_clone().map_err(io_error("keep the program"))?;
        let program = own(program)(&mut plan)?;
        let mut given: BTreeSet<u8> = spec.fuse.iter().map(|fuse| fuse.number).collect();
        for inherited in spec.fds.drain(..) {
            let from = own(inherited.fd)(&mut plan)?;
            given.insert(inherited.number);
            plan.step(format!("place descriptor {}", inherited.number), Op::Dup { from, to: inherited.number.into() });
        }
        if (0..3).any(|number| !given.contains(&number)) {
            let null = self.layout.null().map_err(io_error("keep the null device"))?;
            let null = own(null)(&mut plan)?;
            for number in (0..3_u8).filter(|number| !given.contains(number)) {
                plan.step(format!("place descriptor {number}"), Op::Dup { from: null, to: number.into() });
            }
        }
        let inherited = given.last().map_or(3, |last| u32::from(*last).saturating_add(1).max(3));
        plan.step("close other descriptors", Op::CloseOnExecFrom(inherited));
        // Whoever may mount cannot be restricted by it: it takes that away.
        if let Some(version) = self.landlock.filter(|_| spec.profile.calls != Calls::System) {
            let rules = LandlockRules::new(version, root.as_fd()).map_err(io_error("make rules of Landlock"))?;
            let rules = own(rules.into())(&mut plan)?;
            plan.step("restrict itself by Landlock", Op::Landlock(rules));
        }
        plan.step("drop capabilities", Op::DropBounding(dropped(&spec.profile.capabilities)?));
        if spec.profile.no_new_privileges {
            plan.step("forbid new privileges", Op::NoNewPrivileges);
        }
        if spec.profile.small_pages {
            plan.step("keep to small pages", Op::SmallPages);
        }
        // A new user namespace gives a process all capabilities, so the filter
        // may be loaded without `no_new_privs` too.
        plan.step("load the system call filter", Op::Seccomp(self.filter(&spec.profile)));
        plan.step("report", Op::Ready);
        plan.step("wait for the start", Op::Wait);
        let strings = |texts: &[String]| texts.iter().map(|text| c_string(text)).collect::<Result<Vec<CString>, _>>();
        let args = ExecArgs::new(strings(&spec.program.argv)?, strings(&spec.program.env)?);
        plan.step("execute the program", Op::Exec { program, args });
        Ok(plan)
    }

    fn filter(&self, profile: &Profile) -> Filter {
        let mut filters = self.filters.lock().unwrap_or_else(PoisonError::into_inner);
        let (calls, merging) = (profile.calls, profile.merging == Merging::Offered);
        Arc::clone(filters.entry((calls, merging)).or_insert_with(|| seccomp::filter(calls, merging)))
    }

    /// Whether this host lets all pages of a container be offered for merging
    /// ([`Merging::All`]), tried once. Before Linux 6.4 none can be, and some later ones
    /// refuse it to whoever is not root on the host.
    #[must_use]
    pub fn can_merge(&self) -> bool {
        *self.can_merge.get_or_init(|| probe::merging().is_ok_and(|support| support.is_yes()))
    }

    /// Takes over a container that another process, or an earlier life of this
    /// one, started. `None`: it does not run any more, or was not this one.
    ///
    /// # Errors
    /// [`Error::Busy`] when somebody here holds it already; [`Error::Io`] when
    /// `/proc` or the cgroups cannot be read.
    pub fn adopt(&self, record: &ContainerRecord) -> Result<Option<Container>, Error> {
        let id = record.id;
        let op = |what: &str| format!("{what} of desktop {id}");
        if boot_id().map_err(io_error("read the boot's id"))? != record.boot_id {
            return Ok(None);
        }
        let claim = Claim::new(&self.shared, id)?;
        // First the descriptor, then the questions: their answers are about
        // the process it means as long as that has not ended.
        let mut process = match Process::open(record.pid) {
            Ok(process) => process,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(error) => return Err(io_error(op("open the process"))(error)),
        };
        let same = match start_time(record.pid) {
            Ok(time) => time == record.start_time_ticks,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(io_error(op("read the start time"))(error)),
        };
        let inside = self.shared.cgroups.holds(id, record.pid).map_err(io_error(op("read the cgroup")))?;
        let ended = process.try_wait().map_err(io_error(op("watch the process")))?.is_some();
        if !same || !inside || ended {
            return Ok(None);
        }
        claim.hand_on();
        let place = Place::new(Arc::clone(&self.shared), self.shared.cgroups.adopt(id), id, record.ids);
        Ok(Some(Container::new(place, process, record.landlock)))
    }

    /// Kills and removes every container of this installation that is neither
    /// held here nor in `keep`, and says which there were. Goes on after a
    /// failure and reports the first.
    ///
    /// # Errors
    /// Something could not be removed.
    pub fn sweep(&self, keep: &[DesktopId]) -> Result<Vec<String>, Error> {
        let mut swept = Vec::new();
        let mut first = None;
        for name in self.shared.cgroups.names()? {
            let id = name.parse::<DesktopId>();
            let held = |id| self.shared.held().contains(id) || keep.contains(id);
            if id.as_ref().is_ok_and(held) {
                continue;
            }
            let mut stray: Cgroup = self.shared.cgroups.stray(name.clone());
            match stray.close() {
                Ok(()) => swept.push(name),
                Err(error) => {
                    warn!(%error, "cgroup not swept");
                    first.get_or_insert(error);
                }
            }
        }
        first.map_or(Ok(swept), Err)
    }
}

/// Numbers of all capabilities that this kernel has but for `kept`.
fn dropped(kept: &[Capability]) -> Result<Vec<u8>, Error> {
    let known = caps::runtime::procfs_all_supported(None)
        .map_err(|error| Error::Io { op: "list capabilities".to_owned(), source: io::Error::other(error) })?;
    let mut dropped: Vec<u8> = known.iter().filter(|c| !kept.contains(c)).map(|c| c.index()).collect();
    dropped.sort_unstable();
    Ok(dropped)
}

impl Cgroups {
    /// Whether a child can be born in a fresh group. Tried, because a group of
    /// our own that was once killed makes the kernel kill every such child
    /// (Linux 6.18 `kernel/cgroup/cgroup.c`, `cgroup_post_fork`).
    fn can_be_born_in(self: &Arc<Self>) -> Result<bool, Error> {
        let id = DesktopId::new(DesktopId::MAX)
            .map_err(|_| Error::Invalid { what: "the largest desktop number".to_owned(), reason: "it is not one" })?;
        if !self.is_birthplace() {
            return Ok(false);
        }
        let mut cgroup = self.create(id, Limits::default(), None)?;
        let Some(dir) = cgroup.birthplace()? else { return Ok(false) };
        let mut plan = Plan::new();
        plan.step("report", Op::Ready);
        let born = spawn(plan, Namespaces::NONE, Some(dir.as_fd())).map(|mut child| {
            let ready = matches!(child.event(PLAN_WITHIN), Ok(Event::Ready { .. }));
            let reaped = child.process_mut().wait(PLAN_WITHIN);
            ready && reaped.is_ok()
        });
        cgroup.close()?;
        Ok(born.unwrap_or(false))
    }
}
