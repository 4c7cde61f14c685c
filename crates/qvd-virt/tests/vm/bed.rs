//! A kernel to boot, and machines of an installation of their own.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use qvd_core::{Bytes, DesktopId, Instance, UidRange};
use qvd_testkit::{Census, Need, Scope, bed_directory, privileged};
use qvd_virt::{
    Runtime,
    vm::{GuestKernel, Qemu, Vm, VmSpec, VmState},
};
use tempfile::TempDir;

/// Longer than anything here takes on a busy host without KVM.
pub const SOON: Duration = Duration::from_secs(240);

pub struct Bed {
    pub qemu: Qemu,
    pub runtime: Arc<Runtime>,
    pub instance: Instance,
    pub dir: TempDir,
    pub ids: UidRange,
}

/// Runs `test` where machines can be made, and looks for what it left.
pub fn with_bed(test: impl FnOnce(&Bed)) {
    privileged(&[Need::Root, Need::UserNamespaces, Need::Cgroup, Need::Bed], || {
        let instance = Instance::new(u16::try_from(std::process::id() & 0xffff).unwrap());
        let census = Census::take(&Scope::marked([format!("{}/", instance.cgroup_name())]));
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let runtime = Arc::new(Runtime::new(instance).unwrap());
        let ids = UidRange::of_slot(41_000).unwrap();
        let qemu = Qemu::find(Arc::clone(&runtime)).unwrap();
        let bed = Bed { qemu, runtime, instance, dir, ids };
        test(&bed);
        assert_eq!(fs::read_dir(bed.dir.path()).unwrap().count(), 0, "sockets");
        drop(bed);
        census.assert_unchanged();
    });
}

impl Bed {
    pub fn kernel(&self, init: &Path) -> GuestKernel {
        GuestKernel::find(&bed_directory().unwrap(), init).unwrap()
    }

    pub fn spec(&self, number: u32, kernel: &GuestKernel) -> VmSpec {
        let (id, dir) = (DesktopId::new(number).unwrap(), PathBuf::from(self.dir.path()));
        let mut spec = VmSpec::of_kernel(id, self.ids, kernel, dir).unwrap();
        spec.limits.memory = Bytes::mib(128);
        spec
    }
}

/// Waits until the machine does what `wanted` says.
pub fn wait_for(vm: &mut Vm, wanted: impl Fn(VmState) -> bool) {
    let deadline = Instant::now() + SOON;
    // What was waited for may have come with the answer to a command.
    let mut state = vm.state();
    while !wanted(state) {
        assert!(Instant::now() < deadline, "{state:?}: {}", vm.console().unwrap());
        state = vm.watch(deadline.saturating_duration_since(Instant::now())).unwrap();
    }
}
