//! A new version comes in steps: some get it first, and what is old ends in time.

use std::{fs, thread, time::Instant};

use qvd_core::Tag;
use qvd_demo::Server;
use qvd_storage::{Repository, repository::CommitId};
use serde_json::Value;

use crate::{
    bad_input::{elsewhere, tiny_tree},
    harness::{Desktop, PASSWORD, SOON, expect_ok, on_a_host, remove_user},
};

/// What a desktop is doing, and on which commit.
fn status(server: &Server, desktop: u32) -> (String, Option<CommitId>) {
    let info: Value = server.json(&["desktop", "show", &desktop.to_string()]).unwrap();
    let image = info["status"]["image"].as_str().map(|id| id.parse().unwrap());
    (info["status"]["state"].as_str().unwrap().to_owned(), image)
}

#[test]
fn some_get_a_version_first_and_what_has_expired_is_stopped() {
    on_a_host(|host| {
        let dir = tempfile::tempdir().unwrap();
        let (tree, root) = (dir.path().join("tree"), dir.path().join("state"));
        tiny_tree(&tree).unwrap();
        elsewhere(host, &root, |setup| {
            let server = setup.start().unwrap();
            let import = |version: &str| -> CommitId {
                fs::write(tree.join("version"), version).unwrap();
                let tree = tree.to_str().unwrap();
                let made: Value = server.json(&["image", "import", tree, "--flavour", "tiny", "-m", version]).unwrap();
                made["id"].as_str().unwrap().parse().unwrap()
            };
            let (one, two) = (import("one"), import("two"));
            expect_ok(&server.run(["image", "tag", "tiny", "default", "--canary", "50", "--hard", "3600"]).unwrap());
            server.add_user("ana", PASSWORD).unwrap();
            // Which of them are first depends on the commit, and so on the time.
            let repository = Repository::open_existing(&root.join("images")).unwrap();
            let (mut first, mut later) = (None, None);
            while first.is_none() || later.is_none() {
                let desktop: Desktop = server.json(&["desktop", "create", "ana", "tiny"]).unwrap();
                let gets = repository.follow(&"tiny".parse().unwrap(), &Tag::default_tag(), &desktop.id.to_string());
                let kind = if gets.unwrap() == two { &mut first } else { &mut later };
                *kind = Some(desktop.id);
            }
            let (first, later) = (first.unwrap(), later.unwrap());
            for (desktop, image) in [(first, two), (later, one)] {
                expect_ok(&server.run(["desktop", "start", &desktop.to_string()]).unwrap());
                assert_eq!(status(&server, desktop), ("running".to_owned(), Some(image)));
            }
            // Now all are to get it, and at once.
            expect_ok(&server.run(["image", "tag", "tiny", "default", "--hard", "0"]).unwrap());
            let until = Instant::now() + SOON;
            while status(&server, later).0 != "stopped" {
                assert!(Instant::now() < until, "it still runs what has expired");
                thread::sleep(std::time::Duration::from_millis(100));
            }
            assert_eq!(status(&server, first), ("running".to_owned(), Some(two)), "that one is let alone");
            expect_ok(&server.run(["desktop", "start", &later.to_string()]).unwrap());
            assert_eq!(status(&server, later), ("running".to_owned(), Some(two)));
            remove_user(&server, "ana");
            server.stop().unwrap();
        });
    });
}
