//! What rules cost: adding, loading and removing them, with either back end.
//!
//! Run as root: everything is in network namespaces of its own. Takes the number
//! of other desktops as its argument, 400 without.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::{
    error::Error,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use qvd_core::{DesktopId, Instance, NetPolicy};
use qvd_net::{Backend, NetConfig, Network, Port, PortSpec, TapSpec};
use qvd_sys::netns;

const ROUNDS: usize = 50;
type Outcome<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

const POLICY: NetPolicy = NetPolicy::internet();
fn main() -> Outcome {
    let others = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(400);
    for backend in Backend::ALL {
        let host = match netns::create() {
            Ok(host) => host,
            Err(error) => {
                eprintln!("SKIPPED: cannot make a network namespace: {error}");
                return Ok(());
            }
        };
        netns::in_netns(host.as_fd(), || run(backend, others))??;
    }
    Ok(())
}

fn run(backend: Backend, others: u32) -> Outcome {
    let config = NetConfig { internet: true, backend, ..NetConfig::new(Instance::new(0xbe4d)) };
    let mut network = Network::open(config)?;
    let (inside, number) = (netns::create()?, DesktopId::new(others + 1)?);
    let port = network.attach(&PortSpec { desktop: number, netns: inside.as_fd(), address: None, policy: POLICY })?;
    let rounds = if backend == Backend::Nft { ROUNDS } else { 5 };

    println!("{backend}: rules of one more desktop, with 0 others: {:.3} ms", one_more(&network, &port, rounds)?);
    // A tap needs no namespace, so that hundreds are made quickly.
    let taps: Vec<_> = (1..=others)
        .map(|number| {
            let desktop = DesktopId::new(number)?;
            Ok(network.attach_tap(&TapSpec { desktop, address: None, policy: POLICY, header: false })?)
        })
        .collect::<Outcome<_>>()?;
    let ports: Vec<&Port> = taps.iter().map(|(port, _)| port).collect();
    println!(
        "{backend}: rules of one more desktop, with {others} others: {:.3} ms",
        one_more(&network, &port, rounds)?
    );
    network.block(&ports)?;
    let began = Instant::now();
    network.unblock(&ports)?;
    println!("{backend}: loading {others} at once and reading them back: {:.1} ms", ms(began.elapsed()));

    port.leave();
    let (left, ends): (Vec<_>, Vec<_>) = taps.into_iter().unzip();
    left.into_iter().for_each(Port::leave);
    let began = Instant::now();
    network.close()?;
    println!("{backend}: removing {others} ports and the network: {:.1} ms", ms(began.elapsed()));
    drop((ends, inside));
    Ok(())
}

/// Median of adding a port's rules in one transaction and reading them back.
fn one_more(network: &Network, port: &Port, rounds: usize) -> Outcome<f64> {
    let mut times = Vec::new();
    for _ in 0..rounds {
        network.block(&[port])?;
        let began = Instant::now();
        network.unblock(&[port])?;
        times.push(began.elapsed());
    }
    times.sort();
    Ok(times.get(times.len() / 2).copied().map_or(f64::NAN, ms))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
