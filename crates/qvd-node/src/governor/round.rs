//! One round: measure, decide, act.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, MutexGuard, TryLockError},
    time::{Duration, Instant},
};

use qvd_core::{Bytes, DesktopId, Virtualizer};
use qvd_virt::memory::{Activity, Decision, Guest, HostState, Ksm, MergeCost, Request, Share, Tenant, decide};

use super::{DesktopMemory, Governor, MemoryReport, StockReport, activity, lock, sharing::Sharing};
use crate::desktop::Desktop;

/// Least that is worth asking back.
const RECLAIM_LEAST: u64 = 1 << 20;

/// Least time over which it is told whether programs work.
const BUSY_OVER: Duration = Duration::from_secs(2);

/// How long one that did not answer is left alone: it may hold up whoever wants
/// to stop it for as long as a question may take.
const SILENT_FOR: Duration = Duration::from_secs(60);

/// A desktop as it was measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured {
    pub(crate) guest: Guest,
    /// What it has of the host's memory.
    pub(crate) resident: Bytes,
}

impl Measured {
    /// One that has nothing yet and is owed its minimum.
    pub(super) const fn starting(id: DesktopId, request: Request) -> Self {
        let Request { minimum, maximum } = request;
        let none = Bytes::new(0);
        let guest = Guest {
            id,
            tenant: Tenant(0),
            minimum,
            maximum,
            current: none,
            used: none,
            activity: Activity::Working,
            balloon: false,
            mergeable: false,
        };
        Self { guest, resident: none }
    }
}

/// What is remembered of a desktop.
#[derive(Debug, Default)]
struct Seen {
    /// When its processor time was looked at, and what that was.
    at: Option<(Instant, Duration)>,
    /// Whether its programs work.
    busy: bool,
    /// What its balloon was told.
    target: Option<Bytes>,
    /// What its balloon leaves it, if that can be moved now.
    left: Option<Bytes>,
    /// Whether it stood still when it was measured.
    resting: bool,
    /// Whether it lets its pages be merged.
    merges: bool,
    reclaimed: Bytes,
    profit: Option<i64>,
    silent_until: Option<Instant>,
}

impl Seen {
    /// Takes note of the processor time that it has used: whether that is more
    /// than `busy_percent` of one. One that is new works.
    fn work(&mut self, used: Duration, busy_percent: u32) {
        let now = Instant::now();
        match self.at {
            // The kernel counts in hundredths of a second.
            Some((at, _)) if now.duration_since(at) < BUSY_OVER => return,
            Some((at, before)) => {
                let share = used.saturating_sub(before).as_secs_f64() / now.duration_since(at).as_secs_f64();
                self.busy = share * 100.0 > f64::from(busy_percent);
            }
            None => self.busy = true,
        }
        self.at = Some((now, used));
    }
}

/// What is remembered from one round to the next.
#[derive(Debug)]
pub(crate) struct Round {
    ksm: Result<Ksm, String>,
    sharing: Arc<Sharing>,
    /// Whether equal pages are looked for at the moment.
    merging: bool,
    seen: HashMap<DesktopId, Seen>,
    /// What was logged of the host last, so that it is not said every time.
    told: Option<String>,
    /// Whether the host's settings were put back: they stay so.
    closed: bool,
}

impl Round {
    pub(super) fn new(ksm: Result<Ksm, qvd_virt::Error>, note: &Path) -> Self {
        let opened = ksm.and_then(|ksm| Ok((ksm, Sharing::open(note)?)));
        let (ksm, sharing) =
            opened.map_or_else(|error| (Err(error), Sharing::none(note)), |(ksm, sharing)| (Ok(ksm), sharing));
        let ksm = ksm.map_err(|error| qvd_core::causes(&error).join(": "));
        if let Err(why) = &ksm {
            tracing::info!(why, "equal pages are not merged");
        }
        Self { ksm, sharing: Arc::new(sharing), merging: false, seen: HashMap::new(), told: None, closed: false }
    }

    /// Whose desktops share pages.
    pub(super) fn sharing(&self) -> Arc<Sharing> {
        Arc::clone(&self.sharing)
    }

    pub(super) fn close(&mut self) -> Result<(), qvd_virt::Error> {
        self.closed = true;
        self.ksm.as_mut().map_or(Ok(()), Ksm::close)?;
        self.sharing.close()
    }

    fn cost(&self) -> Option<MergeCost> {
        let cost = self.ksm.as_ref().ok()?.cost();
        cost.inspect_err(|error| tracing::debug!(%error, "cost of merging not known")).ok()
    }
}

/// A desktop that a round reaches.
pub(crate) struct Reached<'a> {
    pub(crate) desktop: &'a mut Desktop,
    pub(crate) attached: bool,
    pub(crate) resting: bool,
}

/// Lets a round at one desktop at a time, if it runs and nobody else works on it.
pub(crate) trait Desktops {
    fn all(&self) -> Vec<DesktopId>;
    /// Ends the machines that stand ready for nobody.
    fn release_stock(&self);
    fn with(&self, id: DesktopId, work: &mut dyn FnMut(Reached<'_>));
}

impl Governor {
    /// Measures, decides and acts. What fails at one desktop is logged and does
    /// not keep the others from theirs.
    pub(crate) fn go_round(&self, desktops: &dyn Desktops) {
        self.work(self.round(), desktops);
    }

    /// The same for whoever must not wait: not if somebody goes round already.
    pub(crate) fn go_round_unless_busy(&self, desktops: &dyn Desktops) {
        if let Some(round) = self.free_round() {
            self.work(round, desktops);
        }
    }

    fn work(&self, mut round: MutexGuard<'_, Round>, desktops: &dyn Desktops) {
        for id in desktops.all() {
            desktops.with(id, &mut |reached| self.measure(&mut round, reached));
        }
        // Nobody misses those: nothing is asked of a desktop while there are any.
        if lock(&self.stock).ready > 0 && self.is_short() {
            desktops.release_stock();
        }
        let starting = lock(&self.starting).clone();
        let all: Vec<Measured> = self.guests(&starting).into_values().collect();
        let held = all.iter().map(|one| one.resident.get()).sum();
        let mut host = match self.host(held) {
            Ok(host) => host,
            Err(error) => {
                round.say(format!("memory cannot be shared out: {}", qvd_core::causes(&error).join(": ")));
                return;
            }
        };
        let cost = round.cost();
        host.merging = cost.as_ref().and_then(MergeCost::merging);
        host.merging_tenant = round.sharing.now();
        // What those take that are coming up is as good as gone.
        let coming: u64 = starting.values().map(|request| request.minimum.get()).sum();
        let seen = HostState { available: Bytes::new(host.available.get().saturating_sub(coming)), ..host };
        let guests: Vec<Guest> = all.iter().map(|one| one.guest).collect();
        let decision = decide(&seen, &guests);
        round.merge(&decision);
        for share in &decision.guests {
            desktops.with(share.id, &mut |reached| round.act(reached, share, decision.merge.run));
        }
        *lock(&self.report) = Some(report(&host, &all, &round, *lock(&self.stock)));
    }

    /// Takes note of what a desktop has, on its own; not if somebody goes round,
    /// who does that too.
    pub(crate) fn look(&self, desktops: &dyn Desktops, id: DesktopId) {
        if let Some(mut round) = self.free_round() {
            desktops.with(id, &mut |reached| self.measure(&mut round, reached));
        }
    }

    /// What is remembered of those that are not gone.
    fn round(&self) -> MutexGuard<'_, Round> {
        self.without_gone(lock(&self.round))
    }

    /// The same, if nobody has it.
    fn free_round(&self) -> Option<MutexGuard<'_, Round>> {
        match self.round.try_lock() {
            Ok(round) => Some(self.without_gone(round)),
            Err(TryLockError::Poisoned(poisoned)) => Some(self.without_gone(poisoned.into_inner())),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn without_gone<'a>(&self, mut round: MutexGuard<'a, Round>) -> MutexGuard<'a, Round> {
        for id in lock(&self.gone).drain(..) {
            round.seen.remove(&id);
        }
        round
    }

    fn measure(&self, round: &mut Round, reached: Reached<'_>) {
        let Reached { desktop, attached, resting } = reached;
        let id = desktop.id();
        let tenant = round.sharing.number(&desktop.spec.tenant);
        let merging = round.merging;
        let seen = round.seen.entry(id).or_default();
        // What stands still takes no more than it did, and less only while it is merged.
        let still = resting && seen.resting && seen.reclaimed.get() == 0;
        let still = still && !(merging && desktop.machine.is_mergeable());
        if still || seen.silent_until.is_some_and(|until| Instant::now() < until) {
            return;
        }
        let usage = match desktop.machine.memory(resting) {
            Ok(usage) => usage,
            Err(error) => {
                tracing::info!(desktop = %id, error, "its memory is not known");
                seen.silent_until = Some(Instant::now() + SILENT_FOR);
                return;
            }
        };
        seen.work(desktop.cpu_time(), desktop.rest.busy_percent);
        (seen.left, seen.resting) = (usage.left, resting);
        let request = self.config.request(&desktop.spec);
        let (minimum, maximum) = (request.minimum, request.maximum);
        let guest = Guest {
            id,
            tenant,
            // One at rest is owed what it has: the rest is in swap, or will be read.
            minimum: if resting { minimum.min(usage.resident) } else { minimum },
            maximum,
            current: usage.left.unwrap_or(usage.used).min(maximum),
            used: usage.used.min(usage.left.unwrap_or(maximum)),
            activity: activity(attached, resting, seen.busy),
            balloon: usage.left.is_some(),
            mergeable: desktop.machine.is_mergeable(),
        };
        // Nobody has a profit that stands still, and a machine none that was not told to merge.
        let shares = guest.mergeable && (seen.merges || desktop.spec.virtualizer == Virtualizer::Container);
        let profit = (merging && shares).then(|| desktop.machine.container().merge_profit().ok()).flatten();
        seen.profit = profit.map(|profit| profit.profit_bytes);
        self.note(Measured { guest, resident: usage.resident });
    }
}

impl Round {
    /// Says something about the host once, until something else is to be said.
    fn say(&mut self, what: String) {
        if self.told.as_ref() != Some(&what) {
            tracing::warn!("{what}");
            self.told = Some(what);
        }
    }

    /// Starts, steers or stops the kernel's merging.
    fn merge(&mut self, decision: &Decision) {
        let (Ok(ksm), false) = (&mut self.ksm, self.closed) else { return };
        self.merging = decision.merge.run;
        let chosen = if decision.merge.run { self.sharing.choose(decision.merge.tenant) } else { Ok(()) };
        if let Err(error) = chosen.and_then(|()| ksm.apply(decision.merge)) {
            self.say(format!("equal pages are not merged as they should: {}", qvd_core::causes(&error).join(": ")));
        }
    }

    fn act(&mut self, reached: Reached<'_>, share: &Share, merge: bool) {
        let Reached { desktop, resting, .. } = reached;
        let id = share.id;
        let Some(seen) = self.seen.get_mut(&id) else { return };
        seen.reclaimed = Bytes::new(0);
        if seen.silent_until.is_some_and(|until| Instant::now() < until) {
            return;
        }
        let failed = |what: &str, error: crate::machine::Failure| tracing::info!(desktop = %id, error, "{what}");
        // One that stands still would not answer.
        if let Some(balloon) = desktop.machine.balloon().filter(|_| !resting) {
            if merge && self.ksm.is_ok() && !self.closed && !seen.merges {
                let shares = self.sharing.let_share(id, &desktop.spec.tenant, false);
                let merged = shares.map_err(Into::into).and_then(|shares| {
                    if shares {
                        balloon.merge()?;
                    }
                    Ok(shares)
                });
                match merged {
                    Ok(shares) => seen.merges = shares,
                    Err(error) => failed("its pages are not merged", error),
                }
            }
            let asked = [seen.left, seen.target].contains(&Some(share.target));
            if seen.left.is_some() && !asked {
                match balloon.leave(share.target) {
                    Ok(()) => seen.target = Some(share.target),
                    Err(error) => failed("its balloon does not move", error),
                }
            }
        }
        if share.reclaim.get() >= RECLAIM_LEAST {
            match desktop.machine.container().reclaim(share.reclaim) {
                Ok(()) => seen.reclaimed = share.reclaim,
                Err(error) => failed("it keeps its memory", error.into()),
            }
        }
    }
}

fn report(host: &HostState, all: &[Measured], round: &Round, stock: StockReport) -> MemoryReport {
    let desktops = all.iter().map(|one| {
        let Measured { guest, resident } = *one;
        let seen = round.seen.get(&guest.id);
        DesktopMemory {
            id: guest.id,
            activity: match guest.activity {
                Activity::Idle => "idle",
                Activity::Working => "working",
                Activity::Attended => "attended",
            }
            .to_owned(),
            minimum: guest.minimum,
            maximum: guest.maximum,
            resident,
            used: guest.used,
            balloon: guest.balloon.then_some(guest.current),
            target: seen.and_then(|seen| seen.target).filter(|_| guest.balloon),
            reclaimed: seen.map_or(Bytes::new(0), |seen| seen.reclaimed),
            merge_profit_bytes: seen.and_then(|seen| seen.profit),
        }
    });
    MemoryReport {
        total: host.total,
        available: host.available,
        swap: host.swap,
        pressure_percent: host.pressure_percent,
        merging: round.cost(),
        not_merging: round.ksm.as_ref().err().cloned(),
        stock,
        desktops: desktops.collect(),
    }
}
