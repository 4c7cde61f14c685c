//! Whether this host's KVM runs what a desktop is, found by running it.
//!
//! The device alone says nothing: some hosts offer it, run a few instructions
//! of a tiny guest, and hang an ordinary Linux. So an ordinary Linux is booted,
//! as a desktop's machine would be, up to its first process, within a deadline.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use qvd_core::{Bytes, Missing, Support};
use serde::{Deserialize, Serialize};

use super::{Accel, Qemu, VmSpec};
use crate::{Error, error::io_error};

/// How long the trial may take. A host that can takes a fraction of it.
const TRIED_WITHIN: Duration = Duration::from_secs(3);

const DEVICE: &str = "/dev/kvm";

/// What is known of this host's KVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kvm")]
#[non_exhaustive]
pub enum Kvm {
    /// An ordinary Linux runs.
    Usable {
        /// From its start until its first process talked, in milliseconds.
        boot_ms: u64,
    },
    /// The device is there, and an ordinary Linux does not run.
    Unusable {
        /// What happened instead.
        reason: String,
    },
    /// There is no such device.
    Absent,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AccelChoice {
    /// The best that works.
    #[default]
    Auto,
    /// The host's processor and nothing else.
    Kvm,
    /// Emulation.
    Tcg,
}

impl AccelChoice {
    /// What to run with, and what to warn of.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when KVM is required and not usable, with the reason.
    pub fn choose(self, kvm: &Kvm) -> Result<(Accel, Option<String>), Error> {
        match (self, kvm.missing()) {
            (Self::Tcg, _) => Ok((Accel::Tcg, None)),
            (Self::Auto | Self::Kvm, None) => Ok((Accel::Kvm, None)),
            (Self::Auto, Some(missing)) => {
                let cost = "machines are emulated: ten times slower or worse, with some 60 MiB more memory for each";
                Ok((Accel::Tcg, Some(format!("{missing}; {cost}"))))
            }
            (Self::Kvm, Some(missing)) => Err(Error::Unsupported { op: "run a virtual machine by KVM", missing }),
        }
    }
}

impl Kvm {
    /// What is missing, if something is.
    #[must_use]
    pub fn missing(&self) -> Option<Missing> {
        match self {
            Self::Usable { .. } => None,
            Self::Unusable { reason } => Some(Missing::Device(format!("{DEVICE} (present, but {reason})"))),
            Self::Absent => Some(Missing::Device(format!("{DEVICE} (absent)"))),
        }
    }

    /// Whether there is a device at all, which does not say that it works.
    #[must_use]
    pub fn is_present() -> bool {
        Path::new(DEVICE).exists()
    }

    /// As an answer about the host.
    #[must_use]
    pub fn support(&self) -> Support {
        self.missing().map_or(Support::Yes, Support::No)
    }

    /// Tries it by booting `spec`, a machine of our own kernel, up to the point
    /// where its init opens the port to the host. Nothing is left of it.
    ///
    /// # Errors
    /// It could not be tried, for a reason that says nothing about KVM.
    pub fn try_out(qemu: &Qemu, mut spec: VmSpec) -> Result<Self, Error> {
        if !Self::is_present() {
            return Ok(Self::Absent);
        }
        spec.accel = Accel::Kvm;
        spec.limits.memory = Bytes::mib(128);
        let began = Instant::now();
        let mut vm = match qemu.start(spec) {
            Ok(vm) => vm,
            Err(Error::Hypervisor { said, .. }) => return Ok(Self::Unusable { reason: format!("QEMU says: {said}") }),
            Err(error) => return Err(error),
        };
        let tried = vm.resume().and_then(|()| {
            let left = TRIED_WITHIN.saturating_sub(began.elapsed());
            vm.await_event(left, |event| {
                let open = event.data.get("open").and_then(serde_json::Value::as_bool);
                let ended = matches!(event.name.as_str(), "SHUTDOWN" | "GUEST_PANICKED" | "INTERNAL_ERROR" | "RESET");
                (event.name == "VSERPORT_CHANGE" && open == Some(true)).then_some(true).or(ended.then_some(false))
            })
        });
        let boot_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let words = vm.words();
        vm.close()?;
        let unusable = |reason: String| Ok(Self::Unusable { reason });
        match tried {
            Ok(Some(true)) => Ok(Self::Usable { boot_ms }),
            Ok(Some(false)) => unusable("an ordinary Linux ends before its first process runs".to_owned()),
            Ok(None) => unusable(format!("an ordinary Linux hangs: nothing came of it within {TRIED_WITHIN:?}")),
            Err(Error::Hypervisor { said, .. }) => unusable(format!("QEMU says: {said}")),
            // It ended while it was told to go on.
            Err(Error::Qmp { .. }) if !words.is_empty() => unusable(format!("QEMU says: {words}")),
            Err(error) => Err(error),
        }
    }
}

/// Where an answer is remembered until the host is booted again.
#[derive(Debug, Clone)]
pub struct KvmMemory {
    path: PathBuf,
}

/// An answer, and what it holds for.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Remembered {
    boot_id: String,
    qemu: (u64, i64),
    answer: Kvm,
}

impl KvmMemory {
    /// In this file, whose directory is there and root's.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The answer for this boot of the host and this QEMU, if there is one.
    #[must_use]
    pub fn recall(&self, qemu: &Qemu) -> Option<Kvm> {
        let remembered: Remembered = serde_json::from_slice(&fs::read(&self.path).ok()?).ok()?;
        let (boot_id, version) = now(qemu).ok()?;
        // A device that came or went since then is another question.
        let same_device = (remembered.answer == Kvm::Absent) != Path::new(DEVICE).exists();
        let same = remembered.boot_id == boot_id && remembered.qemu == version && same_device;
        same.then_some(remembered.answer)
    }

    /// The answer as it is remembered, or else what `spec` shows, which is
    /// remembered then.
    ///
    /// # Errors
    /// As [`Kvm::try_out`]; or it cannot be written.
    pub fn answer(&self, qemu: &Qemu, spec: impl FnOnce() -> Result<VmSpec, Error>) -> Result<Kvm, Error> {
        if let Some(answer) = self.recall(qemu) {
            return Ok(answer);
        }
        let answer = Kvm::try_out(qemu, spec()?)?;
        let write = || {
            let (boot_id, version) = now(qemu)?;
            let remembered = Remembered { boot_id, qemu: version, answer: answer.clone() };
            let new = self.path.with_extension("new");
            fs::File::create(&new)?.write_all(&serde_json::to_vec(&remembered)?)?;
            fs::rename(&new, &self.path)
        };
        write().map_err(io_error(format!("write `{}`", self.path.display())))?;
        Ok(answer)
    }
}

/// This boot of the host, and the QEMU by length and change.
fn now(qemu: &Qemu) -> io::Result<(String, (u64, i64))> {
    let about = fs::metadata(qemu.binary())?;
    Ok((qvd_sys::process::boot_id()?, (about.len(), about.mtime())))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_requirement_is_refused_with_the_reason_and_a_wish_is_not() {
        let hangs = Kvm::Unusable { reason: "an ordinary Linux hangs".to_owned() };
        let error = AccelChoice::Kvm.choose(&hangs).unwrap_err().to_string();
        assert!(error.contains("present, but an ordinary Linux hangs"), "{error}");
        let (accel, warning) = AccelChoice::Auto.choose(&hangs).unwrap();
        assert_eq!(accel, Accel::Tcg);
        assert!(warning.unwrap().contains("ten times slower"));
        assert_eq!(AccelChoice::Auto.choose(&Kvm::Usable { boot_ms: 300 }).unwrap(), (Accel::Kvm, None));
        assert_eq!(AccelChoice::Tcg.choose(&Kvm::Absent).unwrap(), (Accel::Tcg, None));
        assert!(AccelChoice::Kvm.choose(&Kvm::Absent).is_err());
    }
}
