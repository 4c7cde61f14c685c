//! Which address a desktop had, so that it has the same again.
//!
//! The file has a line for each change: `DESKTOP ADDRESS`, or `DESKTOP -` for one that has none any
//! more; a later line counts more. So a change costs one short line however many there are.
//! It is written anew when most of it counts no more, and empty when none of it does.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use qvd_core::DesktopId;

use crate::{Error, Subnet, kept};

/// The addresses of a network's desktops, also of those that do not run. Without
/// a file none is kept.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    file: Option<PathBuf>,
    /// Lines that the file has; none if it ends in the middle of one.
    lines: Option<usize>,
    by_desktop: BTreeMap<DesktopId, Ipv4Addr>,
    by_address: BTreeMap<Ipv4Addr, DesktopId>,
}

impl Leases {
    /// Reads those of `subnet`. Addresses of another are nobody's any more.
    ///
    /// # Errors
    /// The file cannot be read, or something else wrote it.
    pub(crate) fn open(file: &Path, subnet: Subnet) -> Result<Self, Error> {
        Self::read(file, |address| subnet.contains(address))
    }

    fn read(file: &Path, is_known: impl Fn(Ipv4Addr) -> bool) -> Result<Self, Error> {
        let mut leases = Self { file: Some(file.to_owned()), ..Self::default() };
        let text = kept::read(file)?;
        // A disk that was full or a host that died left the rest of the last change out.
        let (whole, rest) = text.rfind('\n').map_or(("", text.as_str()), |end| text.split_at(end + 1));
        let name = file.display().to_string();
        if !rest.chars().all(|char| char.is_ascii_digit() || " .-\0".contains(char)) {
            return Err(kept::unknown(rest, &name, "no address of a desktop"));
        }
        for line in whole.lines() {
            let (desktop, address) =
                parse(line).ok_or_else(|| kept::unknown(line, &name, "no address of a desktop"))?;
            match address {
                Some(address) if is_known(address) => leases.insert(desktop, address),
                _ => drop(leases.remove(desktop)),
            }
        }
        leases.lines = rest.is_empty().then(|| whole.lines().count());
        Ok(leases)
    }

    fn insert(&mut self, desktop: DesktopId, address: Ipv4Addr) {
        self.remove(desktop);
        if let Some(other) = self.by_address.insert(address, desktop) {
            self.by_desktop.remove(&other);
        }
        self.by_desktop.insert(desktop, address);
    }

    fn remove(&mut self, desktop: DesktopId) -> bool {
        let removed = self.by_desktop.remove(&desktop);
        removed.is_some_and(|address| self.by_address.remove(&address).is_some())
    }

    /// The address that a desktop had last.
    pub(crate) fn address_of(&self, desktop: DesktopId) -> Option<Ipv4Addr> {
        self.by_desktop.get(&desktop).copied()
    }

    /// Whether an address is kept for another desktop.
    pub(crate) fn is_anothers(&self, address: Ipv4Addr, desktop: DesktopId) -> bool {
        self.by_address.get(&address).is_some_and(|&by| by != desktop)
    }

    /// Keeps an address for a desktop, and for nobody else.
    ///
    /// # Errors
    /// It could not be written.
    pub(crate) fn keep(&mut self, desktop: DesktopId, address: Ipv4Addr) -> Result<(), Error> {
        let Some(file) = self.file.clone().filter(|_| self.address_of(desktop) != Some(address)) else { return Ok(()) };
        self.insert(desktop, address);
        self.write(&file, &line(desktop, Some(address)))
    }

    /// Keeps none for a desktop any more.
    ///
    /// # Errors
    /// It could not be written; the next process keeps it.
    pub(crate) fn forget(&mut self, desktop: DesktopId) -> Result<(), Error> {
        let Some(file) = self.file.clone().filter(|_| self.remove(desktop)) else { return Ok(()) };
        self.write(&file, &line(desktop, None))
    }

    /// Adds a line, or writes all anew. A start need not wait for the disk: what the host's power
    /// takes with it is who got which address in the last seconds.
    fn write(&mut self, file: &Path, line: &str) -> Result<(), Error> {
        let limit = self.by_desktop.len().saturating_mul(2).saturating_add(SPARE_LINES);
        // Until it has gone well nobody knows where the file ends.
        match self.lines.take() {
            Some(lines) if lines < limit && !self.by_desktop.is_empty() => {
                kept::append(file, line)?;
                self.lines = Some(lines + 1);
            }
            _ => {
                let text: String =
                    self.by_desktop.iter().map(|(&desktop, &at)| self::line(desktop, Some(at))).collect();
                kept::write(file, &text)?;
                self.lines = Some(self.by_desktop.len());
            }
        }
        Ok(())
    }
}

/// Lines that count no more and may stay in however short a file.
const SPARE_LINES: usize = 64;

fn line(desktop: DesktopId, address: Option<Ipv4Addr>) -> String {
    address.map_or_else(|| format!("{desktop} -\n"), |address| format!("{desktop} {address}\n"))
}

fn parse(line: &str) -> Option<(DesktopId, Option<Ipv4Addr>)> {
    let (desktop, address) = line.split_once(' ')?;
    let address = if address == "-" { None } else { Some(address.parse().ok()?) };
    Some((desktop.parse().ok()?, address))
}

/// Keeps no address for a desktop any more in a file of a network that is not open.
///
/// # Errors
/// The file cannot be read or written, or something else wrote it.
pub fn forget_address(file: &Path, desktop: DesktopId) -> Result<(), Error> {
    Leases::read(file, |_| true)?.forget(desktop)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

    fn id(number: u32) -> DesktopId {
        DesktopId::new(number).unwrap()
    }

    fn address(number: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(Ipv4Addr::new(10, 1, 0, 0).to_bits() + number)
    }

    struct Bed {
        _dir: tempfile::TempDir,
        file: PathBuf,
    }

    impl Bed {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            Self { file: dir.path().join("addresses"), _dir: dir }
        }

        fn open(&self) -> Leases {
            Leases::open(&self.file, "10.1.0.0/16".parse().unwrap()).unwrap()
        }

        fn len(&self) -> u64 {
            fs::metadata(&self.file).map_or(0, |known| known.len())
        }
    }

    #[test]
    fn what_a_start_writes_does_not_grow_with_the_desktops() {
        let bed = Bed::new();
        let mut leases = bed.open();
        let mut largest = [0, 0];
        for number in 1..=2000 {
            let before = bed.len();
            leases.keep(id(number), address(number)).unwrap();
            let most = &mut largest[usize::from(number > 1900)];
            *most = (*most).max(bed.len() - before);
        }
        assert_eq!(largest.map(|bytes| bytes <= 24), [true; 2], "{largest:?}");
        assert_eq!(bed.open().by_desktop, leases.by_desktop);
    }

    #[test]
    fn a_file_that_changes_for_ever_stays_short_and_true() {
        let bed = Bed::new();
        let mut leases = bed.open();
        for number in 1..=10 {
            leases.keep(id(number), address(number)).unwrap();
        }
        for turn in 0..1000 {
            let number = turn % 10 + 1;
            leases.forget(id(number)).unwrap();
            assert_eq!(bed.open().address_of(id(number)), None, "turn {turn}");
            leases.keep(id(number), address(turn + 100)).unwrap();
            assert_eq!(bed.open().by_desktop, leases.by_desktop, "turn {turn}");
        }
        let lines = fs::read_to_string(&bed.file).unwrap().lines().count();
        assert!(lines <= 2 * 10 + SPARE_LINES, "{lines}");
    }

    #[test]
    fn a_change_that_was_cut_off_is_left_out_and_hurts_none_after_it() {
        let whole = "1 10.1.0.1\n2 10.1.0.2\n";
        let third = "3 10.1.0.3\n";
        for cut in 0..third.len() {
            for tail in [third.split_at(cut).0, &"\0".repeat(cut)] {
                let bed = Bed::new();
                fs::write(&bed.file, format!("{whole}{tail}")).unwrap();
                let mut leases = bed.open();
                assert_eq!(leases.by_desktop.len(), 2, "{tail:?}");
                leases.keep(id(4), address(4)).unwrap();
                leases.forget(id(1)).unwrap();
                let expected = BTreeMap::from([(id(2), address(2)), (id(4), address(4))]);
                assert_eq!(bed.open().by_desktop, expected, "{tail:?}");
            }
        }
    }

    #[test]
    fn what_something_else_wrote_is_refused_and_stays() {
        for garbled in
            ["1 10.1.0.1 x\n", "x 10.1.0.1\n", "1\n", "\n", "no line", "1 10.1.0.1\n2 --\n3 10.1.0.3\n", "\0\n"]
        {
            let bed = Bed::new();
            fs::write(&bed.file, garbled).unwrap();
            Leases::open(&bed.file, "10.1.0.0/16".parse().unwrap()).unwrap_err();
            forget_address(&bed.file, id(1)).unwrap_err();
            assert_eq!(fs::read_to_string(&bed.file).unwrap(), garbled);
        }
    }

    #[test]
    fn after_a_failed_change_all_is_written_anew() {
        let bed = Bed::new();
        let mut leases = bed.open();
        leases.keep(id(1), address(1)).unwrap();
        // What was there is not a file for a moment.
        let aside = bed.file.with_extension("aside");
        fs::rename(&bed.file, &aside).unwrap();
        fs::create_dir(&bed.file).unwrap();
        leases.keep(id(2), address(2)).unwrap_err();
        fs::remove_dir(&bed.file).unwrap();
        // As a disk that was full leaves it.
        fs::write(&bed.file, "1 10.1.0.1\n2 10.1").unwrap();
        leases.keep(id(3), address(3)).unwrap();
        assert_eq!(bed.open().by_desktop, leases.by_desktop);
        assert_eq!(leases.by_desktop.len(), 3);
    }
}
