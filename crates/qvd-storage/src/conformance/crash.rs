//! Killed at any point of what it does, a back end finishes or undoes it when
//! it is opened next.

use std::{collections::BTreeSet, fs, path::Path, sync::Arc, time::Duration};

use qvd_core::RootPolicy;
use qvd_sys::process::traced::{self, Counted, End, Traced};

use super::{
    Effort,
    base::TEXT,
    bench::{Bench, Opened, Site, create, id, mount},
    cases::Listed,
    manifest::{Detail, Manifest},
    report::{Checked, Failure, Seen, Step, equal, hold},
};

pub(super) const CASES: &[Listed] = &[
    ("crash-in-create-kept", None, |bench| crashes(bench, Work::Kept)),
    ("crash-in-create-volatile", None, |bench| crashes(bench, Work::Volatile)),
    ("crash-in-remove", None, |bench| crashes(bench, Work::Remove)),
];

/// How many points of a piece of work are tried without more effort.
const SAMPLED: u32 = 20;
/// How long a child may take for its piece of work: it ends one that hangs.
const LIMIT: Duration = Duration::from_secs(600);
/// What roots in this module are called.
const NAME: &str = "crashed";
/// A file of the root's own, and what it holds.
const MARK: (&str, &str) = ("var/mark", "written");

/// What is being done when the process dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    /// A kept root is made, mounted, written to and closed.
    Kept,
    /// A volatile one is.
    Volatile,
    /// A kept one is removed, and its files are deleted.
    Remove,
}

impl Work {
    fn policy(self) -> RootPolicy {
        if self == Self::Volatile { RootPolicy::Volatile } else { RootPolicy::Persistent }
    }

    /// What the process has to be there before it begins.
    fn before(self, site: &Site, dir: &str) -> Result<(), Failure> {
        if self == Self::Remove { make(site, &site.open(dir)?, RootPolicy::Persistent) } else { Ok(()) }
    }

    fn run(self, site: &Site, dir: &str) -> Result<(), Failure> {
        let opened = site.open(dir)?;
        if self == Self::Remove {
            opened.backend.remove(&id(NAME)).step("a root can be removed")?;
            return opened.place.trash().empty().step("the trash can be emptied");
        }
        make(site, &opened, self.policy())
    }
}

/// Makes a root and writes to it.
fn make(site: &Site, opened: &Opened, policy: RootPolicy) -> Result<(), Failure> {
    let mut root = create(&*opened.backend, &site.small, &id(NAME), policy)?;
    let tree = mount(&*root)?;
    tree.write(MARK.0, MARK.1)?;
    tree.write("var/a", "changed")?;
    drop(tree);
    root.close().step("it can be closed")
}

fn crashes(bench: &Bench, work: Work) -> Checked {
    let whole = in_child(bench, work, None, Counted::Lasting)?;
    equal("the work, undisturbed, ends", whole.end, End::Returned(0))?;
    // What is left of a life without crashes: what a back end keeps for later.
    let left = after(bench, work, None)?;
    let (counted, stride) = match bench.effort {
        Effort::Quick => (Counted::Lasting, whole.calls.div_ceil(SAMPLED).max(1)),
        Effort::Thorough => (Counted::Every, 1),
    };
    for point in (1..).step_by(usize::try_from(stride).unwrap_or(1)) {
        let crash = in_child(bench, work, Some(point), counted)?;
        if let End::Killed(call) = crash.end {
            let explain = |failure: Failure| {
                let when = format!("after a crash behind system call {point} (number {call}) of {work:?}");
                Failure::new(format!("{when}, {}", failure.expected), failure.seen)
            };
            after(bench, work, Some(&left)).map_err(explain)?;
        } else {
            // Threads take turns as they like: the last points may be beyond the end.
            hold("the work ends", crash.end == End::Returned(0), format!("{:?}", crash.end))?;
            after(bench, work, Some(&left))?;
            break;
        }
    }
    Ok(Seen::Plain)
}

/// The directory of the store that is crashed, new each time.
const DIR: &str = "crash";

fn in_child(bench: &Bench, work: Work, point: Option<u32>, counted: Counted) -> Result<Traced, Failure> {
    work.before(&bench.site, DIR)?;
    bench.rest()?;
    let site = Arc::clone(&bench.site);
    let run = move || match work.run(&site, DIR) {
        Ok(()) => 0,
        Err(Failure { expected, seen }) => {
            tracing::error!(expected, seen, "undisturbed work failed");
            1
        }
    };
    traced::run(point, counted, LIMIT, run).step("a child can be made and traced")
}

/// Opens what the dead process left, as the next process does, uses it, takes
/// everything away and returns the names of what is left.
fn after(bench: &Bench, work: Work, expected: Option<&BTreeSet<String>>) -> Result<BTreeSet<String>, Failure> {
    let opened = bench.site.open(DIR)?;
    let name = id(NAME);
    let find = || opened.backend.find(&name).step("it can be asked for");
    let found = find()?;
    if work == Work::Volatile && found.is_some() {
        equal("a volatile root is", found, Some(RootPolicy::Volatile))?;
    }
    let listed = opened.backend.roots().step("roots can be listed")?;
    equal("every root is listed", listed, found.map(|policy| (name.clone(), policy)).into_iter().collect())?;
    let policy = work.policy();
    let mut root = create(&*opened.backend, &bench.site.small, &name, policy)?;
    let tree = mount(&*root)?;
    let text = tree.read("var/a")?;
    let mark = fs::read_to_string(tree.path(MARK.0)).ok();
    match (work, found) {
        // Not removed yet: all of it is there.
        (Work::Remove, Some(RootPolicy::Persistent)) => {
            equal("a root that is not removed yet holds", mark.as_deref(), Some(MARK.1))?;
            equal("and the base's file", &*text, "changed")?;
        }
        (Work::Kept, _) => {
            let possible = [TEXT, "changed", ""].contains(&&*text);
            hold("what was written is there as far as it came", possible, format!("{text:?}"))?;
        }
        _ => {
            equal("a root made anew shows of the base", &*text, TEXT)?;
            equal("a root made anew holds", mark, None)?;
        }
    }
    let _gone = fs::remove_file(tree.path(MARK.0));
    let seen = Manifest::of(&tree.dir(), Detail::Plain)?.below("var/d");
    Manifest::of(bench.site.small.dir(), Detail::Plain)?.below("var/d").expect("all else is as in the base", &seen)?;
    tree.write(MARK.0, MARK.1)?;
    tree.expect(MARK.0, MARK.1)?;
    drop(tree);
    root.close().step("it can be closed")?;
    drop(root);
    opened.backend.remove(&name).step("it can be removed")?;
    equal("removed, it is", find()?, None)?;
    let dir = bench.site.dir(DIR);
    let left = bench.site.settle(|| {
        opened.place.trash().empty().step("the trash can be emptied")?;
        let left = names(&dir)?;
        if let Some(expected) = expected {
            let more: Vec<_> = left.difference(expected).cloned().collect();
            equal("what is left that a life without crashes does not leave", more, Vec::new())?;
        }
        Ok(left)
    });
    drop(opened);
    // What a back end keeps for later may be what no other can delete: then the
    // directory stays, under another name.
    if fs::remove_dir_all(&dir).is_err() {
        let aside = (0..).map(|number| bench.site.dir(&format!("{DIR}-{number}"))).find(|aside| !aside.exists());
        aside.map_or(Ok(()), |aside| fs::rename(&dir, aside)).step("a directory can be renamed")?;
    }
    left
}

fn names(dir: &Path) -> Result<BTreeSet<String>, Failure> {
    let mut found = BTreeSet::new();
    // What a base consists of is one thing, however many files it has.
    for entry in walkdir::WalkDir::new(dir).max_depth(4) {
        let entry = entry.step("the store can be listed")?;
        found.insert(entry.path().strip_prefix(dir).unwrap_or(entry.path()).display().to_string());
    }
    Ok(found)
}
