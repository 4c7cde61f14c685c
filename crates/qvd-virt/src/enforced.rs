//! What is enforced on a container, as the kernel tells it.

use std::{collections::BTreeMap, fs, io};

use caps::{CapSet, Capability, CapsHashSet};

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
    pub(crate) fn read(pid: u32, cgroup: &Cgroup) -> Result<Self, Error> {
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
