//! What becomes of a frame that a desktop sends, decided from what the policy
//! means: an independent second opinion on the rule set. It reads frames as a
//! careful reader of the standards would and knows nothing of tables, sets or
//! hooks; tests compare it with the kernel.

mod beyond;
mod ipv6;

use std::{
    borrow::Cow,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use serde::{Deserialize, Serialize};

pub(crate) use self::beyond::{Beyond, Subnets, Way};
use crate::{Mac, Port};

const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const BROADCAST: [u8; 6] = [0xff; 6];

/// Whether a frame leaves the port, and what decides that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Decision {
    /// Whether it comes up to the host's bridge. To another port none does.
    pub passes: bool,
    /// The rule, in words.
    pub rule: Cow<'static, str>,
    /// Whether it arrives anywhere behind the port: at the host itself, at a
    /// neighbour or, routed, at other networks. Rates are not looked at, nor
    /// answers to what others began.
    pub arrives: bool,
    /// The rule that decides this.
    pub beyond: Cow<'static, str>,
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.passes {
            return write!(f, "dropped at the port: {}", self.rule);
        }
        let then = if self.arrives { "arrives" } else { "dropped behind it" };
        write!(f, "passes the port: {}; {then}: {}", self.rule, self.beyond)
    }
}

/// The rule by which a frame passes, or by which it is dropped.
type Ruled = Result<&'static str, &'static str>;

/// `Ok` if it is so, else dropped by `rule`.
fn demand(is_so: bool, rule: &'static str) -> Result<(), &'static str> {
    if is_so { Ok(()) } else { Err(rule) }
}

/// Whose port it is, and who is on the other side.
#[derive(Debug, Clone)]
pub(crate) struct Party {
    pub(crate) mac: [u8; 6],
    pub(crate) ipv4: Ipv4Addr,
    pub(crate) gateway_mac: [u8; 6],
    /// The directed broadcast of the subnet.
    pub(crate) broadcast: Ipv4Addr,
    /// Its address of IPv6, if it has one, and the link's.
    pub(crate) global: Option<Ipv6Addr>,
    pub(crate) link_local: Ipv6Addr,
    /// What else it may send from.
    pub(crate) extra: Vec<IpAddr>,
    /// Multicast groups that it may send to.
    pub(crate) groups: Vec<IpAddr>,
}

impl Party {
    fn has(&self, address: IpAddr) -> bool {
        let own = match address {
            IpAddr::V4(address) => address == self.ipv4,
            IpAddr::V6(address) => Some(address) == self.global || address == self.link_local,
        };
        own || self.extra.contains(&address)
    }
}

impl Port {
    /// What becomes of `frame`, which begins with its Ethernet header, if the
    /// desktop sends it, and which rule decides. Nothing is sent; the host is asked
    /// where it would route the packet.
    #[must_use]
    pub fn explain(&self, frame: &[u8]) -> Decision {
        let config = self.config();
        if frame.len() > self.longest_frame() {
            let rule = "no longer than the link takes";
            return Decision { passes: false, rule: rule.into(), arrives: false, beyond: rule.into() };
        }
        let gateway_mac = Mac::of(config.instance, config.subnet.gateway());
        let party = Party {
            mac: self.mac().octets(),
            ipv4: self.address(),
            gateway_mac: gateway_mac.octets(),
            broadcast: config.subnet.broadcast(),
            global: self.ipv6(),
            link_local: self.mac().link_local(),
            extra: self.extra_addresses().to_vec(),
            groups: self.groups().to_vec(),
        };
        let gateway6 = config.subnet6.map(|six| six.gateway(config.subnet));
        let beyond = Beyond {
            policy: self.policy().clone(),
            gateway4: config.subnet.gateway(),
            gateways6: gateway6.into_iter().chain([gateway_mac.link_local()]).collect(),
            name_servers: config.name_servers().collect(),
            near: self.near(),
            subnets: Subnets { four: config.subnet, six: config.subnet6, extra: self.extra_of_all() },
        };
        explain(&party, &beyond, &|to| self.way(to), frame)
    }
}

/// The same, of the whole way.
fn explain(party: &Party, beyond: &Beyond, ways: beyond::Ways<'_>, frame: &[u8]) -> Decision {
    match ruled(party, frame) {
        Err(rule) => Decision { passes: false, rule: rule.into(), arrives: false, beyond: rule.into() },
        Ok(rule) => {
            let (arrives, beyond) = match beyond::ruled(beyond, ways, frame) {
                Ok(beyond) => (true, beyond),
                Err(beyond) => (false, beyond),
            };
            Decision { passes: true, rule: rule.into(), arrives, beyond: beyond.into() }
        }
    }
}

/// Whether a frame leaves the port, and the rule.
#[cfg(test)]
pub(crate) fn at_port(party: &Party, frame: &[u8]) -> (bool, &'static str) {
    match ruled(party, frame) {
        Ok(rule) => (true, rule),
        Err(rule) => (false, rule),
    }
}

fn ruled(party: &Party, frame: &[u8]) -> Ruled {
    let (to, from, ethertype, payload) = split(frame).ok_or("a frame has an Ethernet header")?;
    demand(from == party.mac, "the source MAC is the port's own")?;
    match ethertype {
        ARP => {
            demand(to == party.gateway_mac || to == BROADCAST, "ARP goes to the gateway or to all")?;
            arp(party, payload)
        }
        IPV4 => ipv4(party, to, payload),
        IPV6 if party.global.is_some() => ipv6::ruled(party, to, payload),
        _ => Err("only IPv4, IPv6 and ARP, without a tag"),
    }
}

type Parts<'a> = ([u8; 6], [u8; 6], u16, &'a [u8]);

fn split(frame: &[u8]) -> Option<Parts<'_>> {
    let (to, rest) = frame.split_first_chunk::<6>()?;
    let (from, rest) = rest.split_first_chunk::<6>()?;
    let (ethertype, payload) = rest.split_first_chunk::<2>()?;
    Some((*to, *from, u16::from_be_bytes(*ethertype), payload))
}

fn arp(party: &Party, packet: &[u8]) -> Ruled {
    let packet = packet.first_chunk::<28>().ok_or("ARP is whole")?;
    let [h0, h1, p0, p1, _, _, o0, o1, sender @ .., t0, t1, t2, t3] = *packet;
    demand([h0, h1, p0, p1] == [0, 1, 8, 0], "ARP is about IPv4 over Ethernet")?;
    demand(matches!(u16::from_be_bytes([o0, o1]), 1 | 2), "ARP is a request or a reply")?;
    demand([t0, t1, t2, t3] != [0; 4], "ARP is about somebody")?;
    let [m0, m1, m2, m3, m4, m5, i0, i1, i2, i3, ..] = sender;
    let ipv4 = Ipv4Addr::new(i0, i1, i2, i3);
    demand([m0, m1, m2, m3, m4, m5] == party.mac, "the sender of ARP has the port's own MAC")?;
    demand(
        party.has(ipv4.into()) || ipv4.is_unspecified(),
        "the sender of ARP has the port's own address, or none yet",
    )?;
    Ok("ARP for itself")
}

fn ipv4(party: &Party, mac: [u8; 6], packet: &[u8]) -> Ruled {
    let (header, payload) = packet.split_first_chunk::<20>().ok_or("a packet has a header")?;
    let [first, _, l0, l1, _, _, f0, f1, ttl, protocol, _, _, s0, s1, s2, s3, d0, d1, d2, d3] = *header;
    let (source, to) = (Ipv4Addr::new(s0, s1, s2, s3), Ipv4Addr::new(d0, d1, d2, d3));
    demand(party.has(source.into()) || source.is_unspecified(), "the source address is the port's own, or none yet")?;
    let total_length = usize::from(u16::from_be_bytes([l0, l1]));
    let whole = u16::from_be_bytes([f0, f1]) & 0x3fff == 0;
    if first != 0x45 {
        // A router alert, and a report of groups behind it (RFC 3376, 4.2).
        let alert = first == 0x46 && ttl == 1 && protocol == 2 && payload.starts_with(&[0x94, 4, 0, 0, 0x22]);
        let to_routers = mac == [1, 0, 0x5e, 0, 0, 22] && to == Ipv4Addr::new(224, 0, 0, 22);
        let whole = whole && (32..=packet.len()).contains(&total_length);
        demand(alert && to_routers && whole, "IPv4 has no options, but in a report of groups")?;
        demand(!source.is_unspecified(), "a report of groups has a sender")?;
        demand(party.groups.iter().any(IpAddr::is_ipv4), "who is in no group reports none")?;
        return Ok("a report of groups");
    }
    demand(whole, "no fragments")?;
    demand((20..=packet.len()).contains(&total_length), "the length is true")?;
    if to.is_broadcast() && mac == BROADCAST {
        demand(protocol == 17 && dhcp(party, payload), "to all goes only a question of DHCP for itself")?;
        return Ok("a question of DHCP for itself");
    }
    demand(!source.is_unspecified(), "nobody without an address speaks")?;
    if party.groups.contains(&to.into()) && mac == Mac::of_group(to.into()).octets() {
        let port = payload.first_chunk::<2>().filter(|_| protocol == 17).ok_or("to a group goes only UDP")?;
        demand(*port != [0, 67], "no server of DHCP")?;
        return Ok("UDP to a group of the policy");
    }
    demand(mac == party.gateway_mac, "IPv4 goes to the gateway")?;
    let for_one_other_host = !(to.octets()[0] == 0
        || to.is_loopback()
        || to.is_link_local()
        || to.octets()[0] >= 224
        || to == party.broadcast);
    demand(for_one_other_host, "the destination is one other host")?;
    match protocol {
        1 => Ok("ICMP to the gateway"),
        6 => Ok("TCP to the gateway"),
        // Anything but a server of DHCP, as far as that can be seen.
        17 => {
            let port = payload.first_chunk::<2>().ok_or("UDP has ports")?;
            demand(*port != [0, 67], "no server of DHCP")?;
            Ok("UDP to the gateway")
        }
        _ => Err("only TCP, UDP and ICMP"),
    }
}

/// A question of DHCP (RFC 2131) that names who asks. What does not fit into
/// the frame is not there.
fn dhcp(party: &Party, packet: &[u8]) -> bool {
    let Some((ports, message)) = packet.split_first_chunk::<4>() else { return false };
    let Some((_, message)) = message.split_first_chunk::<4>() else { return false };
    *ports == [0, 68, 0, 67] && message.get(..3) == Some(&[1, 1, 6]) && message.get(28..34) == Some(&party.mac)
}
