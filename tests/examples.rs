//! The examples, run as their first lines say.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::{fd::AsFd as _, unix::fs::FileExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use qvd_testkit::{Census, Need, Scope, copy_program_as, privileged};
use serde_json::Value;

/// Examples are built beside the tests' own directory.
fn example(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    own.parent().and_then(Path::parent).unwrap().join("examples").join(name)
}

fn base(dir: &Path) -> PathBuf {
    let base = dir.join("base");
    fs::create_dir_all(base.join("etc")).unwrap();
    fs::write(base.join("etc/f"), "from the base").unwrap();
    base
}

fn rootfs(backend: &str, dir: &Path) -> Command {
    let mut command = Command::new(example("rootfs"));
    command.args(["--backend", backend, "--base"]).arg(base(dir)).arg("--store").arg(dir.join("store"));
    command
}

/// Runs it with open input, shows its first `count` roots to `look`, and ends its input.
fn with_roots(command: &mut Command, count: usize, look: impl FnOnce(Vec<Value>)) {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().take(count);
    let roots: Vec<Value> = lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    assert_eq!(roots.len(), count);
    look(roots);
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}

fn path(root: &Value) -> PathBuf {
    root["path"].as_str().unwrap().into()
}

#[test]
fn rootfs_makes_roots_that_are_seen_from_outside_and_removes_them() {
    privileged(&[Need::Root, Need::LoopDevices], || {
        for backend in ["overlayfs", "copy", "bind", "loop"] {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("store")).unwrap();
            let before = Census::take(&Scope::marked([dir.path().file_name().unwrap().to_str().unwrap()]));
            with_roots(rootfs(backend, dir.path()).args(["--count", "2"]), 2, |roots| {
                let (one, other) = (path(&roots[0]), path(&roots[1]));
                assert_eq!(fs::read_to_string(one.join("etc/f")).unwrap(), "from the base");
                fs::write(one.join("etc/f"), "mine").unwrap();
                assert_eq!(fs::read_to_string(other.join("etc/f")).unwrap(), "from the base", "{backend}");
                assert!(roots[0]["create_us"].as_u64().is_some());
                assert!(roots[0]["capabilities"].is_object());
            });
            assert_eq!(fs::read_to_string(dir.path().join("base/etc/f")).unwrap(), "from the base", "{backend}");
            let left: Vec<_> = fs::read_dir(dir.path().join("store/roots")).unwrap().flatten().collect();
            assert!(left.iter().all(|entry| entry.file_name() == "TEMPLATES"), "{backend} left {left:?}");
            assert_eq!(fs::read_dir(dir.path().join("store/trash")).unwrap().count(), 0, "{backend}");
            before.assert_unchanged();
        }
    });
}

#[test]
fn rootfs_keeps_what_it_is_told_to() {
    privileged(&[Need::Root], || {
        let dir = tempfile::tempdir().unwrap();
        let mut kept = rootfs("overlayfs", dir.path());
        kept.arg("--keep");
        with_roots(&mut kept, 1, |roots| fs::write(path(&roots[0]).join("etc/f"), "kept").unwrap());
        with_roots(&mut kept, 1, |roots| {
            assert_eq!(fs::read_to_string(path(&roots[0]).join("etc/f")).unwrap(), "kept");
        });
    });
}

#[test]
fn rootfs_says_what_is_wrong() {
    privileged(&[Need::Root], || {
        let dir = tempfile::tempdir().unwrap();
        for (backend, args, says) in [
            ("absent", &[][..], "absent"),
            ("copy", &["--size", "1000000"], "use `loop` for limits"),
            ("overlayfs", &["--base", "/absent"], "/absent"),
        ] {
            let output = rootfs(backend, dir.path()).args(args).stdin(Stdio::null()).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!output.status.success() && said.contains(says), "{said}");
        }
    });
}

/// On a raw base that begins with a line of text.
fn disk(backend: &str, dir: &Path) -> Command {
    let base = dir.join("base.raw");
    let file = fs::File::create(&base).unwrap();
    file.set_len(4 << 20).unwrap();
    file.write_all_at(b"from the base", 0).unwrap();
    let mut command = Command::new(example("disk"));
    command.args(["--backend", backend, "--base"]).arg(base).arg("--store").arg(dir.join("store"));
    command
}

fn device(disk: &Value) -> PathBuf {
    disk["device"].as_str().unwrap().into()
}

/// Lets QEMU execute a command on a disk, as a virtual machine would.
fn qemu_io(disk: &Value, command: &str) -> String {
    let format = disk["format"].as_str().unwrap();
    let output = Command::new("qemu-io").args(["-f", format, "-c", command]).arg(device(disk)).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

#[test]
fn disk_makes_disks_that_are_apart_and_removes_them() {
    privileged(&[Need::Program("qemu-io")], || {
        for backend in ["qcow2", "copy"] {
            let dir = tempfile::tempdir().unwrap();
            with_roots(disk(backend, dir.path()).args(["--count", "2", "--size", "8388608"]), 2, |disks| {
                for (number, disk) in disks.iter().enumerate() {
                    assert_eq!(disk["id"], (number + 1).to_string());
                    assert_eq!(disk["size"], 8 << 20);
                    assert!(disk["create_us"].is_u64() && disk["capabilities"].is_object(), "{disk}");
                    // 0x66 is the `f` of what the base begins with.
                    let said = qemu_io(disk, "read -P 0x66 0 1");
                    assert!(!said.contains("failed"), "{backend}: {said}");
                    qemu_io(disk, "write -P 1 0 4k");
                }
            });
            assert!(fs::read(dir.path().join("base.raw")).unwrap().starts_with(b"from the base"), "{backend}");
            assert_eq!(fs::read_dir(dir.path().join("store/disks")).unwrap().count(), 0, "{backend}");
            assert_eq!(fs::read_dir(dir.path().join("store/trash")).unwrap().count(), 0, "{backend}");
        }
    });
}

#[test]
fn disk_keeps_what_it_is_told_to() {
    privileged(&[Need::Program("qemu-io")], || {
        let dir = tempfile::tempdir().unwrap();
        let mut kept = disk("qcow2", dir.path());
        kept.arg("--keep");
        with_roots(&mut kept, 1, |disks| drop(qemu_io(&disks[0], "write -P 5 1M 4k")));
        with_roots(&mut kept, 1, |disks| {
            assert!(!qemu_io(&disks[0], "read -P 5 1M 4k").contains("failed"));
        });
    });
}

#[test]
fn disk_says_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("hostile.qcow2");
    fs::write(&text, b"QFI\xfb and nothing that goes with it").unwrap();
    for (backend, args, says) in [
        ("absent", &[][..], "qcow2"),
        ("qcow2", &["--base", "/absent"], "/absent"),
        ("qcow2", &["--size", "512"], "at least as large as its base"),
        ("qcow2", &["--size", "many"], "--size"),
        ("qcow2", &["--base", text.to_str().unwrap()], "version (byte 4 of the header)"),
        ("qcow2", &["--colour"], "usage: disk"),
    ] {
        let output = disk(backend, dir.path()).args(args).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(says), "{args:?}: {said}");
    }
}

#[test]
fn confine_makes_ports_that_are_told_by_their_lines_and_removes_them() {
    privileged(&[Need::Root, Need::Namespaces, Need::Nftables], || {
        let before = Census::take(&Scope::marked(["qvdc0ff"]));
        with_roots(Command::new(example("confine")).args(["--count", "2", "--json"]), 2, |ports| {
            for port in &ports {
                let field = |name: &str| port[name].as_str().unwrap().to_owned();
                let inside = fs::File::open(field("netns")).unwrap();
                let name = field("ifname");
                let there = qvd_sys::netns::in_netns(inside.as_fd(), || {
                    // Of this thread's namespace, unlike what is mounted as /sys.
                    let listed = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
                    listed.contains(&name)
                });
                assert!(there.unwrap(), "{port}");
                for name in ["mac", "ipv4", "ipv6", "gateway4", "gateway6", "host_netns", "bridge"] {
                    assert!(port[name].is_string(), "{name} of {port}");
                }
                assert!(port["add_us"].is_u64());
            }
            assert_ne!(ports[0]["ipv6"], ports[1]["ipv6"]);
        });
        before.assert_unchanged();
    });
}

#[test]
fn image_history_walks_through_all_of_it() {
    privileged(&[Need::Root], || {
        let output = Command::new(example("image_history")).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
        // What it ensures by itself it does not get beyond; the rest is here.
        let numbers = |about: &str, what: &str| -> Vec<u64> {
            let line = said.lines().find(|line| line.contains(about) && line.contains(what)).unwrap();
            line.split([' ', ',']).filter_map(|word| word.parse().ok()).collect()
        };
        let (memory, code) = ("bytes in memory", "KiB resident");
        let [shared, apart] = ["two versions", "two plain copies"];
        assert!(matches!(numbers(shared, memory)[..], [0, bytes] if bytes > 0), "{said}");
        assert!(matches!(numbers(apart, memory)[..], [0, 0]), "{said}");
        let of_each = |about| match numbers(about, code)[..] {
            [resident, proportional] if resident > 0 => (resident, proportional),
            _ => panic!("{said}"),
        };
        let (resident, proportional) = of_each(shared);
        assert_eq!(proportional, resident / 2, "{said}");
        let (resident, proportional) = of_each(apart);
        assert_eq!(proportional, resident, "{said}");
        assert!(said.ends_with("done\n"));
    });
}

#[test]
fn vm_clones_machines_from_a_template_and_removes_them() {
    privileged(&[Need::Root, Need::UserNamespaces, Need::Cgroup, Need::Bed, Need::Env("QVD_INIT")], || {
        let dir = tempfile::tempdir().unwrap();
        let before = Census::take(&Scope::marked(["qvd-c0de/"]));
        let tree = base(dir.path());
        copy_program_as("/bin/busybox", "/bin/cat", &tree);
        let mut command = Command::new(example("vm"));
        command.args(["--template", "--count", "2", "--memory", "128", "--kernel"]);
        command.arg(qvd_testkit::bed_directory().unwrap()).arg("--image").arg(tree);
        with_roots(&mut command, 2, |machines| {
            // Born of one memory, they share nothing that tells them apart.
            for name in ["machine_id", "hostname", "random"] {
                let [one, other] = [0, 1].map(|number| machines[number]["identity"][name].as_str().unwrap().to_owned());
                assert!(!one.is_empty() && one != other, "{name}: {one} and {other}");
            }
            for machine in machines {
                assert_eq!(machine["cloned"], true);
                let pid = machine["pid"].as_u64().unwrap();
                assert!(Path::new(&format!("/proc/{pid}")).exists());
                assert!(machine["session_ms"].as_f64() > machine["boot_ms"].as_f64());
                assert!(machine["pss_mib"].as_u64().unwrap() < 128);
            }
        });
        before.assert_unchanged();
    });
}
