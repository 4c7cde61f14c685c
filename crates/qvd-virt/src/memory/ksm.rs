//! The kernel's merging of equal pages (KSM), which is the host's and not ours:
//! it is found as it is, and left as it was found.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use qvd_core::Missing;
use serde::{Deserialize, Serialize};

use super::{Merge, Merging};
use crate::{Error, error::io_error};

/// Where the kernel has it. Source: Linux `Documentation/admin-guide/mm/ksm.rst`.
pub const KSM_DIR: &str = "/sys/kernel/mm/ksm";

/// What it does to a mode of tuning that this one would contend with.
const BY_HAND: &str = "none";

/// How the host had it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Before {
    pages_to_scan: u64,
    sleep_millisecs: u64,
    /// `None` where the kernel is older than 6.7.
    advisor_mode: Option<String>,
}

/// What merging costs and what it wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MergeCost {
    /// Whether pages are looked at.
    pub running: bool,
    /// Pages looked at in each round.
    pub pages_to_scan: u64,
    /// Pause between rounds, in milliseconds.
    pub sleep_ms: u64,
    /// How often all pages were looked at since it was started.
    pub full_scans: u64,
    /// What would be in use more without it, in bytes.
    pub saved_bytes: u64,
    /// That less what the kernel's notes take; below zero it is a loss. `None`
    /// where the kernel is older than 6.1.
    pub profit_bytes: Option<i64>,
    /// Processor time that it has used since the host was started, in
    /// milliseconds, if that can be seen from here.
    pub cpu_ms: Option<u64>,
}

impl MergeCost {
    /// What a decision needs of it, if it runs.
    #[must_use]
    pub fn merging(&self) -> Option<Merging> {
        let saved = i64::try_from(self.saved_bytes).unwrap_or(i64::MAX);
        let profit_bytes = self.profit_bytes.unwrap_or(saved);
        self.running.then_some(Merging { full_scans: self.full_scans, profit_bytes })
    }
}

/// Merging of equal pages on this host, steered from here. The processes whose
/// pages may be merged allow it themselves, as [`Vm::allow_merging`] does.
///
/// [`Vm::allow_merging`]: crate::vm::Vm::allow_merging
#[derive(Debug)]
#[must_use = "what was changed stays until it is closed"]
pub struct Ksm {
    dir: PathBuf,
    note: PathBuf,
    before: Option<Before>,
    ksmd: Option<u32>,
    /// Rounds over all pages before it was started last: the kernel counts on.
    scans_before: u64,
}

impl Ksm {
    /// Takes it over from whoever steered it with the same `note`, a file that
    /// says what the host had before. `dir` is [`KSM_DIR`]. Nothing is changed
    /// before [`Ksm::apply`].
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel has none; [`Error::Invalid`] where
    /// somebody else has started it, whose business it is then.
    pub fn open(dir: &Path, note: &Path) -> Result<Self, Error> {
        let mut ksm = Self { dir: dir.to_owned(), note: note.to_owned(), before: None, ksmd: None, scans_before: 0 };
        if !dir.join("run").exists() {
            let missing = Missing::Kernel("merging of equal pages (CONFIG_KSM)".to_owned());
            return Err(Error::Unsupported { op: "merge equal pages", missing });
        }
        match fs::read(note) {
            Ok(text) => {
                let wrong = |error: serde_json::Error| io_error(format!("read `{}`", note.display()))(error);
                ksm.before = Some(serde_json::from_slice(&text).map_err(wrong)?);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if ksm.number("run")? != 0 {
                    let what = format!("merging of equal pages in `{}`", dir.display());
                    return Err(Error::Invalid { what, reason: "somebody else has started it" });
                }
            }
            Err(error) => return Err(io_error(format!("read `{}`", note.display()))(error)),
        }
        ksm.ksmd = ksmd();
        Ok(ksm)
    }

    /// Does what was decided. Pages that are equal already stay one when it stops,
    /// until they are written to.
    ///
    /// # Errors
    /// The kernel refuses. What was changed by then is put back by [`Ksm::close`].
    pub fn apply(&mut self, merge: Merge) -> Result<(), Error> {
        if !merge.run {
            return if self.number("run")? == 0 { Ok(()) } else { self.write("run", "0") };
        }
        if self.before.is_none() {
            let before = self.now()?;
            let text = serde_json::to_vec(&before).map_err(io_error("describe how pages are merged"))?;
            fs::write(&self.note, text).map_err(io_error(format!("write `{}`", self.note.display())))?;
            self.before = Some(before);
        }
        // Somebody who tunes by another rule would have the last word.
        if self.advisor_mode().is_some_and(|mode| mode != BY_HAND) {
            self.write("advisor_mode", BY_HAND)?;
        }
        if self.number("run")? != 1 {
            self.scans_before = self.number("full_scans")?;
        }
        for (file, value) in [("pages_to_scan", merge.pages_to_scan), ("sleep_millisecs", Merge::SLEEP_MS), ("run", 1)]
        {
            if self.number(file)? != u64::from(value) {
                self.write(file, &value.to_string())?;
            }
        }
        Ok(())
    }

    /// What it costs and wins at the moment.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn cost(&self) -> Result<MergeCost, Error> {
        // Each page of memory stands for `sharing` others that are not there.
        let saved = self.number("pages_sharing")?.saturating_mul(rustix::param::page_size() as u64);
        let time = self.ksmd.and_then(|pid| qvd_sys::process::cpu_time(pid).ok());
        let profit = fs::read_to_string(self.dir.join("general_profit")).ok().and_then(|text| text.trim().parse().ok());
        Ok(MergeCost {
            running: self.number("run")? == 1,
            pages_to_scan: self.number("pages_to_scan")?,
            sleep_ms: self.number("sleep_millisecs")?,
            full_scans: self.number("full_scans")?.saturating_sub(self.scans_before),
            saved_bytes: saved,
            profit_bytes: profit,
            cpu_ms: time.map(|time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        })
    }

    /// Stops it and leaves everything as it was found. Idempotent; still armed
    /// after an error.
    ///
    /// # Errors
    /// The kernel refuses, or the note cannot be removed.
    pub fn close(&mut self) -> Result<(), Error> {
        let Some(before) = self.before.clone() else { return Ok(()) };
        self.write("run", "0")?;
        self.write("pages_to_scan", &before.pages_to_scan.to_string())?;
        self.write("sleep_millisecs", &before.sleep_millisecs.to_string())?;
        if let Some(mode) = &before.advisor_mode {
            self.write("advisor_mode", mode)?;
        }
        match fs::remove_file(&self.note) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error(format!("remove `{}`", self.note.display()))(error));
            }
            _ => self.before = None,
        }
        Ok(())
    }

    fn now(&self) -> Result<Before, Error> {
        Ok(Before {
            pages_to_scan: self.number("pages_to_scan")?,
            sleep_millisecs: self.number("sleep_millisecs")?,
            advisor_mode: self.advisor_mode(),
        })
    }

    /// The word in brackets: `[none] scan-time`.
    fn advisor_mode(&self) -> Option<String> {
        let text = fs::read_to_string(self.dir.join("advisor_mode")).ok()?;
        Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
    }

    fn number(&self, file: &str) -> Result<u64, Error> {
        let path = self.dir.join(file);
        let read = fs::read_to_string(&path).and_then(|text| text.trim().parse().map_err(io::Error::other));
        read.map_err(io_error(format!("read `{}`", path.display())))
    }

    fn write(&self, file: &str, value: &str) -> Result<(), Error> {
        let path = self.dir.join(file);
        fs::write(&path, value).map_err(io_error(format!("write {value} to `{}`", path.display())))
    }
}

/// The kernel's thread that does it.
fn ksmd() -> Option<u32> {
    let is_it = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "ksmd");
    // A thread of the kernel has neither a program nor memory of its own.
    let bare = |pid: &u32| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.is_empty());
    let names = fs::read_dir("/proc").ok()?.flatten();
    let pids = names.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(is_it).find(bare)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Files as the kernel has them, of one that has merged something.
    fn kernel(run: u8) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let files = [
            ("run", run.to_string()),
            ("pages_to_scan", "100".to_owned()),
            ("sleep_millisecs", "20".to_owned()),
            ("full_scans", "4".to_owned()),
            ("pages_sharing", "256".to_owned()),
            ("general_profit", "-4096".to_owned()),
            ("advisor_mode", "none [scan-time]".to_owned()),
        ];
        for (file, value) in files {
            fs::write(dir.path().join(file), value).unwrap();
        }
        dir
    }

    const MERGE: Merge = Merge { run: true, pages_to_scan: 444, tenant: None };

    #[test]
    fn it_is_left_as_it_was_found_also_by_the_next_process() {
        let dir = kernel(0);
        let read = |file: &str| fs::read_to_string(dir.path().join(file)).unwrap();
        let note = dir.path().join("note");
        let mut first = Ksm::open(dir.path(), &note).unwrap();
        first.apply(Merge { run: false, ..MERGE }).unwrap();
        assert!(!note.exists(), "nothing was changed");
        first.apply(MERGE).unwrap();
        assert_eq!(["run", "pages_to_scan", "advisor_mode"].map(read), ["1", "444", "none"]);
        assert_eq!(first.cost().unwrap().full_scans, 0, "the four before are others'");
        // Its process is killed; the next one knows what there was before.
        drop(first);
        let mut second = Ksm::open(dir.path(), &note).unwrap();
        second.apply(Merge { pages_to_scan: 44, ..MERGE }).unwrap();
        second.close().unwrap();
        assert_eq!(
            ["run", "pages_to_scan", "sleep_millisecs", "advisor_mode"].map(read),
            ["0", "100", "20", "scan-time"]
        );
        assert!(!note.exists());
        second.close().unwrap();
    }

    #[test]
    fn what_somebody_else_has_started_is_left_alone() {
        let dir = kernel(1);
        let error = Ksm::open(dir.path(), &dir.path().join("note")).unwrap_err();
        assert!(error.to_string().contains("somebody else"), "{error}");
        let none = tempfile::tempdir().unwrap();
        let error = Ksm::open(none.path(), &none.path().join("note")).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }

    #[test]
    fn cost_and_profit_are_told_and_a_refusal_is_an_error() {
        let dir = kernel(1);
        fs::write(dir.path().join("note"), r#"{"pages_to_scan":100,"sleep_millisecs":20,"advisor_mode":null}"#)
            .unwrap();
        let mut ksm = Ksm::open(dir.path(), &dir.path().join("note")).unwrap();
        let cost = ksm.cost().unwrap();
        assert_eq!((cost.saved_bytes >> 10, cost.profit_bytes), (rustix::param::page_size() as u64 / 4, Some(-4096)));
        assert_eq!(cost.merging(), Some(Merging { full_scans: 4, profit_bytes: -4096 }));
        fs::remove_file(dir.path().join("pages_to_scan")).unwrap();
        let error = ksm.apply(MERGE).unwrap_err();
        assert!(error.to_string().contains("pages_to_scan"), "{error}");
    }
}
