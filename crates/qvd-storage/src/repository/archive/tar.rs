//! Reading tar as hostile text: every header is checked, nothing is believed,
//! and what has to be in memory is bounded.
//!
//! Source of all offsets: POSIX.1-2024 `pax`, "ustar Interchange Format" and
//! "pax Header Block", and the manual of GNU tar, "Basic Tar Format".

use std::{
    collections::BTreeMap,
    io::{self, Read},
};

const BLOCK: usize = 512;
/// Longest extension header in bytes: a path, a link and attributes.
const EXTENSION_MAX_BYTES: u64 = 1 << 20;

/// One member of an archive, without its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime_unix_s: i64,
    pub(crate) size_bytes: u64,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What a member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    /// Another name of a member before it.
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    Directory,
    Fifo,
    Device,
}

/// An archive being read.
pub(crate) struct Reader<R> {
    from: R,
    /// Where in the archive it is.
    at: u64,
    /// Bytes of the last member's content, and of what fills its last block.
    left: u64,
    padding: u64,
    global: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl<R: Read> Reader<R> {
    pub(crate) const fn new(from: R) -> Self {
        Self { from, at: 0, left: 0, padding: 0, global: BTreeMap::new() }
    }

    /// Where the content of the last member begins.
    pub(crate) const fn position(&self) -> u64 {
        self.at
    }

    /// The next member; the content of the one before is passed over.
    pub(crate) fn next(&mut self) -> io::Result<Option<Member>> {
        let mut extended = self.global.clone();
        let (mut long_path, mut long_link) = (None, None);
        loop {
            self.skip()?;
            let Some(header) = self.header()? else { return Ok(None) };
            let size = number(field(&header, 124, 12)).ok_or_else(|| bad("the length of a member is no number"))?;
            match header.get(156).copied().unwrap_or_default() {
                b'x' => parse_pax(&self.extension(size)?, &mut extended)?,
                b'g' => {
                    let text = self.extension(size)?;
                    parse_pax(&text, &mut self.global)?;
                    if self.global.values().map(Vec::len).sum::<usize>() as u64 > EXTENSION_MAX_BYTES {
                        return Err(bad("its global headers are too long"));
                    }
                    parse_pax(&text, &mut extended)?;
                }
                b'L' => long_path = Some(trim(&self.extension(size)?).to_vec()),
                b'K' => long_link = Some(trim(&self.extension(size)?).to_vec()),
                kind => {
                    let member = member(&header, kind, size, &extended, (long_path, long_link))?;
                    self.left = member.size_bytes;
                    self.padding = padding(member.size_bytes);
                    return Ok(Some(member));
                }
            }
        }
    }

    /// The content of the last member, as far as it was not read.
    pub(crate) fn content(&mut self) -> Content<'_, R> {
        Content(self)
    }

    /// The rest of the archive, after its end was found.
    pub(crate) fn into_rest(self) -> R {
        self.from
    }

    fn skip(&mut self) -> io::Result<()> {
        let left = self.left + self.padding;
        let skipped = io::copy(&mut (&mut self.from).take(left), &mut io::sink())?;
        if skipped < left {
            return Err(bad("the archive ends in the middle of a member"));
        }
        self.at += left;
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    /// The next header; none at the end, which is a block of zeroes or nothing.
    fn header(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let mut header = [0; BLOCK];
        let mut filled = 0;
        while let Some(rest) = header.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.from.read(rest) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(bad("the archive ends in the middle of a header")),
                Ok(len) => filled += len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.at += BLOCK as u64;
        if header == [0; BLOCK] {
            return Ok(None);
        }
        let sum: u64 = header
            .iter()
            .enumerate()
            .map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u64::from(*byte) })
            .sum();
        if number(field(&header, 148, 8)) != Some(sum) {
            return Err(bad("a header does not have the sum that it says"));
        }
        Ok(Some(header))
    }

    fn extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > EXTENSION_MAX_BYTES {
            return Err(bad(format!("an extension header has {size} bytes, more than {EXTENSION_MAX_BYTES}")));
        }
        let mut text = Vec::new();
        (&mut self.from).take(size).read_to_end(&mut text)?;
        if (text.len() as u64) < size {
            return Err(bad("the archive ends in the middle of an extension header"));
        }
        self.at += size;
        self.padding = padding(size);
        Ok(text)
    }
}

/// The content of a member.
pub(crate) struct Content<'a, R>(&'a mut Reader<R>);

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let len = (&mut self.0.from).take(self.0.left).read(to)?;
        if len == 0 && self.0.left > 0 && !to.is_empty() {
            return Err(bad("the archive ends in the middle of a member"));
        }
        self.0.left -= len as u64;
        self.0.at += len as u64;
        Ok(len)
    }
}

fn member(
    header: &[u8],
    kind: u8,
    size: u64,
    extended: &BTreeMap<Vec<u8>, Vec<u8>>,
    (long_path, long_link): (Option<Vec<u8>>, Option<Vec<u8>>),
) -> io::Result<Member> {
    if extended.keys().any(|key| key.starts_with(b"GNU.sparse.")) || kind == b'S' {
        return Err(bad("a member is sparse; make the archive without `--sparse`"));
    }
    let path = extended.get(b"path".as_slice()).cloned().or(long_path).unwrap_or_else(|| {
        let name = trim(field(header, 0, 100));
        // GNU tar has other things where POSIX has the rest of the path.
        let prefix = if field(header, 257, 6) == b"ustar\0" { trim(field(header, 345, 155)) } else { b"" };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    });
    let link = || {
        extended
            .get(b"linkpath".as_slice())
            .cloned()
            .or_else(|| long_link.clone())
            .unwrap_or_else(|| trim(field(header, 157, 100)).to_vec())
    };
    let at = || String::from_utf8_lossy(&path).into_owned();
    let numeric = |key: &[u8], offset, len, what: &str| {
        let found = match extended.get(key) {
            Some(text) => std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()),
            None => number(field(header, offset, len)),
        };
        found.ok_or_else(|| bad(format!("the {what} of `{}` is no number", at())))
    };
    let id = |key, offset, what| {
        u32::try_from(numeric(key, offset, 8, what)?).map_err(|_| bad(format!("the {what} of `{}` is too large", at())))
    };
    let kind = match kind {
        // Before POSIX a directory was a file with a slash at its end.
        b'0' | b'7' | 0 if path.ends_with(b"/") => Kind::Directory,
        b'0' | b'7' | 0 => Kind::File,
        b'1' => Kind::HardLink(link()),
        b'2' => Kind::Symlink(link()),
        b'3' | b'4' => Kind::Device,
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        other => return Err(bad(format!("`{}` is of kind {:?}, which is unknown here", at(), char::from(other)))),
    };
    let size = match extended.get(b"size".as_slice()) {
        Some(_) => numeric(b"size", 124, 12, "length")?,
        None => size,
    };
    let mtime = match extended.get(b"mtime".as_slice()).map(|text| String::from_utf8_lossy(text)) {
        // Seconds alone: finer times are in no tree.
        Some(text) => text.split('.').next().and_then(|seconds| seconds.parse().ok()),
        None => number(field(header, 136, 12)).and_then(|time| i64::try_from(time).ok()),
    };
    let xattrs =
        extended.iter().filter_map(|(key, value)| Some((key.strip_prefix(b"SCHILY.xattr.")?.to_vec(), value.clone())));
    Ok(Member {
        mode: u32::try_from(numeric(b"-", 100, 8, "mode")? & 0o7777).unwrap_or_default(),
        uid: id(b"uid", 108, "owner")?,
        gid: id(b"gid", 116, "group")?,
        mtime_unix_s: mtime.unwrap_or_default(),
        // Only files have a content; some write a length for links too.
        size_bytes: if kind == Kind::File { size } else { 0 },
        xattrs: xattrs.collect(),
        kind,
        path,
    })
}

/// Reads records of the form `LENGTH KEY=VALUE\n`.
fn parse_pax(mut text: &[u8], to: &mut BTreeMap<Vec<u8>, Vec<u8>>) -> io::Result<()> {
    let wrong = || bad("an extension header is not made of records");
    while !text.is_empty() {
        let space = text.iter().position(|byte| *byte == b' ').ok_or_else(wrong)?;
        let len = text.get(..space).and_then(|digits| std::str::from_utf8(digits).ok());
        let len: usize = len.and_then(|digits| digits.parse().ok()).ok_or_else(wrong)?;
        let (record, rest) = text.split_at_checked(len).ok_or_else(wrong)?;
        let record = record.get(space + 1..).and_then(|record| record.strip_suffix(b"\n")).ok_or_else(wrong)?;
        let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(wrong)?;
        let (key, value) = record.split_at(equals);
        to.insert(key.to_vec(), value.get(1..).unwrap_or_default().to_vec());
        text = rest;
    }
    Ok(())
}

fn field(header: &[u8], at: usize, len: usize) -> &[u8] {
    header.get(at..at + len).unwrap_or_default()
}

/// Up to the first NUL.
fn trim(text: &[u8]) -> &[u8] {
    text.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// An octal number, or with the highest bit set one in base 256. Nothing is zero.
fn number(text: &[u8]) -> Option<u64> {
    if let Some((first, rest)) = text.split_first()
        && *first >= 0x80
    {
        // A negative number has all of the first byte set.
        let start = u64::from(first & 0x7f);
        return rest.iter().try_fold(start, |value, byte| value.checked_mul(256)?.checked_add(u64::from(*byte)));
    }
    let digits = std::str::from_utf8(trim(text)).ok()?.trim_matches(' ');
    if digits.is_empty() { Some(0) } else { u64::from_str_radix(digits, 8).ok() }
}

const fn padding(size: u64) -> u64 {
    size.next_multiple_of(BLOCK as u64) - size
}

pub(crate) fn bad(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}
