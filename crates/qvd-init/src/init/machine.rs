//! What an init does in a machine alone: it becomes another, and carries what its host says.

use super::{Child, Init};
use crate::{
    boot,
    graphical::{self, Graphical},
    session::Event,
    spawn::{self, Identity, Program},
};

impl Init {
    /// Has a machine known by keys of its own from now on.
    pub(super) fn make_host_keys(&mut self) {
        match boot::forget_host_keys() {
            Ok(true) => self.run_aside(&boot::MAKE_HOST_KEYS.map(str::to_owned)),
            Ok(false) => {}
            Err(e) => self.log.note(&format!("cannot remove the host keys: {e}")),
        }
    }

    /// Starts a program that nothing waits for.
    fn run_aside(&mut self, argv: &[String]) {
        let program = Program { argv, env: &self.env, identity: &Identity::root(), terminal: false };
        match graphical::start(&program, &self.log) {
            Ok(pid) => drop(self.children.insert(pid, Child::Other)),
            Err(e) => self.log.note(&format!("cannot start {argv:?}: {e}")),
        }
    }

    /// Becomes another: the machine is a clone.
    pub(super) fn identify(&mut self, identity: &qvd_guest::Identity) -> Result<(), String> {
        self.cloned = true;
        boot::identify(identity)?;
        self.make_host_keys();
        if let Some(network) = &identity.network {
            let own = ["/proc/self/exe".to_owned()].into_iter().chain(boot::network_arguments(network)?);
            self.run_aside(&own.collect::<Vec<_>>());
        }
        Ok(())
    }

    pub(super) fn set_clock(&self, time_ns: u64) -> Result<(), String> {
        if self.port.is_none() {
            return Err("a container has the clock of its host".to_owned());
        }
        boot::set_clock(time_ns)
    }

    /// Ends the session's programs and keeps others from starting.
    pub(super) fn hold(&mut self) -> Result<(), String> {
        if self.port.is_none() {
            return Err("a container cannot become another".to_owned());
        }
        self.session(Some(Event::Hold));
        self.graphical.as_ref().map_or(Ok(()), Graphical::end_programs)
    }

    /// Lets a session begin that was held.
    pub(super) fn release(&mut self, home: bool) -> Result<(), String> {
        if self.port.is_none() {
            return Err("a container cannot become another".to_owned());
        }
        if home {
            let graphical = self.graphical.as_ref().ok_or("this image has no session")?;
            boot::mount_home("", &graphical.config)?;
        }
        self.session(Some(Event::Release));
        Ok(())
    }

    /// Starts what carries conversations, in a machine.
    pub(super) fn start_carrier(&mut self) {
        let Some(port) = &self.port else { return };
        let argv = ["/proc/self/exe".to_owned(), boot::CARRY.to_owned()];
        let program = Program { argv: &argv, env: &self.env, identity: &Identity::root(), terminal: false };
        let start = || spawn::spawn(&program, port.try_clone()?.into(), self.log.stdio()?, self.log.stdio()?);
        match start() {
            Ok(pid) => drop(self.children.insert(pid, Child::Carrier)),
            Err(e) => self.log.note(&format!("cannot reach the host: {e}")),
        }
    }
}
