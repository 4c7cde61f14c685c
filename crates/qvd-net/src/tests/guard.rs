//! Somebody else changes the rules: they come back, and ports are cut meanwhile.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use netlink_packet_route::{RouteNetlinkMessage, link::LinkFlags};

use super::world::{Desktop, INSTANCE, PATIENCE, World, config, on_a_host};
use crate::{Backend, Error, Mended, NetConfig, Network, guard, links, netlink::Netlink, rules};

fn tool(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).status().unwrap();
    assert!(status.success(), "{program} {args:?}");
}

/// Ways to take rules away or to get around them.
fn changes() -> Vec<(Backend, &'static str, Vec<String>)> {
    let table = rules::table_name(INSTANCE);
    let words = |text: String| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let nft = |text: String| (Backend::Nft, "nft", words(text));
    let older = |program, text: &str| (Backend::Iptables, program, words(text.to_owned()));
    vec![
        nft("flush ruleset".to_owned()),
        nft(format!("delete table bridge {table}")),
        nft(format!("flush table bridge {table}")),
        nft(format!("flush chain inet {table} to_host")),
        nft(format!("flush set bridge {table} identity")),
        nft(format!("insert rule bridge {table} from_port accept")),
        nft(format!("chain bridge {table} from_port {{ policy accept ; }}")),
        nft(format!("add table bridge {table} {{ flags dormant ; }}")),
        // The rules know bridges by their group.
        (Backend::Nft, "ip", words("link set qvd7e57 group 0".to_owned())),
        older("iptables", "-t raw -F PREROUTING"),
        older("ip6tables", "-F qvd7e57-host"),
        older("ebtables", "-t nat -F qvd7e57-7"),
    ]
}

#[test]
fn what_others_change_is_put_back() {
    for (backend, program, args) in changes() {
        on_a_host(|| {
            let network = Network::open(NetConfig { internet: true, backend, ..config() }).unwrap();
            let desktop = Desktop::new(&network, 7, true);
            assert_eq!(network.mend().unwrap(), Mended::default());
            tool(program, &args.iter().map(|arg| &**arg).collect::<Vec<_>>());
            let verified = desktop.port.verify();
            assert!(matches!(verified, Err(Error::NotConfined { .. })), "{args:?}: {verified:?}");
            let mended = network.mend().unwrap();
            assert!(mended.differed.is_some() && mended.cut == 1, "{args:?}: {mended:?}");
            desktop.port.verify().unwrap();
            assert_eq!(network.mend().unwrap(), Mended::default(), "{args:?}");
        });
    }
}

/// The watch does so by itself, and what it lets through afterwards is right.
#[test]
fn flushed_rules_are_back_without_being_asked_for() {
    on_a_host(|| {
        let mut world = World::new(&[], true);
        let (told, heard) = mpsc::channel();
        let report = move |mended: &Result<Mended, Error>| told.send(format!("{mended:?}")).unwrap();
        let mut guard = world.network.guard(Duration::from_secs(3600), Box::new(report)).unwrap();
        tool("nft", &["flush", "ruleset"]);
        let mended = heard.recv_timeout(PATIENCE).unwrap();
        assert!(mended.contains("gone") && mended.contains("cut: 2"), "{mended}");
        guard.close().unwrap();
        world.connect();
        let reached = world.reached_by(world.hostile());
        assert!(reached.is_empty(), "{reached:?}");
    });
}

/// Reading all rules back takes longer the more ports there are: it must not follow
/// each start and stop of a desktop, whichever thread of this process does it.
#[test]
fn what_this_process_changes_is_not_what_others_change() {
    on_a_host(|| {
        let network = Network::open(config()).unwrap();
        let changes = guard::listen().unwrap();
        let desktop = Desktop::new(&network, 7, false);
        drop(desktop);
        assert!(!guard::changed_by_others(&changes).unwrap());
        tool("nft", &["add", "table", "ip", "another"]);
        assert!(guard::changed_by_others(&changes).unwrap());
    });
}

/// While the rules cannot be put back, nothing leaves a port.
#[test]
fn a_port_whose_rules_cannot_be_put_back_stays_cut() {
    on_a_host(|| {
        let network = Network::open(config()).unwrap();
        let desktop = Desktop::new(&network, 7, false);
        let table = rules::table_name(INSTANCE);
        let up = || {
            let answers = Netlink::route().unwrap().batch(vec![links::show_name(desktop.port.link())]).unwrap();
            let RouteNetlinkMessage::NewLink(link) = &answers[0] else { panic!("{answers:?}") };
            link.header.flags.contains(LinkFlags::Up)
        };
        // Another process has a table of our name for itself.
        tool("nft", &["flush", "ruleset"]);
        let mut other = Command::new("nft").arg("-i").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let owned = format!("add table bridge {table} {{ flags owner; }}\nlist tables\n");
        other.stdin.as_mut().unwrap().write_all(owned.as_bytes()).unwrap();
        let mut said = BufReader::new(other.stdout.take().unwrap());
        let mut line = String::new();
        while !line.starts_with("table") {
            line.clear();
            assert!(said.read_line(&mut line).unwrap() > 0, "nft has ended");
        }
        let failed = network.mend();
        assert!(failed.is_err(), "{failed:?}");
        assert!(!up());
        other.kill().unwrap();
        other.wait().unwrap();
        network.mend().unwrap();
        assert!(up());
    });
}

/// A blocked port sends nothing, its neighbour goes on, and the watch leaves it.
#[test]
fn a_blocked_port_is_silent_until_it_is_unblocked() {
    for backend in Backend::ALL {
        on_a_host(|| {
            let mut world = World::with(NetConfig { internet: true, backend, ..config() }, &[]);
            world.network.block(&[&world.a.port]).unwrap();
            assert!(world.a.port.verify().is_err());
            world.b.port.verify().unwrap();
            assert_eq!(world.network.mend().unwrap(), Mended::default());
            world.network.unblock(&[&world.a.port]).unwrap();
            world.a.port.verify().unwrap();
            let (name, frame) = super::vectors::honest(&world.cast()).swap_remove(0);
            assert!(world.send(&frame).host, "{name}");
        });
    }
}

/// A network without ports has nothing to cut, and nothing to complain of.
#[test]
fn a_network_without_ports_is_compared_and_mended_too() {
    for backend in Backend::ALL {
        on_a_host(|| {
            let network = Network::open(NetConfig { internet: true, backend, ..config() }).unwrap();
            assert_eq!(network.mend().unwrap(), crate::Mended::default(), "{backend}");
            network.block(&[]).unwrap();
            network.unblock(&[]).unwrap();
        });
    }
}
