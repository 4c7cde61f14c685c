//! The back end of ebtables and iptables: the same frames as for nftables.

use std::collections::BTreeSet;

use qvd_testkit::privileged;

use super::{
    NEEDS,
    world::{Desktop, World, config, desktop, on_a_host},
};
use crate::{Backend, NetConfig, Network};

fn older() -> NetConfig {
    NetConfig { internet: true, backend: Backend::Iptables, ..config() }
}

#[test]
fn no_hostile_frame_leaves_the_port_without_nftables() {
    privileged(NEEDS, || {
        on_a_host(|| {
            let mut world = World::with(older(), &[]);
            let reached = world.reached_by_hostile();
            assert!(reached.is_empty(), "{reached:#?}");
        });
    });
}

#[test]
fn honest_frames_pass_without_nftables() {
    privileged(NEEDS, || {
        on_a_host(|| {
            let mut world = World::with(older(), &[]);
            let stopped = world.stopped_of_honest();
            assert!(stopped.is_empty(), "{stopped:?}");
        });
    });
}

/// What another process left is taken over, kept, swept and removed.
#[test]
fn rules_of_an_earlier_process_are_known() {
    privileged(NEEDS, || {
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
            for program in ["ebtables-save", "iptables-save", "ip6tables-save"] {
                let shown = std::process::Command::new(program).output().unwrap();
                let shown = String::from_utf8(shown.stdout).unwrap();
                assert!(!shown.contains("qvd"), "{program}: {shown}");
            }
        });
    });
}
