//! What traffic loses by rules, between two ports and to the outside, beside other
//! filters in the same run.
//!
//! Run as root: everything is in network namespaces of its own, one host for each
//! filter. They take turns of some milliseconds, many times, so that whatever else
//! the machine does is shared by all; medians count, and beside the time that
//! passed, the processor time of who sends: a frame is filtered in the context of its
//! sender. Arguments: the number of other desktops, 400 without; and a word, to measure
//! only what begins with it. Two others stand beside each measure: no
//! rules at all, and NAT with the connection tracking that it needs, which gives desktops
//! their way out and confines nobody.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod bed;

use std::{
    fmt::Write as _,
    io::{self, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use bed::{End, Outcome, Outside, input, round_trip_us, shell};
use qvd_core::{DesktopId, Instance, Neighbours, NetPolicy};
use qvd_net::{Backend, NetConfig, Network, Port, PortSpec, TapSpec};
use qvd_sys::netns;
use rustix::time::{ClockId, clock_gettime};

/// Turns of each filter.
const ROUNDS: usize = 21;
/// What a turn takes.
const PACKETS: u32 = 3000;
const TRIPS: u32 = 200;
const STREAM_BYTES: usize = 32 << 20;

/// A way out and nothing else: what desktops of private addresses need anyway.
const NAT_ALONE: &str = "table inet alone {\nchain out {\ntype nat hook postrouting priority 100;\n\
                         oifname \"uplink\" masquerade\n}\n}\n";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Filter {
    None,
    NatAlone,
    Ours(Backend),
    Linear,
}

/// A host with two desktops, others beside them, and an outside.
struct Lane {
    filter: Filter,
    name: String,
    desktops: Vec<(Port, OwnedFd)>,
    outside: Outside,
    _network: Network,
    _others: Vec<(Port, OwnedFd)>,
    _host: OwnedFd,
}

/// What a turn found.
#[derive(Debug, Clone, Copy)]
struct Turn {
    gbit_s: f64,
    packets_s: f64,
    packet_cpu_ns: f64,
    trip_us: f64,
}

fn main() -> Outcome {
    let others = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(400);
    let word = std::env::args().skip(1).find(|arg| !arg.starts_with('-') && arg.parse::<u32>().is_err());
    if let Err(error) = netns::create() {
        eprintln!("SKIPPED: cannot make a network namespace: {error}");
        return Ok(());
    }
    let lanes = [
        (Filter::None, 0),
        (Filter::NatAlone, 0),
        (Filter::Ours(Backend::Nft), 0),
        (Filter::Ours(Backend::Nft), others),
        (Filter::Linear, others),
        (Filter::Ours(Backend::Iptables), 0),
        (Filter::Ours(Backend::Iptables), others),
    ];
    let is_meant =
        |&(filter, others): &(Filter, u32)| word.as_ref().is_none_or(|word| filter.name(others).starts_with(&**word));
    let lanes = lanes.into_iter().filter(is_meant).map(|(filter, others)| Lane::new(filter, others));
    let lanes: Vec<_> = lanes.collect::<Outcome<_>>()?;
    for way in ["between two ports", "to the outside"] {
        let mut turns: Vec<Vec<Turn>> = lanes.iter().map(|_| Vec::new()).collect();
        for _ in 0..ROUNDS {
            for (lane, turns) in lanes.iter().zip(&mut turns) {
                turns.push(lane.turn(way == "to the outside")?);
            }
        }
        let medians: Vec<_> = lanes.iter().zip(turns.iter().map(|turns| median(turns))).collect();
        println!("{way}, medians of {ROUNDS}; and beside no rules, beside NAT alone:");
        for (lane, turn) in &medians {
            let beside = |measure: fn(&Turn) -> f64| {
                let of = |filter| medians.iter().find(|(lane, _)| lane.filter == filter).map(|(_, turn)| measure(turn));
                let ratio = |other: Option<f64>| {
                    other.map_or_else(|| "-".to_owned(), |other| format!("{:.2}", measure(turn) / other))
                };
                format!("({}, {})", ratio(of(Filter::None)), ratio(of(Filter::NatAlone)))
            };
            println!(
                "  {}: {:.2} Gbit/s {}, {:.0} packets/s {}, {:.0} ns of processor a packet {}, round trip {:.1} us {}",
                lane.name,
                turn.gbit_s,
                beside(|turn| turn.gbit_s),
                turn.packets_s,
                beside(|turn| turn.packets_s),
                turn.packet_cpu_ns,
                beside(|turn| turn.packet_cpu_ns),
                turn.trip_us,
                beside(|turn| turn.trip_us),
            );
        }
    }
    Ok(())
}

impl Filter {
    fn name(self, others: u32) -> String {
        match self {
            Self::None => "no rules".to_owned(),
            Self::NatAlone => "NAT alone".to_owned(),
            Self::Ours(backend) => format!("{backend}, {others} others"),
            Self::Linear => format!("linear nft, {others} others"),
        }
    }
}

impl Lane {
    fn new(filter: Filter, others: u32) -> Outcome<Self> {
        let host = netns::create()?;
        let made = netns::in_netns(host.as_fd(), || Self::here(filter, others))?;
        let name = filter.name(others);
        let (network, desktops, others, outside) = made?;
        Ok(Self { filter, name, desktops, outside, _network: network, _others: others, _host: host })
    }

    #[expect(clippy::type_complexity, reason = "parts of one struct")]
    fn here(filter: Filter, others: u32) -> Outcome<(Network, Vec<(Port, OwnedFd)>, Vec<(Port, OwnedFd)>, Outside)> {
        let backend = if let Filter::Ours(backend) = filter { backend } else { Backend::Nft };
        let config = NetConfig { internet: true, backend, ..NetConfig::new(Instance::new(0xbe4f)) };
        let network = Network::open(config)?;
        let outside = Outside::new(&config)?;
        let policy = NetPolicy { neighbours: Neighbours::Tenant, ..NetPolicy::internet() };
        let desktops = [1, 2].map(|number| -> Outcome<_> {
            let (inside, desktop) = (netns::create()?, DesktopId::new(others + number)?);
            let spec = PortSpec { desktop, netns: inside.as_fd(), address: None, policy: policy.clone() };
            Ok((network.attach(&spec)?, inside))
        });
        let desktops: Vec<_> = desktops.into_iter().collect::<Outcome<_>>()?;
        let mut beside = Vec::new();
        if filter != Filter::Linear {
            for number in 1..=others {
                let desktop = DesktopId::new(number)?;
                let spec = TapSpec { desktop, address: None, policy: policy.clone(), header: false };
                beside.push(network.attach_tap(&spec)?);
            }
        }
        if !matches!(filter, Filter::Ours(_)) {
            let table = "qvd-be4f";
            shell(&format!("for family in bridge inet arp; do nft delete table $family {table}; done"))?;
        }
        match filter {
            Filter::NatAlone => input("nft", &["-f", "-"], NAT_ALONE)?,
            Filter::Linear => {
                let links: Vec<_> = desktops.iter().map(|(port, _)| port.link().to_owned()).collect();
                input("nft", &["-f", "-"], &linear(&links, others))?;
            }
            Filter::None | Filter::Ours(_) => {}
        }
        Ok((network, desktops, beside, outside))
    }

    fn turn(&self, to_outside: bool) -> Outcome<Turn> {
        let [(_, from), (port, inside)] = &self.desktops[..] else { return Err("no two desktops".into()) };
        let beside = End { netns: inside.as_fd(), address: port.address() };
        let to = if to_outside { self.outside.end() } else { beside };
        let gbit_s = stream(from.as_fd(), to)?;
        let (packets_s, packet_cpu_ns) = datagrams(from.as_fd(), to)?;
        Ok(Turn { gbit_s, packets_s, packet_cpu_ns, trip_us: round_trip_us(from.as_fd(), to, TRIPS)? })
    }
}

/// The median of each measure.
fn median(turns: &[Turn]) -> Turn {
    let of = |measure: fn(&Turn) -> f64| {
        let mut all: Vec<_> = turns.iter().map(measure).collect();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
    };
    Turn {
        gbit_s: of(|turn| turn.gbit_s),
        packets_s: of(|turn| turn.packets_s),
        packet_cpu_ns: of(|turn| turn.packet_cpu_ns),
        trip_us: of(|turn| turn.trip_us),
    }
}

/// A chain with the rules of each port one after the other, as tools without
/// sets write them.
fn linear(links: &[String], others: u32) -> String {
    let mut text = String::from("table bridge linear {\nchain from {\ntype filter hook prerouting priority -300;\n");
    for number in 1..=others {
        let port = format!("iifname \"other-{number}\"");
        for rule in ["ether saddr != 02:00:00:00:00:01 drop", "ip saddr != 192.0.2.1 drop", "udp sport 67 drop"] {
            let _infallible = writeln!(text, "{port} {rule}");
        }
    }
    for link in links {
        let _infallible = writeln!(text, "iifname \"{link}\" accept");
    }
    text.push_str("}\n}\n");
    text
}

fn stream(from: BorrowedFd<'_>, to: End<'_>) -> Outcome<f64> {
    let listener = netns::in_netns(to.netns, || TcpListener::bind((to.address, 0)))??;
    let address = listener.local_addr()?;
    let sink = thread::spawn(move || -> io::Result<()> {
        let (mut from, _) = listener.accept()?;
        let mut buffer = vec![0; 1 << 18];
        while from.read(&mut buffer)? > 0 {}
        Ok(())
    });
    let mut stream = netns::in_netns(from, || TcpStream::connect_timeout(&address, Duration::from_secs(10)))??;
    let block = vec![0; 1 << 18];
    let began = Instant::now();
    for _ in 0..STREAM_BYTES / block.len() {
        stream.write_all(&block)?;
    }
    drop(stream);
    sink.join().map_err(|_| "the sink panicked")??;
    Ok(STREAM_BYTES as f64 * 8.0 / began.elapsed().as_secs_f64() / 1e9)
}

/// Small packets a second that leave, and the processor time of each.
fn datagrams(from: BorrowedFd<'_>, to: End<'_>) -> Outcome<(f64, f64)> {
    let (here, _there) = to.sockets(from)?;
    // The first finds out the way.
    here.send(&[0; 18])?;
    let (began, cpu) = (Instant::now(), cpu_ns());
    for _ in 0..PACKETS {
        here.send(&[0; 18])?;
    }
    let (cpu, span) = (cpu_ns() - cpu, began.elapsed());
    Ok((f64::from(PACKETS) / span.as_secs_f64(), cpu / f64::from(PACKETS)))
}

fn cpu_ns() -> f64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as f64 * 1e9 + now.tv_nsec as f64
}
