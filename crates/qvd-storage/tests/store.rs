//! A store as its users see it, on small trees made by hand.
#![allow(clippy::unwrap_used, clippy::panic)]

mod scratch;

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            fs::{MetadataExt, PermissionsExt, chown, symlink},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use qvd_core::{DesktopId, RootPolicy, UidRange};
use qvd_storage::{
    BuildOptions, Error, ErrorKind, HomeId, Image, Recipe, Store,
    repository::{CommitId, Expect, Keep},
};
use qvd_sys::mount::{FsContext, Restrictions, attach, in_private_namespace, open_dir_path};
use qvd_testkit::{Need, privileged};
use scratch::{id, path, tiny};

const NEEDS: &[Need] = &[Need::Root, Need::UserNamespaces, Need::Filesystem("overlay")];

fn fill(tree: &Path) -> io::Result<()> {
    fs::create_dir_all(tree.join("etc/skel/.config"))?;
    fs::write(tree.join("etc/f"), "from the image")?;
    fs::write(tree.join("etc/skel/.profile"), "umask 077")?;
    fs::set_permissions(tree.join("etc/skel/.profile"), fs::Permissions::from_mode(0o4755))?;
    symlink("/etc/shadow", tree.join("etc/skel/link"))?;
    fs::create_dir_all(tree.join("home/user"))?;
    fs::write(tree.join("home/mine"), "")?;
    chown(tree.join("home/mine"), Some(1000), Some(1000))?;
    // Made in another second, it is the same tree.
    let time = rustix::fs::Timespec { tv_sec: 1_000_000_000, tv_nsec: 0 };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    for entry in walkdir::WalkDir::new(tree).contents_first(true) {
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::utimensat(rustix::fs::CWD, entry?.path(), &times, flags)?;
    }
    Ok(())
}

fn store_with_image(dir: &Path) -> (Store, Image) {
    let store = Store::open(dir).unwrap();
    let image = store.import(tiny().config().clone(), &mut fill).unwrap();
    (store, image)
}

fn userns(range: UidRange) -> OwnedFd {
    qvd_sys::userns::create(range.base(), UidRange::LEN).unwrap()
}

/// Runs a shell in a mount as an id of the host, and says whether it succeeded.
fn sh(mount: &OwnedFd, uid: u32, script: &str) -> bool {
    let mut command = Command::new("/bin/sh");
    // The directory is entered after the ids were changed and before the
    // descriptor is closed.
    command.stderr(std::process::Stdio::null()).args(["-c", script]).uid(uid).gid(uid).current_dir(path(mount, ""));
    command.status().unwrap().success()
}

fn mounts() -> usize {
    fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count()
}

#[test]
fn a_root_shows_the_image_in_the_desktops_ids_and_leaves_it_alone() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let (store, image) = store_with_image(dir.path());
        let before = mounts();
        let (one, two) = (UidRange::of_slot(3).unwrap(), UidRange::of_slot(4).unwrap());
        let root_one = store.root(&image, &id("1"), RootPolicy::Volatile).unwrap();
        let root_two = store.root(&image, &id("2"), RootPolicy::Volatile).unwrap();
        let mount_one = root_one.mount(Some(userns(one).as_fd())).unwrap();
        let mount_two = root_two.mount(Some(userns(two).as_fd())).unwrap();
        assert_eq!(mounts(), before, "a root is in the host's mount table");
        for (mount, range) in [(&mount_one, one), (&mount_two, two)] {
            assert_eq!(fs::metadata(path(mount, "etc/f")).unwrap().uid(), range.base());
            assert_eq!(fs::metadata(path(mount, "home/mine")).unwrap().uid(), range.base() + 1000);
            assert_eq!(fs::metadata(path(mount, "")).unwrap().uid(), range.base());
        }
        assert!(sh(&mount_one, one.base(), "echo changed >etc/f && echo new >etc/new"));
        assert_eq!(fs::read_to_string(path(&mount_one, "etc/f")).unwrap(), "changed\n");
        assert_eq!(fs::read_to_string(path(&mount_two, "etc/f")).unwrap(), "from the image");
        assert!(!path(&mount_two, "etc/new").exists());
        // The other desktop's root has no right here, and on disk nothing is shifted.
        assert!(!sh(&mount_one, two.base(), "echo no >etc/f"));
        assert_eq!(fs::metadata(dir.path().join("roots/overlayfs/1/upper/etc/new")).unwrap().uid(), 0);
        image.verify().unwrap();
    });
}

#[test]
fn a_volatile_root_begins_anew_also_after_a_crash() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let (store, image) = store_with_image(dir.path());
        let root = store.root(&image, &id("1"), RootPolicy::Volatile).unwrap();
        let mount = root.mount(None).unwrap();
        fs::write(path(&mount, "left"), "x").unwrap();
        // A crash: the mount goes with its process, the marker stays.
        drop((mount, root, store));
        assert!(dir.path().join("roots/overlayfs/1/work/work/incompat/volatile/dirty").exists());
        let store = Store::open(dir.path()).unwrap();
        let mut root = store.root(&image, &id("1"), RootPolicy::Volatile).unwrap();
        let mount = root.mount(None).unwrap();
        assert!(!path(&mount, "left").exists());
        fs::write(path(&mount, "left"), "x").unwrap();
        drop(mount);
        root.close().unwrap();
        root.close().unwrap();
        assert!(!dir.path().join("roots/overlayfs/1").exists());
        // What was volatile is never taken for persistent.
        let volatile = store.root(&image, &id("1"), RootPolicy::Volatile).unwrap();
        fs::write(path(&volatile.mount(None).unwrap(), "left"), "x").unwrap();
        let persistent = store.root(&image, &id("1"), RootPolicy::Persistent).unwrap();
        assert!(!path(&persistent.mount(None).unwrap(), "left").exists());
    });
}

#[test]
fn a_persistent_root_keeps_what_was_written() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let (store, image) = store_with_image(dir.path());
        let mut root = store.root(&image, &id("1"), RootPolicy::Persistent).unwrap();
        fs::write(path(&root.mount(None).unwrap(), "etc/f"), "kept").unwrap();
        root.close().unwrap();
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.roots().unwrap(), [(id("1"), RootPolicy::Persistent)]);
        store.sweep_volatile(&[]).unwrap();
        let root = store.root(&image, &id("1"), RootPolicy::Persistent).unwrap();
        let mount = root.mount(Some(userns(UidRange::of_slot(9).unwrap()).as_fd())).unwrap();
        assert_eq!(fs::read_to_string(path(&mount, "etc/f")).unwrap(), "kept");
        // Another image has other files below: the root does not move there by itself.
        let other = store.import(tiny().config().clone(), &mut |tree| fs::write(tree.join("other"), "")).unwrap();
        let error = store.root(&other, &id("1"), RootPolicy::Persistent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    });
}

#[test]
fn a_root_in_use_is_neither_mounted_again_nor_removed() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let (store, image) = store_with_image(dir.path());
        for policy in [RootPolicy::Volatile, RootPolicy::Persistent] {
            let mut root = store.root(&image, &id("1"), policy).unwrap();
            let mount = root.mount(None).unwrap();
            fs::write(path(&mount, "f"), "x").unwrap();
            assert!(matches!(root.mount(None), Err(Error::RootBusy(_))), "{policy:?}");
            assert!(matches!(store.remove_root(&id("1")), Err(Error::RootBusy(_))), "{policy:?}");
            assert_eq!(store.sweep_volatile(&[]).is_err(), policy == RootPolicy::Volatile);
            assert_eq!(root.close().is_err(), policy == RootPolicy::Volatile);
            assert_eq!(fs::read_to_string(path(&mount, "f")).unwrap(), "x", "{policy:?}");
            drop(mount);
            root.close().unwrap();
            store.remove_root(&id("1")).unwrap();
            store.remove_root(&id("1")).unwrap();
        }
    });
}

#[test]
fn roots_that_nobody_owns_are_swept_and_deleted_in_the_background() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let (store, image) = store_with_image(dir.path());
        for name in ["1", "2", "3"] {
            let root = store.root(&image, &id(name), RootPolicy::Volatile).unwrap();
            let mount = root.mount(None).unwrap();
            for n in 0..200 {
                fs::write(path(&mount, &n.to_string()), "").unwrap();
            }
        }
        store.sweep_volatile(&[DesktopId::new(2).unwrap()]).unwrap();
        assert_eq!(store.roots().unwrap(), [(id("2"), RootPolicy::Volatile)]);
        for _ in 0..2000 {
            if fs::read_dir(dir.path().join("trash")).unwrap().next().is_none() {
                return;
            }
            thread::park_timeout(Duration::from_millis(5));
        }
        panic!("the trash was not emptied");
    });
}

#[test]
fn a_home_is_made_of_the_skeleton_once_and_mounted_in_the_desktops_ids() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let (store, image) = store_with_image(dir.path());
        let whose = HomeId::from(DesktopId::new(7).unwrap());
        let home = store.home(&whose, &image).unwrap();
        let profile = fs::symlink_metadata(home.dir().join(".profile")).unwrap();
        assert_eq!((profile.uid(), profile.gid(), profile.mode() & 0o7777), (1000, 1000, 0o755));
        assert_eq!(fs::read_link(home.dir().join("link")).unwrap(), Path::new("/etc/shadow"));
        assert_eq!(fs::metadata(home.dir()).unwrap().mode() & 0o7777, 0o700);
        fs::write(home.dir().join(".profile"), "mine").unwrap();
        let home = store.home(&whose, &image).unwrap();
        assert_eq!(fs::read_to_string(home.dir().join(".profile")).unwrap(), "mine");
        let range = UidRange::of_slot(1).unwrap();
        let before = mounts();
        let mount = home.mount(Some(userns(range).as_fd())).unwrap();
        assert_eq!(mounts(), before);
        assert_eq!(fs::metadata(path(&mount, ".profile")).unwrap().uid(), range.base() + 1000);
        let flags = rustix::fs::fstatvfs(&mount).unwrap().f_flag;
        assert!(
            flags.contains(rustix::fs::StatVfsMountFlags::NOSUID | rustix::fs::StatVfsMountFlags::NODEV),
            "{flags:?}"
        );
        drop(mount);
        assert!(fs::read_dir(dir.path().join("homes")).unwrap().count() == 1);
        store.remove_home(&whose).unwrap();
        store.remove_home(&whose).unwrap();
        assert!(!home.dir().exists());
    });
}

#[test]
fn a_damaged_image_is_named() {
    let needs = [Need::Root];
    privileged(&needs, || {
        let dir = tempfile::tempdir().unwrap();
        let (store, image) = store_with_image(dir.path());
        let images = dir.path().join("images");
        let record = images.join("commits").join(image.digest().hex());
        let sound = fs::read_to_string(&record).unwrap();
        let damages: [(&str, String); 3] = [
            ("EOF", sound.get(..sound.len() / 2).unwrap().to_owned()),
            ("was changed", sound.replace("\"uid\":1000", "\"uid\":1001")),
            ("unknown field", sound.replace("\"content\"", "\"kontent\"")),
        ];
        for (reason, text) in damages {
            assert_ne!(text, sound);
            put(&record, text.as_bytes());
            let error = store.image(image.digest()).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains(&image.digest().hex()), "{error}");
            assert!(store.flavour(tiny().flavour()).is_err());
        }
        put(&record, sound.as_bytes());
        store.verify(image.digest()).unwrap();
        // The content of one file, under the name of its digest.
        let files = || walkdir(&images.join("objects"));
        let object = files().into_iter().find(|file| fs::read(file).unwrap() == b"from the image").unwrap();
        put(&object, b"From the image");
        store.image(image.digest()).unwrap();
        assert!(store.verify(image.digest()).unwrap_err().to_string().contains("changed"));
        put(&object, b"from the image");
        store.verify(image.digest()).unwrap();
        let tree = walkdir(&images.join("trees")).into_iter().find(|file| file.extension().is_some()).unwrap();
        fs::remove_file(tree).unwrap();
        assert!(matches!(store.image(image.digest()), Err(Error::Damaged { .. })));
        // Making it again repairs it.
        let again = store.import(tiny().config().clone(), &mut fill).unwrap();
        again.verify().unwrap();
        store.image(image.digest()).unwrap();
    });
}

/// Replaces a file that nobody may write.
fn put(path: &Path, content: &[u8]) {
    fs::remove_file(path).unwrap();
    fs::write(path, content).unwrap();
}

fn walkdir(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(walkdir(&path)) } else { found.push(path) }
    }
    found
}

#[test]
fn what_roots_stand_on_is_kept() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let (store, one) = store_with_image(dir.path());
        let mut volatile = store.root(&one, &id("1"), RootPolicy::Volatile).unwrap();
        let mount = volatile.mount(None).unwrap();
        let two = store.import(tiny().config().clone(), &mut |tree| fs::write(tree.join("two"), "2")).unwrap();
        drop(store.root(&two, &id("2"), RootPolicy::Persistent).unwrap());
        let three = store.import(tiny().config().clone(), &mut |tree| fs::write(tree.join("three"), "3")).unwrap();
        assert_ne!(two.digest(), three.digest());
        let repository = store.repository();
        // Nothing but the roots needs any of them.
        for tag in ["head", "default"] {
            let (tag, by) = (tag.parse().unwrap(), ("ana", "gone"));
            repository.move_tag(tiny().flavour(), &tag, Expect::Anything, None, by).unwrap();
        }
        let collect = || {
            let keep = Keep { reflog: Duration::ZERO, commits: store.in_use().unwrap() };
            repository.gc(&keep, false).unwrap();
            [&one, &two, &three].map(|image| store.image(image.digest()).is_ok())
        };
        // The second was made from the first.
        assert_eq!(collect(), [true, true, false]);
        assert_eq!(fs::read_to_string(path(&mount, "etc/f")).unwrap(), "from the image");
        store.remove_root(&id("2")).unwrap();
        assert_eq!(collect(), [true, false, false]);
        drop(mount);
        volatile.close().unwrap();
        assert_eq!(collect(), [false; 3]);
        assert_eq!(walkdir(&dir.path().join("images/objects")), Vec::<PathBuf>::new());
    });
}

#[test]
fn what_is_built_again_is_the_same_commit() {
    privileged(&[Need::Root], || {
        let (dir, source) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fill(source.path()).unwrap();
        let mut copy = |tree: &Path| {
            let copied = Command::new("cp").arg("-a").arg(source.path().join(".")).arg(tree).status()?;
            copied.success().then_some(()).ok_or_else(|| io::ErrorKind::Other.into())
        };
        let store = Store::open(dir.path()).unwrap();
        let image = store.import(tiny().config().clone(), &mut copy).unwrap();
        let again = store.import(tiny().config().clone(), &mut copy).unwrap();
        assert_eq!(again.digest(), image.digest());
        let other = store.import(tiny().config().clone(), &mut |tree| fs::write(tree.join("f"), "")).unwrap();
        assert_eq!(other.commit().parents, [CommitId::new(image.digest())]);
        assert_eq!(store.flavour(tiny().flavour()).unwrap().digest(), other.digest());
    });
}

#[test]
fn a_full_disk_is_said_and_nothing_is_left() {
    privileged(&[Need::Root, Need::Namespaces], || {
        let dir = tempfile::tempdir().unwrap();
        let work = || {
            let small = FsContext::open("tmpfs").unwrap();
            small.set("size", "2M").unwrap();
            let small = small.mount(Restrictions::default()).unwrap();
            attach(small.as_fd(), open_dir_path(dir.path()).unwrap().as_fd()).unwrap();
            let store = Store::open(&dir.path().join("store")).unwrap();
            let error = store
                .import(tiny().config().clone(), &mut |tree| fs::write(tree.join("big"), vec![1; 4 << 20]))
                .unwrap_err();
            assert!(matches!(error, Error::NoSpace { .. }), "{error}");
            assert!(!error.to_string().contains('\n'), "{error}");
            for made in ["images/objects", "images/commits", "images/incoming", "making"] {
                assert_eq!(fs::read_dir(dir.path().join("store").join(made)).unwrap().count(), 0, "{made}");
            }
            for _ in 0..2000 {
                if fs::read_dir(dir.path().join("store/trash")).unwrap().next().is_none() {
                    break;
                }
                thread::park_timeout(Duration::from_millis(5));
            }
            store.import(tiny().config().clone(), &mut fill).unwrap();
        };
        in_private_namespace(work).unwrap();
    });
}

#[test]
fn one_process_has_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let error = Store::open(dir.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains(dir.path().to_str().unwrap()), "{error}");
    drop(store);
    Store::open(dir.path()).unwrap();
}

#[test]
fn what_a_killed_build_left_is_swept() {
    let dir = tempfile::tempdir().unwrap();
    drop(Store::open(dir.path()).unwrap());
    fs::create_dir_all(dir.path().join("making/tmp-x/tree/etc")).unwrap();
    fs::create_dir_all(dir.path().join("homes/.new-x")).unwrap();
    let _store = Store::open(dir.path()).unwrap();
    assert!(!dir.path().join("making/tmp-x").exists());
    assert!(!dir.path().join("homes/.new-x").exists());
}

#[test]
fn what_is_not_there_is_not_found() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.flavour(tiny().flavour()).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(store.image(tiny().key()).unwrap_err().kind(), ErrorKind::NotFound);
    assert!(store.flavours().unwrap().is_empty());
}

/// A mirror without a network: one package that nobody asks for.
fn mirror(dir: &Path) -> String {
    use sha2::{Digest, Sha256};
    let packages = "Package: other\nVersion: 1\nArchitecture: all\nFilename: other.deb\nSize: 1\n\
                    SHA256: 0000000000000000000000000000000000000000000000000000000000000000\n\n";
    let architecture = Command::new("dpkg").arg("--print-architecture").output().unwrap().stdout;
    let architecture = String::from_utf8(architecture).unwrap();
    let index = format!("main/binary-{}/Packages", architecture.trim());
    let suite = dir.join("dists/bookworm");
    fs::create_dir_all(suite.join(&index).parent().unwrap()).unwrap();
    fs::write(suite.join(&index), packages).unwrap();
    let sum: String = Sha256::digest(packages).iter().map(|byte| format!("{byte:02x}")).collect();
    let release = format!(
        "Suite: bookworm\nCodename: bookworm\nComponents: main\nArchitectures: {}\nSHA256:\n {sum} {} {index}\n",
        architecture.trim(),
        packages.len(),
    );
    fs::write(suite.join("Release"), release).unwrap();
    format!("[trusted=yes] file://{}", dir.display())
}

#[test]
fn a_package_that_does_not_exist_is_named_and_nothing_is_left() {
    privileged(&[Need::Root, Need::Program("mmdebstrap")], || {
        let (dir, repository) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let before = mounts();
        let store = Store::open(dir.path()).unwrap();
        let text = "name = \"tiny\"\npackages = [\"no-such-package-at-all\"]\n\
                    base = { distribution = \"debian\", suite = \"bookworm\" }\n\
                    user = { name = \"user\", uid = 1000, gid = 1000 }\n";
        let options = BuildOptions { mirror: Some(mirror(repository.path())), ..BuildOptions::default() };
        let mut said = Vec::new();
        let error =
            store.build(&Recipe::parse(text).unwrap(), &options, &mut |line| said.push(line.to_owned())).unwrap_err();
        assert!(
            matches!(&error, Error::NoSuchPackage { package, .. } if package == "no-such-package-at-all"),
            "{error}: {said:?}"
        );
        assert_eq!(fs::read_dir(dir.path().join("making")).unwrap().count(), 0);
        assert!(store.flavours().unwrap().is_empty());
        assert_eq!(mounts(), before);
    });
}

/// Does something while a byte of a file is another.
fn change(path: &Path, f: impl FnOnce()) {
    use std::os::unix::fs::FileExt as _;
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 2000).unwrap();
    file.write_all_at(&[!byte[0]], 2000).unwrap();
    f();
    file.write_all_at(&byte, 2000).unwrap();
}

/// What machines are given: made once, found again, and gone with their image.
#[test]
fn machines_share_a_base_and_have_disks_of_their_own() {
    privileged(&[Need::Root, Need::Filesystem("overlay"), Need::Filesystem("erofs")], || {
        let dir = tempfile::tempdir().unwrap();
        let (store, image) = store_with_image(dir.path());
        let desktop = DesktopId::new(7).unwrap();
        let base = store.guest_base(&image).unwrap();
        assert!(qvd_storage::is_guest_base(&base.path).unwrap());
        assert_eq!(base.size.get() % (2 << 20), 0);
        let made = fs::metadata(&base.path).unwrap().ino();
        assert_eq!(store.guest_base(&image).unwrap(), base);
        assert_eq!(fs::metadata(&base.path).unwrap().ino(), made, "it is made once");
        // What was changed is refused, though it is as long as it was.
        change(&base.path, || {
            let error = store.guest_base(&image).unwrap_err().to_string();
            assert!(error.contains(&base.path.display().to_string()) && error.contains("was changed"), "{error}");
        });
        assert_eq!(store.guest_base(&image).unwrap(), base);

        let size = qvd_core::Bytes::mib(100);
        let mut root = store.guest_root(&image, desktop, RootPolicy::Volatile, size).unwrap();
        let device = root.attach().unwrap();
        assert_eq!(device.size, size);
        let behind = device.backing.expect("an empty file system is behind it");
        let said = Command::new("e2fsck").args(["-f", "-n"]).arg(behind.path()).output().unwrap();
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stdout));
        assert!(fs::metadata(&device.path).unwrap().blocks() * 512 < 1 << 20, "an empty disk takes next to nothing");
        // A root in use keeps its image.
        assert_eq!(store.in_use().unwrap(), [CommitId::new(image.digest())]);
        let home = store.guest_home(desktop, size).unwrap();
        let kept = home.attach().unwrap().path;
        drop(home);
        // It has the size that it was made with.
        assert_eq!(store.guest_home(desktop, qvd_core::Bytes::mib(200)).unwrap().attach().unwrap().size, size);
        change(behind.path(), || {
            let error = store.guest_home(desktop, size).unwrap_err().to_string();
            assert!(error.contains(&behind.path().display().to_string()), "{error}");
        });
        drop(store.guest_home(desktop, size).unwrap());
        root.close().unwrap();
        assert!(!device.path.exists() && kept.exists());
        assert_eq!(store.in_use().unwrap(), []);

        // A killed node leaves a volatile one; the next sweeps it, and no home.
        drop(store.guest_root(&image, desktop, RootPolicy::Volatile, size).unwrap());
        store.sweep_volatile(&[desktop]).unwrap();
        assert!(device.path.exists());
        store.sweep_volatile(&[]).unwrap();
        assert!(!device.path.exists() && kept.exists());
        store.remove_guest_root(desktop).unwrap();
        store.remove_guest_home(desktop).unwrap();
        store.remove_guest_home(desktop).unwrap();
        assert!(!kept.exists());

        // A base goes when its image has gone.
        for tag in ["head", "default"] {
            let (flavour, tag) = (tiny().flavour().clone(), tag.parse().unwrap());
            store.repository().move_tag(&flavour, &tag, Expect::Anything, None, ("ana", "gone")).unwrap();
        }
        store.repository().gc(&Keep { reflog: Duration::ZERO, commits: Vec::new() }, false).unwrap();
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        assert!(!base.path.exists() && store.image(image.digest()).is_err());
        let left: Vec<_> = fs::read_dir(base.path.parent().unwrap()).unwrap().map(|f| f.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| name.to_string_lossy().starts_with("blank-")), "{left:?}");
    });
}

/// A path that only a descriptor leads to would be another one for `mkfs.erofs`.
#[test]
fn a_base_is_made_of_what_was_named_or_not_at_all() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let (_store, image) = store_with_image(dir.path());
        let tree = image.base().open().unwrap();
        let by_number = format!("/proc/self/fd/{}", tree.as_raw_fd());
        let error = qvd_storage::make_guest_base(by_number.as_ref(), &dir.path().join("base")).unwrap_err();
        assert!(qvd_core::causes(&error).join(": ").contains("no path leads to it"), "{error}");
        assert!(!dir.path().join("base").exists());
    });
}
