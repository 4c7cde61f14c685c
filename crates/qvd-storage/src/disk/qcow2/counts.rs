//! How often each cluster of a qcow2 file is used: the counts that the file
//! keeps of it, and clusters taken and given back by them.
//!
//! A count is raised before something points to its cluster, and lowered after
//! nothing does: whoever dies between leaves a cluster that is lost until the
//! next check, and never one that is used twice.

use rustix::fs::FallocateFlags;

use super::{Fault, Image, header::REFTABLE_BYTES_MAX};
use crate::Error;

impl Image {
    /// How many counts a block of them holds.
    const fn counts_in_block(&self) -> u64 {
        (self.header.cluster() * 8) >> self.header.refcount_order
    }

    /// How many clusters the file has, the last one perhaps not whole.
    pub(super) const fn clusters(&self) -> u64 {
        self.length.div_ceil(self.header.cluster())
    }

    /// How many blocks of counts the table of them has room for.
    pub(super) const fn count_blocks(&self) -> u64 {
        (self.header.reftable_clusters as u64) << (self.header.cluster_bits - 3)
    }

    /// Where a block of counts is, if there is one.
    pub(super) fn count_block(&mut self, index: u64) -> Result<Option<u64>, Error> {
        if index >= self.count_blocks() {
            return Ok(None);
        }
        let entry = self.tables.get(&self.file, self.header.reftable_offset, index);
        let entry = entry.map_err(Error::io("read disk", &self.path))?;
        if entry == 0 {
            return Ok(None);
        }
        match self.pointer_rule(entry) {
            None => Ok(Some(entry)),
            Some(rule) => {
                let table = format!("the table of reference counts at byte {:#x}", self.header.reftable_offset);
                Err(self.refuse(Fault::pointer(table, index, entry, rule)))
            }
        }
    }

    /// How often the file says that a cluster is used.
    pub(super) fn count(&mut self, cluster: u64) -> Result<u64, Error> {
        let per = self.counts_in_block();
        let Some(block) = self.count_block(cluster / per)? else { return Ok(0) };
        let order = self.header.refcount_order;
        let bytes = self.tables.cluster_at(&self.file, block).map_err(Error::io("read disk", &self.path))?;
        Ok(unpack(bytes, order, cluster % per))
    }

    /// Says of clusters that they are used so often, making room for the counts.
    pub(super) fn set_counts(&mut self, first: u64, number: u64, value: u64) -> Result<(), Error> {
        let (per, order) = (self.counts_in_block(), self.header.refcount_order);
        if order < 6 && value >> (1 << order) != 0 {
            return Err(self.refuse(Fault::Limit(format!("it cannot count to {value}"))));
        }
        let (mut at, end) = (first, first + number);
        while at < end {
            let Some(block) = self.count_block(at / per)? else {
                self.add_count_block(at / per)?;
                continue;
            };
            let (within, run) = (at % per, (per - at % per).min(end - at));
            let from = (within << order) / 8;
            let to = ((within + run) << order).div_ceil(8);
            let whole = self.tables.cluster_at(&self.file, block).map_err(Error::io("read disk", &self.path))?;
            let range = usize::try_from(from).unwrap_or(usize::MAX)..usize::try_from(to).unwrap_or(usize::MAX);
            let mut bytes = whole.get(range).unwrap_or_default().to_vec();
            let skipped = within - ((from * 8) >> order);
            (skipped..skipped + run).for_each(|index| pack(&mut bytes, order, index, value));
            self.put(block + from, &bytes)?;
            at += run;
        }
        if value == 0 {
            self.free_from = self.free_from.min(first).max(1);
        }
        Ok(())
    }

    /// Takes up to `most` clusters that follow each other: counted, though
    /// nothing points to them yet. Returns the first and how many.
    pub(super) fn take(&mut self, most: u64) -> Result<(u64, u64), Error> {
        let end = self.clusters();
        let mut at = self.free_from;
        while at < end {
            let mut run = 0;
            while run < most && at + run < end && self.count(at + run)? == 0 {
                run += 1;
            }
            if run > 0 {
                self.free_from = at + run;
                self.set_counts(at, run, 1)?;
                self.extend(at + run)?;
                return Ok((at, run));
            }
            at += 1;
        }
        self.free_from = end;
        Ok((self.take_at_end(most)?, most))
    }

    /// Takes so many clusters that follow each other, behind all others.
    pub(super) fn take_at_end(&mut self, number: u64) -> Result<u64, Error> {
        let per = self.counts_in_block();
        loop {
            let start = self.end(number)?;
            let mut missing = None;
            for block in start / per..=(start + number - 1) / per {
                if missing.is_none() && self.count_block(block)?.is_none() {
                    missing = Some(block);
                }
            }
            let Some(block) = missing else {
                self.extend(start + number)?;
                self.set_counts(start, number, 1)?;
                return Ok(start);
            };
            self.add_count_block(block)?;
        }
    }

    /// The first cluster behind the file that begins so many which are not counted.
    fn end(&mut self, number: u64) -> Result<u64, Error> {
        let mut start = self.clusters();
        let last = start.saturating_add(self.counts_in_block());
        let mut at = start;
        while at < start + number {
            if self.count(at)? != 0 {
                start = at + 1;
            }
            if start > last {
                let fault = Fault::References {
                    cluster: at,
                    at: at.saturating_mul(self.header.cluster()),
                    found: 0,
                    count: self.count(at)?,
                };
                return Err(self.refuse(fault));
            }
            at += 1;
        }
        Ok(start)
    }

    /// Makes the file at least so many clusters long.
    fn extend(&mut self, clusters: u64) -> Result<(), Error> {
        let length = clusters.saturating_mul(self.header.cluster());
        if length > self.length {
            self.file.set_len(length).map_err(Error::io("write disk", &self.path))?;
            self.length = length;
        }
        Ok(())
    }

    /// Makes the block of counts `index`, which is not there.
    fn add_count_block(&mut self, index: u64) -> Result<(), Error> {
        let per = self.counts_in_block();
        loop {
            let at = self.end(1)?;
            let own = at / per;
            if own.max(index) >= self.count_blocks() {
                self.grow_count_table(own.max(index))?;
                continue;
            }
            // The table may have brought it when it grew.
            if self.count_block(index)?.is_some() {
                return Ok(());
            }
            // The block counts itself, or another does, which then has to be there first.
            if own != index && self.count_block(own)?.is_none() {
                self.add_count_block(own)?;
                continue;
            }
            let mut block = vec![0; usize::try_from(self.header.cluster()).unwrap_or(0)];
            if own == index {
                pack(&mut block, self.header.refcount_order, at % per, 1);
            }
            self.extend(at + 1)?;
            self.put(at * self.header.cluster(), &block)?;
            if own != index {
                self.set_counts(at, 1, 1)?;
            }
            self.sync()?;
            let entry = at * self.header.cluster();
            return self.put(self.header.reftable_offset + index * 8, &entry.to_be_bytes());
        }
    }

    /// Moves the table of blocks to where it has room for block `needed`.
    fn grow_count_table(&mut self, needed: u64) -> Result<(), Error> {
        let (cluster, per) = (self.header.cluster(), self.counts_in_block());
        let (old, old_clusters) = (self.header.reftable_offset, u64::from(self.header.reftable_clusters));
        let mut clusters = (old_clusters * 2).max(((needed + 1) * 8).div_ceil(cluster));
        if old_clusters * cluster < REFTABLE_BYTES_MAX {
            clusters = clusters.min((REFTABLE_BYTES_MAX / cluster).max(1));
        }
        if clusters * cluster > REFTABLE_BYTES_MAX || needed >= clusters * cluster / 8 {
            return Err(self.refuse(Fault::Limit("it cannot count more clusters".to_owned())));
        }
        let start = self.end(clusters + clusters / per * 2 + 4)?;
        // It and the blocks that count it, which are counted as well.
        let mut added = Vec::new();
        loop {
            let mut missing = Vec::new();
            for block in start / per..=(start + clusters + added.len() as u64 - 1) / per {
                if self.count_block(block)?.is_none() {
                    missing.push(block);
                }
            }
            let enough = missing.len() <= added.len();
            added = missing;
            if enough {
                break;
            }
        }
        let all = clusters + added.len() as u64;
        let mut table = Vec::with_capacity(usize::try_from(clusters * cluster).unwrap_or(0));
        for at in (old..old + old_clusters * cluster).step_by(usize::try_from(cluster).unwrap_or(1)) {
            let part = self.tables.cluster_at(&self.file, at).map_err(Error::io("read disk", &self.path))?;
            table.extend_from_slice(part);
        }
        table.resize(usize::try_from(clusters * cluster).unwrap_or(0), 0);
        self.extend(start + all)?;
        let empty = vec![0; usize::try_from(cluster).unwrap_or(0)];
        for (block, place) in added.iter().zip(start + clusters..) {
            self.put(place * cluster, &empty)?;
            let at = usize::try_from(block * 8).unwrap_or(usize::MAX);
            if let Some(entry) = table.get_mut(at..at.saturating_add(8)) {
                entry.copy_from_slice(&(place * cluster).to_be_bytes());
            }
        }
        self.put_clusters(start * cluster, &table)?;
        self.header.reftable_offset = start * cluster;
        self.header.reftable_clusters = u32::try_from(clusters).unwrap_or(u32::MAX);
        self.set_counts(start, all, 1)?;
        self.sync()?;
        let mut place = (start * cluster).to_be_bytes().to_vec();
        place.extend(self.header.reftable_clusters.to_be_bytes());
        self.put(48, &place)?;
        self.sync()?;
        self.set_counts(old / cluster, old_clusters, 0)
    }

    /// Gives clusters back that are used once less now, in the order of their
    /// numbers; the space of those that nothing uses any more goes back to the file system.
    pub(super) fn release(&mut self, clusters: &[u64]) -> Result<(), Error> {
        let mut holes = Holes::default();
        for cluster in clusters {
            let left = self.count(*cluster)?.saturating_sub(1);
            self.set_counts(*cluster, 1, left)?;
            if left == 0 {
                holes.add(self, *cluster);
            }
        }
        holes.end(self);
        Ok(())
    }

    /// Gives the space of clusters back where the file system can; they stay in the file.
    fn punch(&self, first: u64, number: u64) {
        let cluster = self.header.cluster();
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if let Err(error) = rustix::fs::fallocate(&self.file, flags, first * cluster, number * cluster) {
            tracing::debug!(path = %self.path.display(), %error, "no holes in this file");
        }
    }

    /// Cuts off what is free at the file's end.
    pub(super) fn trim(&mut self) -> Result<(), Error> {
        let mut end = self.clusters();
        while end > 1 && self.count(end - 1)? == 0 {
            end -= 1;
        }
        let length = (end * self.header.cluster()).min(self.length);
        self.file.set_len(length).map_err(Error::io("write disk", &self.path))?;
        (self.length, self.free_from) = (length, self.free_from.min(end));
        Ok(())
    }

    /// Writes bytes inside of one cluster, such as entries of a table.
    pub(super) fn put(&mut self, at: u64, bytes: &[u8]) -> Result<(), Error> {
        self.tables.put(&self.file, at, bytes).map_err(Error::io("write disk", &self.path))
    }

    /// Writes whole clusters of a table.
    pub(super) fn put_clusters(&mut self, at: u64, bytes: &[u8]) -> Result<(), Error> {
        let cluster = self.header.cluster();
        let parts = bytes.chunks(usize::try_from(cluster).unwrap_or(usize::MAX));
        parts.zip((0..).map(|number| at + number * cluster)).try_for_each(|(part, at)| self.put(at, part))
    }

    /// Waits until what was written survives a crash of the host.
    pub(super) fn sync(&self) -> Result<(), Error> {
        self.file.sync_data().map_err(Error::io("write disk", &self.path))
    }
}

/// Clusters that follow each other and whose space is not needed: a file
/// system gives back only what makes whole blocks of its own.
#[derive(Debug, Default)]
pub(super) struct Holes(Option<(u64, u64)>);

impl Holes {
    pub(super) fn add(&mut self, image: &Image, cluster: u64) {
        self.0 = match self.0 {
            Some((first, number)) if first + number == cluster => Some((first, number + 1)),
            _ => {
                self.end(image);
                Some((cluster, 1))
            }
        };
    }

    pub(super) fn end(&mut self, image: &Image) {
        if let Some((first, number)) = self.0.take() {
            image.punch(first, number);
        }
    }
}

/// Count `index` of a block; less than a byte wide, the first is in the lowest bits.
fn unpack(block: &[u8], order: u32, index: u64) -> u64 {
    let at = usize::try_from((index << order) / 8).unwrap_or(usize::MAX);
    if order < 3 {
        let byte = block.get(at).copied().unwrap_or_default();
        return u64::from(byte >> ((index << order) % 8)) & ((1 << (1 << order)) - 1);
    }
    let bytes = block.get(at..at.saturating_add(1 << (order - 3))).unwrap_or_default();
    bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

fn pack(block: &mut [u8], order: u32, index: u64, value: u64) {
    let at = usize::try_from((index << order) / 8).unwrap_or(usize::MAX);
    if order < 3 {
        let (shift, mask) = ((index << order) % 8, (1_u8 << (1 << order)) - 1);
        if let Some(byte) = block.get_mut(at) {
            *byte = *byte & !(mask << shift) | (value.to_le_bytes()[0] & mask) << shift;
        }
        return;
    }
    let width = 1 << (order - 3);
    if let Some(bytes) = block.get_mut(at..at.saturating_add(width)) {
        bytes.copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_are_kept_apart() {
        for order in 0..=6 {
            let mut block = [0; 64];
            let most = if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 };
            for index in 0..(64 * 8) >> order {
                pack(&mut block, order, index, if index % 3 == 0 { most } else { 0 });
            }
            for index in 0..(64 * 8) >> order {
                assert_eq!(unpack(&block, order, index), if index % 3 == 0 { most } else { 0 }, "{order} {index}");
            }
        }
        // As QEMU has it: the first count is in the lowest bits of a byte, the highest byte comes first.
        let mut block = [0; 8];
        pack(&mut block, 1, 1, 2);
        pack(&mut block, 4, 1, 0x0102);
        assert_eq!(block, [8, 0, 1, 2, 0, 0, 0, 0]);
    }
}
