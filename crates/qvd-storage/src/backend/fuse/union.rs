//! The two programs, and how each wants to be called.

use std::path::PathBuf;

use crate::{Error, backend::Deviation, program::Program};

/// A union file system that is a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Union {
    Overlay,
    Unionfs,
}

/// Where things are in the namespace that a program runs in.
pub(super) const BASE: &str = "base";
pub(super) const FILES: &str = "files";
pub(super) const MOUNT: &str = "mnt";
/// The descriptor of a mount that is made already, as libfuse 3 takes it.
pub(super) const CONNECTION: i32 = 3;

// Source: Linux `include/uapi/linux/capability.h`.
const CHOWN: u8 = 0;
const DAC_OVERRIDE: u8 = 1;
const DAC_READ_SEARCH: u8 = 2;
const FOWNER: u8 = 3;
const FSETID: u8 = 4;
const SYS_ADMIN: u8 = 21;
const SETFCAP: u8 = 31;

impl Union {
    pub(super) const fn program(self) -> Program {
        match self {
            Self::Overlay => Program { name: "fuse-overlayfs", package: "fuse-overlayfs" },
            Self::Unionfs => Program { name: "unionfs-fuse", package: "unionfs-fuse" },
        }
    }

    pub(super) fn find(self) -> Result<PathBuf, Error> {
        let program = self.program();
        program.find().ok_or_else(|| super::lacks(program.missing()))
    }

    /// Whether the kernel's connection is given to the program. Otherwise it
    /// mounts by itself, which libfuse 2 insists on.
    pub(super) const fn takes_connection(self) -> bool {
        matches!(self, Self::Overlay)
    }

    /// Its arguments, its name included.
    pub(super) fn arguments(self, volatile: bool) -> Vec<String> {
        let words = match self {
            Self::Overlay => {
                let volatile = if volatile { ",volatile" } else { "" };
                let layers = format!("lowerdir=/{BASE},upperdir=/{FILES}/upper,workdir=/{FILES}/work{volatile}");
                ["fuse-overlayfs", "-f", "-o", &layers, &format!("/dev/fd/{CONNECTION}")].map(str::to_owned)
            }
            Self::Unionfs => {
                let branches = format!("/{FILES}/upper=RW:/{BASE}=RO");
                // Inodes by number, or hard links would not be seen as such.
                let options = "cow,hide_meta_files,statfs_omit_ro,allow_other,use_ino,suid,max_files=20000";
                ["unionfs-fuse", "-f", "-o", options, &branches].map(str::to_owned)
            }
        };
        let mut words = words.to_vec();
        if !self.takes_connection() {
            words.push(format!("/{MOUNT}"));
        }
        words
    }

    /// What it needs to keep files of others as they want them. Not that for
    /// going over quotas.
    pub(super) const fn capabilities(self) -> &'static [u8] {
        match self {
            Self::Overlay => &[CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETFCAP],
            Self::Unionfs => &[CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETFCAP, SYS_ADMIN],
        }
    }

    pub(super) const fn deviations(self) -> &'static [Deviation] {
        match self {
            Self::Overlay => OVERLAY_DEVIATIONS,
            Self::Unionfs => UNIONFS_DEVIATIONS,
        }
    }
}

/// Seen with version 1.10.
const OVERLAY_DEVIATIONS: &[Deviation] = &[
    Deviation::NoDirectoryRename,
    Deviation::FrozenAccessTimes,
    Deviation::FilledHoles,
    Deviation::NoTmpfile,
    // Its own names for what is removed are longer than the name.
    Deviation::Case("long-names"),
    // It goes by paths, which have an end.
    Deviation::Case("deep-tree"),
    Deviation::Case("remade-base-directory"),
    // What a directory hands down to its new files is lost on the way.
    Deviation::Case("access-control-lists"),
    Deviation::Case("modes"),
    // It opens what it is to change, and these cannot be opened.
    Deviation::Case("sockets"),
    Deviation::Case("fifos"),
    Deviation::Case("sparse-files"),
    Deviation::Case("removed-but-open"),
    // Attributes of the `trusted` namespace are hidden from it.
    Deviation::Case("base-is-shown-whole"),
    Deviation::Case("roots-are-apart"),
    Deviation::Case("volatile-roots-begin-anew"),
    Deviation::Case("kept-roots-survive"),
    // It takes names of one file of the base for one after it was written by one.
    Deviation::Case("random-operations"),
    Deviation::Case("crash-in-create-kept"),
    Deviation::Case("crash-in-remove"),
];

/// Seen with version 1.0.
const UNIONFS_DEVIATIONS: &[Deviation] = &[
    Deviation::BrokenHardLinks,
    Deviation::ChangingInodes,
    Deviation::NoXattrs,
    Deviation::NoAcls,
    Deviation::NoFileCapabilities,
    Deviation::FrozenAccessTimes,
    Deviation::FilledHoles,
    Deviation::StaleMaps,
    Deviation::StaleReaders,
    Deviation::NoTmpfile,
    Deviation::NoExchange,
    Deviation::Case("rename-refused"),
    Deviation::Case("long-names"),
    Deviation::Case("deep-tree"),
    Deviation::Case("hard-links-made-inside"),
    Deviation::Case("modes"),
    // Its times have whole seconds.
    Deviation::Case("timestamps"),
    Deviation::Case("sparse-files"),
    // Without attributes and with times of its own, a root is not as its base.
    Deviation::Case("base-is-shown-whole"),
    Deviation::Case("roots-are-apart"),
    Deviation::Case("kept-roots-survive"),
    Deviation::Case("volatile-roots-begin-anew"),
    Deviation::Case("random-operations"),
    Deviation::Case("crash-in-create-kept"),
];
