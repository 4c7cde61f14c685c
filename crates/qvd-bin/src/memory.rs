//! The command line's words for memory, and what is told of it.

use clap::Args;
use qvd_core::Bytes;
use qvd_gateway::api::Client;
use qvd_node::{DesktopMemory, MemoryConfig, MemoryReport, StockReport};

use crate::{
    failure::{Exit, Refusal},
    output::Output,
};

/// How the host's memory is shared out.
#[derive(Debug, Args)]
#[command(next_help_heading = "Memory")]
pub(crate) struct Memory {
    /// Most memory that desktops may have together; all of the host's, unless given
    #[arg(long = "memory", value_name = "SIZE")]
    total: Option<Bytes>,
    /// Most that all desktops may be promised together, in hundredths of the memory; no limit, unless given
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..))]
    memory_promise: Option<u32>,
    /// Never merge equal pages of desktops; otherwise they are when memory is short, if nobody else on this host has started that
    #[arg(long)]
    no_merging: bool,
}

impl Memory {
    /// Refuses what no desktop could start with.
    pub(crate) fn check(&self) -> Result<(), Refusal> {
        let least = MemoryConfig::default().container_minimum;
        match self.total.filter(|&total| total < least) {
            Some(total) => {
                let text = format!("cannot share out {total} of memory: one desktop alone takes at least {least}");
                Err(Refusal::new(Exit::Usage, text))
            }
            None => Ok(()),
        }
    }

    /// What it comes to.
    pub(crate) fn config(&self) -> MemoryConfig {
        let mut config = MemoryConfig::default();
        (config.total, config.promise_percent, config.merge) = (self.total, self.memory_promise, !self.no_merging);
        config
    }
}

/// Prints what the daemon tells.
pub(crate) async fn show(client: &Client, output: &Output) -> anyhow::Result<()> {
    let report = client.memory().await?;
    if output.is_json() {
        return output.result(&report, |_| String::new());
    }
    output.line(&host(&report))?;
    let header = ["ID", "IS", "HAS", "USES", "OWED", "MOST", "BALLOON", "TARGET", "PAGED OUT", "MERGING"];
    output.table(&report.desktops, header, |desktop| {
        let DesktopMemory { minimum, maximum, resident, used, balloon, target, reclaimed, .. } = desktop;
        let some = |size: &Option<Bytes>| size.map_or_else(|| "-".to_owned(), mib);
        [
            desktop.id.to_string(),
            desktop.activity.clone(),
            mib(*resident),
            mib(*used),
            mib(*minimum),
            mib(*maximum),
            some(balloon),
            some(target),
            mib(*reclaimed),
            desktop.merge_profit_bytes.map_or_else(|| "-".to_owned(), signed_mib),
        ]
    })
}

fn host(report: &MemoryReport) -> String {
    let MemoryReport { total, available, swap, pressure_percent, merging, not_merging, .. } = report;
    let mut lines = vec![
        format!("memory     {} of {} free, {} of swap", mib(*available), mib(*total), mib(*swap)),
        format!("pressure   something waited in {pressure_percent} % of the last ten seconds"),
    ];
    lines.push(match (merging, not_merging) {
        (_, Some(why)) => format!("merging    no: {why}"),
        (Some(cost), None) => {
            let profit = cost.profit_bytes.map_or_else(|| "not known".to_owned(), signed_mib);
            let time =
                cost.cpu_ms.map_or_else(|| "not known".to_owned(), |ms| format!("{}.{:03} s", ms / 1000, ms % 1000));
            let pace = format!("{} pages each {} ms", cost.pages_to_scan, cost.sleep_ms);
            let runs = if cost.running { pace } else { "not needed now".to_owned() };
            format!(
                "merging    {runs}; saves {}, profit {profit}, processor time {time}",
                mib(Bytes::new(cost.saved_bytes))
            )
        }
        (None, None) => "merging    not known".to_owned(),
    });
    if report.stock.templates > 0 {
        let StockReport { templates, templates_memory, ready, ready_memory } = report.stock;
        let (all, stand) = (mib(templates_memory), mib(ready_memory));
        lines.push(format!("templates  {templates} with {all}; {ready} clones stand ready with {stand}"));
    }
    lines.join("\n")
}

fn mib(size: Bytes) -> String {
    format!("{} MiB", size.get() >> 20)
}

fn signed_mib(bytes: i64) -> String {
    format!("{} MiB", bytes / (1 << 20))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_host_tells_what_it_has_and_why_it_does_not_merge() {
        let mut report: MemoryReport = serde_json::from_value(serde_json::json!({
            "total": 4_294_967_296_u64, "available": 1_073_741_824, "swap": 0, "pressure_percent": 3, "desktops": [],
            "merging": {
                "running": true, "pages_to_scan": 444, "sleep_ms": 20, "full_scans": 2, "saved_bytes": 104_857_600,
                "profit_bytes": -2_097_152, "cpu_ms": 1234,
            },
        }))
        .unwrap();
        let text = host(&report);
        for part in
            ["1024 MiB of 4096 MiB free", "in 3 %", "444 pages each 20 ms", "saves 100 MiB, profit -2 MiB", "1.234 s"]
        {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert!(!text.contains("templates"), "{text}");
        report.stock =
            StockReport { templates: 1, templates_memory: Bytes::mib(120), ready: 2, ready_memory: Bytes::mib(60) };
        assert!(host(&report).contains("templates  1 with 120 MiB; 2 clones stand ready with 60 MiB"));
        report.not_merging = Some("it is switched off".to_owned());
        assert!(host(&report).contains("merging    no: it is switched off"));
    }
}
