//! A real client asks. The bridge is a plain one: what the rules let a desktop
//! ask is another matter.

use std::{
    fs,
    net::Ipv4Addr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    process::Command,
};

use qvd_core::NetPolicy;
use qvd_sys::{
    netns,
    packet::{ETHERTYPE_ALL, PacketSocket},
};
use qvd_testkit::{Need, privileged};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    frames,
    world::{INSTANCE, MARK_LEN, config, connected, desktop, on_a_host, subnet},
};
use crate::{
    Backend, Mac, NetConfig, Network, TapSpec, links,
    netlink::Netlink,
    responder::{Guest, Responder, Site},
};

const BRIDGE: &str = "lan";

/// What the client does with what it was told: it writes it down.
const SCRIPT: &str =
    "#!/bin/sh\n[ \"$1\" != bound ] || printf '%s %s %s %s' \"$ip\" \"$mask\" \"$router\" \"$dns\" >\"$TOLD\"\n";

fn index(name: &str) -> u32 {
    crate::network::find(&mut Netlink::route().unwrap(), name).unwrap().unwrap().index
}

/// A machine on the bridge, its link up.
fn machine(name: &str, mac: Mac) -> OwnedFd {
    let inside = netns::create().unwrap();
    let mut route = Netlink::route().unwrap();
    route.batch(vec![links::create_pair(name, index(BRIDGE), 0, mac, 1500, inside.as_fd())]).unwrap();
    route.batch(vec![links::raise(index(name)), links::forward_to(index(name), mac)]).unwrap();
    let socket = netns::in_netns(inside.as_fd(), || {
        Netlink::route().unwrap().batch(vec![links::raise(index("eth0"))]).unwrap();
        PacketSocket::open("eth0", ETHERTYPE_ALL).unwrap()
    })
    .unwrap();
    let frame = frames::ethernet(frames::BROADCAST, mac.octets(), 0x88b5, &[0; 46]);
    connected(&socket, &frame, &PacketSocket::open(BRIDGE, ETHERTYPE_ALL).unwrap());
    inside
}

/// What `udhcpc` was told inside; none when it gave up.
fn ask(inside: &OwnedFd) -> Option<String> {
    let directory = tempfile::tempdir().unwrap();
    let (script, told) = (directory.path().join("script"), directory.path().join("told"));
    fs::write(&script, SCRIPT).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let status = netns::in_netns(inside.as_fd(), || {
        let mut client = Command::new("busybox");
        client.args(["udhcpc", "-i", "eth0", "-n", "-q", "-f", "-t", "2", "-T", "1", "-s"]).arg(&script);
        client.env("TOLD", &told).status().unwrap()
    })
    .unwrap();
    status.success().then(|| fs::read_to_string(told).unwrap())
}

#[test]
fn a_real_client_is_told_its_own_address_and_a_stranger_nothing() {
    privileged(&[Need::Root, Need::Namespaces, Need::Program("busybox")], || {
        on_a_host(|| {
            let (own, gateway) = (Ipv4Addr::new(10, 66, 0, 7), subnet().gateway());
            let (mac, gateway_mac) = (Mac::of(INSTANCE, own), Mac::of(INSTANCE, gateway));
            let mut route = Netlink::route().unwrap();
            route.batch(vec![links::ensure_bridge(BRIDGE, gateway_mac, 0, 1500, 0, crate::Backend::Nft)]).unwrap();
            route.batch(vec![links::raise(index(BRIDGE))]).unwrap();
            let known = machine("known", mac);
            let stranger = machine("stranger", Mac::of(INSTANCE, Ipv4Addr::new(10, 66, 0, 8)));

            let name_servers = vec![gateway.into()];
            let mut responder =
                Responder::open(BRIDGE, Site { name_servers, ..Site::new(subnet(), gateway_mac) }).unwrap();
            responder.answer(Guest { way_out: true, ..Guest::new(mac, own) });
            assert_eq!(ask(&known).as_deref(), Some("10.66.0.7 16 10.66.0.1 10.66.0.1"));
            assert_eq!(ask(&stranger), None);
            responder.forget(mac);
            assert_eq!(ask(&known), None);
            responder.close().unwrap();
            responder.close().unwrap();
        });
    });
}

/// Asks by DHCP over a tap until there is an answer, and returns its kind and
/// the address in it.
fn ask_by_tap(tap: &OwnedFd, mac: Mac, tries: u32) -> Option<(u8, Ipv4Addr)> {
    let question = frames::ethernet(
        frames::BROADCAST,
        mac.octets(),
        frames::IPV4,
        &[&super::vectors::dhcp_question(mac.octets(), 1, (68, 67))[..], &[0; MARK_LEN]].concat(),
    );
    let mut frame = [0; 2048];
    for _ in 0..tries {
        rustix::io::write(tap, &question).unwrap();
        let wait = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        while matches!(poll(&mut [PollFd::new(tap, PollFlags::IN)], Some(&wait)), Ok(1)) {
            let length = rustix::io::read(tap, &mut frame).unwrap();
            let frame = &frame[..length];
            // Behind Ethernet, IPv4 and UDP: an answer, its address, the kind among its options.
            if frame.get(12..14) == Some(&[8, 0]) && frame.get(34..36) == Some(&[0, 67]) && frame[..6] == mac.octets() {
                let address: [u8; 4] = frame[58..62].try_into().unwrap();
                let kind = frame[282..].windows(3).find(|option| option.starts_with(&[53, 1])).unwrap()[2];
                return Some((kind, address.into()));
            }
        }
    }
    None
}

/// What the kernel says of the threads that answer.
fn workers() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let is_worker = |task: &std::path::PathBuf| {
        fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == crate::responder::WORKER)
    };
    tasks.filter(is_worker).filter_map(|task| fs::read_to_string(task.join("status")).ok()).collect()
}

/// A machine is told its address by the network itself, by whichever process has
/// its port, also after whoever answers has died; and nobody is once it is gone.
#[test]
fn a_machine_is_told_its_address_as_long_as_it_has_a_port() {
    const OFFER: u8 = 2;
    privileged(super::NEEDS, || {
        for backend in Backend::ALL {
            on_a_host(|| {
                let config = NetConfig { backend, ..config() };
                let first = Network::open(config).unwrap();
                let policy = NetPolicy::host_only();
                let spec = TapSpec { desktop: desktop(7), address: None, policy: policy.clone(), header: false };
                let (port, tap) = first.attach_tap(&spec).unwrap();
                let (mac, address) = (port.mac(), port.address());
                assert_eq!(ask_by_tap(&tap, mac, 100), Some((OFFER, address)), "{backend}");
                let [worker] = &workers()[..] else { panic!("one answers") };
                assert!(worker.contains("Seccomp:\t2") && worker.contains("CapEff:\t0000000000000000"), "{worker}");

                first.inner().doom_responders();
                assert_eq!(ask_by_tap(&tap, mac, 100), Some((OFFER, address)), "{backend}: by another");

                port.leave();
                assert_eq!(ask_by_tap(&tap, mac, 2), None, "{backend}: of a port that was left");
                drop(first);
                let mut second = Network::open(config).unwrap();
                let mut port = second.adopt(desktop(7), address, &policy).unwrap();
                assert_eq!(ask_by_tap(&tap, mac, 100), Some((OFFER, address)), "{backend}: adopted");
                port.close().unwrap();
                second.close().unwrap();
                assert!(workers().is_empty());
            });
        }
    });
}
