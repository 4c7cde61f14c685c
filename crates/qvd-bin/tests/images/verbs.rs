//! Every command about images, with a daemon and without one.

use std::{fs, process::Command};

use serde_json::Value;

use crate::{World, first_file, flip};

const DPKG: &str = "var/lib/dpkg/status";

fn dpkg(packages: &[(&str, &str)]) -> String {
    let paragraph = |(name, version): &(&str, &str)| {
        format!("Package: {name}\nStatus: install ok installed\nArchitecture: amd64\nVersion: {version}\n\n")
    };
    packages.iter().map(paragraph).collect()
}

/// Two versions of a tree; their ids.
fn two_versions(world: &World) -> [String; 2] {
    world.write("tree/etc/motd", "hello\n");
    world.write("tree/etc/old", "old\n");
    world.write(&format!("tree/{DPKG}"), &dpkg(&[("bash", "5.1"), ("tool", "1.0")]));
    let one = world.import("first");
    world.write("tree/etc/motd", "good morning\n");
    world.write("tree/etc/new", "new\n");
    fs::remove_file(world.at("tree/etc/old")).unwrap();
    world.write(&format!("tree/{DPKG}"), &dpkg(&[("bash", "5.2"), ("more", "3.0")]));
    [one, world.import("second")]
}

fn hex(id: &str) -> &str {
    id.trim_start_matches("sha256:")
}

#[test]
fn history_is_shown_and_changed() {
    for world in World::both() {
        let [one, two] = two_versions(&world);
        let log = world.json(&["log", "tiny"]);
        let messages: Vec<&str> = log.as_array().unwrap().iter().map(|one| one["message"].as_str().unwrap()).collect();
        assert_eq!(messages, ["second", "first"], "newest first");
        assert_eq!((&log[0]["id"], &log[0]["parents"][0]), (&two.clone().into(), &one.clone().into()));
        assert!(log[0]["author"].as_str().unwrap().starts_with("ana@"), "{log}");
        let graph = world.text(&["log", "tiny:default"]);
        assert!(graph.contains("first") && !graph.contains("second") && graph.contains("default"), "{graph}");

        let by_id = format!("tiny@{}", &hex(&one)[..12]);
        for image in [by_id.as_str(), "tiny:default"] {
            let shown = world.json(&["show", image]);
            assert_eq!((&shown["id"], &shown["flavour"]), (&one.clone().into(), &"tiny".into()), "{shown}");
            assert_eq!((&shown["package_count"], &shown["tags"][0]), (&2.into(), &"default".into()), "{shown}");
        }
        assert!(world.text(&["show", "tiny"]).contains("second"));

        let diff = world.text(&["diff", "tiny:default", "tiny"]);
        for line in [
            "changed          /etc/motd",
            "added            /etc/new",
            "removed          /etc/old",
            "upgraded bash:amd64 5.1 -> 5.2",
            "installed more:amd64 3.0",
            "uninstalled tool:amd64 1.0",
        ] {
            assert!(diff.lines().any(|found| found == line), "{line}: {diff}");
        }
        assert_eq!(world.json(&["diff", "tiny", "tiny"]), serde_json::json!({"files": [], "packages": []}));

        let tagged = world.json(&["tag", "tiny", "good", hex(&one), "-m", "it works"]);
        assert_eq!(tagged["commit"], one.as_str());
        world.text(&["tag", "tiny", "good", "head", "--canary", "10"]);
        world.text(&["tag", "tiny", "default"]);
        let tags = world.json(&["tag", "tiny"]);
        let on = |name: &str| {
            let tag = tags.as_array().unwrap().iter().find(|tag| tag["tag"] == name).unwrap_or(&Value::Null);
            tag["commit"].as_str().unwrap_or_default().to_owned()
        };
        assert_eq!([on("default"), on("good"), on("head")], [two.clone(), two.clone(), two.clone()]);
        let reflog = world.json(&["reflog", "tiny:good"]);
        assert_eq!((&reflog[0]["to"], &reflog[1]["why"]), (&two.clone().into(), &"it works".into()), "{reflog}");
        world.text(&["untag", "tiny", "good"]);
        let (status, text) = world.refusal(&["untag", "tiny", "good"]);
        assert!(status == 4 && text.contains("tiny") && text.contains("good") && text.contains("`head`"), "{text}");

        let (status, text) = world.refusal(&["untag", "tiny", "head"]);
        assert!(status == 2 && text.contains("tiny:head") && text.contains("`qvd image rm`"), "{text}");

        for nothing in ["nothing", "tiny:nothing"] {
            let (status, text) = world.refusal(&["push", "elsewhere", nothing]);
            assert!(status == 4 && text.contains("nothing") && !world.at("elsewhere").exists(), "{text}");
        }

        let back = world.json(&["revert", &by_id, "-m", "better before"]);
        assert_eq!((&back["parents"][0], &back["message"]), (&two.into(), &"better before".into()), "{back}");
        assert_eq!(world.json(&["diff", &by_id, "tiny"])["files"], Value::Array(vec![]));

        world.text(&["rm", "tiny"]);
        assert_eq!(world.refusal(&["log", "tiny"]).0, 4);
        assert_eq!(world.refusal(&["rm", "tiny"]).0, 4);
        let would = world.json(&["gc", "--dry-run", "--keep-days", "0"]);
        let done = world.json(&["gc", "--keep-days", "0"]);
        assert_eq!((&would, &would["commits"]), (&done, &3.into()), "{done}");
        assert_eq!(world.json(&["fsck"])["objects"], 0);
    }
}

#[test]
fn what_is_exported_comes_back_the_same() {
    for world in World::both() {
        let [one, _] = two_versions(&world);
        let tree = world.json(&["show", "tiny:default"])["content"].clone();
        let mut forms = vec!["e", "e.tar", "e.tar.gz", "e.tar.zst", "e.oci"];
        for to in &forms {
            world.text(&["export", "tiny:default", to]);
            assert_eq!(world.refusal(&["export", "tiny:default", to]).0, 2, "{to} is there already");
        }
        world.text(&["checkout", "tiny:default", "c.tar"]);
        assert!(world.at("c.tar/etc/motd").is_file(), "a directory, whatever its name");
        world.text(&["export", "tiny:default", "odd", "--format", "tar-gz"]);
        // What other programs pack.
        for (flag, name) in [("-J", "o.tar.xz"), ("-j", "o.tar.bz2")] {
            let mut tar = Command::new("tar");
            tar.args(["-c", flag, "-f", name, "-C", "e", "."]).current_dir(world.dir.path());
            assert!(tar.status().unwrap().success());
            forms.push(name);
        }
        forms.extend(["c.tar", "odd"]);
        for from in forms {
            let made = world.json(&["import", from, "--flavour", "again", "-m", from]);
            assert_eq!(made["content"], tree, "{from}: {made}");
            assert_ne!(made["id"], one);
        }
        assert_eq!(world.json(&["log", "again"]).as_array().unwrap().len(), 9);
    }
}

#[test]
fn disks_have_a_history_of_blocks() {
    for world in World::both() {
        let block = |mark: u8| vec![mark; 64 << 10];
        let disk = |marks: [u8; 4]| marks.into_iter().flat_map(block).collect::<Vec<u8>>();
        fs::write(world.at("disk.raw"), disk([1, 2, 0, 3])).unwrap();
        world.json(&["import", "disk.raw", "--flavour", "win", "-m", "first"]);
        fs::write(world.at("disk.raw"), disk([1, 9, 0, 3])).unwrap();
        let convert = ["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2"];
        assert!(Command::new("qemu-img").args(convert).current_dir(world.dir.path()).status().unwrap().success());
        world.json(&["import", "disk.qcow2", "--flavour", "win", "-m", "second"]);
        let diff = world.json(&["diff", "win:default", "win"]);
        assert_eq!((&diff["blocks"]["changed"], &diff["blocks"]["total"]), (&1.into(), &4.into()), "{diff}");
        let checked = world.json(&["fsck"]);
        // Four blocks with something in them, and two lists.
        assert_eq!(checked["objects"], 6, "{checked}");
        world.text(&["export", "win", "out.raw"]);
        assert!(fs::read(world.at("out.raw")).unwrap() == disk([1, 9, 0, 3]));
    }
}

#[test]
fn only_what_is_missing_travels_between_directories() {
    for world in World::both() {
        two_versions(&world);
        let first = world.json(&["push", "there", "tiny"]);
        assert_eq!(first["commits"], 2, "{first}");
        world.write("tree/etc/motd", "good evening\n");
        let three = world.import("third");
        let second = world.json(&["push", "there", "tiny:head"]);
        assert_eq!((&second["commits"], &second["objects"]), (&1.into(), &1.into()), "{second}");
        assert!(second["wire_bytes"].as_u64().unwrap() < 4096, "{second}");

        // Another installation gets it from there, by its own directory or that of its images.
        let other = |args: &[&str]| -> Value {
            let mut command = Command::new(env!("CARGO_BIN_EXE_qvd"));
            let command = command.current_dir(world.dir.path()).args(["--json", "--root", "other", "image"]).args(args);
            serde_json::from_slice(&command.output().unwrap().stdout).unwrap()
        };
        let cloned = other(&["clone", "there"]);
        assert_eq!((&cloned[0]["flavour"], &cloned[0]["commits"]), (&"tiny".into(), &3.into()), "{cloned}");
        assert_eq!(other(&["log", "tiny"])[0]["id"], three.as_str());
        assert_eq!(world.json(&["clone", "other"])[0]["commits"], 0);
        world.text(&["pull", "other", "tiny"]);

        // What is damaged here comes from there again.
        flip(&first_file(&world.at("state/images/objects")));
        let (status, text) = world.refusal(&["fsck"]);
        assert!(status == 1 && text.contains("--repair"), "{text}");
        let repaired = world.json(&["fsck", "--repair", "there"]);
        assert_eq!(repaired["problems"][0]["repaired"], true, "{repaired}");
        assert_eq!(world.json(&["fsck"])["problems"], Value::Array(vec![]));
    }
}

#[test]
fn errors_are_the_same_with_a_daemon_and_without() {
    let [without, with] = World::both();
    two_versions(&without);
    two_versions(&with);
    fs::write(without.at("bad.tar"), b"this is no archive").unwrap();
    fs::write(with.at("bad.tar"), b"this is no archive").unwrap();
    fs::write(without.at("recipe"), b"[nonsense").unwrap();
    fs::write(with.at("recipe"), b"[nonsense").unwrap();
    let import = |source, more: &[&'static str]| [&["import", source, "--flavour", "f", "-m", "x"], more].concat();
    let cases: [(i32, Vec<&str>); 16] = [
        (4, vec!["log", "nothing"]),
        (4, vec!["show", "tiny:nothing"]),
        (4, vec!["show", "tiny@0000"]),
        (4, vec!["diff", "tiny", "nothing"]),
        (4, vec!["tag", "nothing"]),
        (4, vec!["tag", "tiny", "new", "nothing"]),
        (4, vec!["revert", "nothing"]),
        (4, import("absent", &[])),
        (2, import("bad.tar", &[])),
        (2, import("tree", &["--recipe", "recipe"])),
        (4, vec!["export", "nothing", "x"]),
        (4, vec!["pull", "absent", "tiny"]),
        (4, vec!["fsck", "--repair", "absent"]),
        (2, vec!["push", "https://nobody", "tiny"]),
        (2, vec!["push", "there", "tiny@0000"]),
        (4, vec!["push", "there", "nothing"]),
    ];
    for (status, args) in cases {
        let plain = |world: &World| {
            let (found, text) = world.refusal(&args);
            (found, text.replace(world.dir.path().to_str().unwrap(), "DIR"))
        };
        let (one, other) = (plain(&without), plain(&with));
        assert_eq!(one, other, "{args:?}");
        assert_eq!(one.0, status, "{args:?}: {}", one.1);
    }
    assert!(!with.at("nowhere").exists(), "nothing happens behind the daemon's back");
    // Secret keys do not travel.
    let (status, text) = with.refusal(&["policy"]);
    assert!(status == 2 && text.contains("--root"), "{text}");
}
