//! What confines a container beside the steps of its plan.

use qvd_sys::{mount::Restrictions, process::Namespaces};
use rustix::fs::ResolveFlags;

/// Each is taken out by a test, which sees that an attack then succeeds or the
/// start fails. Nobody outside of this crate can ask for less than all.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measures {
    /// What the process is born with. Its view of the cgroup tree is a step of
    /// the plan.
    pub(crate) namespaces: Namespaces,
    /// What is forbidden on the root.
    pub(crate) root: Restrictions,
    /// What is forbidden on the mounts that a specification brings.
    pub(crate) mounts: Restrictions,
    /// How directories of the root are found in which something is mounted.
    pub(crate) resolve: ResolveFlags,
}

impl Default for Measures {
    fn default() -> Self {
        let nodev = Restrictions { nodev: true, ..Restrictions::default() };
        let namespaces = [Namespaces::MOUNT, Namespaces::PID, Namespaces::NET, Namespaces::UTS, Namespaces::IPC];
        Self {
            namespaces: namespaces.into_iter().fold(Namespaces::USER, Namespaces::and),
            root: nodev,
            mounts: Restrictions { nosuid: true, ..nodev },
            resolve: ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        }
    }
}
