//! Tables of 64-bit entries inside a qcow2 file: the clusters that hold them,
//! a few kept in memory.

use std::{fs::File, io, os::unix::fs::FileExt};

use super::read_padded;

/// How much memory a file's tables may take, in bytes; never less than this
/// many clusters.
const MEMORY: usize = 1 << 20;
const LEAST: usize = 4;

/// The clusters of tables used last, most recent at the end.
#[derive(Debug)]
pub(super) struct Tables {
    cluster: usize,
    kept: Vec<(u64, Vec<u8>)>,
}

impl Tables {
    pub(super) fn new(cluster: u64) -> Self {
        Self { cluster: usize::try_from(cluster).unwrap_or(usize::MAX), kept: Vec::new() }
    }

    /// Entry `index` of the table that begins at byte `table` of the file.
    pub(super) fn get(&mut self, file: &File, table: u64, index: u64) -> io::Result<u64> {
        let (at, within) = self.place(table, index);
        let found = self.cluster_at(file, at)?.get(within..within + 8);
        Ok(found.unwrap_or_default().iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    }

    /// The cluster that begins at byte `at`.
    pub(super) fn cluster_at(&mut self, file: &File, at: u64) -> io::Result<&[u8]> {
        if let Some(found) = self.kept.iter().position(|(offset, _)| *offset == at) {
            let entry = self.kept.remove(found);
            self.kept.push(entry);
        } else {
            let most = (MEMORY / self.cluster).max(LEAST);
            let mut bytes = if self.kept.len() >= most { self.kept.remove(0).1 } else { vec![0; self.cluster] };
            read_padded(file, &mut bytes, at)?;
            self.kept.push((at, bytes));
        }
        Ok(self.kept.last().map_or(&[], |(_, bytes)| bytes))
    }

    /// Writes bytes that are inside of one cluster, to the file and to what is kept of it.
    pub(super) fn put(&mut self, file: &File, at: u64, bytes: &[u8]) -> io::Result<()> {
        let cluster = self.cluster as u64;
        let (begin, within) = (at / cluster * cluster, usize::try_from(at % cluster).unwrap_or(usize::MAX));
        // Nothing is kept that the file may not have.
        let kept = self.kept.iter().position(|(offset, _)| *offset == begin).map(|found| self.kept.remove(found));
        file.write_all_at(bytes, at)?;
        if let Some((offset, mut whole)) = kept
            && let Some(part) = whole.get_mut(within..within.saturating_add(bytes.len()))
        {
            part.copy_from_slice(bytes);
            self.kept.push((offset, whole));
        }
        Ok(())
    }

    /// Which cluster an entry is in, and where there. Tables begin with a cluster.
    fn place(&self, table: u64, index: u64) -> (u64, usize) {
        let (cluster, byte) = (self.cluster as u64, index * 8);
        (table + byte / cluster * cluster, usize::try_from(byte % cluster).unwrap_or(usize::MAX))
    }
}
