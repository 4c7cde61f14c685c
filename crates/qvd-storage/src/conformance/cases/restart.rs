//! What is there after the process that made it is gone.

use std::fs;

use qvd_core::{ErrorKind, RootPolicy};

use super::{
    super::{
        base::TEXT,
        bench::{Bench, create, id, mount},
        manifest::{Detail, Manifest},
        report::{Checked, Failure, Seen, Step, equal, said},
    },
    Listed,
};
use crate::Deviation;

pub(super) const CASES: &[Listed] = &[
    ("kept-roots-survive", None, kept),
    ("kept-roots-stay-with-their-base", None, other_base),
    ("volatile-roots-begin-anew", None, anew),
    ("volatile-roots-are-swept", None, swept),
    ("removed-roots-are-gone", None, removed),
    ("bases-are-forgotten", None, forgotten),
];

fn kept(bench: &Bench) -> Checked {
    let opened = bench.site.open("restart-kept")?;
    let name = id("kept");
    let mut root = create(&*opened.backend, &bench.site.base, &name, RootPolicy::Persistent)?;
    let tree = mount(&*root)?;
    tree.write("var/file", "kept")?;
    tree.write("var/new", "kept")?;
    tree.remove("var/other")?;
    tree.remove_all("var/many")?;
    tree.mkdir("var/many")?;
    tree.chmod("var/dir/a", 0o640)?;
    tree.chown("var/dir/b", 7, 8)?;
    tree.link("var/new", "var/dir/link")?;
    if !bench.deviates(Deviation::NoDirectoryRename) {
        tree.rename("var/full", "var/renamed")?;
    }
    if !bench.deviates(Deviation::NoXattrs) {
        tree.set_xattr("var/dir/a", "user.new", b"kept")?;
    }
    let before = Manifest::of(&tree.dir(), Detail::Times)?;
    drop(tree);
    root.close().step("it can be closed")?;
    drop((root, opened));
    for _ in 0..2 {
        let opened = bench.site.open("restart-kept")?;
        let found = opened.backend.roots().step("roots can be listed")?;
        equal("the roots are", found, vec![(name.clone(), RootPolicy::Persistent)])?;
        let root = create(&*opened.backend, &bench.site.base, &name, RootPolicy::Persistent)?;
        let tree = mount(&*root)?;
        before.expect("a kept root is as it was", &Manifest::of(&tree.dir(), Detail::Times)?)?;
        // The second time, nobody closes it: its process was killed.
    }
    let opened = bench.site.open("restart-kept")?;
    opened.backend.remove(&name).step("it can be removed")?;
    opened.place.trash().empty().step("the trash can be emptied")?;
    equal("the roots are", opened.backend.roots().step("roots can be listed")?, Vec::new())?;
    Ok(Seen::Plain)
}

fn other_base(bench: &Bench) -> Checked {
    let name = id("kept");
    let mut root = bench.create(&name, RootPolicy::Persistent)?;
    let tree = mount(&*root)?;
    tree.write("var/file", "kept")?;
    drop(tree);
    root.close().step("it can be closed")?;
    let options = RootPolicy::Persistent.into();
    match bench.backend.create(&bench.site.small.tree, &name, &options) {
        Err(error) if error.kind() == ErrorKind::Invalid => {}
        Err(error) => return Err(Failure::new("the refusal says that the request is wrong", said(&error))),
        Ok(_) => return Err(Failure::new("a kept root on another base is refused", "it is made")),
    }
    let root = bench.create(&name, RootPolicy::Persistent)?;
    let tree = mount(&*root)?;
    tree.expect("var/file", "kept")?;
    drop(tree);
    bench.backend.remove(&name).step("it can be removed")?;
    Ok(Seen::Plain)
}

fn anew(bench: &Bench) -> Checked {
    let mut root = bench.create(&id("volatile"), RootPolicy::Volatile)?;
    for _ in 0..3 {
        let tree = mount(&*root)?;
        let now = Manifest::of(&tree.dir(), Detail::Times)?;
        bench.site.base.shown.expect("each mount of a volatile root shows the base", &now)?;
        tree.write("var/file", "left")?;
        tree.write("var/new", "left")?;
        tree.remove_all("var/dir")?;
    }
    // What was disposable is never taken for kept, nor the other way round.
    drop(root);
    let mut kept = bench.create(&id("volatile"), RootPolicy::Persistent)?;
    let tree = mount(&*kept)?;
    tree.expect("var/file", TEXT)?;
    tree.write("var/file", "kept")?;
    drop(tree);
    kept.close().step("it can be closed")?;
    root = bench.create(&id("volatile"), RootPolicy::Volatile)?;
    let tree = mount(&*root)?;
    tree.expect("var/file", TEXT)?;
    drop(tree);
    root.close().step("it can be closed")?;
    equal("closed, it is", bench.backend.find(&id("volatile")).step("it can be asked for")?, None)?;
    Ok(Seen::Plain)
}

fn swept(bench: &Bench) -> Checked {
    let names = ["one", "two"].map(id);
    {
        let opened = bench.site.open("restart-swept")?;
        for name in &names {
            let root = create(&*opened.backend, &bench.site.base, name, RootPolicy::Volatile)?;
            let tree = mount(&*root)?;
            tree.write("var/file", "left")?;
            // The process dies: neither the root nor the back end is closed.
        }
    }
    let opened = bench.site.open("restart-swept")?;
    let found = opened.backend.roots().step("roots can be listed")?;
    let expected: Vec<_> = names.iter().map(|name| (name.clone(), RootPolicy::Volatile)).collect();
    equal("the roots are", found, expected)?;
    let [one, two] = names;
    let mut root = create(&*opened.backend, &bench.site.base, &one, RootPolicy::Volatile)?;
    let tree = mount(&*root)?;
    tree.expect("var/file", TEXT)?;
    drop(tree);
    root.close().step("it can be closed")?;
    opened.backend.remove(&two).step("what nobody keeps can be swept")?;
    equal("the roots are", opened.backend.roots().step("roots can be listed")?, Vec::new())?;
    Ok(Seen::Plain)
}

fn removed(bench: &Bench) -> Checked {
    let name = id("removed");
    {
        let opened = bench.site.open("restart-removed")?;
        let root = create(&*opened.backend, &bench.site.base, &name, RootPolicy::Persistent)?;
        let tree = mount(&*root)?;
        tree.write("var/file", "gone")?;
        drop(tree);
        opened.backend.remove(&name).step("it can be removed")?;
        equal("removed, it is", opened.backend.find(&name).step("it can be asked for")?, None)?;
    }
    let opened = bench.site.open("restart-removed")?;
    equal("after a restart, it is", opened.backend.find(&name).step("it can be asked for")?, None)?;
    let mut root = create(&*opened.backend, &bench.site.base, &name, RootPolicy::Persistent)?;
    let tree = mount(&*root)?;
    tree.expect("var/file", TEXT)?;
    drop(tree);
    root.close().step("it can be closed")?;
    opened.backend.remove(&name).step("it can be removed")?;
    drop(opened);
    // What is of no use to anybody is deleted, in the end.
    bench.site.settle(|| {
        let trash = bench.site.dir("restart-removed").join("trash");
        let left = fs::read_dir(&trash).step("the trash can be listed")?.count();
        let emptied = bench.site.open("restart-removed")?.place.trash().empty().step("the trash can be emptied");
        emptied.and_then(|()| equal("the trash holds so many", left, 0))
    })?;
    Ok(Seen::Plain)
}

/// Bases whose image is gone are given up; roots on them, and roots to come, are as ever.
fn forgotten(bench: &Bench) -> Checked {
    let opened = bench.site.open("forgotten")?;
    let (used, new) = (id("used"), id("new"));
    let mut kept = create(&*opened.backend, &bench.site.small, &used, RootPolicy::Persistent)?;
    let tree = mount(&*kept)?;
    tree.write("var/new", "kept")?;
    let digest = bench.site.small.tree.digest();
    opened.backend.forget_bases(&|_| false).step("nothing can be forgotten")?;
    opened.backend.forget_bases(&|base| base == digest).step("a base can be forgotten while it is used")?;
    opened.place.trash().empty().step("the trash can be emptied")?;
    opened.backend.forget_bases(&|base| base == digest).step("it can be forgotten again")?;
    tree.expect("var/new", "kept")?;
    tree.expect("var/d/f", TEXT)?;
    drop(tree);
    kept.close().step("it can be closed")?;
    let mut other = create(&*opened.backend, &bench.site.small, &new, RootPolicy::Volatile)?;
    let tree = mount(&*other)?;
    tree.expect("var/d/f", TEXT)?;
    tree.expect_absent("var/new")?;
    drop(tree);
    other.close().step("it can be closed")?;
    let tree = mount(&*create(&*opened.backend, &bench.site.small, &used, RootPolicy::Persistent)?)?;
    tree.expect("var/new", "kept")?;
    drop(tree);
    opened.backend.remove(&used).step("it can be removed")?;
    opened.place.trash().empty().step("the trash can be emptied")?;
    Ok(Seen::Plain)
}
