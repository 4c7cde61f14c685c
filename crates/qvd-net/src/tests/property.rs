//! Random frames: the rule set and the reference have to agree on each.

use std::{cell::RefCell, net::Ipv4Addr};

use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, TestCaseError, TestRunner},
};
use qvd_core::NetPolicy;

use crate::{
    NetConfig,
    explain::{Party, at_port},
};

use super::{
    frames::{self, Station, ethernet, tagged},
    groups, vectors,
    world::{Seen, World, config, on_a_host, subnet},
};

/// How a frame that would be good is spoiled.
#[derive(Debug, Clone)]
enum Change {
    /// Some octet becomes another.
    Octet {
        at: prop::sample::Index,
        value: u8,
    },
    /// One bit.
    Bit {
        at: prop::sample::Index,
        bit: u8,
    },
    /// The end is missing.
    Cut(prop::sample::Index),
    Tag {
        protocol: u16,
        tag: u16,
    },
    To([u8; 6]),
    From([u8; 6]),
    Ethertype(u16),
}

fn change(cast: vectors::Cast) -> impl Strategy<Value = Change> {
    let macs = vec![cast.own.mac, cast.other.mac, cast.gateway.mac, frames::BROADCAST, [1, 0x80, 0xc2, 0, 0, 14]];
    let ethertypes = vec![frames::ARP, frames::IPV4, frames::IPV6, 0x8035, 0x8100, 0x0026, 0x88cc];
    prop_oneof![
        4 => (any::<prop::sample::Index>(), any::<u8>()).prop_map(|(at, value)| Change::Octet { at, value }),
        4 => (any::<prop::sample::Index>(), 0..8_u8).prop_map(|(at, bit)| Change::Bit { at, bit }),
        2 => any::<prop::sample::Index>().prop_map(Change::Cut),
        1 => (prop::sample::select(vec![0x8100_u16, 0x88a8, 0x9100]), any::<u16>())
            .prop_map(|(protocol, tag)| Change::Tag { protocol, tag }),
        1 => prop::sample::select(macs.clone()).prop_map(Change::To),
        1 => prop::sample::select(macs).prop_map(Change::From),
        1 => prop_oneof![prop::sample::select(ethertypes), any::<u16>()].prop_map(Change::Ethertype),
    ]
}

fn changed(mut frame: Vec<u8>, change: &Change) -> Vec<u8> {
    match change {
        Change::Octet { at, value } => {
            let at = at.index(frame.len());
            frame[at] = *value;
        }
        Change::Bit { at, bit } => {
            let at = at.index(frame.len());
            frame[at] ^= 1 << bit;
        }
        // Fewer than a header the kernel does not take from anybody.
        Change::Cut(at) => frame.truncate(14 + at.index(frame.len().saturating_sub(14).max(1))),
        Change::Tag { protocol, tag } if frame.len() >= 14 => frame = tagged(&frame, *protocol, *tag),
        Change::Tag { .. } => {}
        Change::To(mac) => frame[..6].copy_from_slice(mac),
        Change::From(mac) => frame[6..12].copy_from_slice(mac),
        Change::Ethertype(ethertype) => frame[12..14].copy_from_slice(&ethertype.to_be_bytes()),
    }
    frame
}

/// Addresses that decide something, and any other.
fn address(cast: vectors::Cast) -> impl Strategy<Value = Ipv4Addr> {
    let special = vec![
        cast.own.ip,
        cast.other.ip,
        cast.gateway.ip,
        subnet().broadcast(),
        Ipv4Addr::UNSPECIFIED,
        Ipv4Addr::BROADCAST,
        Ipv4Addr::LOCALHOST,
        Ipv4Addr::new(169, 254, 169, 254),
        Ipv4Addr::new(224, 0, 0, 251),
        Ipv4Addr::new(198, 51, 100, 2),
    ];
    prop_oneof![4 => prop::sample::select(special), 1 => any::<u32>().prop_map(Ipv4Addr::from)]
}

/// Mostly what an honest desktop would send, so that a change is what decides.
fn seed(cast: vectors::Cast) -> impl Strategy<Value = Vec<u8>> {
    let own = cast.own;
    let sources = prop_oneof![6 => Just(own.ip), 1 => address(cast)];
    let targets = prop_oneof![3 => Just(cast.gateway.ip), 2 => address(cast)];
    let port = || prop::sample::select(vec![53_u16, 67, 68, 546, 547, 5000]);
    let ip =
        (sources, targets, prop_oneof![4 => prop::sample::select(vec![1_u8, 6, 17]), 1 => any::<u8>()], port(), port())
            .prop_map(move |(source, target, protocol, from, to)| {
                let payload = [from.to_be_bytes(), to.to_be_bytes(), [0, 20], [0, 0], [0x50, 2], [0; 2]].concat();
                let packet = frames::ipv4(source, target, frames::Ip { protocol, ..frames::Ip::default() }, &payload);
                ethernet(cast.gateway.mac, own.mac, frames::IPV4, &packet)
            });
    let arp = (0..4_u16, address(cast), address(cast)).prop_map(move |(operation, sender, target)| {
        let packet = frames::arp(operation, Station { ip: sender, ..own }, target);
        ethernet(frames::BROADCAST, own.mac, frames::ARP, &packet)
    });
    let hostile = prop::sample::select(vectors::hostile(&cast)).prop_map(|(_, frame)| frame);
    let honest = prop::sample::select(vectors::honest(&cast)).prop_map(|(_, frame)| frame);
    let of_groups = prop::sample::select(groups::frames_of_groups(&cast)).prop_map(|(_, frame, _)| frame);
    let noise = vec(any::<u8>(), 14..200);
    prop_oneof![4 => ip, 3 => arp, 5 => honest, 3 => hostile, 2 => of_groups, 1 => noise]
}

#[test]
fn the_rules_decide_as_the_reference_does() {
    for policy in [NetPolicy::internet(), groups::policy(true)] {
        on_a_host(|| rules_decide_as_the_reference_does(policy));
    }
}

fn rules_decide_as_the_reference_does(policy: NetPolicy) {
    const CASES: u32 = 16_000;
    let world = World::of(NetConfig { internet: true, ..config() }, policy, &[]);
    let cast = world.cast();
    let party = Party {
        mac: cast.own.mac,
        ipv4: cast.own.ip,
        gateway_mac: cast.gateway.mac,
        broadcast: subnet().broadcast(),
        global: Some(cast.own6.global),
        link_local: cast.own6.link_local,
        extra: world.a.port.extra_addresses().to_vec(),
        groups: world.a.port.groups().to_vec(),
    };
    let (world, passed) = (RefCell::new(world), RefCell::new(0_u32));
    let frames = (seed(cast), vec(change(cast), 0..3)).prop_map(|(frame, changes)| changes.iter().fold(frame, changed));
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    let outcome = TestRunner::new(config).run(&frames, |frame| {
        let (sent, seen) = world.borrow_mut().send_marked(&frame);
        let (expected, rule) = at_port(&party, &sent);
        *passed.borrow_mut() += u32::from(expected);
        if seen.host != expected || seen.neighbour {
            return Err(TestCaseError::fail(format!("{expected}, {rule}, {seen:?}: {sent:02x?}")));
        }
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
    // Neither answer is rare, or agreeing would mean little.
    let passed = passed.into_inner();
    assert!((CASES / 20..CASES * 19 / 20).contains(&passed), "{passed} of {CASES} passed");
    let _no_frame_is_left: Seen = world.into_inner().send(&[0; 14]);
}

/// The port's own answer agrees with where the frame goes, and names a rule.
#[test]
fn a_port_explains_what_becomes_of_a_frame() {
    on_a_host(|| {
        let mut world = World::new(&[], true);
        let hostile = vectors::hostile(&world.cast()).into_iter().map(|named| (named, false));
        let all: Vec<_> =
            hostile.chain(vectors::honest(&world.cast()).into_iter().map(|named| (named, true))).collect();
        for ((name, frame), passes) in all {
            let (sent, _) = world.send_marked(&frame);
            let decision = world.a.port.explain(&sent);
            assert_eq!(decision.passes, passes, "{name}: {decision}");
            assert!(!decision.rule.is_empty());
        }
    });
}

/// Who looks at a port sees what it sent counted, and what a frame would do.
#[test]
fn a_port_shows_what_went_through_it() {
    on_a_host(|| {
        let mut world = World::new(&[], true);
        let before = world.a.port.counters().unwrap();
        let (name, frame) = vectors::honest(&world.cast()).remove(0);
        assert!(world.send(&frame).host, "{name}");
        let view = world.a.port.view(&[frame, vec![0; 14]]).unwrap();
        assert!(view.counters.sent_packets > before.sent_packets, "{view:?}");
        assert!(view.counters.sent_bytes > before.sent_bytes, "{view:?}");
        assert_eq!(
            (&*view.link, view.mac, view.ipv4),
            (world.a.port.link(), world.a.port.mac(), world.a.port.address())
        );
        assert_eq!(view.explained.iter().map(|decision| decision.arrives).collect::<Vec<_>>(), [true, false]);
    });
}
