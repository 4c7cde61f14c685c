//! Each rule of ebtables is taken out, one at a time, as [`super::mutation`] does with
//! those of nftables: some frame fares otherwise then, or the rule is one of those named here.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use qvd_testkit::{Need, privileged};

use super::{
    groups,
    mutation::{Others, every_frame},
    world::{INSTANCE, Seen, World, config, on_a_host},
};
use crate::{Backend, NetConfig};

const NEEDS: &[Need] = &[Need::Root, Need::Namespaces, Need::Program("ebtables"), Need::Program("iptables")];

/// How often something is tried until it fares as it should.
const TRIES: usize = 3;

/// What was loaded at first.
struct Loaded(String);

impl Loaded {
    fn now() -> Self {
        let output = Command::new("ebtables-save").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self(String::from_utf8(output.stdout).unwrap())
    }

    /// The lines of rules of ours, but those that say any of `left`.
    fn rules(&self, left: &[&str]) -> Vec<(usize, String)> {
        let bridge = INSTANCE.bridge_name();
        let ours = |line: &str| line.starts_with("-A ") && line.contains(&*bridge);
        let is_left = |line: &str| left.iter().any(|left| line.contains(left));
        let lines = self.0.lines().enumerate().filter(|(_, line)| ours(line) && !is_left(line));
        lines.map(|(at, line)| (at, line.to_owned())).collect()
    }

    /// Loads all but one line.
    fn load_without(&self, left_out: Option<usize>) {
        let lines = self.0.lines().enumerate().filter(|&(at, _)| Some(at) != left_out);
        let text: String = lines.map(|(_, line)| format!("{line}\n")).collect();
        let mut restore = Command::new("ebtables-restore").stdin(Stdio::piped()).spawn().unwrap();
        restore.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        assert!(restore.wait().unwrap().success(), "{text}");
    }
}

/// What becomes of all that the nftables' rules are tried with.
struct Fates<'a> {
    frames: Vec<(String, Vec<u8>, Seen)>,
    from_host: Vec<(Vec<u8>, [bool; 2])>,
    others: &'a Others,
}

impl<'a> Fates<'a> {
    fn of(world: &mut World, others: &'a Others) -> Self {
        let frames = every_frame(world).into_iter().map(|(name, frame, _)| {
            let seen = world.send(&frame);
            (name, frame, seen)
        });
        let frames = frames.collect();
        let from_host = groups::from_host(world).into_iter().map(|(_, frame, _)| {
            let heard = world.hears(&frame);
            (frame, heard)
        });
        Self { frames, from_host: from_host.collect(), others }
    }

    fn are_the_same(&self, world: &mut World) -> bool {
        let mut told = || world.is_heard() && world.is_told() && self.others.talk();
        (0..TRIES).any(|_| told())
            && self.from_host.iter().all(|(frame, heard)| (0..TRIES).any(|_| world.hears(frame) == *heard))
            && self.frames.iter().all(|(_, frame, seen)| (0..TRIES).any(|_| world.send(frame) == *seen))
    }
}

/// Rules whose lack alone changes nothing: the bridge lets its ports neither talk to
/// each other nor use another's MAC, and what a chain does not end, one further up does.
const MADE_UP_FOR: &[&str] = &[
    "-A FORWARD -j qvd7e57-route",
    "-A qvd7e57-route -i qvd7e57-+ -j DROP",
    "-A qvd7e57-route -o qvd7e57-+ -j DROP",
    "-A qvd7e57-7 -s ! 52:7e:57:42:00:08 -j DROP",
    "-A qvd7e57-7 -j DROP",
    "-A qvd7e57-arp -j DROP",
    "-A qvd7e57-hook -i qvd7e57-+ -j DROP",
    "-A qvd7e57-ip6 -j DROP",
];

#[test]
fn each_rule_of_ebtables_decides_about_some_frame() {
    privileged(NEEDS, || {
        on_a_host(|| {
            let config = NetConfig { internet: true, backend: Backend::Iptables, ..config() };
            let mut world = World::of(config, groups::policy(true), &[]);
            let others = Others::new();
            let fates = Fates::of(&mut world, &others);
            assert!(fates.are_the_same(&mut world), "nothing was taken out");
            let loaded = Loaded::now();
            // The second desktop sends nothing, and each further address has the rules of the first.
            let from_b = format!("-i {}", world.b.port.link());
            let rules =
                loaded.rules(&[&format!("-A {} ", world.b.port.link()), &from_b, " 192.0.2.", " 2001:db8:7::9"]);
            assert!(rules.len() > 30, "{rules:?}");
            let mut silent = Vec::new();
            for (at, rule) in rules {
                loaded.load_without(Some(at));
                if fates.are_the_same(&mut world) {
                    silent.push(rule);
                }
                loaded.load_without(None);
            }
            assert!(fates.are_the_same(&mut world), "all was put back");
            assert_eq!(silent, MADE_UP_FOR);
        });
    });
}
