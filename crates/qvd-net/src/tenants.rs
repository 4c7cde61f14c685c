//! Which tenant of a site has which network.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{File, OpenOptions},
    io,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use qvd_core::TenantName;
use rustix::fs::{FlockOperation, flock};

use crate::{Error, NetConfig, Subnet, Subnet6, kept};

/// What a site gives to its tenants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SiteRange {
    /// First address of IPv4, such as `10.64.0.0`.
    pub ipv4: Ipv4Addr,
    /// How many bits all addresses of IPv4 share, such as 10.
    pub prefix_len: u8,
    /// How many bits the addresses of one tenant share, such as 20.
    pub tenant_prefix_len: u8,
    /// A /48 of IPv6; each tenant gets a /64 of it, and nobody the first.
    pub ipv6: Ipv6Addr,
}

/// How many bits of an address of IPv6 a site has, and where a tenant's number is.
const SITE6_PREFIX_LEN: u8 = 48;
const TENANT6_AT: u32 = 64;

/// As many bits as a tenant's number has at most: names of links tell 65536
/// networks apart, of which one is the installation's own.
const TENANT_BITS_MAX: u8 = 15;

impl SiteRange {
    /// How many tenants there is room for.
    ///
    /// # Errors
    /// The prefixes make no sense together, or more than 32768 tenants.
    pub fn tenants(&self) -> Result<u16, Error> {
        let Self { ipv4, prefix_len, tenant_prefix_len, ipv6 } = *self;
        let invalid = |what: &str| Error::Invalid(format!("{ipv4}/{prefix_len} cannot be given to tenants: {what}"));
        let bits = tenant_prefix_len.checked_sub(prefix_len).ok_or_else(|| invalid("theirs would be larger"))?;
        if bits > TENANT_BITS_MAX {
            return Err(invalid("there can be 32768 tenants, and theirs would be more"));
        }
        if ipv6.to_bits() << SITE6_PREFIX_LEN != 0 {
            return Err(invalid("bits are set after the prefix of IPv6"));
        }
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix_len)).unwrap_or(0);
        if ipv4.to_bits() & !mask != 0 {
            return Err(invalid("bits are set after the prefix"));
        }
        // What holds for the first holds for all.
        Subnet::new(ipv4, tenant_prefix_len).map_err(|error| invalid(&error.to_string()))?;
        Subnet6::new(ipv6).map_err(|error| invalid(&error.to_string()))?;
        Ok(1 << bits)
    }

    fn subnets(&self, place: u16) -> Result<(Subnet, Subnet6), Error> {
        let invalid = |error: crate::SubnetError| Error::Invalid(error.to_string());
        let base = u32::from(place).checked_shl(32 - u32::from(self.tenant_prefix_len)).unwrap_or(0);
        let six = self.ipv6.to_bits() | (u128::from(place) + 1) << TENANT6_AT;
        let four = Subnet::new((self.ipv4.to_bits() | base).into(), self.tenant_prefix_len).map_err(invalid)?;
        Ok((four, Subnet6::new(six.into()).map_err(invalid)?))
    }
}

/// The tenants of a site, kept in a file: a tenant has the same network each time,
/// on each host that has the file, and no two share an address or a name.
#[derive(Debug)]
pub struct TenantPools {
    range: SiteRange,
    installation: NetConfig,
    room: u16,
    file: PathBuf,
    places: BTreeMap<TenantName, u16>,
    /// Held as long as this is: two processes would not know of each other's.
    _lock: File,
}

impl TenantPools {
    /// Reads `file`, or begins it. All networks are made like that of the
    /// `installation` but for their subnets and names.
    ///
    /// # Errors
    /// The range makes no sense or holds the installation's own subnet, the file
    /// cannot be read, was not written by this, or another process has it open.
    pub fn open(file: &Path, range: SiteRange, installation: NetConfig) -> Result<Self, Error> {
        let room = range.tenants()?;
        if installation.subnet.overlaps(range.ipv4, range.prefix_len) {
            let SiteRange { ipv4, prefix_len, .. } = range;
            let what = format!(
                "{ipv4}/{prefix_len} cannot be given to tenants: {} is the installation's own",
                installation.subnet
            );
            return Err(Error::Invalid(what));
        }
        let name = file.display().to_string();
        let io = |op: &'static str| Error::io(op, name.clone());
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(file.with_extension("lock"));
        let lock = lock.map_err(io("open the lock of"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(io::Error::from).map_err(io("lock"))?;
        let mut places = BTreeMap::new();
        for line in kept::read(file)?.lines() {
            let parsed =
                line.split_once(' ').and_then(|(place, tenant)| Some((place.parse().ok()?, tenant.parse().ok()?)));
            let known = parsed.filter(|&(place, _): &(u16, TenantName)| {
                place < room && !places.values().any(|&other| other == place)
            });
            let (place, tenant) =
                known.ok_or_else(|| kept::unknown(line, &name, "no place of a tenant of this range"))?;
            places.insert(tenant, place);
        }
        Ok(Self { range, installation, room, file: file.to_owned(), places, _lock: lock })
    }

    /// Who has a network.
    pub fn tenants(&self) -> impl Iterator<Item = &TenantName> {
        self.places.keys()
    }

    /// The network of a tenant, which it has from now on.
    ///
    /// # Errors
    /// Every subnet of the range is another tenant's, or the file cannot be written;
    /// nothing is given then.
    pub fn network_of(&mut self, tenant: &TenantName) -> Result<NetConfig, Error> {
        if let Some(&place) = self.places.get(tenant) {
            return self.network_at(place);
        }
        let taken: BTreeSet<_> = self.places.values().copied().collect();
        let first = first_place(tenant, self.room);
        let free = (first..self.room).chain(0..first).find(|place| !taken.contains(place));
        let SiteRange { ipv4, prefix_len, .. } = self.range;
        let range = format!("{ipv4}/{prefix_len}");
        let place = free.ok_or(Error::TenantsExhausted { range, tenants: self.room })?;
        let network = self.network_at(place)?;
        self.places.insert(tenant.clone(), place);
        if let Err(error) = self.write() {
            self.places.remove(tenant);
            return Err(error);
        }
        Ok(network)
    }

    fn network_at(&self, place: u16) -> Result<NetConfig, Error> {
        let (subnet, subnet6) = self.range.subnets(place)?;
        let instance = self.installation.instance.sibling(place + 1);
        let subnet6 = self.installation.subnet6.map(|_| subnet6);
        Ok(NetConfig { instance, subnet, subnet6, ..self.installation })
    }

    /// Gives a tenant's network back. One that has none is forgotten.
    ///
    /// # Errors
    /// The file cannot be written; the tenant keeps it.
    pub fn forget(&mut self, tenant: &TenantName) -> Result<(), Error> {
        let Some((tenant, place)) = self.places.remove_entry(tenant) else { return Ok(()) };
        let written = self.write();
        if written.is_err() {
            self.places.insert(tenant, place);
        }
        written
    }

    fn write(&self) -> Result<(), Error> {
        let text: String = self.places.iter().map(|(tenant, place)| format!("{place} {tenant}\n")).collect();
        kept::write_for_good(&self.file, &text)
    }
}

/// Where a tenant's place is looked for first: so that hosts without each
/// other's file mostly agree.
fn first_place(tenant: &TenantName, room: u16) -> u16 {
    let place = crate::access::hash(tenant.as_str().as_bytes()) % u64::from(room);
    u16::try_from(place).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::{collection::vec, prelude::*};
    use qvd_core::Instance;

    use super::*;

    fn range(tenant_prefix_len: u8) -> SiteRange {
        let ipv6 = Ipv6Addr::new(0xfd51, 0x5644, 0x7e57, 0, 0, 0, 0, 0);
        SiteRange { ipv4: Ipv4Addr::new(10, 192, 0, 0), prefix_len: 16, tenant_prefix_len, ipv6 }
    }

    fn open(file: &Path, tenant_prefix_len: u8) -> Result<TenantPools, Error> {
        TenantPools::open(file, range(tenant_prefix_len), NetConfig::new(Instance::new(0x7e57)))
    }

    fn tenant(name: &str) -> TenantName {
        name.parse().unwrap()
    }

    /// What tells two networks apart.
    fn marks(network: &NetConfig) -> (Subnet, Option<Subnet6>, Instance) {
        (network.subnet, network.subnet6, network.instance)
    }

    #[test]
    fn a_tenant_keeps_its_network_and_exhaustion_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("tenants");
        let mut pools = open(&file, 18).unwrap();
        let first: Vec<_> = ["lab", "law", "it", "guests"].map(|name| pools.network_of(&tenant(name)).unwrap()).into();
        let own = NetConfig::new(Instance::new(0x7e57));
        for (at, network) in first.iter().enumerate() {
            for other in first.iter().skip(at + 1).chain([&own]) {
                let (one, two) = (marks(network), marks(other));
                assert!(one.0 != two.0 && one.1 != two.1 && one.2 != two.2, "{one:?} {two:?}");
            }
        }
        let error = pools.network_of(&tenant("fifth")).unwrap_err();
        assert_eq!(error.to_string(), "no subnet is left in 10.192.0.0/16: 4 tenants have one each");
        assert!(open(&file, 18).is_err(), "another has it open");
        drop(pools);
        let mut pools = open(&file, 18).unwrap();
        assert_eq!(pools.network_of(&tenant("law")).unwrap(), first[1]);
        assert_eq!(pools.tenants().count(), 4);
        pools.forget(&tenant("it")).unwrap();
        pools.forget(&tenant("it")).unwrap();
        assert_eq!(pools.network_of(&tenant("fifth")).unwrap(), first[2]);
        drop(pools);
        let error = open(&file, 17).unwrap_err().to_string();
        assert!(error.contains("no place of a tenant of this range") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn a_range_that_makes_no_sense_is_refused() {
        let good = range(20);
        assert_eq!(good.tenants().unwrap(), 16);
        for bad in [
            SiteRange { tenant_prefix_len: 12, ..good },
            SiteRange { tenant_prefix_len: 30, ..good },
            SiteRange { ipv4: Ipv4Addr::new(10, 192, 1, 0), ..good },
            SiteRange { ipv4: Ipv4Addr::new(127, 0, 0, 0), ..good },
            SiteRange { ipv6: Ipv6Addr::new(0xfd51, 0, 0, 1, 0, 0, 0, 0), ..good },
            SiteRange { ipv4: Ipv4Addr::new(10, 0, 0, 0), prefix_len: 8, tenant_prefix_len: 24, ..good },
        ] {
            assert!(bad.tenants().is_err(), "{bad:?}");
        }
        let directory = tempfile::tempdir().unwrap();
        let all = SiteRange { ipv4: Ipv4Addr::new(10, 0, 0, 0), prefix_len: 8, ..range(20) };
        let own = NetConfig::new(Instance::new(0x7e57));
        let error = TenantPools::open(&directory.path().join("tenants"), all, own).unwrap_err().to_string();
        assert_eq!(error, "10.0.0.0/8 cannot be given to tenants: 10.151.0.0/16 is the installation's own");
    }

    proptest! {
        // Each step is written to the disk.
        #![proptest_config(ProptestConfig::with_cases(8))]

        /// Whoever comes and goes: no two share an address, and who stays keeps its own.
        #[test]
        fn no_address_is_two_tenants(steps in vec((0_u8..24, any::<bool>()), 0..60)) {
            let directory = tempfile::tempdir().unwrap();
            let mut pools = open(&directory.path().join("tenants"), 20).unwrap();
            let mut model = BTreeMap::new();
            for (number, comes) in steps {
                let name = tenant(&format!("t-{number}"));
                if !comes {
                    pools.forget(&name).unwrap();
                    model.remove(&name);
                    continue;
                }
                match pools.network_of(&name) {
                    Ok(network) => {
                        let (four, six, instance) = marks(&network);
                        let apart = model.iter().all(|(other, theirs): (&TenantName, &NetConfig)| {
                            let theirs = marks(theirs);
                            *other == name || (theirs.0 != four && theirs.1 != six && theirs.2 != instance)
                        });
                        prop_assert!(apart);
                        prop_assert!(model.insert(name, network).is_none_or(|before| before == network));
                    }
                    Err(Error::TenantsExhausted { .. }) => prop_assert_eq!(model.len(), 16),
                    Err(other) => return Err(TestCaseError::fail(other.to_string())),
                }
            }
        }
    }
}
