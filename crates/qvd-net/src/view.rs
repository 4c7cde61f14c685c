//! What somebody who asks is told of a port.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use netlink_packet_route::{RouteNetlinkMessage, link::LinkAttribute};
use qvd_core::NetPolicy;
use serde::{Deserialize, Serialize};

use crate::{Decision, DropReason, Error, Mac, Port, links};

/// What went through a port, as the kernel counts it at the host's end of the
/// link: what the desktop sent is counted before any rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Counters {
    /// Packets that the desktop sent.
    pub sent_packets: u64,
    /// Bytes that the desktop sent.
    pub sent_bytes: u64,
    /// Packets that the desktop was sent.
    pub received_packets: u64,
    /// Bytes that the desktop was sent.
    pub received_bytes: u64,
    /// Packets for the desktop that found no room, or went beyond its rate.
    pub received_dropped: u64,
}

/// A port, for a person to look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PortView {
    /// Name of the host's end.
    pub link: String,
    /// MAC inside.
    pub mac: Mac,
    /// Address inside.
    pub ipv4: Ipv4Addr,
    /// Its address of IPv6, if it has one.
    pub ipv6: Option<Ipv6Addr>,
    /// What it may reach, after everybody who limits that.
    pub policy: NetPolicy,
    /// What went through it.
    pub counters: Counters,
    /// How many frames of the desktop were dropped, by reason; with iptables, up to a second ago.
    #[serde(default)]
    pub drops: BTreeMap<DropReason, u64>,
    /// What becomes of the frames that were asked about, in their order.
    pub explained: Vec<Decision>,
}

impl Port {
    /// What went through the port. One question to the kernel, whatever the
    /// number of ports.
    ///
    /// # Errors
    /// The link is gone, or the kernel did not say.
    pub fn counters(&self) -> Result<Counters, Error> {
        let answers = self.ask(links::show)?;
        let link = answers.iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        });
        let counted = link.into_iter().flat_map(|link| &link.attributes).find_map(|attribute| match attribute {
            LinkAttribute::Stats64(stats) => Some(stats),
            _ => None,
        });
        let stats = counted.ok_or(Error::NoPort(self.desktop()))?;
        Ok(Counters {
            sent_packets: stats.rx_packets,
            sent_bytes: stats.rx_bytes,
            received_packets: stats.tx_packets,
            received_bytes: stats.tx_bytes,
            received_dropped: stats.tx_dropped,
        })
    }

    /// The port as it is now, and what would become of `frames`, each of which
    /// begins with its Ethernet header.
    ///
    /// # Errors
    /// As [`Port::counters`].
    pub fn view(&self, frames: &[Vec<u8>]) -> Result<PortView, Error> {
        Ok(PortView {
            link: self.link().to_owned(),
            mac: self.mac(),
            ipv4: self.address(),
            ipv6: self.ipv6(),
            policy: self.policy().clone(),
            counters: self.counters()?,
            drops: self.filter().recent_drops(self.identity())?,
            explained: frames.iter().map(|frame| self.explain(frame)).collect(),
        })
    }
}
