//! Which tenant of a site has which subnets.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

use crate::{Error, Subnet, Subnet6};

/// What a site gives to its tenants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SiteRange {
    /// First address of IPv4, such as `10.64.0.0`.
    pub ipv4: Ipv4Addr,
    /// How many bits all addresses of IPv4 share, such as 10.
    pub prefix_len: u8,
    /// How many bits the addresses of one tenant share, such as 20.
    pub tenant_prefix_len: u8,
    /// A /48 of IPv6; each tenant gets a /64 of it.
    pub ipv6: Ipv6Addr,
}

/// How many bits of an address of IPv6 a site has, and where a tenant's number is.
const SITE6_PREFIX_LEN: u8 = 48;
const TENANT6_AT: u32 = 64;

impl SiteRange {
    /// How many tenants there is room for.
    ///
    /// # Errors
    /// The prefixes make no sense together, or more tenants than a /48 has room for.
    pub fn tenants(&self) -> Result<u32, Error> {
        let Self { ipv4, prefix_len, tenant_prefix_len, ipv6 } = *self;
        let invalid = |what: &str| Error::Invalid(format!("{ipv4}/{prefix_len} cannot be given to tenants: {what}"));
        let bits = tenant_prefix_len.checked_sub(prefix_len).ok_or_else(|| invalid("theirs would be larger"))?;
        if bits > Subnet6::PREFIX_LEN - SITE6_PREFIX_LEN {
            return Err(invalid("a /48 of IPv6 has room for 65536 tenants"));
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

    fn subnets(&self, place: u32) -> Result<(Subnet, Subnet6), Error> {
        let invalid = |error: crate::SubnetError| Error::Invalid(error.to_string());
        let base = self.ipv4.to_bits() | place.checked_shl(32 - u32::from(self.tenant_prefix_len)).unwrap_or(0);
        let six = self.ipv6.to_bits() | u128::from(place) << TENANT6_AT;
        let four = Subnet::new(base.into(), self.tenant_prefix_len).map_err(invalid)?;
        Ok((four, Subnet6::new(six.into()).map_err(invalid)?))
    }
}

/// The tenants of a site, kept in a file: a tenant has the same subnets each time,
/// on each host that has the file, and no two share an address.
#[derive(Debug)]
pub struct TenantPools {
    range: SiteRange,
    room: u32,
    file: PathBuf,
    places: BTreeMap<String, u32>,
    /// Held as long as this is: two processes would not know of each other's.
    _lock: File,
}

impl TenantPools {
    /// Reads `file`, or begins it.
    ///
    /// # Errors
    /// The range makes no sense, the file cannot be read, was not written by this, or
    /// another process has it open.
    pub fn open(file: &Path, range: SiteRange) -> Result<Self, Error> {
        let room = range.tenants()?;
        let name = file.display().to_string();
        let io = |op: &'static str| Error::io(op, name.clone());
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(file.with_extension("lock"));
        let lock = lock.map_err(io("open the lock of"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(io::Error::from).map_err(io("lock"))?;
        let text = match fs::read_to_string(file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            other => other.map_err(io("read the tenants of"))?,
        };
        let mut places = BTreeMap::new();
        for line in text.lines() {
            let parsed = line.split_once(' ').and_then(|(place, tenant)| Some((place.parse::<u32>().ok()?, tenant)));
            let known = parsed.filter(|&(place, tenant)| {
                place < room && is_name(tenant) && !places.values().any(|&other| other == place)
            });
            let (place, tenant) = known.ok_or_else(|| {
                let shown: String = line.chars().take(64).flat_map(char::escape_default).collect();
                Error::Invalid(format!("`{shown}` in `{name}` is no place of a tenant of this range"))
            })?;
            places.insert(tenant.to_owned(), place);
        }
        Ok(Self { range, room, file: file.to_owned(), places, _lock: lock })
    }

    /// The subnets of a tenant, which it has from now on.
    ///
    /// # Errors
    /// Every subnet of the range is another tenant's, the name is none, or the file
    /// cannot be written; nothing is given then.
    pub fn pool_of(&mut self, tenant: &str) -> Result<(Subnet, Subnet6), Error> {
        if let Some(&place) = self.places.get(tenant) {
            return self.range.subnets(place);
        }
        if !is_name(tenant) {
            let shown: String = tenant.chars().take(64).flat_map(char::escape_default).collect();
            return Err(Error::Invalid(format!("`{shown}` is no tenant: at most 32 small letters, digits and dashes")));
        }
        let taken: std::collections::BTreeSet<_> = self.places.values().copied().collect();
        let first = first_place(tenant, self.room);
        let free = (first..self.room).chain(0..first).find(|place| !taken.contains(place));
        let SiteRange { ipv4, prefix_len, .. } = self.range;
        let range = format!("{ipv4}/{prefix_len}");
        let place = free.ok_or(Error::TenantsExhausted { range, tenants: self.room })?;
        let subnets = self.range.subnets(place)?;
        self.places.insert(tenant.to_owned(), place);
        if let Err(error) = self.write() {
            self.places.remove(tenant);
            return Err(error);
        }
        Ok(subnets)
    }

    /// Gives a tenant's subnets back. One that has none is forgotten.
    ///
    /// # Errors
    /// The file cannot be written; the tenant keeps them.
    pub fn forget(&mut self, tenant: &str) -> Result<(), Error> {
        let Some(place) = self.places.remove(tenant) else { return Ok(()) };
        let written = self.write();
        if written.is_err() {
            self.places.insert(tenant.to_owned(), place);
        }
        written
    }

    /// Whole or not at all, also when the host dies meanwhile.
    fn write(&self) -> Result<(), Error> {
        let text: String = self.places.iter().map(|(tenant, place)| format!("{place} {tenant}\n")).collect();
        let new = self.file.with_extension("new");
        let written = File::create(&new)
            .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&new, &self.file))
            .and_then(|()| {
                File::open(self.file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
            })
            .and_then(|directory| directory.sync_all());
        written.map_err(Error::io("write the tenants of", self.file.display().to_string()))
    }
}

fn is_name(tenant: &str) -> bool {
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    (1..=32).contains(&tenant.len()) && tenant.bytes().all(plain)
}

/// Where a tenant's place is looked for first: so that hosts without each
/// other's file mostly agree.
fn first_place(tenant: &str, room: u32) -> u32 {
    let place = crate::access::hash(tenant.as_bytes()) % u64::from(room);
    u32::try_from(place).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn range(tenant_prefix_len: u8) -> SiteRange {
        let ipv6 = Ipv6Addr::new(0xfd51, 0x5644, 0x7e57, 0, 0, 0, 0, 0);
        SiteRange { ipv4: Ipv4Addr::new(10, 64, 0, 0), prefix_len: 16, tenant_prefix_len, ipv6 }
    }

    #[test]
    fn a_tenant_keeps_its_subnets_and_exhaustion_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("tenants");
        let mut pools = TenantPools::open(&file, range(18)).unwrap();
        let first: Vec<_> = ["lab", "law", "it", "guests"].map(|tenant| pools.pool_of(tenant).unwrap()).into();
        assert_eq!(first.iter().map(|(four, _)| four.base()).collect::<BTreeSet<_>>().len(), 4);
        assert_eq!(first.iter().map(|(_, six)| six.base()).collect::<BTreeSet<_>>().len(), 4);
        let error = pools.pool_of("fifth").unwrap_err();
        assert_eq!(error.to_string(), "no subnet is left in 10.64.0.0/16: 4 tenants have one each");
        assert!(TenantPools::open(&file, range(18)).is_err(), "another has it open");
        drop(pools);
        let mut pools = TenantPools::open(&file, range(18)).unwrap();
        assert_eq!(pools.pool_of("law").unwrap(), first[1]);
        pools.forget("it").unwrap();
        pools.forget("it").unwrap();
        assert_eq!(pools.pool_of("fifth").unwrap(), first[2]);
        drop(pools);
        assert!(TenantPools::open(&file, range(17)).is_err(), "its places are of another range");
        for bad in ["", "Law", "a b", "a\nb"] {
            let error =
                TenantPools::open(&directory.path().join("other"), range(18)).unwrap().pool_of(bad).unwrap_err();
            assert!(!error.to_string().contains('\n'), "{error}");
        }
    }

    #[test]
    fn a_range_that_makes_no_sense_is_refused() {
        let good = range(20);
        assert_eq!(good.tenants().unwrap(), 16);
        for bad in [
            SiteRange { tenant_prefix_len: 12, ..good },
            SiteRange { tenant_prefix_len: 30, ..good },
            SiteRange { ipv4: Ipv4Addr::new(10, 64, 1, 0), ..good },
            SiteRange { ipv4: Ipv4Addr::new(127, 0, 0, 0), ..good },
            SiteRange { ipv6: Ipv6Addr::new(0xfd51, 0, 0, 1, 0, 0, 0, 0), ..good },
            SiteRange { ipv4: Ipv4Addr::new(10, 0, 0, 0), prefix_len: 8, tenant_prefix_len: 28, ..good },
        ] {
            assert!(bad.tenants().is_err(), "{bad:?}");
        }
    }

    proptest! {
        // Each step is written to the disk.
        #![proptest_config(ProptestConfig::with_cases(8))]

        /// Whoever comes and goes: no two share an address, and who stays keeps its own.
        #[test]
        fn no_address_is_two_tenants(steps in vec((0_u8..24, any::<bool>()), 0..60)) {
            let directory = tempfile::tempdir().unwrap();
            let mut pools = TenantPools::open(&directory.path().join("tenants"), range(20)).unwrap();
            let mut model = BTreeMap::new();
            for (number, comes) in steps {
                let tenant = format!("t-{number}");
                if !comes {
                    pools.forget(&tenant).unwrap();
                    model.remove(&tenant);
                    continue;
                }
                match pools.pool_of(&tenant) {
                    Ok(subnets) => {
                        let apart = model.iter().all(|(other, theirs): (&String, &(Subnet, Subnet6))| {
                            *other == tenant || (theirs.0 != subnets.0 && theirs.1 != subnets.1)
                        });
                        prop_assert!(apart);
                        prop_assert!(model.insert(tenant, subnets).is_none_or(|before| before == subnets));
                    }
                    Err(Error::TenantsExhausted { .. }) => prop_assert_eq!(model.len(), 16),
                    Err(other) => return Err(TestCaseError::fail(other.to_string())),
                }
            }
        }
    }
}
