//! What a node tells of its host's memory.

use qvd_core::{Bytes, DesktopId};
use qvd_virt::memory::MergeCost;
use serde::{Deserialize, Serialize};

/// A host's memory, and what was decided about it. Sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// What desktops may have together.
    pub total: Bytes,
    /// What can be had of it without swapping.
    pub available: Bytes,
    /// Free swap.
    pub swap: Bytes,
    /// Hundredths of the last ten seconds in which something waited for memory.
    pub pressure_percent: u8,
    /// What merging of equal pages costs and wins.
    pub merging: Option<MergeCost>,
    /// Why equal pages are not merged here, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_merging: Option<String>,
    /// What machines are born from.
    #[serde(default)]
    pub stock: StockReport,
    /// Each desktop that runs.
    pub desktops: Vec<DesktopMemory>,
}

/// Templates of machines, and clones of them that stand ready for nobody yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StockReport {
    /// How many templates there are.
    pub templates: u32,
    /// What they have of the host's memory, whatever their clones do.
    pub templates_memory: Bytes,
    /// How many clones stand ready.
    pub ready: u32,
    /// What these have of the host's memory for themselves.
    pub ready_memory: Bytes,
}

/// A desktop's part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DesktopMemory {
    /// Which one.
    pub id: DesktopId,
    /// `idle`, `working` or `attended`.
    pub activity: String,
    /// What it is owed.
    pub minimum: Bytes,
    /// What it may have at most.
    pub maximum: Bytes,
    /// What it has of the host's memory.
    pub resident: Bytes,
    /// What it works with.
    pub used: Bytes,
    /// What its balloon leaves it; `None` where it has none, or stands still.
    pub balloon: Option<Bytes>,
    /// What the balloon was told to leave it.
    pub target: Option<Bytes>,
    /// What was asked back from it in the last round because it is idle.
    pub reclaimed: Bytes,
    /// What merging saves of it less what that takes, in bytes.
    pub merge_profit_bytes: Option<i64>,
}
