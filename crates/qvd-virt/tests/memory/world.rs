//! A host and its guests, second by second, as far as memory goes.
//!
//! What is measured elsewhere is taken from there: how fast a balloon moves, what
//! it costs to look at a page, how much of idle guests is equal. What is not is
//! kept simple, and is the same for every policy.

use crate::load::{Load, Sample};

/// What QEMU takes beside its guest, in MiB.
pub const QEMU: f64 = 20.0;

/// How fast a balloon moves, in MiB/s: 256 MiB took half a second, by emulation.
const BALLOON_PER_S: f64 = 500.0;

/// How fast a guest fills its cache, in MiB/s.
const READS_PER_S: f64 = 50.0;

/// How fast a busy guest writes to pages that were merged: a hundredth of them
/// in a second.
const UNMERGES_PER_S: f64 = 0.01;

/// Processor time to look at a page, in seconds; measured as in the governor.
const SCAN_S: f64 = 9e-6;

const PAGES_PER_MIB: f64 = 256.0;

/// What of a page's place in swap is memory, where that is compressed.
const COMPRESSED: f64 = 0.25;

/// How the kernel merges pages.
#[derive(Debug, Clone, Copy)]
pub struct Merge {
    pub pages_to_scan: f64,
    pub sleep_ms: f64,
}

/// What a policy wants of a guest.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    /// What its balloon is to leave it, in MiB.
    pub target: f64,
    /// What is to be paged out at once, in MiB.
    pub reclaim: f64,
}

/// What a policy sees of a guest, in MiB.
#[derive(Debug, Clone, Copy)]
pub struct SeenGuest {
    pub minimum: f64,
    pub maximum: f64,
    pub current: f64,
    pub used: f64,
    pub cached: f64,
    pub busy: bool,
    pub attended: bool,
}

/// What a policy sees, in MiB.
#[derive(Debug, Clone)]
pub struct Seen {
    pub total: f64,
    pub available: f64,
    pub swap_free: f64,
    pub pressure_percent: f64,
    pub full_scans: f64,
    pub merged: f64,
    pub merge: Option<Merge>,
    pub guests: Vec<SeenGuest>,
}

/// Who decides.
pub trait Policy {
    fn name(&self) -> &'static str;
    /// Seconds from one decision to the next.
    fn every(&self) -> usize;
    fn decide(&mut self, seen: &Seen) -> (Vec<Order>, Option<Merge>);
}

/// A guest of the simulation.
#[derive(Debug, Clone)]
pub struct Guest {
    pub load: Load,
    /// Seconds by which it is ahead of the recording.
    pub ahead: usize,
    pub minimum: f64,
    pub maximum: f64,
    pub attended: bool,
    /// How much of what an idle one holds others hold too.
    pub equal: f64,
    current: f64,
    target: f64,
    cache: f64,
    merged: f64,
    paged_out: f64,
}

impl Guest {
    pub fn new(load: &Load, ahead: usize, maximum: f64) -> Self {
        let (minimum, load) = (maximum / 4.0, load.clone());
        let (current, target) = (maximum, maximum);
        let zero = 0.0;
        Self {
            load,
            ahead,
            minimum,
            maximum,
            attended: false,
            equal: 0.4,
            current,
            target,
            cache: zero,
            merged: zero,
            paged_out: zero,
        }
    }

    fn sample(&self, second: usize) -> Sample {
        self.load.at(second + self.ahead)
    }

    fn in_use(&self, sample: &Sample) -> f64 {
        sample.used.min(self.current)
    }

    fn resident(&self, sample: &Sample) -> f64 {
        (self.in_use(sample) + self.cache + QEMU - self.merged - self.paged_out).max(0.0)
    }
}

/// What a policy's work came to. Amounts are means over the whole time in MiB,
/// unless said otherwise.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    /// Seconds in which the host had to swap what guests were using.
    pub short_s: f64,
    /// How much it swapped in these.
    pub host_short: f64,
    /// What guests needed and their balloons did not leave them.
    pub guest_short: f64,
    /// What guests that are used had to wait for, because it had been paged out, in all.
    pub paged_in: f64,
    /// What guests would have cached and could not.
    pub cache_lost: f64,
    /// What they do not hold although they may: balloons, paged out, merged.
    pub reclaimed: f64,
    /// Processor time of merging, in seconds per hour.
    pub merge_cpu_s: f64,
    /// Commands to balloons.
    pub commands: u32,
    /// Times that a balloon turned round.
    pub turns: u32,
}

/// A host with `total` MiB, of which it needs `own` itself.
#[derive(Debug, Clone)]
pub struct World {
    pub total: f64,
    pub own: f64,
    pub swap: f64,
    pub guests: Vec<Guest>,
}

impl World {
    /// Lets `policy` decide for so many seconds.
    pub fn run(mut self, policy: &mut dyn Policy, seconds: usize) -> Outcome {
        let mut outcome = Outcome::default();
        let (mut pressure, mut scanned, mut merge) = (0.0, 0.0, None);
        let mut directions = vec![0.0_f64; self.guests.len()];
        for second in 0..seconds {
            let samples: Vec<_> = self.guests.iter().map(|guest| guest.sample(second)).collect();
            if second > 0 && second % policy.every() == 0 {
                let seen = self.seen(&samples, pressure, scanned, merge);
                let (orders, wanted) = policy.decide(&seen);
                if wanted.is_none() {
                    // All pages are taken apart again.
                    self.guests.iter_mut().for_each(|guest| guest.merged = 0.0);
                    scanned = 0.0;
                }
                merge = wanted;
                for ((guest, order), direction) in self.guests.iter_mut().zip(orders).zip(&mut directions) {
                    let change = order.target - guest.target;
                    if change != 0.0 {
                        outcome.commands += 1;
                        outcome.turns += u32::from(change * *direction < 0.0);
                        *direction = change.signum();
                    }
                    guest.target = order.target;
                    let idle = guest.sample(second).used - guest.paged_out;
                    guest.paged_out += order.reclaim.min(idle).max(0.0);
                }
            }
            self.guests_go_on(&samples, &mut outcome);
            if let Some(merge) = merge {
                scanned += self.scan(merge, &samples, &mut outcome);
            }
            let over = self.held(&samples) - self.total;
            if over > 0.0 {
                outcome.short_s += 1.0;
                outcome.host_short += over;
            }
            // Half of the time is spent waiting while anything is swapped.
            let waiting = if over > 0.0 { 50.0 } else { 0.0 };
            pressure += (waiting - pressure) * 0.1;
        }
        let time = seconds as f64;
        for amount in
            [&mut outcome.host_short, &mut outcome.guest_short, &mut outcome.cache_lost, &mut outcome.reclaimed]
        {
            *amount /= time;
        }
        outcome.merge_cpu_s *= 3600.0 / time;
        outcome
    }

    fn held(&self, samples: &[Sample]) -> f64 {
        let guests = self.guests.iter().zip(samples);
        self.own + guests.map(|(guest, sample)| guest.resident(sample) + guest.paged_out * COMPRESSED).sum::<f64>()
    }

    fn guests_go_on(&mut self, samples: &[Sample], outcome: &mut Outcome) {
        for (guest, sample) in self.guests.iter_mut().zip(samples) {
            let step = (guest.target - guest.current).clamp(-BALLOON_PER_S, BALLOON_PER_S);
            guest.current += step;
            outcome.guest_short += (sample.used - guest.current).max(0.0);
            let in_use = guest.in_use(sample);
            let wanted = sample.cached.min(guest.maximum - in_use).max(0.0);
            guest.cache = wanted.min(guest.current - in_use).min(guest.cache + READS_PER_S).max(0.0);
            outcome.cache_lost += wanted - guest.cache;
            if sample.busy || guest.attended {
                // It comes back for all of it.
                outcome.paged_in += guest.paged_out;
                guest.paged_out = 0.0;
                guest.merged *= 1.0 - UNMERGES_PER_S;
            }
            guest.paged_out = guest.paged_out.min(in_use);
            guest.merged = guest.merged.min(in_use * guest.equal);
            outcome.reclaimed += (guest.maximum - guest.current) + guest.paged_out * (1.0 - COMPRESSED) + guest.merged;
        }
    }

    /// A second of looking for equal pages; returns how much of all was seen.
    fn scan(&mut self, merge: Merge, samples: &[Sample], outcome: &mut Outcome) -> f64 {
        let round_s = merge.sleep_ms / 1000.0 + merge.pages_to_scan * SCAN_S;
        let pages = merge.pages_to_scan / round_s;
        outcome.merge_cpu_s += pages * SCAN_S;
        let all: f64 = self.guests.iter().zip(samples).map(|(guest, sample)| guest.in_use(sample) + guest.cache).sum();
        let part = pages / PAGES_PER_MIB / all.max(1.0);
        for (guest, sample) in self.guests.iter_mut().zip(samples) {
            // A page is merged when it is seen for the second time unchanged.
            let most = guest.in_use(sample) * guest.equal;
            guest.merged += (most - guest.merged).max(0.0) * (part / 2.0).min(1.0);
        }
        part
    }

    fn seen(&self, samples: &[Sample], pressure_percent: f64, full_scans: f64, merge: Option<Merge>) -> Seen {
        let cache: f64 = self.guests.iter().map(|guest| guest.cache).sum();
        let merged: f64 = self.guests.iter().map(|guest| guest.merged).sum();
        let paged_out: f64 = self.guests.iter().map(|guest| guest.paged_out).sum();
        let notes = if merge.is_some() { cache * 64.0 / 4096.0 } else { 0.0 };
        let guests = self.guests.iter().zip(samples).map(|(guest, sample)| SeenGuest {
            minimum: guest.minimum,
            maximum: guest.maximum,
            current: guest.current,
            used: guest.in_use(sample),
            cached: guest.cache,
            busy: sample.busy,
            attended: guest.attended,
        });
        Seen {
            total: self.total,
            available: (self.total - self.held(samples)).max(0.0),
            swap_free: self.swap - paged_out,
            pressure_percent,
            full_scans,
            merged: merged - notes,
            merge,
            guests: guests.collect(),
        }
    }
}
