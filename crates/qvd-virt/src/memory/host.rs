//! What the kernel says of a host's memory.

use std::{fs, io, path::Path};

use qvd_core::Bytes;

use super::HostState;
use crate::{Error, error::io_error};

impl HostState {
    /// Reads it from `proc`, where that file system is mounted. Pressure counts
    /// as none where the kernel does not tell it (before 4.20, or `psi=0`);
    /// nothing is merged yet, and promises are not limited.
    ///
    /// # Errors
    /// `meminfo` cannot be read, or lacks a line.
    pub fn read(proc: &Path) -> Result<Self, Error> {
        let path = proc.join("meminfo");
        let op = || format!("read `{}`", path.display());
        let text = fs::read_to_string(&path).map_err(io_error(op()))?;
        let line = |name: &str| {
            let kib =
                text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse().ok());
            let bytes = kib.and_then(|kib: u64| kib.checked_mul(1024)).map(Bytes::new);
            bytes.ok_or_else(|| {
                io_error(op())(io::Error::new(io::ErrorKind::InvalidData, format!("it has no `{name}`")))
            })
        };
        Ok(Self {
            total: line("MemTotal:")?,
            available: line("MemAvailable:")?,
            swap: line("SwapFree:")?,
            promises: None,
            pressure_percent: pressure(&proc.join("pressure/memory")).unwrap_or(0),
            merging: None,
            merging_tenant: None,
        })
    }
}

/// Source: Linux `Documentation/accounting/psi.rst`.
fn pressure(path: &Path) -> Option<u8> {
    let text = fs::read_to_string(path).ok()?;
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let average = some.split(' ').find_map(|word| word.strip_prefix("avg10="))?;
    // Up to 100.00; the part of a hundredth does not matter.
    average.split('.').next()?.parse().ok().map(|percent: u8| percent.min(100))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MEMINFO: &str =
        "MemTotal:       24683520 kB\nMemFree:        1000 kB\nMemAvailable:    2048 kB\nSwapFree:              0 kB\n";

    #[test]
    fn what_the_kernel_says_is_read_and_what_it_does_not_say_is_an_error() {
        let proc = tempfile::tempdir().unwrap();
        let error = HostState::read(proc.path()).unwrap_err();
        assert!(error.to_string().contains("meminfo"), "{error}");
        fs::write(proc.path().join("meminfo"), MEMINFO).unwrap();
        let calm = HostState::read(proc.path()).unwrap();
        assert_eq!(
            (calm.total, calm.available, calm.swap),
            (Bytes::new(24_683_520 << 10), Bytes::mib(2), Bytes::mib(0))
        );
        assert_eq!(calm.pressure_percent, 0, "a kernel without pressure");
        fs::create_dir(proc.path().join("pressure")).unwrap();
        let pressure =
            "some avg10=12.87 avg60=3.00 avg300=0.00 total=5\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=0\n";
        fs::write(proc.path().join("pressure/memory"), pressure).unwrap();
        assert_eq!(HostState::read(proc.path()).unwrap().pressure_percent, 12);
        fs::write(proc.path().join("meminfo"), "MemTotal: 1 kB\nMemAvailable: lots kB\n").unwrap();
        let error = HostState::read(proc.path()).unwrap_err();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("MemAvailable"), "{error:?}");
    }

    #[test]
    fn this_host_says_it() {
        let host = HostState::read(Path::new("/proc")).unwrap();
        assert!(host.total > host.available && host.available.get() > 0, "{host:?}");
    }
}
