//! Roots put together from parts.
#![allow(clippy::unwrap_used)]

mod scratch;

use std::{
    fs,
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt, symlink},
    },
};

use qvd_core::RootPolicy;
use qvd_storage::{Bind, Capability, Place, RootBackend};
use qvd_testkit::{Need, privileged};
use scratch::{base, id, kept, path, read, userns, volatile};

const NEEDS: &[Need] = &[Need::Root, Need::UserNamespaces];

fn mounts() -> usize {
    fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count()
}

#[test]
fn what_is_written_is_the_roots_own_and_the_rest_is_the_images() {
    privileged(NEEDS, || {
        let at = tempfile::tempdir().unwrap();
        let (backend, base, before) =
            (Bind::new(Place::open(&at.path().join("store")).unwrap()), base(at.path()), mounts());
        let capabilities = backend.capabilities().unwrap();
        assert!(capabilities.get(Capability::SharedMmaps).is_yes() && capabilities.get(Capability::IdMapped).is_yes());
        assert!(!capabilities.get(Capability::ConstantCreate).is_yes());

        let one = backend.create(&base, &id("one"), &kept()).unwrap();
        let mut other = backend.create(&base, &id("other"), &volatile()).unwrap();
        let (mine, theirs) = (one.mount(None).unwrap(), other.mount(None).unwrap());
        fs::write(path(&mine, "etc/f"), "mine").unwrap();
        fs::write(path(&theirs, "var/lib/new"), "theirs").unwrap();
        assert_eq!((read(&mine, "etc/f").as_str(), read(&theirs, "etc/f").as_str()), ("mine", "from the image"));
        assert_eq!(fs::read_to_string(at.path().join("base/etc/f")).unwrap(), "from the image");
        assert!(!path(&mine, "var/lib/new").exists());
        let refused = fs::write(path(&mine, "usr/bin/tool"), "").unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(30), "EROFS");
        let tool = |name: &std::path::Path| fs::metadata(name).unwrap().ino();
        assert_eq!(tool(&path(&mine, "usr/bin/tool")), tool(&at.path().join("base/usr/bin/tool")), "the very file");
        let userns = userns();
        let mapped = one.mount(Some(userns.as_fd())).unwrap();
        assert_eq!(fs::metadata(path(&mapped, "home/mine")).unwrap().uid(), qvd_core::UidRange::FIRST + 1000);
        assert_eq!(mounts(), before, "nothing of it in the host's table");
        drop((mine, theirs, mapped));

        assert!(!path(&other.mount(None).unwrap(), "var/lib/new").exists(), "a volatile one begins anew");
        other.close().unwrap();
        assert_eq!(backend.roots().unwrap(), [(id("one"), RootPolicy::Persistent)]);
        let again = backend.create(&base, &id("one"), &kept()).unwrap();
        assert_eq!(read(&again.mount(None).unwrap(), "etc/f"), "mine");
        backend.remove(&id("one")).unwrap();
    });
}

#[test]
fn the_image_says_what_is_written_and_cannot_point_elsewhere() {
    privileged(NEEDS, || {
        let at = tempfile::tempdir().unwrap();
        let backend = Bind::new(Place::open(&at.path().join("store")).unwrap());
        let base = base(at.path());
        let manifest = at.path().join("base/usr/share/qvd/bind.toml");
        fs::create_dir_all(manifest.parent().unwrap()).unwrap();
        fs::write(&manifest, "writable = [\"/usr/bin\"]").unwrap();
        let root = backend.create(&base, &id("one"), &volatile()).unwrap();
        let mount = root.mount(None).unwrap();
        fs::write(path(&mount, "usr/bin/tool"), "mine").unwrap();
        assert!(fs::write(path(&mount, "etc/f"), "").is_err());
        drop(mount);

        symlink("/etc", at.path().join("base/link")).unwrap();
        for (bad, why) in
            [("/link", "no directory"), ("/absent", "no directory"), ("/etc/f", "no directory"), ("/..", "below")]
        {
            fs::write(&manifest, format!("writable = [\"{bad}\"]")).unwrap();
            let error = backend.create(&base, &id("two"), &volatile()).unwrap_err();
            assert!(qvd_core::causes(&error).join(": ").contains(why), "{bad}: {error:?}");
        }
        fs::remove_file(&manifest).unwrap();
        symlink("/etc/passwd", &manifest).unwrap();
        assert!(backend.create(&base, &id("two"), &volatile()).is_err(), "a link out of the image");
        assert_eq!(backend.roots().unwrap(), [(id("one"), RootPolicy::Volatile)]);
        backend.remove(&id("one")).unwrap();
    });
}
