//! What is left when a process is killed after any of its system calls: a
//! repository that is sound, and in which the same command completes.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use qvd_core::{FlavourName, Tag};
use qvd_storage::{
    ImageConfig, Repository,
    repository::{CommitId, Directory, Expect, Keep, NewCommit, Rollout, Wanted},
};
use qvd_sys::process::traced::{self, Counted, End};
use qvd_testkit::{Need, privileged};

const LIMIT: Duration = Duration::from_secs(60);
/// More than any of these makes, so that a loop ends.
const CALLS_MAX: u32 = 3000;

fn flavour() -> FlavourName {
    "tiny".parse().unwrap()
}

fn commit(repository: &Repository, source: &Path, message: &str) -> CommitId {
    let staging = repository.stage().unwrap();
    let tree = staging.scan(source, &|_| false).unwrap();
    let new = NewCommit {
        config: ImageConfig::plain(flavour()),
        author: "ana".to_owned(),
        message: message.to_owned(),
        time: SystemTime::UNIX_EPOCH,
        recipe: None,
        publish: true,
    };
    repository.commit_tree(&staging, &tree, new).unwrap()
}

fn now() -> Keep {
    Keep { reflog: Duration::ZERO, ..Keep::default() }
}

struct World {
    dir: tempfile::TempDir,
    /// Ids of the commits that are made, by number.
    commits: Vec<CommitId>,
}

impl World {
    /// Two commits on the tags, and one that nothing leads to. The copy at
    /// `there` has none of the second.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir_all(source.join("etc")).unwrap();
        for (name, content) in [("etc/same", "same"), ("etc/motd", "first"), ("big", "big")] {
            fs::write(source.join(name), content.repeat(1000)).unwrap();
        }
        let here = Repository::open(&dir.path().join("here")).unwrap();
        let there = Repository::open(&dir.path().join("there")).unwrap();
        let one = commit(&here, &source, "first");
        let wanted = Wanted { flavour: flavour(), tag: None, force: false };
        there.pull(&Directory::new(Repository::open(here.dir()).unwrap()), &wanted, "ana", &mut |_| {}).unwrap();
        fs::write(source.join("etc/motd"), "second").unwrap();
        fs::write(source.join("etc/new"), "new").unwrap();
        let two = commit(&here, &source, "second");
        fs::write(source.join("etc/motd"), "gone").unwrap();
        fs::write(source.join("only"), "here").unwrap();
        let gone = commit(&here, &source, "gone");
        for tag in [Tag::head(), Tag::default_tag()] {
            here.move_tag(&flavour(), &tag, Expect::Anything, Some(two), ("ana", "back")).unwrap();
        }
        fs::write(source.join("etc/motd"), "third").unwrap();
        Self { dir, commits: vec![one, two, gone] }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A copy of a repository, to be spoilt.
    fn copy(&self, name: &str) -> PathBuf {
        let copy = self.at("copy");
        if copy.exists() {
            fs::remove_dir_all(&copy).unwrap();
        }
        assert!(Command::new("cp").arg("-a").arg(self.at(name)).arg(&copy).status().unwrap().success());
        copy
    }

    /// Kills `work` on a copy of `name` after each of its calls. Each time what
    /// is left is sound, and `work` once more leads to what `done` demands.
    fn killed_anywhere(
        &self,
        name: &str,
        work: impl Fn(&Path) + Clone + Send + 'static,
        done: impl Fn(&Repository),
    ) -> u32 {
        for after in 1..CALLS_MAX {
            let copy = self.copy(name);
            let (theirs, at) = (work.clone(), copy.clone());
            let run = traced::run(Some(after), Counted::Lasting, LIMIT, move || {
                theirs(&at);
                0
            });
            let ended = run.unwrap().end;
            let repository = Repository::open(&copy).unwrap();
            let checked = repository.fsck(None).unwrap();
            assert!(checked.is_sound(), "after call {after} ({ended:?}): {:?}", checked.problems);
            work(&copy);
            done(&repository);
            let checked = repository.fsck(None).unwrap();
            assert!(checked.is_sound(), "once more after {after} ({ended:?}): {:?}", checked.problems);
            let left = fs::read_dir(copy.join("incoming")).unwrap().count();
            assert_eq!(left, 0, "after call {after} ({ended:?})");
            match ended {
                End::Killed(_) => {}
                End::Returned(0) => return after - 1,
                other => panic!("after call {after}: {other:?}"),
            }
        }
        panic!("it did not end within {CALLS_MAX} calls");
    }
}

fn tagged(repository: &Repository, tag: &Tag) -> Option<CommitId> {
    repository.tagged(&flavour(), tag).unwrap()
}

#[test]
fn a_commit_is_there_or_not() {
    privileged(&[Need::Root], || {
        let world = World::new();
        let source = world.at("source");
        let calls = world.killed_anywhere(
            "here",
            move |at| {
                commit(&Repository::open(at).unwrap(), &source, "third");
            },
            |repository| {
                let head = tagged(repository, &Tag::head()).unwrap();
                assert_eq!(tagged(repository, &Tag::default_tag()), Some(head));
                let log = repository.log(head).unwrap();
                // Both ran to their end if the kill came too late.
                assert!(log.iter().filter(|commit| commit.message == "third").count() >= 1);
                assert_eq!(log.last().unwrap().id, world.commits[0]);
            },
        );
        assert!(calls > 30, "{calls}");
    });
}

#[test]
fn a_tag_is_here_or_there_and_the_reflog_knows() {
    privileged(&[Need::Root], || {
        let world = World::new();
        let (one, two) = (world.commits[0], world.commits[1]);
        let to = move |at: &Path| {
            let repository = Repository::open(at).unwrap();
            let tag = Tag::default_tag();
            repository.move_tag(&flavour(), &tag, Expect::Anything, Some(one), ("ana", "moved")).unwrap();
        };
        let calls = world.killed_anywhere("here", to, |repository| {
            assert_eq!(tagged(repository, &Tag::default_tag()), Some(one));
            assert_eq!(tagged(repository, &Tag::head()), Some(two));
            let moves = repository.reflog(&flavour(), &Tag::default_tag()).unwrap();
            let last: Vec<_> = moves.iter().rev().map(|one| (one.from, one.to, one.why.as_str())).take(2).collect();
            assert_eq!(last[0], (Some(two), Some(one), "moved"));
            assert_eq!(last[1].2, "back");
        });
        assert!(calls > 5, "{calls}");
        let publish = move |at: &Path| {
            let repository = Repository::open(at).unwrap();
            let rollout = Rollout { canary_percent: 0, ..Rollout::default() };
            repository.publish(&flavour(), &Tag::default_tag(), one, rollout, ("ana", "slowly")).unwrap();
        };
        world.killed_anywhere("here", publish, |repository| {
            assert_eq!(repository.follow(&flavour(), &Tag::default_tag(), "1").unwrap(), two);
        });
        let remove = |at: &Path| {
            let repository = Repository::open(at).unwrap();
            let tag = Tag::default_tag();
            repository.move_tag(&flavour(), &tag, Expect::Anything, None, ("ana", "removed")).unwrap();
        };
        world.killed_anywhere("here", remove, |repository| {
            assert_eq!(tagged(repository, &Tag::default_tag()), None);
            let moves = repository.reflog(&flavour(), &Tag::default_tag()).unwrap();
            assert!(moves.iter().any(|one| one.from == Some(two) && one.to.is_none()), "{moves:?}");
        });
    });
}

#[test]
fn a_pull_is_whole_or_not_seen() {
    privileged(&[Need::Root], || {
        let world = World::new();
        let here = world.at("here");
        let calls = world.killed_anywhere(
            "there",
            move |at| pull(&here, at),
            |repository| {
                for tag in [Tag::head(), Tag::default_tag()] {
                    assert_eq!(tagged(repository, &tag), Some(world.commits[1]));
                }
                repository.verify(world.commits[1]).unwrap();
            },
        );
        assert!(calls > 30, "{calls}");
    });
}

#[test]
fn garbage_collection_loses_nothing_wherever_it_is_killed() {
    privileged(&[Need::Root], || {
        let world = World::new();
        let gone = world.commits[2];
        let gc = |at: &Path| {
            Repository::open(at).unwrap().gc(&now(), false).unwrap();
        };
        let calls = world.killed_anywhere("here", gc, |repository| {
            assert!(!repository.has_commit(gone));
            repository.verify(world.commits[0]).unwrap();
            repository.verify(world.commits[1]).unwrap();
            assert_eq!(repository.gc(&now(), true).unwrap().objects, 0);
        });
        assert!(calls > 5, "{calls}");
    });
}

/// Names the repositories of a pull that another process of this program does.
const PULL_FROM: &str = "QVD_TEST_PULL_FROM";
const PULL_TO: &str = "QVD_TEST_PULL_TO";

fn pull(from: &Path, to: &Path) {
    let source = Directory::new(Repository::open(from).unwrap());
    let wanted = Wanted { flavour: flavour(), tag: None, force: false };
    Repository::open(to).unwrap().pull(&source, &wanted, "ben", &mut |_| {}).unwrap();
}

#[test]
#[ignore = "it is what the next test runs in a process of its own"]
fn pulls() {
    let [from, to] = [PULL_FROM, PULL_TO].map(|name| PathBuf::from(std::env::var_os(name).unwrap()));
    pull(&from, &to);
}

#[test]
fn garbage_collection_beside_a_pull_loses_nothing() {
    privileged(&[Need::Root], || {
        let world = World::new();
        let here = world.at("here");
        for after in (1..40).step_by(3) {
            let copy = world.copy("there");
            // Something to collect here too: what a cut pull had brought.
            let (from, to) = (here.clone(), copy.clone());
            let cut = move || {
                pull(&from, &to);
                0
            };
            traced::run(Some(after * 2), Counted::Lasting, LIMIT, cut).unwrap();
            let at = copy.clone();
            let gc = move || {
                Repository::open(&at).unwrap().gc(&now(), false).unwrap();
                0
            };
            let mut beside = Command::new(std::env::current_exe().unwrap());
            beside.args(["--exact", "pulls", "--ignored"]).env(PULL_FROM, &here).env(PULL_TO, &copy);
            let mut beside = beside.stdout(std::process::Stdio::null()).spawn().unwrap();
            let collected = traced::run(Some(after), Counted::Lasting, LIMIT, gc);
            assert!(beside.wait().unwrap().success());
            collected.unwrap();
            let repository = Repository::open(&copy).unwrap();
            assert!(repository.fsck(None).unwrap().is_sound());
            repository.verify(world.commits[1]).unwrap();
            assert_eq!(tagged(&repository, &Tag::head()), Some(world.commits[1]));
        }
    });
}
