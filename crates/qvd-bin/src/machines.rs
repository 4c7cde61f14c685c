//! The command line's words for virtual machines.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum, ValueHint};
use qvd_core::{Bytes, Virtualizer};
use qvd_node::{AccelChoice, VmConfig};

use crate::failure::{Exit, Refusal};

/// How desktops run that are virtual machines.
#[derive(Debug, Args)]
#[command(next_help_heading = "Virtual machines")]
pub(crate) struct Machines {
    /// Directory with boot/vmlinuz-VERSION and lib/modules/VERSION, for images without a kernel; the host's own, unless given
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) vm_kernel: Option<PathBuf>,
    /// What executes machines; auto takes KVM where an ordinary Linux runs by it
    #[arg(long, value_enum, default_value_t = Accel::Auto)]
    pub(crate) accel: Accel,
    /// Size of the disks that a machine's system and home are on; they take the space of what is written
    #[arg(long, value_name = "SIZE", default_value = "16G")]
    pub(crate) vm_disk: Bytes,
    /// Have machines whose system is forgotten at their stop born from a template, which the first of its kind makes
    #[arg(long)]
    pub(crate) vm_templates: bool,
    /// Clones of each template that stand ready for whoever comes, as long as memory is not short; flavours can say otherwise
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pub(crate) vm_pool: u8,
}

impl Machines {
    /// Refuses a directory of a kernel that is none: machines are started much later.
    pub(crate) fn check(&self) -> Result<(), Refusal> {
        check_kernel(self.vm_kernel.as_deref())
    }

    /// What it comes to.
    pub(crate) fn config(&self) -> VmConfig {
        let accel = match self.accel {
            Accel::Auto => AccelChoice::Auto,
            Accel::Kvm => AccelChoice::Kvm,
            Accel::Tcg => AccelChoice::Tcg,
        };
        let mut config = VmConfig::default();
        (config.kernel, config.accel, config.disk) = (self.vm_kernel.clone(), accel, self.vm_disk);
        (config.templates, config.pool) = (self.vm_templates, self.vm_pool);
        config
    }
}

/// Refuses a directory of a kernel that is none.
pub(crate) fn check_kernel(named: Option<&Path>) -> Result<(), Refusal> {
    match named.filter(|dir| !dir.is_dir()) {
        Some(dir) => {
            let text = format!("cannot take a kernel for machines: there is no directory `{}`", dir.display());
            Err(Refusal::new(Exit::NotFound, text))
        }
        None => Ok(()),
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Accel {
    Auto,
    Kvm,
    Tcg,
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// The static qvd-init to try virtual machines with, unless the one beside this program or in ../lib/qvd
    #[arg(long, value_name = "FILE", env = "QVD_INIT", hide_env_values = true, value_hint = ValueHint::FilePath)]
    pub(crate) init: Option<PathBuf>,
    /// Directory with a kernel and its modules to try KVM with; the host's own, unless given
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) vm_kernel: Option<PathBuf>,
}

/// What a desktop runs in.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Kind {
    Container,
    Qemu,
}

impl From<Kind> for Virtualizer {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Container => Self::Container,
            Kind::Qemu => Self::Qemu,
        }
    }
}
