//! What is told of one dropped frame: enough to know it by.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use netlink_packet_core::NlasIterator;

use crate::netlink::{HEADER_LEN, messages};

/// Most octets of a packet that the kernel is asked for.
pub(super) const SNAP_OCTETS: u32 = 64;

/// A message of the log. Source: Linux `include/uapi/linux/netfilter/nfnetlink_log.h`,
/// `NFULNL_MSG_PACKET`; the upper octet is `NFNL_SUBSYS_ULOG`.
const PACKET: u16 = 4 << 8;

/// Its attributes. Source: as above.
const PACKET_HEADER: u16 = 1;
const MARK: u16 = 2;
const INDEV: u16 = 4;
const PHYSINDEV: u16 = 6;
const PAYLOAD: u16 = 9;
const HARDWARE_HEADER: u16 = 16;

/// One dropped frame, as much of it as was kept. A desktop wrote it: nothing of
/// it is shown but numbers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Sample {
    /// Destination and source of the frame.
    pub macs: Option<([u8; 6], [u8; 6])>,
    /// What it carries.
    pub ethertype: u16,
    /// Source and destination of the packet.
    pub addresses: Option<(IpAddr, IpAddr)>,
    /// Its protocol.
    pub protocol: Option<u8>,
    /// Ports of UDP or TCP.
    pub ports: Option<(u16, u16)>,
}

/// A sample, with what names its port and reason.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Logged {
    pub(super) mark: u32,
    /// Link that it came in by: the port's, or the bridge's behind it.
    pub(super) link: u32,
    pub(super) sample: Sample,
}

fn word(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|&word| u32::from_be_bytes(word))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|&half| u16::from_be_bytes(half))
}

/// The samples of a datagram of the kernel.
pub(super) fn logged(datagram: &[u8]) -> Vec<Logged> {
    let of_log = messages(datagram).filter(|(header, _)| header.kind == PACKET);
    of_log.map(|(_, message)| read(message.get(HEADER_LEN + 4..).unwrap_or_default())).collect()
}

/// Takes a datagram as if it came from the kernel's log, with frames in it that
/// desktops wrote: for fuzzing. Says how many samples are in it.
#[doc(hidden)]
#[must_use]
pub fn samples_of(datagram: &[u8]) -> usize {
    logged(datagram).iter().filter(|logged| !logged.sample.to_string().is_empty()).count()
}

fn read(attributes: &[u8]) -> Logged {
    let mut logged = Logged::default();
    let mut payload = Vec::new();
    for attribute in NlasIterator::new(attributes).filter_map(Result::ok) {
        let value = attribute.value();
        match attribute.kind() {
            PACKET_HEADER => logged.sample.ethertype = half(value, 0).unwrap_or_default(),
            MARK => logged.mark = word(value).unwrap_or_default(),
            // Of a bridge's port both are there, and the port counts.
            PHYSINDEV => logged.link = word(value).unwrap_or_default(),
            INDEV if logged.link == 0 => logged.link = word(value).unwrap_or_default(),
            HARDWARE_HEADER => {
                let macs = value.first_chunk::<6>().zip(value.get(6..).and_then(<[u8]>::first_chunk::<6>));
                logged.sample.macs = macs.map(|(to, from)| (*to, *from));
            }
            PAYLOAD => payload = value.to_vec(),
            _ => {}
        }
    }
    logged.sample.look_into(&payload);
    logged
}

impl Sample {
    fn look_into(&mut self, packet: &[u8]) {
        let behind = match self.ethertype {
            0x0800 => {
                let four = |at: usize| packet.get(at..)?.first_chunk::<4>().map(|&a| IpAddr::V4(Ipv4Addr::from(a)));
                self.addresses = four(12).zip(four(16));
                self.protocol = packet.get(9).copied();
                usize::from(packet.first().map_or(0, |first| first & 0xf)) * 4
            }
            0x86dd => {
                let six = |at: usize| packet.get(at..)?.first_chunk::<16>().map(|&a| IpAddr::V6(Ipv6Addr::from(a)));
                self.addresses = six(8).zip(six(24));
                self.protocol = packet.get(6).copied();
                40
            }
            // The sender and the target of ARP.
            0x0806 => {
                let four = |at: usize| packet.get(at..)?.first_chunk::<4>().map(|&a| IpAddr::V4(Ipv4Addr::from(a)));
                self.addresses = four(14).zip(four(24));
                return;
            }
            _ => return,
        };
        if matches!(self.protocol, Some(6 | 17)) {
            self.ports = half(packet, behind).zip(half(packet, behind + 2));
        }
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mac = |[a, b, c, d, e, g]: [u8; 6]| format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}");
        if let Some((to, from)) = self.macs {
            write!(f, "from {} to {}, ", mac(from), mac(to))?;
        }
        match self.ethertype {
            0x0800 => f.write_str("IPv4")?,
            0x0806 => f.write_str("ARP")?,
            0x86dd => f.write_str("IPv6")?,
            other => write!(f, "ethertype {other:04x}")?,
        }
        if let Some((from, to)) = self.addresses {
            write!(f, " {from} > {to}")?;
        }
        match self.protocol {
            Some(1) => f.write_str(" icmp")?,
            Some(6) => f.write_str(" tcp")?,
            Some(17) => f.write_str(" udp")?,
            Some(58) => f.write_str(" icmpv6")?,
            Some(other) => write!(f, " protocol {other}")?,
            None => {}
        }
        self.ports.map_or(Ok(()), |(from, to)| write!(f, " {from} > {to}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_told_in_numbers() {
        let mut sample = Sample { ethertype: 0x0800, macs: Some(([2; 6], [6; 6])), ..Sample::default() };
        let header = [0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 66, 0, 9, 10, 66, 0, 1, 0x13, 0x88, 0, 53];
        sample.look_into(&header);
        let told = "from 06:06:06:06:06:06 to 02:02:02:02:02:02, IPv4 10.66.0.9 > 10.66.0.1 udp 5000 > 53";
        assert_eq!(sample.to_string(), told);
        for length in 0..header.len() {
            let mut cut = Sample { ethertype: 0x0800, ..Sample::default() };
            cut.look_into(header.get(..length).unwrap_or_default());
            assert!(!cut.to_string().is_empty());
        }
        assert!(logged(&[0xff; 40]).is_empty());
    }
}
