//! What was begun ends with its port: nobody inherits it.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    os::fd::{AsFd as _, OwnedFd},
};

use qvd_core::NetPolicy;
use qvd_sys::netns;

use super::{
    internet::{OUTSIDE, OUTSIDE6, Outside, UPLINK, wait_for_bridge},
    site::{Site, with_names},
    stage::{INSIDE, Stage, datagram, sender},
    world::{Desktop, config, desktop, on_a_host, subnet},
};
use crate::{
    Backend, DropReason, NetConfig, Network, PortSpec,
    flows::Flows,
    rules::Protection::{self, Flows as OfFlows},
};

/// How many flows of an address the host knows.
fn known(config: &NetConfig, address: impl Into<IpAddr>) -> usize {
    Flows::open(config).unwrap().count(address.into())
}

/// A desktop that gets the address of one that is gone hears no late answer to it, the
/// host takes nothing from it as an answer to what was asked of the other, and what was
/// dropped of the other is not counted as its own.
#[test]
fn nobody_inherits_a_connection() {
    const DROPPED: u64 = 100;
    const ROWS: &[(&[Protection], bool)] = &[(&[], false), (&[OfFlows], true)];
    for (backend, &(without, inherits)) in
        Backend::ALL.into_iter().flat_map(|backend| ROWS.iter().map(move |row| (backend, row)))
    {
        on_a_host(|| {
            let internet = NetPolicy::internet;
            let mut stage = Stage::on(Site::without(with_names(backend), internet(), internet(), without));
            let mut asked = Vec::new();
            for to in [OUTSIDE.into(), OUTSIDE6.into()] {
                let (frame, mark) = stage.site.frame(to, 17, 443);
                stage.site.from_a.send(&frame).unwrap();
                let went = stage.site.passing(&mark).pop().unwrap();
                asked.push((to, sender(&went)));
            }
            let answers = |stage: &mut Stage| {
                asked
                    .iter()
                    .map(|&(from, to)| {
                        let mark = stage.site.mark();
                        stage.outside_says(&datagram((from, 443), to, &mark), &mark) == "came true"
                    })
                    .collect::<Vec<_>>()
            };
            let host = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            host.set_nonblocking(true).unwrap();
            host.send_to(b"question", (stage.site.a.port.address(), INSIDE)).unwrap();
            let (mut packet, own) = ([0; 64], stage.site.a.port.address());
            let (_, host_at) = stage.inside.recv_from(&mut packet).unwrap();
            let config = *stage.site.network.config();
            let own: [IpAddr; 2] = [own.into(), stage.site.a.port.ipv6().unwrap().into()];
            assert_eq!(answers(&mut stage), [true, true], "{backend}");
            assert_eq!(own.map(|own| known(&config, own) > 0), [true, true], "{backend}");

            let (frame, mark) = stage.site.frame(subnet().gateway().into(), 17, 5);
            (0..DROPPED).for_each(|_| stage.site.from_a.send(&frame).unwrap());
            assert!(!stage.site.arrives(&frame, &mark));
            // What kernels say by themselves counts as well.
            let counted = |stage: &Stage| stage.site.a.port.drops().unwrap().get(&DropReason::Host) >= Some(&DROPPED);
            assert!(counted(&stage), "{backend}");

            stage.replace(9);
            let what = format!("{backend}, without {without:?}");
            assert!(!counted(&stage), "{what}");
            assert_eq!(answers(&mut stage), [inherits, inherits], "{what}");
            stage.inside.send_to(b"answer", host_at).unwrap();
            let _gone = stage.site.passing(b"no such mark");
            assert_eq!(host.recv(&mut packet).is_ok(), inherits, "{what}");
        });
    }
}

/// Connections of a desktop that runs stay when a process takes over; those of one that is
/// not claimed end, whoever comes for its address. Others' are left alone.
#[test]
fn connections_outlast_a_process_and_not_a_port() {
    const PORT: u16 = 4000;
    on_a_host(|| {
        let _outside = Outside::new();
        let config = NetConfig { internet: true, ..config() };
        let host = UdpSocket::bind((UPLINK, 0)).unwrap();
        let mut network = Network::open(config).unwrap();
        let all = [7, 8, 9].map(|number| Desktop::new(&network, number, true));
        let talk = |netns: &OwnedFd| {
            let here = netns::in_netns(netns.as_fd(), || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).unwrap().unwrap();
            here.send_to(b"hello", (OUTSIDE, PORT)).unwrap();
        };
        host.send_to(b"hello", (OUTSIDE, PORT)).unwrap();
        for desktop in &all {
            wait_for_bridge(&network, desktop);
            talk(&desktop.netns);
        }
        let [first, second, third] = all.map(|Desktop { port, netns }| {
            let who = (port.desktop(), port.address(), netns);
            port.leave();
            who
        });
        let count = |of: [Ipv4Addr; 4]| of.map(|address| known(&config, address));
        let everybody = [first.1, second.1, third.1, UPLINK];
        assert_eq!(count(everybody), [1, 1, 1, 1]);

        drop(network);
        network = Network::open(config).unwrap();
        let mut again = network.adopt(first.0, first.1, &NetPolicy::internet()).unwrap();
        let inside = netns::create().unwrap();
        let spec = PortSpec {
            desktop: desktop(10),
            netns: inside.as_fd(),
            address: Some(second.1),
            policy: NetPolicy::internet(),
        };
        let other = network.attach(&spec).unwrap();
        assert_eq!(count(everybody), [1, 0, 1, 1], "whoever comes for an address");
        network.sweep(&BTreeSet::new()).unwrap();
        assert_eq!(count(everybody), [1, 0, 0, 1], "what nobody claims");
        // Too many to be looked for one by one.
        let subnet = network.config().subnet;
        let many: Vec<_> =
            (0..20).map(|place| IpAddr::from(Ipv4Addr::from_bits(subnet.base().to_bits() + place + 2))).collect();
        assert!(many.contains(&first.1.into()), "{many:?}");
        network.inner().flows().unwrap().end(&many).unwrap();
        assert_eq!(count(everybody), [0, 0, 0, 1], "many at once");
        talk(&first.2);
        assert_eq!(count(everybody), [1, 0, 0, 1]);
        again.close().unwrap();
        assert_eq!(count(everybody), [0, 0, 0, 1], "a port that is closed");
        talk(&inside);
        assert_eq!(count(everybody), [0, 1, 0, 1]);
        other.leave();
        network.close().unwrap();
        assert_eq!(count(everybody), [0, 0, 0, 1], "all of the network");
    });
}
