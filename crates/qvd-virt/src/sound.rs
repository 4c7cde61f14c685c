//! Whether somebody may be listening: which processes hold a sound device.

use std::{fs, io, path::Path};

/// Descriptors of one process looked at; with more, it counts as holding one.
const DESCRIPTORS_MAX: usize = 4096;

/// Whether process `pid` has a stream of a sound device open, for playing or
/// for recording. Sound servers close theirs seconds after the last sound.
///
/// Only names are read and nothing is opened: a descriptor of a hostile process
/// may lead to a file system of its own that never answers. The name is that
/// process's own choice, so it can keep itself awake, which working can too.
///
/// # Errors
/// The kernel does not say. A process that has ended holds none.
pub(crate) fn is_used_by(pid: u32) -> io::Result<bool> {
    any_is_stream(Path::new(&format!("/proc/{pid}/fd")))
}

/// Whether one of the links in a directory of descriptors names a stream.
fn any_is_stream(descriptors: &Path) -> io::Result<bool> {
    let entries = match fs::read_dir(descriptors) {
        Err(error) if gone(&error) => return Ok(false),
        entries => entries?,
    };
    for (count, entry) in entries.enumerate() {
        if count >= DESCRIPTORS_MAX {
            return Ok(true);
        }
        let target = match entry.and_then(|entry| fs::read_link(entry.path())) {
            Err(error) if gone(&error) => continue,
            target => target?,
        };
        if is_stream(target.as_os_str().as_encoded_bytes()) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Source: Linux `sound/core/init.c` (`/dev/snd/`) and `sound/core/pcm.c`
/// (`pcmC%iD%i%c`); `sound/core/sound_oss.c` for `/dev/dsp`.
fn is_stream(target: &[u8]) -> bool {
    target.starts_with(b"/dev/snd/pcm") || target.starts_with(b"/dev/dsp")
}

/// Whether an error says that the process or the descriptor is no more.
fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_told_from_mixers_and_from_files() {
        for stream in ["/dev/snd/pcmC0D0p", "/dev/snd/pcmC1D0c", "/dev/dsp", "/dev/dsp1"] {
            assert!(is_stream(stream.as_bytes()), "{stream}");
        }
        // A panel with a volume control holds `controlC0` for as long as it runs.
        for other in ["/dev/snd/controlC0", "/dev/snd/timer", "/dev/null", "socket:[1]", "/home/dev/snd/pcmC0D0p"] {
            assert!(!is_stream(other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn one_stream_among_other_descriptors_is_enough() {
        let descriptors = tempfile::tempdir().unwrap();
        let link = |to: &str, number: u32| {
            std::os::unix::fs::symlink(to, descriptors.path().join(number.to_string())).unwrap();
        };
        link("/dev/null", 0);
        link("/dev/snd/controlC0", 3);
        assert!(!any_is_stream(descriptors.path()).unwrap());
        link("/dev/snd/pcmC0D0p", 4);
        assert!(any_is_stream(descriptors.path()).unwrap());
    }

    #[test]
    fn a_process_without_sound_holds_none_and_one_that_is_gone_neither() {
        assert!(!is_used_by(std::process::id()).unwrap());
        // Source: Linux `include/linux/threads.h`: no process has this number.
        assert!(!is_used_by(1 << 30).unwrap());
    }
}
