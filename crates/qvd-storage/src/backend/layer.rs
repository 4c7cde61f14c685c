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

use qvd_sys::{
    loopdev::LoopDevice,
    mount::{self, FsContext, MountError, Restrictions},
};
use rustix::{
    fs::{Mode, OFlags, mkdirat, openat},
    io::Errno,
};

use super::Layer;

const READ_ONLY: Restrictions = Restrictions { read_only: true, nosuid: false, nodev: true, noexec: false };

/// A layer as a detached read-only mount.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) mount: OwnedFd,
    /// Whether it is content that other layers redirect to.
    pub(crate) data: bool,
}

/// An image file, mounted.
#[derive(Debug)]
pub(crate) struct Image {
    mount: OwnedFd,
    /// What is below it, where the kernel mounts no plain file.
    device: Option<LoopDevice>,
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
            match (mount::clone_dir(whole.mount.as_fd()), &whole.device) {
                (Ok(mount), _) => mount,
                // Linux before 6.15 clones nothing that is in no namespace.
                (Err(error), device) if Errno::from_io_error(&error) == Some(Errno::INVAL) => match device {
                    Some(device) => mount_erofs(device.path())?,
                    None => mount_file(&File::open(path).map_err(failed)?)?.mount,
                },
                (Err(error), _) => return Err(failed(error)),
            }
        }
    };
    mount::restrict(mount.as_fd(), READ_ONLY, idmap).map_err(failed)?;
    Ok(Opened { mount, data: matches!(layer, Layer::Data(_)) })
}

/// The image files among these layers, mounted: held, they stay shared with
/// whoever opens one of them meanwhile.
pub(crate) fn images(layers: &[Layer]) -> Result<Vec<Arc<Image>>, MountError> {
    let images = layers.iter().filter_map(|layer| match layer {
        Layer::Erofs(path) => Some(erofs(path)),
        _ => None,
    });
    images.collect()
}

/// The file systems that are in use, by device and number of their file: who
/// opens one that another has open gets the same, and with it the page cache.
type Known = Mutex<HashMap<(u64, u64), Weak<Image>>>;

fn erofs(path: &Path) -> Result<Arc<Image>, MountError> {
    static KNOWN: OnceLock<Known> = OnceLock::new();
    let failed = |error| MountError::new(format!("open layer `{}`", path.display()), error);
    let file = File::options().read(true).custom_flags(libc_nofollow()).open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    let key = (meta.dev(), meta.ino());
    let mut known = KNOWN.get_or_init(Known::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(image) = known.get(&key).and_then(Weak::upgrade) {
        return Ok(image);
    }
    let image = mount_file(&file).map_err(|error| error.about(&format!("image `{}`", path.display())))?;
    let image = Arc::new(image);
    known.retain(|_, image| image.strong_count() > 0);
    known.insert(key, Arc::downgrade(&image));
    Ok(image)
}

/// `O_NOFOLLOW` as the standard library takes it.
fn libc_nofollow() -> i32 {
    OFlags::NOFOLLOW.bits().cast_signed()
}

/// Mounts an image file, without a loop device where the kernel can. It is named by its
/// descriptor: it is the file that was opened, and its path may be longer than the kernel reads.
fn mount_file(file: &File) -> Result<Image, MountError> {
    match mount_erofs(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd()))) {
        Ok(mount) => Ok(Image { mount, device: None }),
        // Linux before 6.12, or built without `CONFIG_EROFS_FS_BACKED_BY_FILE`.
        Err(error) if Errno::from_io_error(error.io()) == Some(Errno::NOTBLK) => {
            let device = LoopDevice::attach(file.as_fd(), true).map_err(|error| {
                let lacks = "EROFS in files, which Linux 6.12 has, and a loop device to do without (`modprobe loop`)";
                MountError::new("make a loop device", error).lacking(lacks)
            })?;
            Ok(Image { mount: mount_erofs(device.path())?, device: Some(device) })
        }
        Err(error) => Err(error),
    }
}

fn mount_erofs(source: &Path) -> Result<OwnedFd, MountError> {
    let context = FsContext::open("erofs").map_err(|error| match Errno::from_io_error(error.io()) {
        Some(Errno::NODEV) => error.lacking("EROFS (`modprobe erofs`)"),
        _ => error,
    })?;
    context.set("source", &source.display().to_string())?;
    // A loop device for reading is not opened for more.
    context.set_flag("ro")?;
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
    let configure = |set_layers: &dyn Fn(&FsContext) -> Result<(), MountError>, metacopy: &str| {
        let context = FsContext::open("overlay")?;
        set_layers(&context)?;
        context.set("metacopy", metacopy)?;
        context.set("redirect_dir", "follow")?;
        context.mount(READ_ONLY)
    };
    let by_fd = |context: &FsContext| {
        let set =
            |layer: &Opened| context.set_fd(if layer.data { "datadir+" } else { "lowerdir+" }, layer.mount.as_fd());
        opened.iter().try_for_each(set)
    };
    let data = opened.iter().any(|layer| layer.data);
    let mut tried = configure(&by_fd, "off");
    if data && tried.as_ref().is_err_and(is_invalid) {
        // Linux before 6.16 follows a redirect to content with it alone.
        tried = configure(&by_fd, "on");
    }
    match tried {
        // Linux before 6.13 takes no descriptor for a layer.
        Err(error) if is_invalid(&error) => by_path(&opened, None, |lowerdir, _| {
            configure(&|context| context.set("lowerdir", lowerdir), if data { "on" } else { "off" })
        }),
        done => done,
    }
}

/// For older kernels: attaches layers in a mount namespace that nobody else sees, and
/// lets `mount` stack them there by their paths, which are short. It is given the
/// text of `lowerdir` (`lowerdir+` came with Linux 6.8), and where `own` is.
pub(crate) fn by_path(
    lowers: &[Opened],
    own: Option<BorrowedFd<'_>>,
    mount: impl FnOnce(&str, &str) -> Result<OwnedFd, MountError> + Send,
) -> Result<OwnedFd, MountError> {
    // Any directory can be covered: the namespace is ours alone.
    const STAGE: &str = "/sys";
    const OWN: &str = "own";
    let attached = || -> io::Result<String> {
        let tmpfs = FsContext::open("tmpfs").and_then(|context| context.mount(Restrictions::default()));
        let tmpfs = tmpfs.map_err(|error| io::Error::from(error.io().kind()))?;
        mount::attach(tmpfs.as_fd(), mount::open_dir_path(Path::new(STAGE))?.as_fd())?;
        let mut lowerdir = String::new();
        for (number, layer) in lowers.iter().enumerate() {
            let name = number.to_string();
            let separator = match (lowerdir.is_empty(), layer.data) {
                (true, _) => "",
                (false, true) => "::",
                (false, false) => ":",
            };
            lowerdir.push_str(&format!("{separator}{STAGE}/{name}"));
            attach_below(&tmpfs, &name, layer.mount.as_fd())?;
        }
        own.map_or(Ok(()), |own| attach_below(&tmpfs, OWN, own))?;
        Ok(lowerdir)
    };
    let stacked = || {
        let lowerdir = attached().map_err(|e| MountError::new("attach the layers of an overlay", e))?;
        mount(&lowerdir, &format!("{STAGE}/{OWN}"))
    };
    let stacked = mount::in_private_namespace(stacked);
    let stacked = stacked.map_err(|e| MountError::new("make a private mount namespace", e)).flatten();
    stacked.map_err(|error| {
        if is_invalid(&error) && lowers.iter().any(|layer| layer.data) {
            error.lacking("overlay layers of content alone, which images of a repository need (Linux 6.5 has them)")
        } else {
            error
        }
    })
}

fn attach_below(stage: &OwnedFd, name: &str, layer: BorrowedFd<'_>) -> io::Result<()> {
    mkdirat(stage, name, Mode::RWXU)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    mount::attach(layer, openat(stage, name, flags, Mode::empty())?.as_fd())
}

/// Whether the kernel said that the options make no sense; of a descriptor, overlayfs
/// before Linux 6.5 says that it is not supported.
pub(crate) fn is_invalid(error: &MountError) -> bool {
    matches!(Errno::from_io_error(error.io()), Some(Errno::INVAL | Errno::OPNOTSUPP))
}
