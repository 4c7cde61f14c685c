//! Layers of a base, opened.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::Path,
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak},
};

use qvd_sys::mount::{self, FsContext, MountError, Restrictions};
use rustix::io::Errno;

use super::Layer;

const READ_ONLY: Restrictions = Restrictions { read_only: true, nosuid: false, nodev: true, noexec: false };

/// A layer as a detached read-only mount.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) mount: OwnedFd,
    /// Whether it is content that other layers redirect to.
    pub(crate) data: bool,
}

/// Opens a layer; with `idmap`, owners show shifted by its maps.
pub(crate) fn open(layer: &Layer, idmap: Option<BorrowedFd<'_>>) -> Result<Opened, MountError> {
    let failed = |error| MountError::new(format!("open layer `{}`", layer.path().display()), error);
    let mount = match layer {
        Layer::Dir(path) | Layer::Data(path) => {
            let dir = mount::open_dir_path(path).map_err(failed)?;
            mount::clone_dir(dir.as_fd()).map_err(failed)?
        }
        Layer::Erofs(path) => {
            let whole = erofs(path)?;
            match mount::clone_dir(whole.as_fd()) {
                Ok(mount) => mount,
                // Linux before 6.15 clones nothing that is in no namespace.
                Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                    mount_erofs(&File::open(path).map_err(failed)?)?
                }
                Err(error) => return Err(failed(error)),
            }
        }
    };
    mount::restrict(mount.as_fd(), READ_ONLY, idmap).map_err(failed)?;
    Ok(Opened { mount, data: matches!(layer, Layer::Data(_)) })
}

/// The image files among these layers, mounted: held, they stay shared with
/// whoever opens one of them meanwhile.
pub(crate) fn images(layers: &[Layer]) -> Result<Vec<Arc<OwnedFd>>, MountError> {
    let images = layers.iter().filter_map(|layer| match layer {
        Layer::Erofs(path) => Some(erofs(path)),
        _ => None,
    });
    images.collect()
}

/// The file systems that are in use, by device and number of their file: who
/// opens one that another has open gets the same, and with it the page cache.
type Known = Mutex<HashMap<(u64, u64), Weak<OwnedFd>>>;

fn erofs(path: &Path) -> Result<Arc<OwnedFd>, MountError> {
    static KNOWN: OnceLock<Known> = OnceLock::new();
    let failed = |error| MountError::new(format!("open layer `{}`", path.display()), error);
    let file = File::options().read(true).custom_flags(libc_nofollow()).open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    let key = (meta.dev(), meta.ino());
    let mut known = KNOWN.get_or_init(Known::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(mount) = known.get(&key).and_then(Weak::upgrade) {
        return Ok(mount);
    }
    let mount = Arc::new(mount_erofs(&file)?);
    known.retain(|_, mount| mount.strong_count() > 0);
    known.insert(key, Arc::downgrade(&mount));
    Ok(mount)
}

/// `O_NOFOLLOW` as the standard library takes it.
fn libc_nofollow() -> i32 {
    rustix::fs::OFlags::NOFOLLOW.bits().cast_signed()
}

/// Mounts an image file without a loop device, named by its descriptor: it is
/// the file that was opened, and its path may be longer than the kernel reads.
fn mount_erofs(file: &File) -> Result<OwnedFd, MountError> {
    let context = FsContext::open("erofs")?;
    context.set("source", &format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    context.mount(READ_ONLY)
}

/// Stacks layers for reading, uppermost first. One alone is itself. With
/// `idmap`, owners show shifted by its maps.
pub(crate) fn stack(layers: &[Layer], idmap: Option<BorrowedFd<'_>>) -> Result<OwnedFd, MountError> {
    let mut opened = layers.iter().map(|layer| open(layer, idmap)).collect::<Result<Vec<_>, _>>()?;
    match opened.len() {
        0 => return Err(MountError::new("stack no layers", Errno::INVAL.into())),
        1 if !opened.iter().any(|layer| layer.data) => return Ok(opened.remove(0).mount),
        _ => {}
    }
    let try_stack = |metacopy: &str| {
        let context = FsContext::open("overlay")?;
        for layer in &opened {
            context.set_fd(if layer.data { "datadir+" } else { "lowerdir+" }, layer.mount.as_fd())?;
        }
        context.set("metacopy", metacopy)?;
        context.set("redirect_dir", "follow")?;
        context.mount(READ_ONLY)
    };
    match try_stack("off") {
        // Linux before 6.16 follows a redirect to content with it alone.
        Err(error) if opened.iter().any(|layer| layer.data) && is_invalid(&error) => try_stack("on"),
        done => done,
    }
}

/// Whether the kernel said that the options make no sense.
pub(crate) fn is_invalid(error: &MountError) -> bool {
    error.io().kind() == io::ErrorKind::InvalidInput
}
