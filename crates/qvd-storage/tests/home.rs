//! Homes as a user finds them: in a directory or a file system of their own,
//! limited, made whole or not at all.
#![allow(clippy::unwrap_used, clippy::panic)]

mod scratch;

use std::{
    fs, io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::Path,
    time::{Duration, Instant},
};

use qvd_core::{Bytes, DesktopId, UidRange};
use qvd_storage::{ErrorKind, Home, HomeId, HomeKind, HomeOptions, Image, Quota, Recipe, Store};
use qvd_sys::process::traced::{self, Counted, End};
use qvd_testkit::{Census, Need, Scope, privileged};
use scratch::{TINY, path, tiny};

const NEEDS: &[Need] = &[Need::Root, Need::UserNamespaces, Need::Program("mkfs.ext4")];
const LIMIT: Duration = Duration::from_secs(60);

fn fill(tree: &Path) -> io::Result<()> {
    fs::create_dir_all(tree.join("etc/skel"))?;
    fs::create_dir_all(tree.join("usr"))?;
    fs::write(tree.join("etc/skel/.profile"), "umask 077")
}

fn store(dir: &Path) -> (Store, Image) {
    let store = Store::open(&dir.join("store")).unwrap();
    let image = store.import(tiny().config().clone(), &mut fill).unwrap();
    (store, image)
}

fn whose() -> HomeId {
    HomeId::from(DesktopId::new(7).unwrap())
}

fn looped(mib: u64) -> HomeOptions {
    HomeOptions { kind: HomeKind::Loop, quota: Quota { bytes: Some(Bytes::mib(mib)), inodes: Some(64) } }
}

#[test]
fn a_home_with_a_file_system_of_its_own_is_kept_and_cannot_hold_more_than_it_may() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let census = Census::take(&Scope::marked([dir.path().file_name().unwrap().to_str().unwrap()]));
        let (store, image) = store(dir.path());
        let home = store.home_with(&whose(), &image, &looped(16)).unwrap();
        let range = UidRange::of_slot(1).unwrap();
        let userns = qvd_sys::userns::create(range.base(), UidRange::LEN).unwrap();
        let mount = home.mount(Some(userns.as_fd())).unwrap();
        let profile = fs::metadata(path(&mount, ".profile")).unwrap();
        assert_eq!(profile.uid(), range.base() + 1000);
        assert_eq!(fs::metadata(path(&mount, "")).unwrap().mode() & 0o7777, 0o700);
        assert_eq!(fs::read_dir(path(&mount, "")).unwrap().count(), 1, "only what the skeleton has");
        let flags = rustix::fs::fstatvfs(&mount).unwrap().f_flag;
        assert!(flags.contains(rustix::fs::StatVfsMountFlags::NOSUID | rustix::fs::StatVfsMountFlags::NODEV));
        // In use it is neither mounted twice nor removed.
        for refused in [home.mount(None).map(drop), store.remove_home(&whose())] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Busy);
        }
        drop((mount, userns));

        let mount = home.mount(None).unwrap();
        let error = fs::write(path(&mount, "much"), vec![1; 20 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
        fs::remove_file(path(&mount, "much")).unwrap();
        fs::create_dir(path(&mount, "many")).unwrap();
        let many = (0..400).find_map(|number| fs::write(path(&mount, &format!("many/{number}")), "").err());
        assert_eq!(many.map(|error| error.kind()), Some(io::ErrorKind::StorageFull));
        drop(mount);
        assert!(fs::metadata(home.dir()).unwrap().blocks() * 512 < 17 << 20);

        // It is there again as it was, and of its size alone.
        let home = store.home_with(&whose(), &image, &looped(16)).unwrap();
        let mount = home.mount(None).unwrap();
        assert!(path(&mount, "many/0").exists());
        drop(mount);
        for other in [looped(32), looped(1)] {
            let error = store.home_with(&whose(), &image, &other).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        }
        // Whoever makes new ones in another way finds it of its kind.
        let same = store.home(&whose(), &image).unwrap();
        assert_eq!((same.kind(), same.dir()), (HomeKind::Loop, home.dir()));
        let mount = same.mount(None).unwrap();
        assert!(path(&mount, "many/0").exists());
        drop(mount);
        let new = HomeId::from(DesktopId::new(8).unwrap());
        assert_eq!(store.home(&new, &image).unwrap().kind(), HomeKind::Directory);
        assert_eq!(store.home_with(&new, &image, &looped(16)).unwrap().kind(), HomeKind::Directory);
        store.remove_home(&new).unwrap();
        store.remove_home(&whose()).unwrap();
        store.remove_home(&whose()).unwrap();
        store.empty_trash().unwrap();
        assert!(!home.dir().exists());
        drop(store);
        fs::remove_dir_all(dir.path().join("store")).unwrap();
        census.assert_unchanged();
    });
}

/// On a home of which not all is known to be on disk: the boot that made it.
const FRESH: &str = "trusted.qvd.fresh";

/// Waits until all of a home is known to be on disk.
fn settled(home: &Path) {
    let fresh = || rustix::fs::getxattr(home, FRESH, &mut [0_u8; 64]).is_ok();
    let began = Instant::now();
    while fresh() {
        assert!(began.elapsed() < LIMIT, "it stays fresh");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_new_home_cut_short_by_a_power_failure_gets_its_skeleton_again_and_keeps_what_its_user_made() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let mut skeleton = |tree: &Path| {
            fill(tree)?;
            fs::create_dir_all(tree.join("etc/skel/.config/empty"))?;
            for name in [".cut", ".gone", ".own", ".odd", ".config/deep"] {
                fs::write(tree.join("etc/skel").join(name), "as in the skeleton")?;
            }
            std::os::unix::fs::symlink(".cut", tree.join("etc/skel/.link"))
        };
        let image = store.import(tiny().config().clone(), &mut skeleton).unwrap();
        let home = store.home(&whose(), &image).unwrap().dir().to_path_buf();
        settled(&home);
        let tell = |when: &str| rustix::fs::setxattr(&home, FRESH, when.as_bytes(), rustix::fs::XattrFlags::empty());
        let damage = || {
            fs::write(home.join(".cut"), "as in").unwrap();
            fs::write(home.join(".config/deep"), "").unwrap();
            fs::remove_file(home.join(".gone")).unwrap();
            fs::remove_file(home.join(".link")).unwrap();
            fs::remove_dir(home.join(".config/empty")).unwrap();
        };
        // What a desktop's user may have made of it meanwhile.
        fs::write(home.join(".own"), "mine").unwrap();
        fs::remove_file(home.join(".odd")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, home.join(".odd"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();

        // In the same boot nothing was lost: the user did it.
        damage();
        tell(&qvd_sys::process::boot_id().unwrap()).unwrap();
        store.home(&whose(), &image).unwrap();
        settled(&home);
        assert_eq!(fs::read_to_string(home.join(".cut")).unwrap(), "as in");
        assert!(!home.join(".gone").exists());

        tell("of another boot").unwrap();
        store.home(&whose(), &image).unwrap();
        for name in [".cut", ".gone", ".link", ".config/deep"] {
            assert_eq!(fs::read_to_string(home.join(name)).unwrap(), "as in the skeleton", "{name}");
            assert_eq!(fs::symlink_metadata(home.join(name)).unwrap().uid(), 1000, "{name}");
        }
        assert!(home.join(".config/empty").is_dir());
        assert_eq!(fs::read_to_string(home.join(".own")).unwrap(), "mine");
        assert_eq!(fs::symlink_metadata(home.join(".odd")).unwrap().mode() >> 12, 0o1, "a fifo");
        settled(&home);
        // Once it is settled, it is the user's alone.
        damage();
        store.home(&whose(), &image).unwrap();
        assert!(!home.join(".gone").exists());
        // Where nobody can wait for it, it is on disk when it is there.
        let other = dir.path().join("other");
        Home::open(&other, &image).unwrap();
        assert!(rustix::fs::getxattr(&other, FRESH, &mut [0_u8; 64]).is_err());
    });
}

#[test]
fn a_recipe_says_how_homes_are_kept() {
    let text = |more: &str| format!("{TINY}{more}");
    let said = "[defaults.home]\nkind = \"loop\"\nquota = { bytes = 16777216, inodes = 64 }\n";
    assert_eq!(Recipe::parse(&text(said)).unwrap().config().defaults.home, looped(16));
    assert!(Recipe::parse(&text("")).unwrap().config().defaults.home.is_plain());
    assert!(Recipe::parse(&text("[defaults.home]\nkind = \"other\"\n")).is_err());
}

#[test]
fn a_limit_that_would_not_hold_is_refused_and_so_are_ids_that_cannot_be_shifted() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let (store, image) = store(dir.path());
        store.home(&whose(), &image).unwrap();
        let limited = HomeOptions { kind: HomeKind::Directory, ..looped(16) };
        let error = store.home_with(&whose(), &image, &limited).unwrap_err();
        assert!(error.to_string().contains("made without"), "{error}");
        let other = HomeId::from(DesktopId::new(8).unwrap());
        match store.home_with(&other, &image, &limited) {
            // Where projects are counted, it holds.
            Ok(_) => assert!(store.home_with(&other, &image, &limited).is_ok()),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
                assert_eq!(fs::read_dir(dir.path().join("store/homes")).unwrap().count(), 1, "nothing half made");
            }
        }
        // A file system without id-mapped mounts, as those of networks are.
        let home = Home::open(Path::new("/sys/kernel"), &image).unwrap();
        let userns = qvd_sys::userns::create(UidRange::of_slot(1).unwrap().base(), UidRange::LEN).unwrap();
        let error = home.mount(Some(userns.as_fd())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("id-mapped mounts"), "{error}");
    });
}

#[test]
fn killed_at_any_call_a_home_is_there_whole_or_not_at_all() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let digest = store(dir.path()).1.digest();
        for kind in [HomeKind::Directory, HomeKind::Loop] {
            let options = if kind == HomeKind::Loop { looped(8) } else { HomeOptions::default() };
            for after in 1.. {
                let at = dir.path().to_path_buf();
                let run = traced::run(Some(after), Counted::Lasting, LIMIT, move || {
                    let store = Store::open(&at.join("store")).unwrap();
                    let image = store.image(digest).unwrap();
                    store.home_with(&whose(), &image, &options).unwrap();
                    0
                });
                let end = run.unwrap().end;
                let store = Store::open(&dir.path().join("store")).unwrap();
                for kind in ["homes", "home-disks"] {
                    let left = fs::read_dir(dir.path().join("store").join(kind)).map_or(0, |names| {
                        names.flatten().filter(|name| name.file_name().to_string_lossy().starts_with(".new-")).count()
                    });
                    assert_eq!(left, 0, "after call {after} ({end:?})");
                }
                let image = store.image(digest).unwrap();
                let home = store.home_with(&whose(), &image, &options).unwrap();
                let mount = home.mount(None).unwrap();
                assert_eq!(fs::read_to_string(path(&mount, ".profile")).unwrap(), "umask 077", "{after} ({end:?})");
                drop(mount);
                store.remove_home(&whose()).unwrap();
                store.empty_trash().unwrap();
                match end {
                    End::Killed(_) => {}
                    End::Returned(0) => {
                        assert!(after > 10, "{after} calls");
                        break;
                    }
                    other => panic!("after call {after}: {other:?}"),
                }
            }
        }
    });
}
