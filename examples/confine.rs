//! Confined ports to attack: a bridge in a network namespace of its own and
//! namespaces with an `eth0` on it, each a line of JSON. Waits for the end of
//! its input, removes all, and tells on standard error how long that took.
//!
//! As root: `cargo run --release --example confine -- [--backend nft|iptables] [--count N] [--json]`
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{
    collections::BTreeMap,
    error::Error,
    io::{Read as _, Write as _},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    time::Instant,
};

use qvd::core::{DesktopId, Instance, NetPolicy};
use qvd::net::{
    Backend, Mac, NetConfig, Network, Port, PortSpec, loopback_up,
    responder::{Guest, Responder, Site},
};
use qvd_sys::netns;
use serde_json::json;

/// What a desktop of this example may: have a port, and go out.
const POLICY: NetPolicy = NetPolicy::internet();

struct Options {
    backend: Backend,
    count: u32,
}

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

fn main() -> Outcome {
    let options = Options::parse()?;
    let host = netns::create()?;
    netns::in_netns(host.as_fd(), || run(&options, &host))?
}

fn run(options: &Options, host: &OwnedFd) -> Outcome {
    loopback_up(host.as_fd())?;
    let config = NetConfig { internet: true, backend: options.backend, ..NetConfig::new(Instance::new(0xc0ff)) };
    let mut network = Network::open(config)?;
    let config = *network.config();
    let gateway_mac = Mac::of(config.instance, config.subnet.gateway());
    let mut site = Site::new(config.subnet, gateway_mac);
    site.gateway_ipv6 = config.subnet6.map(|_| gateway_mac.link_local());
    // One for each bridge that there is.
    let mut responders: BTreeMap<String, Responder> = BTreeMap::new();

    let mut kept: Vec<(Port, OwnedFd)> = Vec::new();
    for number in 1..=options.count {
        let inside = netns::create()?;
        let desktop = DesktopId::new(number)?;
        let began = Instant::now();
        let port = network.attach(&PortSpec { desktop, netns: inside.as_fd(), address: None, policy: POLICY })?;
        let add_us = began.elapsed().as_micros();
        let mut guest = Guest::new(port.mac(), port.address());
        (guest.ipv6, guest.way_out) = (port.ipv6(), true);
        let bridge = port.bridge_name();
        if !responders.contains_key(&bridge) {
            responders.insert(bridge.clone(), Responder::open(&bridge, site.clone())?);
        }
        if let Some(responder) = responders.get(&bridge) {
            responder.answer(guest);
        }
        println!(
            "{}",
            json!({
                "netns": path(&inside),
                "ifname": "eth0",
                "mac": port.mac(),
                "ipv4": port.address(),
                "ipv6": port.ipv6(),
                "gateway4": config.subnet.gateway(),
                "gateway6": config.subnet6.map(|subnet6| subnet6.gateway(config.subnet)),
                "host_netns": path(host),
                "bridge": bridge,
                "add_us": add_us,
            })
        );
        kept.push((port, inside));
    }

    std::io::stdin().read_to_end(&mut Vec::new())?;
    let began = Instant::now();
    for responder in responders.values_mut() {
        responder.close()?;
    }
    // The network removes them all at once, faster than one by one.
    let removed = kept.len();
    let insides: Vec<_> = kept
        .into_iter()
        .map(|(port, inside)| {
            port.leave();
            inside
        })
        .collect();
    network.close()?;
    drop(insides);
    let line = json!({ "removed": removed, "remove_us": began.elapsed().as_micros() });
    // Not among the ports' lines, and whoever ended the input may have left.
    let _heard_or_not = writeln!(std::io::stderr(), "{line}");
    Ok(())
}

/// Where others find a namespace, for as long as this process keeps it.
fn path(netns: &OwnedFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), netns.as_raw_fd())
}

impl Options {
    fn parse() -> Result<Self, String> {
        let usage = "usage: confine [--backend nft|iptables] [--count N] [--json]";
        let mut options = Self { backend: Backend::Nft, count: 2 };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--backend" => {
                    let name = args.next().unwrap_or_default();
                    options.backend = name.parse().map_err(|error| format!("{error}; {usage}"))?;
                }
                "--count" => {
                    let count = args.next().and_then(|count| count.parse().ok());
                    options.count = count.ok_or_else(|| format!("how many? {usage}"))?;
                }
                // Every line is JSON anyway.
                "--json" => {}
                _ => return Err(format!("unknown argument `{arg}`; {usage}")),
            }
        }
        Ok(options)
    }
}
