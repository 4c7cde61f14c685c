//! From a commit to a file that other programs read.

use std::{
    fs::{self, File},
    io::{self, BufReader, BufWriter, Seek, Write},
    path::Path,
};

use qvd_core::Digest;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::{oci, write};
use crate::{
    Error, fsio,
    repository::{Commit, CommitId, Content, Repository, Tree},
};

/// What a commit is exported as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// A directory; as root, with owners.
    Directory,
    /// A tar archive.
    Tar,
    /// A tar archive, compressed with gzip.
    TarGz,
    /// A tar archive, compressed with zstd.
    TarZst,
    /// An OCI archive of one layer, which container tools read.
    Oci,
}

impl Format {
    /// The one that a file's name asks for.
    #[must_use]
    pub fn of(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let ends = |suffixes: &[&str]| suffixes.iter().any(|suffix| name.ends_with(suffix));
        if ends(&[".oci", ".oci.tar"]) {
            Self::Oci
        } else if ends(&[".tar.gz", ".tgz"]) {
            Self::TarGz
        } else if ends(&[".tar.zst", ".tzst"]) {
            Self::TarZst
        } else if ends(&[".tar"]) {
            Self::Tar
        } else {
            Self::Directory
        }
    }
}

impl Repository {
    /// Writes the tree of a commit to `to`, which must not be there yet. It
    /// appears when it is whole. A disk is always written as it is, whatever
    /// `format` says.
    ///
    /// # Errors
    /// Something is there, it cannot be written, or the policy of the repository
    /// refuses the commit.
    pub fn export(&self, id: CommitId, to: &Path, format: Format) -> Result<(), Error> {
        let commit = self.commit(id)?;
        self.expect_trusted(id)?;
        if matches!(commit.content, Content::Disk { .. }) {
            return self.materialise(id, to);
        }
        let tree = self.tree_of(&commit)?;
        if fs::symlink_metadata(to).is_ok() {
            return Err(Error::Refused(format!("`{}` is there already", to.display())));
        }
        if format == Format::Directory {
            return self.checkout(&tree, to);
        }
        let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let export = || {
            let mut file = tempfile::NamedTempFile::new_in(parent)?;
            match format {
                Format::TarGz => {
                    let mut gz = flate2::write::GzEncoder::new(BufWriter::new(&mut file), flate2::Compression::new(6));
                    self.write_tar(&tree, &mut gz)?;
                    gz.finish()?.flush()?;
                }
                Format::TarZst => {
                    let mut zst = zstd::stream::write::Encoder::new(BufWriter::new(&mut file), 3)?;
                    self.write_tar(&tree, &mut zst)?;
                    zst.finish()?.flush()?;
                }
                Format::Oci => {
                    let mut buffered = BufWriter::new(&mut file);
                    self.write_oci(&commit, &tree, parent, &mut buffered)?;
                    buffered.flush()?;
                }
                Format::Directory | Format::Tar => {
                    let mut buffered = BufWriter::new(&mut file);
                    self.write_tar(&tree, &mut buffered)?;
                    buffered.flush()?;
                }
            }
            file.as_file().sync_all()?;
            file.persist_noclobber(to).map_err(|error| error.error)?;
            fsio::sync_dir(&parent.canonicalize()?)
        };
        export().map_err(Error::io("write", to))
    }

    fn write_tar(&self, tree: &Tree, to: &mut dyn Write) -> io::Result<()> {
        write::tree(tree, to, &mut |object| Ok(Box::new(BufReader::new(File::open(self.objects.path(object))?))))
    }

    /// Source: OCI image specification 1.1, "Image Layout", "Image Manifest",
    /// "Image Configuration".
    fn write_oci(&self, commit: &Commit, tree: &Tree, scratch: &Path, to: &mut dyn Write) -> io::Result<()> {
        let mut layer = tempfile::tempfile_in(scratch)?;
        let mut blob = Hashing::new(BufWriter::new(&mut layer));
        let mut plain = Hashing::new(flate2::write::GzEncoder::new(&mut blob, flate2::Compression::new(6)));
        self.write_tar(tree, &mut plain)?;
        let (gz, diff_id, _) = plain.finish();
        gz.finish()?;
        let (mut buffered, layer_digest, layer_bytes) = blob.finish();
        buffered.flush()?;
        drop(buffered);
        layer.rewind()?;
        let config = serde_json::to_vec(&json!({
            "architecture": oci::architecture(),
            "os": "linux",
            "author": commit.author,
            "config": {},
            "rootfs": { "type": "layers", "diff_ids": [diff_id] },
            "history": [{ "author": commit.author, "comment": commit.message }],
        }))?;
        let config_digest = Digest::new(Sha256::digest(&config).into());
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": config_digest, "size": config.len(),
            },
            "layers": [{
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": layer_digest, "size": layer_bytes,
            }],
        }))?;
        let manifest_digest = Digest::new(Sha256::digest(&manifest).into());
        let index = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "manifests": [{
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": manifest_digest, "size": manifest.len(),
                "platform": { "os": "linux", "architecture": oci::architecture() },
                "annotations": { "org.opencontainers.image.ref.name": commit.flavour() },
            }],
        }))?;
        let mut put = |name: &str, bytes: &[u8]| write::file(to, name, &mut { bytes }, bytes.len() as u64);
        put(oci::LAYOUT, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        put(oci::INDEX, &index)?;
        put(&format!("blobs/sha256/{}", manifest_digest.hex()), &manifest)?;
        put(&format!("blobs/sha256/{}", config_digest.hex()), &config)?;
        write::file(to, &format!("blobs/sha256/{}", layer_digest.hex()), &mut layer, layer_bytes)?;
        write::end(to)
    }
}

/// Passes on what is written, with its digest and length.
struct Hashing<W> {
    to: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> Hashing<W> {
    fn new(to: W) -> Self {
        Self { to, hash: Sha256::new(), bytes: 0 }
    }

    fn finish(self) -> (W, Digest, u64) {
        (self.to, Digest::new(self.hash.finalize().into()), self.bytes)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.to.write(bytes)?;
        self.hash.update(bytes.get(..len).unwrap_or_default());
        self.bytes += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}
