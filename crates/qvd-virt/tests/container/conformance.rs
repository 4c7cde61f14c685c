//! Containers do what every virtualizer does.

use qvd_core::DesktopId;
use qvd_testkit::privileged;
use qvd_virt::{
    ContainerRecord, Failure, Machine,
    conformance::{Behaviour, Virtualizer, check},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    bed::{Bed, SOON},
    lifecycle::NEEDS,
};

#[derive(Debug)]
struct Containers(Bed);

impl Virtualizer for Containers {
    fn start(&self, id: DesktopId, behaviour: Behaviour) -> Result<Box<dyn Machine>, Failure> {
        let waits = behaviour == Behaviour::Waits;
        let program = if waits { "sleep 1000 while 1" } else { "exit 0" };
        let mut spec = self.0.spec(id.number(), &["/usr/bin/perl", "-e", program]);
        if behaviour == Behaviour::Broken {
            // No program: the last step of its start fails.
            spec.program.file = std::fs::File::open("/dev/null")?.into();
        }
        Ok(Box::new(self.0.runtime.prepare(spec)?.start()?))
    }

    fn adopt(&self, record: &Value) -> Result<Option<Box<dyn Machine>>, Failure> {
        let record: ContainerRecord = serde_json::from_value(record.clone())?;
        Ok(self.0.runtime.adopt(&record)?.map(|container| Box::new(container) as Box<dyn Machine>))
    }

    fn sweep(&self) -> Result<(), Failure> {
        self.0.runtime.sweep(&[])?;
        Ok(())
    }

    fn strike(&self, machine: &dyn Machine) -> Result<(), Failure> {
        let pid = i32::try_from(machine.pid().ok_or("it has no number")?)?;
        Ok(kill_process(Pid::from_raw(pid).ok_or("it has no number")?, Signal::KILL)?)
    }

    fn left(&self) -> Vec<String> {
        let below = |group| std::fs::read_dir(group).unwrap().map(|entry| entry.unwrap());
        let groups = self.0.cgroups().into_iter().flat_map(below);
        groups
            .filter(|entry| entry.file_type().unwrap().is_dir())
            .map(|entry| entry.path().display().to_string())
            .collect()
    }
}

#[test]
fn containers_keep_the_rules_of_virtualizers() {
    privileged(NEEDS, || {
        let broken = check(&Containers(Bed::new()), SOON);
        assert!(broken.is_empty(), "{broken:#?}");
    });
}
