//! Virtual machines: whoever holds the descriptor of a tap sends what it likes.

use qvd_core::NetPolicy;
use qvd_sys::packet::{ETHERTYPE_ALL, PacketSocket};

use super::{
    frames::{self, Station},
    world::{MARK_LEN, World, config, connected_by, desktop, heard_before, on_a_host, one_processor, subnet},
};
use crate::{Backend, Error, Mac, Mended, NetConfig, Network, TapSpec, giants, links, netlink::Netlink};

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

/// What a machine's network card leaves to the host to cut passes if each segment fits
/// the link, and not if it only says that there are segments.
#[test]
fn what_is_left_to_cut_passes_if_its_segments_fit() {
    const LENGTH: usize = 8000;
    for backend in BACKENDS {
        on_a_host(|| {
            one_processor();
            let network = Network::open(NetConfig { internet: true, backend, ..config() }).unwrap();
            let policy = NetPolicy::internet();
            let spec = TapSpec { desktop: desktop(7), address: None, policy, header: true };
            let (port, tap) = network.attach_tap(&spec).unwrap();
            let bridge = PacketSocket::open(&port.bridge_name(), ETHERTYPE_ALL).unwrap();
            let own = Station::new(port.mac(), port.address());
            let gateway = Station::new(Mac::of(network.config().instance, subnet().gateway()), subnet().gateway());
            let send =
                |header: [u8; 10], frame: &[u8]| Ok(rustix::io::write(&tap, &[&header[..], frame].concat()).map(drop)?);
            let arp = frames::ethernet(frames::BROADCAST, own.mac, frames::ARP, &frames::arp(1, own, gateway.ip));
            connected_by(&|frame| send([0; 10], frame), &arp, &bridge);
            let mut stopped = Vec::new();
            for segment in [1000_u16, 1460, 1461, 7000, 9000] {
                let (mark, control) = (format!("segment-{segment}"), format!("control-{segment}"));
                // As `struct virtio_net_hdr` has it: a checksum is wanted, TCP over IPv4, octets of all
                // headers and of a segment, where the sum begins and where in that it is.
                let [low, high] = segment.to_ne_bytes();
                let header = [1, 1, 54, 0, low, high, 34, 0, 16, 0];
                let tcp = [0x13, 0x88, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0];
                let payload = [&tcp[..], mark.as_bytes(), &[0; LENGTH]].concat();
                let ip = frames::Ip { protocol: 6, ..frames::Ip::default() };
                let packet = [frames::ipv4(own.ip, gateway.ip, ip, &payload), vec![0; MARK_LEN]].concat();
                let sent: std::io::Result<()> =
                    send(header, &frames::ethernet(gateway.mac, own.mac, frames::IPV4, &packet));
                sent.unwrap();
                send([0; 10], &[&arp[..], control.as_bytes()].concat()).unwrap();
                if !heard_before(&bridge, mark.as_bytes(), control.as_bytes()) {
                    stopped.push(segment);
                }
            }
            assert_eq!(stopped, [1461, 7000, 9000], "{backend}");
        });
    }
}

/// Whoever takes away what stops giants: that is told, and put back.
#[test]
fn what_stops_giants_is_put_back() {
    on_a_host(|| {
        let world = World::with_tap(config());
        assert_eq!(world.network.mend().unwrap(), Mended::default());
        let index = crate::network::find(&mut Netlink::route().unwrap(), world.a.port.link()).unwrap().unwrap().index;
        Netlink::route().unwrap().batch(vec![giants::let_pass(index)]).unwrap();
        let verified = world.a.port.verify();
        assert!(matches!(verified, Err(Error::NotConfined { .. })), "{verified:?}");
        let mended = world.network.mend().unwrap();
        assert!(mended.differed.is_some_and(|differed| differed.contains("longer than the link")));
        world.a.port.verify().unwrap();
        // A machine that has ended is no reason to mend anything.
        Netlink::route().unwrap().batch(vec![links::delete(index)]).unwrap();
        assert_eq!(world.network.mend().unwrap(), Mended::default());
    });
}
