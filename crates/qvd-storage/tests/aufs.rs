//! aufs, on a kernel that has it or, as nearly all, has not.
#![allow(clippy::unwrap_used)]

mod scratch;

use qvd_core::{ErrorKind, Missing, Support};
use qvd_storage::{Aufs, Capability, Place, RootBackend};
use qvd_testkit::{Need, privileged};
use scratch::{base, id, kept, volatile};

/// Whether this kernel has it: the same file that `mount` looks in.
fn is_known() -> bool {
    std::fs::read_to_string("/proc/filesystems").unwrap().lines().any(|line| line.ends_with("\taufs"))
}

#[test]
fn it_stacks_or_says_what_is_missing_and_leaves_nothing() {
    privileged(&[Need::Root], || {
        let dir = tempfile::tempdir().unwrap();
        let backend = Aufs::new(Place::open(dir.path()).unwrap());
        let base = base(dir.path());
        let works = backend.capabilities().unwrap().get(Capability::Roots);
        assert_eq!(works.is_yes(), is_known(), "{works:?}");
        for options in [volatile(), kept()] {
            match backend.create(&base, &id("1"), &options) {
                Ok(mut root) => {
                    assert!(works.is_yes());
                    let mount = root.mount(None).unwrap();
                    assert_eq!(scratch::read(&mount, "etc/f"), "from the image");
                    std::fs::write(scratch::path(&mount, "etc/f"), "changed").unwrap();
                    assert_eq!(std::fs::read_to_string(dir.path().join("base/etc/f")).unwrap(), "from the image");
                    drop(mount);
                    root.close().unwrap();
                    backend.remove(&id("1")).unwrap();
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Unsupported);
                    assert!(error.to_string().contains("aufs"), "{error}");
                    assert!(matches!(&works, Support::No(Missing::Kernel(what)) if what.contains("aufs")), "{works:?}");
                }
            }
            assert_eq!(backend.roots().unwrap(), []);
        }
    });
}
