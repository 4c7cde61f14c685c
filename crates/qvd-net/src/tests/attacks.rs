//! Attacks that are not one frame: floods, races, runts and giants.

use std::{
    os::fd::AsFd,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::Duration,
};

use netlink_packet_route::{AddressFamily, RouteNetlinkMessage, neighbour::NeighbourMessage};
use qvd_core::NetPolicy;
use qvd_sys::{
    netns,
    packet::{ETHERTYPE_ALL, PacketSocket},
};

use super::{
    frames::{self, Station},
    vectors,
    world::{Desktop, INSTANCE, MARK_LEN, Seen, World, config, connected, desktop, holds, on_a_host, subnet},
};
use crate::{
    Backend, Mac, NetConfig, Network, PortSpec,
    netlink::Netlink,
    rules::Protection::{self, *},
};

/// Every further vector, as the matrix before it.
#[test]
fn no_further_hostile_frame_leaves_the_port() {
    on_a_host(|| {
        let mut world = World::new(&[], true);
        let vectors = vectors::hostile(&world.cast());
        assert!(vectors.len() > 200, "{}", vectors.len());
        let reached = world.reached_by(vectors);
        assert!(reached.is_empty(), "{reached:#?}");
    });
}

/// Frames cut anywhere: none that lacks part of what the rules look at passes.
#[test]
fn no_runt_passes() {
    const ROWS: &[(Backend, &[Protection], &[u16])] =
        &[(Backend::Nft, &[], &[]), (Backend::Nft, &[ArpWhole], &[frames::ARP]), (Backend::Iptables, &[], &[])];
    for &(backend, without, pass) in ROWS {
        on_a_host(|| {
            let mut world = World::with(NetConfig { internet: true, backend, ..config() }, without);
            let vectors::Cast { own, gateway, .. } = world.cast();
            let udp = frames::udp(own.ip, gateway.ip, (9, 9));
            let arp = frames::arp(1, own, gateway.ip);
            let mut passed: Vec<_> = [(frames::IPV4, udp), (frames::ARP, arp)]
                .into_iter()
                .map(|(ethertype, packet)| (ethertype, frames::ethernet(gateway.mac, own.mac, ethertype, &packet)))
                .flat_map(|(ethertype, whole)| (14..whole.len()).map(move |end| (ethertype, whole[..end].to_vec())))
                .filter(|(_, runt)| world.send_exactly(runt, runt) != Seen::default())
                .map(|(ethertype, _)| ethertype)
                .collect();
            passed.dedup();
            assert_eq!(passed, pass, "{backend}, without {without:?}");
        });
    }
}

/// A desktop raises its own MTU, and a machine writes what it likes: what is longer than
/// the port's still stays, as is explained to who asks. Of a machine's own it stays by
/// nothing else than what stops giants.
#[test]
fn no_giant_passes() {
    const MTU: usize = 1500;
    // A pair of links has room for a tag, whether there is one or not.
    let desktops = [(false, MTU + 4, &[][..]), (true, MTU, &[]), (true, 8000, &[Giants])];
    for (backend, (is_machine, longest, without)) in
        Backend::ALL.into_iter().flat_map(|backend| desktops.map(|desktop| (backend, desktop)))
    {
        on_a_host(|| {
            let config = NetConfig { internet: true, backend, ..config() };
            let mut world = if is_machine {
                World::of_tap(config, NetPolicy::internet(), without)
            } else {
                let world = World::with(config, without);
                world.a.inside(|| set_mtu("eth0", 9000));
                world
            };
            let vectors::Cast { own, other, gateway, .. } = world.cast();
            // A frame whose packet will have this length with the mark.
            let frame = |to: [u8; 6], ip, length: usize| {
                let payload = [&frames::udp_header((5000, 4000))[..], &vec![0; length - 28 - MARK_LEN]].concat();
                let packet = frames::ipv4(own.ip, ip, frames::Ip { protocol: 17, ..frames::Ip::default() }, &payload);
                frames::ethernet(to, own.mac, frames::IPV4, &packet)
            };
            for length in [1000, MTU, MTU + 1, MTU + 4, MTU + 5, 8000] {
                let (sent, seen) = world.send_marked(&frame(gateway.mac, gateway.ip, length));
                assert_eq!(seen.host, length <= longest, "{backend}, {length} octets of {longest}: {seen:?}");
                let explained = world.a.port.explain(&sent);
                assert!(explained.passes == seen.host || !without.is_empty(), "{length}: {explained}");
            }
            for (to, ip) in [(gateway.mac, other.ip), (other.mac, other.ip)] {
                let seen = world.send(&frame(to, ip, 8000));
                assert!(!seen.program && !seen.neighbour && (!seen.host || !without.is_empty()), "{seen:?}");
            }
        });
    }
}

fn set_mtu(link: &str, octets: u32) {
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};
    let mut route = Netlink::route().unwrap();
    let mut message = LinkMessage::default();
    message.header.index = crate::network::find(&mut route, link).unwrap().unwrap().index;
    message.attributes.push(LinkAttribute::Mtu(octets));
    route.batch(vec![crate::links::Request::new(RouteNetlinkMessage::SetLink(message), 0)]).unwrap();
}

/// Addresses that the bridge has learnt or was told.
fn forwarding_entries() -> usize {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    Netlink::route().unwrap().dump(RouteNetlinkMessage::GetNeighbour(message)).unwrap().len()
}

/// Made-up source addresses fill no table, for two reasons each of which is
/// enough; without both they do.
#[test]
fn a_flood_of_addresses_fills_no_table() {
    const FLOOD: u32 = 3000;
    const ROWS: &[(&[Protection], bool)] =
        &[(&[], false), (&[Identity], false), (&[PortFlags], false), (&[Identity, PortFlags], true)];
    for &(without, fills) in ROWS {
        on_a_host(|| {
            let mut world = World::new(without, true);
            let vectors::Cast { own, gateway, .. } = world.cast();
            let before = forwarding_entries();
            for number in 0..FLOOD {
                let [_, b, c, d] = number.to_be_bytes();
                let packet = [frames::udp(own.ip, gateway.ip, (5000, 6000)), vec![0; MARK_LEN]].concat();
                let frame = frames::ethernet(gateway.mac, [2, 9, b, c, d, 9], frames::IPV4, &packet);
                // Now and then with a look at what came, or no ear had room for more.
                if number % 64 == 0 { drop(world.send_marked(&frame)) } else { world.send_only(&frame) }
            }
            world.send(&[0; 14]);
            let grown = forwarding_entries() - before;
            assert_eq!(grown >= FLOOD as usize, fills, "without {without:?}: {grown} more");
            assert!(fills || grown == 0, "without {without:?}: {grown} more");
        });
    }
}

/// Says that it is over, also when a test fails: the others would go on.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends spoofed frames without a pause from the moment that the link exists,
/// while `meanwhile` runs; then an honest one. Whether a spoofed one arrived.
fn spoofed_meanwhile(config: NetConfig, without: &[Protection], meanwhile: impl FnOnce()) -> bool {
    const SPOOF: &[u8; 12] = b"qvd-spoofed!";
    let network = Network::open_without(config, without).unwrap();
    let netns = netns::create().unwrap();
    let ears = PacketSocket::open(&network.bridge_name(), ETHERTYPE_ALL).unwrap();
    let gateway = Station::new(Mac::of(INSTANCE, subnet().gateway()), subnet().gateway());
    let (stop, sent, heard) = (AtomicBool::new(false), AtomicU32::new(0), AtomicBool::new(false));
    let inside = netns.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            netns::in_netns(netns.as_fd(), || {
                let victim = std::net::Ipv4Addr::new(10, 66, 0, 99);
                let packet = frames::udp(victim, gateway.ip, (5000, 6000));
                let frame = frames::ethernet(gateway.mac, [2, 6, 6, 6, 6, 6], frames::IPV4, &packet);
                let frame = [&frame[..], SPOOF].concat();
                while !stop.load(Ordering::Relaxed) {
                    let Ok(socket) = PacketSocket::open("eth0", ETHERTYPE_ALL) else { continue };
                    while !stop.load(Ordering::Relaxed) {
                        // Down at first: an error, and once more.
                        sent.fetch_add(u32::from(socket.send(&frame).is_ok()), Ordering::Relaxed);
                    }
                }
            })
            .unwrap();
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                while let Some(frame) = ears.receive(Duration::from_millis(1)).unwrap() {
                    heard.fetch_or(holds(&frame, SPOOF), Ordering::Relaxed);
                }
            }
        });
        let _stop = Stop(&stop);
        let policy = NetPolicy::host_only();
        let spec = PortSpec { desktop: desktop(7), netns: inside.as_fd(), address: None, policy };
        let port = network.attach(&spec).unwrap();
        let made = Desktop { netns: inside.try_clone().unwrap(), port };
        meanwhile();
        // The link works: what was not heard was stopped.
        let request = frames::arp(1, made.station(), gateway.ip);
        let request = frames::ethernet(frames::BROADCAST, made.station().mac, frames::ARP, &request);
        // Deaf to the flood, which would leave it no room.
        let control = PacketSocket::open(&network.bridge_name(), frames::ARP).unwrap();
        connected(&made.socket(), &request, &control);
        let enough = sent.load(Ordering::Relaxed) + 500;
        while sent.load(Ordering::Relaxed) < enough {
            thread::yield_now();
        }
    });
    while let Some(frame) = ears.receive(Duration::ZERO).unwrap() {
        heard.fetch_or(holds(&frame, SPOOF), Ordering::Relaxed);
    }
    assert!(sent.into_inner() > 0);
    heard.into_inner()
}

#[test]
fn a_spoof_right_after_link_up_is_stopped() {
    const ROWS: &[(Backend, &[Protection], bool)] =
        &[(Backend::Nft, &[], false), (Backend::Nft, &[Identity, PortFlags], true), (Backend::Iptables, &[], false)];
    for &(backend, without, heard) in ROWS {
        on_a_host(|| {
            let config = NetConfig { backend, ..config() };
            assert_eq!(spoofed_meanwhile(config, without, || {}), heard, "{backend}, without {without:?}");
        });
    }
}

#[test]
fn a_spoof_during_a_rule_update_is_stopped() {
    for (backend, updates) in [(Backend::Nft, 10), (Backend::Iptables, 2)] {
        on_a_host(|| {
            let config = NetConfig { backend, ..config() };
            let heard = spoofed_meanwhile(config, &[], || {
                for _ in 0..updates {
                    Network::open(config).unwrap();
                }
            });
            assert!(!heard, "{backend}");
        });
    }
}
