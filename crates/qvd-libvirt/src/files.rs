//! What a specification has as descriptors, by names that libvirt can open.

use std::{
    fs::{self, File, Permissions},
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd},
        unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

use qvd_virt::{
    io_error,
    vm::{Boot, DiskFormat, VmSpec},
};

use crate::Error;

/// Names of what a domain consists of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Files {
    /// The kernel and its initramfs, or the firmware and its variables.
    pub boot: Option<(PathBuf, PathBuf)>,
    /// What it reads from.
    pub base: Option<PathBuf>,
    /// Its disks, each with what it is an overlay on.
    pub disks: Vec<(PathBuf, Option<PathBuf>)>,
    /// Its taps.
    pub taps: Vec<String>,
}

/// Files that are made for a domain, and its sockets.
const MADE: [&str; 5] = ["kernel", "initramfs", "variables", "link.sock", "console.sock"];

impl Files {
    /// Finds the names of the descriptors of `spec`. A kernel is copied into the
    /// domain's directory, because libvirt gives it to the user that the domain
    /// runs as; so are the variables of a firmware.
    ///
    /// # Errors
    /// A disk has no name any more, or a tap is not to stay without us; what was
    /// copied is removed.
    pub fn make(spec: &VmSpec) -> Result<Self, Error> {
        Self::collect(spec).inspect_err(|_| {
            if let Err(error) = Self::remove(&spec.dir) {
                tracing::warn!(%error, "files left behind");
            }
        })
    }

    fn collect(spec: &VmSpec) -> Result<Self, Error> {
        let boot = match &spec.boot {
            Boot::Kernel { kernel, initramfs, .. } => {
                Some((copy(kernel.as_fd(), &spec.dir, "kernel")?, copy(initramfs.as_fd(), &spec.dir, "initramfs")?))
            }
            Boot::Uefi { code, variables } => {
                Some((name_of(code.as_fd(), "the firmware")?, copy(variables.as_fd(), &spec.dir, "variables")?))
            }
            _ => None,
        };
        let base = spec.base.as_ref().map(|base| name_of(base.file.as_fd(), "the base")).transpose()?;
        let mut disks = Vec::new();
        for disk in &spec.disks {
            let file = name_of(disk.file.as_fd(), &format!("disk {:?}", disk.serial))?;
            if matches!(disk.format, DiskFormat::Qcow2 { .. }) {
                is_whole(disk.file.as_fd(), &disk.serial)?;
            }
            let backing = match &disk.format {
                DiskFormat::Qcow2 { backing: Some(backing) } => {
                    Some(name_of(backing.file.as_fd(), &format!("what disk {:?} is on", disk.serial))?)
                }
                _ => None,
            };
            disks.push((file, backing));
        }
        let taps = spec.nics.iter().map(|nic| tap_name(nic.tap.as_fd())).collect::<Result<_, _>>()?;
        Ok(Self { boot, base, disks, taps })
    }

    /// Removes what was made in a domain's directory. What is not there is gone.
    ///
    /// # Errors
    /// Something cannot be removed; the rest has been.
    pub fn remove(dir: &Path) -> Result<(), Error> {
        let mut failed = Ok(());
        for path in MADE.map(|name| dir.join(name)) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    failed = Err(io_error(format!("remove `{}`", path.display()))(error).into());
                }
                _ => {}
            }
        }
        failed
    }
}

fn own(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn copy(from: BorrowedFd<'_>, dir: &Path, name: &str) -> Result<PathBuf, Error> {
    let path = dir.join(name);
    let write = || {
        // Opened anew: with an offset of its own.
        io::copy(&mut File::open(own(from))?, &mut File::create(&path)?)?;
        fs::set_permissions(&path, Permissions::from_mode(0o600))
    };
    write().map_err(io_error(format!("write `{}`", path.display())))?;
    Ok(path)
}

/// A name by which the very file of a descriptor can be opened.
fn name_of(fd: BorrowedFd<'_>, what: &str) -> Result<PathBuf, Error> {
    let path = fs::read_link(own(fd)).map_err(io_error(format!("look for the name of {what}")))?;
    let own = File::from(fd.try_clone_to_owned().map_err(io_error(format!("look at {what}")))?);
    let own = own.metadata().map_err(io_error(format!("look at {what}")))?;
    match fs::metadata(&path) {
        Ok(named) if (named.dev(), named.ino()) == (own.dev(), own.ino()) => Ok(path),
        _ => Err(Error::Invalid {
            what: format!("{what} (`{}`)", path.display()),
            reason: "libvirt opens files by their names, and this one has none",
        }),
    }
}

/// Refuses an image whose header names a file for its data: libvirt would have
/// QEMU open that, whatever it is.
///
/// Source: QEMU docs/interop/qcow2.txt: at 0 `QFI\xfb`, at 4 the version, at 72 from
/// version 3 on what a reader has to know, of which bit 2 is an external data file.
fn is_whole(file: BorrowedFd<'_>, serial: &str) -> Result<(), Error> {
    let mut head = [0; 80];
    let file = file.try_clone_to_owned().map(File::from);
    let read = file.and_then(|file| file.read_exact_at(&mut head, 0));
    let refuse = |reason| Err(Error::Invalid { what: format!("disk {serial:?}"), reason });
    match read {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return refuse("it is no image of qcow2"),
        other => other.map_err(io_error(format!("read disk {serial:?}")))?,
    }
    if !head.starts_with(b"QFI\xfb") {
        return refuse("it is no image of qcow2");
    }
    let external = head[7] >= 3 && head[79] & 4 != 0;
    if external { refuse("its data is in another file that its header names") } else { Ok(()) }
}

/// The name of an attached tap, as its descriptor says.
fn tap_name(fd: BorrowedFd<'_>) -> Result<String, Error> {
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let about = fs::read_to_string(&path).map_err(io_error("look for the name of a tap"))?;
    let name = about.lines().find_map(|line| line.strip_prefix("iff:")).map(str::trim).unwrap_or_default();
    if name.is_empty() {
        let reason = "give a descriptor of /dev/net/tun that is attached";
        return Err(Error::Invalid { what: "an interface that is no tap".to_owned(), reason });
    }
    Ok(name.to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_a_name_is_refused_and_one_with_another_name_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = File::create(&path).unwrap();
        assert_eq!(name_of(file.as_fd(), "disk").unwrap(), path);
        fs::rename(&path, dir.path().join("other")).unwrap();
        assert_eq!(name_of(file.as_fd(), "disk").unwrap(), dir.path().join("other"));
        fs::remove_file(dir.path().join("other")).unwrap();
        let error = name_of(file.as_fd(), "disk \"root\"").unwrap_err().to_string();
        assert!(error.contains("disk \"root\"") && error.contains("has none"), "{error}");
        // What has taken its name meanwhile is another.
        fs::write(&path, "another").unwrap();
        assert!(name_of(file.as_fd(), "disk").is_err());
    }

    #[test]
    fn an_image_that_keeps_its_data_elsewhere_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let verdict = |head: &[u8]| {
            fs::write(&path, head).unwrap();
            is_whole(File::open(&path).unwrap().as_fd(), "root").map_err(|error| error.to_string())
        };
        let mut head = [0; 112];
        head[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        verdict(&head).unwrap();
        head[79] = 4;
        assert!(verdict(&head).unwrap_err().contains("another file"));
        // In version 2 there is something else at that place.
        head[7] = 2;
        verdict(&head).unwrap();
        for none in [&b"QFI\xfb"[..], &[0; 200]] {
            assert!(verdict(none).unwrap_err().contains("no image of qcow2"));
        }
    }

    #[test]
    fn what_is_no_tap_is_no_interface() {
        let error = tap_name(File::open("/dev/null").unwrap().as_fd()).unwrap_err().to_string();
        assert!(error.contains("no tap"), "{error}");
    }
}
