//! Who gets how much of this host's memory: measures every few seconds, has
//! [`qvd_virt::memory`] decide, and does what was decided.

mod report;
mod round;
mod sharing;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use qvd_core::{Bytes, DesktopId, DesktopSpec, TenantName, Virtualizer};
use qvd_virt::memory::{Activity, Guest, HostState, KSM_DIR, Ksm, Request, Shortfall, admit};

pub use self::report::{DesktopMemory, MemoryReport, StockReport};
pub(crate) use self::round::{Desktops, Measured, Reached};
use self::{round::Round, sharing::Sharing};

/// File in the run-time directory that says how the host merged equal pages
/// before this did.
const KSM_NOTE: &str = "ksm.json";

/// How many times as long as a round the pause after it is.
const IDLE_FOR: u32 = 100;

/// Longest pause because of that.
const LONGEST: Duration = Duration::from_secs(60);

/// Pressure at which nobody waits longer than they have to.
const PRESSED_PERCENT: u8 = 10;

/// What is left free of the memory when something is made that nobody has asked for
/// yet, and what has to be for it to stay. Apart, so that one does not follow the other.
const SPARE_PERCENT: u64 = 10;
const SHORT_PERCENT: u64 = 5;

/// File in the run-time directory that says whose desktops share pages.
const SHARING_NOTE: &str = "sharing-tenant";

/// What the memory of a machine is a multiple of.
pub(crate) const MACHINE_STEP: u64 = 2 << 20;

/// How a node shares out its host's memory.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct MemoryConfig {
    /// Most that desktops may have together; as much as the host has, unless
    /// given.
    pub total: Option<Bytes>,
    /// How often it is measured and decided.
    pub every: Duration,
    /// Whether equal pages of a tenant's desktops are merged when memory is short.
    pub merge: bool,
    /// Most that all desktops may be promised together, in hundredths of the
    /// memory. `None` does not limit it: most never need what they may have.
    pub promise_percent: Option<u32>,
    /// What a container is owed: it does not start without, and is not paged
    /// out below.
    pub container_minimum: Bytes,
    /// What a machine is owed, in hundredths of what it may have; no balloon
    /// takes it below.
    pub machine_minimum_percent: u8,
    /// What it is owed at least.
    pub machine_minimum: Bytes,
}

impl Default for MemoryConfig {
    /// All of the host's memory, looked at every five seconds; merging by need;
    /// promises not limited. A container is owed 24 MiB, what a desktop of
    /// docs/density.md takes, and a machine a quarter of its memory, at least
    /// 96 MiB: a kernel, a session and little else.
    fn default() -> Self {
        Self {
            total: None,
            every: Duration::from_secs(5),
            merge: true,
            promise_percent: None,
            container_minimum: Bytes::mib(24),
            machine_minimum_percent: 25,
            machine_minimum: Bytes::mib(96),
        }
    }
}

impl MemoryConfig {
    /// What a desktop needs to come up, and may have at most.
    pub(crate) fn request(&self, spec: &DesktopSpec) -> Request {
        let limit = spec.limits.memory.get();
        let (maximum, minimum) = if spec.virtualizer == Virtualizer::Container {
            (limit, self.container_minimum.get())
        } else {
            let maximum = limit.next_multiple_of(MACHINE_STEP);
            let part = maximum.saturating_mul(u64::from(self.machine_minimum_percent)) / 100;
            (maximum, part.max(self.machine_minimum.get()))
        };
        Request { minimum: Bytes::new(minimum.min(maximum)), maximum: Bytes::new(maximum) }
    }
}

/// What the governor remembers from one round to the next, and what a start
/// asks it.
#[derive(Debug)]
pub(crate) struct Governor {
    config: MemoryConfig,
    proc: PathBuf,
    /// Desktops as they were measured last.
    known: Mutex<BTreeMap<DesktopId, Measured>>,
    /// Those that were let start and have not been measured yet.
    starting: Mutex<BTreeMap<DesktopId, Request>>,
    sharing: Arc<Sharing>,
    round: Mutex<Round>,
    report: Mutex<Option<MemoryReport>>,
    /// Desktops that have ended since the last round.
    gone: Mutex<Vec<DesktopId>>,
    /// What machines are born from.
    stock: Mutex<StockReport>,
    ended: Mutex<bool>,
    end: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Governor {
    /// Begins to govern. What cannot be done here is logged, and the rest is done.
    pub(crate) fn open(config: &MemoryConfig, run: &Path) -> Self {
        let ksm = if config.merge { Ksm::open(Path::new(KSM_DIR), &run.join(KSM_NOTE)) } else { Err(not_wanted()) };
        let round = Round::new(ksm, &run.join(SHARING_NOTE));
        let sharing = round.sharing();
        Self {
            sharing,
            config: config.clone(),
            proc: PathBuf::from("/proc"),
            known: Mutex::default(),
            starting: Mutex::default(),
            round: Mutex::new(round),
            report: Mutex::default(),
            gone: Mutex::default(),
            stock: Mutex::default(),
            ended: Mutex::new(false),
            end: Condvar::new(),
        }
    }

    /// Waits for the next round after one that took so long; false when there is
    /// none. Rounds take at most a hundredth of the time, unless memory is short.
    pub(crate) fn wait(&self, took: Duration) -> bool {
        let until = Instant::now() + (took * IDLE_FOR).min(LONGEST);
        loop {
            let ended = lock(&self.ended);
            let waited = self.end.wait_timeout_while(ended, self.config.every, |ended| !*ended);
            if *waited.unwrap_or_else(PoisonError::into_inner).0 {
                return false;
            }
            let pressed = || HostState::read(&self.proc).is_ok_and(|host| host.pressure_percent >= PRESSED_PERCENT);
            if Instant::now() >= until || pressed() {
                return true;
            }
        }
    }

    /// Has the thread that goes round end.
    pub(crate) fn stop(&self) {
        *lock(&self.ended) = true;
        self.end.notify_all();
    }

    /// Leaves the host's settings as they were found.
    pub(crate) fn close(&self) -> Result<(), qvd_virt::Error> {
        lock(&self.round).close()
    }

    /// What the host has for desktops. `held` is what they have of it already.
    fn host(&self, held: u64) -> Result<HostState, qvd_virt::Error> {
        let mut host = HostState::read(&self.proc)?;
        let stock = *lock(&self.stock);
        let held = held.saturating_add(stock.templates_memory.get()).saturating_add(stock.ready_memory.get());
        if let Some(total) = self.config.total.filter(|&total| total < host.total) {
            host.total = total;
            host.available = host.available.min(Bytes::new(total.get().saturating_sub(held)));
        }
        let most = |percent: u32| Bytes::new(host.total.get() / 100 * u64::from(percent));
        host.promises = self.config.promise_percent.map(most);
        Ok(host)
    }

    /// Those that run and what they are known to have, and those of `starting`
    /// that are not measured yet.
    fn guests(&self, starting: &BTreeMap<DesktopId, Request>) -> BTreeMap<DesktopId, Measured> {
        let mut all = lock(&self.known).clone();
        for (&id, request) in starting {
            all.entry(id).or_insert_with(|| Measured::starting(id, *request));
        }
        all
    }

    /// Lets a desktop start, or says what is missing. Others that ask meanwhile
    /// find its minimum taken. Where the host cannot be measured, it may.
    pub(crate) fn admit(&self, spec: &DesktopSpec) -> Result<Admitted, Shortfall> {
        let request = self.config.request(spec);
        let mut starting = lock(&self.starting);
        let mut all = self.guests(&starting);
        all.remove(&spec.id);
        let held = all.values().map(|one| one.resident.get()).sum();
        let needs_room = match self.host(held) {
            Ok(host) => {
                let guests: Vec<Guest> = all.values().map(|one| one.guest).collect();
                admit(&host, &guests, request)?;
                let room = i128::from(host.available.get()) - i128::from(request.minimum.get());
                room < i128::from(host.total.get() / 20)
            }
            Err(error) => {
                tracing::warn!(desktop = %spec.id, error = &error as &dyn std::error::Error, "memory is not known: it may start");
                false
            }
        };
        starting.insert(spec.id, request);
        Ok(Admitted { needs_room })
    }

    /// Takes note of what machines are born from.
    pub(crate) fn note_stock(&self, stock: StockReport) {
        *lock(&self.stock) = stock;
    }

    /// What could be had, beside what those take that are coming up, in hundredths of
    /// all; none while others wait for memory, or where nothing is known.
    fn left_percent(&self, beside: Bytes) -> u64 {
        let starting = lock(&self.starting);
        let held = self.guests(&starting).values().map(|one| one.resident.get()).sum();
        let coming: u64 = starting.values().map(|request| request.minimum.get()).sum();
        drop(starting);
        let Ok(host) = self.host(held) else { return 0 };
        if host.pressure_percent >= PRESSED_PERCENT {
            return 0;
        }
        host.available.get().saturating_sub(coming + beside.get()).saturating_mul(100) / host.total.get().max(1)
    }

    /// Whether there is room for something that nobody has asked for yet.
    pub(crate) fn has_room_for(&self, need: Bytes) -> bool {
        self.left_percent(need) >= SPARE_PERCENT
    }

    /// Whether there is none for what was made so.
    pub(crate) fn is_short(&self) -> bool {
        self.left_percent(Bytes::new(0)) < SHORT_PERCENT
    }

    /// Those of whom nothing is known but that they were let start.
    pub(crate) fn started(&self) -> Vec<DesktopId> {
        lock(&self.starting).keys().copied().collect()
    }

    /// Lets a desktop that is about to start offer its memory for merging; false where
    /// pages are not merged, or desktops of another tenant share theirs.
    pub(crate) fn offers_memory(&self, id: DesktopId, tenant: &TenantName) -> bool {
        self.sharing.let_share(id, tenant, true).unwrap_or_else(|error| {
            tracing::warn!(desktop = %id, error = &error as &dyn std::error::Error, "it does not share its memory");
            false
        })
    }

    /// Takes note of a desktop that was adopted.
    pub(crate) fn found(&self, id: DesktopId, tenant: &TenantName, shares: bool) {
        self.sharing.found(id, tenant, shares);
    }

    /// Takes note of what a desktop has now.
    pub(crate) fn note(&self, measured: Measured) {
        let id = measured.guest.id;
        // In the order in which both are looked at.
        let mut starting = lock(&self.starting);
        lock(&self.known).insert(id, measured);
        starting.remove(&id);
    }

    /// Forgets one that does not run any more.
    pub(crate) fn forget(&self, id: DesktopId) {
        let mut starting = lock(&self.starting);
        lock(&self.known).remove(&id);
        starting.remove(&id);
        lock(&self.gone).push(id);
        self.sharing.forget(id);
    }

    /// What the last round came to, if there was one.
    pub(crate) fn report(&self) -> Option<MemoryReport> {
        lock(&self.report).clone()
    }
}

fn not_wanted() -> qvd_virt::Error {
    qvd_virt::Error::Invalid { what: "merging of equal pages".to_owned(), reason: "it is switched off" }
}

/// A desktop may start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Admitted {
    /// What it needs is there only once others have given some of theirs back.
    pub(crate) needs_room: bool,
}

/// What can be said of a desktop's activity.
pub(crate) const fn activity(attached: bool, resting: bool, busy: bool) -> Activity {
    match (attached, resting, busy) {
        (true, ..) => Activity::Attended,
        (_, false, true) => Activity::Working,
        _ => Activity::Idle,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use qvd_core::{Limits, NetPolicy, RootPolicy};

    use super::*;

    /// A host with so many MiB, of which so many are free.
    fn governor(total: u64, free: u64, config: MemoryConfig) -> (tempfile::TempDir, Governor) {
        let proc = tempfile::tempdir().unwrap();
        let text = format!("MemTotal: {} kB\nMemAvailable: {} kB\nSwapFree: 0 kB\n", total << 10, free << 10);
        std::fs::write(proc.path().join("meminfo"), text).unwrap();
        let config = MemoryConfig { merge: false, ..config };
        let governor = Governor { proc: proc.path().to_owned(), ..Governor::open(&config, proc.path()) };
        (proc, governor)
    }

    fn spec(number: u32, virtualizer: Virtualizer, memory: Bytes) -> DesktopSpec {
        DesktopSpec {
            id: DesktopId::new(number).unwrap(),
            user: "alice".parse().unwrap(),
            tenant: qvd_core::TenantName::default(),
            hostname: "desk".to_owned(),
            image: format!("sha256:{}", "0".repeat(64)).parse().unwrap(),
            virtualizer,
            root: RootPolicy::Volatile,
            limits: Limits { memory, ..Limits::default() },
            net: NetPolicy::none(),
            devices: [].into(),
            calls: None,
            address: None,
            home: None,
        }
    }

    #[test]
    fn what_is_starting_counts_before_it_has_anything() {
        let (_proc, governor) = governor(1000, 100, MemoryConfig::default());
        let container = |number| spec(number, Virtualizer::Container, Bytes::gib(1));
        // 50 MiB beside the host's own: two of 24 fit.
        let first = container(1);
        assert!(!governor.admit(&first).unwrap().needs_room);
        governor.admit(&container(2)).unwrap();
        let refused = governor.admit(&container(3)).unwrap_err().to_string();
        assert_eq!(refused, "needs 24 MiB, 2 free after reclaim; smallest change: stop desktop 1, or free 22 MiB");
        // Asking again for one that starts does not take twice.
        governor.admit(&container(2)).unwrap();
        // One did not come up.
        governor.forget(first.id);
        governor.admit(&container(3)).unwrap();
    }

    #[test]
    fn what_desktops_may_have_together_can_be_less_than_the_host_has() {
        let config =
            MemoryConfig { total: Some(Bytes::mib(300)), promise_percent: Some(200), ..MemoryConfig::default() };
        let (_proc, governor) = governor(4000, 3000, config);
        let machine = |number, memory| spec(number, Virtualizer::Qemu, Bytes::mib(memory));
        let refused = governor.admit(&machine(1, 1600)).unwrap_err().to_string();
        assert!(refused.starts_with("needs 400 MiB, 285 free"), "{refused}");
        governor.admit(&machine(1, 400)).unwrap();
        let refused = governor.admit(&machine(2, 400)).unwrap_err().to_string();
        let expected =
            "is promised 400 MiB, 200 not promised to others; smallest change: stop desktop 1, or ask for 200 MiB less";
        assert_eq!(refused, expected);
        governor.admit(&machine(2, 200)).unwrap();
    }

    /// Desktops of which only what was noted is known.
    #[derive(Debug)]
    struct OutOfReach;

    impl Desktops for OutOfReach {
        fn all(&self) -> Vec<DesktopId> {
            Vec::new()
        }
        fn release_stock(&self) {}
        fn with(&self, _: DesktopId, _: &mut dyn FnMut(Reached<'_>)) {}
    }

    /// A host whose machines that stand ready can be ended.
    struct Stocked<'a>(&'a Governor);

    impl Desktops for Stocked<'_> {
        fn all(&self) -> Vec<DesktopId> {
            Vec::new()
        }
        fn release_stock(&self) {
            self.0.note_stock(StockReport::default());
        }
        fn with(&self, _: DesktopId, _: &mut dyn FnMut(Reached<'_>)) {}
    }

    #[test]
    fn a_round_ends_what_stands_ready_before_it_asks_anybody() {
        for (free, left) in [(60, 2), (40, 0)] {
            let (_proc, governor) = governor(1000, free, MemoryConfig::default());
            governor.note_stock(StockReport { ready: 2, ready_memory: Bytes::mib(96), ..StockReport::default() });
            governor.go_round(&Stocked(&governor));
            assert_eq!(governor.report().unwrap().stock.ready, left, "{free} MiB are free of 1000");
        }
    }

    #[test]
    fn a_start_does_not_wait_for_whoever_goes_round() {
        let (_proc, governor) = governor(1000, 100, MemoryConfig::default());
        let round = governor.round.lock().unwrap();
        governor.look(&OutOfReach, DesktopId::new(1).unwrap());
        governor.go_round_unless_busy(&OutOfReach);
        assert!(governor.report().is_none());
        drop(round);
        governor.go_round_unless_busy(&OutOfReach);
        assert!(governor.report().is_some());
    }

    #[test]
    fn pages_are_merged_by_need_and_not_again_after_the_end() {
        let (proc, governor) = governor(1000, 100, MemoryConfig::default());
        let files = ["run", "pages_to_scan", "sleep_millisecs", "full_scans", "pages_sharing"];
        files.iter().for_each(|file| std::fs::write(proc.path().join(file), "0").unwrap());
        let ksm = Ksm::open(proc.path(), &proc.path().join("note"));
        *lock(&governor.round) = Round::new(ksm, &proc.path().join("sharing"));
        let runs = || std::fs::read_to_string(proc.path().join("run")).unwrap();
        for number in 1..=2 {
            let request = governor.config.request(&spec(number, Virtualizer::Qemu, Bytes::mib(256)));
            let mut one = Measured::starting(DesktopId::new(number).unwrap(), request);
            one.guest.mergeable = true;
            governor.note(one);
        }
        governor.go_round(&OutOfReach);
        assert_eq!(runs(), "1");
        governor.close().unwrap();
        assert_eq!(runs(), "0");
        governor.go_round(&OutOfReach);
        assert_eq!(runs(), "0");
    }

    #[test]
    fn what_stands_ready_goes_before_a_start_would_and_comes_back_later() {
        let capped = MemoryConfig { total: Some(Bytes::mib(1000)), ..MemoryConfig::default() };
        let (_proc, governor) = governor(4000, 3000, capped);
        assert!(!governor.is_short() && governor.has_room_for(Bytes::mib(48)));
        let stock = |mib| StockReport { ready: 1, ready_memory: Bytes::mib(mib), ..StockReport::default() };
        // Between both, what is there stays and no more is made.
        governor.note_stock(stock(900));
        assert!(!governor.is_short() && !governor.has_room_for(Bytes::mib(48)));
        // So it is while somebody comes up: who has nothing yet will.
        governor.admit(&spec(1, Virtualizer::Container, Bytes::gib(1))).unwrap();
        governor.admit(&spec(2, Virtualizer::Container, Bytes::gib(1))).unwrap();
        governor.note_stock(stock(910));
        assert!(governor.is_short());
        governor.note_stock(StockReport::default());
        assert!(governor.has_room_for(Bytes::mib(48)));
    }

    #[test]
    fn a_host_that_does_not_say_refuses_nobody() {
        let (proc, governor) = governor(100, 1, MemoryConfig::default());
        std::fs::remove_file(proc.path().join("meminfo")).unwrap();
        governor.admit(&spec(1, Virtualizer::Container, Bytes::gib(1))).unwrap();
        assert!(governor.report().is_none());
        assert!(governor.is_short(), "nothing is made there that nobody has asked for");
    }

    #[test]
    fn whoever_looks_at_it_comes_before_what_it_does() {
        assert_eq!(activity(true, true, false), Activity::Attended);
        assert_eq!(activity(false, false, true), Activity::Working);
        assert_eq!(activity(false, true, true), Activity::Idle);
        assert_eq!(activity(false, false, false), Activity::Idle);
    }
}
