//! The census sees every kind of thing that a test could leave.
#![allow(clippy::unwrap_used, clippy::print_stderr, missing_docs)]

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use qvd_testkit::{Census, Kind, Need, Scope, privileged};

/// How `before` differs now, with no time to settle.
fn now(before: &Census) -> Vec<(Kind, String)> {
    before.settle(Duration::ZERO).added.into_iter().map(|object| (object.kind, object.name)).collect()
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Lower-case letters and digits that no other test's objects have.
fn mark() -> String {
    format!("cns{}", std::process::id())
}

#[test]
fn a_file_left_behind_is_seen_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let before = Census::take(&Scope::marked([mark()]).files_under(dir.path()).files_under("/nonexistent"));
    before.assert_unchanged();
    symlink("/", dir.path().join("link")).unwrap();
    assert_eq!(now(&before), [(Kind::File, dir.path().join("link").display().to_string())]);
}

#[test]
fn a_child_is_seen_until_it_was_waited_for() {
    let before = Census::take(&Scope::marked([mark()]));
    let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
    // `spawn` returns once the child has become `cat`.
    assert_eq!(now(&before), [(Kind::Process, format!("{} cat", child.id()))]);
    child.kill().unwrap();
    child.wait().unwrap();
    before.assert_unchanged();
}

#[test]
fn a_namespace_held_by_a_descriptor_is_seen() {
    privileged(&[Need::Root, Need::Namespaces], || {
        let before = Census::take(&Scope::marked([mark()]));
        let mut child = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo ready; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let held = File::open(format!("/proc/{}/ns/net", child.id())).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let left = now(&before);
        assert!(matches!(&left[..], [(Kind::Namespace, name)] if name.starts_with("net:[")), "{left:?}");
        drop(held);
        before.assert_unchanged();
    });
}

#[test]
fn kernel_objects_are_seen_and_missed() {
    privileged(&[Need::Root, Need::Namespaces, Need::Cgroup, Need::Nftables, Need::Program("ip")], || {
        let mark = mark();
        let dir = tempfile::Builder::new().prefix(&mark).tempdir().unwrap();
        let before = Census::take(&Scope::marked([&mark]).files_under(dir.path()));

        let mount = dir.path().join("mount");
        fs::create_dir(&mount).unwrap();
        run("mount", &["-t", "tmpfs", "none", mount.to_str().unwrap()]);
        run("ip", &["link", "add", &mark, "type", "bridge"]);
        run("nft", &["add", "table", "inet", &mark]);
        let cgroup = cgroup_root().join(&mark);
        fs::create_dir(&cgroup).unwrap();
        let left: Vec<Kind> = now(&before).into_iter().map(|(kind, _)| kind).collect();
        let report = catch_unwind(AssertUnwindSafe(|| assert!(now(&before).is_empty())));

        let full = Census::take(&Scope::marked([&mark]).files_under(dir.path()));
        fs::remove_dir(&cgroup).unwrap();
        run("nft", &["delete", "table", "inet", &mark]);
        run("ip", &["link", "del", &mark]);
        run("umount", &[mount.to_str().unwrap()]);
        fs::remove_dir(&mount).unwrap();

        assert!(report.is_err());
        assert_eq!(left, [Kind::Mount, Kind::Link, Kind::Nftables, Kind::Cgroup, Kind::File]);
        before.assert_unchanged();
        assert_eq!(full.settle(Duration::ZERO).removed.len(), left.len());
    });
}

fn cgroup_root() -> &'static Path {
    const ROOTS: [&str; 2] = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"];
    ROOTS.map(Path::new).into_iter().find(|root| root.join("cgroup.procs").exists()).unwrap()
}

#[test]
fn an_earlier_census_is_compared_across_processes() {
    let dir = tempfile::tempdir().unwrap();
    let census = |args: &[&str]| Command::new(env!("CARGO_BIN_EXE_qvd-census")).args(args).output().unwrap();
    let watched = dir.path().join("run");
    fs::create_dir(&watched).unwrap();
    let before = dir.path().join("before.json");
    fs::write(&before, census(&["--mark", &mark(), "--dir", watched.to_str().unwrap()]).stdout).unwrap();
    let compare = || census(&["--compare", before.to_str().unwrap(), "--settle", "0"]);

    assert_eq!(compare().status.code(), Some(0));
    fs::write(watched.join("socket"), "").unwrap();
    let output = compare();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("+ File: {}\n", watched.join("socket").display()));
    assert_eq!(census(&["--compare", "/nonexistent"]).status.code(), Some(2));
}
