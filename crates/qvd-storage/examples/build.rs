//! Builds the image of a recipe into a store: `build STORE RECIPE`.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::{path::Path, time::Instant};

use qvd_storage::{BuildOptions, Recipe, Store};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [store, recipe] = arguments.as_slice() else { return Err("usage: build STORE RECIPE".into()) };
    let store = Store::open(Path::new(store))?;
    let recipe = Recipe::parse(&std::fs::read_to_string(recipe)?)?;
    let started = Instant::now();
    let built = store.build(&recipe, &BuildOptions::default(), &mut |line| eprintln!("{line}"))?;
    let image = built.image;
    println!(
        "{} {} entries {} MiB in {:.1} s{}",
        image.digest(),
        image.entries(),
        image.size_bytes() >> 20,
        started.elapsed().as_secs_f64(),
        if built.reused { ", reused" } else { "" },
    );
    Ok(())
}
