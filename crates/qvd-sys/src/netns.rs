//! Network namespaces, entered only on threads made for it.
//!
//! A network namespace belongs to a thread, not to a process. Whoever changes
//! that of a thread that others use later (a pool's, a test runner's) has
//! moved them too; so nothing here changes the caller's.

use std::{
    fs::File,
    io,
    os::fd::{BorrowedFd, OwnedFd},
    panic, thread,
};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

/// Runs `f` inside `netns`, on a thread that ends with it: no early return or
/// panic can leave the caller's thread in the wrong place.
///
/// # Errors
/// No thread could be made, or this process may not enter `netns`.
pub fn in_netns<T: Send>(netns: BorrowedFd<'_>, f: impl FnOnce() -> T + Send) -> io::Result<T> {
    on_a_thread(|| {
        move_into_link_name_space(netns, Some(LinkNameSpaceType::Network))?;
        Ok(f())
    })
}

/// The network namespace of the calling thread.
///
/// # Errors
/// `/proc` is not mounted, or no descriptor is left.
pub fn current() -> io::Result<OwnedFd> {
    Ok(File::open("/proc/thread-self/ns/net")?.into())
}

/// Makes a network namespace that lives as long as the descriptor, or whatever
/// is put into it. Its loopback interface is down.
///
/// # Errors
/// This process may not make namespaces, or the kernel has none left.
pub fn create() -> io::Result<OwnedFd> {
    on_a_thread(|| {
        // SAFETY: what `unshare` can break is the sharing of descriptors and
        // memory between threads; NEWNET touches neither, and the thread ends
        // here.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
        current()
    })
}

fn on_a_thread<T: Send>(f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, f)?;
        worker.join().unwrap_or_else(|cause| panic::resume_unwind(cause))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::fs::fstat;

    use super::*;

    fn inode(netns: &OwnedFd) -> u64 {
        fstat(netns).unwrap().st_ino
    }

    #[test]
    fn the_caller_stays_where_it_is() {
        let before = inode(&current().unwrap());
        let Ok(other) = create() else {
            eprintln!("SKIPPED: this process may not make a network namespace");
            return;
        };
        let inside = in_netns(other.as_fd(), || inode(&current().unwrap())).unwrap();
        assert_eq!(inside, inode(&other));
        assert_ne!(inside, before);
        assert_eq!(inode(&current().unwrap()), before);
    }

    #[test]
    fn what_is_no_network_namespace_is_refused() {
        let file = File::open("/proc/self/ns/uts").unwrap();
        assert!(in_netns(file.as_fd(), || ()).is_err());
    }
}
