//! Disks in qcow2 files, written, committed, put on other files, made larger
//! and checked in process: as a plain array of bytes would be, and as QEMU sees it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod qemu;

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};

use proptest::{
    prelude::{Just, Strategy, any, prop_oneof},
    test_runner::{Config, TestRunner},
};
use qemu::{Holder, check_file, img};
use qvd_core::Bytes;
use qvd_storage::{
    Device, DiskFormat, Error, ErrorKind,
    qcow2::{self, BackingPolicy, Chain, Rebase, Repair, Shrink, Writer},
};
use qvd_sys::process::traced::{self, Counted, End};
use qvd_testkit::{Need, privileged};

const NEEDS: &[Need] = &[Need::Program("qemu-img"), Need::Program("qemu-io")];
const LIMIT: Duration = Duration::from_secs(60);
const QCOW2: DiskFormat = DiskFormat::Qcow2;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn policy(dir: &Path) -> BackingPolicy {
    BackingPolicy::nothing().with_dir(dir).unwrap()
}

fn content(path: &Path, policy: &BackingPolicy) -> Vec<u8> {
    let mut chain = Chain::open(path, QCOW2, policy).unwrap();
    let mut bytes = vec![0; chain.size() as usize];
    chain.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn same(one: &Path, other: &Path, format: &str) {
    img(&["compare", "-f", "qcow2", "-F", format, text(one), text(other)]);
}

/// A raw base, a qcow2 file on it, and a disk on that, made by QEMU's program.
struct World {
    dir: tempfile::TempDir,
    policy: BackingPolicy,
}

impl World {
    fn new(clusters: &str, compat: &str, bytes: u64) -> Self {
        // In memory: this is about the order of calls, and each waits for storage.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let world = Self { policy: policy(dir.path()), dir };
        let base = File::create(world.at("base")).unwrap();
        base.set_len(bytes).unwrap();
        base.write_all_at(&[1; 70_000], 0).unwrap();
        base.write_all_at(&[2; 5000], bytes / 2).unwrap();
        let options = format!("cluster_size={clusters},compat={compat}");
        for (name, behind, format) in [("middle", "base", "raw"), ("disk", "middle", "qcow2")] {
            let behind = world.at(behind);
            let path = world.at(name);
            img(&["create", "-q", "-f", "qcow2", "-o", &options, "-F", format, "-b", text(&behind), text(&path)]);
        }
        world
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, parts: &[(u64, usize, u8)]) {
        let mut writer = Writer::open(&self.at(name), &self.policy).unwrap();
        for (at, length, byte) in parts {
            writer.write_at(&vec![*byte; *length], *at).unwrap();
        }
        writer.finish().unwrap();
    }

    fn sound(&self) {
        for name in ["middle", "disk"] {
            assert_eq!(check_file(&self.at(name)), (0, 0), "{name}");
            let report = qcow2::check(&self.at(name), Repair::Nothing).unwrap();
            assert_eq!((report.errors, report.leaks), (0, 0), "{name}: {report:?}");
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, usize, u8),
    Discard(u64, u64),
    Commit,
    Flatten,
    OnBase,
    Resize(u64),
}

fn steps(bytes: u64) -> impl Strategy<Value = Vec<Step>> {
    let place = 0..bytes;
    let step = prop_oneof![
        6 => (place.clone(), 1..200_000_usize, any::<u8>()).prop_map(|(at, length, byte)| Step::Write(at, length, byte)),
        3 => (place, 1..400_000_u64).prop_map(|(at, length)| Step::Discard(at, length)),
        2 => Just(Step::Commit),
        1 => Just(Step::Flatten),
        1 => Just(Step::OnBase),
        1 => (1..2000_u64).prop_map(|sectors| Step::Resize(sectors * 512)),
    ];
    proptest::collection::vec(step, 1..9)
}

/// Does the same to the disk and to an array.
fn apply(world: &World, model: &mut Vec<u8>, step: &Step) {
    let disk = world.at("disk");
    let within = |at: u64, length: u64| {
        (at.min(model.len() as u64), length.min(model.len() as u64 - at.min(model.len() as u64)))
    };
    match *step {
        Step::Write(at, length, byte) => {
            let (at, length) = within(at, length as u64);
            world.write("disk", &[(at, length as usize, byte)]);
            model[at as usize..(at + length) as usize].fill(byte);
        }
        Step::Discard(at, length) => {
            let (at, length) = within(at, length);
            let mut writer = Writer::open(&disk, &world.policy).unwrap();
            writer.discard(at, length).unwrap();
            writer.finish().unwrap();
            model[at as usize..(at + length) as usize].fill(0);
        }
        Step::Commit => match qcow2::commit(&disk, &world.policy) {
            Ok(()) => {}
            // It was given all of its content before.
            Err(error) => assert!(error.to_string().contains("no file behind it"), "{error}"),
        },
        Step::Flatten => qcow2::rebase(&disk, None, Rebase::Safe, &world.policy).unwrap(),
        Step::OnBase => {
            let to = world.at("base");
            qcow2::rebase(&disk, Some((&to, DiskFormat::Raw)), Rebase::Safe, &world.policy).unwrap();
        }
        Step::Resize(more) => {
            model.resize(model.len() + more as usize, 0);
            qcow2::resize(&disk, model.len() as u64, Shrink::Never, &world.policy).unwrap();
        }
    }
}

#[test]
fn whatever_is_done_a_disk_is_as_an_array_of_bytes() {
    privileged(NEEDS, || {
        for (clusters, compat, cases) in [("64k", "1.1", 12), ("512", "1.1", 10), ("4k", "0.10", 6)] {
            const BYTES: u64 = 3 << 20;
            let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
            let run = runner.run(&steps(BYTES), |steps| {
                let world = World::new(clusters, compat, BYTES);
                let mut model = content(&world.at("disk"), &world.policy);
                for step in &steps {
                    apply(&world, &mut model, step);
                    assert!(content(&world.at("disk"), &world.policy) == model, "after {step:?}");
                    world.sound();
                }
                let raw = world.at("model");
                fs::write(&raw, &model).unwrap();
                same(&world.at("disk"), &raw, "raw");
                Ok(())
            });
            run.unwrap();
        }
    });
}

#[test]
fn counts_grow_with_the_file() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        let nothing = BackingPolicy::nothing();
        // Counts of 64 bits in clusters of 512 bytes: a block counts 64 of them, a table 64 blocks.
        for bits in ["64", "16", "1"] {
            let options = format!("cluster_size=512,refcount_bits={bits}");
            img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&disk), "12M"]);
            let mut writer = Writer::open(&disk, &nothing).unwrap();
            let data: Vec<u8> = (0..9 << 20).map(|at: u32| (at / 512 % 251) as u8 + 1).collect();
            writer.write_at(&data, 512 * 3 + 7).unwrap();
            writer.finish().unwrap();
            assert_eq!(check_file(&disk), (0, 0), "{bits}");
            assert!(content(&disk, &nothing)[512 * 3 + 7..][..data.len()] == data[..]);
            qcow2::resize(&disk, 100 << 20, Shrink::Never, &nothing).unwrap();
            let refused = qcow2::resize(&disk, 4 << 20, Shrink::Empty, &nothing).unwrap_err();
            assert!(refused.to_string().contains("not all zero"), "{refused}");
            qcow2::resize(&disk, 30 << 20, Shrink::Empty, &nothing).unwrap();
            assert_eq!(check_file(&disk), (0, 0), "{bits}");
            let mut writer = Writer::open(&disk, &nothing).unwrap();
            writer.discard(0, 30 << 20).unwrap();
            writer.finish().unwrap();
            assert_eq!(check_file(&disk), (0, 0), "{bits}");
            assert!(fs::metadata(&disk).unwrap().blocks() * 512 < 6 << 20, "space came back");
            fs::remove_file(&disk).unwrap();
        }
    });
}

/// Kills `work` on copies of the world's files after each of its lasting calls:
/// what is left shows one of `allowed`, and `work` once more leads to the last of them.
fn killed_anywhere(world: &World, allowed: &[&[u8]], work: impl Fn(&Path, &BackingPolicy) + Clone + Send + 'static) {
    let names = ["base", "middle", "disk", "other"];
    let kept: Vec<_> = names.iter().filter_map(|name| Some((*name, fs::read(world.at(name)).ok()?))).collect();
    let restore = || kept.iter().for_each(|(name, bytes)| fs::write(world.at(name), bytes).unwrap());
    for after in 1.. {
        restore();
        let (theirs, disk, allow) = (work.clone(), world.at("disk"), world.policy.clone());
        let run = traced::run(Some(after), Counted::Lasting, LIMIT, move || {
            theirs(&disk, &allow);
            0
        });
        let end = run.unwrap().end;
        let disk = world.at("disk");
        let now = content(&disk, &world.policy);
        assert!(allowed.contains(&now.as_slice()), "after call {after} ({end:?})");
        // Space may be lost until the next opening; nothing else.
        assert_eq!(check_file(&disk).0, 0, "after call {after} ({end:?})");
        assert_eq!(qcow2::check(&world.at("middle"), Repair::Nothing).unwrap().errors, 0, "after call {after}");
        work(&disk, &world.policy);
        assert!(content(&disk, &world.policy) == *allowed[allowed.len() - 1], "again after {after} ({end:?})");
        assert_eq!(check_file(&disk), (0, 0), "again after {after} ({end:?})");
        // Somebody who only opens it finds the other in order too.
        Writer::open(&world.at("middle"), &world.policy).unwrap().finish().unwrap();
        let middle = qcow2::check(&world.at("middle"), Repair::Nothing).unwrap();
        assert_eq!((middle.errors, middle.leaks), (0, 0), "again after {after} ({end:?})");
        match end {
            End::Killed(_) => {}
            End::Returned(0) => {
                assert!(after > 5, "{after} calls");
                return restore();
            }
            other => panic!("after call {after}: {other:?}"),
        }
    }
}

#[test]
fn killed_at_any_call_a_disk_has_its_old_or_its_new_content() {
    privileged(NEEDS, || {
        let world = World::new("4k", "1.1", 1 << 20);
        world.write("middle", &[(100_000, 9000, 3)]);
        world.write("disk", &[(3000, 9000, 4), (600_000, 5000, 5)]);
        let mut writer = Writer::open(&world.at("disk"), &world.policy).unwrap();
        writer.discard(40_960, 8192).unwrap();
        writer.finish().unwrap();
        fs::write(world.at("other"), vec![9; 1 << 20]).unwrap();
        let old = content(&world.at("disk"), &world.policy);

        killed_anywhere(&world, &[&old], |disk, policy| qcow2::commit(disk, policy).unwrap());
        killed_anywhere(&world, &[&old], |disk, policy| {
            let other = disk.with_file_name("other");
            qcow2::rebase(disk, Some((&other, DiskFormat::Raw)), Rebase::Safe, policy).unwrap();
        });
        killed_anywhere(&world, &[&old], |disk, policy| qcow2::rebase(disk, None, Rebase::Safe, policy).unwrap());
        let mut larger = old.clone();
        larger.resize(9 << 20, 0);
        killed_anywhere(&world, &[&old, &larger], |disk, policy| {
            qcow2::resize(disk, 9 << 20, Shrink::Never, policy).unwrap();
        });
        // One piece at a time: each of both is there or not.
        let (mut half, mut new) = (old.clone(), old.clone());
        half[602_112..614_400].fill(0);
        new[602_112..614_400].fill(0);
        new[204_800..208_896].fill(7);
        killed_anywhere(&world, &[&old, &half, &new], |disk, policy| {
            let mut writer = Writer::open(disk, policy).unwrap();
            writer.discard(602_112, 12_288).unwrap();
            writer.write_at(&[7; 4096], 204_800).unwrap();
            writer.finish().unwrap();
        });
    });
}

#[test]
fn what_a_disk_stands_on_is_changed_by_permission_and_never_into_a_ring() {
    privileged(NEEDS, || {
        let world = World::new("64k", "1.1", 1 << 20);
        world.write("disk", &[(5, 5, 5)]);
        let (disk, middle) = (world.at("disk"), world.at("middle"));
        let before = content(&disk, &world.policy);
        let refused = |to: &Path, format, policy: &BackingPolicy| {
            let error = qcow2::rebase(&disk, Some((to, format)), Rebase::Unchecked, policy).unwrap_err();
            assert!(content(&disk, &world.policy) == before, "{error}");
            assert_eq!(check_file(&disk), (0, 0), "{error}");
            error.to_string()
        };
        assert!(refused(&disk, QCOW2, &world.policy).contains("behind itself"));
        let on_disk = world.at("on-disk");
        qcow2::create(&on_disk, 1 << 20, Some((&disk, QCOW2))).unwrap();
        assert!(refused(&on_disk, QCOW2, &world.policy).contains("behind itself"));
        let outside = tempfile::NamedTempFile::new().unwrap();
        assert!(refused(outside.path(), DiskFormat::Raw, &world.policy).contains("not among what may be behind"));
        assert!(refused(&middle, QCOW2, &world.policy.clone().with_depth(2)).contains("one too many"));
        let long = world.at(&"n".repeat(250)).join("m".repeat(250));
        fs::create_dir(long.parent().unwrap()).unwrap();
        fs::write(&long, vec![0; 1 << 20]).unwrap();
        // Names of every length find their place, beside the old one or over it.
        for (to, format) in [(&long, DiskFormat::Raw), (&middle, QCOW2), (&long, DiskFormat::Raw), (&middle, QCOW2)] {
            qcow2::rebase(&disk, Some((to, format)), Rebase::Safe, &world.policy).unwrap();
            assert!(content(&disk, &world.policy) == before);
            let device = Device::new(&disk, QCOW2, Bytes::mib(1));
            let about = qemu::info(&device);
            assert_eq!(about["full-backing-filename"], text(to));
            assert_eq!(about["backing-filename-format"], format.name());
            assert_eq!(check_file(&disk), (0, 0));
        }
        // Without a check it shows what the other has.
        fs::write(world.at("other"), vec![9; 1 << 20]).unwrap();
        qcow2::rebase(&disk, Some((&world.at("other"), DiskFormat::Raw)), Rebase::Unchecked, &world.policy).unwrap();
        assert_eq!(content(&disk, &world.policy)[900_000], 9);
        same(&disk, &disk, "qcow2");
    });
}

#[test]
fn disks_in_use_are_left_alone() {
    privileged(NEEDS, || {
        let world = World::new("64k", "1.1", 1 << 20);
        let (disk, middle) = (world.at("disk"), world.at("middle"));
        let holder = Holder::of(&Device::new(&disk, QCOW2, Bytes::mib(1)));
        let before = (fs::read(&disk).unwrap(), fs::read(&middle).unwrap());
        for result in [
            qcow2::commit(&disk, &world.policy),
            qcow2::rebase(&disk, None, Rebase::Safe, &world.policy),
            qcow2::resize(&disk, 2 << 20, Shrink::Never, &world.policy),
            qcow2::check(&disk, Repair::Leaks).map(drop),
            Writer::open(&disk, &world.policy).map(drop),
            // It is behind one that is in use.
            Writer::open(&middle, &world.policy).map(drop),
        ] {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Busy);
        }
        assert!((fs::read(&disk).unwrap(), fs::read(&middle).unwrap()) == before);
        drop(holder);
        let writer = Writer::open(&disk, &world.policy).unwrap();
        let error = qcow2::commit(&disk, &world.policy).unwrap_err();
        assert!(matches!(error, Error::DiskFileBusy(_)), "{error}");
        drop(writer);
        qcow2::commit(&disk, &world.policy).unwrap();
    });
}

/// Bytes that are put into a file, and where.
type Lies<'a> = &'a [(u64, &'a [u8])];

/// Puts bytes into a copy of a file and says what a check and a writer make of it.
fn damaged(file: &Path, changes: Lies<'_>) -> (Option<(u64, u64)>, String) {
    let copy = file.with_file_name("damaged");
    fs::copy(file, &copy).unwrap();
    let open = File::options().write(true).open(&copy).unwrap();
    changes.iter().for_each(|(at, bytes)| open.write_all_at(bytes, *at).unwrap());
    let before = fs::read(&copy).unwrap();
    let error = Writer::open(&copy, &BackingPolicy::nothing()).err().map_or(String::new(), |error| error.to_string());
    if !error.is_empty() {
        assert!(fs::read(&copy).unwrap() == before, "nothing is written to what is refused: {error}");
    }
    let checked = qcow2::check(&copy, Repair::Counts);
    (checked.ok().map(|report| (report.errors, report.leaks)), error)
}

#[test]
fn a_file_that_lies_is_refused_with_what_and_where() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        qcow2::create(&disk, 64 << 20, None).unwrap();
        let mut writer = Writer::open(&disk, &BackingPolicy::nothing()).unwrap();
        writer.write_at(&[7; 200_000], 0).unwrap();
        writer.finish().unwrap();
        let bytes = fs::read(&disk).unwrap();
        let word = |at: u64| u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap());
        let (l1, counts_table) = (word(40), word(48));
        let l2 = word(l1) & 0x00ff_ffff_ffff_fe00;
        let counts = word(counts_table);
        let entry = |offset: u64| (offset | 1 << 63).to_be_bytes();
        let cases: &[(Lies<'_>, &str)] = &[
            (&[(l2, &entry(l2))], "holds a table, and is used for more"),
            (&[(l2, &entry(l1))], "holds a table, and is used for more"),
            (&[(l2, &entry(counts))], "holds a table, and is used for more"),
            (&[(l1, &entry(counts_table))], "but its cluster has the count 1"),
            (&[(l2 + 8, &bytes[l2 as usize..l2 as usize + 8])], "has 2 references, but its count is 1"),
            (&[(l2, &entry(1 << 40))], "points behind the file's end"),
            (&[(l2, &[0x80, 0, 0, 0, 0, 0, 2, 0])], "does not point to a cluster's beginning"),
            (&[(counts_table, &(1_u64 << 50).to_be_bytes())], "the table of reference counts at byte 0x10000"),
            (&[(counts_table, &0_u64.to_be_bytes())], "references, but its count is 0"),
            (&[(counts_table + 8, &counts.to_be_bytes())], "holds a table, and is used for more"),
            (&[(48, &(1_u64 << 60).to_be_bytes())], "refcount_table_offset (byte 48 of the header)"),
            (&[(56, &u32::MAX.to_be_bytes())], "refcount_table_clusters (byte 56 of the header)"),
            (&[(24, &u64::MAX.to_be_bytes())], "size (byte 24 of the header)"),
            (&[(36, &u32::MAX.to_be_bytes())], "l1_size (byte 36 of the header)"),
            (&[(60, &[0, 0, 0, 1]), (64, &l1.to_be_bytes())], "snapshots inside"),
            (&[(72, &[0, 0, 0, 0, 0, 0, 0, 2])], "a program found it damaged"),
        ];
        for (changes, reason) in cases {
            let (checked, error) = damaged(&disk, changes);
            assert!(error.contains(reason), "`{error}` instead of `{reason}`");
            // Counts alone are put right on request.
            let only_counts = reason.contains("references, but its count is 0");
            assert!(checked.is_none_or(|(errors, _)| (errors > 0) != only_counts), "{reason}: {checked:?}");
        }
        // Names that lead elsewhere, and a file as long as a disk cannot be.
        for name in ["file:///etc/passwd", "json:{\"driver\":\"nbd\"}", "nbd://host/x", "/etc/passwd"] {
            let hostile = dir.path().join("hostile");
            drop(fs::remove_file(&hostile));
            qcow2::create(&hostile, 1 << 20, Some((Path::new(name), DiskFormat::Raw))).unwrap();
            let error = Writer::open(&hostile, &policy(dir.path())).unwrap_err();
            assert!(matches!(error, Error::DiskFile { .. }), "{error}");
            assert_eq!(qcow2::check(&hostile, Repair::Leaks).unwrap().errors, 0, "what is behind is not looked at");
        }
        File::options().write(true).open(&disk).unwrap().set_len(1 << 53).ok();
        if fs::metadata(&disk).unwrap().len() == 1 << 53 {
            assert!(qcow2::check(&disk, Repair::Nothing).unwrap_err().to_string().contains("too many"));
        }
    });
}

#[test]
fn leaks_are_found_as_qemu_finds_them_and_given_back() {
    privileged(NEEDS, || {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        qcow2::create(&disk, 64 << 20, None).unwrap();
        qemu::run_io("qcow2", &disk, &["write -P 7 0 1M"]);
        let bytes = fs::read(&disk).unwrap();
        let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap());
        File::options().write(true).open(&disk).unwrap().write_all_at(&[0; 8], l1).unwrap();
        let found = qcow2::check(&disk, Repair::Nothing).unwrap();
        assert_eq!((found.errors, found.leaks), check_file(&disk));
        assert_eq!(found.leaks, 17, "{found:?}");
        assert!(found.findings[0].contains("has 0 references, but its count is 1"), "{found:?}");
        assert_eq!(qcow2::check(&disk, Repair::Leaks).unwrap().leaks, 0);
        assert_eq!(check_file(&disk), (0, 0));
        assert!(fs::metadata(&disk).unwrap().blocks() * 512 < 1 << 19, "space came back");
        // Compressed, lazily counted and left open: as QEMU has them.
        for options in [&["-c"][..], &["-o", "lazy_refcounts=on"]] {
            let other = dir.path().join("other");
            let mut args = vec!["convert", "-f", "qcow2", "-O", "qcow2"];
            args.extend(options);
            args.extend([text(&disk), text(&other)]);
            qemu::run_io("qcow2", &disk, &["write -P 7 0 1M", "write -P 9 9M 300k"]);
            img(&args);
            let mut writer = Writer::open(&other, &BackingPolicy::nothing()).unwrap();
            writer.write_at(&[3; 100], 1000).unwrap();
            writer.write_at(&[3; 70_000], 9 << 20).unwrap();
            writer.finish().unwrap();
            assert_eq!(check_file(&other), (0, 0), "{options:?}");
            qemu::run_io("qcow2", &other, &["read -P 7 0 1000", "read -P 3 1000 100", "read -P 7 2000 64k"]);
        }
    });
}
