//! Images on the test bed's kernel, Linux 6.1: it mounts no plain file, and knows no
//! layers of content alone.
#![allow(clippy::unwrap_used)]

mod scratch;

use std::{
    fs,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use qvd_storage::{BaseTree, ErrorKind, Layer, Overlayfs, Place, RootBackend, Store};
use qvd_testkit::{Bed, in_bed};
use scratch::{base, id, kept, path, read, tiny, userns, volatile};

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Files that loop devices stand on.
fn devices() -> Vec<String> {
    let names = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
    names.filter_map(|device| fs::read_to_string(device.join("loop/backing_file")).ok()).collect()
}

#[test]
fn an_image_file_is_mounted_by_one_loop_device_and_what_cannot_be_is_said() {
    in_bed(&Bed::new().memory_mib(768).disk_mib(256).limit(Duration::from_secs(280)), || {
        for module in ["loop", "erofs", "overlay"] {
            run("/run/busybox", &["modprobe", module]);
        }
        run("mkfs.ext4", &["-q", "/dev/vda"]);
        fs::create_dir("/run/at").unwrap();
        run("mount", &["/dev/vda", "/run/at"]);
        let at = Path::new("/run/at");
        let (flat, image) = (base(at), at.join("image.erofs"));
        run("mkfs.erofs", &["--quiet", image.to_str().unwrap(), flat.dir().unwrap().to_str().unwrap()]);
        let tree = BaseTree::layered(flat.digest(), vec![Layer::Erofs(image)]);
        let backend = Overlayfs::new(Place::open(&at.join("store")).unwrap());
        one_device_for_all(&tree, &backend);

        // An image of a repository shares its content with others.
        let store = Store::open(&at.join("images")).unwrap();
        let fill = &mut |tree: &Path| fs::write(tree.join("large"), vec![1; 4096]);
        let image = store.import(tiny().config().clone(), fill).unwrap();
        let root = store.root(&image, &id("one"), qvd_core::RootPolicy::Volatile).unwrap();
        for refused in [root.mount(None).unwrap_err(), image.base().open().unwrap_err()] {
            assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
            assert!(refused.to_string().contains("content alone") && refused.to_string().contains("6.5"), "{refused}");
        }

        let probed = store.probe().unwrap();
        let (_, answer) = probed.iter().find(|(name, _)| *name == "mounting images").unwrap();
        assert!(format!("{answer:?}").contains("6.5"), "{answer:?}");

        fs::remove_file("/dev/loop-control").unwrap();
        let root = backend.create(&tree, &id("two"), &volatile()).unwrap();
        for refused in [root.mount(None).unwrap_err(), tree.open().unwrap_err()] {
            assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
            let said = refused.to_string();
            assert!(["6.12", "modprobe loop", "/run/at/image.erofs"].iter().all(|part| said.contains(part)), "{said}");
        }
    });
}

fn one_device_for_all(tree: &BaseTree, backend: &Overlayfs) {
    let (userns, mut one) = (userns(), backend.create(tree, &id("one"), &kept()).unwrap());
    let mut other = backend.create(tree, &id("other"), &volatile()).unwrap();
    let (mine, theirs) = (one.mount(Some(userns.as_fd())).unwrap(), other.mount(None).unwrap());
    assert_eq!(fs::metadata(path(&mine, "home/mine")).unwrap().uid(), qvd_core::UidRange::FIRST + 1000);
    fs::write(path(&theirs, "etc/f"), "changed").unwrap();
    assert_eq!((read(&mine, "etc/f").as_str(), read(&theirs, "etc/f").as_str()), ("from the image", "changed"));
    let whole = tree.open().unwrap();
    assert_eq!(fs::read(path(&whole, "usr/bin/tool")).unwrap(), vec![7; 100_000]);
    assert_eq!(devices().len(), 1, "{:?}", devices());
    drop((mine, theirs, whole));
    one.close().unwrap();
    other.close().unwrap();
    // Its last user may be a mount that is closed in the background.
    let deadline = Instant::now() + Duration::from_secs(60);
    while !devices().is_empty() {
        assert!(Instant::now() < deadline, "{:?}", devices());
        std::thread::park_timeout(Duration::from_millis(20));
    }
}
