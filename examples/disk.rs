//! Writable disks from the storage library alone, by any of its back ends:
//! makes them, prints a line of JSON for each, waits for the end of its input,
//! and removes them. With `--keep` they stay, and the next run finds them.
//!
//! `cargo run --release --example disk -- --backend qcow2 --base FILE --store DIR`
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{
    fs::File,
    io::Read as _,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use qvd::core::{Bytes, Digest, RootPolicy};
use qvd::storage::{BaseDisk, DiskBackend, DiskBackends, DiskFormat, DiskId, DiskOptions, Place};
use serde_json::json;
use sha2::{Digest as _, Sha256};

struct Options {
    backend: String,
    base: PathBuf,
    store: PathBuf,
    size: Option<Bytes>,
    grow: Option<Bytes>,
    count: u32,
    keep: bool,
}

fn main() -> Result<()> {
    let options = Options::parse()?;
    let place = Place::for_disks(&options.store)?;
    let backend = DiskBackends::built_in().make(&options.backend, place.clone())?;
    let capabilities = backend.capabilities()?;
    let file = options.base.canonicalize().with_context(|| format!("base `{}`", options.base.display()))?;
    // An image is known by a digest of its content; here its place has to do.
    let digest = Digest::new(Sha256::digest(file.as_os_str().as_bytes()).into());
    let format = format_of(&file)?;
    let base = BaseDisk::new(digest, file, format);
    let policy = if options.keep { RootPolicy::Persistent } else { RootPolicy::Volatile };
    let wanted = DiskOptions { policy, size: options.size };
    forget_volatile(backend.as_ref())?;

    let mut disks = Vec::new();
    for number in 1..=options.count {
        let id: DiskId = number.to_string().parse()?;
        let began = Instant::now();
        let disk = backend.create(&base, &id, &wanted)?;
        let device = disk.attach()?;
        let create_us = began.elapsed().as_micros();
        if let Some(size) = options.grow {
            disk.resize(size)?;
        }
        let report = disk.check()?;
        let line = json!({
            "id": id,
            "device": device.path,
            "format": device.format,
            "size": report.size,
            "used": report.used,
            "errors": report.errors,
            "leaks": report.leaks,
            "create_us": create_us,
            "capabilities": capabilities,
        });
        println!("{line}");
        disks.push(disk);
    }

    std::io::stdin().read_to_end(&mut Vec::new())?;
    for disk in &mut disks {
        // A volatile disk is forgotten at this, a persistent one kept.
        disk.close()?;
    }
    // Their files go in the background; without this, at the next start.
    Ok(place.finish_discarding()?)
}

/// The person who names a base here trusts it, so its beginning may say what it
/// is. A service has to know: a guest could write such a beginning on a raw disk.
fn format_of(file: &Path) -> Result<DiskFormat> {
    let mut magic = [0; 4];
    let read = File::open(file).and_then(|mut file| file.read(&mut magic)).context("cannot read the base")?;
    Ok(if read == 4 && &magic == b"QFI\xfb" { DiskFormat::Qcow2 } else { DiskFormat::Raw })
}

/// Removes what an earlier run left that was killed.
fn forget_volatile(backend: &dyn DiskBackend) -> Result<()> {
    for (id, policy) in backend.disks()? {
        if policy == RootPolicy::Volatile {
            backend.remove(&id)?;
        }
    }
    Ok(())
}

fn bytes(option: &str, value: &str) -> Result<Bytes> {
    Ok(Bytes::new(value.parse().with_context(|| format!("`{option}` is a number of bytes"))?))
}

impl Options {
    fn parse() -> Result<Self> {
        let usage =
            "usage: disk --backend NAME --base FILE --store DIR [--size BYTES] [--grow BYTES] [--count N] [--keep]";
        let mut options = Self {
            backend: String::new(),
            base: PathBuf::new(),
            store: PathBuf::new(),
            size: None,
            grow: None,
            count: 1,
            keep: false,
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("`{arg}` needs a value; {usage}"));
            match arg.as_str() {
                "--backend" => options.backend = value()?,
                "--base" => options.base = value()?.into(),
                "--store" => options.store = value()?.into(),
                "--size" => options.size = Some(bytes(&arg, &value()?)?),
                "--grow" => options.grow = Some(bytes(&arg, &value()?)?),
                "--count" => options.count = value()?.parse().context("`--count` is a number")?,
                "--keep" => options.keep = true,
                _ => bail!("unknown argument `{arg}`; {usage}"),
            }
        }
        if options.backend.is_empty() || options.base == Path::new("") || options.store == Path::new("") {
            bail!(usage);
        }
        Ok(options)
    }
}
