//! The kernel that a guest boots, and the initramfs made for it: the init, and
//! the modules that a machine of virtio devices needs.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::CStr,
    fs,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use qvd_sys::process::seal;

use super::cpio::Archive;
use crate::{Error, error::io_error};

/// Modules that a guest loads, in this order, each after what it depends on.
/// `crc32c_generic` is asked for by name when erofs and ext4 load, which no
/// list of dependencies shows.
const WANTED: [(&str, bool); 15] = [
    ("virtio_pci", true),
    ("virtio_console", true),
    ("crc32c_generic", true),
    ("virtio_pmem", true),
    ("nd_pmem", true),
    ("erofs", true),
    ("overlay", true),
    ("virtio_blk", true),
    ("ext4", true),
    ("virtio_net", false),
    ("virtio_balloon", false),
    ("virtio_rng", false),
    ("af_packet", false),
    ("ipv6", false),
    ("button", false),
];

/// Largest kernel, module or list that is read, in bytes.
const MAX_FILE: u64 = 128 << 20;

/// A kernel with its initramfs, both in sealed memory files that all guests
/// are started from.
#[derive(Debug)]
pub struct GuestKernel {
    kernel: OwnedFd,
    initramfs: OwnedFd,
    version: String,
}

impl GuestKernel {
    /// Takes the kernel image `kernel` and its `modules` (a directory that has
    /// `modules.dep`), and makes an initramfs with the static program `init`.
    ///
    /// # Errors
    /// Something cannot be read, or the kernel lacks what a guest needs.
    pub fn load(kernel: &Path, modules: &Path, init: &Path) -> Result<Self, Error> {
        let list = Modules::read(modules)?;
        let mut archive = Archive::new();
        for dir in ["dev", "proc", "sys", "modules", "base", "disk", "root"] {
            archive.directory(dir, 0o755);
        }
        archive.file("init", 0o755, &read(init)?);
        for (index, module) in list.pick(&WANTED)?.iter().enumerate() {
            let name = Path::new(module).file_name().map(|name| name.to_string_lossy().into_owned());
            // The name sorts as it is to be loaded.
            let name = format!("modules/{index:02}-{}", name.unwrap_or_default());
            archive.file(&name, 0o644, &read(&modules.join(module))?);
        }
        let version = modules.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self {
            kernel: sealed(c"qvd-kernel", &read(kernel)?)?,
            initramfs: sealed(c"qvd-initramfs", &archive.finish())?,
            version,
        })
    }

    /// Looks for the newest kernel with modules below `top`, as Debian and
    /// others lay them out: `boot/vmlinuz-VERSION`, `lib/modules/VERSION`; or
    /// `vmlinuz` beside `lib`.
    ///
    /// # Errors
    /// There is none, or as [`GuestKernel::load`].
    pub fn find(top: &Path, init: &Path) -> Result<Self, Error> {
        let (kernel, modules) = locate(top).ok_or_else(|| Error::Invalid {
            what: format!("`{}`", top.display()),
            reason: "no kernel with its modules is in it (boot/vmlinuz-VERSION and lib/modules/VERSION)",
        })?;
        Self::load(&kernel, &modules, init)
    }

    /// The kernel image.
    #[must_use]
    pub fn kernel(&self) -> BorrowedFd<'_> {
        self.kernel.as_fd()
    }

    /// The initramfs.
    #[must_use]
    pub fn initramfs(&self) -> BorrowedFd<'_> {
        self.initramfs.as_fd()
    }

    /// What the directory of its modules is called.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }
}

fn locate(top: &Path) -> Option<(PathBuf, PathBuf)> {
    let versions = fs::read_dir(top.join("lib/modules")).ok()?;
    let mut versions: Vec<_> = versions.filter_map(|entry| Some(entry.ok()?.path())).collect();
    // By their numbers: 6.1.0-56 is newer than 6.1.0-9.
    versions.sort_by_cached_key(|path| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let numbers = name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse::<u64>().ok());
        (numbers.collect::<Vec<_>>(), name)
    });
    versions.into_iter().rev().filter(|modules| modules.join("modules.dep").is_file()).find_map(|modules| {
        let version = modules.file_name()?.to_string_lossy().into_owned();
        let kernel = [top.join(format!("boot/vmlinuz-{version}")), top.join("vmlinuz")];
        Some((kernel.into_iter().find(|path| path.is_file())?, modules))
    })
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let op = format!("read `{}`", path.display());
    let length = fs::metadata(path).map_err(io_error(op.clone()))?.len();
    if length > MAX_FILE {
        return Err(Error::Invalid { what: format!("`{}`", path.display()), reason: "it is larger than 128 MiB" });
    }
    fs::read(path).map_err(io_error(op))
}

fn sealed(name: &CStr, bytes: &[u8]) -> Result<OwnedFd, Error> {
    seal(name, bytes).map_err(io_error("keep the guest's kernel in memory"))
}

/// What a kernel has as modules, and what it has built in.
#[derive(Debug, Default)]
struct Modules {
    /// Path of a module to those that it needs, the closest first.
    needs: BTreeMap<String, Vec<String>>,
    /// Name of a module to its path.
    paths: BTreeMap<String, String>,
    built_in: BTreeSet<String>,
}

impl Modules {
    fn read(dir: &Path) -> Result<Self, Error> {
        let text = |name: &str| Ok(String::from_utf8_lossy(&read(&dir.join(name))?).into_owned());
        Ok(Self::parse(&text("modules.dep")?, &text("modules.builtin")?))
    }

    fn parse(dependencies: &str, built_in: &str) -> Self {
        let mut modules = Self { built_in: built_in.lines().map(name_of).collect(), ..Self::default() };
        for (path, needs) in dependencies.lines().filter_map(|line| line.split_once(':')) {
            modules.paths.insert(name_of(path), path.to_owned());
            modules.needs.insert(path.to_owned(), needs.split_ascii_whitespace().map(ToOwned::to_owned).collect());
        }
        modules
    }

    /// Paths of the wanted modules and all they need, in an order to load
    /// them. Absolute paths and `..` would lead out of the modules' directory.
    fn pick(&self, wanted: &[(&str, bool)]) -> Result<Vec<String>, Error> {
        let mut picked: Vec<String> = Vec::new();
        for &(name, required) in wanted {
            let Some(path) = self.paths.get(name) else {
                if required && !self.built_in.contains(name) {
                    let reason = "the guest's kernel has it neither built in nor as a module";
                    return Err(Error::Invalid { what: format!("module {name}"), reason });
                }
                continue;
            };
            // The list of needs is closed; what is needed most comes last.
            let needs = self.needs.get(path).into_iter().flatten().rev();
            for path in needs.chain([path]) {
                if path.starts_with('/') || path.split('/').any(|part| part == "..") {
                    let reason = "a path of the kernel's modules stays below their directory";
                    return Err(Error::Invalid { what: format!("module `{path}`"), reason });
                }
                if !picked.contains(path) {
                    picked.push(path.clone());
                }
            }
        }
        Ok(picked)
    }
}

/// `kernel/fs/erofs/erofs.ko.xz` is `erofs`; dashes and underscores are one.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko\n\
        kernel/drivers/virtio/virtio_ring.ko:\n\
        kernel/drivers/char/virtio-console.ko.xz: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko\n\
        kernel/fs/erofs/erofs.ko: kernel/lib/libcrc32c.ko\nkernel/lib/libcrc32c.ko:\n";

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let modules = Modules::parse(DEPENDENCIES, "kernel/fs/overlayfs/overlay.ko\n");
        let wanted = [("virtio_console", true), ("overlay", true), ("virtio", true), ("button", false)];
        assert_eq!(
            modules.pick(&wanted).unwrap(),
            [
                "kernel/drivers/virtio/virtio_ring.ko",
                "kernel/drivers/virtio/virtio.ko",
                "kernel/drivers/char/virtio-console.ko.xz"
            ]
        );
    }

    #[test]
    fn what_a_guest_cannot_do_without_is_named() {
        let modules = Modules::parse(DEPENDENCIES, "");
        let error = modules.pick(&[("overlay", true)]).unwrap_err().to_string();
        assert!(error.contains("module overlay"), "{error}");
    }

    #[test]
    fn a_list_that_leads_elsewhere_is_refused() {
        for path in ["/etc/shadow.ko", "kernel/../../../etc/x.ko"] {
            let modules = Modules::parse(&format!("{path}:\n"), "");
            let name = name_of(path);
            assert!(modules.pick(&[(&name, true)]).is_err(), "{path}");
        }
    }

    #[test]
    fn the_newest_kernel_with_modules_is_found() {
        let top = tempfile::tempdir().unwrap();
        assert!(locate(top.path()).is_none());
        for version in ["6.1.0-9-amd64", "6.1.0-56-amd64", "6.12.0-no-kernel"] {
            let modules = top.path().join("lib/modules").join(version);
            fs::create_dir_all(&modules).unwrap();
            fs::write(modules.join("modules.dep"), "").unwrap();
        }
        fs::create_dir(top.path().join("boot")).unwrap();
        for version in ["6.1.0-9-amd64", "6.1.0-56-amd64"] {
            fs::write(top.path().join("boot").join(format!("vmlinuz-{version}")), "").unwrap();
        }
        let (kernel, modules) = locate(top.path()).unwrap();
        assert!(kernel.ends_with("boot/vmlinuz-6.1.0-56-amd64"));
        assert!(modules.ends_with("6.1.0-56-amd64"));
    }
}
