//! Holds everybody inside a machine, so that an image can be made of it.

use std::{
    ffi::{CStr, CString},
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{Dir, Mode, OFlags},
    io::Errno,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
};

use crate::stats;

/// Where whoever is in no group of its own is held.
const HELD: &CStr = c"qvd-held";
/// How long programs may take to stand still: one that waits for a disk first
/// gets its answer.
const STILL_WITHIN: Duration = Duration::from_secs(10);
/// Between two looks whether they do.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// Most of a list of processes that is read, in bytes: more than there can be.
const LIST_MAX: u64 = 64 << 20;

/// Everybody inside but the init, what carries its words, and what is started from
/// now on. They go on when this is dropped, and notice nothing: a signal would be
/// seen by shells, which take a job that was stopped for one that they have to
/// tell of.
#[derive(Debug)]
pub(crate) struct Still {
    /// The top of the kernel's groups; nobody else sees this mount.
    top: OwnedFd,
    /// Groups that went before this.
    held: Vec<CString>,
}

impl Still {
    /// Holds everybody but `spared` and the init.
    ///
    /// # Errors
    /// The kernel has no such groups, or somebody did not stand still in time. All go on.
    pub(crate) fn begin(spared: &[u32]) -> io::Result<Self> {
        let context = fsopen("cgroup2", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&context)?;
        let top = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        match rustix::fs::mkdirat(&top, HELD, Mode::RWXU) {
            Err(error) if error != Errno::EXIST => return Err(error.into()),
            _ => {}
        }
        let mut still = Self { top, held: Vec::new() };
        let until = Instant::now() + STILL_WITHIN;
        // Whoever is born meanwhile is where its parent is. Those that are there make
        // no more, so this comes to an end.
        loop {
            let moved = still.gather(spared)?;
            if !still.hold()? && !moved {
                break;
            }
            in_time(until, || "the programs did not come to an end of new ones".to_owned())?;
        }
        for group in &still.held {
            while !still.is_still(group)? {
                in_time(until, || {
                    let who = still.read(group, "cgroup.procs").unwrap_or_default();
                    format!(
                        "one of the processes {} did not stand still",
                        who.split_ascii_whitespace().collect::<Vec<_>>().join(" ")
                    )
                })?;
                thread::sleep(LOOK_AGAIN);
            }
        }
        Ok(still)
    }

    fn is_still(&self, group: &CStr) -> io::Result<bool> {
        match self.read(group, "cgroup.events") {
            Ok(text) => Ok(text.lines().any(|line| line == "frozen 1")),
            Err(error) if is_gone(&error) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Puts whoever is at the top where it can be held; says whether there was anybody.
    fn gather(&self, spared: &[u32]) -> io::Result<bool> {
        let mut moved = false;
        for pid in self.read(c".", "cgroup.procs")?.lines().filter_map(|line| line.parse().ok()) {
            if pid == std::process::id() || spared.contains(&pid) || stats::is_kernels(pid) {
                continue;
            }
            match self.write(HELD, "cgroup.procs", &pid.to_string()) {
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
                Ok(()) => moved = true,
            }
        }
        Ok(moved)
    }

    /// Holds all groups that are not held yet; says whether there were any.
    fn hold(&mut self) -> io::Result<bool> {
        let mut fresh = false;
        let top =
            rustix::fs::openat(&self.top, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        for entry in Dir::new(top)? {
            let entry = entry?;
            let name = entry.file_name();
            if !entry.file_type().is_dir()
                || name == c"."
                || name == c".."
                || self.held.iter().any(|held| **held == *name)
            {
                continue;
            }
            match self.read(name, "cgroup.freeze") {
                // Somebody inside holds it already, and will let it go.
                Ok(text) if text.trim() == "1" => continue,
                Ok(_) => {}
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(error),
            }
            self.held.push(name.to_owned());
            match self.write(name, "cgroup.freeze", "1") {
                Err(error) if !is_gone(&error) => return Err(error),
                _ => fresh = true,
            }
        }
        Ok(fresh)
    }

    fn open(&self, group: &CStr, file: &str, flags: OFlags) -> io::Result<File> {
        let path = format!("{}/{file}", group.to_string_lossy());
        Ok(rustix::fs::openat(&self.top, path, flags | OFlags::CLOEXEC, Mode::empty())?.into())
    }

    fn read(&self, group: &CStr, file: &str) -> io::Result<String> {
        let mut text = String::new();
        self.open(group, file, OFlags::RDONLY)?.take(LIST_MAX).read_to_string(&mut text)?;
        Ok(text)
    }

    fn write(&self, group: &CStr, file: &str, text: &str) -> io::Result<()> {
        self.open(group, file, OFlags::WRONLY)?.write_all(text.as_bytes())
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        for group in &self.held {
            // It may be gone: whoever was in it has been killed.
            if let Err(error) = self.write(group, "cgroup.freeze", "0") {
                let _written = writeln!(io::stderr(), "cannot let {group:?} go on: {error}");
            }
        }
    }
}

fn in_time(until: Instant, what: impl FnOnce() -> String) -> io::Result<()> {
    let late = || io::Error::new(io::ErrorKind::TimedOut, format!("{} within {STILL_WITHIN:?}", what()));
    if Instant::now() < until { Ok(()) } else { Err(late()) }
}

fn is_gone(error: &io::Error) -> bool {
    let gone = [Errno::SRCH, Errno::NOENT, Errno::NODEV];
    gone.iter().any(|gone| error.raw_os_error() == Some(gone.raw_os_error()))
}
