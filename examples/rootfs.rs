//! Writable roots from the storage library alone, by any of its back ends:
//! makes them, prints a line of JSON for each, waits for the end of its input,
//! and removes them. With `--keep` they stay, and the next run finds them.
//!
//! As root: `cargo run --release --example rootfs -- --backend overlayfs --base DIR --store DIR`
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{
    fs,
    io::Read as _,
    os::{fd::AsFd as _, unix::ffi::OsStrExt as _},
    path::{Path, PathBuf},
    process,
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use qvd::core::{Bytes, Digest, RootPolicy};
use qvd::storage::{Backends, BaseTree, Btrfs, Place, Quota, RootBackend, RootId, RootOptions};
use qvd_sys::mount::{attach, open_dir_path};
use serde_json::json;
use sha2::{Digest as _, Sha256};

struct Options {
    backend: String,
    base: PathBuf,
    store: PathBuf,
    quota: Quota,
    count: u32,
    keep: bool,
}

fn main() -> Result<()> {
    let options = Options::parse()?;
    // Roots are descriptors; only to be seen from outside are they attached to
    // directories, in a mount namespace that ends with this process.
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    let stage = tempfile::tempdir()?;

    let place = Place::open(&options.store)?;
    if options.backend == "btrfs" && options.quota.bytes.is_some() {
        // An administrator's decision: it holds for the whole file system.
        Btrfs::new(place.clone()).enable_simple_quota()?;
    }
    let backend = Backends::built_in().make(&options.backend, place.clone())?;
    let capabilities = backend.capabilities()?;
    let directory = options.base.canonicalize().with_context(|| format!("base `{}`", options.base.display()))?;
    // An image is known by a digest of its content; here its place has to do.
    let digest = Digest::new(Sha256::digest(directory.as_os_str().as_bytes()).into());
    let base = BaseTree::new(digest, directory);
    let policy = if options.keep { RootPolicy::Persistent } else { RootPolicy::Volatile };
    let wanted = RootOptions { policy, quota: options.quota };
    forget_volatile(backend.as_ref())?;

    let mut roots = Vec::new();
    for number in 1..=options.count {
        let id: RootId = number.to_string().parse()?;
        let began = Instant::now();
        let root = backend.create(&base, &id, &wanted)?;
        let tree = root.mount(None)?;
        let create_us = began.elapsed().as_micros();
        let seen = stage.path().join(id.as_str());
        fs::create_dir(&seen)?;
        attach(tree.as_fd(), open_dir_path(&seen)?.as_fd())?;
        let line = json!({
            "id": id,
            "pid": process::id(),
            "path": format!("/proc/{}/root{}", process::id(), seen.display()),
            "create_us": create_us,
            "capabilities": capabilities,
        });
        println!("{line}");
        roots.push((root, seen));
    }

    std::io::stdin().read_to_end(&mut Vec::new())?;
    for (root, seen) in &mut roots {
        umount2(seen.as_path(), MntFlags::MNT_DETACH)?;
        // A volatile root is forgotten at this, a persistent one kept.
        root.close()?;
    }
    // Their files go in the background; without this, at the next start.
    Ok(place.finish_discarding()?)
}

/// Removes what an earlier run left that was killed.
fn forget_volatile(backend: &dyn RootBackend) -> Result<()> {
    for (id, policy) in backend.roots()? {
        if policy == RootPolicy::Volatile {
            backend.remove(&id)?;
        }
    }
    Ok(())
}

fn number<N: std::str::FromStr>(option: &str, value: &str, of: &str) -> Result<N> {
    value.parse::<N>().ok().with_context(|| format!("`{option}` is a number of {of}, not `{value}`"))
}

impl Options {
    fn parse() -> Result<Self> {
        let usage =
            "usage: rootfs --backend NAME --base DIR --store DIR [--size BYTES] [--inodes N] [--count N] [--keep]";
        let mut options = Self {
            backend: String::new(),
            base: PathBuf::new(),
            store: PathBuf::new(),
            quota: Quota::default(),
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
                "--size" => options.quota.bytes = Some(Bytes::new(number(&arg, &value()?, "bytes")?)),
                "--inodes" => options.quota.inodes = Some(number(&arg, &value()?, "files")?),
                "--count" => options.count = number(&arg, &value()?, "roots")?,
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
