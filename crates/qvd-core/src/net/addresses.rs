//! Addresses beyond a port's own: groups that it takes part in, and further ones
//! that it may send from.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use serde::{Deserialize, Serialize, de};

use super::{NetWordError, mask4, mask6};

/// A multicast group, written `239.1.2.3` or `ff15::42`.
///
/// Those that a link's own protocols use, such as all hosts or all routers, are
/// nobody's to join: what a port has to say to them passes without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MulticastGroup(IpAddr);

impl MulticastGroup {
    const WANTED: &'static str = "a multicast group: write `239.1.2.3` or `ff15::42`, and none of those that the link \
                                  itself uses, such as 224.0.0.1 or ff02::1";

    /// Its address.
    #[must_use]
    pub const fn address(self) -> IpAddr {
        self.0
    }

    /// Whether the group is for programs, and not for a link's own protocols
    /// (IANA IPv4 and IPv6 Multicast Address Space Registries).
    fn is_for_programs(address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => address.is_multicast() && !matches!(address.octets(), [224, 0, 0, 0..=2 | 13 | 22]),
            IpAddr::V6(address) => {
                let [first, rest @ ..] = address.segments();
                let scope = first & 0xf;
                let of_the_link =
                    matches!(rest, [0, 0, 0, 0, 0, 0, 0 | 1 | 2 | 0x16 | 0x6a] | [0, 0, 0, 0, 0, 1, 2 | 3])
                        || matches!(rest, [0, 0, 0, 0, 1, 0xff00..=0xffff, _]);
                // Nothing of scope 0 or 1 leaves a host (RFC 4291, 2.7).
                address.is_multicast() && (2..0xf).contains(&scope) && !of_the_link
            }
        }
    }
}

impl fmt::Display for MulticastGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for MulticastGroup {
    type Err = NetWordError;
    fn from_str(text: &str) -> Result<Self, NetWordError> {
        let address = text.parse().ok().filter(|&address| Self::is_for_programs(address));
        address.map(Self).ok_or_else(|| NetWordError::new(text, Self::WANTED))
    }
}

/// Further addresses of a desktop, written `192.0.2.9`, `192.0.2.8/30` or `2001:db8::8/125`:
/// at most sixteen, each of which is pinned alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExtraAddresses {
    first: IpAddr,
    prefix_len: u8,
}

impl ExtraAddresses {
    const WANTED: &'static str = "some further addresses of a host: write `192.0.2.9`, `192.0.2.8/30` or \
                                  `2001:db8::8/125`, at most sixteen at once";

    /// Bits in which they may differ: sixteen are four.
    const FREE_BITS_MAX: u8 = 4;

    const fn whole(address: IpAddr) -> u8 {
        if address.is_ipv4() { 32 } else { 128 }
    }

    /// Each of them.
    pub fn iter(self) -> impl Iterator<Item = IpAddr> {
        let count = 1_u32 << (Self::whole(self.first) - self.prefix_len);
        (0..count).map(move |n| match self.first {
            IpAddr::V4(first) => IpAddr::V4(Ipv4Addr::from_bits(first.to_bits() | n)),
            IpAddr::V6(first) => IpAddr::V6(Ipv6Addr::from_bits(first.to_bits() | u128::from(n))),
        })
    }

    /// Whether all of `other` are among them.
    #[must_use]
    pub fn covers(self, other: &Self) -> bool {
        self.prefix_len <= other.prefix_len && self.iter().any(|own| own == other.first)
    }

    /// Whether one host can have it and send from it.
    fn is_of_a_host(address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => {
                let [first, ..] = address.octets();
                first != 0 && first < 224 && !address.is_loopback() && !address.is_link_local()
            }
            IpAddr::V6(address) => {
                // Neither unspecified, loopback nor IPv4 in disguise.
                let high = address.to_bits() >> 32;
                high != 0 && high != 0xffff && !address.is_multicast() && !address.is_unicast_link_local()
            }
        }
    }
}

impl fmt::Display for ExtraAddresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, prefix_len } = self;
        if *prefix_len == Self::whole(*first) { first.fmt(f) } else { write!(f, "{first}/{prefix_len}") }
    }
}

impl FromStr for ExtraAddresses {
    type Err = NetWordError;
    fn from_str(text: &str) -> Result<Self, NetWordError> {
        let parsed = || {
            let (first, length) = text.split_once('/').map_or((text, None), |(first, length)| (first, Some(length)));
            let first: IpAddr = first.parse().ok()?;
            let whole = Self::whole(first);
            let lengths = whole - Self::FREE_BITS_MAX..=whole;
            let prefix_len = length.map_or(Some(whole), |length| length.parse().ok())?;
            if !lengths.contains(&prefix_len) || !Self::is_of_a_host(first) {
                return None;
            }
            let is_first = match first {
                IpAddr::V4(first) => first.to_bits() & !mask4(prefix_len) == 0,
                IpAddr::V6(first) => first.to_bits() & !mask6(prefix_len) == 0,
            };
            is_first.then_some(Self { first, prefix_len })
        };
        parsed().ok_or_else(|| NetWordError::new(text, Self::WANTED))
    }
}

super::as_text!(MulticastGroup, ExtraAddresses);

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn words_are_what_they_print() {
        for word in ["239.1.2.3", "224.0.0.251", "ff02::fb", "ff15::42"] {
            assert_eq!(word.parse::<MulticastGroup>().unwrap().to_string(), word);
        }
        let bad = "10.0.0.1 224.0.0.1 224.0.0.22 fd00::1 ff01::42 ff02::1 ff05::1:3 ff02::1:ff00:7 239.0.0.0/8";
        for bad in bad.split(' ') {
            assert!(bad.parse::<MulticastGroup>().is_err(), "{bad}");
        }
        for word in ["192.0.2.9", "192.0.2.8/30", "2001:db8::8/125"] {
            assert_eq!(word.parse::<ExtraAddresses>().unwrap().to_string(), word);
        }
        let bad = "192.0.2.9/30 192.0.2.0/24 127.0.0.1 169.254.0.1 224.0.0.251 255.255.255.255 :: ::1 fe80::1 \
                   ::ffff:192.0.2.9 2001:db8::/64 x";
        for bad in bad.split(' ') {
            assert!(bad.parse::<ExtraAddresses>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_prefix_is_its_addresses() {
        let of = |word: &str| word.parse::<ExtraAddresses>().unwrap();
        let all: Vec<_> = of("192.0.2.8/30").iter().map(|address| address.to_string()).collect();
        assert_eq!(all, ["192.0.2.8", "192.0.2.9", "192.0.2.10", "192.0.2.11"]);
        assert_eq!(of("2001:db8::8/125").iter().count(), 8);
        assert!(of("192.0.2.8/30").covers(&of("192.0.2.10/31")) && !of("192.0.2.8/30").covers(&of("192.0.2.12")));
    }
}
