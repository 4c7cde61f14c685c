//! A tree that looks like a system: 20 000 files of 500 MB in packages, and
//! updates of one package.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Files of each package.
const PACKAGE_FILES: usize = 40;
const PACKAGES: usize = 500;

/// Numbers that are the same in every run.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Bytes that compress about as well as programs do, to a third: words of a
    /// small vocabulary between such that have no order.
    pub(crate) fn content(&mut self, bytes: usize) -> Vec<u8> {
        let mut content = Vec::with_capacity(bytes + 16);
        while content.len() < bytes {
            let number = self.next();
            if number.is_multiple_of(4) {
                content.extend(self.next().to_le_bytes());
            } else {
                let word = (number >> 8) % 512;
                content.extend(format!("{:x}", word.wrapping_mul(0x2545_f491_4f6c_dd1d)).as_bytes());
            }
        }
        content.truncate(bytes);
        content
    }
}

/// Length of the file with this number: many small ones, few large ones.
const fn length(number: usize) -> usize {
    match number % 1000 {
        0 => 3_600_000,
        1..100 => 150_000,
        100..400 => 20_000,
        _ => 2_000,
    }
}

pub(crate) fn file(number: usize) -> PathBuf {
    format!("usr/lib/package{}/file{number}", number / PACKAGE_FILES).into()
}

pub(crate) const STATUS: &str = "var/lib/dpkg/status";

/// Writes the whole tree.
pub(crate) fn plant(top: &Path) -> io::Result<()> {
    let mut random = Random::new(1);
    for number in 0..PACKAGES * PACKAGE_FILES {
        let path = top.join(file(number));
        if number % PACKAGE_FILES == 0 {
            fs::create_dir_all(top.join(file(number)).with_file_name(""))?;
        }
        fs::write(path, random.content(length(number)))?;
    }
    fs::create_dir_all(top.join(STATUS).with_file_name(""))?;
    status(top, 0)
}

/// The list of packages after so many updates.
fn status(top: &Path, updates: usize) -> io::Result<()> {
    let paragraph = |number: usize| {
        let version = (1..=updates).filter(|update| (update * 25 + 2) % PACKAGES == number).count();
        let description = String::from_utf8_lossy(&Random::new(number as u64).content(300)).replace('\n', " ");
        format!(
            "Package: package{number}\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1.{version}\n\
             Description: {description}\n\n"
        )
    };
    fs::write(top.join(STATUS), (0..PACKAGES).map(paragraph).collect::<String>())
}

/// Updates a package: all of its files and the list. Each update is as large
/// as the others. Returns what was changed.
pub(crate) fn update(top: &Path, number: usize) -> io::Result<Vec<PathBuf>> {
    let mut random = Random::new(1000 + number as u64);
    let mut changed = vec![PathBuf::from(STATUS)];
    // Lengths repeat after 1000 files, which are 25 packages.
    let package = (number * 25 + 2) % PACKAGES;
    for number in package * PACKAGE_FILES..(package + 1) * PACKAGE_FILES {
        fs::write(top.join(file(number)), random.content(length(number)))?;
        changed.push(file(number));
    }
    status(top, number)?;
    Ok(changed)
}
