//! Archives in the one format that the kernel unpacks as an initramfs.

/// An archive as it grows.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn directory(&mut self, path: &str, mode: u32) {
        self.entry(path, 0o040_000 | mode, &[]);
    }

    /// `content` is shorter than 4 GiB, or the rest of the archive is lost on
    /// the kernel; callers read no file that is longer.
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entry(path, 0o100_000 | mode, content);
    }

    /// Source: Linux `Documentation/driver-api/early-userspace/buffer-format.rst`,
    /// the format `newc`: thirteen numbers of eight hexadecimal digits.
    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let links = 1;
        let sizes = [content.len(), path.len() + 1];
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}",
            self.entries, 0, 0, 0, sizes[0], 0, 0, 0, 0, sizes[1], 0
        );
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Reads an archive as the kernel does.
    fn list(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            let number = |index: usize| {
                let digits = std::str::from_utf8(&bytes[6 + index * 8..14 + index * 8]).unwrap();
                usize::from_str_radix(digits, 16).unwrap()
            };
            assert_eq!(&bytes[..6], b"070701");
            let (mode, size, name) = (number(1), number(6), number(11));
            let content = (110 + name).next_multiple_of(4);
            let path = std::str::from_utf8(&bytes[110..110 + name - 1]).unwrap().to_owned();
            assert_eq!(bytes[110 + name - 1], 0);
            if path == "TRAILER!!!" {
                return entries;
            }
            let mode = u32::try_from(mode).unwrap();
            entries.push((path, mode, bytes[content..content + size].to_vec()));
            bytes = &bytes[(content + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn what_is_put_in_is_read_back_whatever_its_length() {
        let mut archive = Archive::new();
        archive.directory("a", 0o755);
        archive.file("a/bc", 0o644, b"odd");
        archive.file("init", 0o755, b"");
        let expected = [
            ("a".to_owned(), 0o040_755, Vec::new()),
            ("a/bc".to_owned(), 0o100_644, b"odd".to_vec()),
            ("init".to_owned(), 0o100_755, Vec::new()),
        ];
        assert_eq!(list(&archive.finish()), expected);
    }
}
