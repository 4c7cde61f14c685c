//! What can be wrong with a qcow2 file.

/// Why a disk's file is refused: what is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// It has another format.
    #[error("it does not begin as a qcow2 file does")]
    Magic,
    /// The file is too short for what is in its header.
    #[error("it ends before byte {needed}, inside {part}")]
    Truncated {
        /// What it ends in.
        part: &'static str,
        /// How many bytes there have to be.
        needed: u64,
    },
    /// A field of the header cannot be right.
    #[error("{field} (byte {at} of the header) is {value}, but {rule}")]
    Field {
        /// Its name in the format's description.
        field: &'static str,
        /// Where it is.
        at: u32,
        /// What it holds.
        value: u64,
        /// What it breaks.
        rule: &'static str,
    },
    /// A table holds a pointer that cannot be right.
    #[error("entry {index} of {table} is {value:#018x}, but {rule}")]
    Pointer {
        /// Which table, and where it is in the file.
        table: String,
        /// Which entry of it, counted from zero.
        index: u64,
        /// What it holds.
        value: u64,
        /// What it breaks.
        rule: &'static str,
    },
    /// It uses a part of the format that is not supported.
    #[error("it has {what} ({place}), which {consequence}")]
    Feature {
        /// Which part.
        what: String,
        /// Where that is said.
        place: &'static str,
        /// What comes of it.
        consequence: &'static str,
    },
    /// Its backing file is not to be opened.
    #[error("its backing file `{}` {why}", name.escape_debug())]
    Backing {
        /// The name, as the file has it.
        name: String,
        /// Why not.
        why: String,
    },
    /// A compressed cluster cannot be unpacked.
    #[error("the compressed cluster at byte {at:#x} of the file cannot be unpacked")]
    Compressed {
        /// Where it begins.
        at: u64,
    },
    /// A table of references to clusters contradicts the rest.
    #[error("cluster {cluster} (byte {at:#x} of the file) has {found} references, but its count is {count}")]
    References {
        /// Which cluster of the file.
        cluster: u64,
        /// Where it begins.
        at: u64,
        /// How often it is used.
        found: u64,
        /// How often the file says that it is.
        count: u64,
    },
    /// What is asked for is not inside of the disk.
    #[error("bytes {from} to {to} were asked for, but it has {size}")]
    Outside {
        /// First byte.
        from: u64,
        /// First byte behind.
        to: u64,
        /// Size of the disk in bytes.
        size: u64,
    },
    /// Its parts do not agree, so nothing is written to it.
    #[error("it contradicts itself in {errors} places, first: {first}")]
    Inconsistent {
        /// In how many.
        errors: u64,
        /// The first that was found.
        first: String,
    },
    /// It cannot grow, shrink or take more.
    #[error("{0}")]
    Limit(String),
}

impl Fault {
    pub(super) fn pointer(table: impl Into<String>, index: u64, value: u64, rule: &'static str) -> Self {
        Self::Pointer { table: table.into(), index, value, rule }
    }
}
