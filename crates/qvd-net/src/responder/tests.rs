#![allow(clippy::unwrap_used)]

use dhcproto::{
    Decodable as _, Decoder, Encodable as _,
    v4::{self, Opcode},
    v6::{self, IAAddr, IANA, Status},
};
use etherparse::{Icmpv6Type, PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::*;
use qvd_core::Instance;

use super::*;

const INSTANCE: Instance = Instance::new(0x7e57);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const OWN6: Ipv6Addr = Ipv6Addr::new(0xfd51, 0x5644, 0, 0, 0, 0, 0, 7);
const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 7);
const OWN: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 7);
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 8);

fn site() -> Site {
    let subnet: Subnet = "10.66.0.0/16".parse().unwrap();
    let name_servers = vec![subnet.gateway().into(), GATEWAY6.into()];
    Site { gateway_ipv6: Some(GATEWAY6), name_servers, ..Site::new(subnet, Mac::of(INSTANCE, subnet.gateway())) }
}

fn guest() -> Guest {
    let name = Some("desktop-7".to_owned());
    Guest { ipv6: Some(OWN6), name, way_out: true, ..Guest::new(Mac::of(INSTANCE, OWN), OWN) }
}

/// What the guest hears of the service when it sends `frame`.
fn said_to(frame: &[u8]) -> Option<Vec<u8>> {
    let (from, heard) = frame::open(frame)?;
    (from == guest().mac.octets()).then(|| answer(&site(), &guest(), &heard)).flatten()
}

fn ask4(kind: v4::MessageType, change: impl FnOnce(&mut v4::Message)) -> Option<(Ipv4Addr, v4::Message)> {
    let mut asked = v4::Message::default();
    asked.set_opcode(Opcode::BootRequest).set_xid(77).set_chaddr(&guest().mac.octets());
    asked.opts_mut().insert(v4::DhcpOption::MessageType(kind));
    change(&mut asked);
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2(guest().mac.octets(), [0xff; 6]);
    let builder = builder.ipv4([0; 4], [255; 4], 64).udp(frame::DHCP4_CLIENT, frame::DHCP4_SERVER);
    builder.write(&mut frame, &asked.to_vec().unwrap()).unwrap();
    let said = said_to(&frame)?;
    let said = SlicedPacket::from_ethernet(&said).unwrap();
    let Some(etherparse::NetSlice::Ipv4(packet)) = said.net else { panic!("no IPv4") };
    let Some(TransportSlice::Udp(udp)) = said.transport else { panic!("no UDP") };
    let message = v4::Message::decode(&mut Decoder::new(udp.payload())).unwrap();
    assert_eq!((message.xid(), message.opcode()), (77, Opcode::BootReply));
    Some((packet.header().destination_addr(), message))
}

fn kind(message: &v4::Message) -> v4::MessageType {
    message.opts().msg_type().unwrap()
}

#[test]
fn a_discovery_is_offered_the_guests_own_address() {
    let (to, said) = ask4(v4::MessageType::Discover, |_| {}).unwrap();
    assert_eq!((to, said.yiaddr(), kind(&said)), (OWN, OWN, v4::MessageType::Offer));
    let option = |code| said.opts().get(code).unwrap().clone();
    let gateway = Ipv4Addr::new(10, 66, 0, 1);
    assert_eq!(option(v4::OptionCode::Router), v4::DhcpOption::Router(vec![gateway]));
    assert_eq!(option(v4::OptionCode::DomainNameServer), v4::DhcpOption::DomainNameServer(vec![gateway]));
    assert_eq!(option(v4::OptionCode::SubnetMask), v4::DhcpOption::SubnetMask([255, 255, 0, 0].into()));
    assert_eq!(option(v4::OptionCode::Hostname), v4::DhcpOption::Hostname("desktop-7".to_owned()));
    let broadcast = |asked: &mut v4::Message| {
        asked.set_flags(v4::Flags::default().set_broadcast());
    };
    assert_eq!(ask4(v4::MessageType::Discover, broadcast).unwrap().0, Ipv4Addr::BROADCAST);
}

#[test]
fn a_request_is_granted_for_the_guests_own_address_alone() {
    let request = |address: Ipv4Addr| {
        ask4(v4::MessageType::Request, |asked| {
            asked.opts_mut().insert(v4::DhcpOption::RequestedIpAddress(address));
        })
    };
    let renewal = |address: Ipv4Addr| {
        ask4(v4::MessageType::Request, |asked| {
            asked.set_ciaddr(address);
        })
    };
    for ask in [&request as &dyn Fn(Ipv4Addr) -> _, &renewal] {
        let (to, said) = ask(OWN).unwrap();
        assert_eq!((to, kind(&said), said.yiaddr()), (OWN, v4::MessageType::Ack, OWN));
        let (to, said) = ask(OTHER).unwrap();
        assert_eq!((to, kind(&said)), (Ipv4Addr::BROADCAST, v4::MessageType::Nak));
        assert_eq!(said.yiaddr(), Ipv4Addr::UNSPECIFIED);
    }
}

/// A malformed one at which the decoder of all options panics.
#[test]
fn an_option_that_is_not_needed_is_not_decoded() {
    let (_, said) = ask4(v4::MessageType::Discover, |asked| {
        let interface = v4::UnknownOption::new(v4::OptionCode::ClientNetworkInterface, vec![1, 2]);
        asked.opts_mut().insert(v4::DhcpOption::Unknown(interface));
    })
    .unwrap();
    assert_eq!(kind(&said), v4::MessageType::Offer);
}

#[test]
fn what_is_not_for_this_server_is_not_answered() {
    let quiet = |kind, change: fn(&mut v4::Message)| assert!(ask4(kind, change).is_none());
    quiet(v4::MessageType::Request, |asked| {
        asked.opts_mut().insert(v4::DhcpOption::ServerIdentifier(OTHER));
    });
    // Starvation: hardware addresses made up in the message.
    quiet(v4::MessageType::Discover, |asked| {
        asked.set_chaddr(&[2, 0, 0, 0, 0, 1]);
    });
    quiet(v4::MessageType::Discover, |asked| {
        asked.set_giaddr(OTHER);
    });
    quiet(v4::MessageType::Discover, |asked| {
        asked.set_opcode(Opcode::BootReply);
    });
    quiet(v4::MessageType::Offer, |_| {});
    quiet(v4::MessageType::Release, |_| {});
    quiet(v4::MessageType::Decline, |_| {});
}

fn ask6(kind: v6::MessageType, options: Vec<v6::DhcpOption>) -> Option<v6::Message> {
    let mut asked = v6::Message::new_with_id(kind, [1, 2, 3]);
    options.into_iter().for_each(|option| asked.opts_mut().insert(option));
    let to = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2];
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2(guest().mac.octets(), [0x33, 0x33, 0, 1, 0, 2]);
    let builder = builder.ipv6(LINK_LOCAL.octets(), to, 1).udp(frame::DHCP6_CLIENT, frame::DHCP6_SERVER);
    builder.write(&mut frame, &asked.to_vec().unwrap()).unwrap();
    let said = said_to(&frame)?;
    let said = SlicedPacket::from_ethernet(&said).unwrap();
    let Some(TransportSlice::Udp(udp)) = said.transport else { panic!("no UDP") };
    let said = v6::Message::decode(&mut Decoder::new(udp.payload())).unwrap();
    assert_eq!(said.xid(), [1, 2, 3]);
    Some(said)
}

fn association(addresses: &[Ipv6Addr]) -> v6::DhcpOption {
    let mut opts = v6::DhcpOptions::new();
    for &addr in addresses {
        let address = IAAddr { addr, preferred_life: 0, valid_life: 0, opts: v6::DhcpOptions::new() };
        opts.insert(v6::DhcpOption::IAAddr(address));
    }
    v6::DhcpOption::IANA(IANA { id: 9, t1: 0, t2: 0, opts })
}

/// Addresses that an answer gives, with their lifetimes.
fn given(said: &v6::Message) -> Vec<(Ipv6Addr, u32)> {
    let associations = said.opts().iter().filter_map(|option| match option {
        v6::DhcpOption::IANA(association) => Some(association),
        _ => None,
    });
    let addresses = associations.flat_map(|association| association.opts.iter()).filter_map(|option| match option {
        v6::DhcpOption::IAAddr(address) => Some((address.addr, address.valid_life)),
        _ => None,
    });
    let mut addresses: Vec<_> = addresses.collect();
    addresses.sort_unstable();
    addresses
}

fn client() -> v6::DhcpOption {
    v6::DhcpOption::ClientId(vec![0, 3, 0, 1, 9, 9, 9, 9, 9, 9])
}

#[test]
fn a_solicitation_is_advertised_the_guests_own_address() {
    let said = ask6(v6::MessageType::Solicit, vec![client(), association(&[]), association(&[])]).unwrap();
    assert_eq!(said.msg_type(), v6::MessageType::Advertise);
    assert_eq!(given(&said), [(OWN6, 3600)]);
    assert_eq!(said.opts().get(v6::OptionCode::ClientId), Some(&client()));
    let servers = v6::DhcpOption::DomainNameServers(vec![GATEWAY6]);
    assert_eq!(said.opts().get(v6::OptionCode::DomainNameServers), Some(&servers));
    let said = ask6(v6::MessageType::Solicit, vec![client(), association(&[]), v6::DhcpOption::RapidCommit]).unwrap();
    assert_eq!((said.msg_type(), given(&said)), (v6::MessageType::Reply, vec![(OWN6, 3600)]));
}

#[test]
fn a_request_of_ipv6_names_its_server() {
    let server = ask6(v6::MessageType::Solicit, vec![client()]).unwrap();
    let server = server.opts().get(v6::OptionCode::ServerId).unwrap().clone();
    let other = Ipv6Addr::from(u128::from(OWN6) + 1);
    for kind in [v6::MessageType::Request, v6::MessageType::Renew] {
        let said = ask6(kind, vec![client(), server.clone(), association(&[other])]).unwrap();
        assert_eq!((said.msg_type(), given(&said)), (v6::MessageType::Reply, vec![(OWN6, 3600), (other, 0)]));
        assert!(ask6(kind, vec![client(), association(&[OWN6])]).is_none());
        let foreign = v6::DhcpOption::ServerId(vec![0, 3, 0, 1, 1, 1, 1, 1, 1, 1]);
        assert!(ask6(kind, vec![client(), foreign, association(&[OWN6])]).is_none());
    }
    for (address, expected) in [(OWN6, Status::Success), (other, Status::NotOnLink)] {
        let said = ask6(v6::MessageType::Confirm, vec![client(), association(&[address])]).unwrap();
        let Some(v6::DhcpOption::StatusCode(code)) = said.opts().get(v6::OptionCode::StatusCode) else {
            panic!("no status")
        };
        assert_eq!(code.status, expected);
    }
}

fn solicitation(hop_limit: u8) -> Vec<u8> {
    let mut frame = Vec::new();
    let to = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
    let builder = PacketBuilder::ethernet2(guest().mac.octets(), [0x33, 0x33, 0, 0, 0, 2]);
    let builder = builder.ipv6(LINK_LOCAL.octets(), to, hop_limit).icmpv6(Icmpv6Type::RouterSolicitation);
    builder.write(&mut frame, &[1, 1, 0, 0, 0, 0, 0, 0]).unwrap();
    frame
}

#[test]
fn a_router_solicitation_is_answered() {
    let said = said_to(&solicitation(255)).unwrap();
    let said = SlicedPacket::from_ethernet(&said).unwrap();
    let Some(TransportSlice::Icmpv6(message)) = said.transport else { panic!("no ICMPv6") };
    let Icmpv6Type::RouterAdvertisement(header) = message.icmp_type() else { panic!("no advertisement") };
    assert!(header.managed_address_config);
    assert_eq!(header.router_lifetime, 1800);
    let options = message.payload().get(8..).unwrap();
    assert_eq!(options.len(), 8 + 8 + 24);
    assert_eq!(options[16..20], [25, 3, 0, 0]);
    // From afar.
    assert!(said_to(&solicitation(64)).is_none());
}

proptest! {
    /// Whatever comes: no panic, and nothing is said to anybody else.
    #[test]
    fn nothing_upsets_it(
        noise in proptest::collection::vec(any::<u8>(), 0..400),
        change in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        options in proptest::collection::vec((0..130_u8, proptest::collection::vec(any::<u8>(), 0..12)), 0..8),
        kind in 1..13_u8,
    ) {
        let mut frames = vec![noise.clone(), solicitation(255)];
        // Messages whose head is as it should be, with options of any content.
        let length = |data: &[u8]| u8::try_from(data.len()).unwrap();
        let options4 = options.iter().flat_map(|(code, data)| [&[*code, length(data)][..], data].concat());
        let options6 = options.iter().flat_map(|(code, data)| [&[0, code % 64, 0, length(data)][..], data].concat());
        let mut message4 = vec![0; 236];
        message4[..4].copy_from_slice(&[1, 1, 6, 0]);
        message4[28..34].copy_from_slice(&guest().mac.octets());
        message4.extend([99, 130, 83, 99, 53, 1, kind]);
        message4.extend(options4);
        let message6: Vec<u8> = [kind, 1, 2, 3].into_iter().chain(options6).collect();
        for payload in [noise.as_slice(), &[1, 1, 6, 0], &message4, &message6] {
            let mut frame = Vec::new();
            let builder = PacketBuilder::ethernet2(guest().mac.octets(), [0xff; 6]);
            builder.ipv4([0; 4], [255; 4], 64).udp(68, 67).write(&mut frame, payload).unwrap();
            frames.push(frame);
            let mut frame = Vec::new();
            let builder = PacketBuilder::ethernet2(guest().mac.octets(), [0xff; 6]);
            let builder = builder.ipv6(LINK_LOCAL.octets(), [0xff; 16], 1).udp(546, 547);
            builder.write(&mut frame, payload).unwrap();
            frames.push(frame);
        }
        for mut frame in frames {
            for (at, value) in &change {
                if !frame.is_empty() {
                    let at = at.index(frame.len());
                    frame[at] = *value;
                }
            }
            if let Some(said) = said_to(&frame) {
                prop_assert_eq!(&said[..6], &guest().mac.octets());
            }
        }
    }
}
