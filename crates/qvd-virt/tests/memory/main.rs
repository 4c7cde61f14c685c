//! The memory governor beside what others use, on recorded loads. The bench
//! `memory` prints what is compared here.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, unreachable_pub)]

mod load;
mod policies;
mod scenarios;
mod world;

use std::collections::BTreeMap;

use scenarios::{outcomes, scenarios, table};
use world::Outcome;

/// What a user waits for, in MiB of a mean second: swapped by the host, missing
/// in a guest, or paged out and wanted back.
fn felt(outcome: &Outcome) -> f64 {
    outcome.host_short + outcome.guest_short + outcome.paged_in / scenarios::SECONDS as f64
}

#[test]
fn users_wait_no_longer_than_with_others_policies() {
    for scenario in scenarios() {
        let all: BTreeMap<_, _> = outcomes(&scenario.world).into_iter().collect();
        for other in ["nothing", "MOM", "Proxmox"] {
            assert!(felt(&all["qvd"]) <= felt(&all[other]) + 0.01, "{}", table(&scenario));
        }
    }
}

#[test]
fn a_host_with_room_is_left_alone() {
    let roomy = &scenarios()[0];
    let all: BTreeMap<_, _> = outcomes(&roomy.world).into_iter().collect();
    let ours = &all["qvd"];
    assert!(ours.commands == 0 && ours.merge_cpu_s == 0.0, "{}", table(roomy));
    assert!(felt(ours) == 0.0 && ours.cache_lost <= all["nothing"].cache_lost, "{}", table(roomy));
}

#[test]
fn one_that_is_steady_is_left_where_it_is() {
    // Idle ones all alike, and less memory than they have: everybody goes to
    // their place, and nobody turns round.
    let tight = &scenarios()[1];
    let mut world = tight.world.clone();
    let steady = world.guests[0].clone();
    world.guests.iter_mut().for_each(|guest| *guest = steady.clone());
    world.total = world.own + 24.0 * 45.0;
    let all: BTreeMap<_, _> = outcomes(&world).into_iter().collect();
    assert_eq!(all["qvd"].turns, 0, "{}", table(&scenarios::Scenario { name: "steady", world }));
}

#[test]
fn a_recording_is_what_its_lines_say() {
    let loads = load::recorded();
    assert!(["hungry", "idle", "office"].iter().all(|name| loads.contains_key(*name)), "{:?}", loads.keys());
    assert!(loads["hungry"].peak() > loads["idle"].peak() && loads["idle"].mean() > 0.0);
}
