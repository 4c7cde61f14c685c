//! OCI archives: a tar of blobs under their digests, read and written.

use std::{
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

use qvd_core::Digest;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::{
    decompress,
    layers::{self, Index, Layers},
    tar::{self, Kind, bad},
};
use crate::repository::{Entry, Staging};

/// Largest document of an archive that is read, in bytes.
const JSON_MAX_BYTES: u64 = 4 << 20;
/// Layers of one image. Source: more than any builder makes.
const LAYERS_MAX: usize = 512;
/// Indexes inside of each other.
const DEPTH_MAX: usize = 3;

/// Names that an OCI archive has at its top, and nothing else a system has.
pub(crate) const LAYOUT: &str = "oci-layout";
pub(crate) const INDEX: &str = "index.json";

#[derive(Deserialize)]
struct IndexFile {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// Whether an archive is one of blobs: by the first member that is a file.
pub(crate) fn is_archive(from: impl Read) -> io::Result<bool> {
    let mut reader = tar::Reader::new(from);
    while let Some(member) = reader.next()? {
        let path = member.path.strip_prefix(b"./").unwrap_or(&member.path);
        let ours = path.starts_with(b"blobs/") || [LAYOUT, INDEX].iter().any(|name| path == name.as_bytes());
        if ours && member.kind == Kind::File {
            return Ok(true);
        }
        if member.kind != Kind::Directory {
            return Ok(false);
        }
    }
    Ok(false)
}

/// Reads the image for this machine from an archive.
pub(crate) fn read<F: Read + Seek>(staging: &Staging<'_>, file: &mut F, max_bytes: u64) -> io::Result<Vec<Entry>> {
    let mut unpacked = tempfile::tempfile_in(staging.repository().incoming())?;
    let mut start = [0; 262];
    let filled = file.read(&mut start)?;
    file.rewind()?;
    // Blobs are read in another order than they are in: what is compressed as
    // a whole has to be unpacked first.
    if start.get(257..filled).is_some_and(|magic| magic.starts_with(b"ustar")) {
        Archive::open(file)?.image(staging, max_bytes)
    } else {
        io::copy(&mut decompress::open(file, max_bytes)?, &mut unpacked)?;
        unpacked.rewind()?;
        Archive::open(&mut unpacked)?.image(staging, max_bytes)
    }
}

struct Archive<'f, F> {
    file: &'f mut F,
    index: Index,
}

impl<'f, F: Read + Seek> Archive<'f, F> {
    fn open(file: &'f mut F) -> io::Result<Self> {
        let index = layers::index(io::BufReader::new(&mut *file))?;
        Ok(Self { file, index })
    }

    fn image(&mut self, staging: &Staging<'_>, max_bytes: u64) -> io::Result<Vec<Entry>> {
        let layout = self.member(LAYOUT)?;
        if !String::from_utf8_lossy(&layout).contains("\"1.") {
            return Err(bad(format!("its `{LAYOUT}` is of a version that is unknown here")));
        }
        let manifest = self.manifest()?;
        // Nothing in it is needed, but an archive that lies is refused.
        self.blob(&manifest.config)?;
        if manifest.layers.len() > LAYERS_MAX {
            return Err(bad(format!("it has {} layers, more than {LAYERS_MAX}", manifest.layers.len())));
        }
        let mut layers = Layers::new(staging);
        for (number, layer) in manifest.layers.iter().enumerate() {
            let within = |error: io::Error| match error.kind() {
                io::ErrorKind::InvalidData => bad(format!("layer {}: {error}", number + 1)),
                _ => error,
            };
            let digest = digest(layer)?;
            let mut hashed = Hashed { from: self.open_blob(layer)?, hash: Sha256::new() };
            layers.add(decompress::open(&mut hashed, max_bytes)?, true).map_err(within)?;
            io::copy(&mut hashed, &mut io::sink())?;
            if Digest::new(hashed.hash.finalize().into()) != digest {
                return Err(bad(format!("layer {} is not what its digest {digest} says", number + 1)));
            }
        }
        Ok(layers.finish())
    }

    /// The manifest for this machine; if there is only one, that one.
    fn manifest(&mut self) -> io::Result<Manifest> {
        let mut index: IndexFile = json(&self.member(INDEX)?, INDEX)?;
        for _ in 0..DEPTH_MAX {
            let ours = |descriptor: &Descriptor| {
                descriptor.platform.as_ref().is_some_and(|p| p.os == "linux" && p.architecture == architecture())
            };
            let chosen = index.manifests.iter().position(ours).or((index.manifests.len() == 1).then_some(0));
            let Some(chosen) = chosen.map(|at| index.manifests.swap_remove(at)) else {
                return Err(bad(format!("it has no image for linux on {}", architecture())));
            };
            let bytes = self.blob(&chosen)?;
            if !chosen.media_type.contains("index") && !chosen.media_type.contains("manifest.list") {
                return json(&bytes, &chosen.digest);
            }
            index = json(&bytes, &chosen.digest)?;
        }
        Err(bad("its indexes lead to each other"))
    }

    fn member(&mut self, name: &str) -> io::Result<Vec<u8>> {
        let found =
            self.index.get(name.as_bytes()).or_else(|| self.index.get(Path::new(name).as_os_str().as_encoded_bytes()));
        let Some((at, size)) = found.copied() else { return Err(bad(format!("it has no `{name}`"))) };
        if size > JSON_MAX_BYTES {
            return Err(bad(format!("its `{name}` has {size} bytes")));
        }
        self.file.seek(SeekFrom::Start(at))?;
        let mut bytes = Vec::new();
        self.file.take(size).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// A small blob, checked.
    fn blob(&mut self, descriptor: &Descriptor) -> io::Result<Vec<u8>> {
        let digest = digest(descriptor)?;
        let bytes = self.member(&format!("blobs/sha256/{}", digest.hex()))?;
        if Digest::new(Sha256::digest(&bytes).into()) != digest {
            return Err(bad(format!("blob {digest} is not what its digest says")));
        }
        Ok(bytes)
    }

    fn open_blob(&mut self, descriptor: &Descriptor) -> io::Result<impl Read + use<'_, F>> {
        let digest = digest(descriptor)?;
        let found = self.index.get(format!("blobs/sha256/{}", digest.hex()).as_bytes());
        let (at, size) = *found.ok_or_else(|| bad(format!("it has no blob {digest}")))?;
        if size != descriptor.size {
            return Err(bad(format!("blob {digest} has {size} bytes, not {}", descriptor.size)));
        }
        self.file.seek(SeekFrom::Start(at))?;
        Ok((&mut *self.file).take(size))
    }
}

struct Hashed<R> {
    from: R,
    hash: Sha256,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let len = self.from.read(to)?;
        self.hash.update(to.get(..len).unwrap_or_default());
        Ok(len)
    }
}

/// The digest of a descriptor: 64 digits and nothing that could be a path.
fn digest(descriptor: &Descriptor) -> io::Result<Digest> {
    descriptor.digest.parse().map_err(|error: qvd_core::IdError| bad(error.to_string()))
}

fn json<T: for<'de> Deserialize<'de>>(bytes: &[u8], what: &str) -> io::Result<T> {
    serde_json::from_slice(bytes).map_err(|error| bad(format!("its `{what}` cannot be read: {error}")))
}

/// How OCI calls this machine's architecture.
pub(crate) const fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}
