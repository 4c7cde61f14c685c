//! What is done with a root, and what it costs.

use std::{
    fs::{self, File},
    io::{Read, Write as _},
    os::{fd::AsFd as _, unix::fs::FileExt as _},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use qvd_sys::map::SharedMap;
use rustix::fs::{Advice, fadvise, statvfs, syncfs};
use walkdir::WalkDir;

use crate::{
    Measure, Turn,
    bed::{LARGE, MANY, NEW, SHARED, SHARED_BYTES, SMALL},
    common::{Outcome, run},
    subject::Subject,
};

/// Size of the file that is read and written, in bytes.
const IO_BYTES: usize = 32 << 20;
const BLOCK: usize = 4096;
/// Between unmounting and removing.
const REST: Duration = Duration::from_millis(50);
/// Random accesses of each kind.
const ACCESSES: usize = 4000;

/// Makes a root, uses it as a session would, and removes it.
pub(crate) fn turn(subject: &dyn Subject) -> Outcome<Turn> {
    let mut turn = Turn::new();
    let free = free_kib(subject.place())?;
    let (mut made, took) = subject.make()?;
    turn.insert(Measure::Create, micros(took));
    turn.insert(Measure::Used, free - free_kib(subject.place())?);
    let root = made.path();
    for (name, measure) in [(SMALL, Measure::Write1), (LARGE, Measure::Write100)] {
        // A root that is put together has no write access to all of its base.
        if let Some(took) = first_write(&root.join(name))? {
            turn.insert(measure, micros(took));
        }
    }
    input_output(&root.join(NEW).join("io"), &mut turn)?;
    let began = Instant::now();
    for entry in WalkDir::new(root.join(MANY)) {
        entry?.metadata()?;
    }
    turn.insert(Measure::Walk, micros(began.elapsed()) / 1000.0);
    let began = Instant::now();
    let tar = subject.place().ancestors().map(|dir| dir.join("many.tar")).find(|tar| tar.exists());
    let tar = tar.ok_or("no archive above the place")?;
    run(Command::new("tar").arg("xf").arg(tar).arg("-C").arg(root.join(NEW)))?;
    turn.insert(Measure::Untar, micros(began.elapsed()) / 1000.0);
    let began = Instant::now();
    made.unmount();
    turn.insert(Measure::Unmount, micros(began.elapsed()));
    // As between a session's end and its root's: unmounting has had its share of the processor.
    std::thread::sleep(REST);
    turn.insert(Measure::Remove, micros(made.remove()?));
    Ok(turn)
}

/// What two roots share of a file of their base.
pub(crate) struct Sharing {
    /// How much of it one finds in the page cache that only the other has read.
    pub(crate) resident: f64,
    /// Proportional size of one's mapping when both have it mapped, beside the whole.
    pub(crate) pss: f64,
}

impl Sharing {
    pub(crate) fn cache(&self) -> bool {
        self.resident > 0.9
    }

    pub(crate) fn mmaps(&self) -> bool {
        self.pss < 0.6
    }
}

/// Lets one root read a file, and looks at it from another.
pub(crate) fn sharing(subject: &dyn Subject) -> Outcome<Option<Sharing>> {
    let ((one, _), (other, _)) = (subject.make()?, subject.make()?);
    let found = {
        let open = |root: &Path| -> Outcome<File> {
            let file = File::open(root.join(SHARED))?;
            syncfs(&file)?;
            // Nothing of what making it has read or written.
            fadvise(&file, 0, None, Advice::DontNeed)?;
            // Otherwise a read of the other's first page would bring many more.
            fadvise(&file, 0, None, Advice::Random)?;
            Ok(file)
        };
        let (mut one, other) = (open(&one.path())?, open(&other.path())?);
        std::io::copy(&mut (&mut one).take(SHARED_BYTES as u64), &mut std::io::sink())?;
        let whole = SHARED_BYTES as f64;
        // A file system in user space may not be mapped.
        match (SharedMap::new(one.as_fd(), SHARED_BYTES, false), SharedMap::new(other.as_fd(), SHARED_BYTES, false)) {
            (Ok(one), Ok(other)) => {
                let resident = other.resident_bytes()? as f64 / whole;
                one.touch();
                other.touch();
                Some(Sharing { resident, pss: other.pss_bytes()? as f64 / whole })
            }
            _ => None,
        }
    };
    for mut made in [one, other] {
        made.unmount();
        made.remove()?;
    }
    Ok(found)
}

fn micros(took: Duration) -> f64 {
    took.as_secs_f64() * 1e6
}

/// Free space in KiB, once all is written.
fn free_kib(at: &Path) -> Outcome<f64> {
    syncfs(File::open(at)?)?;
    let stat = statvfs(at)?;
    Ok((stat.f_bfree * stat.f_frsize) as f64 / 1024.0)
}

/// Writes a block into the middle of a file of the base.
fn first_write(file: &Path) -> Outcome<Option<Duration>> {
    let began = Instant::now();
    let file = match File::options().write(true).open(file) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::ReadOnlyFilesystem => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    file.write_all_at(&[7; BLOCK], 512 << 10)?;
    Ok(Some(began.elapsed()))
}

/// Sequential and random input and output through the page cache.
fn input_output(path: &Path, turn: &mut Turn) -> Outcome<()> {
    let mut block = vec![3; BLOCK];
    let chunk = vec![5; 256 << 10];
    let mut file = File::options().read(true).write(true).create_new(true).open(path)?;
    let rate = |bytes: usize, began: Instant| bytes as f64 / 1e6 / began.elapsed().as_secs_f64();
    let began = Instant::now();
    for _ in 0..IO_BYTES / chunk.len() {
        file.write_all(&chunk)?;
    }
    turn.insert(Measure::Write, rate(IO_BYTES, began));
    let began = Instant::now();
    std::io::copy(&mut File::open(path)?, &mut std::io::sink())?;
    turn.insert(Measure::Read, rate(IO_BYTES, began));
    let kilo = |began: Instant| ACCESSES as f64 / 1000.0 / began.elapsed().as_secs_f64();
    let at = |number: usize| (number * 2_654_435_761 % (IO_BYTES / BLOCK) * BLOCK) as u64;
    let began = Instant::now();
    (0..ACCESSES).try_for_each(|number| file.read_exact_at(&mut block, at(number)))?;
    turn.insert(Measure::RandomRead, kilo(began));
    let began = Instant::now();
    (0..ACCESSES).try_for_each(|number| file.write_all_at(&block, at(number)))?;
    turn.insert(Measure::RandomWrite, kilo(began));
    Ok(fs::remove_file(path)?)
}
