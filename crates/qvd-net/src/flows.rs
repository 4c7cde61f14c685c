//! What connection tracking holds of a port's addresses: flows that it began, and
//! those that it answers. They end with the port, so that whoever gets an address
//! later begins with none: no late answer of the old flows is let in to it, and the
//! host takes nothing from it as said in one of them.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Mutex,
};

use netlink_packet_core::{DefaultNla, NLA_F_NESTED};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterProtoFamily,
    conntrack::{ConntrackAttribute, ConntrackMessage},
};
use rustix::io::Errno;

use crate::{
    Error, NetConfig,
    attributes::{attribute, nested, put},
    elements::NFNETLINK_V0,
    identity::Identity,
    netlink::{Netlink, NetlinkError, Request},
    network::lock,
};

/// Source of the numbers, here and below: Linux
/// `include/uapi/linux/netfilter/nfnetlink_conntrack.h`.
const GET_STATS: u8 = 5;
const STATS_GLOBAL_ENTRIES: u16 = 1;
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const FILTER: u16 = 25;
const TUPLE_IP: u16 = 1;
const V4_SRC: u16 = 1;
const V6_SRC: u16 = 3;

/// That of a tuple the source alone is compared. Source: Linux
/// `net/netfilter/nf_internals.h`, `CTA_IP_SRC` of `CTA_FILTER_FLAG`.
const BY_SOURCE: u32 = 1;

/// Most addresses that the kernel is told to look for, one by one: it walks through
/// its whole table for each, a third of a millisecond if that has room for 262 144
/// and is nearly empty. Listing it takes thirty times as long, whatever is looked for.
const FEW: usize = 16;

/// Requests of one batch, whose answers wait in the socket's buffer.
const BATCH: usize = 64;

pub(crate) struct Flows {
    config: NetConfig,
    netlink: Mutex<Netlink>,
    /// Addresses of which there were flows when the network was opened, and that no
    /// port of this process has had since.
    doubtful: Mutex<BTreeSet<IpAddr>>,
}

impl fmt::Debug for Flows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flows").finish_non_exhaustive()
    }
}

impl Flows {
    /// Looks at what there is in the calling thread's namespace.
    ///
    /// # Errors
    /// This kernel does not tell of its connection tracking, without which no flow
    /// could be ended.
    pub(crate) fn open(config: &NetConfig) -> Result<Self, Error> {
        let name = config.instance.bridge_name();
        let netlink = Netlink::netfilter().map_err(Error::io("open netfilter netlink for", name))?;
        let flows = Self { config: *config, netlink: Mutex::new(netlink), doubtful: Mutex::default() };
        let listed = flows.is_any().and_then(|any| if any { flows.list() } else { Ok(Vec::new()) });
        let listed = listed.map_err(flows.refused("list the flows of"))?;
        let is_known = |address: &IpAddr| match address {
            IpAddr::V6(six) if six.is_unicast_link_local() => true,
            address => config.contains(*address),
        };
        *lock(&flows.doubtful) = listed.iter().flat_map(|flow| flow.ends).flatten().filter(is_known).collect();
        Ok(flows)
    }

    /// Before a port with these addresses can send: ends what others left of them.
    pub(crate) fn begin(&self, identity: &Identity) -> Result<(), Error> {
        let of_others: Vec<_> = {
            let doubtful = lock(&self.doubtful);
            // Those beside its own are the host's to give away, and were not looked at.
            let is_doubtful = |address: &IpAddr| doubtful.contains(address) || identity.extra.contains(address);
            identity.addresses().filter(is_doubtful).collect()
        };
        self.end(&of_others)
    }

    /// Keeps the flows of a port that was adopted.
    pub(crate) fn keep(&self, identity: &Identity) {
        let own: Vec<_> = identity.addresses().collect();
        lock(&self.doubtful).retain(|address| !own.contains(address));
    }

    /// Ends every flow that one of these addresses began or answers.
    pub(crate) fn end(&self, addresses: &[IpAddr]) -> Result<(), Error> {
        let refused = || self.refused("end the flows of");
        if addresses.is_empty() || !self.is_any().map_err(refused())? {
            return Ok(());
        }
        match (addresses.len() <= FEW).then(|| self.end_by_source(addresses)) {
            Some(Ok(())) => {}
            // An older Linux takes the source for a whole tuple, and misses the rest of it.
            Some(Err(error)) if !error.is(Errno::INVAL) => return Err(refused()(error)),
            _ => self.end_listed(&|address| addresses.contains(&address)).map_err(refused())?,
        }
        lock(&self.doubtful).retain(|address| !addresses.contains(address));
        Ok(())
    }

    /// The same of all addresses that the network gives away.
    pub(crate) fn end_all(&self) -> Result<(), Error> {
        let refused = || self.refused("end the flows of");
        if !self.is_any().map_err(refused())? {
            return Ok(());
        }
        self.end_listed(&|address| self.config.contains(address)).map_err(refused())
    }

    fn refused(&self, op: &'static str) -> impl FnOnce(NetlinkError) -> Error {
        Error::netlink(op, self.config.instance.bridge_name())
    }

    /// Whether connection tracking holds anything at all.
    fn is_any(&self) -> Result<bool, NetlinkError> {
        let message = ConntrackMessage::Other { message_type: GET_STATS, attributes: Vec::new() };
        let request = Request::new(of_family(NetfilterProtoFamily::Unspec, message), 0);
        let answers = lock(&self.netlink).batch_raw(vec![request], Errno::NOENT)?;
        let count = answers.iter().find_map(|answer| attribute(answer.get(4..)?, STATS_GLOBAL_ENTRIES));
        Ok(count.is_none_or(|count| count.iter().any(|&octet| octet != 0)))
    }

    /// The kernel looks for them itself.
    fn end_by_source(&self, addresses: &[IpAddr]) -> Result<(), NetlinkError> {
        let by_source = |&address: &IpAddr| {
            [TUPLE_ORIG, TUPLE_REPLY].map(|tuple| {
                let mut source = Vec::new();
                nested(&mut source, TUPLE_IP, |bytes| match address {
                    IpAddr::V4(address) => put(bytes, V4_SRC, &address.octets()),
                    IpAddr::V6(address) => put(bytes, V6_SRC, &address.octets()),
                });
                let mut compared = Vec::new();
                put(&mut compared, tuple, &BY_SOURCE.to_ne_bytes());
                let parts = [(NLA_F_NESTED | tuple, source), (NLA_F_NESTED | FILTER, compared)];
                delete(if address.is_ipv4() { NetfilterProtoFamily::IPv4 } else { NetfilterProtoFamily::IPv6 }, parts)
            })
        };
        let requests = addresses.iter().flat_map(by_source).collect();
        lock(&self.netlink).batch(requests).map(drop)
    }

    /// Looks at every flow of the host.
    fn end_listed(&self, is_meant: &dyn Fn(IpAddr) -> bool) -> Result<(), NetlinkError> {
        let listed = self.list()?;
        let meant: Vec<_> = listed.iter().filter(|flow| flow.ends.into_iter().flatten().any(is_meant)).collect();
        let mut netlink = lock(&self.netlink);
        for some in meant.chunks(BATCH) {
            let requests = some.iter().map(|flow| delete(flow.family, flow.name.clone())).collect();
            // It may have ended by itself.
            netlink.batch_raw(requests, Errno::NOENT)?;
        }
        Ok(())
    }

    fn list(&self) -> Result<Vec<Flow>, NetlinkError> {
        let all = of_family(NetfilterProtoFamily::Unspec, ConntrackMessage::Get(Vec::new()));
        let answers = lock(&self.netlink).dump_raw(all)?;
        Ok(answers.iter().filter_map(|answer| Flow::of(answer)).collect())
    }

    /// How many flows there are of an address.
    #[cfg(test)]
    pub(crate) fn count(&self, address: IpAddr) -> usize {
        self.list().unwrap_or_default().iter().filter(|flow| flow.ends.contains(&Some(address))).count()
    }
}

/// A flow as the kernel shows it.
struct Flow {
    family: NetfilterProtoFamily,
    /// Who began it, and who answers.
    ends: [Option<IpAddr>; 2],
    /// The attributes that name it.
    name: Vec<(u16, Vec<u8>)>,
}

impl Flow {
    /// Of a message behind netlink's header.
    fn of(message: &[u8]) -> Option<Self> {
        let (family, attributes) = (*message.first()?, message.get(4..)?);
        let end = |tuple| source(attribute(attribute(attributes, tuple)?, TUPLE_IP)?);
        let part = |kind, flags| Some((flags | kind, attribute(attributes, kind)?.to_vec()));
        let name = [part(TUPLE_ORIG, NLA_F_NESTED), part(ZONE, 0), part(ID, 0)].into_iter().flatten().collect();
        Some(Self { family: family.into(), ends: [end(TUPLE_ORIG), end(TUPLE_REPLY)], name })
    }
}

/// Where a tuple comes from.
fn source(ip: &[u8]) -> Option<IpAddr> {
    let four = || attribute(ip, V4_SRC)?.first_chunk::<4>().map(|&octets| Ipv4Addr::from(octets).into());
    let six = || attribute(ip, V6_SRC)?.first_chunk::<16>().map(|&octets| Ipv6Addr::from(octets).into());
    four().or_else(six)
}

fn delete(family: NetfilterProtoFamily, parts: impl IntoIterator<Item = (u16, Vec<u8>)>) -> Request<NetfilterMessage> {
    let part = |(kind, value)| ConntrackAttribute::Other(DefaultNla::new(kind, value));
    Request::new(of_family(family, ConntrackMessage::Delete(parts.into_iter().map(part).collect())), 0)
}

fn of_family(family: NetfilterProtoFamily, message: ConntrackMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(family, NFNETLINK_V0, 0), message)
}
