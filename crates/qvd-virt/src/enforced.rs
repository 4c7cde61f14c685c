//! What is enforced on a container, as the kernel tells it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
};

use caps::{CapSet, Capability, CapsHashSet};
use qvd_core::{DesktopId, Limits, UidRange};

use crate::{Error, cgroup::Cgroup, error::io_error};

/// Namespaces as `/proc/<pid>/ns` calls them.
const NAMESPACES: [&str; 7] = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];

/// What the kernel says of process 1 of a container.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Enforced {
    /// No program gains privileges when it is executed.
    pub no_new_privileges: bool,
    /// A system call filter is loaded.
    pub seccomp_filter: bool,
    /// It keeps to rules of Landlock. The kernel tells that to nobody: it said so to
    /// the container while that set itself up, and that they hold here was tried when
    /// the runtime was made.
    pub landlock: bool,
    /// Capabilities that can ever be had.
    pub bounding: CapsHashSet,
    /// Capabilities that it has now.
    pub effective: CapsHashSet,
    /// Capabilities that it would hand to a program without file capabilities.
    pub ambient: u64,
    /// Map of user ids, three numbers a line: inside, outside, how many.
    pub uid_map: Vec<[u32; 3]>,
    /// Map of group ids.
    pub gid_map: Vec<[u32; 3]>,
    /// Namespaces that are not ours.
    pub own_namespaces: Vec<&'static str>,
    /// Control files of its cgroup and what they hold.
    pub limits: BTreeMap<String, String>,
}

impl Enforced {
    pub(crate) fn read(pid: u32, cgroup: &Cgroup, landlock: bool) -> Result<Self, Error> {
        let op = || format!("read the confinement of process {pid}");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).map_err(io_error(op()))?;
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(str::trim)
                .ok_or_else(|| Error::Io { op: op(), source: io::ErrorKind::InvalidData.into() })
        };
        let set = |name| {
            u64::from_str_radix(field(name)?, 16)
                .map_err(|error| Error::Io { op: op(), source: io::Error::new(io::ErrorKind::InvalidData, error) })
        };
        let (bounding, ambient) = (set("CapBnd")?, set("CapAmb")?);
        let map = |file| -> Result<_, Error> {
            let text = fs::read_to_string(format!("/proc/{pid}/{file}")).map_err(io_error(op()))?;
            Ok(text.lines().filter_map(parse_map).collect())
        };
        let number = i32::try_from(pid).ok();
        let effective = caps::read(number, CapSet::Effective)
            .map_err(|error| Error::Io { op: op(), source: io::Error::other(error) })?;
        let mut own_namespaces = Vec::new();
        for name in NAMESPACES {
            let of = |who: String| fs::read_link(format!("/proc/{who}/ns/{name}")).map_err(io_error(op()));
            if of(pid.to_string())? != of("self".to_owned())? {
                own_namespaces.push(name);
            }
        }
        Ok(Self {
            no_new_privileges: field("NoNewPrivs")? == "1",
            // Source: proc(5): 2 is SECCOMP_MODE_FILTER.
            seccomp_filter: field("Seccomp")? == "2",
            landlock,
            bounding: caps::all().into_iter().filter(|c: &Capability| bounding & c.bitmask() != 0).collect(),
            effective,
            ambient,
            uid_map: map("uid_map")?,
            gid_map: map("gid_map")?,
            own_namespaces,
            limits: cgroup.limits()?.into_iter().collect(),
        })
    }
}

/// Something that keeps a container in, for a policy to require.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Protection {
    /// Each namespace is its own, and users inside are those of its range alone.
    Namespaces,
    /// No program gains privileges.
    NoNewPrivileges,
    /// There is a system call filter.
    SystemCallFilter,
    /// Nobody can ever have a capability that the profile does not name.
    Capabilities,
    /// Landlock forbids devices and mounts once more.
    Landlock,
    /// Memory is limited.
    MemoryLimit,
    /// Processor time is limited.
    CpuLimit,
    /// The number of processes is limited.
    PidsLimit,
    /// Reading from and writing to disks is limited.
    IoLimit,
}

impl Protection {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Namespaces,
        Self::NoNewPrivileges,
        Self::SystemCallFilter,
        Self::Capabilities,
        Self::Landlock,
        Self::MemoryLimit,
        Self::CpuLimit,
        Self::PidsLimit,
        Self::IoLimit,
    ];

    /// What it is called.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces of its own",
            Self::NoNewPrivileges => "no new privileges",
            Self::SystemCallFilter => "a system call filter",
            Self::Capabilities => "few capabilities",
            Self::Landlock => "Landlock",
            Self::MemoryLimit => "a limit of memory",
            Self::CpuLimit => "a limit of processor time",
            Self::PidsLimit => "a limit of processes",
            Self::IoLimit => "a limit of reading and writing",
        }
    }
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What has to be enforced before a program may run.
#[derive(Debug)]
pub(crate) struct Demand {
    pub(crate) require: BTreeSet<Protection>,
    /// Capabilities that may be had.
    pub(crate) kept: Vec<Capability>,
    pub(crate) limits: Limits,
}

impl Demand {
    /// Compares it with what the kernel says.
    pub(crate) fn check(&self, id: DesktopId, enforced: &Enforced) -> Result<(), Error> {
        let missing: Vec<_> = self.require.iter().filter(|one| !self.holds(**one, enforced)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let missing = missing.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        Err(Error::Weaker { id, missing })
    }

    fn holds(&self, protection: Protection, enforced: &Enforced) -> bool {
        let number = |files: &[&str]| {
            files.iter().find_map(|file| enforced.limits.get(*file)?.split(' ').next()?.parse::<u64>().ok())
        };
        let map = |map: &[[u32; 3]]| matches!(map, [[0, base, UidRange::LEN]] if *base >= UidRange::LEN);
        match protection {
            Protection::Namespaces => {
                enforced.own_namespaces == NAMESPACES && map(&enforced.uid_map) && map(&enforced.gid_map)
            }
            Protection::NoNewPrivileges => enforced.no_new_privileges,
            Protection::SystemCallFilter => enforced.seccomp_filter,
            Protection::Capabilities => {
                enforced.ambient == 0 && enforced.bounding.iter().all(|capability| self.kept.contains(capability))
            }
            Protection::Landlock => enforced.landlock,
            Protection::MemoryLimit => {
                number(&["memory.max", "memory.limit_in_bytes"]).is_some_and(|bytes| bytes <= self.limits.memory.get())
            }
            Protection::CpuLimit => number(&["cpu.max", "cpu.cfs_quota_us"]).is_some(),
            Protection::PidsLimit => number(&["pids.max"]).is_some_and(|most| most <= u64::from(self.limits.pids)),
            Protection::IoLimit => ["io.max", "blkio.throttle.write_bps_device"]
                .iter()
                .any(|file| enforced.limits.get(*file).is_some_and(|limits| !limits.is_empty())),
        }
    }
}

fn parse_map(line: &str) -> Option<[u32; 3]> {
    let mut numbers = line.split_ascii_whitespace().map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some([next()?, next()?, next()?])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::parse_map;

    #[test]
    fn a_map_of_the_kernel_is_read() {
        assert_eq!(parse_map("         0  268435456      65536"), Some([0, 268_435_456, 65_536]));
        assert_eq!(parse_map("0 0"), None);
    }
}
