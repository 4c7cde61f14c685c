//! What the memory governor does: beside others' policies on recorded loads, and
//! with four machines on this host.
//!
//! Options: `--picture FILE`; `--simulated` leaves the machines out. These take root,
//! the test bed (`target/bed`) and `QVD_INIT`, and the host's merging of equal
//! pages, which is left as it was found. See docs/memory.md.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, clippy::print_stderr, dead_code, unreachable_pub)]

#[path = "../../tests/vm/bed.rs"]
mod bed;
#[path = "../../tests/vm/guest.rs"]
mod guest;
#[path = "../../tests/memory/load.rs"]
mod load;
mod picture;
#[path = "../../tests/memory/policies.rs"]
mod policies;
mod real;
#[path = "../../tests/memory/scenarios.rs"]
mod scenarios;
#[path = "../../tests/memory/world.rs"]
mod world;

use std::path::PathBuf;

fn main() {
    let (mut picture, mut simulated) = (None, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--picture" => picture = Some(PathBuf::from(args.next().unwrap())),
            "--simulated" => simulated = true,
            // From cargo.
            "--bench" => {}
            _ => panic!("unknown argument `{arg}`"),
        }
    }
    for scenario in scenarios::scenarios() {
        println!("{}", scenarios::table(&scenario));
    }
    if !simulated {
        real::measure(picture.as_deref());
    }
}
