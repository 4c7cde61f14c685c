//! Each rule behind the port, those of policies among them, is taken out, one at a
//! time, with both back ends: some packet fares otherwise then, or the rule is one of
//! those named here that another rule makes up for or another test looks at.

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
    mutation::{Rule, grown, rules},
    saved::{self, Line, Saved},
    site::{FAR, FAR6, limited},
    stage::{NEIGHBOUR, OWN, SERVICE, Stage, Story, gateway_of_link, gateway6, in_ipv6},
    world::{INSTANCE, on_a_host, subnet},
};
use crate::{Backend, rules::table_name};

/// How often a packet is tried until it fares as it should: the desktop's own kernel
/// says something now and then, which is counted as well.
const TRIES: usize = 3;

/// The policies of both desktops, and what is tried with them.
type Scene = (NetPolicy, NetPolicy, Vec<Story>);

fn scenes() -> Vec<Scene> {
    use Story::{
        Advertisement, Answer, Asked, Burst, Connections, Echo, Group, GroupOfLink, Packet, Related, Report, Reset,
        Routed, Segment, Solicitation, Unasked, Visit,
    };
    let gateway = IpAddr::from(subnet().gateway());
    let nobody = Ipv4Addr::new(10, 66, 0, 99);
    let hosts: [IpAddr; 7] = [
        OUTSIDE.into(),
        OUTSIDE6.into(),
        FAR.into(),
        FAR6.into(),
        NEIGHBOUR.into(),
        in_ipv6(NEIGHBOUR).into(),
        nobody.into(),
    ];
    let mut all: Vec<Story> = hosts.into_iter().flat_map(|to| [Packet(to, 17, 443), Packet(to, 6, 443)]).collect();
    all.extend([Echo(UPLINK.into()), Report, Solicitation, Advertisement]);
    for (near, far) in [(OUTSIDE.into(), FAR.into()), (OUTSIDE6.into(), FAR6.into())] {
        all.extend([Answer(near), Unasked(near), Related(near), Segment(far), Reset(far)]);
    }
    for (to, group) in [(gateway, GROUP.into()), (gateway6().into(), GROUP6.into())] {
        all.extend([Echo(to), Packet(to, 17, SERVICE), Group(group), Routed(group), Asked(to)]);
    }
    let of_link = gateway_of_link().into();
    all.extend([
        Echo(of_link),
        Packet(of_link, 17, SERVICE),
        GroupOfLink,
        Visit(OWN.into()),
        Visit(in_ipv6(OWN).into()),
    ]);
    for server in [gateway, gateway6().into(), NAMES.into(), FAR6.into(), OUTSIDE.into(), OUTSIDE6.into()] {
        all.extend([6, 17].into_iter().flat_map(|protocol| [53, 853].map(|port| Packet(server, protocol, port))));
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
    let social = NetPolicy { neighbours: Neighbours::Tenant, ..internet() };
    let of_both = |story: fn(IpAddr) -> Story| vec![story(OUTSIDE.into()), story(OUTSIDE6.into())];
    vec![
        (NetPolicy::host_only(), internet(), all.clone()),
        (groups::policy(true), internet(), all.clone()),
        (particular.clone(), particular, all.clone()),
        (ours.clone(), ours, all.clone()),
        (routed, internet(), all.clone()),
        (social, internet(), all),
        (few, internet(), of_both(Connections)),
        (slow, internet(), of_both(Burst)),
    ]
}

/// Rules that are loaded, in their order, and of which one can be taken out.
trait Loaded {
    /// What each is called, the same of whatever policy.
    fn names(&self) -> Vec<String>;
    fn take_out(&mut self, place: usize);
    fn put_back(&mut self);
}

/// Those of the *inet* family, and the one that is taken out.
struct Inet(Vec<Rule>, usize);

impl Loaded for Inet {
    fn names(&self) -> Vec<String> {
        self.0.iter().map(rule_of_any_policy).collect()
    }

    fn take_out(&mut self, place: usize) {
        // Put back, they have other handles.
        *self = Self(rules("inet"), place);
        let rule = &self.0[place];
        match family(rule) {
            Some(of) => self.0.iter().filter(|other| family(other) == Some(of)).for_each(|other| other.delete("inet")),
            None => rule.delete("inet"),
        }
    }

    fn put_back(&mut self) {
        restore(&self.0[self.1].chain, &self.0);
    }
}

/// Those of a `-restore` command.
struct Commands(Saved, Vec<Line>);

impl Loaded for Commands {
    fn names(&self) -> Vec<String> {
        self.1.iter().map(Line::name).collect()
    }

    fn take_out(&mut self, place: usize) {
        self.0.load_without(Some(&self.1[place]));
    }

    fn put_back(&mut self) {
        self.0.load_without(None);
    }
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
fn take_out_each(noticed: &mut BTreeMap<String, bool>, stage: &mut Stage, stories: &[Story], loaded: &mut dyn Loaded) {
    // The first time, flows and neighbours are not known yet.
    let told: Vec<_> = stories.iter().map(|&story| (stage.tell(story), stage.tell(story)).1).collect();
    let mut reasons = None;
    let mut all_as_told = |stage: &mut Stage| {
        for _ in 0..TRIES {
            let before = stage.site.a.port.drops().unwrap();
            if stories.iter().zip(&told).any(|(story, told)| !(0..TRIES).any(|_| stage.tell(*story) == *told)) {
                return false;
            }
            let seen: Vec<_> = grown(&before, stage.site.a.port.drops().unwrap()).into_keys().collect();
            if *reasons.get_or_insert_with(|| seen.clone()) == seen {
                return true;
            }
        }
        false
    };
    assert!(all_as_told(stage), "nothing was taken out");
    for (place, name) in loaded.names().into_iter().enumerate() {
        let noticed = noticed.entry(name).or_default();
        if !*noticed {
            loaded.take_out(place);
            *noticed = !all_as_told(stage);
            loaded.put_back();
        }
    }
    assert!(all_as_told(stage), "all was put back");
}

/// Rules whose lack changes nothing here: what is told of and what the second bridge
/// and a port that lost its bridge need have tests of their own ([`super::drops`],
/// [`super::bridges`], [`super::confinement`]).
const MADE_UP_FOR: &[&str] = &[
    "dropped: add @sampled { ether saddr . meta mark limit rate 10/minute burst 2 packets } log group 32343 snaplen 64",
    "routed: iifname \"qvd7e57-*\" drop",
    "to_host: iifname \"qvd7e57-*\" drop",
    "to_host: iifname \"qvd7e57.*\" goto of_desktop",
];

/// The rules that no scene notices the lack of.
fn silent(noticed: BTreeMap<String, bool>) -> Vec<String> {
    assert!(noticed.len() > 30, "{noticed:?}");
    noticed.into_iter().filter(|(_, noticed)| !noticed).map(|(name, _)| name).collect()
}

#[test]
fn each_rule_behind_the_port_decides_about_some_packet() {
    privileged(NEEDS, || {
        let mut noticed = BTreeMap::new();
        for (of_a, of_b, stories) in scenes() {
            on_a_host(|| {
                let mut stage = Stage::new(Backend::Nft, of_a, of_b);
                take_out_each(&mut noticed, &mut stage, &stories, &mut Inet(rules("inet"), 0));
            });
        }
        assert_eq!(silent(noticed), MADE_UP_FOR);
    });
}

/// Whether it is of the second desktop, which begins nothing, of further bridges, or of a
/// further address, whose rules are those of the first.
fn is_left(line: &Line) -> bool {
    let words: Vec<_> = line.text.split(' ').collect();
    let link = format!("{}-8", INSTANCE.bridge_name());
    let second = [
        format!("{NEIGHBOUR}/32"),
        format!("{}/128", in_ipv6(NEIGHBOUR)),
        crate::Mac::of(INSTANCE, NEIGHBOUR).to_string(),
    ];
    let is_second = |word: &str| second.iter().any(|second| second == word);
    // Behind `-A` and the chain: whom it is about.
    let by_second = words[2] == "-s" && is_second(words[3]);
    let counts_second = words.iter().any(|word| is_second(word)) && words.contains(&"--mac-source");
    let answers_second = words[1].ends_with("-in") && is_second(words[3]);
    by_second
        || counts_second
        || answers_second
        || words.iter().any(|word| word.strip_prefix(&*link).is_some_and(|rest| matches!(rest, "" | "s")))
        || words
            .iter()
            .any(|word| word.ends_with(".+") || word.starts_with("192.0.2.") || word.starts_with("2001:db8:7:"))
}

/// The same of rules of iptables: what a chain does not end, one further up does, and ports
/// that lost their bridge have a test of their own as well ([`super::confinement`]).
const MADE_UP_FOR_BY_COMMANDS: &[(&str, &[&str])] = &[
    ("iptables", &["filter: -A qvd7e57-host -i qvd7e57-+ -j DROP", "filter: -A qvd7e57-route -i qvd7e57-+ -j DROP"]),
    ("ip6tables", &["filter: -A qvd7e57-host -i qvd7e57-+ -j DROP", "filter: -A qvd7e57-route -i qvd7e57-+ -j DROP"]),
];

#[test]
fn each_rule_of_iptables_behind_the_port_decides_about_some_packet() {
    privileged(saved::NEEDS, || {
        for &(program, made_up_for) in MADE_UP_FOR_BY_COMMANDS {
            let mut noticed = BTreeMap::new();
            for (of_a, of_b, mut stories) in scenes() {
                stories.retain(|story| story.is_ipv4() == (program == "iptables"));
                on_a_host(|| {
                    let mut stage = Stage::new(Backend::Iptables, of_a, of_b);
                    let saved = Saved::now(program);
                    // What is said at the port has a test of its own ([`super::commands_mutation`]).
                    let lines =
                        saved.rules().into_iter().filter(|line| line.table != "raw" && !is_left(line)).collect();
                    take_out_each(&mut noticed, &mut stage, &stories, &mut Commands(saved, lines));
                });
            }
            assert_eq!(silent(noticed), made_up_for, "{program}");
        }
    });
}
