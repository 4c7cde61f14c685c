//! Templates: a machine is booted once, saved where it waits, and cloned.
//!
//! A clone maps the template's memory copy-on-write. What it maps is a sealed
//! memory file that nobody can write, shrink or take away any more: removing a
//! template, or changing the files that it is kept in, does nothing to its
//! clones. Files that were changed are refused by their digest when they are
//! opened.

mod pins;
mod pool;

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::FileExt as _,
    },
    path::Path,
    time::Duration,
};

use qvd_sys::process::{memory_file, seal};
use rustix::fs::{Mode, SealFlags, fchmod, fcntl_add_seals, ftruncate};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use self::pins::{Pins, exclude};
pub use self::pool::Pool;
use super::{
    Qemu, QemuVersion, Vm, VmSpec,
    command::{GetFd, Migrate, MigrateIncoming, MigrateSetCapabilities, MigrationCapability, Stop},
    spec::{Boot, Memory},
};
use crate::{Error, error::io_error};

/// How long writing or reading a state may take. It has no memory in it: some
/// hundred KiB, milliseconds on an idle host.
const SAVED_WITHIN: Duration = Duration::from_secs(60);

const MEMORY: &str = "memory";
const STATE: &str = "state";
const ABOUT: &str = "template.json";

/// Longest description that is read, in bytes.
const MAX_ABOUT: u64 = 1 << 20;

/// A machine that runs to become a template has its memory in here.
#[derive(Debug)]
pub struct Mold {
    memory: OwnedFd,
    pins: Pins,
}

/// A machine's memory and state, to be cloned any number of times.
#[derive(Debug)]
pub struct Template {
    memory: OwnedFd,
    state: OwnedFd,
    pins: Pins,
}

/// What the files of a template are known by.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct About {
    pins: Pins,
    memory_sha256: String,
    state_sha256: String,
}

impl Qemu {
    /// Starts a machine that is to become a template of `tenant`'s: boot it to
    /// where its clones are to begin, and call [`Mold::save`].
    ///
    /// # Errors
    /// [`Error::Invalid`] names what a template cannot have; or as [`Qemu::start`].
    pub fn start_template(&self, mut spec: VmSpec, tenant: &str) -> Result<(Vm, Mold), Error> {
        exclude(&spec)?;
        let make = || -> io::Result<OwnedFd> {
            let memory = memory_file(c"qvd-template")?;
            ftruncate(&memory, spec.limits.memory.get())?;
            // QEMU is nobody on this host, and opens it anew.
            fchmod(&memory, Mode::from_raw_mode(0o666))?;
            Ok(memory)
        };
        let memory = make().map_err(io_error("make a template's memory"))?;
        spec.memory = Memory::Saved(memory.try_clone().map_err(io_error("keep a template's memory"))?);
        let mut pins = Pins::of(&spec, tenant, QemuVersion::none())?;
        let vm = self.start(spec)?;
        pins.qemu = vm.version().clone();
        Ok((vm, Mold { memory, pins }))
    }

    /// Starts a clone of `template` for `tenant`. It stands still, as the
    /// template did when it was saved: plug in what is its own, resume it, and
    /// have its init become another before anything else.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the template is not of such a machine or
    /// another's; or as [`Qemu::start`].
    pub fn start_clone(&self, mut spec: VmSpec, template: &Template, tenant: &str) -> Result<Vm, Error> {
        exclude(&spec)?;
        let id = spec.id;
        spec.memory = Memory::Cloned(template.memory.try_clone().map_err(io_error("keep a template's memory"))?);
        spec.incoming = true;
        let mut pins = Pins::of(&spec, tenant, template.pins.qemu.clone())?;
        // What it boots was read long ago; QEMU would keep a copy for each.
        if let Boot::Kernel { kernel, .. } = &mut spec.boot {
            *kernel = stub(kernel)?;
        }
        let refuse = |pins: &Pins| {
            template
                .pins
                .differs(pins)
                .map_or(Ok(()), |reason| Err(Error::Invalid { what: format!("the template for desktop {id}"), reason }))
        };
        refuse(&pins)?;
        let mut vm = self.start(spec)?;
        pins.qemu = vm.version().clone();
        let loaded = refuse(&pins).and_then(|()| vm.load(&template.state));
        match loaded {
            Ok(()) => Ok(vm),
            Err(error) => {
                vm.close()?;
                Err(error)
            }
        }
    }
}

/// The part of a kernel that QEMU looks at to see what it is.
///
/// Source: Linux `Documentation/arch/x86/boot.rst`: at 0x1f1 the length of the
/// setup code in sectors, 0 meaning 4, the boot sector not counted.
fn stub(kernel: &OwnedFd) -> Result<OwnedFd, Error> {
    let make = || {
        let file = File::from(kernel.try_clone()?);
        let mut sectors = [0];
        file.read_exact_at(&mut sectors, 0x1f1)?;
        let sectors = if sectors == [0] { 4 } else { usize::from(sectors[0]) };
        let mut setup = vec![0; (sectors + 1) * 512 + 4096];
        file.read_exact_at(&mut setup, 0)?;
        seal(c"qvd-kernel-setup", &setup)
    };
    make().map_err(io_error("cut a kernel's setup code"))
}

impl Mold {
    /// Saves what `vm` is, ends it, and has a template.
    ///
    /// # Errors
    /// QEMU could not write its state; the machine is gone all the same.
    pub fn save(self, mut vm: Vm) -> Result<Template, Error> {
        let state = memory_file(c"qvd-template-state").map_err(io_error("make a template's state"))?;
        let saved = vm.save(&state);
        vm.close()?;
        saved?;
        let template = Template { memory: self.memory, state, pins: self.pins };
        template.seal()?;
        Ok(template)
    }
}

impl Template {
    /// Nobody changes it from here on, QEMU neither.
    fn seal(&self) -> Result<(), Error> {
        let all = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        for file in [&self.memory, &self.state] {
            fcntl_add_seals(file.as_fd(), all).map_err(io_error("seal a template"))?;
        }
        Ok(())
    }

    /// Writes it into the empty directory `dir`, which only root can enter.
    ///
    /// # Errors
    /// It cannot be written; what was is removed.
    pub fn keep(&self, dir: &Path) -> Result<(), Error> {
        let write = || -> io::Result<()> {
            let memory_sha256 = copy(&self.memory, &mut File::create_new(dir.join(MEMORY))?)?;
            let state_sha256 = copy(&self.state, &mut File::create_new(dir.join(STATE))?)?;
            let about = About { pins: self.pins.clone(), memory_sha256, state_sha256 };
            // Last: a template without it is none.
            File::create_new(dir.join(ABOUT))?.write_all(&serde_json::to_vec(&about)?)
        };
        write().map_err(|error| {
            for name in [ABOUT, STATE, MEMORY] {
                // What was not made yet is not there.
                let _gone = fs::remove_file(dir.join(name));
            }
            io_error(format!("keep a template in `{}`", dir.display()))(error)
        })
    }

    /// Reads a template that was kept in `dir`, into memory that nobody can
    /// change any more.
    ///
    /// # Errors
    /// [`Error::Invalid`] when its files are not as they were written.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let op = || format!("open the template in `{}`", dir.display());
        let refuse = |reason| Error::Invalid { what: format!("the template in `{}`", dir.display()), reason };
        let read = |name: &str| File::open(dir.join(name));
        let mut about = Vec::new();
        let file = read(ABOUT).map_err(io_error(op()))?;
        file.take(MAX_ABOUT).read_to_end(&mut about).map_err(io_error(op()))?;
        let about: About = serde_json::from_slice(&about).map_err(|_| refuse("its description cannot be read"))?;
        let load = |name: &str, expected: &str| {
            let from = OwnedFd::from(read(name).map_err(io_error(op()))?);
            let to = memory_file(c"qvd-template").map_err(io_error(op()))?;
            fchmod(&to, Mode::from_raw_mode(0o666)).map_err(io_error(op()))?;
            let mut to = File::from(to);
            let found = copy(&from, &mut to).map_err(io_error(op()))?;
            if found != expected {
                return Err(refuse("its files are not as they were written: their digest is another"));
            }
            Ok(OwnedFd::from(to))
        };
        let memory = load(MEMORY, &about.memory_sha256)?;
        let state = load(STATE, &about.state_sha256)?;
        let template = Self { memory, state, pins: about.pins };
        template.seal()?;
        Ok(template)
    }

    /// How much of the host's memory it takes, whatever its clones do.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn memory_used(&self) -> Result<qvd_core::Bytes, Error> {
        let about = rustix::fs::fstat(&self.memory).map_err(io_error("look at a template"))?;
        // Source: stat(2): blocks of 512 bytes.
        Ok(qvd_core::Bytes::new(about.st_blocks.cast_unsigned() * 512))
    }
}

/// Copies all of `from` but its zeroes, and says the digest of all of it.
fn copy(from: &OwnedFd, to: &mut File) -> io::Result<String> {
    let mut from = File::from(from.try_clone()?);
    from.seek(SeekFrom::Start(0))?;
    let size = from.metadata()?.len();
    to.set_len(size)?;
    let (mut digest, mut at) = (Sha256::new(), 0);
    let mut piece = vec![0; 1 << 16];
    loop {
        let got = from.read(&mut piece)?;
        let bytes = piece.get(..got).unwrap_or_default();
        if bytes.is_empty() {
            break;
        }
        digest.update(bytes);
        // Of a memory page at a time: most of a guest's memory is empty.
        for (page, content) in (at..).step_by(4096).zip(bytes.chunks(4096)) {
            if content.iter().any(|&byte| byte != 0) {
                to.write_all_at(content, page)?;
            }
        }
        at += got as u64;
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

impl Vm {
    /// Has QEMU keep memory that is in a file out of its state, and tell how
    /// it gets on.
    fn prepare_state(&mut self, name: &'static str, file: &OwnedFd) -> Result<(), Error> {
        let on = |capability| MigrationCapability { capability, state: true };
        self.call(&MigrateSetCapabilities { capabilities: vec![on("x-ignore-shared"), on("events")] })?;
        self.call_with(&GetFd { fdname: name }, &[file.as_fd()]).map(drop)
    }

    fn save(&mut self, to: &OwnedFd) -> Result<(), Error> {
        self.call(&Stop)?;
        self.prepare_state("save", to)?;
        self.call(&Migrate { uri: "fd:save" })?;
        self.migrated("write its state")
    }

    fn load(&mut self, state: &OwnedFd) -> Result<(), Error> {
        // With an offset of its own: others read the same file.
        let from = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(state));
        let own = OwnedFd::from(File::open(from).map_err(io_error("open a template's state"))?);
        self.prepare_state("load", &own)?;
        self.call(&MigrateIncoming { uri: "fd:load" })?;
        self.migrated("read its template's state")
    }

    fn migrated(&mut self, what: &str) -> Result<(), Error> {
        let said = |status: &str| (status == "completed" || status == "failed").then(|| status == "completed");
        let outcome = self.await_event(SAVED_WITHIN, |event| {
            if event.name != "MIGRATION" {
                return None;
            }
            said(event.data.get("status")?.as_str()?)
        })?;
        match outcome {
            Some(true) => Ok(()),
            Some(false) => Err(Error::Hypervisor { id: self.id(), said: format!("cannot {what}: {}", self.words()) }),
            None => Err(Error::Timeout { op: what.to_owned(), limit: SAVED_WITHIN }),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{
        pins::tests::{fd, spec},
        *,
    };

    fn file(bytes: &[u8]) -> OwnedFd {
        let mut file = File::from(memory_file(c"test").unwrap());
        file.write_all(bytes).unwrap();
        file.into()
    }

    fn template(memory: &[u8]) -> Template {
        let mut saved = spec(1);
        saved.memory = Memory::Saved(fd());
        let pins = Pins::of(&saved, "school", QemuVersion::none()).unwrap();
        Template { memory: file(memory), state: file(b"state"), pins }
    }

    #[test]
    fn kept_files_come_back_sealed_and_are_refused_once_altered() {
        let dir = tempfile::tempdir().unwrap();
        let mut memory = vec![0; 40_000];
        memory[20_000] = 7;
        template(&memory).keep(dir.path()).unwrap();
        let opened = Template::open(dir.path()).unwrap();
        let mut back = vec![1; memory.len()];
        let file = File::from(opened.memory.try_clone().unwrap());
        file.read_exact_at(&mut back, 0).unwrap();
        assert_eq!(back, memory);
        assert!(file.write_all_at(b"x", 0).is_err(), "nobody writes to it");

        for name in [MEMORY, STATE] {
            let file = File::options().read(true).write(true).open(dir.path().join(name)).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, 3).unwrap();
            file.write_all_at(&[byte[0] ^ 1], 3).unwrap();
            let error = Template::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains("digest"), "{error}");
            file.write_all_at(&byte, 3).unwrap();
        }
        Template::open(dir.path()).unwrap();
        fs::write(dir.path().join(ABOUT), "{}").unwrap();
        assert!(Template::open(dir.path()).unwrap_err().to_string().contains("description"));
    }
}
