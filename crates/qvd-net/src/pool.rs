use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr},
    str::FromStr,
};

use qvd_core::{DesktopId, Instance};
use serde::{Deserialize, Serialize, de};

use crate::{Error, leases::Leases};

/// A range of IPv4 addresses, written `10.66.0.0/16`. The first address after
/// the network's own is the gateway's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Subnet {
    base: u32,
    prefix_len: u8,
}

/// Why a text is not a subnet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a subnet for desktops: {reason}")]
pub struct SubnetError {
    text: String,
    reason: &'static str,
}

impl SubnetError {
    pub(crate) const fn new(text: String, reason: &'static str) -> Self {
        Self { text, reason }
    }
}

impl Subnet {
    /// Longest subnet: a MAC address tells 24 bits of the address apart.
    const PREFIX_MIN: u8 = 8;
    /// Shortest subnet: gateway, broadcast and 13 desktops.
    const PREFIX_MAX: u8 = 28;

    /// The subnet that `base` and a prefix of `prefix_len` bits make.
    ///
    /// # Errors
    /// Bits are set after the prefix, it is shorter than 8 or longer than 28
    /// bits, or hosts cannot have such addresses.
    pub fn new(base: Ipv4Addr, prefix_len: u8) -> Result<Self, SubnetError> {
        let err = |reason| SubnetError { text: format!("{base}/{prefix_len}"), reason };
        if !(Self::PREFIX_MIN..=Self::PREFIX_MAX).contains(&prefix_len) {
            return Err(err("its prefix must have 8 to 28 bits"));
        }
        let subnet = Self { base: base.to_bits(), prefix_len };
        if subnet.base & !subnet.mask() != 0 {
            return Err(err("bits are set after the prefix"));
        }
        // Source: IANA IPv4 Special-Purpose Address Registry.
        if base.octets()[0] == 0 || base.is_loopback() || base.is_link_local() || base.octets()[0] >= 224 {
            return Err(err("hosts cannot have such addresses"));
        }
        Ok(subnet)
    }

    /// A subnet that installations on one host are unlikely to share: a /16
    /// from 10.64.0.0 to 10.191.0.0.
    #[must_use]
    pub fn default_for(instance: Instance) -> Self {
        let [_, low] = u16::from_str_radix(&instance.to_string(), 16).unwrap_or_default().to_be_bytes();
        Self { base: Ipv4Addr::new(10, 64 + low % 128, 0, 0).to_bits(), prefix_len: 16 }
    }

    /// Its first address, which names it.
    #[must_use]
    pub const fn base(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base)
    }

    /// How many bits all its addresses share.
    #[must_use]
    pub const fn prefix_len(self) -> u8 {
        self.prefix_len
    }

    /// Ones for the bits that all its addresses share.
    #[must_use]
    pub const fn netmask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.mask())
    }

    /// The host's address in it.
    #[must_use]
    pub const fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base + 1)
    }

    /// The address that means all of it.
    #[must_use]
    pub const fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base | !self.mask())
    }

    /// Whether `address` is in it.
    #[must_use]
    pub const fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & self.mask() == self.base
    }

    /// Whether it shares an address with the range of `base` and `prefix_len`.
    pub(crate) fn overlaps(self, base: Ipv4Addr, prefix_len: u8) -> bool {
        let mask = self.mask() & mask(prefix_len);
        base.to_bits() & mask == self.base & mask
    }

    /// How many desktops it has addresses for.
    #[must_use]
    pub const fn capacity(self) -> u32 {
        // Neither its own, the gateway's nor the broadcast address.
        !self.mask() - 2
    }

    /// The address of place `n`, below [`Subnet::capacity`].
    const fn place(self, n: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base + 2 + n)
    }

    const fn mask(self) -> u32 {
        mask(self.prefix_len)
    }
}

const fn mask(prefix_len: u8) -> u32 {
    match prefix_len {
        0 => 0,
        1..=31 => u32::MAX << (32 - prefix_len),
        _ => u32::MAX,
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base(), self.prefix_len)
    }
}

impl FromStr for Subnet {
    type Err = SubnetError;
    fn from_str(text: &str) -> Result<Self, SubnetError> {
        let err = || SubnetError {
            text: text.chars().take(32).flat_map(char::escape_default).collect(),
            reason: "write it as 10.66.0.0/16",
        };
        let (base, prefix_len) = text.split_once('/').ok_or_else(err)?;
        Self::new(base.parse().map_err(|_| err())?, prefix_len.parse().map_err(|_| err())?)
    }
}

impl Serialize for Subnet {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Subnet {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Who has which address.
#[derive(Debug)]
pub(crate) struct Pool {
    subnet: Subnet,
    taken: BTreeMap<Ipv4Addr, DesktopId>,
    /// Who had an address last, since this process began.
    last: BTreeMap<Ipv4Addr, DesktopId>,
    /// Addresses beside those of the subnet.
    extra: BTreeMap<IpAddr, DesktopId>,
    leases: Leases,
}

impl Pool {
    pub(crate) const fn new(subnet: Subnet, leases: Leases) -> Self {
        Self { subnet, taken: BTreeMap::new(), last: BTreeMap::new(), extra: BTreeMap::new(), leases }
    }

    /// Takes `wanted`, or else the address that the desktop had last, or else the
    /// one of its number, unless that is another's. What is wanted by name is taken
    /// also from who had it last and does not run.
    pub(crate) fn take(&mut self, desktop: DesktopId, wanted: Option<Ipv4Addr>) -> Result<Ipv4Addr, Error> {
        if self.taken.values().any(|&by| by == desktop) {
            return Err(Error::Attached(desktop));
        }
        let address = match wanted {
            Some(address) => self.check(address)?,
            None => self.free_for(desktop)?,
        };
        self.leases.keep(desktop, address)?;
        self.taken.insert(address, desktop);
        Ok(address)
    }

    /// Keeps no address for a desktop that will not come again.
    pub(crate) fn forget(&mut self, desktop: DesktopId) -> Result<(), Error> {
        self.leases.forget(desktop)
    }

    fn check(&self, address: Ipv4Addr) -> Result<Ipv4Addr, Error> {
        let subnet = self.subnet;
        if !subnet.contains(address) || [subnet.base(), subnet.gateway(), subnet.broadcast()].contains(&address) {
            return Err(Error::AddressOutside { address, subnet });
        }
        self.taken.get(&address).map_or(Ok(address), |&by| Err(Error::AddressTaken { address, by }))
    }

    fn free_for(&self, desktop: DesktopId) -> Result<Ipv4Addr, Error> {
        let capacity = self.subnet.capacity();
        let first = (desktop.number() - 1) % capacity;
        let all = (first..capacity).chain(0..first).map(|n| self.subnet.place(n));
        self.leases
            .address_of(desktop)
            .into_iter()
            .chain(all)
            .find(|address| !self.taken.contains_key(address) && !self.leases.is_anothers(*address, desktop))
            .ok_or(Error::Exhausted(self.subnet))
    }

    /// Takes all of `extra` for a desktop, or none.
    pub(crate) fn take_extra(&mut self, desktop: DesktopId, extra: &[IpAddr]) -> Result<(), Error> {
        let taken = extra.iter().find_map(|address| Some((address, self.extra.get(address)?)));
        if let Some((address, by)) = taken.filter(|&(_, &by)| by != desktop) {
            return Err(Error::Invalid(format!("address {address} is taken by desktop {by}")));
        }
        self.extra.extend(extra.iter().map(|&address| (address, desktop)));
        Ok(())
    }

    /// Whether the one who had an address before was another desktop. Asked once by
    /// whoever has taken it.
    pub(crate) fn was_anothers(&mut self, desktop: DesktopId, address: Ipv4Addr) -> bool {
        self.last.insert(address, desktop).is_some_and(|by| by != desktop)
    }

    /// Gives an address back, if this desktop has it, and those beside it.
    pub(crate) fn give_back(&mut self, desktop: DesktopId, address: Ipv4Addr) {
        self.extra.retain(|_, by| *by != desktop);
        if self.taken.get(&address) == Some(&desktop) {
            self.taken.remove(&address);
        }
    }

    /// Who has an address.
    pub(crate) fn desktops(&self) -> impl Iterator<Item = DesktopId> + '_ {
        self.taken.values().copied()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn desktop(number: u32) -> DesktopId {
        DesktopId::new(number).unwrap()
    }

    fn pool(subnet: &str) -> Pool {
        Pool::new(subnet.parse().unwrap(), Leases::default())
    }

    #[test]
    fn a_subnet_is_what_it_prints() {
        let subnet: Subnet = "10.66.0.0/16".parse().unwrap();
        assert_eq!(subnet.to_string(), "10.66.0.0/16");
        assert_eq!(subnet.gateway(), Ipv4Addr::new(10, 66, 0, 1));
        assert_eq!(subnet.broadcast(), Ipv4Addr::new(10, 66, 255, 255));
        for bad in ["", "10.66.0.0", "10.66.0.1/16", "10.66.0.0/7", "10.66.0.0/29", "127.0.0.0/8", "224.0.0.0/8", "a/b"]
        {
            let error = bad.parse::<Subnet>().unwrap_err().to_string();
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn overlaps_are_found_both_ways() {
        let subnet: Subnet = "10.66.0.0/16".parse().unwrap();
        assert!(subnet.overlaps(Ipv4Addr::new(10, 66, 3, 4), 32));
        assert!(subnet.overlaps(Ipv4Addr::new(10, 0, 0, 0), 8));
        assert!(!subnet.overlaps(Ipv4Addr::new(10, 67, 0, 0), 16));
    }

    #[test]
    fn who_has_an_address_is_named() {
        let mut pool = pool("10.66.0.0/28");
        let address = pool.take(desktop(7), None).unwrap();
        let error = pool.take(desktop(8), Some(address)).unwrap_err();
        assert_eq!(error.to_string(), format!("address {address} is taken by desktop 7"));
        assert!(matches!(pool.take(desktop(7), None), Err(Error::Attached(_))));
        for outside in ["10.66.0.0", "10.66.0.1", "10.66.0.15", "10.67.0.2"] {
            let result = pool.take(desktop(9), Some(outside.parse().unwrap()));
            assert!(matches!(result, Err(Error::AddressOutside { .. })), "{outside}");
        }
    }

    /// Two numbers that would get the same address each keep their own, in
    /// whichever order they come back, and after the process has ended.
    #[test]
    fn an_address_is_kept_for_its_desktop() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("addresses");
        let subnet: Subnet = "10.66.0.0/28".parse().unwrap();
        let open = |subnet| Pool::new(subnet, Leases::open(&file, subnet).unwrap());
        let (first, second) = (desktop(1), desktop(14));
        let mut pool = open(subnet);
        let [one, two] = [first, second].map(|id| pool.take(id, None).unwrap());
        assert_ne!(one, two);
        let mut pool = open(subnet);
        assert_eq!(pool.take(second, None).unwrap(), two);
        assert_eq!(pool.take(first, None).unwrap(), one);
        pool.give_back(first, one);
        // All others are in use, and its own is kept all the same.
        for number in 0..11 {
            pool.take(desktop(100 + number), None).unwrap();
        }
        assert!(matches!(pool.take(desktop(200), None), Err(Error::Exhausted(_))));
        assert_eq!(pool.take(desktop(201), Some(one)).unwrap(), one, "whoever names it has it");
        pool.give_back(desktop(201), one);
        pool.forget(desktop(201)).unwrap();
        assert_eq!(pool.take(desktop(200), None).unwrap(), one);
        // Of another subnet nothing is kept.
        let other: Subnet = "10.67.0.0/28".parse().unwrap();
        assert!(other.contains(open(other).take(first, None).unwrap()));
        std::fs::write(&file, "no line").unwrap();
        let error = Leases::open(&file, subnet).unwrap_err().to_string();
        assert!(error.contains("`no line`") && !error.contains('\n'), "{error}");
    }

    proptest! {
        /// Whatever is taken and given back: no address twice, none outside,
        /// and exhausted only when all are taken.
        #[test]
        fn no_address_is_given_twice(steps in vec((1_u32..60, any::<bool>(), proptest::option::of(0_u32..16)), 0..200)) {
            let subnet: Subnet = "10.66.0.0/28".parse().unwrap();
            let mut pool = Pool::new(subnet, Leases::default());
            let mut model = BTreeMap::<DesktopId, Ipv4Addr>::new();
            for (number, take, wanted) in steps {
                let id = desktop(number);
                if !take {
                    if let Some(address) = model.remove(&id) {
                        pool.give_back(id, address);
                        pool.forget(id).unwrap();
                    }
                    continue;
                }
                let wanted = wanted.map(|n| Ipv4Addr::from_bits(subnet.base().to_bits() + n));
                match pool.take(id, wanted) {
                    Ok(address) => {
                        prop_assert!(subnet.contains(address));
                        prop_assert!(![subnet.base(), subnet.gateway(), subnet.broadcast()].contains(&address));
                        prop_assert!(model.values().all(|&other| other != address));
                        prop_assert!(model.insert(id, address).is_none());
                    }
                    Err(Error::Exhausted(_)) => prop_assert_eq!(model.len(), 13),
                    Err(Error::AddressTaken { address, by }) => prop_assert_eq!(model.get(&by), Some(&address)),
                    Err(Error::Attached(by)) => prop_assert!(model.contains_key(&by)),
                    Err(Error::AddressOutside { .. }) => prop_assert!(wanted.is_some()),
                    Err(other) => return Err(TestCaseError::fail(other.to_string())),
                }
            }
        }

        /// A desktop gets the same address each time, if it is free.
        #[test]
        fn an_address_stays(number in 1_u32..=DesktopId::MAX) {
            let take = || pool("10.66.0.0/16").take(desktop(number), None).unwrap();
            prop_assert_eq!(take(), take());
        }
    }
}
