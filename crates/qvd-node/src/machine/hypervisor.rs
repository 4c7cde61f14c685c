//! What a host needs to run desktops as virtual machines: QEMU, a kernel, and
//! an answer about KVM.

use std::{
    collections::HashMap,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use qvd_core::{BirthPolicy, Bytes, DesktopId, Digest, Instance, Missing, Support, UidRange};
use qvd_storage::{GuestBase, Image};
use qvd_virt::{
    Runtime,
    vm::{Accel, BaseDevice, BaseSpec, GuestKernel, Kvm, KvmMemory, Qemu, VmSpec},
};

use super::{Failure, Templates};
use crate::{NodeConfig, VmConfig};

/// Where a kernel is looked for when neither the image nor the configuration
/// has one.
const HOST: &str = "/";

/// File in the state directory with what was found out about KVM. It says for
/// which boot of the host.
const KNOWN: &str = "kvm.json";

/// What machines of a host are made from. Nothing is looked for before the
/// first one starts: most hosts have none.
#[derive(Debug)]
pub(crate) struct Machines {
    runtime: Arc<Runtime>,
    config: VmConfig,
    pub(crate) born: Arc<Templates>,
    init: PathBuf,
    /// Where the answer about KVM is remembered.
    known: PathBuf,
    /// Where it is tried.
    run: PathBuf,
    ready: Mutex<Option<Ready>>,
    /// Of images that have one of their own.
    kernels: Mutex<HashMap<Digest, Option<Arc<GuestKernel>>>>,
    /// Of those that have none.
    common: Mutex<Option<Arc<GuestKernel>>>,
}

#[derive(Debug, Clone)]
struct Ready {
    qemu: Arc<Qemu>,
    accel: Accel,
}

impl Machines {
    pub(crate) fn new(runtime: Arc<Runtime>, config: &NodeConfig) -> Self {
        Self {
            runtime,
            config: config.vm.clone(),
            born: Arc::default(),
            init: config.init.clone(),
            known: config.root.join(KNOWN),
            run: config.run.clone(),
            ready: Mutex::default(),
            kernels: Mutex::default(),
            common: Mutex::default(),
        }
    }

    /// Size of the disks that machines write to.
    pub(crate) const fn disk(&self) -> Bytes {
        self.config.disk
    }

    /// Whether machines of an image whose system is forgotten are born from templates.
    pub(crate) fn templates(&self, policy: BirthPolicy) -> bool {
        policy.template.unwrap_or(self.config.templates)
    }

    /// How many clones of a template of an image stand ready.
    pub(crate) fn pool(&self, policy: BirthPolicy) -> usize {
        policy.ready.unwrap_or(self.config.pool).into()
    }

    /// Whether machines that were started here are emulated.
    pub(crate) fn are_emulated(&self) -> bool {
        lock(&self.ready).as_ref().is_some_and(|ready| ready.accel == Accel::Tcg)
    }

    /// Finds QEMU, for machines that run already.
    pub(crate) fn qemu(&self) -> Result<Qemu, Failure> {
        Ok(Qemu::find(Arc::clone(&self.runtime))?)
    }

    /// What starts a machine of `image`, and what it is to be so far. Its control
    /// sockets are to be in `dir`.
    pub(crate) fn plan(
        &self,
        id: DesktopId,
        ids: UidRange,
        image: &Image,
        base: &GuestBase,
        dir: PathBuf,
    ) -> Result<(Arc<Qemu>, VmSpec), Failure> {
        let kernel = self.kernel(image)?;
        let Ready { qemu, accel } = self.ready(&kernel, ids)?;
        let mut spec = VmSpec::of_kernel(id, ids, &kernel, dir)?;
        spec.accel = accel;
        let file = std::fs::File::open(&base.path)
            .map_err(|error| format!("cannot open `{}`: {error}", base.path.display()))?;
        spec.base = Some(BaseSpec { file: file.into(), size: base.size, device: BaseDevice::Pmem });
        Ok((qemu, spec))
    }

    /// QEMU and what it is to execute by, found out once.
    fn ready(&self, kernel: &GuestKernel, ids: UidRange) -> Result<Ready, Failure> {
        let mut known = lock(&self.ready);
        if let Some(ready) = known.as_ref() {
            return Ok(ready.clone());
        }
        let qemu = Arc::new(self.qemu()?);
        let kvm = kvm(&qemu, kernel, ids, &self.known, &self.run)?;
        let (accel, warning) = self.config.accel.choose(&kvm)?;
        if let Some(warning) = warning {
            tracing::warn!("{warning}");
        }
        Ok(known.insert(Ready { qemu, accel }).clone())
    }

    /// The kernel of an image, or else the one that is configured, or the host's.
    fn kernel(&self, image: &Image) -> Result<Arc<GuestKernel>, Failure> {
        let own = lock(&self.kernels).get(&image.digest()).cloned();
        let own = match own {
            Some(own) => own,
            None => {
                let tree = image.base().open()?;
                // Opened by us, here: nobody else goes by this name.
                let top = PathBuf::from(format!("/proc/self/fd/{}", tree.as_raw_fd()));
                let found = GuestKernel::find(&top, &self.init).ok().map(Arc::new);
                lock(&self.kernels).insert(image.digest(), found.clone());
                found
            }
        };
        if let Some(own) = own {
            return Ok(own);
        }
        let mut common = lock(&self.common);
        if let Some(kernel) = common.as_ref() {
            return Ok(Arc::clone(kernel));
        }
        let place = self.config.kernel.as_deref().unwrap_or(Path::new(HOST));
        let kernel =
            GuestKernel::find(place, &self.init).map_err(|source| NoKernel { place: place.to_owned(), source })?;
        let kernel = Arc::new(kernel);
        *common = Some(Arc::clone(&kernel));
        Ok(kernel)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("there is no kernel for machines, neither in the image nor in `{}`; name a directory with one by `--vm-kernel`", place.display())]
struct NoKernel {
    place: PathBuf,
    source: qvd_virt::Error,
}

/// What is known of KVM on this host, or found out now by booting `kernel`.
fn kvm(qemu: &Qemu, kernel: &GuestKernel, ids: UidRange, known: &Path, run: &Path) -> Result<Kvm, qvd_virt::Error> {
    let memory = KvmMemory::at(known);
    let dir = tempfile::Builder::new().prefix("kvm-").tempdir_in(run);
    let dir = dir.map_err(|source| qvd_virt::Error::Io { op: format!("try KVM in `{}`", run.display()), source })?;
    // A number that no desktop gets before ten million others have.
    let id = DesktopId::new(DesktopId::MAX);
    let id =
        id.map_err(|source| qvd_virt::Error::Io { op: "try KVM".to_owned(), source: std::io::Error::other(source) })?;
    memory.answer(qemu, || VmSpec::of_kernel(id, ids, kernel, dir.path().to_owned()))
}

/// What a host answers about virtual machines: whether there is a QEMU, and
/// whether KVM runs an ordinary Linux, found by booting one. `init` is the
/// static init of desktops; `config` says where a kernel is. The answer is
/// remembered below the state directory `root` if that is there.
pub(crate) fn probe_machines(config: &VmConfig, init: &Path, root: &Path) -> Vec<(&'static str, Support)> {
    let qemu = |support| (crate::probe::QEMU, support);
    let failed = |error: &(dyn std::error::Error + 'static)| {
        let why = qvd_core::causes(error).join(": ");
        Support::No(Missing::Kernel(format!("something: it could not be tried: {why}")))
    };
    // A name of its own among the kernel's objects, for as long as this takes.
    let instance = Instance::of_root(format!("probe {}", std::process::id()).as_bytes());
    let found = match Runtime::new(instance).and_then(|runtime| Qemu::find(Arc::new(runtime))) {
        Ok(found) => found,
        Err(qvd_virt::Error::Unsupported { missing, .. }) => return vec![qemu(Support::No(missing))],
        Err(error) => return vec![qemu(failed(&error))],
    };
    let tried = || -> Result<Support, Failure> {
        let place = config.kernel.as_deref().unwrap_or(Path::new(HOST));
        let kernel = match GuestKernel::find(place, init) {
            Ok(kernel) => kernel,
            Err(_) if !Kvm::is_present() => return Ok(Kvm::Absent.support()),
            Err(qvd_virt::Error::Invalid { .. }) => {
                let what = "kernel to try it with: neither boot/vmlinuz-VERSION nor lib/modules/VERSION";
                return Ok(Support::No(Missing::File(format!("{what} in `{}`", place.display()))));
            }
            Err(error) => return Err(error.into()),
        };
        let scratch = tempfile::tempdir()?;
        let known = if root.is_dir() { root } else { scratch.path() }.join(KNOWN);
        Ok(kvm(&found, &kernel, UidRange::of_slot(UidRange::COUNT - 1)?, &known, scratch.path())?.support())
    };
    let kvm = tried().unwrap_or_else(|error| failed(&*error));
    vec![qemu(Support::Yes), (crate::probe::KVM, kvm)]
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
