//! Each rule of the bridge family is taken out, one at a time, from the rule set
//! as it is loaded: some frame fares otherwise then, or the rule is one of those
//! named here that another rule or the bridge makes up for.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    os::fd::{AsFd as _, OwnedFd},
    process::Command,
};

use qvd_sys::{
    netns,
    packet::{ETHERTYPE_ALL, PacketSocket},
};
use qvd_testkit::privileged;

use super::{
    NEEDS, frames, groups,
    world::{INSTANCE, PATIENCE, Seen, World, config, connected, holds, on_a_host},
};
use crate::{Backend, DropReason, Mac, NetConfig, links, netlink::Netlink};

/// A rule as `nft` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) chain: String,
    pub(super) text: String,
    handle: String,
}

fn nft(args: &[&str]) -> String {
    let output = Command::new("nft").args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// All rules of our table of a family.
pub(super) fn rules(family: &str) -> Vec<Rule> {
    let table = crate::rules::table_name(INSTANCE);
    let (mut chain, mut rules) = (String::new(), Vec::new());
    for line in nft(&["-a", "list", "table", family, &table]).lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("chain ") {
            chain = name.split(' ').next().unwrap().to_owned();
        } else if let Some((text, handle)) = line.split_once(" # handle ")
            && !chain.is_empty()
            && !text.ends_with('{')
        {
            rules.push(Rule { chain: chain.clone(), text: text.to_owned(), handle: handle.to_owned() });
        }
    }
    rules
}

impl Rule {
    pub(super) fn delete(&self, family: &str) {
        nft(&["delete", "rule", family, &crate::rules::table_name(INSTANCE), &self.chain, "handle", &self.handle]);
    }
}

/// Every frame, and whether the host is to see it.
pub(super) fn every_frame(world: &World) -> Vec<(String, Vec<u8>, bool)> {
    let matrix = world.hostile().into_iter().map(|(name, frame)| (name.to_owned(), frame, false));
    matrix.chain(groups::all_frames(&world.cast())).collect()
}

/// A bridge of somebody else's on the same host, with two ports.
pub(super) struct Others {
    from: PacketSocket,
    to: PacketSocket,
    host: PacketSocket,
    _inside: [OwnedFd; 2],
}

impl Others {
    pub(super) fn new() -> Self {
        const BRIDGE: &str = "others";
        let mut route = Netlink::route().unwrap();
        let mac = |number| Mac::of(INSTANCE, Ipv4Addr::new(192, 0, 2, number));
        route.batch(vec![links::ensure_bridge(BRIDGE, mac(1), 0, 1500, 0, Backend::Nft)]).unwrap();
        let bridge = crate::network::find(&mut route, BRIDGE).unwrap().unwrap().index;
        route.batch(vec![links::raise(bridge)]).unwrap();
        let inside = [2, 3].map(|number| {
            let (netns, name) = (netns::create().unwrap(), format!("other{number}"));
            route.batch(vec![links::create_pair(&name, bridge, 0, mac(number), 1500, netns.as_fd())]).unwrap();
            let made = crate::network::find(&mut route, &name).unwrap().unwrap();
            route.batch(vec![links::raise(made.index)]).unwrap();
            netns::in_netns(netns.as_fd(), || Netlink::route().unwrap().batch(vec![links::raise(made.peer.unwrap())]))
                .unwrap()
                .unwrap();
            netns
        });
        let socket = |netns: &OwnedFd| {
            netns::in_netns(netns.as_fd(), || PacketSocket::open("eth0", ETHERTYPE_ALL)).unwrap().unwrap()
        };
        let (from, to) = (socket(&inside[0]), socket(&inside[1]));
        connected(&from, &Self::frame(), &to);
        Self { from, to, host: PacketSocket::open(BRIDGE, ETHERTYPE_ALL).unwrap(), _inside: inside }
    }

    /// To a group of programs.
    fn frame() -> Vec<u8> {
        frames::ethernet([1, 0, 0x5e, 0, 0, 0xfb], [2, 0, 0, 0, 0, 1], 0x88b5, &[0; 50])
    }

    pub(super) fn talk(&self) -> bool {
        const MARK: &[u8] = b"of-the-others";
        self.from.send(&[&Self::frame()[..], MARK].concat()).unwrap();
        let hears = |ear: &PacketSocket, mark: &[u8]| {
            let mut heard = std::iter::from_fn(|| ear.receive(PATIENCE / 20).unwrap());
            heard.any(|frame| holds(&frame, mark))
        };
        let between = [&self.to, &self.host].iter().all(|ear| hears(ear, MARK));
        const OF_HOST: &[u8] = b"of-their-host";
        self.host.send(&[&Self::frame()[..], OF_HOST].concat()).unwrap();
        between && hears(&self.to, OF_HOST)
    }
}

/// A frame: whether it passes, and how often it is counted for which reason.
type Fate = (String, Vec<u8>, bool, BTreeMap<DropReason, u64>);

/// How often a frame is tried until it fares twice alike: the desktop's own kernel
/// says something now and then, which is counted as well.
const TRIES: usize = 5;

/// What becomes of a frame, and what is counted meanwhile.
fn fate(world: &mut World, frame: &[u8]) -> (Seen, BTreeMap<DropReason, u64>) {
    let before = world.a.port.drops().unwrap();
    let seen = world.send(frame);
    (seen, grown(&before, world.a.port.drops().unwrap()))
}

/// Every frame with the reason that it is dropped for, if it is.
fn with_reasons(world: &mut World) -> Vec<Fate> {
    let all = every_frame(world).into_iter().map(|(name, frame, passes)| {
        let mut reasons = fate(world, &frame).1;
        for _ in 0..TRIES {
            let again = fate(world, &frame).1;
            if again == reasons {
                break;
            }
            reasons = again;
        }
        (name, frame, passes, reasons)
    });
    all.collect()
}

pub(super) fn grown(
    before: &BTreeMap<DropReason, u64>,
    mut after: BTreeMap<DropReason, u64>,
) -> BTreeMap<DropReason, u64> {
    after.iter_mut().for_each(|(reason, count)| *count -= before.get(reason).copied().unwrap_or_default());
    after.retain(|_, count| *count > 0);
    after
}

/// What fares otherwise than it is meant to, or is dropped for another reason.
fn changes(world: &mut World, others: &Others, all: &[Fate]) -> Option<String> {
    if !world.is_heard() {
        return Some("arp".to_owned());
    }
    if !world.is_told() {
        return Some("what the host says".to_owned());
    }
    if !others.talk() {
        return Some("frames of a bridge that is not ours".to_owned());
    }
    for (name, frame, [at_a, at_b]) in groups::from_host(world) {
        if world.hears(&frame) != [at_a, at_b] {
            return Some(name);
        }
    }
    let fares = |world: &mut World, (_, frame, passes, reasons): &Fate| {
        let (seen, counted) = fate(world, frame);
        let as_meant = if *passes { seen.host && !seen.neighbour } else { seen == Seen::default() };
        as_meant && counted == *reasons
    };
    let otherwise = all.iter().find(|one| !(0..TRIES).any(|_| fares(world, one)));
    otherwise.map(|(name, ..)| name.clone())
}

/// Rules that nothing is changed by if they alone are missing.
fn silent() -> Vec<String> {
    let mut silent = Vec::new();
    on_a_host(|| {
        let config = NetConfig { internet: true, ..config() };
        let mut world = World::of(config, groups::policy(true), &[]);
        let others = Others::new();
        let all = with_reasons(&mut world);
        assert_eq!(changes(&mut world, &others, &all), None);
        let count = rules("bridge").len();
        assert!(count > 40, "{count}");
        for place in 0..count {
            let rule = rules("bridge").remove(place);
            rule.delete("bridge");
            if changes(&mut world, &others, &all).is_none() {
                silent.push(format!("{}: {}", rule.chain, rule.text));
            }
            // As when they are mended: loads all rules, keeps the elements.
            world.network.inner().load().unwrap();
        }
    });
    silent
}

/// Rules whose lack alone changes nothing: what is told of, which a test of its
/// own looks at; and what the bridge itself would stop, which
/// [`super::confinement`] takes out together.
const MADE_UP_FOR: &[&str] = &[
    "dropped: add @sampled { iifname . meta mark limit rate 10/minute burst 2 packets } log group 32343 snaplen 64",
    "to_neighbour: iifname \"qvd7e57-*\" meta mark set 0x00000008 goto dropped",
    "to_neighbour: oifname \"qvd7e57-*\" drop",
];

#[test]
fn each_rule_decides_about_some_frame() {
    privileged(NEEDS, || assert_eq!(silent(), MADE_UP_FOR));
}
