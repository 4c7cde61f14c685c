//! What a node is told.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use qvd_core::{Bytes, Instance};
use qvd_virt::vm::AccelChoice;

use crate::{MemoryConfig, network::Tenants};

/// Where a node keeps things and how long it waits for them.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct NodeConfig {
    /// Directory of what lasts: images, roots, homes.
    pub root: PathBuf,
    /// Directory of what lasts until the next boot: records, sockets.
    pub run: PathBuf,
    /// The static program that becomes process 1 of every desktop.
    pub init: PathBuf,
    /// What stands in the names of this node's kernel objects.
    pub instance: Instance,
    /// The bridge and its addresses.
    pub network: qvd_net::NetConfig,
    /// Tenants, and what each of them gets and may reach.
    pub tenants: Tenants,
    /// How desktops run that are virtual machines.
    pub vm: VmConfig,
    /// How the host's memory is shared out.
    pub memory: MemoryConfig,
    /// How long a session may take until its window manager is up; in an emulated
    /// machine five times as long.
    pub session_limit: Duration,
    /// How long a session may take to open a display.
    pub attach_limit: Duration,
    /// How long nobody has to be attached until a desktop rests, unless its
    /// flavour says otherwise.
    pub rest_after: Duration,
}

impl NodeConfig {
    /// A node with the usual limits and a network without a way out.
    #[must_use]
    pub fn new(root: &Path, run: &Path, init: PathBuf, instance: Instance) -> Self {
        Self {
            root: root.to_path_buf(),
            run: run.to_path_buf(),
            init,
            instance,
            network: qvd_net::NetConfig::new(instance),
            tenants: Tenants::default(),
            vm: VmConfig::default(),
            memory: MemoryConfig::default(),
            session_limit: Duration::from_secs(60),
            attach_limit: Duration::from_secs(30),
            // Beyond the few seconds that a browser's head lingers.
            rest_after: Duration::from_secs(8),
        }
    }
}

/// How a node runs virtual machines.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct VmConfig {
    /// Directory with a kernel and its modules, as `/` of a host has them, for
    /// images that have none; the host's own if not said.
    pub kernel: Option<PathBuf>,
    /// What executes them.
    pub accel: AccelChoice,
    /// Size of the disk that a machine writes to its system on, and of the one
    /// that its home is on. Both take the space of what is on them.
    pub disk: Bytes,
    /// Whether machines whose system is forgotten when they stop are born from a
    /// template: the first of a kind makes it, and the others need not boot. What such
    /// a machine writes to its system is in its memory, at most half of that.
    pub templates: bool,
    /// How many clones of each template stand ready, so that a start need not wait for
    /// one. Each takes some 40 MiB; they go when memory is short.
    pub pool: u8,
}

impl Default for VmConfig {
    /// The host's kernel, KVM where it works, disks of 16 GiB, no templates, and no clones that stand ready.
    fn default() -> Self {
        Self { kernel: None, accel: AccelChoice::Auto, disk: Bytes::gib(16), templates: false, pool: 0 }
    }
}
