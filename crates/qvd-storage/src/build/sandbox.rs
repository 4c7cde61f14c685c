//! Where packages install themselves: a root that has nothing of the host but
//! its programs, with the tree that is built at its usual path.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::mpsc,
    thread::{self, JoinHandle},
};

use qvd_sys::mount::{self, FsContext, MountError, Restrictions};
use rustix::{
    fs::{Mode, OFlags},
    mount::{UnmountFlags, unmount},
    process::{chdir, pivot_root},
};

use crate::Error;

/// Where programs and their libraries are, and names that lead there.
const PROGRAMS: [&str; 7] = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"];
/// What programs of the host look up: libraries, names of ids, which of several
/// programs one is. Passwords and keys are elsewhere.
const LOOKED_UP: [&str; 3] = ["/etc/ld.so.cache", "/etc/passwd", "/etc/group"];
const ALTERNATIVES: &str = "/etc/alternatives";
/// Devices that every program expects, none of which leads to the host.
const DEVICES: [&str; 5] = ["null", "zero", "full", "random", "urandom"];
/// Most that may be written outside of the tree, in bytes.
const MEMORY_MAX_BYTES: &str = "67108864";

/// A root that is to be made.
#[derive(Debug, Clone)]
pub(super) struct Sandbox {
    /// An empty directory to make it on.
    pub(super) at: PathBuf,
    /// What may be written, by its absolute path.
    pub(super) tree: PathBuf,
    /// Files that are read, by their absolute paths.
    pub(super) files: Vec<PathBuf>,
}

/// Keeps the thread that a program came from: the program dies with it.
#[derive(Debug)]
pub(super) struct Keeper {
    end: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::warn!("the thread of a build ended with a panic");
        }
    }
}

impl Sandbox {
    /// Starts a program that has this as its root, in a mount namespace in which
    /// there is nothing else. It dies when what is returned is dropped.
    pub(super) fn spawn(&self, mut command: Command) -> Result<(Child, Keeper), Error> {
        let (started, child) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let sandbox = self.clone();
        let work = move || {
            let failed = started.clone();
            let made = mount::in_private_namespace(move || {
                let mut run = || {
                    sandbox.enter()?;
                    command.current_dir("/").spawn().map_err(Error::io("run", command.get_program()))
                };
                // Whoever waits for it may have gone; then nobody keeps us either.
                drop(started.send(run()));
                ended.recv().unwrap_or_default();
            });
            if let Err(error) = made {
                drop(failed.send(Err(Error::io("make", "a mount namespace")(error))));
            }
        };
        let thread = thread::Builder::new().name("build".to_owned()).spawn(work);
        let thread = thread.map_err(Error::io("make", "a thread for the build"))?;
        let keeper = Keeper { end: Some(end), thread: Some(thread) };
        let child =
            child.recv().map_err(|_| Error::io("watch", "the thread of the build")(io::Error::other("it ended")));
        Ok((child??, keeper))
    }

    /// Makes it and goes into it, for good: the host's root is let go.
    fn enter(&self) -> Result<(), Error> {
        let top = &self.at;
        memory(top, "755", MEMORY_MAX_BYTES)?;
        for path in PROGRAMS {
            let from = Path::new(path);
            match fs::symlink_metadata(from) {
                Ok(meta) if meta.is_symlink() => {
                    let leads = fs::read_link(from).map_err(Error::io("read", from))?;
                    let to = inside(top, from);
                    std::os::unix::fs::symlink(leads, &to).map_err(Error::io("make", &to))?;
                }
                Ok(_) => show(top, from, Restrictions { read_only: true, nosuid: true, nodev: true, noexec: false })?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io("look at", from)(error)),
            }
        }
        for file in LOOKED_UP.iter().map(Path::new).chain(self.files.iter().map(PathBuf::as_path)) {
            let to = inside(top, file);
            match make_parent(&to).and_then(|()| fs::copy(file, &to)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io("copy", file)(error)),
                _ => {}
            }
        }
        if Path::new(ALTERNATIVES).is_dir() {
            show(top, Path::new(ALTERNATIVES), READ_ONLY)?;
        }
        for name in ["proc", "tmp", "run", "dev"] {
            let dir = top.join(name);
            // What is shown or copied may be below one of them.
            fs::create_dir_all(&dir).map_err(Error::io("make", &dir))?;
        }
        devices(top)?;
        show(top, &self.tree, Restrictions { read_only: false, nosuid: true, nodev: true, noexec: false })?;
        let tree = inside(top, &self.tree);
        for name in ["proc", "sys", "dev"] {
            let dir = tree.join(name);
            match fs::create_dir(&dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(Error::io("make", &dir)(error));
                }
                _ => {}
            }
        }
        memory(&tree.join("dev"), "755", "1048576")?;
        devices(&tree)?;
        let enter = || -> io::Result<()> {
            // The old root lies on the new one until it is let go. Source: pivot_root(2).
            chdir(top)?;
            pivot_root(".", ".")?;
            unmount(".", UnmountFlags::DETACH)?;
            Ok(chdir("/")?)
        };
        enter().map_err(Error::io("enter", top))
    }
}

const READ_ONLY: Restrictions = Restrictions { read_only: true, nosuid: true, nodev: true, noexec: true };

/// Mounts a file system in memory over `at`.
fn memory(at: &Path, mode: &str, bytes: &str) -> Result<(), Error> {
    let make = || -> Result<OwnedFd, MountError> {
        let context = FsContext::open("tmpfs")?;
        context.set("mode", mode)?;
        context.set("size", bytes)?;
        context.mount(Restrictions { nosuid: true, nodev: true, ..Restrictions::default() })
    };
    let mounted = make().map_err(|source| Error::Mount { what: format!("memory over `{}`", at.display()), source })?;
    attach(&mounted, at).map_err(Error::io("mount over", at))
}

/// Shows what is at `path` at the same path below `top`, without what is
/// mounted in it.
fn show(top: &Path, path: &Path, restrictions: Restrictions) -> Result<(), Error> {
    let to = inside(top, path);
    let work = || -> io::Result<()> {
        fs::create_dir_all(&to)?;
        bind(path, &to, restrictions)
    };
    work().map_err(Error::io("show", path))
}

/// The devices in `/dev` below `top`.
fn devices(top: &Path) -> Result<(), Error> {
    for name in DEVICES {
        let (from, to) = (Path::new("/dev").join(name), top.join("dev").join(name));
        let work = || -> io::Result<()> {
            fs::write(&to, "")?;
            bind(&from, &to, Restrictions { nosuid: true, noexec: true, ..Restrictions::default() })
        };
        work().map_err(Error::io("show", &from))?;
    }
    Ok(())
}

fn bind(from: &Path, to: &Path, restrictions: Restrictions) -> io::Result<()> {
    let mounted = mount::clone_dir(open(from)?.as_fd())?;
    mount::restrict(mounted.as_fd(), restrictions, None)?;
    attach(&mounted, to)
}

fn attach(mounted: &OwnedFd, at: &Path) -> io::Result<()> {
    mount::attach(mounted.as_fd(), open(at)?.as_fd())
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?)
}

fn inside(top: &Path, path: &Path) -> PathBuf {
    top.join(path.strip_prefix("/").unwrap_or(path))
}

fn make_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}
