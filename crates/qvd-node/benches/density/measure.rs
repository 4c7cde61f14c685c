//! What the kernel says of memory and processor time.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use qvd_core::Instance;

use crate::Outcome;

/// The host's memory at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Host {
    available_bytes: u64,
    /// What the kernel itself takes and cannot give back on demand.
    pub(crate) kernel_bytes: u64,
}

impl Host {
    pub(crate) fn now() -> Outcome<Self> {
        let text = fs::read_to_string("/proc/meminfo")?;
        let bytes = |name: &str| field_kib(&text, name).unwrap_or(0) * 1024;
        let kernel = ["SUnreclaim:", "KernelStack:", "PageTables:", "Percpu:", "VmallocUsed:"];
        Ok(Self { available_bytes: bytes("MemAvailable:"), kernel_bytes: kernel.into_iter().map(bytes).sum() })
    }

    /// Bytes that are no longer available, compared with before.
    pub(crate) fn used_since(&self, before: &Self) -> f64 {
        before.available_bytes as f64 - self.available_bytes as f64
    }
}

/// A number of KiB in a file of lines `Name:  123 kB`.
fn field_kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// The processes of all desktops, by their control groups.
#[derive(Debug)]
pub(crate) struct Processes {
    /// The group above those of the desktops, in each hierarchy.
    tops: Vec<PathBuf>,
}

/// What they take.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) processes: usize,
    pub(crate) pss_bytes: u64,
    /// By program.
    pub(crate) programs: BTreeMap<String, u64>,
    pub(crate) swap_bytes: u64,
    /// As their groups are charged, page cache included.
    pub(crate) charged_bytes: u64,
    pub(crate) kernel_bytes: u64,
}

impl Processes {
    pub(crate) fn of(instance: Instance) -> Outcome<Self> {
        let base = Path::new("/sys/fs/cgroup");
        let mut hierarchies = vec![base.to_path_buf()];
        for entry in fs::read_dir(base)? {
            hierarchies.push(entry?.path());
        }
        let tops = hierarchies.into_iter().map(|path| path.join(instance.cgroup_name())).filter(|path| path.is_dir());
        Ok(Self { tops: tops.collect() })
    }

    /// Of those that live. Nobody who is idle ends others.
    pub(crate) fn cpu_time(&self) -> Outcome<Duration> {
        let times = self.pids()?.into_iter().filter_map(|pid| qvd_sys::process::cpu_time(pid).ok());
        Ok(times.sum())
    }

    fn pids(&self) -> Outcome<BTreeSet<u32>> {
        let mut pids = BTreeSet::new();
        self.tops.iter().try_for_each(|top| collect_pids(top, &mut pids))?;
        Ok(pids)
    }

    pub(crate) fn memory(&self) -> Outcome<Memory> {
        let pids = self.pids()?;
        let mut memory = Memory::default();
        for top in &self.tops {
            for entry in fs::read_dir(top)? {
                let group = entry?.path();
                let number = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
                let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
                let kernel = stat.lines().find_map(|line| line.strip_prefix("kernel ")?.parse().ok());
                memory.charged_bytes +=
                    number("memory.usage_in_bytes").or_else(|| number("memory.current")).unwrap_or(0);
                memory.kernel_bytes += number("memory.kmem.usage_in_bytes").or(kernel).unwrap_or(0);
            }
        }
        for pid in &pids {
            // One that has just ended takes nothing.
            let Ok(text) = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")) else { continue };
            let pss_bytes = field_kib(&text, "Pss:").unwrap_or(0) * 1024;
            memory.pss_bytes += pss_bytes;
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            *memory.programs.entry(name.trim().to_owned()).or_default() += pss_bytes;
            memory.swap_bytes += field_kib(&text, "SwapPss:").unwrap_or(0) * 1024;
        }
        memory.processes = pids.len();
        Ok(memory)
    }
}

fn collect_pids(group: &Path, pids: &mut BTreeSet<u32>) -> Outcome<()> {
    let procs = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    pids.extend(procs.lines().filter_map(|line| line.parse::<u32>().ok()));
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect_pids(&entry.path(), pids)?;
        }
    }
    Ok(())
}

/// The middle one; of none, none.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
