//! What becomes of a packet behind the port: the second opinion on policy.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use qvd_core::{NetPolicy, Transport};

use super::{Ruled, demand};

/// What the host's side of a port knows.
#[derive(Debug, Clone)]
pub(crate) struct Beyond {
    pub(crate) policy: NetPolicy,
    pub(crate) gateway4: Ipv4Addr,
    pub(crate) gateways6: Vec<Ipv6Addr>,
    pub(crate) name_servers: Vec<IpAddr>,
    /// The desktops that it may talk with, each by all its addresses.
    pub(crate) near: Vec<IpAddr>,
    /// Whether an address is a desktop's of this network.
    pub(crate) subnets: Subnets,
}

/// The addresses of all desktops of a network.
#[derive(Debug, Clone)]
pub(crate) struct Subnets {
    pub(crate) four: crate::Subnet,
    pub(crate) six: Option<crate::Subnet6>,
    /// What desktops have beside these.
    pub(crate) extra: Vec<IpAddr>,
}

impl Subnets {
    fn contain(&self, address: IpAddr) -> bool {
        let given = match address {
            IpAddr::V4(address) => self.four.contains(address),
            IpAddr::V6(address) => self.six.is_some_and(|six| six.contains(address)),
        };
        given || self.extra.contains(&address)
    }
}

/// Where the host sends a packet that comes from a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// It is for the host itself.
    Host,
    /// Back to a bridge for desktops: this network's, or another tenant's.
    Desktops,
    /// To another network.
    Out,
    /// The host knows no way there.
    Nowhere,
}

/// Asks the host's routes.
pub(super) type Ways<'a> = &'a dyn Fn(IpAddr) -> Way;

/// What of a packet decides.
#[derive(Debug, Clone, Copy)]
struct Packet {
    to: IpAddr,
    transport: Option<Transport>,
    port: u16,
    echo: bool,
}

/// Of a packet that the port lets through; `None` for what is no such, as ARP.
fn parse(frame: &[u8]) -> Option<Packet> {
    let (_, rest) = frame.split_at_checked(12)?;
    let (ethertype, packet) = rest.split_first_chunk::<2>()?;
    let (to, protocol, payload) = match u16::from_be_bytes(*ethertype) {
        super::IPV4 => {
            let to: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
            (IpAddr::from(to), *packet.get(9)?, packet.get(20..)?)
        }
        super::IPV6 => {
            let to: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            (IpAddr::from(to), *packet.get(6)?, packet.get(40..)?)
        }
        _ => return None,
    };
    let transport = match protocol {
        6 => Some(Transport::Tcp),
        17 => Some(Transport::Udp),
        _ => None,
    };
    let port = payload.get(2..4).map_or(0, |port| u16::from_be_bytes([port[0], port[1]]));
    let echo = payload.first() == Some(&if to.is_ipv4() { 8 } else { 128 });
    Some(Packet { to, transport, port, echo: echo && transport.is_none() })
}

/// Whether somebody gets a packet that the port lets through, and why. A packet
/// of a connection that others began, and rates, are not looked at.
pub(super) fn ruled(beyond: &Beyond, ways: Ways<'_>, frame: &[u8]) -> Ruled {
    let Some(packet) = parse(frame) else { return Ok("the host resolves its gateway's addresses") };
    let policy = &beyond.policy;
    let multicast = packet.to.is_multicast() || packet.to == IpAddr::V4(Ipv4Addr::BROADCAST);
    if policy.multicast.iter().any(|group| group.address() == packet.to) {
        return Ok("the host's part in a group of the policy");
    }
    if multicast {
        return Ok("the host's part in the link: neighbours, routers, addresses");
    }
    let asks_names = packet.transport.is_some() && packet.port == 53;
    let gateway = match packet.to {
        IpAddr::V4(to) => to == beyond.gateway4,
        IpAddr::V6(to) => beyond.gateways6.contains(&to),
    };
    let local = matches!(packet.to, IpAddr::V6(to) if to.is_unicast_link_local());
    if gateway {
        // The gateway stands for the server of the same family, at its address
        // that is routed.
        let server = beyond.name_servers.iter().find(|server| server.is_ipv4() == packet.to.is_ipv4());
        match server {
            Some(&server) if asks_names && !local => return outward(beyond, ways, Packet { to: server, ..packet }),
            _ => {}
        }
        if packet.echo {
            return Ok("the gateway answers echo requests");
        }
        let served = policy.services.iter().any(|service| {
            let (first, last) = service.ports();
            Some(service.transport()) == packet.transport && (first..=last).contains(&packet.port)
        });
        demand(served || is_neighbour_message(frame), "of the host's services only those of the policy")?;
        return Ok("a service of the host that the policy allows");
    }
    demand(!local, "what is of the link alone is not routed")?;
    outward(beyond, ways, packet)
}

/// Decided at the port already.
fn is_neighbour_message(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[0x86, 0xdd])
        && frame.get(20) == Some(&58)
        && frame.get(54).is_some_and(|kind| matches!(kind, 135 | 136))
}

fn outward(beyond: &Beyond, ways: Ways<'_>, packet: Packet) -> Ruled {
    let Beyond { policy, near, name_servers, subnets, .. } = beyond;
    let way = ways(packet.to);
    demand(way != Way::Host, "of the host's addresses only the gateway's")?;
    demand(way != Way::Nowhere, "the host knows no way there")?;
    if !policy.names.is_any() && packet.transport.is_some() && matches!(packet.port, 53 | 853) {
        let ours = packet.port == 53 && name_servers.contains(&packet.to);
        demand(ours, "names are asked of the site's servers only")?;
        return Ok("a question for the site's name server");
    }
    if near.contains(&packet.to) {
        return Ok("a neighbour of the same group");
    }
    demand(!subnets.contain(packet.to), "of other desktops only those of the same group")?;
    demand(way != Way::Desktops, "no desktop of another tenant")?;
    if policy.internet {
        return Ok("the policy lets it out to other networks");
    }
    let allowed = policy.destinations.iter().any(|destination| {
        let service = destination.service().is_none_or(|service| {
            let (first, last) = service.ports();
            Some(service.transport()) == packet.transport && (first..=last).contains(&packet.port)
        });
        service && destination.contains(packet.to)
    });
    demand(allowed, "the policy names no such destination")?;
    Ok("a destination of the policy")
}
