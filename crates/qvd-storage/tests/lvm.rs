//! Roots and disks as thin volumes of LVM, in the test bed, whose kernel has a
//! device mapper.
#![allow(clippy::unwrap_used)]

mod scratch;

use std::{
    fs::{self, File},
    io::Write,
    os::{fd::AsFd, unix::fs::FileExt, unix::fs::MetadataExt},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use qvd_core::{Bytes, RootPolicy};
use qvd_storage::{
    BaseDisk, BaseTree, Capability, DiskBackend, DiskBackends, DiskCapability, DiskFormat, DiskId, DiskOptions, Error,
    ErrorKind, Lvm, LvmDisks, Place, Quota, RootBackend, RootOptions, conformance::Suite,
};
use qvd_testkit::{Bed, in_bed};
use scratch::{base, id, kept, path, read, userns, volatile};

/// Emulated, each of LVM's commands takes a second.
const LIMIT: Duration = Duration::from_secs(170);

/// How a command that has to succeed ends.
fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn lvm(args: &[&str]) -> String {
    // The bed has no udev.
    run("lvm", &[args, &["--config", "activation {udev_sync=0 udev_rules=0} backup {archive=0 backup=0}"]].concat())
}

/// A pool of `mib` on the first disk, and a file system for places on the second.
fn set_up(mib: u32) {
    for module in ["dm-thin-pool", "dm-snapshot", "ext4"] {
        run("/run/busybox", &["modprobe", module]);
    }
    lvm(&["pvcreate", "-q", "/dev/vda"]);
    lvm(&["vgcreate", "-q", "qvd-test", "/dev/vda"]);
    lvm(&["lvcreate", "-q", "-y", "-L", &format!("{mib}M"), "-T", "qvd-test/pool"]);
    run("mkfs.ext4", &["-q", "/dev/vdb"]);
    fs::create_dir("/run/at").unwrap();
    run("mount", &["/dev/vdb", "/run/at"]);
}

fn give_pool() {
    lvm(&["lvchange", "-q", "--addtag", "qvd", "qvd-test/pool"]);
    lvm(&["lvchange", "-q", "--errorwhenfull", "y", "qvd-test/pool"]);
}

/// The volumes that there are, bases left out.
fn volumes() -> Vec<String> {
    let listed = lvm(&["lvs", "--noheadings", "-o", "lv_name"]);
    let names = listed.lines().map(|line| line.trim().to_owned());
    names.filter(|name| name != "pool" && !name.starts_with("qvd.tree.") && !name.starts_with("qvd.disk.")).collect()
}

fn missing(backend: &Lvm) -> String {
    format!("{:?}", backend.capabilities().unwrap().get(Capability::Roots))
}

#[test]
fn roots_are_snapshots_and_outlive_who_made_them() {
    in_bed(&Bed::new().memory_mib(1024).disk_mib(400).disk_mib(128).limit(LIMIT), || {
        set_up(256);
        let at = Path::new("/run/at");
        let place = Place::open(&at.join("store")).unwrap();
        let backend = Lvm::new(place.clone());
        assert!(missing(&backend).contains("lvchange --addtag qvd"), "{}", missing(&backend));
        lvm(&["lvchange", "-q", "--addtag", "qvd", "qvd-test/pool"]);
        assert!(missing(&backend).contains("--errorwhenfull y qvd-test/pool"), "{}", missing(&backend));
        give_pool();

        let capabilities = backend.capabilities().unwrap();
        for capability in [Capability::Roots, Capability::IdMapped, Capability::QuotaBytes, Capability::Snapshots] {
            assert!(capabilities.get(capability).is_yes(), "{capabilities:?}");
        }
        let base = base(at);
        roots(at, &base, &backend);
        what_a_killed_process_left(at, &base);
        place.finish_discarding().unwrap();
        assert_eq!(volumes(), Vec::<String>::new());
    });
}

fn roots(at: &Path, base: &BaseTree, backend: &Lvm) {
    let mut one = backend.create(base, &id("one_a-b"), &kept()).unwrap();
    let userns = userns();
    let mapped = one.mount(Some(userns.as_fd())).unwrap();
    assert_eq!(fs::metadata(path(&mapped, "home/mine")).unwrap().uid(), qvd_core::UidRange::FIRST + 1000);
    drop(mapped);
    let mine = one.mount(None).unwrap();
    fs::write(path(&mine, "etc/new"), "kept").unwrap();
    let names: Vec<_> = fs::read_dir(path(&mine, ".")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 4, "nothing but the image's files is seen: {names:?}");
    for refused in [backend.remove(&id("one_a-b")), one.mount(None).map(drop)] {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Busy);
    }
    drop(mine);
    one.close().unwrap();
    // As after a restart of the host: not active.
    let volume = fs::read_link(at.join("store/roots/one_a-b/volume")).unwrap();
    lvm(&["lvchange", "-q", "-an", volume.to_str().unwrap()]);
    let again = backend.create(base, &id("one_a-b"), &kept()).unwrap();
    assert_eq!(read(&again.mount(None).unwrap(), "etc/new"), "kept");
    let limited = RootOptions { quota: Quota { bytes: Some(Bytes::mib(8)), inodes: None }, ..kept() };
    assert_eq!(backend.create(base, &id("one_a-b"), &limited).unwrap_err().kind(), ErrorKind::Unsupported);
    backend.remove(&id("one_a-b")).unwrap();
    assert_eq!(backend.roots().unwrap(), []);
}

/// A process that was killed while it made a root, and while it removed one.
fn what_a_killed_process_left(at: &Path, base: &BaseTree) {
    let store = at.join("killed");
    let name = {
        let place = Place::open(&store).unwrap();
        let root = Lvm::new(place.clone()).create(base, &id("one"), &volatile()).unwrap();
        drop(root);
        place.finish_discarding().unwrap();
        let volume = fs::read_link(store.join("roots/one/volume")).unwrap();
        volume.to_str().unwrap().rsplit_once('/').unwrap().1.to_owned()
    };
    assert!(volumes().contains(&name));
    // It had not given it its name yet.
    fs::rename(store.join("roots/one"), store.join(format!("roots/.lv:qvd-test:{name}"))).unwrap();
    // A device that a killed command left suspended hangs whoever opens it.
    run("dmsetup", &["suspend", &format!("qvd--test-{name}")]);
    let place = Place::open(&store).unwrap();
    place.finish_discarding().unwrap();
    assert!(!volumes().contains(&name));
    assert_eq!(fs::read_dir(store.join("trash")).unwrap().count(), 0);
}

fn disks(at: &Path) {
    let file = at.join("base.raw");
    let raw = File::create(&file).unwrap();
    raw.set_len(10 << 20).unwrap();
    raw.write_all_at(b"from the image", 5 << 20).unwrap();
    let digest = format!("sha256:{}", "8".repeat(64)).parse().unwrap();
    let base = BaseDisk::new(digest, &file, DiskFormat::Raw);
    let place = Place::for_disks(&at.join("vms")).unwrap();
    let backend = DiskBackends::built_in().make("lvm", place.clone()).unwrap();
    assert!(backend.capabilities().unwrap().get(DiskCapability::Resize).is_yes());
    let name: DiskId = "7".parse().unwrap();
    let options = DiskOptions { policy: RootPolicy::Persistent, size: Some(Bytes::mib(20)) };
    let disk = backend.create(&base, &name, &options).unwrap();
    let device = disk.attach().unwrap();
    assert_eq!((device.format, device.size), (DiskFormat::Raw, Bytes::mib(20)));
    let mut text = [0; 14];
    {
        let open = File::options().read(true).write(true).open(&device.path).unwrap();
        open.read_exact_at(&mut text, 5 << 20).unwrap();
        assert_eq!(&text, b"from the image");
        open.write_all_at(b"from a machine", 5 << 20).unwrap();
        open.sync_all().unwrap();
        for refused in [disk.attach().map(drop), backend.remove(&name)] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Busy);
        }
    }
    let report = disk.check().unwrap();
    assert_eq!((report.size, report.errors), (Bytes::mib(20), 0));
    assert!((1..=Bytes::mib(1).get()).contains(&report.used.get()), "{report:?}");
    disk.resize(Bytes::mib(24)).unwrap();
    assert_eq!(disk.resize(Bytes::mib(4)).unwrap_err().kind(), ErrorKind::Unsupported);
    drop(disk);
    let again = LvmDisks::new(place.clone()).create(&base, &name, &options).unwrap();
    let device = again.attach().unwrap();
    assert_eq!(device.size, Bytes::mib(24));
    File::open(&device.path).unwrap().read_exact_at(&mut text, 5 << 20).unwrap();
    assert_eq!(&text, b"from a machine");
    // Whole blocks of the pool are given back, and the rest of a range is zeros too.
    File::options().write(true).open(&device.path).unwrap().write_all_at(&[7; 4 << 20], 8 << 20).unwrap();
    let before = again.check().unwrap().used;
    let (at, length) = ((8 << 20) + 4096, (4 << 20) - 8192);
    again.discard(Bytes::new(at), Bytes::new(length)).unwrap();
    let after = again.check().unwrap().used;
    assert!(before.get() - after.get() >= 3 << 20, "{before} and then {after}");
    let mut shown = vec![0; 4 << 20];
    File::open(&device.path).unwrap().read_exact_at(&mut shown, 8 << 20).unwrap();
    let expected = [[7; 4096].as_slice(), &vec![0; (4 << 20) - 8192], &[7; 4096]].concat();
    assert!(shown == expected, "{:?}", shown.iter().zip(&expected).position(|(one, other)| one != other));
    let beyond = again.discard(Bytes::mib(23), Bytes::mib(2)).unwrap_err();
    assert!(beyond.to_string().contains("disk 7 has"), "{beyond}");
    // Another one stands on the image.
    let mut other = backend.create(&base, &"8".parse().unwrap(), &RootPolicy::Volatile.into()).unwrap();
    File::open(other.attach().unwrap().path).unwrap().read_exact_at(&mut text, 5 << 20).unwrap();
    assert_eq!(&text, b"from the image");
    other.close().unwrap();
    backend.remove(&name).unwrap();
    assert_eq!(backend.disks().unwrap(), []);
    place.finish_discarding().unwrap();
}

/// One root takes all of the pool: it is refused, the others keep what they
/// have, nothing new is made, and room that is given back is used again.
fn full(at: &Path, base: &BaseTree, backend: &Lvm) {
    let mut neighbour = backend.create(base, &id("neighbour"), &kept()).unwrap();
    let tree = neighbour.mount(None).unwrap();
    fs::write(path(&tree, "etc/mine"), "kept").unwrap();
    // All of it, also what ext4 would write back from its journal later: it may lose that on a full pool.
    rustix::fs::syncfs(File::open(path(&tree, "etc/mine")).unwrap()).unwrap();
    neighbour.check().unwrap();
    let mut greedy = backend.create(base, &id("greedy"), &volatile()).unwrap();
    let taken = greedy.mount(None).unwrap();
    let (mut big, chunk) = (File::create(path(&taken, "var/lib/big")).unwrap(), vec![1; 4 << 20]);
    let refused = (0..64).find_map(|_| big.write_all(&chunk).and_then(|()| big.sync_all()).err()).unwrap();
    drop(big);
    // ENOSPC, or what the file system makes of it: EIO, EROFS.
    assert!(matches!(refused.raw_os_error(), Some(28 | 5 | 30)), "{refused}");
    for said in [neighbour.check(), backend.create(base, &id("third"), &volatile()).map(drop)] {
        let error = said.unwrap_err();
        assert!(matches!(error, Error::PoolFull { .. }), "{error}");
        assert!(error.to_string().contains("thin pool qvd-test/pool"), "{error}");
    }
    assert_eq!(read(&tree, "etc/mine"), "kept");
    assert_eq!(read(&tree, "etc/f"), "from the image");
    drop(taken);
    // The kernel writes back what it cannot, and holds the device as long as it tries:
    // whoever closes a root tries again, as after any error.
    let deadline = Instant::now() + Duration::from_secs(60);
    while let Err(error) = greedy.close() {
        assert!(matches!(error, Error::RootBusy(_)) && Instant::now() < deadline, "{error}");
    }
    let place = Place::open(&at.join("store")).unwrap();
    place.finish_discarding().unwrap();
    neighbour.check().unwrap();
    drop(tree);
    neighbour.close().unwrap();
    let again = backend.create(base, &id("neighbour"), &kept()).unwrap();
    let tree = again.mount(None).unwrap();
    assert_eq!(read(&tree, "etc/mine"), "kept");
    fs::write(path(&tree, "etc/more"), vec![1; 1 << 20]).unwrap();
    File::open(path(&tree, "etc/more")).unwrap().sync_all().unwrap();
    drop(tree);
    backend.remove(&id("neighbour")).unwrap();
}

#[test]
fn disks_are_snapshots_and_a_full_pool_is_said() {
    in_bed(&Bed::new().memory_mib(1024).disk_mib(300).disk_mib(128).limit(LIMIT), || {
        set_up(96);
        give_pool();
        let at = Path::new("/run/at");
        disks(at);
        full(at, &base(at), &Lvm::new(Place::open(&at.join("store")).unwrap()));
    });
}

/// Runs a suite on a pool in the bed, and shows what it says.
fn suite(limit: Duration, only: &[&str]) {
    in_bed(&Bed::new().memory_mib(1536).disk_mib(1200).disk_mib(256).limit(limit), || {
        set_up(1024);
        give_pool();
        let began = Instant::now();
        let suite = Suite::new("lvm", |place| Ok(Box::new(Lvm::new(place))))
            .patience(Duration::from_secs(300))
            .watch(move |case| fs::write("/dev/console", format!("{} s {case}\n", began.elapsed().as_secs())).unwrap());
        let report = only.iter().fold(suite, |suite, only| suite.only(*only)).run(Path::new("/run/at")).unwrap();
        assert!(report.passed(), "{report}");
        let left = volumes();
        assert!(left.is_empty(), "{left:?}");
    });
}

/// Those in which roots of a volume could differ from others: the rest is what
/// ext4 does. All of them: `the_whole_suite`.
#[test]
fn the_suite_in_part() {
    let only = ["use-is-noticed", "snapshots", "limit-in-bytes", "kept-roots-survive", "bases-are-forgotten"];
    suite(Duration::from_secs(300), &[&only[..], &["base-unchanged"]].concat());
}

/// Those that take most of the time: twenty crashes of each piece of work.
#[test]
#[ignore = "takes a quarter of an hour and more"]
fn the_crashes_of_the_suite() {
    suite(Duration::from_secs(60 * 60), &["crash-", "leaks", "base-unchanged"]);
}

/// Each of its some five hundred commands takes a second or more in the bed: for
/// `cargo nextest run -p qvd-storage --test lvm --run-ignored all`.
#[test]
#[ignore = "takes a quarter of an hour and more"]
fn the_whole_suite() {
    suite(Duration::from_secs(100 * 60), &[]);
}
