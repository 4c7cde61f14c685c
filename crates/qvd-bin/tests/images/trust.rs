//! Whom and what to trust: signatures, transfers that were cut, steps of a rollout.

use std::fs;

use serde_json::Value;

use crate::World;

/// A tree of so many files, each with a content of its own.
fn tree(world: &World, files: u32) {
    for number in 0..files {
        world.write(&format!("tree/{number:03}"), &format!("content of {number}\n"));
    }
}

#[test]
fn what_nobody_trusted_has_signed_is_refused_wherever_it_would_be_used() {
    let world = World::without_a_daemon();
    tree(&world, 1);
    world.import("first");
    world.text(&["key", "ours"]);
    world.text(&["key", "theirs"]);
    assert_eq!(world.refusal(&["key", "ours"]).0, 1, "a key is not written over");
    world.text(&["policy", "--require", "ours.pub"]);
    let uses = [["checkout", "tiny", "out"], ["export", "tiny", "out.tar"], ["export", "tiny", "out.oci"]];
    let refused = |reason: &str| {
        for args in uses {
            let (status, text) = world.refusal(&args);
            assert!(status == 1 && text.contains(reason), "{args:?}: {status} {text}");
            assert!(!world.at(args[2]).exists(), "{args:?} leaves nothing");
        }
    };
    refused("is not signed");
    world.text(&["sign", "tiny", "--key", "theirs"]);
    refused("signed");
    // To look at it is no use of it.
    assert_eq!(world.json(&["log", "tiny"]).as_array().unwrap().len(), 1);
    world.text(&["sign", "tiny", "--key", "ours"]);
    for args in uses {
        world.text(&args);
    }
    // What comes from elsewhere brings its signatures, and is held to the policy here.
    tree(&world, 2);
    world.import("second");
    world.text(&["push", "there", "tiny"]);
    world.text(&["pull", "there", "tiny"]);
    let (_, text) = world.refusal(&["checkout", "tiny", "later"]);
    assert!(text.contains("is not signed"), "{text}");
    world.text(&["checkout", "tiny:default", "earlier"]);
    world.text(&["policy", "--none"]);
    world.text(&["checkout", "tiny", "later"]);
}

#[test]
fn a_pull_that_was_cut_goes_on_where_it_was() {
    for world in World::both() {
        let there = World::without_a_daemon();
        // In two batches, of 512 and of 88.
        tree(&there, 600);
        there.import("first");
        // The last of them in the tree cannot be had: the batch before has arrived.
        let all = there.at("state/images/objects");
        let digest = fs_verity(&there, "tree/599");
        let last = all.join(&digest[..2]).join(&digest[2..]);
        let aside = there.at("aside");
        fs::rename(&last, &aside).unwrap();
        let from = there.at("state").into_os_string().into_string().unwrap();
        let (status, text) = world.refusal(&["pull", &from, "tiny"]);
        assert!(status == 1 && text.contains(&digest), "{status} {text}");
        assert_eq!(world.refusal(&["log", "tiny"]).0, 4, "nothing shows that is not whole");
        fs::rename(&aside, &last).unwrap();
        let rest = world.json(&["pull", &from, "tiny"]);
        assert_eq!((&rest["commits"], &rest["objects"]), (&1.into(), &88.into()), "{rest}");
        assert_eq!(world.json(&["fsck"])["problems"], Value::Array(vec![]));
    }
}

/// Digest of a file as a repository names it.
fn fs_verity(world: &World, name: &str) -> String {
    let mut hasher = qvd_storage::repository::ObjectHasher::new();
    hasher.update(&fs::read(world.at(name)).unwrap());
    hasher.finish().hex()
}

#[test]
fn steps_that_make_no_sense_are_refused_and_those_that_do_are_told() {
    for world in World::both() {
        tree(&world, 1);
        world.import("first");
        tree(&world, 2);
        world.import("second");
        assert_eq!(world.run(&["tag", "tiny", "default", "--canary", "101"]).status.code(), Some(2));
        let (status, text) = world.refusal(&["tag", "tiny", "default", "--soft", "60", "--hard", "5"]);
        assert!(status != 0 && text.contains("before their users are asked"), "{status} {text}");
        let rollout = || {
            let tags = world.json(&["tag", "tiny"]);
            let tag = tags.as_array().unwrap().iter().find(|tag| tag["tag"] == "default").unwrap().clone();
            tag["rollout"].clone()
        };
        assert_eq!(rollout(), Value::Null, "a refused one changes nothing");
        world.text(&["tag", "tiny", "default", "--canary", "10", "--soft", "60", "--hard", "3600"]);
        let steps = serde_json::json!({"canary_percent": 10, "soft_after_s": 60, "hard_after_s": 3600});
        assert_eq!(rollout(), steps);
        assert!(world.text(&["tag", "tiny"]).contains("10 %"), "{}", world.text(&["tag", "tiny"]));
        world.text(&["tag", "tiny", "default"]);
        assert_eq!(rollout(), Value::Null, "tagged again without steps, all get it");
    }
}
