//! Hosts to try policies on, made of what was recorded.

use std::collections::BTreeMap;

use crate::{
    load::{Load, recorded},
    policies::{Mom, Nothing, Ours, Proxmox},
    world::{Guest, Outcome, Policy, World},
};

/// Seconds that each is let run.
pub const SECONDS: usize = 1800;

/// What each desktop may have, in MiB: a quarter more than the recorded one
/// ever used.
const MAXIMUM: f64 = 320.0;

/// A host by name.
pub struct Scenario {
    pub name: &'static str,
    pub world: World,
}

/// Some desktops that work, one of them with much, and others that nobody uses.
pub fn scenarios() -> Vec<Scenario> {
    let loads = recorded();
    let of = |name: &str| loads.get(name).unwrap();
    let guests = desktops(&loads, 24);
    // What they need on average, and at the worst moment that could be.
    let mean: f64 = guests.iter().map(|guest| guest.load.mean() + crate::world::QEMU).sum();
    let own = 400.0;
    let host = |name, total: f64, guests: &[Guest]| {
        let world = World { total, own, swap: total / 2.0, guests: guests.to_vec() };
        Scenario { name, world }
    };
    // All at once want what the hungry one wants.
    let mut rush: Vec<Guest> = (0..24).map(|number| Guest::new(of("hungry"), number, MAXIMUM)).collect();
    rush.iter_mut().take(4).for_each(|guest| guest.attended = true);
    let rush_total = own + rush.iter().map(|guest| (guest.load.mean() + guest.load.peak()) / 2.0).sum::<f64>();
    vec![
        host("roomy", (own + mean) * 2.0, &guests),
        host("tight", (own + mean) * 1.15, &guests),
        host("short", (own + mean) * 0.95, &guests),
        host("rush", rush_total, &rush),
    ]
}

/// Of eight, four are idle, three are used and one is hungry; each began at
/// another time.
fn desktops(loads: &BTreeMap<String, Load>, count: usize) -> Vec<Guest> {
    let one = |number: usize| {
        let name = match number % 8 {
            0..4 => "idle",
            7 => "hungry",
            _ => "office",
        };
        let mut guest = Guest::new(&loads[name], number * 37, MAXIMUM);
        guest.attended = number % 8 == 5;
        guest
    };
    (0..count).map(one).collect()
}

/// What all policies come to on a host.
pub fn outcomes(world: &World) -> Vec<(&'static str, Outcome)> {
    let policies: [Box<dyn Policy>; 4] =
        [Box::new(Nothing), Box::new(Mom::default()), Box::new(Proxmox::default()), Box::new(Ours)];
    let run = |mut policy: Box<dyn Policy>| (policy.name(), world.clone().run(&mut *policy, SECONDS));
    policies.into_iter().map(run).collect()
}

/// The outcomes as a table.
pub fn table(scenario: &Scenario) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    let World { total, guests, .. } = &scenario.world;
    let _written = writeln!(text, "{} ({} guests on {total:.0} MiB)", scenario.name, guests.len());
    let _written = writeln!(
        text,
        "{:>10} {:>8} {:>10} {:>11} {:>9} {:>10} {:>9} {:>8} {:>8} {:>6}",
        "policy",
        "short s",
        "host short",
        "guest short",
        "paged in",
        "cache lost",
        "reclaimed",
        "cpu s/h",
        "commands",
        "turns"
    );
    for (name, outcome) in outcomes(&scenario.world) {
        let Outcome { short_s, host_short, guest_short, paged_in, cache_lost, reclaimed, merge_cpu_s, commands, turns } =
            outcome;
        let _written = writeln!(
            text,
            "{name:>10} {short_s:>8.0} {host_short:>10.1} {guest_short:>11.1} {paged_in:>9.0} {cache_lost:>10.1} \
             {reclaimed:>9.0} {merge_cpu_s:>8.1} {commands:>8} {turns:>6}"
        );
    }
    text
}
