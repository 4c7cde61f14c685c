//! Machines do what every virtualizer does.

use std::fs;

use qvd_core::{Bytes, DesktopId};
use qvd_virt::{
    Failure, Machine,
    conformance::{Behaviour, Virtualizer, check},
    vm::{Boot, DiskFormat, DiskSpec, Memory, VmRecord, VmSpec},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::bed::{Bed, SOON, with_bed};

struct Machines<'a> {
    bed: &'a Bed,
    work: tempfile::TempDir,
}

/// What a BIOS boots: it stops the processor for ever.
const WAITS: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];

/// Or switches the machine off. Source: QEMU's firmware puts the ACPI registers of q35
/// at 0x600; of them 4 is PM1 control, and bit 13 of that means off (ACPI 4.8.3.2.1).
const ENDS: &[u8] = &[0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xf4, 0xeb, 0xfd];

impl std::fmt::Debug for Machines<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machines").finish_non_exhaustive()
    }
}

impl Virtualizer for Machines<'_> {
    fn start(&self, id: DesktopId, behaviour: Behaviour) -> Result<Box<dyn Machine>, Failure> {
        let dir = self.bed.dir.path().join(id.to_string());
        fs::create_dir_all(&dir)?;
        let mut spec = VmSpec::new(id, self.bed.ids, Boot::Bios, dir);
        spec.limits.memory = Bytes::mib(64);
        // A BIOS boots no disk without a cylinder.
        let mut sector = vec![0; 4 << 20];
        let code = if behaviour == Behaviour::Ends { ENDS } else { WAITS };
        sector[..code.len()].copy_from_slice(code);
        sector[510..512].copy_from_slice(&[0x55, 0xaa]);
        let path = self.work.path().join(id.to_string());
        fs::write(&path, sector)?;
        let file = fs::File::options().read(true).write(true).open(path)?.into();
        spec.disks.push(DiskSpec { serial: "root".to_owned(), file, format: DiskFormat::Raw });
        if behaviour == Behaviour::Broken {
            spec.memory = Memory::Saved(fs::File::open("/dev/null")?.into());
        }
        Ok(Box::new(self.bed.qemu.start(spec)?))
    }

    fn adopt(&self, record: &Value) -> Result<Option<Box<dyn Machine>>, Failure> {
        let record: VmRecord = serde_json::from_value(record.clone())?;
        Ok(self.bed.qemu.adopt(&record)?.map(|vm| Box::new(vm) as Box<dyn Machine>))
    }

    fn sweep(&self) -> Result<(), Failure> {
        // A machine is a container; the directory of its sockets is its owner's.
        self.bed.runtime.sweep(&[])?;
        for dir in fs::read_dir(self.bed.dir.path())? {
            for file in fs::read_dir(dir?.path())? {
                fs::remove_file(file?.path())?;
            }
        }
        Ok(())
    }

    fn strike(&self, machine: &dyn Machine) -> Result<(), Failure> {
        let pid = i32::try_from(machine.pid().ok_or("it has no number")?)?;
        Ok(kill_process(Pid::from_raw(pid).ok_or("it has no number")?, Signal::KILL)?)
    }

    fn left(&self) -> Vec<String> {
        let dirs = fs::read_dir(self.bed.dir.path()).unwrap().map(|dir| dir.unwrap().path());
        let files =
            dirs.flat_map(|dir| fs::read_dir(dir).unwrap().map(|file| file.unwrap().path().display().to_string()));
        files.collect()
    }
}

#[test]
fn machines_keep_the_rules_of_virtualizers() {
    with_bed(|bed| {
        let broken = check(&Machines { bed, work: tempfile::tempdir().unwrap() }, SOON);
        assert!(broken.is_empty(), "{broken:#?}");
        for dir in fs::read_dir(bed.dir.path()).unwrap() {
            fs::remove_dir(dir.unwrap().path()).unwrap();
        }
    });
}
