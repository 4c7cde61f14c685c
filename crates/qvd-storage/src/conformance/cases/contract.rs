//! What callers of a back end rely on.

use qvd_core::{ErrorKind, RootPolicy};

use super::{
    super::{
        base::TEXT,
        bench::{Bench, create, id, mount},
        report::{Checked, Failure, Seen, Step, equal, hold, said},
        tree::Tree,
    },
    Listed,
};
use crate::{Capability, Deviation};

pub(super) const CASES: &[Listed] = &[
    ("works-here", None, works),
    ("capabilities-are-answered", None, answers),
    ("roots-are-listed", None, listed),
    ("use-is-noticed", Some(Deviation::UnnoticedUse), noticed),
    ("found-while-in-use", None, found_in_use),
    ("mounts-stay-private", None, private),
];

fn works(bench: &Bench) -> Checked {
    let answer = bench.capabilities.get(Capability::Roots);
    hold("roots can be made in this directory", bench.capabilities.works(), format!("{answer:?}"))?;
    Ok(Seen::Plain)
}

fn answers(bench: &Bench) -> Checked {
    let again = bench.backend.capabilities().step("they can be asked again")?;
    equal("the answers are", &again, &bench.capabilities)?;
    let silent: Vec<_> =
        bench.capabilities.iter().filter(|(_, support)| is_unasked(support)).map(|(one, _)| one).collect();
    equal("nothing is left unanswered", silent, Vec::<Capability>::new())?;
    let snapshots = bench.backend.snapshots().is_some();
    let offered = bench.capabilities.get(Capability::Snapshots).is_yes();
    hold("snapshots are given if they are offered", snapshots || !offered, "they are not")?;
    let name = bench.backend.name();
    let valid = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b);
    hold("the name can be a directory's", !name.is_empty() && name.len() <= 64 && name.bytes().all(valid), name)?;
    equal("trying leaves nothing", bench.backend.roots().step("roots can be listed")?, Vec::new())?;
    Ok(Seen::Plain)
}

/// Whether a capability has no answer but the one that stands for none.
fn is_unasked(support: &qvd_core::Support) -> bool {
    *support == crate::Capabilities::new().get(Capability::Roots)
}

fn listed(bench: &Bench) -> Checked {
    let names = ["0", "a", "a-1", "a_1", "kept"].map(id);
    let mut roots = Vec::new();
    for name in &names {
        let policy = if name.as_str() == "kept" { RootPolicy::Persistent } else { RootPolicy::Volatile };
        let root = bench.create(name, policy)?;
        equal("a root knows its name", root.id(), name)?;
        roots.push((name.clone(), policy, root));
    }
    let expected: Vec<_> = roots.iter().map(|(name, policy, _)| (name.clone(), *policy)).collect();
    let mut found = bench.backend.roots().step("roots can be listed")?;
    found.sort_by(|(one, _), (other, _)| one.cmp(other));
    equal("the roots are", found, expected)?;
    for (name, policy, _) in &roots {
        equal(format!("root {name} is found"), bench.backend.find(name).step("it can be asked for")?, Some(*policy))?;
    }
    equal("no other is", bench.backend.find(&id("other")).step("it can be asked for")?, None)?;
    bench.backend.remove(&id("other")).step("removing what is not there is no error")?;
    for (name, policy, mut root) in roots {
        root.close().step("a root that was never mounted can be closed")?;
        root.close().step("it can be closed again")?;
        let left = (policy == RootPolicy::Persistent).then_some(policy);
        equal(format!("root {name} is, closed,"), bench.backend.find(&name).step("it can be asked for")?, left)?;
    }
    bench.backend.remove(&id("kept")).step("a kept root can be removed")?;
    equal("nothing is left", bench.backend.roots().step("roots can be listed")?, Vec::new())?;
    Ok(Seen::Plain)
}

fn noticed(bench: &Bench) -> Checked {
    let name = id("used");
    let mut root = bench.create(&name, RootPolicy::Persistent)?;
    let tree = mount(&*root)?;
    tree.write("var/file", "in use")?;
    let busy = |what: &str, result: Result<(), crate::Error>| match result {
        Ok(()) => Ok(Some(Seen::Deviates(format!("{what} works while it is mounted")))),
        Err(error) if error.kind() == ErrorKind::Busy => Ok(None),
        Err(error) => Err(Failure::new(format!("{what} says that it is in use"), said(&error))),
    };
    if let Some(deviates) = busy("mounting it again", root.mount(None).map(drop))? {
        return Ok(deviates);
    }
    if let Some(deviates) = busy("removing it", bench.backend.remove(&name))? {
        return Ok(deviates);
    }
    tree.expect("var/file", "in use")?;
    drop(tree);
    root.close().step("it can be closed once it is unmounted")?;
    let mut volatile = bench.create(&id("volatile"), RootPolicy::Volatile)?;
    let tree = mount(&*volatile)?;
    if let Some(deviates) = busy("closing a volatile one", volatile.close())? {
        return Ok(deviates);
    }
    tree.expect("var/file", TEXT)?;
    drop(tree);
    volatile.close().step("it can be closed once it is unmounted")?;
    bench.backend.remove(&name).step("it can be removed once it is unmounted")?;
    Ok(Seen::Plain)
}

/// A desktop outlives the process that started it: the next one finds its root.
fn found_in_use(bench: &Bench) -> Checked {
    for policy in [RootPolicy::Volatile, RootPolicy::Persistent] {
        let opened = bench.site.open("found")?;
        let name = id("running");
        let root = create(&*opened.backend, &bench.site.base, &name, policy)?;
        let tree = mount(&*root)?;
        tree.write("var/file", "before")?;
        tree.write("var/new", "before")?;
        drop((root, opened));
        let opened = bench.site.open("found")?;
        let mut root = create(&*opened.backend, &bench.site.base, &name, policy)?;
        tree.expect("var/file", "before")?;
        tree.expect("var/new", "before")?;
        tree.write("var/new", "after")?;
        tree.expect("var/new", "after")?;
        drop(tree);
        root.close().step("it can be closed")?;
        opened.backend.remove(&name).step("it can be removed")?;
    }
    Ok(Seen::Plain)
}

fn private(bench: &Bench) -> Checked {
    let mounts = || std::fs::read_to_string("/proc/thread-self/mountinfo").step("the mount table can be read");
    let before = mounts()?;
    bench.with_tree(|tree: &Tree| {
        equal("the mount table has so many lines", mounts()?.lines().count(), before.lines().count())?;
        let flags = rustix::fs::fstatvfs(tree.fd()).step("the mount has flags")?.f_flag;
        hold("devices are forbidden", flags.contains(rustix::fs::StatVfsMountFlags::NODEV), format!("{flags:?}"))?;
        Ok(Seen::Plain)
    })
}
