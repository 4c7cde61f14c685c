//! What a test may have left behind.

use std::{
    collections::BTreeMap,
    fmt, io,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::read;

/// How long the kernel may take to finish what a test has ended. Network
/// namespaces, overlay mounts and cgroups go away in the kernel's own time.
const SETTLE: Duration = Duration::from_secs(10);

/// How often to look again meanwhile: there is no event that covers all kinds.
const SETTLE_STEP: Duration = Duration::from_millis(20);

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Kind {
    /// Lines of the mount table.
    Mount,
    /// Network links.
    Link,
    /// Addresses of IPv4 and IPv6 on them.
    Address,
    /// Routes of IPv4.
    Route,
    /// Tables, chains, rules, sets and elements of nftables.
    Nftables,
    /// Directories in every cgroup hierarchy.
    Cgroup,
    /// Loop devices with a file behind them.
    LoopDevice,
    /// Namespaces of processes, and those held by their descriptors.
    Namespace,
    /// Processes, without the kernel's own.
    Process,
    /// System V and POSIX shared memory, semaphores and queues.
    Ipc,
    /// Files below the directories that the scope names.
    File,
}

/// What a census looks at.
///
/// Tests run side by side, and each must see its own leaks only: a scope with
/// marks counts the objects whose name or path holds one of them, such as the
/// instance's name or the state directory. Processes also count when they
/// descend from this one, and namespaces when a counted process, this one
/// included, is in them or holds them open.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scope {
    pub(crate) marks: Vec<String>,
    pub(crate) directories: Vec<PathBuf>,
}

impl Scope {
    /// Everything on this host. Only on a machine where nothing else happens.
    #[must_use]
    pub fn host() -> Self {
        Self::default()
    }

    /// What holds one of `marks` in its name or path.
    pub fn marked(marks: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { marks: marks.into_iter().map(Into::into).collect(), directories: Vec::new() }
    }

    /// And every file below `directory`, which need not exist.
    #[must_use]
    pub fn files_under(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directories.push(directory.into());
        self
    }

    pub(crate) fn holds(&self, text: &str) -> bool {
        self.marks.is_empty() || self.marks.iter().any(|mark| text.contains(mark.as_str()))
    }
}

/// The objects of a scope at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Census {
    scope: Scope,
    /// How often each object occurs: mounts may stack on one another.
    objects: BTreeMap<Kind, BTreeMap<String, u32>>,
}

impl Census {
    /// Counts what is there now. What cannot be read, for want of privileges,
    /// stands in the census as such instead of as nothing.
    #[must_use]
    pub fn take(scope: &Scope) -> Self {
        let mut objects: BTreeMap<Kind, BTreeMap<String, u32>> = BTreeMap::new();
        for (kind, found) in read::all(scope) {
            let counts = objects.entry(kind).or_default();
            match found {
                Ok(found) => found.into_iter().for_each(|name| *counts.entry(name).or_default() += 1),
                Err(error) => drop(counts.insert(format!("(cannot be read: {error})"), 1)),
            }
        }
        Self { scope: scope.clone(), objects }
    }

    /// How many objects of `kind` there are.
    #[must_use]
    pub fn count(&self, kind: Kind) -> u32 {
        self.objects.get(&kind).into_iter().flat_map(BTreeMap::values).sum()
    }

    /// What `after` has that this census has not, and the reverse.
    #[must_use]
    pub fn difference(&self, after: &Self) -> Difference {
        Difference { added: more_in(after, self), removed: more_in(self, after) }
    }

    /// Counts again until nothing differs or `deadline` has passed, because
    /// the kernel takes some things down after the call that asked for it.
    #[must_use]
    pub fn settle(&self, deadline: Duration) -> Difference {
        let start = Instant::now();
        loop {
            let difference = self.difference(&Self::take(&self.scope));
            if difference.is_empty() || start.elapsed() >= deadline {
                return difference;
            }
            thread::sleep(SETTLE_STEP);
        }
    }

    /// Demands that everything is as it was at this census.
    ///
    /// # Panics
    /// Something was added or removed and that stayed so for ten seconds.
    pub fn assert_unchanged(&self) {
        let difference = self.settle(SETTLE);
        assert!(difference.is_empty(), "the leak census differs:\n{difference}");
    }
}

/// Objects that one census has more often than the other.
fn more_in(one: &Census, other: &Census) -> Vec<Object> {
    let mut more = Vec::new();
    for (&kind, counts) in &one.objects {
        for (name, &count) in counts {
            let had = other.objects.get(&kind).and_then(|counts| counts.get(name)).copied().unwrap_or(0);
            more.extend((had..count).map(|_| Object { kind, name: name.clone() }));
        }
    }
    more
}

/// One object of a census.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Object {
    /// What it is.
    pub kind: Kind,
    /// Its name, with what else tells it from others.
    pub name: String,
}

/// How two censuses differ. Displayed as a line per object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// What only the later one has: leaks.
    pub added: Vec<Object>,
    /// What only the earlier one has: damage, or something that ended.
    pub removed: Vec<Object>,
}

impl Difference {
    /// Whether the censuses are equal.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.removed.is_empty()
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = self.added.iter().map(|o| ('+', o)).chain(self.removed.iter().map(|o| ('-', o)));
        for (sign, Object { kind, name }) in lines {
            writeln!(f, "{sign} {kind:?}: {name}")?;
        }
        Ok(())
    }
}

/// What a reader found, or why it could not.
pub(crate) type Found = io::Result<Vec<String>>;
