//! What KVM can do here is found by trying, and remembered.

use std::path::PathBuf;

use qvd_testkit::{Need, privileged};
use qvd_virt::vm::{AccelChoice, Kvm, KvmMemory};

use crate::bed::with_bed;

#[test]
fn kvm_is_tried_once_and_what_came_of_it_decides() {
    privileged(&[Need::Env("QVD_INIT")], || {
        let init = PathBuf::from(std::env::var_os("QVD_INIT").unwrap());
        with_bed(|bed| {
            let kernel = bed.kernel(&init);
            let dir = tempfile::tempdir().unwrap();
            let memory = KvmMemory::at(dir.path().join("kvm.json"));
            assert_eq!(memory.recall(&bed.qemu), None);
            let answer = memory.answer(&bed.qemu, || Ok(bed.spec(1, &kernel))).unwrap();
            eprintln!("{answer:?}");
            let again = memory.answer(&bed.qemu, || panic!("it was tried again")).unwrap();
            assert_eq!(again, answer);
            let usable = matches!(answer, Kvm::Usable { .. });
            assert_eq!(AccelChoice::Kvm.choose(&answer).is_ok(), usable);
            assert_eq!(AccelChoice::Auto.choose(&answer).unwrap().1.is_none(), usable);
        });
    });
}
