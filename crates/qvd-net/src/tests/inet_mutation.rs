//! Each rule of the *inet* family, those of policies among them, is taken out,
//! one at a time: some packet fares otherwise then, or the rule is one of those named
//! here that another rule makes up for or another test looks at.

use std::{
    collections::BTreeMap,
    io::Write as _,
    net::{IpAddr, Ipv4Addr},
    num::NonZeroU32,
    process::{Command, Stdio},
};

use qvd_core::{NameServers, Neighbours, NetPolicy};
use qvd_testkit::privileged;

use super::{
    NEEDS,
    groups::{self, GROUP, GROUP6},
    internet::{NAMES, OUTSIDE, OUTSIDE6, UPLINK},
    mutation::{Rule, rules},
    site::{FAR, FAR6, limited},
    stage::{NEIGHBOUR, SERVICE, Stage, Story, gateway6, neighbour6},
    world::{INSTANCE, on_a_host, subnet},
};
use crate::rules::table_name;

/// How often a packet is tried until it fares as it should: the desktop's own kernel
/// says something now and then, which is counted as well.
const TRIES: usize = 3;

/// The policies of both desktops, and what is tried with them.
type Scene = (NetPolicy, NetPolicy, Vec<Story>);

fn scenes() -> Vec<Scene> {
    use Story::{
        Answer, Asked, Burst, Connections, Echo, Group, Packet, Related, Reset, Segment, Solicitation, Unasked,
    };
    let gateway = IpAddr::from(subnet().gateway());
    let nobody = Ipv4Addr::new(10, 66, 0, 99);
    let hosts: [IpAddr; 7] = [
        OUTSIDE.into(),
        OUTSIDE6.into(),
        FAR.into(),
        FAR6.into(),
        NEIGHBOUR.into(),
        neighbour6().into(),
        nobody.into(),
    ];
    let mut all: Vec<Story> = hosts.into_iter().flat_map(|to| [Packet(to, 17, 443), Packet(to, 6, 443)]).collect();
    all.extend([Answer(OUTSIDE.into()), Answer(OUTSIDE6.into()), Unasked(OUTSIDE.into()), Unasked(OUTSIDE6.into())]);
    all.extend([Related, Asked, Solicitation, Segment, Reset, Echo(UPLINK.into())]);
    for (to, group) in [(gateway, GROUP.into()), (gateway6().into(), GROUP6.into())] {
        all.extend([Echo(to), Packet(to, 17, 53), Packet(to, 17, SERVICE), Group(group)]);
    }
    for server in [NAMES.into(), FAR.into(), FAR6.into()] {
        all.push(Packet(server, 17, 53));
    }
    let internet = NetPolicy::internet;
    let particular = NetPolicy {
        services: vec![format!("udp {SERVICE}").parse().unwrap()],
        neighbours: Neighbours::Tenant,
        names: NameServers::Ours,
        ..limited(&["198.51.100.0/25 udp 443", "203.0.113.9", "2001:db8:1::/48 udp 443", "2001:db8:9::9 tcp 443"])
    };
    let ours = NetPolicy { names: NameServers::Ours, ..internet() };
    let few = NetPolicy { connections: NonZeroU32::new(2), ..internet() };
    let slow = NetPolicy { up_kbit_s: NonZeroU32::new(8), ..internet() };
    let routed = NetPolicy { routed: true, ..internet() };
    vec![
        (NetPolicy::host_only(), internet(), all.clone()),
        (groups::policy(true), internet(), all.clone()),
        (particular.clone(), particular, all.clone()),
        (ours.clone(), ours, all.clone()),
        (routed, internet(), all),
        (few, internet(), vec![Connections]),
        (slow, internet(), vec![Burst]),
    ]
}

/// Puts the rules of a chain back as they were.
fn restore(chain: &str, rules: &[Rule]) {
    let table = table_name(INSTANCE);
    let mut text = format!("flush chain inet {table} {chain}\n");
    for rule in rules.iter().filter(|rule| rule.chain == chain) {
        text.push_str(&format!("add rule inet {table} {chain} {}\n", rule.text));
    }
    let mut nft = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    nft.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(nft.wait().unwrap().success(), "{text}");
}

/// A rule, the same of whatever policy it is.
fn rule_of_any_policy(rule: &Rule) -> String {
    let name = format!("{}: {}", rule.chain, rule.text);
    match rule.chain.split_once('-') {
        Some((_, policy)) => name.replace(&format!("-{policy}"), ""),
        None => name,
    }
}

/// Rules that say the same one after the other: what links are known by can be
/// changed by others. They are taken out together.
const TOGETHER: &[(&str, &str)] = &[("routed", "goto outward"), ("routed", "goto inward")];

/// Which of [`TOGETHER`] a rule is of.
fn family(rule: &Rule) -> Option<usize> {
    TOGETHER.iter().position(|&(chain, end)| rule.chain == chain && rule.text.ends_with(end))
}

/// Takes out each rule that nobody noticed yet, and notes whose lack somebody does.
fn take_out(noticed: &mut BTreeMap<String, bool>, of_a: NetPolicy, of_b: NetPolicy, stories: &[Story]) {
    let mut stage = Stage::new(of_a, of_b);
    // The first time, flows and neighbours are not known yet.
    let told: Vec<_> = stories.iter().map(|&story| (stage.tell(story), stage.tell(story)).1).collect();
    let all_as_told = |stage: &mut Stage| {
        stories.iter().zip(&told).find(|(story, told)| !(0..TRIES).any(|_| stage.tell(**story) == **told)).is_none()
    };
    assert!(all_as_told(&mut stage), "nothing was taken out");
    for place in 0..rules("inet").len() {
        // Put back, they have other handles.
        let rules = rules("inet");
        let rule = &rules[place];
        let noticed = noticed.entry(rule_of_any_policy(rule)).or_default();
        if *noticed {
            continue;
        }
        match family(rule) {
            Some(family_of) => {
                rules.iter().filter(|other| family(other) == Some(family_of)).for_each(|other| other.delete("inet"))
            }
            None => rule.delete("inet"),
        }
        *noticed = !all_as_told(&mut stage);
        restore(&rule.chain, &rules);
    }
    assert!(all_as_told(&mut stage), "all was put back");
}

/// Rules whose lack changes nothing here: what is told of and what the second bridge
/// and a port that lost its bridge need have tests of their own ([`super::drops`],
/// [`super::bridges`], [`super::confinement`]); groups are routed by none but a multicast router.
const MADE_UP_FOR: &[&str] = &[
    "dropped: add @sampled { ether saddr . meta mark limit rate 10/minute burst 2 packets } log group 32343 snaplen 64",
    "inward: ip daddr 224.0.0.0/4 accept",
    "inward: ip6 daddr ff00::/8 accept",
    "routed: iifname \"qvd7e57-*\" drop",
    "to_host: iifname \"qvd7e57-*\" drop",
    "to_host: iifname \"qvd7e57.*\" goto of_desktop",
];

#[test]
fn each_rule_behind_the_port_decides_about_some_packet() {
    privileged(NEEDS, || {
        let mut noticed = BTreeMap::new();
        for (of_a, of_b, stories) in scenes() {
            on_a_host(|| take_out(&mut noticed, of_a, of_b, &stories));
        }
        assert!(noticed.len() > 30, "{noticed:?}");
        noticed.retain(|_, noticed| !*noticed);
        let silent: Vec<_> = noticed.into_keys().collect();
        assert_eq!(silent, MADE_UP_FOR);
    });
}
