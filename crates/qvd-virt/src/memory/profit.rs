//! What merging of equal pages wins for whom.

use std::{fs, io};

/// What merging of equal pages costs and wins for one process, or several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MergeProfit {
    /// Pages that are shared.
    pub merged_pages: u64,
    /// Pages that the kernel keeps a note of.
    pub noted_pages: u64,
    /// What was saved less what the notes take, in bytes.
    pub profit_bytes: i64,
}

impl MergeProfit {
    /// That of a process. Source: Linux `Documentation/admin-guide/mm/ksm.rst`.
    pub(crate) fn of_process(pid: u32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/ksm_stat"))?;
        let value = |name: &str| {
            let words = text.lines().map(|line| line.split([' ', ':']).filter(|word| !word.is_empty()));
            words.filter_map(|mut words| (words.next()? == name).then(|| words.next()?.parse::<i64>().ok())?).next()
        };
        let count = |name| value(name).and_then(|number| u64::try_from(number).ok()).unwrap_or(0);
        Ok(Self {
            merged_pages: count("ksm_merging_pages"),
            noted_pages: count("ksm_rmap_items"),
            profit_bytes: value("ksm_process_profit").unwrap_or(0),
        })
    }

    /// This and that.
    pub(crate) const fn and(self, other: Self) -> Self {
        Self {
            merged_pages: self.merged_pages.saturating_add(other.merged_pages),
            noted_pages: self.noted_pages.saturating_add(other.noted_pages),
            profit_bytes: self.profit_bytes.saturating_add(other.profit_bytes),
        }
    }
}
