//! What this host can do, found by doing it, and what a no costs.

use std::{io, path::Path};

use qvd_core::{Missing, Support};
use qvd_storage::{Backends, DiskBackends, DiskSurvey, Store, Survey};
use serde::Serialize;

use crate::{VmConfig, machine::probe_machines};

/// One answer about this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Probe {
    /// What was tried.
    pub name: String,
    /// Whether no desktop can run without it.
    pub required: bool,
    /// Whether it works.
    pub support: Support,
    /// What is lost without it.
    pub cost: String,
    /// How to get it.
    pub remedy: String,
}

/// Names of what is asked about virtual machines.
pub(crate) const QEMU: &str = "virtual machines (QEMU)";
pub(crate) const KVM: &str = "hardware virtualisation (KVM)";

/// What is known of a thing that was tried: whether desktops need it, what is
/// lost without it, how to get it.
struct Advice {
    name: &'static str,
    required: bool,
    cost: &'static str,
    remedy: &'static str,
}

const ADVICE: &[Advice] = &[
    Advice {
        name: "user namespaces",
        required: true,
        cost: "no desktop can run here",
        remedy: "raise the sysctl user.max_user_namespaces, or use a kernel with user namespaces",
    },
    Advice {
        name: "overlayfs",
        required: true,
        cost: "no desktop can run here",
        remedy: "use Linux 5.19 or later, and a local file system with free space for the state directory",
    },
    Advice {
        name: "id-mapped layers",
        required: true,
        cost: "desktops cannot each have user ids of their own on one image",
        remedy: "use Linux 5.19 or later, and ext4, xfs or btrfs for the state directory",
    },
    Advice {
        name: "mounting images",
        required: true,
        cost: "no desktop can run here as a container",
        remedy: "use Linux 6.5 or later with EROFS and overlayfs, and with loop devices before 6.12 (`modprobe loop`)",
    },
    Advice {
        name: "volatile roots",
        required: false,
        cost: "a desktop that stops may wait for the disk",
        remedy: "use Linux 5.10 or later",
    },
    Advice {
        name: "reflink",
        required: false,
        cost: "the first write to a large file of an image copies it",
        remedy: "put the state directory on xfs or btrfs",
    },
    Advice {
        name: "processor limits",
        required: false,
        cost: "one desktop can take all processors",
        remedy: "enable the cpu controller of cgroups",
    },
    Advice {
        name: "way out (nftables NAT, IPv4 forwarding)",
        required: false,
        cost: "desktops cannot be let out to other networks",
        remedy: "load the kernel's nftables NAT support, and install nftables",
    },
    Advice {
        name: "confined ports without nftables (ebtables, iptables)",
        required: false,
        cost: "the older filter cannot take the place of nftables here",
        remedy: "install the packages ebtables and iptables",
    },
    Advice {
        name: "many desktops",
        required: false,
        cost: "a hundred desktops fit, and the next ones fail when their programs watch files",
        remedy: "nothing has to be done: `qvd up` raises it",
    },
    Advice {
        name: "merging of equal pages (KSM)",
        required: false,
        cost: "idle machines take up to twice the memory where that is short",
        remedy: "use a kernel with CONFIG_KSM",
    },
    Advice {
        name: "memory pressure (PSI)",
        required: false,
        cost: "it is seen later that memory is short: by what is free alone",
        remedy: "use Linux 4.20 or later with CONFIG_PSI, and boot it with psi=1",
    },
    Advice {
        name: QEMU,
        required: false,
        cost: "desktops run in containers only",
        remedy: "install the package qemu-system-x86 (or qemu-kvm), and erofs-utils and e2fsprogs",
    },
    Advice {
        name: KVM,
        required: false,
        cost: "virtual machines are emulated: ten times slower or worse, with some 60 MiB more memory for each",
        remedy: "use a host whose processor offers virtualisation, or, in a machine, one with nested virtualisation",
    },
    Advice {
        name: "image building (mmdebstrap)",
        required: false,
        cost: "images cannot be built on this host",
        remedy: "install the package mmdebstrap",
    },
];

/// As [`probe`], about virtual machines: `init` is the static init of desktops.
/// What is found out is remembered below the state directory `root` if that is there. It takes up to
/// three seconds, once per boot of the host.
#[must_use]
pub fn probe_vms(config: &VmConfig, init: &Path, root: &Path) -> Vec<Probe> {
    probe_machines(config, init, root).into_iter().map(|(name, support)| advise(name, support)).collect()
}

/// Tries what desktops need of a host and of the file system that `root` is,
/// or would be, on. Nothing is left of the trials.
#[must_use]
pub fn probe(root: &Path) -> Vec<Probe> {
    let mut found = Vec::new();
    match qvd_virt::probe() {
        Ok(answers) => found.extend(answers),
        Err(error) => found.push(("containers", Support::No(Missing::Privilege(format!("try namespaces: {error}"))))),
    }
    for answer in qvd_net::probe() {
        if !found.iter().any(|(name, _)| *name == answer.0) {
            found.push(answer);
        }
    }
    found.push(("many desktops", crate::limits::support()));
    found.extend(qvd_virt::memory::probe());
    found.extend(storage(root));
    found.into_iter().map(|(name, support)| advise(name, support)).collect()
}

fn advise(name: &str, support: Support) -> Probe {
    let usual = Advice {
        name: "",
        required: true,
        cost: "no desktop can run here",
        remedy: "run as root on Linux 5.19 or later with namespaces, cgroups and nftables built in or loaded",
    };
    let advice = ADVICE.iter().find(|advice| advice.name == name).unwrap_or(&usual);
    let remedy = match &support {
        // What else is missing shows only to somebody who may try.
        Support::No(Missing::Privilege(_)) => "run this as root",
        Support::No(Missing::File(_)) if name == KVM => {
            "install a kernel of the distribution (linux-image-…), or name a directory with one by --vm-kernel"
        }
        _ => advice.remedy,
    };
    Probe {
        name: name.to_owned(),
        required: advice.required,
        support,
        cost: advice.cost.to_owned(),
        remedy: remedy.to_owned(),
    }
}

/// Asks every way to make roots what it can do on the file system that `root`
/// is, or would be, on, and recommends one. Nothing is left of the trials.
///
/// # Errors
/// It could not be tried, for instance because the disk is full.
pub fn survey(root: &Path) -> Result<Survey, qvd_storage::Error> {
    Backends::built_in().survey(existing(root))
}

/// As [`survey`], for ways to make disks.
///
/// # Errors
/// As [`survey`].
pub fn survey_disks(root: &Path) -> Result<DiskSurvey, qvd_storage::Error> {
    DiskBackends::built_in().survey(existing(root))
}

/// The nearest directory that there is.
fn existing(root: &Path) -> &Path {
    root.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"))
}

/// Tries in a store of its own beside the real one, which a daemon may hold.
fn storage(root: &Path) -> Vec<(&'static str, Support)> {
    let there = existing(root);
    let room = |error: &dyn std::fmt::Display| {
        Missing::Filesystem(format!("room for a trial below `{}`: {error}", there.display()))
    };
    let tried = match tempfile::Builder::new().prefix(".qvd-probe-").tempdir_in(there) {
        Ok(scratch) => Store::open(scratch.path())
            .and_then(|store| store.probe())
            .map_err(|error| room(&qvd_core::causes(&error).join(": "))),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(Missing::Privilege(format!("write below `{}`", there.display())))
        }
        Err(error) => Err(room(&error)),
    };
    tried.unwrap_or_else(|missing| vec![("overlayfs", Support::No(missing))])
}
