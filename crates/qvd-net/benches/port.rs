//! What a port costs, with none and with 200 others on the bridge.
//!
//! Run as root: everything is in network namespaces of its own.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::{
    error::Error,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use qvd_core::{DesktopId, Instance, NetPolicy};
use qvd_net::{NetConfig, Network, PortSpec};
use qvd_sys::netns;

const OTHERS: u32 = 200;
const ROUNDS: u32 = 30;
const POLICY: NetPolicy = NetPolicy::internet();

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

fn main() -> Outcome {
    let host = match netns::create() {
        Ok(host) => host,
        Err(error) => {
            eprintln!("SKIPPED: cannot make a network namespace: {error}");
            return Ok(());
        }
    };
    netns::in_netns(host.as_fd(), run)?
}

fn run() -> Outcome {
    let started = Instant::now();
    let mut network = Network::open(NetConfig { internet: true, ..NetConfig::new(Instance::new(0xbe4c)) })?;
    println!("open network: {:.1} ms", ms(started.elapsed()));
    measure(&network, 0)?;
    let mut others = Vec::new();
    for number in 1..=OTHERS {
        let inside = netns::create()?;
        let desktop = DesktopId::new(number)?;
        let port = network.attach(&PortSpec { desktop, netns: inside.as_fd(), address: None, policy: POLICY })?;
        // A link goes with the namespace of either end.
        others.push((port, inside));
    }
    measure(&network, OTHERS)?;
    let insides: Vec<_> = others
        .into_iter()
        .map(|(port, inside)| {
            port.leave();
            inside
        })
        .collect();
    let started = Instant::now();
    network.close()?;
    println!("close network of {OTHERS} ports: {:.1} ms", ms(started.elapsed()));
    drop(insides);
    Ok(())
}

fn measure(network: &Network, others: u32) -> Outcome {
    let desktop = DesktopId::new(OTHERS + 1)?;
    let (mut attach, mut release, mut close, mut requests) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for round in 0..ROUNDS {
        let inside = netns::create()?;
        let (sent, started) = (network.requests_sent(), Instant::now());
        let mut port = network.attach(&PortSpec { desktop, netns: inside.as_fd(), address: None, policy: POLICY })?;
        attach.push(started.elapsed());
        let started = Instant::now();
        if round % 2 == 0 {
            port.release()?;
            release.push(started.elapsed());
            // So that the next round does not find the link.
            network.sweep(&(1..=others).map(DesktopId::new).collect::<Result<_, _>>()?)?;
        } else {
            port.close()?;
            close.push(started.elapsed());
        }
        requests += network.requests_sent() - sent;
    }
    println!(
        "{others} others: attach {:.2} ms, release {:.3} ms, close {:.2} ms (medians of {ROUNDS}); {} requests a round",
        median(attach),
        median(release),
        median(close),
        requests / u64::from(ROUNDS)
    );
    Ok(())
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times.get(times.len() / 2).copied().map_or(f64::NAN, ms)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
