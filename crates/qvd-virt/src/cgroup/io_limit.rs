//! Limits of what is read from and written to disks.

use std::{fs, io, path::Path};

use qvd_core::Bytes;

/// Files that hold such limits, of version 2 and of version 1.
pub(super) const FILES: [&str; 3] = ["io.max", READ_V1, WRITE_V1];

const READ_V1: &str = "blkio.throttle.read_bps_device";
const WRITE_V1: &str = "blkio.throttle.write_bps_device";

/// Block devices that are no disks of their own: what they do is done by, or to,
/// others, or to memory.
const NO_DISKS: [&str; 3] = ["loop", "ram", "zram"];

/// The disks of the host, as `major:minor`.
pub(super) fn disks(sys_block: &Path) -> io::Result<Vec<String>> {
    let mut disks = Vec::new();
    let entries = match fs::read_dir(sys_block) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(disks),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        // A drive without a medium has no size.
        let read = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default().trim().to_owned();
        let (number, size) = (read("dev"), read("size"));
        if !number.is_empty() && size != "0" && !NO_DISKS.iter().any(|other| name.starts_with(other)) {
            disks.push(number);
        }
    }
    disks.sort();
    Ok(disks)
}

/// Which files get which lines, one at a time.
///
/// Source: Linux `Documentation/admin-guide/cgroup-v2.rst`, `io.max`, and
/// `cgroup-v1/blkio-controller.rst`.
pub(super) fn files(unified: bool, limit: Option<Bytes>, disks: &[String]) -> Vec<(&'static str, String, bool)> {
    let Some(limit) = limit.map(Bytes::get) else { return Vec::new() };
    let lines = |disk: &String| {
        if unified {
            vec![("io.max", format!("{disk} rbps={limit} wbps={limit}"), false)]
        } else {
            vec![(READ_V1, format!("{disk} {limit}"), false), (WRITE_V1, format!("{disk} {limit}"), false)]
        }
    };
    disks.iter().flat_map(lines).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_what_has_a_size_and_is_no_part_of_another() {
        let sys = tempfile::tempdir().unwrap();
        for (name, number, size) in [
            ("sda", "8:0", "100"),
            ("nvme0n1", "259:0", "100"),
            ("loop0", "7:0", "100"),
            ("zram0", "252:0", "100"),
            ("sr0", "11:0", "0"),
        ] {
            fs::create_dir(sys.path().join(name)).unwrap();
            fs::write(sys.path().join(name).join("dev"), format!("{number}\n")).unwrap();
            fs::write(sys.path().join(name).join("size"), format!("{size}\n")).unwrap();
        }
        let disks = disks(sys.path()).unwrap();
        assert_eq!(disks, ["259:0", "8:0"]);
        assert_eq!(super::disks(Path::new("/nonexistent")).unwrap(), Vec::<String>::new());
        let mib = Some(Bytes::mib(1));
        let v2 = files(true, mib, &disks);
        assert_eq!(v2[1], ("io.max", "8:0 rbps=1048576 wbps=1048576".to_owned(), false));
        assert_eq!(files(false, mib, &disks).len(), 4);
        assert_eq!(files(true, None, &disks), []);
    }
}
