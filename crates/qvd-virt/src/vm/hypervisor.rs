//! Starts and adopts machines.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use qvd_core::{Bytes, Limits, Missing};
use qvd_sys::{
    mount::{FsContext, Restrictions, clone_dir, open_dir_path, restrict},
    process::memory_file,
};
use rustix::fs::{Mode, mkdirat, symlinkat};
use tracing::info_span;

use super::{
    Vm, VmRecord, VmSpec,
    arguments::arguments,
    qmp::Qmp,
    sockets::Sockets,
    spec::{Accel, Boot, DiskFormat, Memory},
};
use crate::{
    Container, ContainerMount, ContainerSpec, Error, InheritedFd, Merging, Profile, Program, Runtime, error::io_error,
};

/// Where Debian, Fedora, Arch and others have QEMU for this architecture.
const BINARIES: [&str; 2] = ["/usr/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm"];

/// Libraries and firmware that QEMU reads; what else is on the host it does
/// not see, programs least of all.
const READ: [&str; 6] =
    ["/usr/lib", "/usr/lib64", "/usr/share/qemu", "/usr/share/seabios", "/usr/share/OVMF", "/usr/share/edk2"];

/// What QEMU itself needs, beside the guest's memory: its own pages, and what
/// TCG translates.
const OWN: Bytes = Bytes::mib(96);
const OWN_TCG: Bytes = Bytes::mib(192);

/// Threads of QEMU: one a processor, its loop, and workers for disks.
const THREADS: u32 = 128;

/// How long QEMU may take until it greets. Milliseconds on an idle host.
const GREETS_WITHIN: Duration = Duration::from_secs(20);

/// Starts and adopts the virtual machines of one installation. A machine is a
/// container that QEMU alone runs in: it has ids, limits, namespaces and a
/// file system of its own, and no capability.
#[derive(Debug)]
pub struct Qemu {
    runtime: Arc<Runtime>,
    binary: PathBuf,
}

impl Qemu {
    /// Looks for QEMU on this host.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when it is not installed.
    pub fn find(runtime: Arc<Runtime>) -> Result<Self, Error> {
        let binary = BINARIES.iter().map(PathBuf::from).find(|path| path.is_file());
        let missing = Missing::Program("qemu-system-x86_64".into());
        let binary = binary.ok_or(Error::Unsupported { op: "run a virtual machine", missing })?;
        Ok(Self { runtime, binary })
    }

    /// Starts a machine and returns when QEMU has greeted. Its processors
    /// stand still until [`Vm::resume`].
    ///
    /// # Errors
    /// The specification is wrong, or QEMU does not start, in its own words;
    /// nothing is left.
    pub fn start(&self, mut spec: VmSpec) -> Result<Vm, Error> {
        let id = spec.id;
        let _span = info_span!("start machine", desktop = %id).entered();
        spec.check()?;
        whole_base(&spec)?;
        let mut argv = vec![self.binary.display().to_string()];
        argv.extend(arguments(&spec));
        let program = File::open(&self.binary).map_err(io_error(format!("open `{}`", self.binary.display())))?;
        let mut sockets = Sockets::new(&spec.dir);
        let words = memory_file(c"qemu-words").map_err(io_error("make a file for QEMU's words"))?;
        let fds = descriptors(&mut spec, &sockets, words.as_fd())?;
        // It would look for both beside its own file, which has no path inside.
        for dir in ["/usr/share/qemu", "/usr/share/seabios"] {
            argv.extend(["-L".to_owned(), dir.to_owned()]);
        }
        // A heap for each thread would keep what that needed once.
        let one_heap = "MALLOC_ARENA_MAX=1".to_owned();
        let modules = modules().map(|dir| format!("QEMU_MODULE_DIR={}", dir.display()));
        let env = modules.into_iter().chain([one_heap]).collect();
        let container = self.contain(&spec, Program { file: program.into(), argv, env }, fds)?;
        sockets.publish()?;
        let words = File::from(words);
        let control = match Qmp::connect(sockets.control(), GREETS_WITHIN) {
            Ok(control) => control,
            Err(source) => {
                let error = failure(container, &words, id, source);
                sockets.close()?;
                return Err(error);
            }
        };
        Ok(Vm::new(container, control, sockets, Some(words), spec.memory.is_file()))
    }

    /// What is remembered of this host's QEMU: another may do what this cannot.
    pub(crate) fn binary(&self) -> &Path {
        &self.binary
    }

    fn contain(&self, spec: &VmSpec, program: Program, fds: Vec<OwnedFd>) -> Result<Container, Error> {
        let root = root().map_err(io_error("make QEMU's file system"))?;
        let mut inside = ContainerSpec::new(spec.id, root, spec.ids, program);
        inside.mounts = mounts()?;
        let own = if spec.accel == Accel::Tcg { OWN_TCG } else { OWN };
        inside.limits = Limits {
            memory: Bytes::new(spec.limits.memory.get() + own.get()),
            cpu: spec.limits.cpu,
            pids: THREADS + spec.processors(),
            io: spec.limits.io,
        };
        inside.profile = Profile {
            no_new_privileges: true,
            capabilities: Vec::new(),
            tmp: Bytes::mib(1),
            shm: Bytes::mib(1),
            run: Bytes::mib(1),
            inodes: 64,
            kvm: spec.accel == Accel::Kvm,
            devices: std::collections::BTreeSet::new(),
            // For `Vm::allow_merging`; the guest cannot ask for it.
            merging: Merging::Offered,
            // A clone's memory is a file's, which has none; but QEMU asks for them
            // for its own buffers, most of which it does not fill.
            small_pages: matches!(spec.memory, Memory::Cloned(_)),
            ..Profile::default()
        };
        for (number, fd) in (1..).zip(fds) {
            inside.fds.push(InheritedFd { number, fd });
        }
        self.runtime.prepare(inside)?.start()
    }

    /// Takes over a machine that an earlier life of this process started.
    /// `None`: it does not run any more.
    ///
    /// # Errors
    /// As [`Runtime::adopt`]; or QEMU does not answer.
    pub fn adopt(&self, record: &VmRecord) -> Result<Option<Vm>, Error> {
        let Some(container) = self.runtime.adopt(&record.container)? else { return Ok(None) };
        let id = container.id();
        // It may have been at rest, and would not answer.
        if let Some(freezer) = container.freezer() {
            freezer.thaw()?;
        }
        let sockets = Sockets::of_running(&record.dir);
        let control = Qmp::connect(sockets.control(), GREETS_WITHIN).map_err(|source| Error::Qmp { id, source })?;
        let mut vm = Vm::new(container, control, sockets, None, record.memory_file);
        vm.look()?;
        Ok(Some(vm))
    }
}

/// Refuses a base that has become shorter: a guest that reads what is missing of its
/// memory would end QEMU at some time.
fn whole_base(spec: &VmSpec) -> Result<(), Error> {
    let Some(base) = &spec.base else { return Ok(()) };
    let length = rustix::fs::fstat(&base.file).map_err(io_error("look at the base"))?.st_size;
    if length.cast_unsigned() < base.size.get() {
        let what = format!("a base of {length} bytes for desktop {}", spec.id);
        return Err(Error::Invalid { what, reason: "it is shorter than it was: its file was changed; make it again" });
    }
    Ok(())
}

/// Why QEMU did not greet: what it said when it ended, or else what failed.
fn failure(mut container: Container, words: &File, id: qvd_core::DesktopId, source: super::QmpError) -> Error {
    // A connection that was refused or closed means that it is about to end.
    let ended = container.wait(Duration::from_secs(2));
    let said = super::machine::last_words(words);
    if let Err(error) = container.close() {
        tracing::warn!(desktop = %id, %error, "machine left behind");
    }
    match ended {
        Ok(Some(_)) if !said.is_empty() => Error::Hypervisor { id, said },
        _ => Error::Qmp { id, source },
    }
}

/// What QEMU inherits, from number 1 on, in the order that its arguments count
/// them.
fn descriptors(
    spec: &mut VmSpec,
    sockets: &Sockets,
    words: std::os::fd::BorrowedFd<'_>,
) -> Result<Vec<OwnedFd>, Error> {
    let keep = |fd: io::Result<OwnedFd>| fd.map_err(io_error("keep a descriptor for QEMU"));
    let mut fds = vec![keep(words.try_clone_to_owned())?, keep(words.try_clone_to_owned())?];
    fds.extend(sockets.listen()?.map(OwnedFd::from));
    match &spec.boot {
        Boot::Kernel { kernel: one, initramfs: two, .. } | Boot::Uefi { code: one, variables: two } => {
            fds.push(keep(one.try_clone())?);
            fds.push(keep(two.try_clone())?);
        }
        Boot::Bios => {}
    }
    if let Memory::Saved(file) | Memory::Cloned(file) = &spec.memory {
        fds.push(keep(file.try_clone())?);
    }
    if let Some(base) = &spec.base {
        fds.push(keep(base.file.try_clone())?);
    }
    for disk in spec.disks.drain(..) {
        fds.push(disk.file);
        if let DiskFormat::Qcow2 { backing: Some(backing) } = disk.format {
            fds.push(backing.file);
        }
    }
    fds.extend(spec.nics.drain(..).map(|nic| nic.tap));
    Ok(fds)
}

/// Where QEMU's parts are that it loads when it needs them.
fn modules() -> Option<PathBuf> {
    let own = ["/usr/lib64", "/usr/lib"].map(PathBuf::from).into_iter();
    // Debian has a directory for each architecture in between.
    let below = fs::read_dir("/usr/lib").ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    own.chain(below).map(|dir| dir.join("qemu")).find(|dir| {
        fs::read_dir(dir).is_ok_and(|mut found| {
            found.any(|entry| entry.is_ok_and(|entry| entry.path().extension().is_some_and(|end| end == "so")))
        })
    })
}

/// The root of QEMU's file system: links that lead to the libraries.
fn root() -> io::Result<OwnedFd> {
    let fs = FsContext::open("tmpfs").map_err(io::Error::other)?;
    for (key, value) in [("mode", "755"), ("size", "64k"), ("nr_inodes", "64")] {
        fs.set(key, value).map_err(io::Error::other)?;
    }
    let root = fs.mount(Restrictions { nosuid: true, nodev: true, ..Restrictions::default() });
    let root = root.map_err(io::Error::other)?;
    for name in ["lib", "lib64"] {
        symlinkat(format!("usr/{name}"), &root, name)?;
    }
    // What is mounted on is there already: the child, whose ids mean nothing
    // here, makes nothing.
    for name in ["dev", "proc", "sys", "tmp", "run", "usr"] {
        mkdirat(&root, name, Mode::from_raw_mode(0o755))?;
    }
    mkdirat(&root, "usr/share", Mode::from_raw_mode(0o755))?;
    for path in READ.iter().filter(|path| Path::new(path).is_dir()) {
        match mkdirat(&root, path.trim_start_matches('/'), Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(root)
}

fn mounts() -> Result<Vec<ContainerMount>, Error> {
    let there = READ.iter().filter(|path| Path::new(path).is_dir());
    there
        .map(|path| {
            let mount = || {
                let mount = clone_dir(open_dir_path(Path::new(path))?.as_fd())?;
                let limited = Restrictions { read_only: true, nosuid: true, nodev: true, noexec: false };
                restrict(mount.as_fd(), limited, None)?;
                Ok(mount)
            };
            let mount = mount().map_err(io_error::<io::Error>(format!("show `{path}` to QEMU")))?;
            Ok(ContainerMount { target: PathBuf::from(path), mount })
        })
        .collect()
}
