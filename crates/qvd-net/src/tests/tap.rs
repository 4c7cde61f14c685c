//! Virtual machines: whoever holds the descriptor of a tap sends what it likes.

use super::world::{World, config, on_a_host};
use crate::{Backend, NetConfig, netlink::Netlink};

const BACKENDS: [Backend; 2] = Backend::ALL;

#[test]
fn no_hostile_frame_leaves_a_tap() {
    for backend in BACKENDS {
        on_a_host(|| {
            let mut world = World::with_tap(NetConfig { internet: true, backend, ..config() });
            let reached = world.reached_by_hostile();
            assert!(reached.is_empty(), "{backend}: {reached:#?}");
        });
    }
}

#[test]
fn honest_frames_of_a_machine_pass() {
    for backend in BACKENDS {
        on_a_host(|| {
            let mut world = World::with_tap(NetConfig { internet: true, backend, ..config() });
            let stopped = world.stopped_of_honest();
            assert!(stopped.is_empty(), "{backend}: {stopped:?}");
        });
    }
}

/// The link goes with the port, also while the machine holds its end; and with
/// the machine, also when nobody closes the port.
#[test]
fn a_tap_goes_with_its_port_or_its_machine() {
    on_a_host(|| {
        let World { mut a, .. } = World::with_tap(config());
        let link = a.port.link().to_owned();
        let is_there = || crate::network::find(&mut Netlink::route().unwrap(), &link).unwrap().is_some();
        // The machine has ended with the world.
        assert!(!is_there());
        a.port.close().unwrap();
    });
    on_a_host(|| {
        let mut world = World::with_tap(config());
        let link = world.a.port.link().to_owned();
        assert!(crate::network::find(&mut Netlink::route().unwrap(), &link).unwrap().is_some());
        world.a.port.close().unwrap();
        let mut route = Netlink::route().unwrap();
        assert!(crate::network::find(&mut route, &link).unwrap().is_none());
    });
}
