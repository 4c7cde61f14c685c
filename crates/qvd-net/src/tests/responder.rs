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

use qvd_sys::{
    netns,
    packet::{ETHERTYPE_ALL, PacketSocket},
};
use qvd_testkit::{Need, privileged};

use super::{
    frames,
    world::{INSTANCE, connected, on_a_host, subnet},
};
use crate::{
    Mac, links,
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
    route.batch(vec![links::create_pair(name, index(BRIDGE), 0, mac, inside.as_fd())]).unwrap();
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
            route.batch(vec![links::ensure_bridge(BRIDGE, gateway_mac, 0, 0, crate::Backend::Nft)]).unwrap();
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
