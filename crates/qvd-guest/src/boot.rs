//! What a guest is told when it boots, and when it becomes another.

use std::{
    fs::File,
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::InitConfig;

/// Serial number of the disk that holds a base.
pub const BASE_SERIAL: &str = "qvd-base";
/// Serial number of the disk that holds what a persistent desktop wrote.
pub const ROOT_SERIAL: &str = "qvd-root";
/// Serial number of the disk that holds a home.
pub const HOME_SERIAL: &str = "qvd-home";

/// All that a guest needs to become a desktop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// Who it is.
    pub identity: Identity,
    /// Where its base is.
    pub base: Base,
    /// Where what it writes goes.
    pub writable: Writable,
    /// Directory of the user's files; they are on the disk
    /// [`HOME_SERIAL`]. `None`: the machine has no such disk.
    pub home: Option<String>,
    /// What its init does.
    pub init: InitConfig,
}

/// Where a guest reads its system from: a file system of the kind `erofs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Base {
    /// The first persistent memory, without a page cache of the guest's own.
    /// A kernel that cannot do that does not boot: a silent cache in every
    /// guest would cost what was to be saved.
    Memory,
    /// The disk [`BASE_SERIAL`].
    Disk,
}

/// Where a guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Writable {
    /// Its memory, at most so many bytes of it.
    Memory {
        /// How many.
        bytes: u64,
    },
    /// The disk [`ROOT_SERIAL`], a file system of the kind `ext4`.
    Disk,
}

/// What no two guests have in common.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Its name.
    pub hostname: String,
    /// What `/etc/machine-id` holds, 32 hexadecimal digits.
    pub machine_id: String,
    /// What its clock is set to, in nanoseconds since 1970.
    pub time_ns: u64,
    /// Fresh randomness, mixed into the kernel's; hexadecimal.
    pub seed: String,
    /// Its place in the network.
    pub network: Option<Network>,
}

impl Identity {
    /// A new one: everything but the name and the place is from the kernel's
    /// randomness or its clock.
    ///
    /// # Errors
    /// The kernel gives no randomness.
    pub fn fresh(hostname: impl Into<String>, network: Option<Network>) -> io::Result<Self> {
        let mut bytes = [0; 48];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let (machine_id, seed) = digits.split_at(32);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        Ok(Self { hostname: hostname.into(), machine_id: machine_id.into(), time_ns, seed: seed.into(), network })
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The seed is a secret.
        let Self { hostname, machine_id, time_ns, network, .. } = self;
        f.debug_struct("Identity")
            .field("hostname", hostname)
            .field("machine_id", machine_id)
            .field("time_ns", time_ns)
            .field("network", network)
            .finish_non_exhaustive()
    }
}

/// A guest's place in the network, on its first interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Its address.
    pub address: Ipv4Addr,
    /// Bits of the address that are the network's.
    pub prefix: u8,
    /// Who forwards to other networks.
    pub gateway: Option<Ipv4Addr>,
    /// Its place in that of IPv6, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Network6>,
    /// Whom it asks for names, the first first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub name_servers: Vec<IpAddr>,
}

/// A guest's place in the network of IPv6: on its link it sees nobody but the router.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network6 {
    /// Its address.
    pub address: Ipv6Addr,
    /// The host.
    pub router: Ipv6Addr,
    /// Whether the host forwards to other networks.
    pub way_out: bool,
}

/// What a guest says once its init is about to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Booted {
    /// Since the kernel began, in milliseconds.
    pub uptime_ms: u64,
    /// Whether the base is read without a page cache of the guest's own.
    pub direct: bool,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn two_identities_have_nothing_in_common_and_show_no_secret() {
        let (one, other) = (Identity::fresh("a", None).unwrap(), Identity::fresh("a", None).unwrap());
        assert_ne!(one.machine_id, other.machine_id);
        assert_ne!(one.seed, other.seed);
        assert_eq!((one.machine_id.len(), one.seed.len()), (32, 64));
        assert!(!format!("{one:?}").contains(&one.seed));
    }
}
