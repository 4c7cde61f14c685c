//! Whatever an archive is compressed with, by its first bytes, and no more of
//! it than is allowed.

use std::{
    io::{self, BufRead, BufReader, Read},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::tar::bad;

/// Most memory that a decompressor may ask for, in bytes: what the highest
/// levels in use need.
const MEMORY_MAX_BYTES: u32 = 256 << 20;
/// Below this many bytes nothing is called a bomb.
const RATIO_FROM_BYTES: u64 = 256 << 20;
/// What no honest tree reaches: ten is much for a whole system.
const RATIO_MAX: u64 = 100;

/// Decompresses what is compressed. Beyond `max` bytes of output, or a hundred
/// times of what went in, it is an error.
pub(crate) fn open<'a>(from: impl Read + 'a, max: u64) -> io::Result<Box<dyn Read + 'a>> {
    let consumed = Arc::new(AtomicU64::new(0));
    let mut from = BufReader::with_capacity(256 << 10, Counted { from, bytes: Arc::clone(&consumed) });
    let start = from.fill_buf()?;
    let plain: Box<dyn Read + 'a> = if start.starts_with(&[0x1f, 0x8b]) {
        Box::new(flate2::bufread::MultiGzDecoder::new(from))
    } else if start.starts_with(b"\xfd7zXZ\0") {
        Box::new(lzma_rust2::XzReader::new_mem_limit(from, true, MEMORY_MAX_BYTES >> 10))
    } else if start.starts_with(b"BZh") {
        Box::new(bzip2::bufread::MultiBzDecoder::new(from))
    } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(from)?;
        decoder.window_log_max(MEMORY_MAX_BYTES.ilog2() - 1)?;
        Box::new(decoder)
    } else {
        return Ok(Box::new(Bounded { from, consumed: None, produced: 0, max }));
    };
    Ok(Box::new(Bounded { from: plain, consumed: Some(consumed), produced: 0, max }))
}

/// Refuses what so few bytes should not have become.
pub(crate) fn check_ratio(consumed: u64, produced: u64) -> io::Result<()> {
    if produced > RATIO_FROM_BYTES && produced / RATIO_MAX > consumed {
        return Err(bad(format!("it expands to more than {RATIO_MAX} times its size")));
    }
    Ok(())
}

struct Counted<R> {
    from: R,
    bytes: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let len = self.from.read(to)?;
        self.bytes.fetch_add(len as u64, Ordering::Relaxed);
        Ok(len)
    }
}

struct Bounded<R> {
    from: R,
    /// Bytes that went into the decompressor.
    consumed: Option<Arc<AtomicU64>>,
    produced: u64,
    max: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let len = self.from.read(to)?;
        self.produced += len as u64;
        if self.produced > self.max {
            return Err(bad(format!("it has more than the {} bytes that are allowed", self.max)));
        }
        if let Some(consumed) = &self.consumed {
            check_ratio(consumed.load(Ordering::Relaxed), self.produced)?;
        }
        Ok(len)
    }
}
