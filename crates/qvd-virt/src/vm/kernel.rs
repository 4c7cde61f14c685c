//! The kernel that a guest boots, and the initramfs made for it: the init, and
//! the modules that a machine of virtio devices needs.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::CStr,
    fs::File,
    io::{self, Read as _},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use qvd_sys::process::seal;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use super::cpio::Archive;
use crate::{Error, error::io_error};

/// Modules that a guest loads, in this order, each after what it depends on.
/// `crc32c_generic` is asked for by name when erofs and ext4 load, which no
/// list of dependencies shows.
const WANTED: [(&str, bool); 16] = [
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
    ("vmgenid", false),
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
    /// Looks for the newest kernel with modules in the tree `top`, as Debian
    /// and others lay them out: `boot/vmlinuz-VERSION`, `lib/modules/VERSION`;
    /// or `vmlinuz` beside `lib`. Makes an initramfs with the static program `init`.
    ///
    /// The tree may be an image's: links in it lead nowhere else.
    ///
    /// # Errors
    /// There is none, something cannot be read, or the kernel lacks what a
    /// guest needs.
    pub fn find(top: &Path, init: &Path) -> Result<Self, Error> {
        let tree = Tree::open(top)?;
        let (kernel, modules) = tree.locate().ok_or_else(|| Error::Invalid {
            what: format!("`{}`", top.display()),
            reason: "no kernel with its modules is in it (boot/vmlinuz-VERSION and lib/modules/VERSION)",
        })?;
        let text = |name: &str| Ok(String::from_utf8_lossy(&tree.read(&modules.join(name))?).into_owned());
        let list = Modules::parse(&text("modules.dep")?, &text("modules.builtin")?);
        let mut archive = Archive::new();
        for dir in ["dev", "proc", "sys", "modules", "base", "disk", "root"] {
            archive.directory(dir, 0o755);
        }
        let program = File::open(init).map_err(io_error(format!("open `{}`", init.display())))?;
        archive.file("init", 0o755, &read(program, init)?);
        for (index, module) in list.pick(&WANTED)?.iter().enumerate() {
            let name = Path::new(module).file_name().map(|name| name.to_string_lossy().into_owned());
            // The name sorts as it is to be loaded.
            let name = format!("modules/{index:02}-{}", name.unwrap_or_default());
            archive.file(&name, 0o644, &tree.read(&modules.join(module))?);
        }
        let version = modules.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self {
            kernel: sealed(c"qvd-kernel", &tree.read(&kernel)?)?,
            initramfs: sealed(c"qvd-initramfs", &archive.finish())?,
            version,
        })
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

/// A tree that is read without leaving it.
struct Tree {
    top: OwnedFd,
    name: PathBuf,
}

impl Tree {
    fn open(name: &Path) -> Result<Self, Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top = rustix::fs::open(name, flags, Mode::empty());
        Ok(Self { top: top.map_err(io_error(format!("open `{}`", name.display())))?, name: name.to_owned() })
    }

    fn file(&self, path: &Path) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(openat2(&self.top, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)?.into())
    }

    fn is_file(&self, path: &Path) -> bool {
        self.file(path).and_then(|file| file.metadata()).is_ok_and(|about| about.is_file())
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>, Error> {
        let shown = self.name.join(path);
        read(self.file(path).map_err(io_error(format!("open `{}`", shown.display())))?, &shown)
    }

    fn locate(&self) -> Option<(PathBuf, PathBuf)> {
        let modules = Path::new("lib/modules");
        let mut versions: Vec<_> = rustix::fs::Dir::new(self.file(modules).ok()?)
            .ok()?
            .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
            .filter(|name| !name.starts_with('.'))
            .collect();
        // By their numbers: 6.1.0-56 is newer than 6.1.0-9.
        versions.sort_by_cached_key(|name| {
            let numbers = name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse::<u64>().ok());
            (numbers.collect::<Vec<_>>(), name.clone())
        });
        versions.into_iter().rev().find_map(|version| {
            let modules = modules.join(&version);
            let kernel = [PathBuf::from(format!("boot/vmlinuz-{version}")), PathBuf::from("vmlinuz")];
            let kernel = kernel.into_iter().find(|path| self.is_file(path))?;
            self.is_file(&modules.join("modules.dep")).then_some((kernel, modules))
        })
    }
}

fn read(file: File, shown: &Path) -> Result<Vec<u8>, Error> {
    let op = || format!("read `{}`", shown.display());
    let about = file.metadata().map_err(io_error(op()))?;
    let refuse = |reason| Err(Error::Invalid { what: format!("`{}`", shown.display()), reason });
    if !about.is_file() {
        return refuse("it is no file");
    }
    if about.len() > MAX_FILE {
        return refuse("it is larger than 128 MiB");
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes).map_err(io_error(op()))?;
    Ok(bytes)
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
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn locate(top: &Path) -> Option<(PathBuf, PathBuf)> {
        Tree::open(top).unwrap().locate()
    }

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

    #[test]
    fn links_of_an_image_lead_nowhere_else() {
        let top = tempfile::tempdir().unwrap();
        let modules = top.path().join("usr/lib/modules/6.1.0");
        fs::create_dir_all(&modules).unwrap();
        fs::create_dir(top.path().join("boot")).unwrap();
        fs::write(modules.join("modules.dep"), "").unwrap();
        // As of a merged /usr, but absolute: still within the tree.
        symlink("/usr/lib", top.path().join("lib")).unwrap();
        symlink("/etc/passwd", top.path().join("boot/vmlinuz-6.1.0")).unwrap();
        assert!(locate(top.path()).is_none());
        fs::create_dir(top.path().join("etc")).unwrap();
        fs::write(top.path().join("etc/passwd"), "inside").unwrap();
        assert!(locate(top.path()).is_some());
        assert_eq!(Tree::open(top.path()).unwrap().read(Path::new("boot/vmlinuz-6.1.0")).unwrap(), b"inside");
    }
}
