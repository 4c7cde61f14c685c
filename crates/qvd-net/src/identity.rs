use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use qvd_core::{DesktopId, NetPolicy};

use crate::{
    Mac, NetConfig,
    access::Access,
    elements::{Element, Family},
    rules,
};

/// Who a port is: all that its frames may say of their sender.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Name of the host's end.
    pub(crate) link: String,
    pub(crate) mac: Mac,
    pub(crate) ipv4: Ipv4Addr,
    /// None on a network without IPv6.
    pub(crate) ipv6: Option<Ipv6Addr>,
    /// What it may send from beside these.
    pub(crate) extra: Vec<IpAddr>,
    /// Multicast groups that it takes part in.
    pub(crate) groups: Vec<IpAddr>,
}

/// Where members of groups of IPv4 report them (RFC 3376, 4.2.14).
pub(crate) const REPORTS: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 22);

impl Identity {
    /// Everything follows from the desktop's number, its IPv4 address and its
    /// policy, so that a process that finds a port needs to know no more.
    pub(crate) fn new(config: &NetConfig, desktop: DesktopId, ipv4: Ipv4Addr, policy: &NetPolicy) -> Self {
        // A network without IPv6 has nothing to do with more of it.
        let is_known = |address: &IpAddr| address.is_ipv4() || config.subnet6.is_some();
        Self {
            link: config.instance.link_name(desktop),
            extra: policy.addresses.iter().flat_map(|some| some.iter()).filter(is_known).collect(),
            groups: policy.multicast.iter().map(|group| group.address()).filter(is_known).collect(),
            ..Self::of_address(config, ipv4)
        }
    }

    /// Whoever has this address: of no link.
    pub(crate) fn of_address(config: &NetConfig, ipv4: Ipv4Addr) -> Self {
        Self {
            link: String::new(),
            mac: Mac::of(config.instance, ipv4),
            ipv4,
            ipv6: config.subnet6.map(|subnet6| subnet6.address(config.subnet, ipv4)),
            extra: Vec::new(),
            groups: Vec::new(),
        }
    }

    /// Its addresses of IPv6: the one given to it, the link's own, and what else
    /// it may send from.
    pub(crate) fn addresses6(&self) -> impl Iterator<Item = Ipv6Addr> {
        let extra = self.extra.iter().filter_map(|address| match address {
            IpAddr::V6(address) => Some(*address),
            IpAddr::V4(_) => None,
        });
        self.ipv6.into_iter().flat_map(|global| [global, self.mac.link_local()]).chain(extra)
    }

    /// Its addresses of IPv4.
    pub(crate) fn addresses4(&self) -> impl Iterator<Item = Ipv4Addr> {
        let extra = self.extra.iter().filter_map(|address| match address {
            IpAddr::V4(address) => Some(*address),
            IpAddr::V6(_) => None,
        });
        std::iter::once(self.ipv4).chain(extra)
    }

    /// Its addresses that are routed.
    pub(crate) fn routed(&self) -> impl Iterator<Item = IpAddr> {
        std::iter::once(IpAddr::V4(self.ipv4)).chain(self.ipv6.map(IpAddr::V6)).chain(self.extra.iter().copied())
    }

    /// Whether it reports groups of IPv4.
    pub(crate) fn reports(&self) -> bool {
        self.groups.iter().any(IpAddr::is_ipv4)
    }

    /// Whom its packets of IPv6 may come from: these, or nobody.
    pub(crate) fn senders6(&self) -> impl Iterator<Item = Ipv6Addr> {
        self.addresses6().chain(self.ipv6.map(|_| Ipv6Addr::UNSPECIFIED))
    }

    /// Every address that the host should know the MAC of.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses4().map(IpAddr::from).chain(self.addresses6().map(IpAddr::from))
    }

    /// Its elements of the sets, those of its policy among them. `index` is its
    /// link's, `gateway` the MAC that its packets go to.
    pub(crate) fn elements(&self, access: &Access, index: u32, gateway: Mac) -> Vec<Element> {
        let bridge = |set, key| Element::new(Family::Bridge, set, key);
        let (link, mac) = (&*self.link, self.mac);
        let mut elements = vec![bridge(rules::LINK, rules::link_key(link, mac))];
        for ipv4 in self.addresses4() {
            elements.push(bridge(rules::WAY, rules::way_key(index, gateway, mac, ipv4)));
            elements.push(bridge(rules::IDENTITY, rules::identity_key(link, mac, ipv4)));
        }
        for ipv6 in self.addresses6() {
            // From the link's own address little goes to the gateway: that takes a longer way.
            if !ipv6.is_unicast_link_local() {
                elements.push(bridge(rules::WAY6, rules::way6_key(index, gateway, mac, ipv6)));
            }
            elements.push(bridge(rules::IDENTITY6, rules::identity6_key(link, mac, ipv6)));
        }
        elements.extend(self.in_groups());
        elements.extend(self.routed().flat_map(|address| Self::reach(address, access)));
        if access.is_served() {
            for address in self.addresses() {
                let set = if address.is_ipv4() { rules::SERVED } else { rules::SERVED6 };
                let goto = Some(access.served_chain());
                elements.push(Element { goto, ..Element::new(Family::Inet, set, rules::address_key(address)) });
            }
        }
        elements
    }

    /// What lets it take part in its groups.
    fn in_groups(&self) -> Vec<Element> {
        let (mut elements, link) = (Vec::new(), &*self.link);
        if self.reports() {
            elements.push(Element::new(Family::Bridge, rules::REPORTERS, rules::reporter_key(link)));
        }
        for &group in &self.groups {
            let mac = Mac::of_group(group);
            let (set, key) = match group {
                IpAddr::V4(group) => (rules::GROUPS, rules::identity_key(link, mac, group)),
                IpAddr::V6(group) => (rules::GROUPS6, rules::identity6_key(link, mac, group)),
            };
            elements.push(Element::new(Family::Bridge, set, key));
        }
        // The host hears who reports, and whoever speaks to the group.
        let to_host = self.groups.iter().copied().chain(self.reports().then_some(REPORTS.into()));
        for group in to_host {
            let set = if group.is_ipv4() { rules::TOLD } else { rules::TOLD6 };
            for own in self.addresses().filter(|own| own.is_ipv4() == group.is_ipv4()) {
                elements.push(Element::new(Family::Inet, set, rules::told_key(group, own)));
            }
        }
        elements
    }

    /// What lets one of its addresses out.
    fn reach(address: IpAddr, access: &Access) -> Vec<Element> {
        let by_family = |four, six| if address.is_ipv4() { four } else { six };
        let inet = |four, six| Element::new(Family::Inet, by_family(four, six), rules::address_key(address));
        let mut elements = Vec::new();
        if access.is_free() {
            elements.push(inet(rules::INTERNET, rules::INTERNET6));
        }
        if access.is_particular() {
            let goto = Some(access.outward_chain());
            elements.push(Element { goto, ..inet(rules::OUTWARD, rules::OUTWARD6) });
            elements.push(inet(rules::ANSWERED, rules::ANSWERED6));
        }
        if let Some(group) = access.group() {
            let key = rules::near_key(group, address);
            elements.push(Element { key, ..inet(rules::NEAR, rules::NEAR6) });
        }
        if access.policy.routed {
            elements.push(inet(rules::ROUTED, rules::ROUTED6));
        }
        elements
    }
}

/// The desktop's address that an element of the address sets ends with.
pub(crate) fn address_of_element(element: &Element) -> Option<IpAddr> {
    if rules::ADDRESS6_SETS.contains(&element.set) {
        rules::v6_of_key(&element.key).map(IpAddr::V6)
    } else {
        rules::v4_of_key(&element.key).map(IpAddr::V4)
    }
}
