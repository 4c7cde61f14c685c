//! What is left of roots that are gone: nothing.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    path::Path,
    sync::Arc,
    time::Duration,
};

use qvd_core::{Digest, RootPolicy};
use qvd_sys::process::traced::{self, Counted, End};

use super::{
    super::{
        bench::{Bench, Opened, Site, create, id, mount},
        report::{Checked, Failure, Seen, Step, equal},
    },
    Listed,
};

pub(super) const CASES: &[Listed] = &[("leaks", None, leaks)];

/// How long a child may take for it: it ends one that hangs.
const LIMIT: Duration = Duration::from_secs(600);

/// In a process of its own, where nobody else opens or mounts anything.
fn leaks(bench: &Bench) -> Checked {
    let report = bench.site.dir("leaks.txt");
    let (site, path) = (Arc::clone(&bench.site), report.clone());
    bench.rest()?;
    let work = move || {
        let text = match in_child(&site) {
            Ok(()) => String::new(),
            Err(Failure { expected, seen }) => format!("{expected}\n{seen}"),
        };
        u8::from(fs::write(&path, text).is_err())
    };
    let run = traced::run(None, Counted::Lasting, LIMIT, work).step("a child can be made")?;
    equal("the child ends", run.end, End::Returned(0))?;
    let mut text = String::new();
    File::open(&report).and_then(|mut file| file.read_to_string(&mut text)).step("its report can be read")?;
    if let Some((expected, seen)) = text.split_once('\n') {
        return Err(Failure::new(expected, seen));
    }
    fs::remove_file(report).step("its report can be removed")?;
    Ok(Seen::Plain)
}

fn in_child(site: &Site) -> Result<(), Failure> {
    let cycle = || {
        let opened = site.open("leaks")?;
        for (name, policy) in [("kept", RootPolicy::Persistent), ("volatile", RootPolicy::Volatile)] {
            let mut root = create(&*opened.backend, &site.base, &id(name), policy)?;
            for directory in ["var/dir", "var/many"] {
                let tree = mount(&*root)?;
                tree.write("var/file", "changed")?;
                tree.remove_all(directory)?;
            }
            root.close().step("it can be closed")?;
            opened.backend.remove(&id(name)).step("it can be removed")?;
        }
        // What goes wrong half way is cleaned up too.
        // Its digest is none of which a back end could have kept a copy.
        let missing = crate::BaseTree::new(Digest::new([1; 32]), site.dir("no-such-base"));
        for policy in [RootPolicy::Persistent, RootPolicy::Volatile] {
            if let Ok(root) = opened.backend.create(&missing, &id("missing"), &policy.into()) {
                let mounted = root.mount(None);
                equal("a root on a base that is not there can be mounted", mounted.is_ok(), false)?;
            }
            opened.backend.remove(&id("missing")).step("what has no base can be removed")?;
        }
        opened.place.trash().empty().step("the trash can be emptied")
    };
    // The first time, things are made that are kept on purpose.
    cycle()?;
    let dir = site.dir("leaks");
    let before = Everything::of(&dir)?;
    cycle()?;
    site.settle(|| before.expect(&Everything::of(&dir)?))?;
    let Opened { backend, .. } = site.open("leaks")?;
    equal("the roots are", backend.roots().step("roots can be listed")?, Vec::new())
}

/// Mounts, loop devices, descriptors, threads and files, each with a number of times.
#[derive(Debug, PartialEq, Eq)]
struct Everything(BTreeMap<String, usize>);

impl Everything {
    fn of(dir: &Path) -> Result<Self, Failure> {
        let mut found = BTreeMap::new();
        let mut add = |what: String| *found.entry(what).or_default() += 1;
        let list = |dir: &str| {
            let entries = fs::read_dir(dir).step(format!("{dir} can be listed"))?;
            entries.collect::<Result<Vec<_>, _>>().step(format!("{dir} can be listed"))
        };
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").step("the mount table can be read")?;
        mounts.lines().for_each(|line| add(format!("mount {line}")));
        for entry in list("/proc/self/fd")? {
            // The descriptor that lists them is among them, both times.
            let target = fs::read_link(entry.path()).unwrap_or_default();
            add(format!("descriptor of {}", without_numbers(&target.to_string_lossy())));
        }
        list("/proc/self/task")?.iter().for_each(|_| add("thread".to_owned()));
        for entry in list("/sys/block")? {
            let file = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
            if file.starts_with(&*dir.to_string_lossy()) {
                add(format!("loop device on {}", file.trim()));
            }
        }
        for entry in walkdir::WalkDir::new(dir) {
            add(format!("file {}", entry.step("the store can be listed")?.path().display()));
        }
        Ok(Self(found))
    }

    fn expect(&self, now: &Self) -> Result<(), Failure> {
        let more = |one: &Self, other: &Self| -> Vec<String> {
            one.0
                .iter()
                .filter(|(what, count)| other.0.get(*what) < Some(*count))
                .map(|(what, _)| what.clone())
                .collect()
        };
        let (left, mut gone) = (more(now, self), more(self, now));
        // One that deleted in the background, and has.
        gone.retain(|what| what != "thread");
        equal("what is left of roots that are gone", left, Vec::new())?;
        equal("what is missing that was there before", gone, Vec::new())
    }
}

/// Descriptors of processes and pipes bear numbers that change.
fn without_numbers(text: &str) -> String {
    text.chars().filter(|c| !c.is_ascii_digit()).collect()
}
