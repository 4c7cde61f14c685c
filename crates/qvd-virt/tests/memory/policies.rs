//! Ours, and those that others use.

use qvd_core::{Bytes, DesktopId};
use qvd_virt::memory::{Activity, Guest, HostState, Merge as OurMerge, Merging, Tenant, decide};

use crate::world::{Merge, Order, Policy, QEMU, Seen};

/// Nobody does anything: what the kernel and the guests do by themselves.
#[derive(Debug)]
pub struct Nothing;

impl Policy for Nothing {
    fn name(&self) -> &'static str {
        "nothing"
    }

    fn every(&self) -> usize {
        usize::MAX
    }

    fn decide(&mut self, _: &Seen) -> (Vec<Order>, Option<Merge>) {
        (Vec::new(), None)
    }
}

/// The governor of this crate.
#[derive(Debug)]
pub struct Ours;

fn bytes(mib: f64) -> Bytes {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "amounts of memory")]
    Bytes::new((mib.max(0.0) * 1_048_576.0) as u64)
}

fn mib(bytes: Bytes) -> f64 {
    bytes.get() as f64 / 1_048_576.0
}

impl Policy for Ours {
    fn name(&self) -> &'static str {
        "qvd"
    }

    fn every(&self) -> usize {
        5
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers")]
    fn decide(&mut self, seen: &Seen) -> (Vec<Order>, Option<Merge>) {
        let merging = seen
            .merge
            .map(|_| Merging { full_scans: seen.full_scans as u64, profit_bytes: (seen.merged * 1_048_576.0) as i64 });
        let host = HostState {
            total: bytes(seen.total),
            available: bytes(seen.available),
            swap: bytes(seen.swap_free),
            promises: None,
            pressure_percent: seen.pressure_percent as u8,
            merging,
            merging_tenant: merging.map(|_| Tenant(0)),
        };
        let guests = (1..).zip(&seen.guests).map(|(number, guest)| Guest {
            id: DesktopId::new(number).unwrap(),
            tenant: Tenant(0),
            minimum: bytes(guest.minimum),
            maximum: bytes(guest.maximum),
            current: bytes(guest.current),
            used: bytes(guest.used),
            activity: match (guest.attended, guest.busy) {
                (true, _) => Activity::Attended,
                (_, true) => Activity::Working,
                _ => Activity::Idle,
            },
            balloon: true,
            mergeable: true,
        });
        let decision = decide(&host, &guests.collect::<Vec<_>>());
        let orders =
            decision.guests.iter().map(|share| Order { target: mib(share.target), reclaim: mib(share.reclaim) });
        let merge = decision.merge;
        let (pages_to_scan, sleep_ms) = (f64::from(merge.pages_to_scan), f64::from(OurMerge::SLEEP_MS));
        (orders.collect(), merge.run.then_some(Merge { pages_to_scan, sleep_ms }))
    }
}

/// Tunes merging as oVirt's MOM (`doc/ksm.rules`) and the `ksmtuned` that
/// Proxmox installs do: less than a fifth free, 300 pages more each time, else 50
/// less; a pause of 10 ms for each 16 GiB of the host's memory, the other way round.
#[derive(Debug, Default)]
struct KsmTuned {
    pages: f64,
}

impl KsmTuned {
    fn decide(&mut self, seen: &Seen) -> Option<Merge> {
        let committed: f64 = seen.guests.iter().map(|guest| guest.current + QEMU).sum();
        let threshold = seen.total * 0.2;
        let need = seen.available < threshold;
        self.pages = (self.pages + if need { 300.0 } else { -50.0 }).clamp(64.0, 1250.0);
        let run = need || committed + threshold > seen.total;
        run.then_some(Merge { pages_to_scan: self.pages, sleep_ms: 10.0 * 16384.0 / seen.total })
    }
}

/// oVirt's MOM (`doc/balloon.rules`), where the means of ten samples are taken
/// as what is. Its floor is the minimum, which the version read does not keep.
#[derive(Debug, Default)]
pub struct Mom(KsmTuned);

impl Policy for Mom {
    fn name(&self) -> &'static str {
        "MOM"
    }

    fn every(&self) -> usize {
        10
    }

    fn decide(&mut self, seen: &Seen) -> (Vec<Order>, Option<Merge>) {
        let free = seen.available / seen.total;
        let order = |guest: &crate::world::SeenGuest| {
            let target = if free < 0.2 {
                let wanted = if free <= 0.05 { free - 0.05 } else { free };
                let floor = guest.minimum.max(guest.used + wanted * guest.current);
                (guest.current * 0.95).max(floor).min(guest.current)
            } else {
                let floor = guest.minimum.max(guest.used + 0.2 * guest.current);
                (guest.current * 1.05).max(floor).min(guest.maximum)
            };
            let worth_it = (target - guest.current).abs() > 0.0025 * guest.current;
            Order { target: if worth_it { target } else { guest.current }, reclaim: 0.0 }
        };
        (seen.guests.iter().map(order).collect(), self.0.decide(seen))
    }
}

/// Proxmox VE (`PVE/AutoBalloon.pm`, called with a goal of four fifths of the
/// memory by `pvestatd`, every ten seconds). All guests have the same shares.
#[derive(Debug, Default)]
pub struct Proxmox(KsmTuned);

/// Most that it moves a balloon at once, and least that it cares for, in MiB.
const STEP: f64 = 100.0;
const BAND: f64 = 10.0;

impl Policy for Proxmox {
    fn name(&self) -> &'static str {
        "Proxmox"
    }

    fn every(&self) -> usize {
        10
    }

    fn decide(&mut self, seen: &Seen) -> (Vec<Order>, Option<Merge>) {
        let goal = seen.available - seen.total * 0.2;
        let mut targets: Vec<f64> = seen.guests.iter().map(|guest| guest.current).collect();
        let free = |index: &usize| {
            let guest = &seen.guests[*index];
            guest.current - guest.used - guest.cached > guest.minimum * 0.25
        };
        let all: Vec<usize> = (0..seen.guests.len()).collect();
        let (with_free, pressed): (Vec<usize>, Vec<usize>) = all.iter().copied().partition(free);
        if goal.abs() > BAND {
            let first = if goal > 0.0 { &pressed } else { &with_free };
            let moved = share_out(seen, &mut targets, first, goal);
            if moved == 0.0 {
                share_out(seen, &mut targets, &all, goal);
            }
        }
        let orders = targets.into_iter().map(|target| Order { target, reclaim: 0.0 });
        (orders.collect(), self.0.decide(seen))
    }
}

/// Gives or takes `goal` in equal parts above the minimum, until all have what
/// they may have or have been moved as far as they may be. Returns how much.
fn share_out(seen: &Seen, targets: &mut [f64], who: &[usize], goal: f64) -> f64 {
    let mut left = goal;
    let mut open: Vec<usize> = who.to_vec();
    while left.abs() >= 1.0 && !open.is_empty() {
        let above: f64 = open.iter().map(|&index| targets[index] - seen.guests[index].minimum).sum();
        let each = (above + left) / open.len() as f64;
        let mut moved = 0.0;
        open.retain(|&index| {
            let guest = &seen.guests[index];
            let desired = (guest.minimum + each).clamp(guest.minimum, guest.maximum);
            let wanted = (desired - guest.current).clamp(-STEP, STEP);
            if wanted * goal <= 0.0 {
                return false;
            }
            let change = guest.current + wanted - targets[index];
            targets[index] += change;
            moved += change;
            change != 0.0
        });
        left -= moved;
        if moved == 0.0 {
            break;
        }
    }
    goal - left
}
