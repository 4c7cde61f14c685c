use std::{fmt, net::Ipv6Addr, str::FromStr};

use qvd_core::Instance;
use serde::{Deserialize, Serialize, de};

use crate::{Subnet, SubnetError};

/// A /64 of IPv6 addresses, written `fd51:5644:1a2b::/64`.
///
/// A desktop's address in it ends as its IPv4 address does in that family's
/// [`Subnet`]: `10.66.0.9` has `fd51:5644:1a2b::9`. So it stays with the
/// desktop, no two can have the same, and none is left when no IPv4 address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Subnet6 {
    base: Ipv6Addr,
}

impl Subnet6 {
    /// How many bits all its addresses share: hosts that make their own
    /// addresses need the other 64 (RFC 4862, 5.5.3).
    pub const PREFIX_LEN: u8 = 64;

    /// The /64 that begins with `base`.
    ///
    /// # Errors
    /// Bits are set after the prefix, or hosts cannot have such addresses.
    pub fn new(base: Ipv6Addr) -> Result<Self, SubnetError> {
        let err = |reason| SubnetError::new(format!("{base}/{}", Self::PREFIX_LEN), reason);
        if base.to_bits() & u128::from(u64::MAX) != 0 {
            return Err(err("bits are set after the prefix"));
        }
        if base.is_multicast() || base.is_unicast_link_local() || base.octets()[0] == 0 {
            return Err(err("hosts cannot have such addresses"));
        }
        Ok(Self { base })
    }

    /// The installation's own, from the range that everybody may use within
    /// a site (RFC 4193).
    #[must_use]
    pub fn default_for(instance: Instance) -> Self {
        let number = u16::from_str_radix(&instance.to_string(), 16).unwrap_or_default();
        Self { base: Ipv6Addr::new(0xfd51, 0x5644, number, 0, 0, 0, 0, 0) }
    }

    /// Its first address, which names it.
    #[must_use]
    pub const fn base(self) -> Ipv6Addr {
        self.base
    }

    /// The address that belongs to `address` of `subnet`.
    #[must_use]
    pub const fn address(self, subnet: Subnet, address: std::net::Ipv4Addr) -> Ipv6Addr {
        let place = address.to_bits().wrapping_sub(subnet.base().to_bits());
        // `as` because `From` cannot be called in a `const fn`; it only widens.
        Ipv6Addr::from_bits(self.base.to_bits() | place as u128)
    }

    /// Whether `address` is in it.
    #[must_use]
    pub const fn contains(self, address: Ipv6Addr) -> bool {
        (self.base.to_bits() ^ address.to_bits()) >> 64 == 0
    }

    /// The host's address in it.
    #[must_use]
    pub const fn gateway(self, subnet: Subnet) -> Ipv6Addr {
        self.address(subnet, subnet.gateway())
    }
}

impl fmt::Display for Subnet6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, Self::PREFIX_LEN)
    }
}

impl FromStr for Subnet6 {
    type Err = SubnetError;
    fn from_str(text: &str) -> Result<Self, SubnetError> {
        let shown = || text.chars().take(64).flat_map(char::escape_default).collect();
        let err = || SubnetError::new(shown(), "write it as fd51:5644:1a2b::/64");
        let base = text.strip_suffix("/64").ok_or_else(err)?;
        Self::new(base.parse().map_err(|_| err())?)
    }
}

impl Serialize for Subnet6 {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Subnet6 {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_subnet_is_what_it_prints() {
        let subnet: Subnet6 = "fd51:5644:1a2b::/64".parse().unwrap();
        assert_eq!(subnet.to_string(), "fd51:5644:1a2b::/64");
        assert_eq!(subnet, Subnet6::default_for(Instance::new(0x1a2b)));
        for bad in ["", "fd51::", "fd51::1/64", "fd51::/48", "fe80::/64", "ff02::/64", "::/64", "x/64"] {
            let error = bad.parse::<Subnet6>().unwrap_err().to_string();
            assert!(!error.contains('\n'), "{error}");
        }
    }

    proptest! {
        /// Two desktops never share one, whatever their IPv4 addresses.
        #[test]
        fn addresses_differ_as_those_of_the_other_family_do(a in 0_u32..65536, b in 0_u32..65536) {
            let subnet: Subnet = "10.66.0.0/16".parse().unwrap();
            let six = Subnet6::default_for(Instance::new(1));
            let of = |n: u32| six.address(subnet, Ipv4Addr::from_bits(subnet.base().to_bits() + n));
            prop_assert_eq!(a == b, of(a) == of(b));
            prop_assert_eq!(of(1), six.gateway(subnet));
        }
    }
}
