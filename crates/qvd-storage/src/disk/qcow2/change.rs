//! What is done with whole disks: written to the one behind, put on another,
//! made larger or smaller. Killed at any point, each leaves a disk with the content it
//! had or the one it was to get, and done again it completes.

use std::{
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use super::{
    BackingName, BackingPolicy, Chain, Fault, Image, Mapping, Repair, Writer,
    chain::{Layer, read_layers},
    header::{Header, L1_BYTES_MAX, SIZE_MAX, l1_entries_for},
    read_padded,
    write::AT_ONCE,
};
use crate::{
    Error,
    disk::{DiskFormat, files, lock},
};

/// How a disk is put on another file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Rebase {
    /// What the new file shows otherwise than the old is copied first, so that
    /// the disk keeps its content.
    #[default]
    Safe,
    /// Only the name is changed: the two files have the same content, which
    /// nobody checks. The old one need not be there.
    Unchecked,
}

/// What may become of a disk's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Shrink {
    /// A disk gets larger, never smaller.
    #[default]
    Never,
    /// It may lose an end that is all zeros.
    Empty,
}

/// Writes what a disk has changed to the file behind it, and empties the disk,
/// which then shows the same.
///
/// Nobody else may stand on the file behind: it changes. Killed in
/// between, the disk still shows what it did, and the file behind has part of
/// it; done again, it completes.
///
/// # Errors
/// [`Error::DiskFileBusy`] while a virtual machine has one of both,
/// [`Error::DiskFile`] when nothing is behind it, or one of its files is damaged or not permitted.
pub fn commit(path: &Path, policy: &BackingPolicy) -> Result<(), Error> {
    let mut disk = Writer::open(path, policy)?;
    let chain = Chain::open(path, DiskFormat::Qcow2, policy)?;
    let Some((behind, format)) = chain.files().nth(1).map(|(path, format)| (path.to_path_buf(), format)) else {
        return Err(disk.image.refuse(Fault::Limit("it has no file behind it that it could be written to".to_owned())));
    };
    drop(chain);
    let mut to = Target::open(&behind, format, policy, disk.size())?;
    let (mut at, size) = (0, disk.size());
    let mut buffer = vec![0; AT_ONCE];
    while at < size {
        let (mapping, run) = disk.image.map(at)?;
        let done = match mapping {
            Mapping::Absent => run,
            Mapping::Zero => {
                to.discard(at, run)?;
                run
            }
            mapping => {
                let piece = usize::try_from(run).unwrap_or(AT_ONCE).min(AT_ONCE);
                let part = buffer.get_mut(..piece).unwrap_or_default();
                disk.image.read_mapped(mapping, part, at)?;
                to.write_at(part, at)?;
                piece as u64
            }
        };
        at += done;
    }
    to.finish()?;
    disk.clear()?;
    disk.finish()
}

/// Puts a disk on another file, or on none: then it has all of its content itself.
///
/// # Errors
/// [`Error::DiskFileBusy`] while a virtual machine has it, [`Error::DiskFile`] when
/// a file is damaged or not permitted, or the disk would be behind itself or too deep.
pub fn rebase(path: &Path, to: Option<(&Path, DiskFormat)>, how: Rebase, policy: &BackingPolicy) -> Result<(), Error> {
    let mut disk = Writer::of(path, (how == Rebase::Safe).then_some(policy))?;
    let changed = disk.put_on(to, how, policy);
    // Refused or done, it is in order.
    disk.finish().and(changed)
}

/// Makes a disk larger; the new part reads as zeros. Smaller, where `shrink`
/// allows it.
///
/// # Errors
/// [`Error::DiskFileBusy`] while a virtual machine has it, [`Error::DiskFile`] for a
/// size that is not a whole number of sectors or too large, for a smaller one that is
/// not allowed or would lose something, and when a file is damaged or not permitted.
pub fn resize(path: &Path, size: u64, shrink: Shrink, policy: &BackingPolicy) -> Result<(), Error> {
    let mut disk = Writer::open(path, policy)?;
    let changed = disk.set_size(size, shrink);
    // Refused or done, it is in order.
    disk.finish().and(changed)
}

impl Writer {
    fn put_on(&mut self, to: Option<(&Path, DiskFormat)>, how: Rebase, policy: &BackingPolicy) -> Result<(), Error> {
        let (name, mut new) = target(&self.image, to, policy)?;
        if how == Rebase::Safe {
            self.copy_what_differs(&mut new)?;
        }
        self.image.set_backing(name)?;
        self.behind = new;
        Ok(())
    }

    /// Copies what these files show otherwise than those that are behind the
    /// disk now, where it has nothing of its own.
    fn copy_what_differs(&mut self, new: &mut [Layer]) -> Result<(), Error> {
        let (size, cluster) = (self.size(), self.image.header.cluster());
        let (mut was, mut shows) = (vec![0; AT_ONCE], vec![0; AT_ONCE]);
        // What is behind the end of both is zero in both.
        let most = self.behind.first().map_or(0, Layer::size).max(new.first().map_or(0, Layer::size)).min(size);
        let mut at = 0;
        while at < most {
            let (mapping, run) = self.image.map(at)?;
            let run = run.min(most - at);
            if mapping != Mapping::Absent {
                at += run;
                continue;
            }
            // Up to a cluster's end, so that none is looked at in two parts.
            let piece = usize::try_from(run).unwrap_or(AT_ONCE).min(AT_ONCE);
            let (Some(was), Some(shows)) = (was.get_mut(..piece), shows.get_mut(..piece)) else { break };
            read_layers(&mut self.behind, was, at)?;
            read_layers(new, shows, at)?;
            let step = usize::try_from(cluster).unwrap_or(usize::MAX);
            let differs: Vec<bool> =
                was.chunks(step).zip(shows.chunks(step)).map(|(was, shows)| was != shows).collect();
            // Those that follow each other at once: each write waits for storage.
            let mut begin = 0;
            for run in differs.chunk_by(|one, other| one == other) {
                let (from, to) = (begin * step, ((begin + run.len()) * step).min(was.len()));
                begin += run.len();
                if let (Some(true), Some(bytes)) = (run.first(), was.get(from..to)) {
                    self.write_at(bytes, at + from as u64)?;
                }
            }
            at += piece as u64;
        }
        self.settle()
    }

    /// Lets the file have nothing of its disk, so that all shows what is behind.
    fn clear(&mut self) -> Result<(), Error> {
        self.settle()?;
        let image = &mut self.image;
        let bytes = usize::try_from(image.header.l1_entries).unwrap_or(usize::MAX).saturating_mul(8);
        image.put_clusters(image.header.l1_offset, &vec![0; bytes])?;
        image.sync()?;
        image.examine(Repair::Leaks)?;
        image.trim()
    }

    fn set_size(&mut self, size: u64, shrink: Shrink) -> Result<(), Error> {
        let has = self.size();
        let path = self.image.path.clone();
        let refuse = |why: String| Err(Error::DiskFile { path, fault: Fault::Limit(why) });
        if !size.is_multiple_of(512) || size > SIZE_MAX {
            return refuse(format!("{size} bytes are no size for a disk: a whole number of sectors, at most 8 EiB"));
        }
        let entries = l1_entries_for(size, self.image.header.cluster_bits);
        if entries * 8 > L1_BYTES_MAX {
            return refuse(format!("a disk of {size} bytes is too large for its clusters"));
        }
        if size < has {
            if shrink == Shrink::Never {
                return refuse(format!("what is behind byte {size} would be lost"));
            }
            if !self.is_zero(size, has - size)? {
                return refuse(format!("what is behind byte {size} is not all zero, and would be lost"));
            }
            self.discard(size, has - size)?;
            self.settle()?;
            self.image.sync()?;
            return self.image.put_size(size, None);
        }
        if size == has {
            return Ok(());
        }
        // The new part shows neither what is left in its first cluster nor what is behind.
        let grown = if entries > u64::from(self.image.header.l1_entries) { Some(entries) } else { None };
        let behind = self.behind.first().map_or(0, Layer::size);
        let hidden = behind.min(size).max(has.next_multiple_of(self.image.header.cluster()).min(size));
        if let Some(entries) = grown {
            self.image.grow_first_level(entries)?;
        }
        // Out of the disk's bounds as yet: nobody reads there before the next step.
        self.image.header.size = size;
        let zeroed = self.discard(has, hidden - has).and_then(|()| self.settle());
        self.image.header.size = has;
        zeroed?;
        self.image.sync()?;
        self.image.put_size(size, None)
    }
}

impl Image {
    /// Puts a new size into the header, and with it where the first-level table is.
    fn put_size(&mut self, size: u64, first_level: Option<(u32, u64)>) -> Result<(), Error> {
        let (entries, offset) = first_level.unwrap_or((self.header.l1_entries, self.header.l1_offset));
        let mut bytes = size.to_be_bytes().to_vec();
        // Between both: how clusters are encrypted, which they are not.
        bytes.extend([0; 4]);
        bytes.extend(entries.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        self.put(24, &bytes)?;
        (self.header.size, self.header.l1_entries, self.header.l1_offset) = (size, entries, offset);
        self.sync()
    }

    /// Moves the first-level table to where it has so many entries.
    fn grow_first_level(&mut self, entries: u64) -> Result<(), Error> {
        let cluster = self.header.cluster();
        let (old, old_entries) = (self.header.l1_offset, u64::from(self.header.l1_entries));
        let clusters = (entries * 8).div_ceil(cluster);
        let start = self.take_at_end(clusters)?;
        let mut table = vec![0; usize::try_from(old_entries * 8).unwrap_or(0)];
        read_padded(&self.file, &mut table, old).map_err(Error::io("read disk", &self.path))?;
        table.resize(usize::try_from(clusters * cluster).unwrap_or(0), 0);
        self.put_clusters(start * cluster, &table)?;
        self.sync()?;
        let number = u32::try_from(entries).unwrap_or(u32::MAX);
        self.put_size(self.header.size, Some((number, start * cluster)))?;
        let freed: Vec<u64> =
            (old / cluster..).take(usize::try_from((old_entries * 8).div_ceil(cluster)).unwrap_or(0)).collect();
        self.release(&freed)
    }

    /// Puts another name of a file behind it into the header: the name where
    /// the old one is not, then all that says so in one write.
    fn set_backing(&mut self, backing: Option<BackingName>) -> Result<(), Error> {
        self.sync()?;
        let mut first = vec![0; usize::try_from(self.header.cluster()).unwrap_or(0)];
        read_padded(&self.file, &mut first, 0).map_err(Error::io("read disk", &self.path))?;
        let encoded = Header::with_backing(&first, self.header.length, backing.as_ref());
        let (head, name) = encoded.map_err(|fault| self.refuse(fault))?;
        if let Some((at, name)) = name {
            self.put(at, &name)?;
            self.sync()?;
        }
        self.put(0, &head)?;
        self.sync()?;
        self.header.backing = backing;
        Ok(())
    }
}

/// The name and the files of what a disk is to stand on.
fn target(
    disk: &Image,
    to: Option<(&Path, DiskFormat)>,
    policy: &BackingPolicy,
) -> Result<(Option<BackingName>, Vec<Layer>), Error> {
    let Some((path, format)) = to else { return Ok((None, Vec::new())) };
    let real = path.canonicalize().map_err(Error::io("open backing file", path))?;
    let name = real.display().to_string();
    let refuse = |why: &str| disk.refuse(Fault::Backing { name: name.clone(), why: why.to_owned() });
    if real.to_str().is_none() {
        return Err(refuse("is not text"));
    }
    let backing = BackingName::new(name.clone(), format);
    // As it will be opened: by name, by permission.
    policy.open(&backing, &disk.path)?;
    let chain = Chain::open(&real, format, policy)?;
    let about = disk.file.metadata().map_err(Error::io("read disk", &disk.path))?;
    for (path, _) in chain.files() {
        let other = path.metadata().map_err(Error::io("read disk", path))?;
        if (other.dev(), other.ino()) == (about.dev(), about.ino()) {
            return Err(refuse("is behind itself then"));
        }
    }
    if chain.layers.len() >= policy.depth() {
        return Err(refuse(&format!("would be one too many: {} files may be one behind the other", policy.depth())));
    }
    Ok((Some(backing), chain.layers))
}

/// The file that a disk is written to.
enum Target {
    Qcow2(Box<Writer>),
    Raw { file: File, path: PathBuf },
}

impl Target {
    /// Opens it, at least so large.
    fn open(path: &Path, format: DiskFormat, policy: &BackingPolicy, size: u64) -> Result<Self, Error> {
        match format {
            DiskFormat::Qcow2 => {
                let mut writer = Writer::open(path, policy)?;
                if writer.size() < size {
                    writer.set_size(size, Shrink::Never)?;
                }
                Ok(Self::Qcow2(Box::new(writer)))
            }
            DiskFormat::Raw => {
                let file = File::options().read(true).write(true).open(path).map_err(Error::io("open disk", path))?;
                if !lock::claim(&file).map_err(Error::io("look who uses", path))? {
                    return Err(Error::DiskFileBusy(path.to_path_buf()));
                }
                if super::length_of(&file).map_err(Error::io("read disk", path))? < size {
                    file.set_len(size).map_err(Error::io("resize disk", path))?;
                }
                Ok(Self::Raw { file, path: path.to_path_buf() })
            }
        }
    }

    fn write_at(&mut self, bytes: &[u8], at: u64) -> Result<(), Error> {
        match self {
            Self::Qcow2(writer) => writer.write_at(bytes, at),
            Self::Raw { file, path } => file.write_all_at(bytes, at).map_err(Error::io("write disk", path)),
        }
    }

    fn discard(&mut self, at: u64, length: u64) -> Result<(), Error> {
        match self {
            Self::Qcow2(writer) => writer.discard(at, length),
            Self::Raw { file, path } => files::zero(file, at, length).map_err(Error::io("write disk", &*path)),
        }
    }

    fn finish(self) -> Result<(), Error> {
        match self {
            Self::Qcow2(writer) => writer.finish(),
            Self::Raw { file, path } => file.sync_all().map_err(Error::io("write disk", path)),
        }
    }
}
