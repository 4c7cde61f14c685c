//! A desktop becomes the next version of an image, without its secrets.

use std::path::Path;

use qvd_core::{DesktopSpec, FlavourName, Tag};
use qvd_node::{Exit, Host as _, HostErrorKind, NewVersion};
use qvd_storage::repository::{CommitId, Expect, Keep, Node as TreeNode, Tree};

use super::{on_a_host, run};

/// What nothing of may be found in a repository.
const SECRET: &str = "this-is-nobodys-business";

fn text(repository: &qvd_storage::Repository, tree: &Tree, path: &str) -> Option<String> {
    let entry = tree.get(Path::new(path))?;
    let TreeNode::File { object, .. } = &entry.node else { panic!("/{path} is no file") };
    let Some(object) = object else { return Some(String::new()) };
    Some(std::io::read_to_string(repository.object(*object).unwrap()).unwrap())
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
        // What has moved on is not undone.
        node.commit(next.id, &NewVersion { flavour: None, ..new.clone() }).unwrap();
        let late = node.commit(next.id, &NewVersion { flavour: None, ..new.clone() }).unwrap_err();
        assert_eq!(late.kind(), HostErrorKind::Busy, "{late}");
        node.remove(next.id).unwrap();
        node.remove(spec.id).unwrap();
        let stopped = node.commit(spec.id, &new).unwrap_err();
        assert_eq!(stopped.kind(), HostErrorKind::NotRunning, "{stopped}");
        for tag in [Tag::head(), Tag::default_tag()] {
            repository.move_tag(&flavour, &tag, Expect::Anything, None, ("ana", "done")).unwrap();
        }
        let keep = Keep { reflog: std::time::Duration::ZERO, commits: Vec::new() };
        assert!(repository.gc(&keep, false).unwrap().commits >= 2);
        node.shut_down(std::time::Duration::ZERO).unwrap();
    });
}
