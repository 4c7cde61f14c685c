#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
};

use qvd_core::{Bytes, MilliCpu};

use super::*;

/// A tree that behaves as the kernel's does and forgives nothing: files exist
/// only where a controller is enabled, groups with processes or children
/// cannot be removed.
#[derive(Debug, Default, Clone)]
struct Strict(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Control files and content of each group.
    groups: BTreeMap<PathBuf, BTreeMap<String, String>>,
    unified: bool,
    removed: Vec<PathBuf>,
    given: Vec<(PathBuf, u32)>,
}

const ROOT: &str = "/fake";

/// A process that does not stand still.
const STUBBORN: &str = "13";

impl Strict {
    fn new(unified: bool) -> Self {
        let strict = Self::default();
        let mut state = strict.state();
        state.unified = unified;
        let mut files = BTreeMap::from([("cgroup.procs".to_owned(), String::new())]);
        if unified {
            files.insert("cgroup.controllers".to_owned(), "cpuset cpu io memory pids".to_owned());
            files.insert("cgroup.subtree_control".to_owned(), String::new());
        }
        state.groups.insert(PathBuf::from(ROOT), files);
        drop(state);
        strict
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn file(&self, path: &str) -> String {
        self.read(&Path::new(ROOT).join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }
}

fn split(path: &Path) -> (PathBuf, String) {
    (path.parent().unwrap().to_owned(), path.file_name().unwrap().to_str().unwrap().to_owned())
}

fn os(error: i32) -> io::Error {
    io::Error::from_raw_os_error(error)
}

impl Tree for Strict {
    fn make(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.groups.contains_key(path) {
            return Err(os(libc::EEXIST));
        }
        let above = state.groups.get(path.parent().unwrap()).ok_or_else(|| os(libc::ENOENT))?;
        let names: Vec<&str> = if state.unified {
            let enabled = &above["cgroup.subtree_control"];
            let mut names = vec![
                "cgroup.procs",
                "cgroup.threads",
                "cgroup.kill",
                "cgroup.subtree_control",
                "cgroup.events",
                "cgroup.freeze",
                "cgroup.max.depth",
                "cgroup.max.descendants",
            ];
            for (controller, files) in [
                ("memory", &["memory.max", "memory.swap.max"][..]),
                ("cpu", &["cpu.max"]),
                ("pids", &["pids.max"]),
                ("io", &["io.max"]),
            ] {
                if enabled.contains(controller) {
                    names.extend(files);
                }
            }
            names
        } else {
            // A kernel without swap accounting: no memory.memsw.
            vec![
                "cgroup.procs",
                "memory.limit_in_bytes",
                "cpu.cfs_period_us",
                "cpu.cfs_quota_us",
                "pids.max",
                "freezer.state",
            ]
        };
        let files = names.into_iter().map(|name| (name.to_owned(), String::new())).collect();
        state.groups.insert(path.to_owned(), files);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        let files = state.groups.get(path).ok_or_else(|| os(libc::ENOENT))?;
        let occupied = !files["cgroup.procs"].is_empty();
        if occupied || state.groups.keys().any(|other| other != path && other.starts_with(path)) {
            return Err(os(libc::EBUSY));
        }
        state.groups.remove(path);
        state.removed.push(path.to_owned());
        Ok(())
    }

    fn write(&self, path: &Path, value: &str) -> io::Result<()> {
        let (group, name) = split(path);
        let mut state = self.state();
        let files = state.groups.get_mut(&group).ok_or_else(|| os(libc::ENOENT))?;
        let stubborn = files.get("cgroup.procs").is_some_and(|procs| procs == STUBBORN);
        let file = files.get_mut(&name).ok_or_else(|| os(libc::ENOENT))?;
        match name.as_str() {
            "cgroup.kill" => files.get_mut("cgroup.procs").unwrap().clear(),
            "cgroup.freeze" => {
                value.clone_into(file);
                files.insert("cgroup.events".to_owned(), format!("populated 1\nfrozen {value}\n"));
            }
            // A v1 group with something that does not stop stays on its way there.
            "freezer.state" if value == "FROZEN" && stubborn => "FREEZING".clone_into(file),
            _ => value.clone_into(file),
        }
        Ok(())
    }

    fn read(&self, path: &Path) -> io::Result<String> {
        let (group, name) = split(path);
        let state = self.state();
        state.groups.get(&group).and_then(|files| files.get(&name)).cloned().ok_or_else(|| os(libc::ENOENT))
    }

    fn give(&self, path: &Path, owner: u32) -> io::Result<()> {
        let file = if self.state().groups.contains_key(path) { path.join("cgroup.procs") } else { path.to_owned() };
        self.read(&file)?;
        self.state().given.push((path.to_owned(), owner));
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let state = self.state();
        let below = state.groups.keys().filter(|group| group.parent() == Some(path));
        Ok(below.map(|group| split(group).1).collect())
    }
}

const LIMITS: Limits = Limits { memory: Bytes::mib(512), cpu: MilliCpu(1500), pids: 99, io: None };

fn id(number: u32) -> DesktopId {
    DesktopId::new(number).unwrap()
}

fn open(strict: &Strict, unified: bool) -> Arc<Cgroups> {
    let controllers = if unified { &Controller::REQUIRED[..] } else { &Controller::ALL };
    let hierarchies = vec![Hierarchy { root: ROOT.into(), unified, controllers: controllers.to_vec() }];
    Arc::new(Cgroups::new(Box::new(strict.clone()), hierarchies, Instance::new(0x1a2b)).unwrap())
}

#[test]
fn v2_limits_are_enabled_from_the_top_and_written() {
    let strict = Strict::new(true);
    let all = open(&strict, true);
    let mut cgroup = all.create(id(7), LIMITS, None).unwrap();
    assert_eq!(strict.file("cgroup.subtree_control"), "+memory +cpu +pids");
    assert_eq!(strict.file("qvd-1a2b/cgroup.subtree_control"), "+memory +cpu +pids");
    let limits: BTreeMap<_, _> = cgroup.limits().unwrap().into_iter().collect();
    let expected = [
        ("cpu.max", "150000 100000"),
        ("memory.max", "536870912"),
        ("memory.swap.max", "536870912"),
        ("pids.max", "99"),
    ];
    assert!(limits.iter().map(|(file, value)| (file.as_str(), value.as_str())).eq(expected), "{limits:?}");

    cgroup.attach(42).unwrap();
    assert!(all.holds(id(7), 42).unwrap());
    assert!(!all.holds(id(7), 43).unwrap());
    cgroup.close().unwrap();
    assert!(all.names().unwrap().is_empty());
    drop((cgroup, all));
    assert_eq!(strict.state().groups.len(), 1, "only the root is left");
}

#[test]
fn v1_without_swap_accounting_is_limited_all_the_same() {
    let strict = Strict::new(false);
    let mut cgroup = open(&strict, false).create(id(7), LIMITS, None).unwrap();
    assert_eq!(strict.file("qvd-1a2b/7/memory.limit_in_bytes"), "536870912");
    assert_eq!(strict.file("qvd-1a2b/7/cpu.cfs_quota_us"), "150000");
    assert_eq!(strict.file("qvd-1a2b/7/pids.max"), "99");
    cgroup.close().unwrap();
}

#[test]
fn a_group_that_is_left_over_is_replaced_and_one_in_use_is_not() {
    let strict = Strict::new(true);
    let all = open(&strict, true);
    let mut first = all.create(id(7), LIMITS, None).unwrap();
    first.leave();
    let mut second = all.create(id(7), LIMITS, None).unwrap();
    assert_eq!(strict.state().removed.len(), 1, "not the same group again");
    second.attach(42).unwrap();
    assert!(matches!(all.create(id(7), LIMITS, None), Err(Error::Busy(_))));
    assert!(all.holds(id(7), 42).unwrap(), "the refusal left it alone");
    second.close().unwrap();
}

#[test]
fn a_host_without_a_controller_is_refused() {
    let hierarchies = vec![Hierarchy { root: ROOT.into(), unified: true, controllers: vec![Controller::Cpu] }];
    let error = Cgroups::new(Box::new(Strict::new(true)), hierarchies, Instance::new(1)).unwrap_err();
    assert!(error.to_string().contains("`memory`"), "{error}");
}

#[test]
fn controllers_are_found_in_v1_v2_and_hybrid_hosts() {
    let line = |at: &str, kind: &str, options: &str| {
        format!("30 23 0:26 / {at} rw,nosuid shared:9 - {kind} {kind} rw,{options}\n")
    };
    let strict = Strict::new(true);
    let pure = find(&strict, &line(ROOT, "cgroup2", "nsdelegate"));
    let mut controllers = Controller::REQUIRED.to_vec();
    controllers.push(Controller::Io);
    assert_eq!(pure, [Hierarchy { root: ROOT.into(), unified: true, controllers }]);

    // The v2 tree of a hybrid host has no controller that is ours.
    let v1 = line("/c/cpu,cpuacct", "cgroup", "cpu,cpuacct") + &line("/c/pids", "cgroup", "pids");
    let hybrid = line("/c/unified", "cgroup2", "") + &v1 + &line("/c/memory", "cgroup", "memory");
    let found = find(&strict, &hybrid);
    let roots: Vec<_> = found.iter().map(|h| (h.root.to_str().unwrap(), h.unified)).collect();
    assert_eq!(roots, [("/c/cpu,cpuacct", false), ("/c/pids", false), ("/c/memory", false)]);

    // A part of a tree, as containers see it, is no place for groups.
    let part = "30 23 0:26 /below /c/memory rw - cgroup cgroup rw,memory\n";
    assert!(find(&strict, part).is_empty());
}

#[test]
fn groups_of_both_kinds_are_frozen_and_thawed() {
    for unified in [true, false] {
        let strict = Strict::new(unified);
        let mut cgroup = open(&strict, unified).create(id(7), LIMITS, None).unwrap();
        let freezer = cgroup.freezer(id(7)).unwrap();
        assert!(!freezer.is_frozen().unwrap());
        freezer.freeze().unwrap();
        assert!(freezer.is_frozen().unwrap());
        freezer.thaw().unwrap();
        assert!(!freezer.is_frozen().unwrap());
        cgroup.close().unwrap();
        assert!(!freezer.is_frozen().unwrap(), "what is gone is not frozen");
        freezer.thaw().unwrap();
    }
}

#[test]
fn what_does_not_stop_runs_on_after_the_refusal() {
    let strict = Strict::new(false);
    let cgroup = open(&strict, false).create(id(7), LIMITS, None).unwrap();
    let group = Path::new(ROOT).join("qvd-1a2b/7");
    strict.write(&group.join("cgroup.procs"), STUBBORN).unwrap();
    let error = cgroup.freezer(id(7)).unwrap().freeze().unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert_eq!(strict.file("qvd-1a2b/7/freezer.state"), "THAWED");
    strict.write(&group.join("cgroup.procs"), "").unwrap();
}

/// What a kernel says of a group's memory.
fn says(strict: &Strict, files: &[(&str, &str)]) {
    let mut state = strict.state();
    let group = state.groups.get_mut(&PathBuf::from(ROOT).join("qvd-1a2b/7")).unwrap();
    group.extend(files.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
}

#[test]
fn memory_is_what_is_kept_and_is_asked_back_where_the_kernel_can() {
    let strict = Strict::new(true);
    let cgroup = open(&strict, true).create(id(7), LIMITS, None).unwrap();
    says(
        &strict,
        &[("memory.current", "9000\n"), ("memory.stat", "anon 5000\ninactive_file 1000\nactive_file 3000\n")],
    );
    assert_eq!(cgroup.memory().unwrap(), 8000);
    assert!(!cgroup.reclaim(4096).unwrap(), "a kernel without the file");
    says(&strict, &[("memory.reclaim", "")]);
    assert!(cgroup.reclaim(4096).unwrap());
    assert_eq!(strict.file("qvd-1a2b/7/memory.reclaim"), "4096");

    let strict = Strict::new(false);
    let cgroup = open(&strict, false).create(id(7), LIMITS, None).unwrap();
    let stat = "inactive_file 1\ntotal_inactive_file 1000\n";
    says(&strict, &[("memory.usage_in_bytes", "9000"), ("memory.stat", stat)]);
    assert_eq!(cgroup.memory().unwrap(), 8000);
    assert!(!cgroup.reclaim(4096).unwrap());
}

#[test]
fn a_group_to_divide_lies_below_its_limits_and_goes_with_all_that_is_in_it() {
    let strict = Strict::new(true);
    let all = open(&strict, true);
    let ids = UidRange::of_slot(7).unwrap();
    let mut cgroup = all.create(id(7), LIMITS, Some(ids)).unwrap();
    assert_eq!(strict.file("qvd-1a2b/7/pids.max"), "99");
    assert_eq!(strict.file("qvd-1a2b/7/cgroup.max.descendants"), "512");
    assert_eq!(strict.file("qvd-1a2b/7/cgroup.subtree_control"), "+memory +cpu +pids");
    let inside = Path::new(ROOT).join("qvd-1a2b/7/desktop");
    let given = strict.state().given.clone();
    assert_eq!(given.len(), 4);
    assert!(given.iter().all(|(path, owner)| path.starts_with(&inside) && *owner == ids.base()), "{given:?}");
    // As an init inside divides it.
    for group in ["init.scope", "system.slice", "system.slice/a.service"] {
        strict.make(&inside.join(group)).unwrap();
    }
    strict.write(&inside.join("system.slice/a.service/cgroup.procs"), "42").unwrap();
    assert_eq!(cgroup.processes().unwrap(), [42]);
    assert!(all.holds(id(7), 42).unwrap());
    assert!(matches!(all.create(id(7), LIMITS, None), Err(Error::Busy(_))));
    strict.write(&inside.join("system.slice/a.service/cgroup.procs"), "").unwrap();
    cgroup.close().unwrap();
    assert!(all.names().unwrap().is_empty());

    let v1 = open(&Strict::new(false), false);
    let error = v1.create(id(7), LIMITS, Some(ids)).unwrap_err();
    assert!(error.to_string().contains("version 2"), "{error}");
}

#[test]
fn a_limit_that_no_controller_enforces_is_refused() {
    let all = open(&Strict::new(true), true);
    let limits = Limits { io: Some(Bytes::mib(1)), ..LIMITS };
    let error = all.create(id(7), limits, None).unwrap_err();
    assert!(matches!(&error, Error::Unsupported { .. }) && error.to_string().contains("`io`"), "{error}");
    assert!(all.names().unwrap().is_empty());
}

#[test]
fn what_stands_still_gives_back_all_it_has() {
    for (unified, used, file, asked) in [
        (true, "memory.current", "memory.reclaim", "4096"),
        (false, "memory.usage_in_bytes", "memory.force_empty", "0"),
    ] {
        let strict = Strict::new(unified);
        let mut cgroup = open(&strict, unified).create(id(7), LIMITS, None).unwrap();
        let group = Path::new(ROOT).join("qvd-1a2b/7");
        let add = |name: &str, value: &str| {
            strict.state().groups.get_mut(&group).unwrap().insert(name.to_owned(), value.to_owned());
        };
        add(used, "4096\n");
        cgroup.reclaim_all().unwrap();
        add(file, "");
        cgroup.reclaim_all().unwrap();
        assert_eq!(strict.file(&format!("qvd-1a2b/7/{file}")), asked);

        assert_eq!(cgroup.refused_processes().unwrap(), 0, "a kernel that does not count");
        add("pids.events", "max 12\n");
        assert_eq!(cgroup.refused_processes().unwrap(), 12);

        assert_eq!(cgroup.killed_for_memory().unwrap(), 0, "a kernel that does not count");
        let (file, text) = match unified {
            true => ("memory.events", "low 0\noom 2\noom_kill 3\noom_group_kill 1\n"),
            false => ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
        };
        add(file, text);
        assert_eq!(cgroup.killed_for_memory().unwrap(), 3);
        cgroup.close().unwrap();
    }
}
