//! What is compared: every back end, and the commands that people use instead.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use qvd_core::{Digest, RootPolicy};
use qvd_storage::{Backends, BaseTree, Place, Root, RootBackend, RootId};

use crate::{
    PEER,
    bed::Bed,
    common::{Outcome, run},
};

/// Makes roots.
pub(crate) trait Subject {
    /// Its name in the table.
    fn name(&self) -> &str;

    /// A directory of the file system that its roots are on.
    fn place(&self) -> &Path;

    /// Makes one, and says how long that took.
    fn make(&self) -> Outcome<(Box<dyn Made>, Duration)>;
}

/// A root that was made.
pub(crate) trait Made {
    /// Where it is seen.
    fn path(&self) -> PathBuf;

    /// Unmounts it where it is mounted, as the end of a session does.
    fn unmount(&mut self) {}

    /// Removes it, and says how long it took until whoever wanted that can go on.
    /// Then waits until its space is free again.
    fn remove(self: Box<Self>) -> Outcome<Duration>;
}

/// Those that work on this host: each back end on the file systems that it is
/// meant for.
pub(crate) fn subjects(bed: &Bed) -> Outcome<Vec<Box<dyn Subject>>> {
    let mut found: Vec<Box<dyn Subject>> = Vec::new();
    for name in Backends::built_in().names() {
        let kinds: &[&str] = match name {
            "overlayfs" => &["ext4", "xfs", "btrfs"],
            "btrfs" => &["btrfs"],
            "reflink" => &["xfs", "btrfs"],
            _ => &["ext4"],
        };
        for kind in kinds {
            let at = bed.at(kind);
            let place = Place::open(&at.join(name))?;
            let back_end = Backends::built_in().make(name, place.clone())?;
            if !back_end.capabilities()?.works() {
                eprintln!("{name} on {kind} is left out: it does not work on this host");
                continue;
            }
            // Each kind has a base of its own, so one digest does for all.
            let base = BaseTree::new(Digest::new([7; 32]), at.join("base"));
            let label = if kinds.len() > 1 { format!("{name} on {kind}") } else { name.to_owned() };
            found.push(Box::new(Own { name: label, place, back_end, base, number: AtomicU32::new(0) }));
        }
    }
    let of = |kind: &str| (bed.at(kind).join("base"), bed.at(kind));
    let (base, at) = of("ext4");
    found.push(Box::new(Copied { base, at }));
    let (base, at) = of("btrfs");
    let subvolume = at.join("subvolume");
    run(Command::new("btrfs").args(["subvolume", "create"]).arg(&subvolume))?;
    run(Command::new("cp").args(["-a", "--reflink=auto"]).arg(base.join(".")).arg(&subvolume))?;
    found.push(Box::new(Snapshotted { of: subvolume, at }));
    Ok(found)
}

/// A back end of this library, in process.
struct Own {
    name: String,
    place: Place,
    back_end: Box<dyn RootBackend>,
    base: BaseTree,
    number: AtomicU32,
}

struct OwnRoot {
    root: Box<dyn Root>,
    tree: Option<OwnedFd>,
    place: Place,
}

impl Subject for Own {
    fn name(&self) -> &str {
        &self.name
    }

    fn place(&self) -> &Path {
        self.place.dir()
    }

    fn make(&self) -> Outcome<(Box<dyn Made>, Duration)> {
        let id: RootId = self.number.fetch_add(1, Ordering::Relaxed).to_string().parse()?;
        let began = Instant::now();
        let root = self.back_end.create(&self.base, &id, &RootPolicy::Volatile.into())?;
        let tree = root.mount(None)?;
        let took = began.elapsed();
        Ok((Box::new(OwnRoot { root, tree: Some(tree), place: self.place.clone() }), took))
    }
}

impl Made for OwnRoot {
    fn path(&self) -> PathBuf {
        // Programs that are started have other descriptors.
        let tree = self.tree.as_ref().map_or(-1, OwnedFd::as_raw_fd);
        format!("/proc/{}/fd/{tree}", std::process::id()).into()
    }

    fn unmount(&mut self) {
        self.tree = None;
    }

    fn remove(self: Box<Self>) -> Outcome<Duration> {
        let Self { mut root, tree, place } = *self;
        let began = Instant::now();
        drop(tree);
        root.close()?;
        let took = began.elapsed();
        place.finish_discarding()?;
        Ok(took)
    }
}

/// `cp -a` of the base, and `rm -rf`.
struct Copied {
    base: PathBuf,
    at: PathBuf,
}

struct CopiedRoot(PathBuf);

impl Subject for Copied {
    fn name(&self) -> &str {
        "cp -a"
    }

    fn place(&self) -> &Path {
        &self.at
    }

    fn make(&self) -> Outcome<(Box<dyn Made>, Duration)> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let to = self.at.join(format!("copied-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let began = Instant::now();
        run(Command::new("cp").arg("-a").arg(&self.base).arg(&to))?;
        Ok((Box::new(CopiedRoot(to)), began.elapsed()))
    }
}

impl Made for CopiedRoot {
    fn path(&self) -> PathBuf {
        self.0.clone()
    }

    fn remove(self: Box<Self>) -> Outcome<Duration> {
        let began = Instant::now();
        run(Command::new("rm").arg("-rf").arg(&self.0))?;
        Ok(began.elapsed())
    }
}

/// `btrfs subvolume snapshot`, and `delete`.
struct Snapshotted {
    of: PathBuf,
    at: PathBuf,
}

struct SnapshottedRoot(PathBuf);

impl Subject for Snapshotted {
    fn name(&self) -> &str {
        PEER
    }

    fn place(&self) -> &Path {
        &self.at
    }

    fn make(&self) -> Outcome<(Box<dyn Made>, Duration)> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let to = self.at.join(format!("snapshot-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let began = Instant::now();
        run(Command::new("btrfs").args(["subvolume", "snapshot"]).arg(&self.of).arg(&to))?;
        Ok((Box::new(SnapshottedRoot(to)), began.elapsed()))
    }
}

impl Made for SnapshottedRoot {
    fn path(&self) -> PathBuf {
        self.0.clone()
    }

    fn remove(self: Box<Self>) -> Outcome<Duration> {
        let began = Instant::now();
        run(Command::new("btrfs").args(["subvolume", "delete"]).arg(&self.0))?;
        Ok(began.elapsed())
    }
}
