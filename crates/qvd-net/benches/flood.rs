//! What a desktop that floods does to the latency of its neighbour: frames,
//! connections, ARP, made-up MACs and frames that are dropped, with either back end.
//!
//! Run as root: everything is in network namespaces of its own. The flood is sent
//! from one processor, and its neighbour and the host outside use all: a desktop's
//! share of processors is its cgroup's business.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod bed;

use std::{
    net::Ipv4Addr,
    os::fd::{AsFd as _, OwnedFd},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Instant,
};

use bed::{OUTSIDE, Outcome, Outside, round_trip_us};
use qvd_core::{DesktopId, Instance, NetPolicy};
use qvd_net::{Backend, Mac, NetConfig, Network, PortSpec};
use qvd_sys::{
    netns,
    packet::{ETHERTYPE_ALL, PacketSocket},
};
use rustix::thread::{CpuSet, sched_setaffinity};

const TRIPS: u32 = 5000;
const TURNS: usize = 3;

fn main() -> Outcome {
    for backend in Backend::ALL {
        let host = match netns::create() {
            Ok(host) => host,
            Err(error) => {
                eprintln!("SKIPPED: cannot make a network namespace: {error}");
                return Ok(());
            }
        };
        netns::in_netns(host.as_fd(), || run(backend))??;
    }
    Ok(())
}

fn run(backend: Backend) -> Outcome {
    let config = NetConfig { internet: true, backend, ..NetConfig::new(Instance::new(0xbe4e)) };
    let mut network = Network::open(config)?;
    let outside = Outside::new(&config)?;
    let insides = [netns::create()?, netns::create()?];
    let attach = |number, inside: &OwnedFd| -> Outcome<_> {
        let (desktop, policy) = (DesktopId::new(number)?, NetPolicy::internet());
        Ok(network.attach(&PortSpec { desktop, netns: inside.as_fd(), address: None, policy })?)
    };
    let [hostile, victim] = &insides;
    let (port, neighbour) = (attach(1, hostile)?, attach(2, victim)?);
    let gateway = Mac::of(config.instance, config.subnet.gateway());
    let make = Frames {
        own: port.mac().octets(),
        ip: port.address(),
        gateway: gateway.octets(),
        router: config.subnet.gateway(),
    };
    let quiet = latency(victim, &outside)?;
    println!("{backend}: neighbour's round trip without a flood: {quiet:.1} us");
    for (name, kind) in [
        ("frames that pass", Kind::Frames),
        ("new connections", Kind::Connections),
        ("ARP", Kind::Arp),
        ("made-up MACs", Kind::Macs),
        ("fragments, dropped", Kind::Fragments),
    ] {
        let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        let began = Instant::now();
        let flooded = thread::scope(|scope| -> Outcome<f64> {
            scope.spawn(|| {
                let flooded = netns::in_netns(hostile.as_fd(), || flood(&make, kind, &stop, &sent));
                if let Err(error) = flooded.and_then(|flooded| flooded) {
                    eprintln!("{name}: {error}");
                }
            });
            let measured = latency(victim, &outside);
            stop.store(true, Ordering::Relaxed);
            measured
        })?;
        let rate = sent.into_inner() as f64 / began.elapsed().as_secs_f64();
        println!("{backend}: under {rate:.0} a second of {name}: {flooded:.1} us, {:.2} of that", flooded / quiet);
    }
    drop((port, neighbour));
    network.close()?;
    Ok(())
}

/// The best of some turns.
fn latency(inside: &OwnedFd, outside: &Outside) -> Outcome<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..TURNS {
        best = best.min(round_trip_us(inside.as_fd(), outside.end(), TRIPS)?);
    }
    Ok(best)
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Frames,
    Connections,
    Arp,
    Macs,
    Fragments,
}

struct Frames {
    own: [u8; 6],
    ip: Ipv4Addr,
    gateway: [u8; 6],
    router: Ipv4Addr,
}

impl Frames {
    /// The frame of this number.
    fn make(&self, kind: Kind, number: u32) -> Vec<u8> {
        let [_, b, c, d] = number.to_be_bytes();
        let from = if matches!(kind, Kind::Macs) { [2, 9, 9, b, c, d] } else { self.own };
        let ethernet =
            |to: [u8; 6], ethertype: u16, payload: &[u8]| [&to[..], &from, &ethertype.to_be_bytes(), payload].concat();
        if matches!(kind, Kind::Arp) {
            let arp =
                [&[0, 1, 8, 0, 6, 4, 0, 1][..], &from, &self.ip.octets(), &[0; 6], &self.router.octets()].concat();
            return ethernet([0xff; 6], 0x0806, &arp);
        }
        let fragment = if matches!(kind, Kind::Fragments) { [0x20, 0] } else { [0, 0] };
        let mut header =
            [&[0x45, 0, 0, 46, 0, 0][..], &fragment, &[64, 17, 0, 0], &self.ip.octets(), &OUTSIDE.octets()].concat();
        let sum: u32 = header.chunks_exact(2).map(|two| u32::from(two[0]) << 8 | u32::from(two[1])).sum();
        let fold = |sum: u32| (sum & 0xffff) + (sum >> 16);
        let sum = !u16::try_from(fold(fold(sum))).unwrap_or_default();
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        // Many connections, or one.
        let port = if matches!(kind, Kind::Connections) { 1024 + number % 60_000 } else { 5000 };
        let udp = [&u16::try_from(port).unwrap_or_default().to_be_bytes()[..], &[0, 9, 0, 26, 0, 0], &[0; 18]].concat();
        ethernet(self.gateway, 0x0800, &[header, udp].concat())
    }
}

fn flood(frames: &Frames, kind: Kind, stop: &AtomicBool, sent: &AtomicU64) -> std::io::Result<()> {
    let mut one = CpuSet::new();
    one.set(0);
    sched_setaffinity(None, &one)?;
    let socket = PacketSocket::open("eth0", ETHERTYPE_ALL)?;
    let frames: Vec<_> = (0..60_000).map(|number| frames.make(kind, number)).collect();
    for frame in frames.iter().cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        // What finds no room is part of a flood.
        if socket.send(frame).is_ok() {
            sent.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}
