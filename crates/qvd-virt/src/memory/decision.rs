//! Sharing out the pool.

use std::collections::BTreeMap;

use qvd_core::Bytes;

use super::{Activity, Decision, Guest, HostState, Merge, Share, Tenant, reserve, spare};

/// Least change worth a command, in bytes.
const BAND: u64 = 4 << 20;

/// Most that a guest moves at once: a twentieth of its maximum, as oVirt's MOM
/// (`doc/balloon.rules`), but not less than this, or small guests never arrive.
const LEAST_STEP: u64 = 16 << 20;

/// Processor time to look at a page: 2.3 s for 262,144 pages, measured with
/// Linux 6.18 on 2 processors.
const SCAN_NS: u32 = 9_000;

/// Least and most processor time that merging may take, in thousandths of one.
const SCAN_MILLICPU: (u32, u32) = (20, 200);

/// Rounds over all pages after which merging would have won something: the first
/// remembers, the second merges, and one for what came in between.
const FRUITLESS: u64 = 3;

/// Says what each guest should have, and how equal pages are merged.
///
/// - No goal or target is below a guest's minimum; a target is outside its
///   limits only while a guest that is outside already is on its way back.
/// - Who has no balloon keeps what it has, or is owed its minimum.
/// - Targets and what is left make up the pool: nothing is given twice.
/// - Growth is given from what is free now, never from what others have only
///   been asked to give up; a guest below its minimum alone does not wait.
/// - With the same demand and pressure, guests go straight to their goals and
///   stay there.
/// - With more pressure no goal, and no sum of targets, is greater.
#[must_use]
pub fn decide(host: &HostState, guests: &[Guest]) -> Decision {
    let spare = spare(host);
    let held: i128 = guests.iter().map(|guest| i128::from(guest.current.get())).sum();
    let pool = held + spare;
    let goals = goals(pool, guests);
    let targets = steps(spare, guests, &goals);
    let reclaims = reclaims(spare, host.swap, guests);
    let left = pool - targets.iter().map(|&target| i128::from(target)).sum::<i128>();
    let shares = guests.iter().zip(goals).zip(targets).zip(reclaims);
    let guests_out = shares.map(|(((guest, goal), target), reclaim)| Share {
        id: guest.id,
        goal: Bytes::new(goal),
        target: Bytes::new(target),
        reclaim: Bytes::new(reclaim),
    });
    Decision { guests: guests_out.collect(), left, merge: merge(host, guests) }
}

/// Fills in layers: what everybody is owed; what those need that somebody looks
/// at, and a quarter more; the same for those at work; what idle ones still
/// hold; and then caches for all. A layer that the pool does not fill is filled
/// in proportion.
fn goals(pool: i128, guests: &[Guest]) -> Vec<u64> {
    let mut levels: Vec<u64> = guests.iter().map(owed).collect();
    let mut rest = pool - levels.iter().map(|&level| i128::from(level)).sum::<i128>();
    let busy = |guest: &Guest, least: Activity| {
        let wanted = guest.used.get().saturating_add(guest.used.get() / 4);
        if guest.activity >= least { wanted } else { 0 }
    };
    let layers: [&dyn Fn(&Guest) -> u64; 4] = [
        &|guest| busy(guest, Activity::Attended),
        &|guest| busy(guest, Activity::Working),
        &|guest| guest.used.get(),
        &|guest| guest.maximum.get(),
    ];
    for layer in layers {
        let wanted = |(guest, level): (&Guest, &u64)| {
            let most = if guest.balloon { guest.maximum.get() } else { 0 };
            layer(guest).min(most).saturating_sub(*level)
        };
        let gaps: Vec<u64> = guests.iter().zip(&levels).map(wanted).collect();
        let given = portions(rest, &gaps);
        for (level, given) in levels.iter_mut().zip(given) {
            *level += given;
            rest -= i128::from(given);
        }
    }
    levels
}

/// What a guest has whatever the others need.
fn owed(guest: &Guest) -> u64 {
    if guest.balloon { guest.minimum.get() } else { guest.current.get().max(guest.minimum.get()) }
}

/// As much of each of `parts` as `amount` allows, in proportion. The remainder
/// of the division, less than a byte for each, is nobody's.
fn portions(amount: i128, parts: &[u64]) -> Vec<u64> {
    let whole: i128 = parts.iter().map(|&part| i128::from(part)).sum();
    let amount = amount.clamp(0, whole);
    let portion = |&part: &u64| {
        // Not above the part itself, so it always fits.
        i128::from(part).checked_mul(amount).and_then(|product| product.checked_div(whole)).map_or(0, clamped)
    };
    parts.iter().map(portion).collect()
}

fn clamped(amount: i128) -> u64 {
    u64::try_from(amount.max(0)).unwrap_or(u64::MAX)
}

/// A step of each towards its goal. What is not needed is not moved for a
/// little: caches that come and go would have balloons follow them.
fn steps(spare: i128, guests: &[Guest], goals: &[u64]) -> Vec<u64> {
    let step = |guest: &Guest| (guest.maximum.get() / 20).max(LEAST_STEP);
    let growth = guests.iter().zip(goals).map(|(guest, goal)| {
        let more = goal.saturating_sub(guest.current.get());
        let needs = guest.used.get().saturating_add(guest.used.get() / 8) > guest.current.get();
        let worth_it = if needs { BAND } else { (guest.maximum.get() / 10).max(BAND) };
        if more < worth_it { 0 } else { more.min(step(guest)) }
    });
    let growth = portions(spare, &growth.collect::<Vec<_>>());
    let moved = guests.iter().zip(goals).zip(growth).map(|((guest, &goal), growth)| {
        let current = guest.current.get();
        let less = current.saturating_sub(goal);
        let worth_it = if spare < 0 { BAND } else { (guest.maximum.get() / 20).max(BAND) };
        if less < worth_it { current + growth } else { current - less.min(step(guest)) }
    });
    // Whoever is below its minimum gets that without regard to steps.
    moved.zip(guests).map(|(target, guest)| target.max(guest.minimum.get())).collect()
}

/// What idle guests give back at once when the host is short. Their targets
/// follow more slowly, and a balloon needs a guest that answers. Each keeps its
/// minimum: admission counts on the same amount.
fn reclaims(spare: i128, swap: Bytes, guests: &[Guest]) -> Vec<u64> {
    let above = |guest: &Guest| guest.used.get().saturating_sub(guest.minimum.get());
    let idle: Vec<u64> =
        guests.iter().map(|guest| if guest.activity == Activity::Idle { above(guest) } else { 0 }).collect();
    portions((-spare).min(i128::from(swap.get())), &idle)
}

/// Merging begins when less than a fifth of the memory is free, as with MOM,
/// and ends above three tenths beside what it has won itself, which is lost
/// again, page by page, without it. Where all pages were looked at [`FRUITLESS`] times and it costs
/// more than it saves, it goes on at the least pace: what guests do may change.
fn merge(host: &HostState, guests: &[Guest]) -> Merge {
    let total = host.total.get();
    let (begin, end) = (total / 5, total / 10 * 3);
    let free = host.available.get();
    let tenant = merging_tenant(host.merging_tenant, guests);
    let won = host.merging.map_or(0, |merging| u64::try_from(merging.profit_bytes).unwrap_or(0));
    let enough = if host.merging.is_some() { end.saturating_add(won) } else { begin };
    let need = free < enough || host.pressure_percent >= 10;
    let run = need && tenant.is_some();
    let fruitless = host.merging.is_some_and(|m| m.full_scans >= FRUITLESS && m.profit_bytes <= 0);
    // From the least at the beginning to the most when the reserve is touched.
    let floor = reserve(host).min(begin);
    let short = begin.saturating_sub(free.max(floor));
    let (least, most) = SCAN_MILLICPU;
    let span = u128::from(most - least) * u128::from(short);
    let more = span.checked_div(u128::from(begin - floor)).unwrap_or_else(|| u128::from(most - least));
    let more = if fruitless { 0 } else { u32::try_from(more).unwrap_or(most - least).min(most - least) };
    let millicpu = least + more;
    // Thousandths of a second per second are microseconds per millisecond.
    let pages_to_scan = millicpu * 1000 * Merge::SLEEP_MS / SCAN_NS;
    Merge { run, pages_to_scan: pages_to_scan.max(1), tenant }
}

/// The kernel merges all processes that allow it, whosever they are: so one
/// tenant's do. It stays the same while any of its desktops is left; then the
/// one with most in use follows, because there most is to be won.
fn merging_tenant(now: Option<Tenant>, guests: &[Guest]) -> Option<Tenant> {
    if let Some(tenant) = now
        && guests.iter().any(|guest| guest.tenant == tenant && guest.mergeable)
    {
        return Some(tenant);
    }
    let mut used: BTreeMap<Tenant, (u128, u32)> = BTreeMap::new();
    for guest in guests.iter().filter(|guest| guest.mergeable) {
        let (bytes, count) = used.entry(guest.tenant).or_default();
        *bytes += u128::from(guest.used.get());
        *count += 1;
    }
    // A single desktop of a tenant has nobody to share with.
    let several = used.into_iter().filter(|(_, (_, count))| *count > 1);
    several.max_by_key(|(_, (bytes, _))| *bytes).map(|(tenant, _)| tenant)
}
