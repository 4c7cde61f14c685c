//! What rules cost: adding, loading and removing them, and what traffic to the
//! outside loses by them, beside other filters in the same run.
//!
//! Run as root: everything is in network namespaces of its own. Takes the number
//! of other desktops as its argument, 400 without.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod bed;

use std::{
    fmt::Write as _,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use bed::{OUTSIDE, Outcome, Outside, input, round_trip_us, shell};
use qvd_core::{DesktopId, Instance, NetPolicy};
use qvd_net::{Backend, NetConfig, Network, Port, PortSpec, TapSpec};
use qvd_sys::netns;

const ROUNDS: usize = 50;
const POLICY: NetPolicy = NetPolicy::internet();
/// How long each measurement of traffic takes.
const SPAN: Duration = Duration::from_millis(500);
/// Round trips that a turn takes.
const TRIPS: u32 = 2000;
/// Turns that the configurations take; the best of each counts.
const TURNS: usize = 3;

/// A way out and nothing else: what desktops of private addresses need anyway.
const NAT_ALONE: &str = "table inet alone {\nchain out {\ntype nat hook postrouting priority 100;\n\
                         oifname \"uplink\" masquerade\n}\n}\n";

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
    let outside = Outside::new(&config)?;
    let (inside, number) = (netns::create()?, DesktopId::new(others + 1)?);
    let port = network.attach(&PortSpec { desktop: number, netns: inside.as_fd(), address: None, policy: POLICY })?;
    let rounds = if backend == Backend::Nft { ROUNDS } else { 5 };

    println!("{backend}: rules of one more desktop, with 0 others: {:.3} ms", one_more(&network, &port, rounds)?);
    traffic(&format!("{backend}, 0 others"), &inside, &outside)?;
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
    traffic(&format!("{backend}, {others} others"), &inside, &outside)?;

    if backend == Backend::Nft {
        let table = "nft delete table bridge qvd-be4d; nft delete table inet qvd-be4d; nft delete table arp qvd-be4d";
        shell(table)?;
        traffic("no rules", &inside, &outside)?;
        input("nft", &["-f", "-"], NAT_ALONE)?;
        traffic("NAT alone", &inside, &outside)?;
        shell("nft delete table inet alone")?;
        input("nft", &["-f", "-"], &linear(port.link(), others))?;
        traffic(&format!("linear nft, {others} others"), &inside, &outside)?;
        shell("nft delete table bridge linear")?;
    }
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

/// A chain with the rules of each port one after the other, as tools without
/// sets write them.
fn linear(link: &str, others: u32) -> String {
    let mut text = String::from("table bridge linear {\nchain from {\ntype filter hook prerouting priority -300;\n");
    for number in 1..=others {
        let port = format!("iifname \"other-{number}\"");
        for rule in ["ether saddr != 02:00:00:00:00:01 drop", "ip saddr != 192.0.2.1 drop", "udp sport 67 drop"] {
            let _infallible = writeln!(text, "{port} {rule}");
        }
    }
    let _infallible = write!(text, "iifname \"{link}\" accept\n}}\n}}\n");
    text
}

/// Throughput, packets and latency from a desktop to the outside.
fn traffic(name: &str, inside: &OwnedFd, outside: &Outside) -> Outcome {
    let (mut bits, mut packets, mut latency) = (0.0_f64, 0.0_f64, f64::INFINITY);
    for _ in 0..TURNS {
        bits = bits.max(stream(inside, outside)?);
        packets = packets.max(datagrams(inside, outside)?);
        latency = latency.min(round_trip_us(inside, outside, TRIPS)?);
    }
    println!("{name}: {bits:.2} Gbit/s, {packets:.0} packets/s, round trip {latency:.1} us");
    Ok(())
}

fn stream(inside: &OwnedFd, outside: &Outside) -> Outcome<f64> {
    let listener = netns::in_netns(outside.netns.as_fd(), || TcpListener::bind((OUTSIDE, 0)))??;
    let to = listener.local_addr()?;
    let sink = thread::spawn(move || -> io::Result<u64> {
        let (mut from, _) = listener.accept()?;
        let (mut buffer, mut all) = (vec![0; 1 << 18], 0);
        loop {
            match from.read(&mut buffer)? {
                0 => return Ok(all),
                length => all += length as u64,
            }
        }
    });
    let began = Instant::now();
    let sent = netns::in_netns(inside.as_fd(), || -> io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(10))?;
        let block = vec![0; 1 << 18];
        while began.elapsed() < SPAN {
            stream.write_all(&block)?;
        }
        Ok(())
    })?;
    sent?;
    let all = sink.join().map_err(|_| "the sink panicked")??;
    Ok(all as f64 * 8.0 / began.elapsed().as_secs_f64() / 1e9)
}

/// Small packets a second that arrive.
fn datagrams(inside: &OwnedFd, outside: &Outside) -> Outcome<f64> {
    let there = netns::in_netns(outside.netns.as_fd(), || UdpSocket::bind((OUTSIDE, 0)))??;
    let to: SocketAddr = there.local_addr()?;
    there.set_read_timeout(Some(Duration::from_secs(2)))?;
    let here = netns::in_netns(inside.as_fd(), || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
    here.connect(to)?;
    let counting = thread::spawn(move || {
        let (mut buffer, mut count) = ([0; 64], 0_u32);
        while let Ok(length) = there.recv(&mut buffer) {
            if length == 1 {
                break;
            }
            count += 1;
        }
        count
    });
    let began = Instant::now();
    while began.elapsed() < SPAN {
        for _ in 0..64 {
            here.send(&[0; 18])?;
        }
    }
    let span = began.elapsed();
    // Whoever counts hears of the end once it has taken what is queued.
    for _ in 0..8 {
        // Refused once it has heard.
        let _sent = here.send(&[0]);
        thread::yield_now();
    }
    let count = counting.join().map_err(|_| "the counter panicked")?;
    Ok(f64::from(count) / span.as_secs_f64())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
