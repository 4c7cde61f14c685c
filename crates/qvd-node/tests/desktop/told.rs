//! A machine's desktop becomes the next version of an image, as it tells of itself.

use std::{collections::BTreeMap, path::Path, thread, time::Duration};

use qvd_core::{DesktopId, DesktopSpec, FlavourName, Tag};
use qvd_node::{ExecRequest, Exit, Host as _, HostError, HostErrorKind, NewVersion, Node};
use qvd_storage::repository::{CommitId, Expect, Keep, Node as TreeNode, Version};

use super::{RFB, commit::text, greeting, machine::said, run};

/// What nothing of may be found in a repository.
const SECRET: &str = "this-is-nobodys-business";

fn version_of(node: &Node, id: DesktopId) -> Result<Version, HostError> {
    let flavour: FlavourName = format!("told-{}", std::process::id()).parse().unwrap();
    let new = NewVersion {
        flavour: Some(flavour),
        author: "ana".to_owned(),
        message: "from a machine".to_owned(),
        publish: false,
    };
    node.commit(id, &new)
}

/// What a machine has made of its root becomes a version, which it tells of itself;
/// it goes on, whatever became of that.
pub(crate) fn expect_version(node: &Node, spec: &DesktopSpec) {
    // One counts while it may, in a group of its own; another stands still already.
    let script = "(while :; do sleep 0.1; echo >> /tmp/count; done) > /dev/null 2>&1 < /dev/null & echo $!; \
                  sh -c 'kill -STOP $$; sleep 1000' > /dev/null 2>&1 < /dev/null & echo $!";
    let pids = said(node, spec.id, script);
    let [counts, stopped] = pids.lines().collect::<Vec<_>>()[..] else { panic!("{pids}") };
    let script = format!(
        r"exec 2>&1; set -ex; mkdir -p /opt/new /etc/ssh; echo told > /opt/new/file; ln /opt/new/file /opt/new/hard
        ln -s file '/opt/new/a link'; echo odd > '/opt/new/-T\x2d'; chown 1000:1000 /opt/new; rm /etc/issue
        echo {SECRET} > /root/.bash_history; echo {SECRET} > /etc/ssh/ssh_host_rsa_key; echo {SECRET} > /var/log/new
        mount -t cgroup2 none /sys/fs/cgroup; mkdir /sys/fs/cgroup/own; echo {counts} > /sys/fs/cgroup/own/cgroup.procs"
    );
    let (exit, told) = run(node, spec.id, true, &script);
    assert_eq!(exit, Exit::Code(0), "{told}");
    let made = version_of(node, spec.id).unwrap();
    assert!(made.files_read < 100 && made.entries > 5000, "{} of {} were read", made.files_read, made.entries);
    for left in ["root/.bash_history", "etc/ssh/ssh_host_rsa_key", "etc/machine-id", "var/log/new"] {
        assert!(made.left_out.iter().any(|path| path == Path::new(left)), "{left}: {:?}", made.left_out);
    }
    // It goes on as it was.
    let script = format!(
        "count() {{ wc -l < /tmp/count; }}; before=$(count); until [ $(count) -gt $before ]; do sleep 0.1; done; \
         cat /proc/{counts}/cgroup; cut -d' ' -f3 /proc/{stopped}/stat"
    );
    assert_eq!(said(node, spec.id, &script), "0::/own\nT\n");
    said(node, spec.id, &format!("kill -9 {counts} {stopped}"));
    let display = node.attach(spec.id, RFB, &mut drop).unwrap();
    assert_eq!(greeting(display.stream()), "RFB 003.008\n");

    let repository = node.repository().unwrap();
    let tree = |id| repository.tree_of(&repository.commit(id).unwrap()).unwrap();
    let (before, after) = (tree(CommitId::new(spec.image)), tree(made.id));
    assert_eq!(text(&repository, &after, "opt/new/file").unwrap(), "told\n");
    assert_eq!(text(&repository, &after, r"opt/new/-T\x2d").unwrap(), "odd\n");
    assert_eq!(text(&repository, &after, "etc/mark").unwrap(), "system\n");
    let entry = |path: &str| after.get(path.as_ref()).unwrap();
    assert_eq!((entry("opt/new").meta.uid, entry("opt/new").meta.gid), (1000, 1000));
    assert_eq!(entry("opt/new/file").node, entry("opt/new/hard").node, "one file");
    assert!(matches!(entry("opt/new/a link").node, TreeNode::Symlink(_)));
    assert!(after.get("etc/issue".as_ref()).is_none(), "what was removed is");
    for path in ["usr/bin/icewm", "etc/passwd", "etc/machine-id", "etc/ssh/ssh_host_rsa_key", "dev", "home"] {
        assert_eq!(after.get(path.as_ref()), before.get(path.as_ref()), "/{path}");
    }

    // One that tells nonsense is refused, and goes on.
    let (exit, said) =
        run(node, spec.id, true, "cd /usr/local/bin && printf '#!/bin/sh\necho me' > find && chmod 755 find");
    assert_eq!(exit, Exit::Code(0), "{said}");
    let error = qvd_core::causes(&version_of(node, spec.id).unwrap_err()).join(": ");
    assert!(error.ends_with(r"it told `me\n`"), "{error}");
    assert_eq!(run(node, spec.id, true, "rm /usr/local/bin/find").0, Exit::Code(0));
    assert_eq!(repository.resolve(&format!("told-{}", std::process::id()).parse().unwrap()).unwrap(), made.id);
}

/// A machine that ends while it tells, and one that does not run, become no version.
pub(crate) fn expect_none_of_the_dead(node: &Node, id: DesktopId) {
    let (exit, said) = run(node, id, true, "head -c 30000000 /dev/zero > /opt/large");
    assert_eq!(exit, Exit::Code(0), "{said}");
    let repository = node.repository().unwrap();
    let head = || repository.resolve(&format!("told-{}", std::process::id()).parse().unwrap()).unwrap();
    let before = head();
    thread::scope(|scope| {
        let made = scope.spawn(|| version_of(node, id));
        let argv = vec!["true".to_owned()];
        loop {
            let request = ExecRequest { argv: argv.clone(), env: BTreeMap::new(), root: false, tty: None };
            match node.exec(id, request) {
                Err(error) if qvd_core::causes(&error).join(": ").contains("stands still") => break,
                _ => assert!(!made.is_finished(), "{:?}", made.join()),
            }
        }
        node.stop(id, Duration::ZERO).unwrap();
        made.join().unwrap().unwrap_err();
    });
    let error = version_of(node, id).unwrap_err();
    assert_eq!(error.kind(), HostErrorKind::NotRunning);
    assert!(error.to_string().contains("that the host can read"), "{error}");
    assert_eq!(head(), before);
    let flavour: FlavourName = format!("told-{}", std::process::id()).parse().unwrap();
    for tag in [Tag::head(), Tag::default_tag()] {
        repository.move_tag(&flavour, &tag, Expect::Anything, None, ("ana", "done")).unwrap();
    }
    repository.gc(&Keep { reflog: Duration::ZERO, commits: Vec::new() }, false).unwrap();
}
