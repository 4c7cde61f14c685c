//! A fault is found by trying versions in fresh desktops.

use std::fs;

use qvd_demo::Server;
use qvd_testkit::copy_program;
use serde_json::Value;

use crate::{
    bad_input::{elsewhere, tiny_tree},
    harness::{expect_ok, on_a_host},
};

fn bisect(server: &Server, arguments: &[&str]) -> Value {
    let tell = "[ -e /mute ] && exit 125; [ ! -e /fault ]";
    server.json(&[&["image", "bisect", "tiny"], arguments, &["--", "/bin/sh", "-c", tell]].concat()).unwrap()
}

#[test]
fn the_version_with_the_fault_is_found_and_nothing_is_left() {
    on_a_host(|host| {
        let dir = tempfile::tempdir().unwrap();
        let (tree, root) = (dir.path().join("tree"), dir.path().join("state"));
        tiny_tree(&tree).unwrap();
        copy_program("/bin/sh", &tree);
        elsewhere(host, &root, |setup| {
            let server = setup.start().unwrap();
            let versions: Vec<String> = (1..=9)
                .map(|version| {
                    // The third can tell nothing.
                    fs::write(tree.join("version"), version.to_string()).unwrap();
                    let mark = |name: &str, there: bool| match there {
                        true => fs::write(tree.join(name), "").unwrap(),
                        false => drop(fs::remove_file(tree.join(name))),
                    };
                    mark("fault", version >= 6);
                    mark("mute", version == 3);
                    let tree = tree.to_str().unwrap();
                    let made: Value = server
                        .json(&["image", "import", tree, "--flavour", "tiny", "-m", "next", "--publish"])
                        .unwrap();
                    made["id"].as_str().unwrap().to_owned()
                })
                .collect();
            let id = |version: usize| versions[version - 1].trim_start_matches("sha256:");
            let found = bisect(&server, &["--good", id(1)]);
            assert_eq!(found["first_bad"]["id"], versions[5], "{found}");
            assert!(found["tried"].as_array().unwrap().len() <= 4, "{found}");
            assert!(found["changed"].to_string().contains("fault"), "{found}");
            // Also around one that can tell nothing.
            let between = bisect(&server, &["--good", id(2), "--bad", id(6)]);
            assert_eq!(between["first_bad"]["id"], versions[5], "{between}");

            let same = server.run(["image", "bisect", "tiny", "--good", "head", "--", "true"]).unwrap();
            assert_eq!(same.status.code(), Some(2), "{}", String::from_utf8_lossy(&same.stderr));
            let users: Value = server.json(&["user", "ls"]).unwrap();
            assert_eq!(users.as_array().unwrap().len(), 0, "{users}");
            let desktops: Value = server.json(&["desktop", "ls"]).unwrap();
            assert_eq!(desktops.as_array().unwrap().len(), 0, "{desktops}");
            let tags = server.run(["image", "tag", "tiny"]).unwrap();
            expect_ok(&tags);
            assert!(!String::from_utf8_lossy(&tags.stdout).contains("bisecting"));
            server.stop().unwrap();
        });
    });
}
