//! The digest of a content, as the kernel computes it for fs-verity.
//!
//! The same 32 bytes name the content in a repository and are what a host with
//! fs-verity enforces at each read: one hash serves both.

use std::io::{self, Read};

use qvd_core::Digest;
use sha2::{Digest as _, Sha256, digest::Output};

use super::ObjectId;

/// Bytes hashed at a time, and of a node of the tree of hashes.
const BLOCK: usize = 4096;
/// Bytes read at a time.
const BUFFER: usize = 256 * 1024;

/// Computes the id of a content that is given to it piece by piece.
///
/// The id is the fs-verity digest with SHA-256, blocks of 4096 bytes and no
/// salt. Source: Linux `Documentation/filesystems/fsverity.rst`, "File digest
/// computation".
#[derive(Debug, Default, Clone)]
pub struct ObjectHasher {
    /// Hashes that wait to be a node, a level of the tree each.
    levels: Vec<Node>,
    block: Sha256,
    in_block: usize,
    len: u64,
}

#[derive(Debug, Default, Clone)]
struct Node {
    hash: Sha256,
    filled: usize,
}

impl ObjectHasher {
    /// Begins.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        self.len += bytes.len() as u64;
        while !bytes.is_empty() {
            // Only now: the last block is finished by `finish`.
            if self.in_block == BLOCK {
                self.end_block();
            }
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK - self.in_block));
            self.block.update(now);
            self.in_block += now.len();
            bytes = later;
        }
    }

    /// The bytes added so far.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing was added yet.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The id of what was added.
    #[must_use]
    pub fn finish(mut self) -> ObjectId {
        let root = self.root();
        let mut descriptor = [0_u8; 256];
        // struct fsverity_descriptor: version, algorithm (1 is SHA-256), log2
        // of the block size, length of the salt, 4 reserved bytes, size of the
        // file, 64 bytes of root hash, the rest zero.
        let fields: [(usize, &[u8]); 3] = [(0, &[1, 1, 12, 0]), (8, &self.len.to_le_bytes()), (16, &root)];
        for (at, bytes) in fields {
            if let Some(to) = descriptor.get_mut(at..at + bytes.len()) {
                to.copy_from_slice(bytes);
            }
        }
        ObjectId::new(Digest::new(Sha256::digest(descriptor).into()))
    }

    /// The hash at the top of the tree; zero for an empty content.
    fn root(&mut self) -> [u8; 32] {
        if self.len == 0 {
            return [0; 32];
        }
        let mut hash = finish_padded(&mut self.block, &mut self.in_block);
        let mut level = 0;
        while let Some(node) = self.levels.get_mut(level) {
            if node.filled == BLOCK {
                let full = finish_padded(&mut node.hash, &mut node.filled);
                self.add(level + 1, &full);
            }
            let Some(node) = self.levels.get_mut(level) else { break };
            node.hash.update(hash);
            node.filled += hash.len();
            hash = finish_padded(&mut node.hash, &mut node.filled);
            level += 1;
        }
        hash.into()
    }

    fn end_block(&mut self) {
        let hash = finish_padded(&mut self.block, &mut self.in_block);
        self.add(0, &hash);
    }

    fn add(&mut self, level: usize, hash: &Output<Sha256>) {
        if self.levels.len() == level {
            self.levels.push(Node::default());
        }
        let Some(node) = self.levels.get_mut(level) else { return };
        if node.filled == BLOCK {
            let full = finish_padded(&mut node.hash, &mut node.filled);
            self.add(level + 1, &full);
        }
        if let Some(node) = self.levels.get_mut(level) {
            node.hash.update(hash);
            node.filled += hash.len();
        }
    }
}

/// Ends a block or a node, filled up with zeroes, and begins the next.
fn finish_padded(hash: &mut Sha256, filled: &mut usize) -> Output<Sha256> {
    const ZEROES: [u8; BLOCK] = [0; BLOCK];
    hash.update(ZEROES.get(*filled..).unwrap_or_default());
    *filled = 0;
    hash.finalize_reset()
}

/// Reads a content to its end and passes it on; returns its id and length in bytes.
pub(crate) fn copy(from: &mut dyn Read, mut to: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<(ObjectId, u64)> {
    let mut hasher = ObjectHasher::new();
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => {
                let bytes = buffer.get(..len).unwrap_or_default();
                hasher.update(bytes);
                to(bytes)?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let len = hasher.len();
    Ok((hasher.finish(), len))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(content: &[u8]) -> String {
        let mut hasher = ObjectHasher::new();
        // Odd pieces: the id must not depend on them.
        content.chunks(1013).for_each(|piece| hasher.update(piece));
        hasher.finish().hex()
    }

    /// What `fsverity digest` prints, and where the shape of the tree changes:
    /// no block, one, two, a full node of 128 hashes, one more, two levels full.
    #[test]
    fn ids_are_those_of_fs_verity() {
        let pattern = |len: usize| (0..len).map(|n| u8::try_from(n % 251).unwrap()).collect::<Vec<_>>();
        for (len, expected) in [
            (0, "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95"),
            (1, "b803429503d95915829b29fdbc8bbad142f3abfd11b1cadf5526582e685c0551"),
            (4095, "5f4953aad672b0188023d6cd6fbce9d09508eb7dad165b6298ce0086bc1e72db"),
            (4096, "13e9b8848ae484a36acb3f3cac0ceb2f7601e96633d15c92f9bd3dd44e492157"),
            (4097, "b0d074abef4d544404facfab6ba242f6a8ccbde90f1325cd286f3c8aa8d0f8aa"),
            (8192, "e48d50c56c4f0178a98a035cb91d66be328eeff78bbddaa35c5ec4cc0d8340c0"),
            (524288, "d82861203d50ae9b60948504a704f35f5118bd229aeb1a22d6dae47b1767c4c4"),
            (524289, "4dc6905041c9c4ee73e13b53f63f5d289c46da359b664a965ead7f8cc4d799d4"),
            (528384, "dd56ffe5de24c1229fe22d25f91db9e735f6adc921510dcf480094624458c92a"),
            (67108864, "196650e8bd05f8516c0ede56deeb4d1ff2be9809dc2d827261db4a7773957567"),
            (67108865, "acba6554fbff4e8b2fc0361086b9e8ed6afbbd3196ade159c0f3e2bf9ecb2ed1"),
        ] {
            assert_eq!(id(&pattern(len)), expected, "{len} bytes");
        }
    }
}
