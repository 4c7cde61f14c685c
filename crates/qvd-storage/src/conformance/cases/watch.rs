//! Who is told of changes, and who waits for whom.

use std::mem::MaybeUninit;

use rustix::{
    fs::{FlockOperation, OFlags, flock, inotify},
    io::Errno,
};

use super::{
    super::{
        bench::Bench,
        report::{Checked, Failure, Seen, Step, hold, refused},
    },
    Listed,
};
use crate::Deviation;

pub(super) const CASES: &[Listed] =
    &[("notifications", Some(Deviation::NoNotify), notifications), ("locks", None, locks)];

/// What was told so far: each event with the name in it, if it has one.
fn events(watch: &std::os::fd::OwnedFd) -> Result<Vec<(inotify::ReadFlags, String)>, Failure> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(watch, &mut buffer);
    let mut found = Vec::new();
    loop {
        match reader.next() {
            Ok(event) => {
                let name = event.file_name().map(|name| name.to_string_lossy().into_owned());
                found.push((event.events(), name.unwrap_or_default()));
            }
            // A local change is told before the call that made it returns.
            Err(Errno::AGAIN) => return Ok(found),
            Err(error) => return Err(error).step("events can be read"),
        }
    }
}

fn notifications(bench: &Bench) -> Checked {
    use inotify::{ReadFlags as Told, WatchFlags as Watch};
    bench.with_tree(|tree| {
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        let watch = inotify::init(flags).step("a watch can be made")?;
        let directory = Watch::CREATE | Watch::DELETE | Watch::MOVED_FROM | Watch::MOVED_TO | Watch::CLOSE_WRITE;
        inotify::add_watch(&watch, tree.path("var/dir"), directory).step("a directory of the base can be watched")?;
        inotify::add_watch(&watch, tree.path("var/file"), Watch::MODIFY | Watch::ATTRIB)
            .step("a file of the base can be watched")?;
        tree.write("var/dir/new", "x")?;
        tree.write("var/dir/a", "changed")?;
        tree.rename("var/dir/new", "var/dir/renamed")?;
        tree.remove("var/dir/b")?;
        tree.write("var/file", "changed")?;
        tree.chmod("var/file", 0o600)?;
        let told = events(&watch)?;
        if told.is_empty() {
            return Ok(Seen::Deviates("nothing is told of six changes".to_owned()));
        }
        for (event, name) in [
            (Told::CREATE, "new"),
            (Told::CLOSE_WRITE, "new"),
            (Told::CLOSE_WRITE, "a"),
            (Told::MOVED_FROM, "new"),
            (Told::MOVED_TO, "renamed"),
            (Told::DELETE, "b"),
            (Told::MODIFY, ""),
            (Told::ATTRIB, ""),
        ] {
            let found = told.iter().any(|(kind, about)| kind.contains(event) && about == name);
            hold(format!("{event:?} of {name:?} is told"), found, format!("{told:?}"))?;
        }
        Ok(Seen::Plain)
    })
}

fn locks(bench: &Bench) -> Checked {
    bench.with_tree(|tree| {
        const BUSY: [Errno; 1] = [Errno::WOULDBLOCK];
        let try_lock = FlockOperation::NonBlockingLockExclusive;
        let first = tree.open("var/file", OFlags::RDONLY)?;
        flock(&first, try_lock).step("a file of the base can be locked")?;
        let second = tree.open("var/file", OFlags::RDONLY)?;
        refused("a second lock", flock(&second, try_lock), &BUSY)?;
        // Now it is written to: it has to be the same file for those who lock.
        let writer = tree.open("var/file", OFlags::RDWR)?;
        refused("a lock by who writes", flock(&writer, try_lock), &BUSY)?;
        drop(first);
        flock(&writer, try_lock).step("it can be locked once the lock is given up")?;
        refused("a second lock", flock(&second, try_lock), &BUSY)?;
        let directory = tree.open("var/dir", OFlags::RDONLY)?;
        flock(&directory, FlockOperation::NonBlockingLockShared).step("a directory can be locked")?;
        let other = tree.open("var/dir", OFlags::RDONLY)?;
        refused("an exclusive lock beside a shared one", flock(&other, try_lock), &BUSY)?;
        Ok(Seen::Plain)
    })
}
