//! How busy the processors are, to see that an attack was one.

use std::{fs, time::Instant};

use crate::Outcome;

/// A span of time that is watched.
#[derive(Debug)]
pub(crate) struct Load {
    since: Instant,
    busy_ticks: u64,
}

impl Load {
    pub(crate) fn begin() -> Outcome<Self> {
        Ok(Self { since: Instant::now(), busy_ticks: busy_ticks()? })
    }

    /// Processors at work since then, on average.
    pub(crate) fn busy_cores(&self) -> Outcome<f64> {
        let ticks = busy_ticks()?.saturating_sub(self.busy_ticks) as f64;
        Ok(ticks / rustix::param::clock_ticks_per_second() as f64 / self.since.elapsed().as_secs_f64())
    }
}

/// Of all processors. Source: proc(5), `/proc/stat`: user, nice, system, idle,
/// iowait, irq, softirq.
fn busy_ticks() -> Outcome<u64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let first = stat.lines().next().ok_or("/proc/stat is empty")?;
    let ticks: Vec<u64> = first.split_whitespace().skip(1).map(str::parse).collect::<Result<_, _>>()?;
    Ok([0, 1, 2, 5, 6].into_iter().filter_map(|field| ticks.get(field)).sum())
}
