//! What libvirt tells by itself: that something about a domain has changed.
//!
//! The only unsafe code outside of `qvd-sys`, which must not link libvirt: the
//! crate `virt` has no call for this.
#![allow(unsafe_code)]

use std::{
    collections::HashMap,
    ffi::{CStr, c_int, c_void},
    io,
    sync::{Arc, Condvar, Mutex, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use virt::{connect::Connect, event};

/// How often something has happened to each domain, by its name.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    counts: Mutex<HashMap<String, u64>>,
    more: Condvar,
}

impl Changes {
    fn note(&self, name: String) {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_default() += 1;
        self.more.notify_all();
    }

    /// How often something has happened to the domain.
    pub(crate) fn count(&self, name: &str) -> u64 {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied().unwrap_or(0)
    }

    /// Waits until that is no longer `seen`, or the deadline is there.
    pub(crate) fn wait(&self, name: &str, seen: u64, deadline: Instant) {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let left = deadline.saturating_duration_since(Instant::now());
        let same = |counts: &mut HashMap<String, u64>| counts.get(name).copied().unwrap_or(0) == seen;
        drop(self.more.wait_timeout_while(counts, left, same));
    }

    /// Nobody asks for the domain any more.
    pub(crate) fn forget(&self, name: &str) {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }
}

/// Runs libvirt's loop of events, without which it hears neither of QEMU nor of
/// a daemon: once in a process, on a thread that stays. Has to be called before
/// the first connection is opened.
pub(crate) fn run() -> Result<(), String> {
    static RUNS: OnceLock<Result<(), String>> = OnceLock::new();
    let start = || {
        // Errors are returned; printing them is not a library's affair.
        virt::error::clear_error_callback();
        event::event_register_default_impl().map_err(|error| error.to_string())?;
        let serve = || {
            loop {
                if let Err(error) = event::event_run_default_impl() {
                    tracing::error!(%error, "libvirt's loop of events");
                    // Not all of a processor for what does not get better.
                    thread::sleep(Duration::from_secs(1));
                }
            }
        };
        let started: io::Result<_> = thread::Builder::new().name("libvirt-events".to_owned()).spawn(serve);
        started.map(drop).map_err(|error| error.to_string())
    };
    RUNS.get_or_init(start).clone()
}

/// Has `changes` hear of every domain of the connection, as long as that is open.
pub(crate) fn subscribe(connect: &Connect, changes: &Arc<Changes>) -> Result<(), virt::error::Error> {
    let opaque = Arc::into_raw(Arc::clone(changes)).cast_mut().cast::<c_void>();
    // SAFETY: the connection is open; `heard` takes what `opaque` points to, which
    // lives until libvirt calls `forgotten`, once.
    let subscribed =
        unsafe { virt_sys::virConnectDomainEventRegister(connect.as_ptr(), Some(heard), opaque, Some(forgotten)) };
    if subscribed == -1 {
        let error = virt::error::Error::last_error();
        forgotten_unheard(opaque);
        return Err(error);
    }
    Ok(())
}

fn forgotten_unheard(opaque: *mut c_void) {
    // SAFETY: libvirt took nothing, so this is the only one to give it back.
    unsafe { forgotten(opaque) }
}

unsafe extern "C" fn heard(
    _: virt_sys::virConnectPtr,
    domain: virt_sys::virDomainPtr,
    _: c_int,
    _: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt passes a domain that lives during the call; its name lives as
    // long as that does.
    let name = unsafe {
        let name = virt_sys::virDomainGetName(domain);
        if name.is_null() { None } else { Some(CStr::from_ptr(name).to_string_lossy().into_owned()) }
    };
    // SAFETY: see `subscribe`; the count of references is not touched.
    let changes = unsafe { &*opaque.cast::<Changes>() };
    if let Some(name) = name {
        changes.note(name);
    }
    0
}

unsafe extern "C" fn forgotten(opaque: *mut c_void) {
    // SAFETY: it came from `Arc::into_raw` in `subscribe`, and is given back once.
    drop(unsafe { Arc::from_raw(opaque.cast::<Changes>().cast_const()) });
}
