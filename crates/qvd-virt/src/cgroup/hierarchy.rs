//! Where the kernel's controllers are mounted, in either version.

use std::{collections::BTreeSet, path::PathBuf};

use super::Tree;

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Controller {
    Memory,
    Cpu,
    Pids,
    Io,
    /// Only v1 has it as a controller: in v2 every group can be frozen.
    Freezer,
}

impl Controller {
    pub(crate) const ALL: [Self; 5] = [Self::Memory, Self::Cpu, Self::Pids, Self::Io, Self::Freezer];
    /// Without these no desktop is started.
    pub(super) const REQUIRED: [Self; 3] = [Self::Memory, Self::Cpu, Self::Pids];

    /// Its name in version 2, and in version 1 unless that has another.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::Pids => "pids",
            Self::Io => "io",
            Self::Freezer => "freezer",
        }
    }

    const fn name_in(self, unified: bool) -> &'static str {
        match (self, unified) {
            (Self::Io, false) => "blkio",
            _ => self.name(),
        }
    }
}

/// A mounted tree of cgroups and what of ours it controls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    pub(crate) root: PathBuf,
    pub(crate) unified: bool,
    pub(crate) controllers: Vec<Controller>,
}

impl Hierarchy {
    /// What lets the groups below one be limited.
    pub(super) fn enable(&self) -> String {
        self.controllers.iter().map(|c| format!("+{}", c.name())).collect::<Vec<_>>().join(" ")
    }

    /// Whether it is only there for limits that most containers do without: each
    /// hierarchy of version 1 costs a start some calls.
    pub(super) fn is_for_io_alone(&self) -> bool {
        !self.unified && self.controllers == [Controller::Io]
    }
}

/// Finds where the controllers live: a hybrid host has an empty v2 tree beside
/// the v1 ones, so each is looked for in turn.
pub(crate) fn find(tree: &dyn Tree, mountinfo: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    let mut taken = BTreeSet::new();
    // Options before ` - ` are the mount's, behind it type, source and super
    // block options; see proc(5).
    let mounts = mountinfo.lines().filter_map(|line| {
        let (mount, fs) = line.split_once(" - ")?;
        let mut fs = fs.split(' ');
        let (fields, kind, options) = (mount.split(' ').collect::<Vec<_>>(), fs.next()?, fs.nth(1)?);
        // Only a mount of the whole tree, not of a part of it.
        (*fields.get(3)? == "/").then_some((PathBuf::from(*fields.get(4)?), kind, options))
    });
    for (root, kind, options) in mounts {
        let unified = kind == "cgroup2";
        let listed = match kind {
            "cgroup2" => tree.read(&root.join("cgroup.controllers")).unwrap_or_default().replace(' ', ","),
            "cgroup" => options.to_owned(),
            _ => continue,
        };
        let names: Vec<_> = listed.trim().split(',').collect();
        let ours = Controller::ALL.into_iter().filter(|c| names.contains(&c.name_in(unified)));
        let controllers: Vec<_> = ours.filter(|&controller| taken.insert(controller)).collect();
        if !controllers.is_empty() {
            found.push(Hierarchy { root, unified, controllers });
        }
    }
    found
}
