//! A disk as its user sees it: a file and those behind it.

use std::{
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use super::{BackingPolicy, Fault, Image, Mapping, length_of, policy::Behind, read_padded};
use crate::{Error, disk::DiskFormat};

/// How much is copied at once, and what becomes a hole when it is zero, in bytes.
const COPIED_AT_ONCE: usize = 1 << 20;
const BLOCK: usize = 64 << 10;

/// A disk with all files that it is made of, each opened by permission.
#[derive(Debug)]
pub struct Chain {
    /// The disk's own first.
    pub(super) layers: Vec<Layer>,
}

/// One file of a chain.
#[derive(Debug)]
pub(super) enum Layer {
    Qcow2(Box<Image>),
    Raw(Raw),
}

/// A file or block device that is the disk byte for byte.
#[derive(Debug)]
pub(super) struct Raw {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) size: u64,
}

impl Chain {
    /// Opens a disk for reading: `path`, which the caller trusts to be the one
    /// that is meant, and every file behind it that `policy` allows.
    ///
    /// # Errors
    /// [`Error::DiskFile`] when one of them is damaged, behind itself, too
    /// deep, or not permitted, with which and why.
    pub fn open(path: &Path, format: DiskFormat, policy: &BackingPolicy) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::io("open disk", path))?;
        Self::of(file, path, format, policy)
    }

    /// As [`Chain::open`], for a file that is open.
    pub(super) fn of(file: File, path: &Path, format: DiskFormat, policy: &BackingPolicy) -> Result<Self, Error> {
        let mut layers = Vec::new();
        let mut seen: Vec<(u64, u64)> = Vec::new();
        let mut next = Some(Behind { file, path: path.to_path_buf(), format });
        while let Some(Behind { file, path, format }) = next {
            let about = file.metadata().map_err(Error::io("read disk", &path))?;
            let identity = (about.dev(), about.ino());
            if seen.contains(&identity) {
                let (name, why) = (path.display().to_string(), "is behind itself".to_owned());
                return Err(Error::DiskFile { path, fault: Fault::Backing { name, why } });
            }
            seen.push(identity);
            let layer = Layer::open(file, path, format)?;
            next = match &layer {
                Layer::Raw(_) => None,
                Layer::Qcow2(image) => match &image.header.backing {
                    Some(backing) if seen.len() >= policy.depth() => {
                        let why =
                            format!("would be one too many: {} files may be one behind the other", policy.depth());
                        return Err(image.refuse(Fault::Backing { name: backing.name.clone(), why }));
                    }
                    Some(backing) => Some(policy.open(backing, &image.path)?),
                    None => None,
                },
            };
            layers.push(layer);
        }
        Ok(Self { layers })
    }

    /// Size of the disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.layers.first().map_or(0, Layer::size)
    }

    /// The files that it is made of, its own first, with their formats.
    pub fn files(&self) -> impl Iterator<Item = (&Path, DiskFormat)> + '_ {
        self.layers.iter().map(|layer| match layer {
            Layer::Qcow2(image) => (image.path.as_path(), DiskFormat::Qcow2),
            Layer::Raw(raw) => (raw.path.as_path(), DiskFormat::Raw),
        })
    }

    /// Reads bytes of the disk.
    ///
    /// # Errors
    /// They are not inside of it, or one of its files cannot be read or is damaged.
    pub fn read_at(&mut self, buffer: &mut [u8], at: u64) -> Result<(), Error> {
        self.expect_inside(at, buffer.len() as u64)?;
        read_layers(&mut self.layers, buffer, at)
    }

    /// Gives the empty file `to`, which `path` names in errors, all of the
    /// disk, with holes for its zeros.
    pub(in crate::disk) fn copy_to(&mut self, to: &File, path: &Path) -> Result<(), Error> {
        let mut buffer = vec![0; COPIED_AT_ONCE];
        let (mut at, size) = (0, self.size());
        to.set_len(size).map_err(Error::io("copy disk to", path))?;
        while at < size {
            let length = usize::try_from(size - at).unwrap_or(usize::MAX).min(buffer.len());
            let part = buffer.get_mut(..length).unwrap_or_default();
            read_layers(&mut self.layers, part, at)?;
            for (block, place) in part.chunks(BLOCK).zip((at..).step_by(BLOCK)) {
                if block.iter().any(|byte| *byte != 0) {
                    to.write_all_at(block, place).map_err(Error::io("copy disk to", path))?;
                }
            }
            at += length as u64;
        }
        Ok(())
    }

    pub(super) fn expect_inside(&self, at: u64, length: u64) -> Result<(), Error> {
        let (size, end) = (self.size(), at.checked_add(length));
        if end.is_some_and(|end| end <= size) {
            return Ok(());
        }
        let fault = Fault::Outside { from: at, to: end.unwrap_or(u64::MAX), size };
        let path = self.files().next().map_or(Path::new(""), |(path, _)| path);
        Err(Error::DiskFile { path: path.to_path_buf(), fault })
    }
}

impl Layer {
    fn open(file: File, path: PathBuf, format: DiskFormat) -> Result<Self, Error> {
        Ok(match format {
            DiskFormat::Qcow2 => Self::Qcow2(Box::new(Image::open(file, path)?)),
            DiskFormat::Raw => {
                let size = length_of(&file).map_err(Error::io("read disk", &path))?;
                Self::Raw(Raw { file, path, size })
            }
        })
    }

    pub(super) const fn size(&self) -> u64 {
        match self {
            Self::Qcow2(image) => image.header.size,
            Self::Raw(raw) => raw.size,
        }
    }
}

/// Reads from the first of these files that has something there; what none has is zero.
pub(super) fn read_layers(layers: &mut [Layer], buffer: &mut [u8], at: u64) -> Result<(), Error> {
    let Some((layer, behind)) = layers.split_first_mut() else {
        buffer.fill(0);
        return Ok(());
    };
    let inside = usize::try_from(layer.size().saturating_sub(at)).unwrap_or(usize::MAX).min(buffer.len());
    let (buffer, outside) = buffer.split_at_mut(inside);
    outside.fill(0);
    match layer {
        Layer::Raw(raw) => read_padded(&raw.file, buffer, at).map_err(Error::io("read disk", &raw.path)),
        Layer::Qcow2(image) => read_image(image, behind, buffer, at),
    }
}

/// As [`read_layers`], inside of the disk in `image`, with those behind it.
pub(super) fn read_image(image: &mut Image, behind: &mut [Layer], buffer: &mut [u8], at: u64) -> Result<(), Error> {
    let (mut rest, mut at) = (buffer, at);
    while !rest.is_empty() {
        let (mapping, run) = image.map(at)?;
        let run = usize::try_from(run).unwrap_or(usize::MAX).min(rest.len());
        let (part, later) = rest.split_at_mut(run);
        match mapping {
            Mapping::Absent => read_layers(behind, part, at)?,
            mapping => image.read_mapped(mapping, part, at)?,
        }
        (rest, at) = (later, at + run as u64);
    }
    Ok(())
}
