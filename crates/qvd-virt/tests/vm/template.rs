//! A template's clones: a pool that keeps some ready, and a template that does not
//! fit any more.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    time::Duration,
};

use qvd_core::Bytes;
use qvd_virt::{
    Error, Exit,
    vm::{Pool, Template, VmState},
};

use crate::guest::{Guests, with_guests};

#[test]
fn a_pool_has_clones_ready_and_what_does_not_fit_a_template_is_refused_by_name() {
    with_guests(|guests| {
        let template = template(guests);
        let mut number = 1;
        let mut clone = |guests: &Guests<'_>| {
            number += 1;
            guests.bed.qemu.start_clone(guests.spec(number), &template, "school")
        };
        let mut pool = Pool::new(2);
        assert!(pool.take().is_none() && pool.is_empty());
        pool.fill(|| clone(guests)).unwrap();
        assert_eq!(pool.len(), 2);
        let mut first = pool.take().unwrap();
        // The one that is left dies where it waits: nobody gets it.
        let mut dead = pool.take().unwrap();
        dead.container().kill().unwrap();
        assert_eq!(dead.wait(crate::bed::SOON).unwrap(), Some(Exit::Signal(9)));
        let mut returned = Some(dead);
        let mut refilled = Pool::new(1);
        refilled.fill(|| Ok(returned.take().unwrap())).unwrap();
        assert!(refilled.take().is_none(), "it had died");
        pool.fill(|| clone(guests)).unwrap();
        assert_eq!(pool.len(), 2);

        assert_eq!(first.state(), VmState::Waiting);
        let mut second = pool.take().unwrap();
        assert_ne!(first.generation().unwrap(), second.generation().unwrap());
        let status = fs::read_to_string(format!("/proc/{}/status", first.pid())).unwrap();
        assert!(status.contains("THP_enabled:\t0"), "it fills its buffers with huge pages: {status}");
        for vm in [&mut first, &mut second] {
            vm.resume().unwrap();
            assert_eq!(vm.state(), VmState::Running);
            vm.close().unwrap();
        }
        pool.close().unwrap();
        pool.close().unwrap();
        assert!(pool.is_empty());

        refused(guests, &template);
    });
}

/// Boots a guest up to its shell, and saves it.
fn template(guests: &Guests<'_>) -> Template {
    let (vm, mold) = guests.bed.qemu.start_template(guests.spec(1), "school").unwrap();
    let guest = guests.boot(vm);
    assert_eq!(guest.sh("echo ready"), "ready");
    mold.save(guest.into_vm()).unwrap()
}

fn refused(guests: &Guests<'_>, template: &Template) {
    let refusal = |spec, tenant| match guests.bed.qemu.start_clone(spec, template, tenant) {
        Err(Error::Invalid { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    assert!(refusal(guests.spec(9), "another").contains("another tenant"));
    let mut larger = guests.spec(9);
    larger.limits.memory = Bytes::mib(192);
    assert!(refusal(larger, "school").contains("other memory"));

    // Kept, and altered on the disk.
    let dir = guests.path("kept");
    fs::create_dir(&dir).unwrap();
    template.keep(&dir).unwrap();
    let kept = Template::open(&dir).unwrap();
    drop(kept);
    let memory = File::options().read(true).write(true).open(dir.join("memory")).unwrap();
    memory.write_all_at(b"another kernel", 1 << 20).unwrap();
    let error = Template::open(&dir).unwrap_err().to_string();
    assert!(error.contains("digest"), "{error}");

    // The base is another than the template has mapped.
    let spec = guests.spec(9);
    let base = File::options().write(true).open(guests.base()).unwrap();
    let later = fs::metadata(guests.base()).unwrap().modified().unwrap() + Duration::from_secs(5);
    base.set_modified(later).unwrap();
    assert!(refusal(spec, "school").contains("its base is another"));
}
