//! What is dropped is counted by port and reason, and told now and then.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, mpsc},
    time::Duration,
};

use qvd_testkit::privileged;

use super::{
    NEEDS, frames, vectors,
    world::{Desktop, PATIENCE, World, config, desktop, on_a_host},
};
use crate::{Backend, DropReason, NetConfig, Network};

fn one_more(before: &BTreeMap<DropReason, u64>, after: &BTreeMap<DropReason, u64>) -> Vec<DropReason> {
    let grown = |reason: &&DropReason| after.get(reason) > before.get(reason);
    after.keys().filter(grown).copied().collect()
}

/// Each hostile frame that comes to the rules is counted once, for a reason; and
/// these for the one that a person would name.
#[test]
fn what_is_dropped_is_counted_by_reason() {
    use DropReason::*;
    const NAMED: &[(&str, DropReason)] = &[
        ("mac spoof", SourceMac),
        ("source is the neighbour, with its address", SourceMac),
        ("ipv4 source spoof", SourceAddress),
        ("a second ipv6 address", SourceAddress),
        ("arp claims gateway", Arp),
        ("rarp", Ethertype),
        ("q-in-q", Ethertype),
        ("ipv4 options", Option),
        ("udp behind routing", Option),
        ("first fragment", Fragment),
        ("first ipv6 fragment", Fragment),
        ("mdns answer", Destination),
        ("unicast to neighbour", Destination),
        ("dhcp server, unicast", Protocol),
        ("sctp", Protocol),
        ("dhcp starvation: a client made up", Dhcp),
        ("advertisement for the neighbour", NeighbourMessage),
        ("denial of the neighbour's address", NeighbourMessage),
        ("a service of the host", Host),
    ];
    privileged(NEEDS, || {
        let by_backend = Mutex::new(Vec::new());
        for backend in Backend::ALL {
            on_a_host(|| {
                let mut world = World::with(NetConfig { backend, ..config() }, &[]);
                let (own, gateway) = (world.a.station(), world.gateway());
                let packet = frames::udp(own.ip, gateway.ip, (5000, 4000));
                let to_host = frames::ethernet(gateway.mac, own.mac, frames::IPV4, &packet);
                let matrix = world.hostile().into_iter().map(|(name, frame)| (name.to_owned(), frame));
                let mut all: Vec<_> = matrix.chain(vectors::hostile(&world.cast())).collect();
                all.push(("a service of the host".to_owned(), to_host));
                let (mut before, mut uncounted, mut reasons) =
                    (world.a.port.drops().unwrap(), Vec::new(), BTreeMap::new());
                for (name, frame) in all {
                    world.send(&frame);
                    let after = world.a.port.drops().unwrap();
                    match one_more(&before, &after)[..] {
                        [reason] => drop(reasons.insert(name, reason)),
                        [] => uncounted.push(name),
                        _ => panic!("{backend}: {name} is counted twice: {before:?}, {after:?}"),
                    }
                    before = after;
                }
                for &(name, reason) in NAMED {
                    assert_eq!(reasons.get(name), Some(&reason), "{backend}: {name}");
                }
                // The bridge itself has no use for these.
                uncounted.retain(|name| !name.ends_with("reserved group 01"));
                let mut of_bridge =
                    vec!["arp to neighbour", "source is a group", "source is everybody", "source is nobody"];
                if backend == Backend::Iptables {
                    // Dropped at the way to the host, by a rule of all ports; and by the kernel
                    // itself, before iptables sees them.
                    uncounted.retain(|name| !name.ends_with("reserved group 02"));
                    of_bridge.remove(0);
                    of_bridge.extend(["ipv4 of version six", "header shorter than a header"]);
                }
                assert_eq!(uncounted, of_bridge, "{backend}");
                assert!(world.b.port.drops().unwrap().is_empty());
                by_backend.lock().unwrap().push(reasons);
            });
        }
        let [nft, iptables] = &by_backend.into_inner().unwrap()[..] else { panic!("two back ends") };
        for (name, reason) in iptables {
            // ebtables looks where a frame goes before anybody looks into it, and at ARP as a whole.
            let meets_first = match reason {
                Destination => name.contains("advertisement") || name.contains("of groups"),
                Arp => name.starts_with("arp to "),
                NeighbourMessage => name == "ipv6 source is nobody",
                _ => false,
            };
            assert!(meets_first || nft.get(name) == Some(reason), "{name}: {reason:?}, {:?}", nft.get(name));
        }
    });
}

/// Counts of rules that are loaded anew are those of before; whoever has the address next
/// begins with none.
#[test]
fn rules_that_are_replaced_go_on_counting() {
    for backend in Backend::ALL {
        on_a_host(|| {
            let mut world = World::with(NetConfig { backend, ..config() }, &[]);
            let (own, gateway) = (world.a.station(), world.gateway());
            let (_, spoof) = world.hostile().remove(0);
            let packet = frames::udp(own.ip, gateway.ip, (5000, 4000));
            let to_host = frames::ethernet(gateway.mac, own.mac, frames::IPV4, &packet);
            for frame in [&spoof, &to_host].repeat(3) {
                world.send(frame);
            }
            let counted = |port: &crate::Port| {
                let all = port.drops().unwrap();
                [DropReason::SourceMac, DropReason::Host].map(|reason| all.get(&reason).copied().unwrap_or_default())
            };
            let before = counted(&world.a.port);
            assert!(before[0] == 3 && before[1] >= 3, "{backend}: {before:?}");
            let (address, policy) = (world.a.port.address(), world.a.port.policy().clone());
            world.a.port.leave();
            let again = Network::open(*world.network.config()).unwrap();
            let mut adopted = again.adopt(desktop(7), address, &policy).unwrap();
            let after = counted(&adopted);
            assert!(after[0] == 3 && after[1] >= before[1], "{backend}: {after:?}");
            let counts_of =
                |reason| adopted.filter().all_drops().unwrap().into_iter().find(|((_, mark), _)| *mark == reason);
            assert!(counts_of(DropReason::Host.mark()).is_some());
            adopted.filter().forget_drops(adopted.mac()).unwrap();
            assert_eq!(counts_of(DropReason::Host.mark()), None, "{backend}");
            adopted.verify().unwrap();
            adopted.close().unwrap();
        });
    }
}

/// What was counted outlasts the process that counts, and goes when the port is
/// nobody's any more.
#[test]
fn counts_outlast_a_process_and_not_a_desktop() {
    on_a_host(|| {
        let mut world = World::new(&[], true);
        let (own, gateway) = (world.a.station(), world.gateway());
        let to_host =
            frames::ethernet(gateway.mac, own.mac, frames::IPV4, &frames::udp(own.ip, gateway.ip, (5000, 4000)));
        let (_, spoof) = world.hostile().remove(0);
        // One is counted at the port, the other behind the bridge.
        world.send(&spoof);
        world.send(&to_host);
        let before = world.a.port.drops().unwrap();
        assert_eq!(before.get(&DropReason::SourceMac), Some(&1));
        assert!(before.get(&DropReason::Host).is_some_and(|count| *count >= 1));
        let number = world.a.port.desktop().number();
        world.a.port.close().unwrap();
        let again = Network::open(*world.network.config()).unwrap();
        let mut second = Desktop::new(&again, number, true);
        // What the kernel inside sends while its port is closed may count as well.
        assert!(second.port.drops().unwrap().get(&DropReason::SourceMac) >= before.get(&DropReason::SourceMac));
        second.port.close().unwrap();
        again.sweep(&BTreeSet::new()).unwrap();
        assert!(Desktop::new(&again, number, true).port.drops().unwrap().is_empty());
    });
}

/// Who looks at the log reads whose frames were dropped, why, and one of them.
#[test]
fn a_sample_of_what_is_dropped_is_told() {
    on_a_host(|| {
        let mut world = World::new(&[], true);
        let (tell, told) = mpsc::channel();
        let report = move |dropped: &crate::Dropped| tell.send(dropped.clone()).unwrap();
        let mut watch = world.network.watch_drops(Duration::ZERO, Box::new(report)).unwrap();
        let (own, gateway) = (world.a.station(), world.gateway());
        let spoof = [2, 6, 6, 6, 6, 6];
        let packet = frames::udp(own.ip, gateway.ip, (5000, 6000));
        let spoofed = frames::ethernet(gateway.mac, spoof, frames::IPV4, &packet);
        world.send(&spoofed);
        let dropped = told.recv_timeout(PATIENCE).unwrap();
        assert_eq!((dropped.desktop, dropped.reason, dropped.frames), (desktop(7), DropReason::SourceMac, 1));
        let line = dropped.to_string();
        let begins =
            "desktop 7: 1 frames dropped in 1 s: the source MAC is not the port's (one: from 02:06:06:06:06:06";
        assert!(line.starts_with(begins) && line.contains("udp 5000 > 6000"), "{line}");
        let packet = frames::udp(own.ip, gateway.ip, (5000, 4000));
        world.send(&frames::ethernet(gateway.mac, own.mac, frames::IPV4, &packet));
        let dropped = told.recv_timeout(PATIENCE).unwrap();
        assert_eq!((dropped.desktop, dropped.reason), (desktop(7), DropReason::Host), "{dropped}");
        // A flood is told of no more often than the kernel gives samples.
        for _ in 0..500 {
            world.send_only(&spoofed);
        }
        world.send(&[0; 14]);
        assert!(told.try_iter().count() < 10);
        // The rules stand as they did while somebody listens.
        world.network.inner().load().unwrap();
        assert_eq!(world.network.mend().unwrap().differed, None);
        watch.close().unwrap();
        watch.close().unwrap();
    });
}
