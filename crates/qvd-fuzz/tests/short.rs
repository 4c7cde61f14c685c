//! A short run of each target: what is in its corpus, then changed inputs, the
//! same ones at each run. For a long run see `fuzz/README.md`.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{fs, panic, path::PathBuf};

use qvd_fuzz::{TARGETS, World, mutated, named, seeds};

fn corpus(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(name)
}

/// The inputs of a corpus, by name.
fn inputs(name: &str) -> Vec<(String, Vec<u8>)> {
    let mut inputs: Vec<_> = fs::read_dir(corpus(name))
        .unwrap_or_else(|error| panic!("`{name}` has no corpus: {error}"))
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect();
    inputs.sort();
    inputs
}

/// How much longer than usual a run is: `QVD_FUZZ_TIMES`.
fn times() -> u32 {
    std::env::var("QVD_FUZZ_TIMES").map_or(1, |times| times.parse().unwrap())
}

/// Runs the target of this name; an input that it panics at is kept.
fn run(name: &str) {
    let (target, world, corpus) = (named(name), World::new(), inputs(name));
    let take = |what: &str, input: &[u8]| {
        let taken = panic::catch_unwind(panic::AssertUnwindSafe(|| (target.run)(&world, input)));
        taken.unwrap_or_else(|reason| {
            let kept = std::env::temp_dir().join(format!("qvd-fuzz-{name}-{}", what.replace(' ', "-")));
            fs::write(&kept, input).unwrap();
            let why = reason.downcast_ref::<String>().map_or("it panicked", String::as_str);
            panic!("{why}; {what} is kept as {}", kept.display())
        })
    };
    let taken = corpus.iter().filter(|(what, input)| take(what, input)).count();
    // Seeds that no reader takes any more lead nowhere.
    assert!(taken > 0, "`{name}` takes nothing of its corpus");
    let corpus: Vec<Vec<u8>> = corpus.into_iter().map(|(_, input)| input).collect();
    for number in 0..target.inputs * times() {
        take(&format!("input {number}"), &mutated(&corpus, number.into()));
    }
}

macro_rules! short {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            run(stringify!($name));
        })*

        #[test]
        fn every_target_has_a_short_run() {
            assert_eq!([$(stringify!($name)),*], TARGETS.map(|target| target.name));
        }
    };
}

short! {
    archive blocks commit frames guest keys log names oci packages pull qcow2 qmp question receive recipe rpm
    signature store tags told tree
}

/// Some seeds have ids of trees and commits in them; who changes these formats
/// runs this again: `cargo test -p qvd-fuzz --test short -- --ignored`.
#[test]
#[ignore = "it writes the corpus"]
fn write_the_seeds() {
    let world = World::new();
    for target in TARGETS {
        let dir = corpus(target.name);
        fs::create_dir_all(&dir).unwrap();
        for (number, seed) in seeds(target.name, &world).into_iter().enumerate() {
            fs::write(dir.join(format!("seed-{number}")), seed).unwrap();
        }
    }
}
