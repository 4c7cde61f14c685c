//! A repository as an embedder uses it: commits, tags, mounts, checks.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    io::Read as _,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use qvd_core::Tag;
use qvd_storage::{
    Error, ImageConfig, Repository,
    repository::{
        Change, CommitId, Content, Directory, Due, Expect, Keep, NewCommit, Node, Policy, Reference, Rollout,
        SigningKey, VerifyingKey, Wanted,
        archive::{Format, IMPORT_MAX_BYTES},
    },
};
use qvd_testkit::{Need, privileged};

fn config(flavour: &str) -> ImageConfig {
    ImageConfig::plain(flavour.parse().unwrap())
}

fn new(message: &str) -> NewCommit {
    NewCommit {
        config: config("tiny"),
        author: "ana".to_owned(),
        message: message.to_owned(),
        time: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000),
        recipe: None,
        publish: false,
    }
}

fn commit(repository: &Repository, dir: &Path, message: &str) -> CommitId {
    let staging = repository.stage().unwrap();
    let tree = staging.scan(dir, &|_| false).unwrap();
    repository.commit_tree(&staging, &tree, new(message)).unwrap()
}

fn source(at: &Path) {
    for dir in ["etc", "usr/bin", "var/lib/dpkg"] {
        fs::create_dir_all(at.join(dir)).unwrap();
    }
    fs::set_permissions(at, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(at.join("etc/motd"), "hello\n").unwrap();
    fs::write(at.join("usr/bin/tool"), vec![7; 3_000_000]).unwrap();
    fs::set_permissions(at.join("usr/bin/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::hard_link(at.join("usr/bin/tool"), at.join("usr/bin/again")).unwrap();
    symlink("../bin/tool", at.join("usr/link")).unwrap();
    fs::write(at.join("empty"), "").unwrap();
    status(at, &[("bash", "5.1"), ("tool", "1.0")]);
}

fn status(at: &Path, packages: &[(&str, &str)]) {
    let paragraph = |(name, version): &(&str, &str)| {
        format!("Package: {name}\nStatus: install ok installed\nArchitecture: amd64\nVersion: {version}\n\n")
    };
    let text: String = packages.iter().map(paragraph).collect();
    fs::write(at.join("var/lib/dpkg/status"), text).unwrap();
}

fn bed() -> (tempfile::TempDir, PathBuf, Repository) {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("source");
    fs::create_dir(&at).unwrap();
    source(&at);
    let repository = Repository::open(&dir.path().join("repository")).unwrap();
    (dir, at, repository)
}

fn below(mount: &OwnedFd, name: &str) -> PathBuf {
    format!("/proc/self/fd/{}/{name}", mount.as_raw_fd()).into()
}

fn reference(text: &str) -> Reference {
    text.parse().unwrap()
}

#[test]
fn commits_follow_each_other_and_share_what_did_not_change() {
    let (_dir, at, repository) = bed();
    let one = commit(&repository, &at, "first");
    let objects = || walkdir(&repository.dir().join("objects"));
    let before = objects();
    fs::write(at.join("etc/motd"), "good morning\n").unwrap();
    fs::set_permissions(at.join("empty"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::remove_file(at.join("usr/link")).unwrap();
    fs::write(at.join("etc/new"), "x").unwrap();
    status(&at, &[("bash", "5.2"), ("more", "3")]);
    let two = commit(&repository, &at, "second");
    // The message, the list of packages twice (theirs and ours), the new file.
    assert_eq!(objects() - before, 4);
    let log = repository.log(two).unwrap();
    assert_eq!(log.iter().map(|c| (c.id, c.message.as_str())).collect::<Vec<_>>(), [(two, "second"), (one, "first")]);
    assert_eq!(log[0].parents, [one]);
    assert_eq!((&log[0].tags, &log[1].tags), (&vec![Tag::head()], &vec![Tag::default_tag()]));
    assert_eq!(repository.resolve(&reference("tiny")).unwrap(), two);
    assert_eq!(repository.resolve(&reference("tiny:default")).unwrap(), one);
    assert_eq!(repository.resolve(&reference(&format!("tiny@{}", &one.hex()[..12]))).unwrap(), one);
    assert!(matches!(repository.resolve(&reference("tiny:no")), Err(Error::NoSuchTag { .. })));
    assert!(matches!(repository.resolve(&reference("no")), Err(Error::NoSuchFlavour(_))));
    let diff = repository.diff(&repository.commit(one).unwrap(), &repository.commit(two).unwrap()).unwrap();
    let files: Vec<_> = diff.files.iter().map(|f| (f.path.to_str().unwrap(), f.changes.as_slice())).collect();
    assert_eq!(
        files,
        [
            ("/empty", [Change::Mode].as_slice()),
            ("/etc/motd", &[Change::Changed]),
            ("/etc/new", &[Change::Added]),
            ("/usr/link", &[Change::Removed]),
            ("/var/lib/dpkg/status", &[Change::Changed]),
        ]
    );
    let packages: Vec<_> =
        diff.packages.iter().map(|p| (p.name.as_str(), p.from.as_deref(), p.to.as_deref())).collect();
    assert_eq!(
        packages,
        [("bash:amd64", Some("5.1"), Some("5.2")), ("more:amd64", None, Some("3")), ("tool:amd64", Some("1.0"), None)]
    );
    let back = repository.revert(one, "ana", "as it was").unwrap();
    assert!(repository.is_ancestor(one, back).unwrap() && !repository.is_ancestor(back, two).unwrap());
    assert_eq!(repository.commit(back).unwrap().content, repository.commit(one).unwrap().content);
    assert!(repository.fsck(None).unwrap().problems.is_empty());
}

fn walkdir(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).map(|p| if p.is_dir() { walkdir(&p) } else { 1 }).sum()
}

#[test]
fn a_commit_is_mounted_as_it_was() {
    privileged(&[Need::Root, Need::Filesystem("overlay"), Need::Filesystem("erofs")], || {
        let (_dir, at, repository) = bed();
        fs::create_dir(at.join("many")).unwrap();
        for number in 0..1500 {
            fs::write(at.join(format!("many/a-rather-long-name-of-a-file-{number}")), number.to_string()).unwrap();
        }
        // Names that stand before `.` in a directory.
        fs::write(at.join("many/!first"), "!").unwrap();
        fs::write(at.join("many/-second"), "-").unwrap();
        symlink("x".repeat(4090), at.join("far")).unwrap();
        let long = vec![b'v'; 1700];
        for name in ["user.one", "user.two"] {
            rustix::fs::setxattr(at.join("etc/motd"), name, &long, rustix::fs::XattrFlags::empty()).unwrap();
        }
        rustix::fs::mknodat(
            rustix::fs::CWD,
            at.join("null"),
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::from_raw_mode(0o666),
            rustix::fs::makedev(1, 300),
        )
        .unwrap();
        std::os::unix::fs::chown(at.join("empty"), Some(70000), Some(4)).unwrap();
        let id = commit(&repository, &at, "first");
        let mount = repository.base(id).unwrap().open().unwrap();
        let root = below(&mount, "");
        // Whatever the scan of the mount finds is what was committed.
        let staging = repository.stage().unwrap();
        let tree = staging.scan(&root.join("."), &|_| false).unwrap();
        let committed = repository.tree_of(&repository.commit(id).unwrap()).unwrap();
        assert_eq!(tree.encode().0, committed.encode().0);
        assert_eq!(fs::read(below(&mount, "usr/bin/again")).unwrap(), vec![7; 3_000_000]);
        let meta = fs::metadata(below(&mount, "usr/bin/tool")).unwrap();
        assert_eq!((meta.nlink(), meta.mode() & 0o7777, meta.len()), (2, 0o4755, 3_000_000));
        assert_eq!(fs::read_link(below(&mount, "far")).unwrap().as_os_str().len(), 4090);
        assert!(fs::symlink_metadata(below(&mount, "null")).unwrap().file_type().is_char_device());
        assert_eq!(fs::read_dir(below(&mount, "many")).unwrap().count(), 1502);
        fs::write(below(&mount, "etc/motd"), "no").unwrap_err();
    });
}

#[test]
fn every_flipped_bit_and_every_missing_file_is_found_and_repaired() {
    let (dir, at, repository) = bed();
    let one = commit(&repository, &at, "first");
    fs::write(at.join("etc/motd"), "changed\n").unwrap();
    commit(&repository, &at, "second");
    let copy = dir.path().join("copy");
    assert!(std::process::Command::new("cp").arg("-a").args([repository.dir(), &copy]).status().unwrap().success());
    let healthy = Repository::open(&copy).unwrap();
    let mut files = Vec::new();
    for part in ["objects", "trees", "commits"] {
        collect(&repository.dir().join(part), &mut files);
    }
    assert!(files.len() > 10);
    for (number, file) in files.iter().enumerate() {
        let whole = fs::read(file).unwrap();
        for flip in [true, false] {
            fs::remove_file(file).unwrap();
            if flip {
                let mut bytes = whole.clone();
                let at = (number * 7919) % (bytes.len() * 8);
                bytes[at / 8] ^= 1 << (at % 8);
                fs::write(file, bytes).unwrap();
            }
            let found = repository.fsck(None).unwrap();
            assert!(!found.is_sound(), "{} {flip}", file.display());
            let repaired = repository.fsck(Some(&healthy)).unwrap();
            assert!(repaired.is_sound(), "{}: {:?}", file.display(), repaired.problems);
            assert_eq!(fs::read(file).unwrap(), whole);
        }
    }
    // A tag that leads nowhere.
    fs::remove_file(repository.dir().join("commits").join(one.hex())).unwrap();
    let found = repository.fsck(None).unwrap();
    assert!(found.problems.iter().any(|p| p.what == "tag default of tiny"), "{found:?}");
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { collect(&path, files) } else { files.push(path) }
    }
}

#[test]
fn what_nothing_needs_is_collected_and_nothing_else() {
    let (_dir, at, repository) = bed();
    let one = commit(&repository, &at, "first");
    fs::write(at.join("usr/bin/tool"), vec![8; 2_000_000]).unwrap();
    let two = commit(&repository, &at, "second");
    let (flavour, by) = ("tiny".parse().unwrap(), ("ana", "back"));
    let now = Keep { reflog: Duration::ZERO, ..Keep::default() };
    // All of it is history of `head`.
    assert_eq!(repository.gc(&now, false).unwrap().commits, 0);
    repository.move_tag(&flavour, &Tag::head(), Expect::At(Some(two)), Some(one), by).unwrap();
    // The reflog keeps it for a while, and so does whoever uses it.
    assert_eq!(repository.gc(&Keep::default(), false).unwrap().commits, 0);
    let used = Keep { commits: vec![two], ..now.clone() };
    assert_eq!(repository.gc(&used, false).unwrap().commits, 0);
    let later = Keep { reflog: Duration::ZERO, ..Keep::default() };
    age_reflog(&repository);
    let dry = repository.gc(&later, true).unwrap();
    assert_eq!((dry.commits, dry.trees, dry.objects, dry.kept_commits), (1, 1, 1, 1));
    assert!(dry.bytes > 2_000_000 && repository.has_commit(two));
    assert_eq!(repository.gc(&later, false).unwrap(), dry);
    assert!(!repository.has_commit(two));
    assert!(repository.fsck(None).unwrap().problems.is_empty());
    repository.tree_of(&repository.commit(one).unwrap()).unwrap();
}

/// Lets every move seem to be of the year 2001.
fn age_reflog(repository: &Repository) {
    let mut files = Vec::new();
    collect(&repository.dir().join("flavours"), &mut files);
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let aged: Vec<String> = text
            .split("\"time_unix_s\":")
            .enumerate()
            .map(|(n, part)| {
                if n == 0 { part.to_owned() } else { part.trim_start_matches(|c: char| c.is_ascii_digit()).to_owned() }
            })
            .collect();
        fs::write(&file, aged.join("\"time_unix_s\":1000000000")).unwrap();
    }
}

#[test]
fn of_several_who_move_a_tag_one_succeeds() {
    let (_dir, at, repository) = bed();
    let one = commit(&repository, &at, "first");
    let ids: Vec<CommitId> = (0..4).map(|n| commit(&repository, &at, &format!("commit {n}"))).collect();
    let (flavour, tag): (_, Tag) = ("tiny".parse().unwrap(), "stable".parse().unwrap());
    repository.move_tag(&flavour, &tag, Expect::At(None), Some(one), ("ana", "new")).unwrap();
    let won: Vec<bool> = std::thread::scope(|scope| {
        let race = |id| {
            let (repository, flavour, tag) = (&repository, &flavour, &tag);
            scope.spawn(move || {
                let moved = repository.move_tag(flavour, tag, Expect::At(Some(one)), Some(id), ("ana", "race"));
                matches!(&moved, Err(Error::TagMoved { .. }) | Ok(_)).then(|| moved.is_ok()).unwrap()
            })
        };
        let threads: Vec<_> = ids.iter().map(|id| race(*id)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(won.iter().filter(|won| **won).count(), 1);
    let log = repository.reflog(&flavour, &tag).unwrap();
    assert_eq!((log.len(), log[0].to, log[1].from), (2, Some(one), Some(one)));
    assert_eq!((log[1].who.as_str(), log[1].why.as_str()), ("ana", "race"));
    assert_eq!(repository.tagged(&flavour, &tag).unwrap(), log[1].to);
    // A crash after the tag was written and before the reflog was.
    let path = repository.dir().join("flavours/tiny/reflog/stable");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, &text[..text.len() - 10]).unwrap();
    assert_eq!(repository.reflog(&flavour, &tag).unwrap(), log);
    repository.move_tag(&flavour, &tag, Expect::Anything, None, ("ana", "done")).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 3);
    assert_eq!(repository.tagged(&flavour, &tag).unwrap(), None);
    // A commit of another flavour is none of this one's.
    let other = "other".parse().unwrap();
    let error = repository.move_tag(&other, &tag, Expect::Anything, Some(one), ("ana", "")).unwrap_err();
    assert!(matches!(error, Error::Refused(_)), "{error}");
}

#[test]
fn a_transfer_brings_only_what_is_missing_and_moves_tags_last() {
    let (dir, at, here) = bed();
    let there = Repository::open(&dir.path().join("there")).unwrap();
    let one = commit(&here, &at, "first");
    let pull = |force| {
        let source = Directory::new(Repository::open(here.dir()).unwrap());
        let wanted = Wanted { flavour: "tiny".parse().unwrap(), tag: None, force };
        there.pull(&source, &wanted, "ana", &mut |_| {})
    };
    let first = pull(false).unwrap();
    assert_eq!((first.commits, first.trees, first.objects), (1, 1, 4));
    fs::write(at.join("etc/motd"), "changed\n").unwrap();
    let two = commit(&here, &at, "second");
    let second = pull(false).unwrap();
    assert_eq!((second.commits, second.objects, second.bytes), (1, 1, 8));
    assert_eq!(pull(false).unwrap().commits, 0);
    assert_eq!(there.resolve(&reference("tiny")).unwrap(), two);
    assert!(there.fsck(None).unwrap().problems.is_empty());
    // One of theirs that ours did not lead to is not left behind unasked.
    let staging = there.stage().unwrap();
    let tree = there.tree_of(&there.commit(one).unwrap()).unwrap();
    let own = there.commit_tree(&staging, &tree, new("mine")).unwrap();
    drop(staging);
    fs::write(at.join("etc/motd"), "again\n").unwrap();
    let three = commit(&here, &at, "third");
    assert!(matches!(pull(false), Err(Error::Refused(_))));
    assert_eq!(there.resolve(&reference("tiny")).unwrap(), own);
    pull(true).unwrap();
    assert_eq!(there.resolve(&reference("tiny")).unwrap(), three);
}

#[test]
fn what_a_remote_lies_about_does_not_arrive() {
    let (dir, at, here) = bed();
    commit(&here, &at, "first");
    let mut objects = Vec::new();
    collect(&here.dir().join("objects"), &mut objects);
    fs::remove_file(&objects[0]).unwrap();
    fs::write(&objects[0], "something else").unwrap();
    let there = Repository::open(&dir.path().join("there")).unwrap();
    let source = Directory::new(Repository::open(here.dir()).unwrap());
    let wanted = Wanted { flavour: "tiny".parse().unwrap(), tag: None, force: false };
    let error = there.pull(&source, &wanted, "ana", &mut |_| {}).unwrap_err();
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("something else"), "{error:?}");
    assert!(there.flavours().unwrap().is_empty() && there.commits().unwrap().is_empty());
    assert!(there.fsck(None).unwrap().is_sound());
}

#[test]
fn every_form_of_an_export_is_the_same_tree_when_imported() {
    privileged(&[Need::Root], || {
        let (dir, at, repository) = bed();
        rustix::fs::setxattr(at.join("etc/motd"), "user.x", b"1\n=", rustix::fs::XattrFlags::empty()).unwrap();
        fs::write(at.join(format!("{0}-{0}", "long".repeat(30))), "x").unwrap();
        symlink("y".repeat(300), at.join("far")).unwrap();
        std::os::unix::fs::chown(at.join("empty"), Some(3_000_000), Some(4)).unwrap();
        let id = commit(&repository, &at, "first");
        let Content::Tree { id: tree, .. } = repository.commit(id).unwrap().content else { unreachable!() };
        for name in ["d", "t.tar", "t.tar.gz", "t.tar.zst", "t.oci"] {
            let to = dir.path().join(name);
            repository.export(id, &to, Format::of(&to)).unwrap();
            repository.export(id, &to, Format::of(&to)).unwrap_err();
            let staging = repository.stage().unwrap();
            assert_eq!(staging.import(&to, IMPORT_MAX_BYTES).unwrap().encode().0, tree, "{name}");
        }
        // And what other programs pack is read.
        for (flag, name) in [("-z", "o.tgz"), ("-J", "o.tar.xz"), ("-j", "o.tar.bz2"), ("-c", "o.tar")] {
            let to = dir.path().join(name);
            let mut tar = std::process::Command::new("tar");
            tar.args(["--xattrs", "--xattrs-include=user.*", "--format=posix", "-c", flag, "-f"]);
            let tar = tar.arg(&to).arg("-C").arg(&at).arg(".").status();
            assert!(tar.unwrap().success());
            let staging = repository.stage().unwrap();
            assert_eq!(staging.import(&to, IMPORT_MAX_BYTES).unwrap().encode().0, tree, "{name}");
        }
    });
}

#[test]
fn large_files_are_kept_as_they_are_whether_they_are_new_or_were_there() {
    let (_dir, at, repository) = bed();
    let large = |number: usize, first: u8| {
        let content = (0..1_500_000).map(|n| u8::try_from((n * (number + 1)) % 251).unwrap());
        [vec![first], content.collect()].concat()
    };
    // More new ones than are read twice.
    for number in 0..8 {
        fs::write(at.join(format!("large{number}")), large(number, 0)).unwrap();
    }
    let one = commit(&repository, &at, "new");
    let objects = || walkdir(&repository.dir().join("objects"));
    let before = objects();
    for number in 0..2 {
        fs::write(at.join(format!("large{number}")), large(number, 1)).unwrap();
    }
    let two = commit(&repository, &at, "two of them");
    assert_eq!(objects(), before + 2);
    for (id, first) in [(one, 0), (two, 1)] {
        repository.verify(id).unwrap();
        let tree = repository.tree_of(&repository.commit(id).unwrap()).unwrap();
        for number in 0..8 {
            let Node::File { object: Some(object), size_bytes, .. } =
                tree.get(format!("large{number}").as_ref()).unwrap().node
            else {
                panic!("large{number} is no file");
            };
            let mut kept = Vec::new();
            repository.object(object).unwrap().read_to_end(&mut kept).unwrap();
            assert_eq!(size_bytes, 1_500_001);
            assert!(kept == large(number, if number < 2 { first } else { 0 }), "large{number}");
        }
    }
}

#[test]
fn a_rollout_gives_a_new_commit_to_some_first() {
    let (_dir, at, repository) = bed();
    let one = commit(&repository, &at, "first");
    fs::write(at.join("etc/motd"), "new\n").unwrap();
    let two = commit(&repository, &at, "second");
    let (flavour, tag, by) = ("tiny".parse().unwrap(), Tag::default_tag(), ("ana", "published"));
    let rollout = |percent| Rollout { canary_percent: percent, soft_after_s: Some(60), hard_after_s: Some(3600) };
    let of_a_hundred = || -> Vec<bool> {
        (0..100).map(|who| repository.follow(&flavour, &tag, &who.to_string()).unwrap() == two).collect()
    };
    let count = |got: &[bool]| got.iter().filter(|got| **got).count();
    repository.publish(&flavour, &tag, two, rollout(20), by).unwrap();
    let first = of_a_hundred();
    assert!((5..40).contains(&count(&first)), "{}", count(&first));
    assert_eq!(of_a_hundred(), first);
    repository.publish(&flavour, &tag, two, rollout(60), by).unwrap();
    let more = of_a_hundred();
    assert!(count(&more) > count(&first) && first.iter().zip(&more).all(|(first, more)| !first || *more));
    // Those who have the new one, and those who do not get it yet, are let alone.
    let who = |new: bool| more.iter().position(|got| *got == new).unwrap().to_string();
    let due = |who: &str, running, after_s| {
        repository.followed(&flavour, &tag).unwrap().due(who, running, SystemTime::now() + Duration::from_secs(after_s))
    };
    assert_eq!(due(&who(true), two, 10_000), Due::Nothing);
    assert_eq!(due(&who(false), one, 10_000), Due::Nothing);
    assert_eq!([0, 120, 3660].map(|after| due(&who(true), one, after)), [Due::Nothing, Due::Soft, Due::Hard]);
    // What the others start from stays while they do.
    let keep = Keep { reflog: Duration::ZERO, ..Keep::default() };
    repository.move_tag(&flavour, &Tag::head(), Expect::Anything, None, by).unwrap();
    repository.gc(&keep, false).unwrap();
    repository.commit(one).unwrap();
    repository.publish(&flavour, &tag, two, Rollout::default(), by).unwrap();
    assert_eq!(count(&of_a_hundred()), 100);
    repository.move_tag(&flavour, &tag, Expect::Anything, Some(one), by).unwrap();
    assert_eq!(count(&of_a_hundred()), 0);
    for wrong in [rollout(101), Rollout { hard_after_s: Some(1), ..rollout(5) }] {
        assert!(matches!(repository.publish(&flavour, &tag, two, wrong, by), Err(Error::Refused(_))));
    }
}

#[test]
fn what_the_policy_does_not_trust_cannot_be_used() {
    let (dir, at, repository) = bed();
    let one = commit(&repository, &at, "first");
    fs::write(at.join("etc/motd"), "new\n").unwrap();
    let two = commit(&repository, &at, "second");
    let (key, public, text) = SigningKey::generate().unwrap();
    let (other, ..) = SigningKey::generate().unwrap();
    assert_eq!(VerifyingKey::read(&public.to_line()).unwrap(), public);
    let refused = |repository: &Repository, id| -> Option<String> {
        let to = dir.path().join("checked-out");
        let refused = repository.base(id).err().map(|error| error.to_string());
        let exported = repository.export(id, &to, Format::Directory).err().map(|error| error.to_string());
        assert_eq!(refused, exported);
        if refused.is_none() {
            fs::remove_dir_all(to).unwrap();
        }
        refused
    };
    assert_eq!(refused(&repository, one), None);
    repository.set_policy(Some(&Policy { keys: vec![public.clone()] })).unwrap();
    assert!(refused(&repository, one).unwrap().contains("it is not signed"));
    repository.sign(one, &other).unwrap();
    assert!(refused(&repository, one).unwrap().contains("does not know"));
    repository.sign(one, &SigningKey::read(&text, None).unwrap()).unwrap();
    assert_eq!(refused(&repository, one), None);
    assert_eq!(repository.signers(one).unwrap().len(), 2);
    // The signature of another commit is none.
    let files = || fs::read_dir(repository.dir().join("signatures")).unwrap().map(|entry| entry.unwrap().path());
    let signed = files().find(|file| file.to_str().unwrap().ends_with(&public.id())).unwrap();
    let forged = signed.with_file_name(format!("{}.{}", two.hex(), public.id()));
    fs::copy(&signed, &forged).unwrap();
    assert!(refused(&repository, two).unwrap().contains("is wrong"));
    let found = repository.fsck(None).unwrap();
    assert_eq!(found.problems.len(), 1, "{found:?}");
    assert!(found.problems[0].what.contains("signature of commit"));
    fs::remove_file(&forged).unwrap();
    // Signatures travel, and count where they arrive.
    let there = Repository::open(&dir.path().join("there")).unwrap();
    there.set_policy(Some(&Policy { keys: vec![public.clone()] })).unwrap();
    let source = || Directory::new(Repository::open(repository.dir()).unwrap());
    let wanted = Wanted { flavour: "tiny".parse().unwrap(), tag: None, force: false };
    there.pull(&source(), &wanted, "ana", &mut |_| {}).unwrap();
    assert_eq!(refused(&there, one), None);
    assert!(refused(&there, two).is_some());
    repository.sign(two, &key).unwrap();
    there.pull(&source(), &wanted, "ana", &mut |_| {}).unwrap();
    assert_eq!(refused(&there, two), None);
    // Nothing is let out when nobody knows what may be.
    fs::write(there.dir().join("policy.json"), "{").unwrap();
    assert!(refused(&there, two).unwrap().contains("policy"));
    assert!(there.set_policy(Some(&Policy { keys: Vec::new() })).is_err());
    there.set_policy(None).unwrap();
    assert_eq!(refused(&there, two), None);
}

/// Where it is installed, `minisign` itself agrees.
#[test]
fn signatures_are_those_of_minisign() {
    privileged(&[Need::Program("minisign")], || {
        let (dir, at, repository) = bed();
        let one = commit(&repository, &at, "first");
        let (key, public, _) = SigningKey::generate().unwrap();
        repository.sign(one, &key).unwrap();
        let signature = repository.dir().join("signatures").join(format!("{}.{}", one.hex(), public.id()));
        let commit = repository.dir().join("commits").join(one.hex());
        let run = |args: &[&std::ffi::OsStr]| std::process::Command::new("minisign").args(args).output().unwrap();
        let line = public.to_line();
        let verify = ["-V".as_ref(), "-P".as_ref(), line.as_ref(), "-m".as_ref(), commit.as_ref(), "-x".as_ref()];
        let output = run(&[&verify[..], &[signature.as_ref()]].concat());
        assert!(output.status.success(), "{output:?}");
        // And the other way round: what it signs counts here.
        let (secret, file) = (dir.path().join("key"), dir.path().join("key.pub"));
        let made = run(&["-G".as_ref(), "-W".as_ref(), "-s".as_ref(), secret.as_ref(), "-p".as_ref(), file.as_ref()]);
        assert!(made.status.success(), "{made:?}");
        let theirs = VerifyingKey::read(&fs::read_to_string(file).unwrap()).unwrap();
        let signature = signature.with_extension(theirs.id());
        repository.set_policy(Some(&Policy { keys: vec![theirs] })).unwrap();
        assert!(repository.base(one).is_err());
        let sign = ["-S".as_ref(), "-s".as_ref(), secret.as_ref(), "-m".as_ref(), commit.as_ref(), "-x".as_ref()];
        let signed = run(&[&sign[..], &[signature.as_ref()]].concat());
        assert!(signed.status.success(), "{signed:?}");
        repository.base(one).unwrap();
    });
}
