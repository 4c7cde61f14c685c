use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use qvd_core::Instance;
use serde::{Deserialize, Serialize};

/// Hardware address of a link.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac([u8; 6]);

impl Mac {
    /// First octet: locally administered, one receiver (IEEE 802-2014, 8.4).
    const FIRST: u8 = 0x52;

    /// The one of `address`: a desktop has the same one wherever and whenever
    /// it runs, and no two of an installation share one, as a subnet has at
    /// most 24 bits of its own.
    #[must_use]
    pub fn of(instance: Instance, address: Ipv4Addr) -> Self {
        let [high, low] = u16::from_str_radix(&instance.to_string(), 16).unwrap_or_default().to_be_bytes();
        let [_, b, c, d] = address.octets();
        Self([Self::FIRST, high, low, b, c, d])
    }

    /// The one that frames to a multicast group have (RFC 1112, 6.4; RFC 2464, 7).
    pub(crate) const fn of_group(group: IpAddr) -> Self {
        match group {
            IpAddr::V4(group) => {
                let [_, b, c, d] = group.octets();
                Self([1, 0, 0x5e, b & 0x7f, c, d])
            }
            IpAddr::V6(group) => {
                let [.., c, d, e, f] = group.octets();
                Self([0x33, 0x33, c, d, e, f])
            }
        }
    }

    /// The address that its link has in IPv6 by itself (RFC 4291, appendix A).
    #[must_use]
    pub const fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        Ipv6Addr::from_octets([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
    }

    pub(crate) const fn of_octets(octets: [u8; 6]) -> Self {
        Self(octets)
    }

    /// Its six bytes, as on the wire.
    #[must_use]
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = MacError;
    fn from_str(text: &str) -> Result<Self, MacError> {
        let octet = |text: &str| (text.len() == 2).then(|| u8::from_str_radix(text, 16).ok()).flatten();
        let octets: Option<Vec<u8>> = text.split(':').map(octet).collect();
        octets.and_then(|octets| octets.try_into().ok()).map(Self).ok_or(MacError)
    }
}

/// A text that is not six octets in base 16 with colons between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a MAC address is written as 52:c0:ff:00:00:02")]
pub struct MacError;

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for Mac {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
