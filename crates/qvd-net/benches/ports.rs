//! What rules cost: adding, loading and removing them, with either back end.
//!
//! Run as root: everything is in network namespaces of its own. Arguments: the number
//! of other desktops, 400 without; and the name of a back end, to measure that alone.
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
const LOADS: usize = 9;
type Outcome<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

const POLICY: NetPolicy = NetPolicy::internet();
fn main() -> Outcome {
    let others = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(400);
    let named: Option<Backend> = std::env::args().skip(1).find_map(|arg| arg.parse().ok());
    for backend in Backend::ALL.into_iter().filter(|backend| named.is_none_or(|named| named == *backend)) {
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

    println!("{backend}: rules of one more desktop, with 0 others: {:.3} ms", again(&network, &[&port], rounds)?);
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
        again(&network, &[&port], rounds)?
    );
    let loading = again(&network, &ports, if backend == Backend::Nft { LOADS } else { 1 })?;
    println!("{backend}: loading {others} at once and reading them back: {loading:.1} ms");

    port.leave();
    let (left, ends): (Vec<_>, Vec<_>) = taps.into_iter().unzip();
    left.into_iter().for_each(Port::leave);
    let began = Instant::now();
    network.close()?;
    println!("{backend}: removing {others} ports and the network: {:.1} ms", ms(began.elapsed()));
    drop((ends, inside));
    Ok(())
}

/// Median of adding ports' rules in one transaction and reading them back.
fn again(network: &Network, ports: &[&Port], rounds: usize) -> Outcome<f64> {
    let mut times = Vec::new();
    for _ in 0..rounds {
        network.block(ports)?;
        let began = Instant::now();
        network.unblock(ports)?;
        times.push(began.elapsed());
    }
    times.sort();
    Ok(times.get(times.len() / 2).copied().map_or(f64::NAN, ms))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
