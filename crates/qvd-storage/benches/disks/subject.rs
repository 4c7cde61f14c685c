//! What is measured, where, and how.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use crate::{
    Measure, Turn,
    common::{KINDS, Outcome, mount, noise, run},
};
use qvd_core::{Digest, RootPolicy};
use qvd_storage::{BaseDisk, DiskBackend, DiskBackends, DiskFormat, DiskId, Place};

/// Size of the base, and how much of it is no hole.
const BASE_BYTES: u64 = 512 << 20;
const DATA_BYTES: u64 = 64 << 20;
/// What a full disk was written with before it is removed.
const WRITTEN_BYTES: u64 = 256 << 20;

/// Between making and removing.
const REST: Duration = Duration::from_millis(50);

/// File systems on loop devices, mounted where only this process sees them,
/// each with the same base.
pub(crate) struct Bed {
    dir: tempfile::TempDir,
}

impl Bed {
    pub(crate) fn new() -> Outcome<Self> {
        let bed = Self { dir: tempfile::tempdir()? };
        for kind in KINDS {
            mount(kind, 2 << 30, &bed.dir.path().join(format!("{kind}.disk")), &bed.at(kind))?;
            plant(&bed.base(kind))?;
        }
        Ok(bed)
    }

    fn at(&self, kind: &str) -> PathBuf {
        self.dir.path().join(kind)
    }

    fn base(&self, kind: &str) -> PathBuf {
        self.at(kind).join("base.raw")
    }
}

fn plant(base: &Path) -> Outcome<()> {
    let file = File::create(base)?;
    file.set_len(BASE_BYTES)?;
    let megabyte = noise(1 << 20);
    for at in (0..DATA_BYTES).step_by(megabyte.len()) {
        file.write_all_at(&megabyte, at)?;
    }
    Ok(file.sync_all()?)
}

/// One way to make disks.
pub(crate) trait Subject {
    fn name(&self) -> &str;
    /// Makes a disk, ready for use.
    fn make(&self) -> Outcome<(PathBuf, DiskFormat)>;
    /// Removes it; returns when whoever asked can go on.
    fn remove(&self) -> Outcome<()>;
    /// Waits until nothing of it is worked on any more; not measured.
    fn settle(&self) -> Outcome<()>;
}

/// All of them.
pub(crate) fn subjects(bed: &Bed) -> Outcome<Vec<Box<dyn Subject>>> {
    let mut all: Vec<Box<dyn Subject>> = Vec::new();
    let own = [
        ("qcow2", "qcow2", "ext4"),
        ("qcow2 on xfs", "qcow2", "xfs"),
        ("reflink on xfs", "reflink", "xfs"),
        ("reflink on btrfs", "reflink", "btrfs"),
        ("copy", "copy", "ext4"),
    ];
    for (name, backend, kind) in own {
        let place = Place::for_disks(&bed.at(kind).join(backend))?;
        let digest = Digest::new([1; 32]);
        all.push(Box::new(Own {
            name,
            backend: DiskBackends::built_in().make(backend, place.clone())?,
            place,
            base: BaseDisk::new(digest, bed.base(kind), DiskFormat::Raw),
            id: "1".parse()?,
        }));
    }
    all.push(Box::new(QemuImg { base: bed.base("ext4"), disk: bed.at("ext4").join("peer.qcow2") }));
    Ok(all)
}

struct Own {
    name: &'static str,
    backend: Box<dyn DiskBackend>,
    place: Place,
    base: BaseDisk,
    id: DiskId,
}

impl Subject for Own {
    fn name(&self) -> &str {
        self.name
    }

    fn make(&self) -> Outcome<(PathBuf, DiskFormat)> {
        let device = self.backend.create(&self.base, &self.id, &RootPolicy::Volatile.into())?.attach()?;
        Ok((device.path, device.format))
    }

    fn remove(&self) -> Outcome<()> {
        Ok(self.backend.remove(&self.id)?)
    }

    fn settle(&self) -> Outcome<()> {
        Ok(self.place.finish_discarding()?)
    }
}

/// What everybody else does.
struct QemuImg {
    base: PathBuf,
    disk: PathBuf,
}

impl Subject for QemuImg {
    fn name(&self) -> &'static str {
        crate::PEER
    }

    fn make(&self) -> Outcome<(PathBuf, DiskFormat)> {
        run(Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .arg(&self.base)
            .arg(&self.disk))?;
        Ok((self.disk.clone(), DiskFormat::Qcow2))
    }

    fn remove(&self) -> Outcome<()> {
        Ok(fs::remove_file(&self.disk)?)
    }

    fn settle(&self) -> Outcome<()> {
        Ok(())
    }
}

/// One turn: a disk that is made and removed, and one that is used between.
pub(crate) fn turn(subject: &dyn Subject) -> Outcome<Turn> {
    let mut turn = Turn::new();
    let ((path, format), us) = timed(|| subject.make())?;
    turn.insert(Measure::Create, us);
    turn.insert(Measure::Used, kib(&path)?);
    // Who has just copied has had its share of the processor: removing would wait for the others' turns.
    std::thread::sleep(REST);
    turn.insert(Measure::RemoveNew, timed(|| subject.remove())?.1);
    subject.settle()?;

    subject.make()?;
    // A stride that is no multiple of a cluster: hardly any request meets the
    // cluster of another, as with random ones, and each run is the same.
    let scattered = |write| bench(&path, format, write, 4096, (1 << 20) + (5 << 12), 4000);
    turn.insert(Measure::RandomRead, scattered(false)?.requests_per_s / 1000.0);
    turn.insert(Measure::RandomWrite, scattered(true)?.requests_per_s / 1000.0);
    let streamed = |write| bench(&path, format, write, 1 << 20, 1 << 20, WRITTEN_BYTES >> 20);
    turn.insert(Measure::Write, streamed(true)?.requests_per_s * 1.048_576);
    turn.insert(Measure::Read, streamed(false)?.requests_per_s * 1.048_576);
    turn.insert(Measure::RemoveFull, timed(|| subject.remove())?.1);
    subject.settle()?;
    Ok(turn)
}

fn timed<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<(T, f64)> {
    let began = Instant::now();
    let made = work()?;
    Ok((made, began.elapsed().as_secs_f64() * 1e6))
}

#[allow(clippy::cast_precision_loss)]
fn kib(path: &Path) -> Outcome<f64> {
    // In units of 512 bytes, whatever the file system's blocks are.
    Ok(fs::metadata(path)?.blocks() as f64 / 2.0)
}

struct Bench {
    requests_per_s: f64,
}

/// Lets QEMU's block layer do I/O of one kind, 8 requests at a time.
#[allow(clippy::cast_precision_loss)]
fn bench(path: &Path, format: DiskFormat, write: bool, bytes: u64, step: u64, count: u64) -> Outcome<Bench> {
    let mut command = Command::new("qemu-img");
    command.args(["bench", "-t", "writeback", "-d", "8", "-f", format.name()]);
    command.args(["-s", &bytes.to_string(), "-S", &step.to_string(), "-c", &count.to_string()]);
    if write {
        command.arg("-w");
    }
    let said = run(command.arg(path))?;
    // "Run completed in 0.123 seconds."
    let seconds: f64 = said
        .lines()
        .find_map(|line| line.strip_prefix("Run completed in ")?.split(' ').next()?.parse().ok())
        .ok_or_else(|| format!("qemu-img bench said something else: {said}"))?;
    Ok(Bench { requests_per_s: count as f64 / seconds })
}
