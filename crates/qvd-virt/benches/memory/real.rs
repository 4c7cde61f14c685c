//! Four idle machines, then merging; a hungry one, then the balloon.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use qvd_core::{Bytes, DesktopId};
use qvd_virt::memory::{Activity, Decision, Guest, HostState, KSM_DIR, Ksm, Merging, Tenant, decide};

use crate::{
    guest::{Guest as Machine, Guests, with_guests},
    picture::{self, Point},
};

const MEMORY: Bytes = Bytes::mib(256);
const MINIMUM: Bytes = Bytes::mib(96);

/// What the hungry one writes to files in memory.
const HUNGER_MIB: u64 = 120;

/// From one look to the next.
const STEP: Duration = Duration::from_millis(500);

/// Longest part.
const PART: Duration = Duration::from_secs(120);

/// Rounds over all pages in which what is equal is found: the first only
/// remembers.
const FOUND: u64 = 3;

/// What is measured, and the policy that is asked meanwhile.
struct Watch {
    began: Instant,
    guests: Vec<Machine>,
    ksm: Option<Ksm>,
    /// All the memory that the policy is told of.
    total: Bytes,
    cpu_before_ms: u64,
    points: Vec<Point>,
}

pub fn measure(picture: Option<&Path>) {
    with_guests(|guests| {
        let note = guests.path("ksm.json");
        let ksm = Ksm::open(Path::new(KSM_DIR), &note);
        if let Err(error) = &ksm {
            println!("merging is left out: {error}");
        }
        let mut watch = Watch::begin(guests, ksm.ok());
        watch.work();
        if let Some(mut ksm) = watch.ksm.take() {
            ksm.close().unwrap();
        }
        let points = watch.end();
        if let Some(picture) = picture {
            std::fs::write(picture, picture::draw(&points)).unwrap();
        }
    });
}

impl Watch {
    fn begin(guests: &Guests<'_>, ksm: Option<Ksm>) -> Self {
        let machines = (1..=4).map(|number| {
            let mut spec = guests.spec(number);
            spec.limits.memory = MEMORY;
            let mut guest = guests.boot(guests.bed.qemu.start(spec).unwrap());
            guest.vm.report_use(Duration::from_secs(1)).unwrap();
            guest
        });
        let guests: Vec<_> = machines.collect();
        // What they freed while they came up is the host's after two seconds.
        thread::sleep(Duration::from_secs(4));
        let cpu_before_ms = ksm.as_ref().and_then(|ksm| ksm.cost().ok()?.cpu_ms).unwrap_or(0);
        let (began, total) = (Instant::now(), Bytes::new(0));
        Self { began, guests, ksm, total, cpu_before_ms, points: Vec::new() }
    }

    fn work(&mut self) {
        let idle = self.look("four idle machines");
        self.rest(Duration::from_secs(5));

        // Memory for three quarters of what they have: merging is needed.
        self.total = Bytes::new(self.resident() / 4 * 3);
        for guest in &mut self.guests {
            guest.vm.allow_merging(true).unwrap();
        }
        self.until_settled(true, false);
        let merged = self.look("then merging");

        let much = format!(
            "mount -t tmpfs -o size={HUNGER_MIB}m none /tmp && dd if=/dev/urandom of=/tmp/much bs=1M count={HUNGER_MIB}"
        );
        let _ended = self.guests[3].try_sh(&much);
        let hungry = self.look("then a hungry one");
        self.rest(Duration::from_secs(3));

        self.until_settled(true, true);
        let ballooned = self.look("then the balloon");
        let cost = self.ksm.as_ref().map(|ksm| ksm.cost().unwrap());
        for (what, point) in [("idle", idle), ("merged", merged), ("hungry", hungry), ("ballooned", ballooned)] {
            println!(
                "{what:>10}: {:.0} MiB resident, {:.0} MiB left to guests, merging took {:.2} s of a processor",
                point.resident_mib, point.left_mib, point.cpu_s
            );
        }
        if let Some(cost) = cost {
            println!("{cost:?}");
        }
    }

    fn resident(&self) -> u64 {
        self.guests.iter().map(|guest| guest.vm.host_memory().unwrap().proportional.get()).sum()
    }

    /// What the machines have now.
    fn look(&mut self, phase: &'static str) -> Point {
        let (resident, mut left) = (self.resident(), 0);
        for guest in &mut self.guests {
            left += guest.vm.memory_left().unwrap().get();
        }
        let cpu_ms = self.ksm.as_ref().and_then(|ksm| ksm.cost().ok()?.cpu_ms).unwrap_or(self.cpu_before_ms);
        let mib = |bytes: u64| bytes as f64 / 1_048_576.0;
        let point = Point {
            phase,
            at_s: self.began.elapsed().as_secs_f64(),
            resident_mib: mib(resident),
            left_mib: mib(left),
            cpu_s: cpu_ms.saturating_sub(self.cpu_before_ms) as f64 / 1000.0,
        };
        self.points.push(point);
        point
    }

    fn rest(&mut self, time: Duration) {
        let phase = self.points.last().unwrap().phase;
        let until = Instant::now() + time;
        while Instant::now() < until {
            thread::sleep(STEP);
            self.look(phase);
        }
    }

    /// Lets the policy work until nothing changes any more for some seconds.
    fn until_settled(&mut self, merge: bool, balloon: bool) {
        let phase = if balloon { "then the balloon" } else { "then merging" };
        let (until, mut quiet, mut before) = (Instant::now() + PART, 0, f64::INFINITY);
        let scans = |ksm: &Option<Ksm>| ksm.as_ref().map_or(u64::MAX, |ksm| ksm.cost().unwrap().full_scans);
        let all_seen = scans(&self.ksm).saturating_add(FOUND);
        while Instant::now() < until && (quiet < 8 || scans(&self.ksm) < all_seen) {
            let decision = self.decide();
            if let Some(ksm) = self.ksm.as_mut().filter(|_| merge) {
                ksm.apply(decision.merge).unwrap();
            }
            if balloon {
                for (guest, share) in self.guests.iter_mut().zip(&decision.guests) {
                    guest.vm.balloon(share.target).unwrap();
                }
            }
            thread::sleep(STEP);
            let now = self.look(phase).resident_mib;
            quiet = if (now - before).abs() < 1.0 { quiet + 1 } else { 0 };
            before = now;
        }
    }

    /// What the governor decides for a host that has `total` and nothing else.
    fn decide(&mut self) -> Decision {
        let merging = self.ksm.as_ref().and_then(|ksm| ksm.cost().unwrap().merging());
        let host = HostState {
            total: self.total,
            available: Bytes::new(self.total.get().saturating_sub(self.resident())),
            swap: Bytes::new(0),
            promises: None,
            pressure_percent: 0,
            merging,
            merging_tenant: merging.map(|_: Merging| Tenant(0)),
        };
        let guests = (1..).zip(&mut self.guests).map(|(number, guest)| {
            let current = guest.vm.memory_left().unwrap();
            let used = guest.vm.guest_use().unwrap().map_or(current, |seen| seen.used());
            Guest {
                id: DesktopId::new(number).unwrap(),
                tenant: Tenant(0),
                minimum: MINIMUM,
                maximum: MEMORY,
                current,
                used: used.min(current),
                activity: if number == 4 { Activity::Working } else { Activity::Idle },
                balloon: true,
                mergeable: true,
            }
        });
        decide(&host, &guests.collect::<Vec<_>>())
    }

    fn end(self) -> Vec<Point> {
        self.guests.into_iter().for_each(Machine::close);
        self.points
    }
}
