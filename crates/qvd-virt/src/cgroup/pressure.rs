//! How long the processes of a container waited for what was short.

use std::{io, path::Path, time::Duration};

use super::Tree;

/// Shares of time in which somebody waited, and in which all did.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub struct Waiting {
    /// Percent of the last ten seconds in which one process at least waited.
    pub some_percent: f32,
    /// Percent of the last ten seconds in which all that had something to do waited.
    pub full_percent: f32,
    /// Time in which one process at least waited, since the container was made.
    pub some_total: Duration,
}

/// Pressure stall information of a container.
///
/// Source: Linux `Documentation/accounting/psi.rst`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub struct Pressure {
    /// For a processor.
    pub cpu: Waiting,
    /// For memory to be freed, or read again.
    pub memory: Waiting,
    /// For disks.
    pub io: Waiting,
}

impl Pressure {
    /// `None`: the kernel does not count it, or was told not to.
    pub(super) fn read(tree: &dyn Tree, group: &Path) -> io::Result<Option<Self>> {
        let mut pressure = Self::default();
        let parts = [
            ("cpu.pressure", &mut pressure.cpu),
            ("memory.pressure", &mut pressure.memory),
            ("io.pressure", &mut pressure.io),
        ];
        for (file, waiting) in parts {
            match tree.read(&group.join(file)) {
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::EOPNOTSUPP) =>
                {
                    return Ok(None);
                }
                text => *waiting = parse(&text?).ok_or(io::ErrorKind::InvalidData)?,
            }
        }
        Ok(Some(pressure))
    }
}

fn parse(text: &str) -> Option<Waiting> {
    let mut waiting = Waiting::default();
    for line in text.lines() {
        let mut words = line.split(' ');
        let kind = words.next()?;
        let value = |name: &str| line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        let percent = value("avg10")?.parse().ok()?;
        match kind {
            "some" => {
                waiting.some_percent = percent;
                waiting.some_total = Duration::from_micros(value("total")?.parse().ok()?);
            }
            "full" => waiting.full_percent = percent,
            _ => return None,
        }
    }
    Some(waiting)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_writes_is_read() {
        let text =
            "some avg10=1.25 avg60=0.10 avg300=0.00 total=2500000\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=7\n";
        let waiting = parse(text).unwrap();
        assert_eq!((waiting.some_percent, waiting.full_percent), (1.25, 0.5));
        assert_eq!(waiting.some_total, Duration::from_millis(2500));
        assert_eq!(parse("some avg10=x total=1"), None);
        assert_eq!(parse("other avg10=1 total=1"), None);
    }
}
