use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use qvd_core::Instance;

use crate::{Backend, Error, Subnet, Subnet6, responder::Site};

/// Half of what makes adding a port take half as long again.
const PORTS_PER_BRIDGE: u16 = 256;

/// What links can have: IPv6's least, and the most of a tap (Linux
/// `drivers/net/tun.c`, `MAX_MTU`: 65535 without an Ethernet header).
const MTU_OCTETS: std::ops::RangeInclusive<u16> = 1280..=65521;

/// What a network is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetConfig {
    /// Stands in the names of bridge, links and rules.
    pub instance: Instance,
    /// Addresses of the desktops.
    pub subnet: Subnet,
    /// Addresses of IPv6 beside them; none, and the desktops have no IPv6.
    pub subnet6: Option<Subnet6>,
    /// Whether desktops may be let out to other networks. The host then
    /// forwards packets.
    pub internet: bool,
    /// The site's name server, which the gateway stands for.
    pub name_server: Option<Ipv4Addr>,
    /// The same of IPv6.
    pub name_server6: Option<Ipv6Addr>,
    /// What filters.
    pub backend: Backend,
    /// The longest packet of its links: bridges, ports and what machines are told.
    /// At least 1280, which IPv6 demands (RFC 8200, section 5).
    pub mtu_octets: u16,
    /// How many ports are put on a bridge before there is a further one: adding a
    /// port takes longer the more there are. At most 1023.
    pub ports_per_bridge: u16,
}

impl NetConfig {
    /// The installation's own subnets, and no way out.
    #[must_use]
    pub fn new(instance: Instance) -> Self {
        let (subnet, subnet6) = (Subnet::default_for(instance), Some(Subnet6::default_for(instance)));
        Self {
            instance,
            subnet,
            subnet6,
            internet: false,
            name_server: None,
            name_server6: None,
            backend: Backend::default(),
            mtu_octets: Site::MTU_OCTETS,
            ports_per_bridge: PORTS_PER_BRIDGE,
        }
    }

    /// # Errors
    /// Links cannot be as the settings say.
    pub(super) fn check(&self) -> Result<(), Error> {
        if MTU_OCTETS.contains(&self.mtu_octets) {
            return Ok(());
        }
        let (least, most) = MTU_OCTETS.into_inner();
        Err(Error::Invalid(format!("an MTU of {} octets: from {least} to {most} can be", self.mtu_octets)))
    }

    /// Whether an address is one of those that the network gives away.
    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.subnet.contains(address),
            IpAddr::V6(address) => self.subnet6.is_some_and(|subnet6| subnet6.contains(address)),
        }
    }

    /// The gateway, as it stands for the site's servers.
    pub(crate) fn names_at_gateway(&self) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
        let four = self.name_server.map(|_| self.subnet.gateway());
        (four, self.name_server6.and(self.subnet6).map(|six| six.gateway(self.subnet)))
    }

    pub(crate) fn name_servers(&self) -> impl Iterator<Item = IpAddr> {
        self.name_server.map(IpAddr::V4).into_iter().chain(self.name_server6.map(IpAddr::V6))
    }
}
