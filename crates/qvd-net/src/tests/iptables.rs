//! The back end of ebtables and iptables: the same frames as for nftables.

use std::{collections::BTreeSet, process::Command};

use qvd_core::NetPolicy;

use super::world::{Desktop, World, config, desktop, on_a_host};
use crate::{Backend, NetConfig, Network};

fn older() -> NetConfig {
    NetConfig { internet: true, backend: Backend::Iptables, ..config() }
}

#[test]
fn no_hostile_frame_leaves_the_port_without_nftables() {
    on_a_host(|| {
        let mut world = World::with(older(), &[]);
        let reached = world.reached_by_hostile();
        assert!(reached.is_empty(), "{reached:#?}");
    });
}

#[test]
fn honest_frames_pass_without_nftables() {
    on_a_host(|| {
        let mut world = World::with(older(), &[]);
        let stopped = world.stopped_of_honest();
        assert!(stopped.is_empty(), "{stopped:?}");
    });
}

/// What the three programs show, without what they count.
fn shown() -> Vec<String> {
    let of = |program: &str| {
        let shown = Command::new(program).output().unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        let lines = shown.lines().filter(|line| !line.starts_with('#'));
        lines.map(|line| line.split(" [").next().unwrap_or(line).to_owned()).collect::<Vec<_>>()
    };
    ["ebtables-save", "iptables-save", "ip6tables-save"].map(of).concat()
}

/// Chains of another version, which let through what this one does not, are filled
/// anew: those of all ports at once, a port's own when it is adopted.
#[test]
fn chains_of_another_version_are_replaced() {
    on_a_host(|| {
        let first = Network::open(older()).unwrap();
        let desktop = Desktop::with(&first, 7, NetPolicy::internet());
        let (address, meant) = (desktop.port.address(), shown());
        desktop.port.leave();
        drop(first);
        for line in [
            "iptables -I qvd7e57-host -j ACCEPT",
            "ip6tables -t raw -I qvd7e57-7 -j ACCEPT",
            "ebtables -t nat -I qvd7e57-7 -j ACCEPT",
            "ebtables -F qvd7e57-route",
        ] {
            let before = shown();
            let mut words = line.split(' ');
            assert!(Command::new(words.next().unwrap()).args(words).status().unwrap().success(), "{line}");
            assert_ne!(shown(), before, "{line}");
        }
        let second = Network::open(older()).unwrap();
        let port = second.adopt(super::world::desktop(7), address, &NetPolicy::internet()).unwrap();
        assert_eq!(shown(), meant);
        port.verify().unwrap();
    });
}

/// What another process left is taken over, kept, swept and removed.
#[test]
fn rules_of_an_earlier_process_are_known() {
    on_a_host(|| {
        let first = Network::open(older()).unwrap();
        let (a, b) = (Desktop::new(&first, 7, true), Desktop::new(&first, 8, false));
        let (of_a, of_b) = (a.port.address(), b.port.address());
        a.port.leave();
        b.port.leave();
        drop(first);
        let mut second = Network::open(older()).unwrap();
        let again = second.adopt(desktop(7), of_a, &super::lifecycle::POLICY).unwrap();
        again.verify().unwrap();
        assert_eq!(second.sweep(&BTreeSet::new()).unwrap(), 1);
        again.verify().unwrap();
        assert!(second.adopt(desktop(8), of_b, &super::lifecycle::POLICY).is_err());
        again.leave();
        second.close().unwrap();
        let left: Vec<_> = shown().into_iter().filter(|line| line.contains("qvd")).collect();
        assert!(left.is_empty(), "{left:?}");
    });
}
