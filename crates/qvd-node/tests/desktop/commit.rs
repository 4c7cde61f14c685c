//! A desktop becomes the next version of an image, without its secrets.

use std::{os::fd::AsFd as _, path::Path};

use qvd_core::{DesktopId, DesktopSpec, FlavourName, RootPolicy, Tag};
use qvd_node::{Exit, Host as _, HostErrorKind, NewVersion};
use qvd_storage::repository::{CommitId, Expect, Keep, Node as TreeNode, Tree};
use qvd_sys::map::SharedMap;

use super::{Host, SOON, cgroup_procs, on_a_host, run};

/// What nothing of may be found in a repository.
const SECRET: &str = "this-is-nobodys-business";

pub(crate) fn text(repository: &qvd_storage::Repository, tree: &Tree, path: &str) -> Option<String> {
    let entry = tree.get(Path::new(path))?;
    let TreeNode::File { object, .. } = &entry.node else { panic!("/{path} is no file") };
    let Some(object) = object else { return Some(String::new()) };
    Some(std::io::read_to_string(repository.object(*object).unwrap()).unwrap())
}

/// Desktops on different commits share the memory of what is equal in both: what one
/// has read is there for the other, and is mapped once. Copies share nothing.
fn expect_shared(host: &Host, desktops: [DesktopId; 2], tree: &Tree) {
    let large = |entry: &&qvd_storage::repository::Entry| match entry.node {
        TreeNode::File { size_bytes, .. } => (1 << 18..1 << 22).contains(&size_bytes),
        _ => false,
    };
    // Of those nobody runs.
    let mut files = tree.entries().iter().filter(|entry| entry.path.starts_with("usr/share"));
    let name = &files.rfind(large).expect("a large file").path;
    let inside = desktops.map(|id| {
        let pids = std::fs::read_to_string(cgroup_procs(host.config.instance, id)).unwrap();
        Path::new("/proc").join(pids.lines().next().unwrap()).join("root").join(name)
    });
    let dir = tempfile::tempdir().unwrap();
    let copies = ["one", "other"].map(|name| dir.path().join(name));
    for copy in &copies {
        std::fs::copy(&inside[0], copy).unwrap();
    }
    for (paths, shared) in [(&inside, true), (&copies, false)] {
        let files = paths.each_ref().map(|path| std::fs::File::open(path).unwrap());
        for file in &files {
            file.sync_all().unwrap();
            rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        }
        let bytes = usize::try_from(files[0].metadata().unwrap().len()).unwrap();
        let [one, other] = files.each_ref().map(|file| SharedMap::new(file.as_fd(), bytes, false).unwrap());
        assert_eq!(other.resident_bytes().unwrap(), 0, "{}", paths[1].display());
        std::fs::read(&paths[0]).unwrap();
        assert_eq!(other.resident_bytes().unwrap() >= bytes, shared, "{}", paths[1].display());
        one.touch();
        let alone = one.pss_bytes().unwrap();
        other.touch();
        let both = one.pss_bytes().unwrap();
        assert_eq!(both, if shared { alone / 2 } else { alone }, "{}", paths[0].display());
    }
}

#[test]
fn what_a_stopped_desktop_has_kept_becomes_a_version() {
    on_a_host(|host| {
        let node = host.open();
        let spec = DesktopSpec { root: RootPolicy::Persistent, ..host.spec(1) };
        let repository = node.repository().unwrap();
        let flavour: FlavourName = format!("kept-{}", std::process::id()).parse().unwrap();
        node.ensure_running(&spec, &mut drop).unwrap();
        let script = format!(
            "set -e; echo kept > /etc/motd; chown 1000:1000 /etc/motd; rm /etc/issue; echo {SECRET} > /etc/machine-id; \
             mkdir /opt/new; echo {SECRET} > /opt/new/.bash_history"
        );
        let (exit, said) = run(&node, spec.id, true, &script);
        assert_eq!(exit, Exit::Code(0), "{said}");
        node.stop(spec.id, SOON).unwrap();
        let new = NewVersion {
            flavour: Some(flavour.clone()),
            author: "ana".to_owned(),
            message: "from what was kept".to_owned(),
            publish: false,
        };
        let made = node.commit(spec.id, &new).unwrap();
        assert!(made.files_read < 50 && made.entries > 5000, "{} of {} were read", made.files_read, made.entries);
        for left in ["etc/machine-id", "opt/new/.bash_history"] {
            assert!(made.left_out.iter().any(|path| path == Path::new(left)), "{left}: {:?}", made.left_out);
        }
        let tree = repository.tree_of(&repository.commit(made.id).unwrap()).unwrap();
        assert_eq!(text(&repository, &tree, "etc/motd").unwrap(), "kept\n");
        let owner = &tree.get(Path::new("etc/motd")).unwrap().meta;
        assert_eq!((owner.uid, owner.gid), (1000, 1000), "owners as inside");
        assert!(tree.get(Path::new("etc/issue")).is_none(), "what was removed is");
        assert!(!text(&repository, &tree, "etc/machine-id").unwrap_or_default().contains(SECRET));

        // The root is as it was, and its desktop starts again.
        node.ensure_running(&spec, &mut drop).unwrap();
        assert_eq!(run(&node, spec.id, false, "cat /etc/motd").1, "kept\n");
        node.remove(spec.id).unwrap();
        for tag in [Tag::head(), Tag::default_tag()] {
            repository.move_tag(&flavour, &tag, Expect::Anything, None, ("ana", "done")).unwrap();
        }
        repository.gc(&Keep { reflog: std::time::Duration::ZERO, commits: Vec::new() }, false).unwrap();
        node.shut_down(std::time::Duration::ZERO).unwrap();
    });
}

#[test]
fn a_desktop_becomes_a_version_without_its_secrets() {
    on_a_host(|host| {
        let (node, spec) = (host.open(), host.spec(1));
        let repository = node.repository().unwrap();
        let flavour: FlavourName = format!("made-{}", std::process::id()).parse().unwrap();
        node.ensure_running(&spec, &mut drop).unwrap();
        let script = format!(
            "set -e; echo changed > /etc/motd; mkdir -p /opt/new/deep; echo new > /opt/new/deep/file; \
             ln -s deep/file /opt/new/link; ln /opt/new/deep/file /opt/new/hard; chown 1000:1000 /opt/new; \
             rm /etc/issue; for secret in /etc/machine-id /root/.profile-{SECRET} /var/log/app.log /tmp/x ~user/x \
             /etc/ssh/ssh_host_new_key /opt/new/.bash_history; do mkdir -p $(dirname $secret); echo {SECRET} > $secret; done; \
             touch -d @1 /etc/motd"
        );
        let (exit, said) = run(&node, spec.id, true, &script);
        assert_eq!(exit, Exit::Code(0), "{said}");
        let new = NewVersion {
            flavour: Some(flavour.clone()),
            author: "ana".to_owned(),
            message: "with a motd".to_owned(),
            publish: false,
        };
        let made = node.commit(spec.id, &new).unwrap();
        assert!(made.files_read < 50 && made.entries > 5000, "{} of {} were read", made.files_read, made.entries);
        for left in ["etc/machine-id", "var/log/app.log", "opt/new/.bash_history", "etc/ssh/ssh_host_new_key"] {
            assert!(made.left_out.iter().any(|path| path == Path::new(left)), "{left}: {:?}", made.left_out);
        }
        // It went on.
        assert_eq!(run(&node, spec.id, false, "exit 3").0, Exit::Code(3));

        let commit = repository.commit(made.id).unwrap();
        assert_eq!(commit.parents, [CommitId::new(spec.image)]);
        assert!(commit.message.starts_with("with a motd\n") && commit.message.contains("/etc/machine-id"));
        let base = repository.commit(CommitId::new(spec.image)).unwrap();
        let tree_of = |commit: &qvd_storage::repository::Commit| match commit.content {
            qvd_storage::repository::Content::Tree { id, .. } => repository.tree(id).unwrap(),
            _ => panic!("no tree"),
        };
        let (before, after) = (tree_of(&base), tree_of(&commit));
        assert_eq!(text(&repository, &after, "etc/motd").unwrap(), "changed\n", "whatever its time says");
        assert_eq!(text(&repository, &after, "opt/new/deep/file").unwrap(), "new\n");
        let owner = &after.get(Path::new("opt/new")).unwrap().meta;
        assert_eq!((owner.uid, owner.gid), (1000, 1000), "owners as inside");
        let hard = &after.get(Path::new("opt/new/hard")).unwrap().node;
        assert_eq!(hard, &after.get(Path::new("opt/new/deep/file")).unwrap().node, "one file");
        assert!(after.get(Path::new("etc/issue")).is_none(), "what was removed is");
        for path in ["etc/machine-id", "dev", "proc", "run", "tmp", "usr/bin/icewm", "home"] {
            assert_eq!(after.get(Path::new(path)), before.get(Path::new(path)), "/{path}");
        }
        assert!(!after.entries().iter().any(|entry| entry.path.to_string_lossy().contains(SECRET)));
        for (object, _) in after.objects() {
            let file = repository.object(object).unwrap();
            let small = file.metadata().unwrap().len() < 4096;
            assert!(!small || !std::io::read_to_string(file).unwrap_or_default().contains(SECRET));
        }

        // A desktop of it runs.
        let next = DesktopSpec { image: made.id.digest(), ..host.spec(2) };
        node.ensure_running(&next, &mut drop).unwrap();
        assert_eq!(run(&node, next.id, false, "cat /etc/motd /opt/new/link").1, "changed\nnew\n");
        expect_shared(host, [spec.id, next.id], &after);
        // What has moved on is not undone.
        node.commit(next.id, &NewVersion { flavour: None, ..new.clone() }).unwrap();
        let late = node.commit(next.id, &NewVersion { flavour: None, ..new.clone() }).unwrap_err();
        assert_eq!(late.kind(), HostErrorKind::Busy, "{late}");
        node.remove(next.id).unwrap();
        node.remove(spec.id).unwrap();
        let stopped = node.commit(spec.id, &new).unwrap_err();
        assert_eq!(stopped.kind(), HostErrorKind::NotRunning, "{stopped}");
        assert!(stopped.to_string().contains("no root of it is kept"), "{stopped}");
        for tag in [Tag::head(), Tag::default_tag()] {
            repository.move_tag(&flavour, &tag, Expect::Anything, None, ("ana", "done")).unwrap();
        }
        let keep = Keep { reflog: std::time::Duration::ZERO, commits: Vec::new() };
        assert!(repository.gc(&keep, false).unwrap().commits >= 2);
        node.shut_down(std::time::Duration::ZERO).unwrap();
    });
}
