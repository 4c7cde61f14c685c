//! Each rule at the port of ebtables, iptables and ip6tables is taken out, one at a time, as
//! [`super::mutation`] does with those of nftables: some frame fares otherwise then, or the
//! rule is one of those named here.

use std::collections::BTreeMap;

use qvd_testkit::privileged;

use super::{
    groups,
    mutation::{Others, every_frame, grown},
    saved::{self, Line, Saved},
    world::{Seen, World, config, on_a_host},
};
use crate::{Backend, DropReason, NetConfig};

/// How often something is tried until it fares as it should.
const TRIES: usize = 3;

/// What becomes of all that the nftables' rules are tried with.
struct Fates<'a> {
    frames: Vec<(String, Vec<u8>, Seen)>,
    /// Why the frames were dropped at the port, all together.
    reasons: BTreeMap<DropReason, u64>,
    from_host: Vec<(Vec<u8>, [bool; 2])>,
    others: &'a Others,
}

impl<'a> Fates<'a> {
    fn of(world: &mut World, others: &'a Others) -> Self {
        let frames = every_frame(world).into_iter().map(|(name, frame, _)| {
            let seen = world.send(&frame);
            (name, frame, seen)
        });
        let frames: Vec<_> = frames.collect();
        let reasons = at_port(world, |world| {
            assert!(frames.iter().filter(|(_, frame, seen)| world.send(frame) == *seen).count() > 200);
        });
        let from_host = groups::from_host(world).into_iter().map(|(_, frame, _)| {
            let heard = world.hears(&frame);
            (frame, heard)
        });
        Self { frames, reasons, from_host: from_host.collect(), others }
    }

    fn are_the_same(&self, world: &mut World) -> bool {
        let mut told = || world.is_heard() && world.is_told() && self.others.talk();
        (0..TRIES).any(|_| told())
            && self.from_host.iter().all(|(frame, heard)| (0..TRIES).any(|_| world.hears(frame) == *heard))
            && (0..TRIES).any(|_| self.fare_the_same(world))
    }

    fn fare_the_same(&self, world: &mut World) -> bool {
        let mut all = true;
        let reasons = at_port(world, |world| {
            all = self.frames.iter().all(|(_, frame, seen)| world.send(frame) == *seen);
        });
        all && reasons == self.reasons
    }
}

/// What is counted at the port meanwhile: behind it, the desktop's own kernel says
/// something now and then.
fn at_port(world: &mut World, meanwhile: impl FnOnce(&mut World)) -> BTreeMap<DropReason, u64> {
    let before = world.a.port.drops().unwrap();
    meanwhile(world);
    let mut reasons = grown(&before, world.a.port.drops().unwrap());
    reasons.retain(|reason, _| !reason.is_behind_bridge());
    reasons
}

/// The rules of a program whose lack alone nobody notices.
fn silent(program: &'static str, is_left: impl Fn(&Line) -> bool + Sync) -> Vec<String> {
    let mut silent = Vec::new();
    on_a_host(|| {
        let config = NetConfig { internet: true, backend: Backend::Iptables, ..config() };
        let mut world = World::of(config, groups::policy(true), &[]);
        let others = Others::new();
        let fates = Fates::of(&mut world, &others);
        assert!(fates.are_the_same(&mut world), "nothing was taken out");
        let saved = Saved::now(program);
        // The second desktop sends nothing.
        let second = world.b.port.link();
        let rules = saved.rules().into_iter().filter(|rule| !rule.text.split(' ').any(|word| word == second));
        let rules: Vec<_> = rules.filter(|rule| !is_left(rule)).collect();
        assert!(rules.len() > 15, "{rules:?}");
        for rule in rules {
            saved.load_without(Some(&rule));
            if fates.are_the_same(&mut world) {
                silent.push(rule.name());
            }
            saved.load_without(None);
        }
        assert!(fates.are_the_same(&mut world), "all was put back");
    });
    silent
}

/// Rules whose lack alone changes nothing: the bridge lets its ports neither talk to
/// each other nor use another's MAC, and what a chain does not end, one further up does.
const MADE_UP_FOR: &[&str] = &[
    "filter: -A FORWARD -j qvd7e57-route",
    "filter: -A qvd7e57-route -i qvd7e57-+ -j DROP",
    "filter: -A qvd7e57-route -o qvd7e57-+ -j DROP",
    "nat: -A qvd7e57-d-ethertype -j DROP",
    "nat: -A qvd7e57-hook -i qvd7e57-+ -j DROP",
];

#[test]
fn each_rule_of_ebtables_decides_about_some_frame() {
    privileged(saved::NEEDS, || {
        // Each further address has the rules of the first.
        let further = |rule: &Line| [" 192.0.2.", " 2001:db8:7::9"].iter().any(|further| rule.text.contains(further));
        assert_eq!(silent("ebtables", further), MADE_UP_FOR);
    });
}

/// The same of iptables: packets are put together before it looks at them
/// ([`Backend::gaps`]), and ports that lost their bridge have a test of their own
/// ([`super::confinement`]).
const MADE_UP_FOR_BEHIND: &[(&str, &[&str])] = &[
    (
        "iptables",
        &[
            "raw: -A qvd7e57-7 -m u32 ! --u32 \"0x4&0x3fff=0x0\" -j qvd7e57-d-fragment",
            "raw: -A qvd7e57-d-fragment -j DROP",
            "raw: -A qvd7e57-hook -i qvd7e57-+ -j DROP",
            "raw: -A qvd7e57-hook -i qvd7e57 -j DROP",
        ],
    ),
    (
        "ip6tables",
        &[
            "raw: -A qvd7e57-7 -m u32 --u32 \"0x4>>0x8&0xff=0x2c\" -j qvd7e57-d-fragment",
            "raw: -A qvd7e57-d-fragment -j DROP",
            "raw: -A qvd7e57-d-option -j DROP",
            "raw: -A qvd7e57-hook -i qvd7e57-+ -j DROP",
            "raw: -A qvd7e57-hook -i qvd7e57 -j DROP",
        ],
    ),
];

#[test]
fn each_rule_of_iptables_at_the_port_decides_about_some_frame() {
    privileged(saved::NEEDS, || {
        for &(program, made_up_for) in MADE_UP_FOR_BEHIND {
            // What is behind the port has a test of its own ([`super::inet_mutation`]).
            let is_left = |rule: &Line| rule.table != "raw" || rule.text.contains(".+");
            assert_eq!(silent(program, is_left), made_up_for, "{program}");
        }
    });
}
