//! The loop of PID 1.

mod config;
mod display;
mod machine;
mod requests;

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    os::fd::OwnedFd,
    process::ExitCode,
    time::{Duration, Instant},
};

use nix::sys::{
    signal::{SigSet, Signal as NixSignal},
    signalfd::{SfdFlags, SignalFd},
};
use qvd_guest::{Channel, Exit, InitConfig, Reply};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    process::Signal,
};

use self::config::{check, read_config};
use crate::{
    desktop,
    exec::Exec,
    graphical::{self, Graphical},
    log::Log,
    reap,
    session::{self, Client, Event, Moment, Role},
    spawn::{Identity, Program},
    still::Still,
};

/// Most connections from the node at once.
const MAX_CONNECTIONS: usize = 64;
/// Between two looks at a socket that is there but not listened on, and how
/// often: an X server takes some microseconds, a dead one for ever.
const LOOK_AGAIN: (Duration, u32) = (Duration::from_millis(1), 50);
/// Until the kernel is asked again for events after it could not say.
const WAIT_AGAIN: Duration = Duration::from_millis(10);
/// How long programs have to end when a signal asks for it.
const SIGNAL_GRACE: Duration = Duration::from_secs(5);
/// Search path when the configuration has none.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs until it is told to stop.
pub(crate) fn run() -> ExitCode {
    let begin = Instant::now();
    let outcome = qvd_sys::init::inherited([qvd_guest::fds::CONTROL, qvd_guest::fds::CONFIG].map(i32::from))
        .map_err(|e| format!("cannot take over the descriptors of the node: {e}"))
        .and_then(|[control, config]| Init::new(begin, control, read_config(&fs::File::from(config))?, None))
        .map(|mut init| init.serve());
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _written = writeln!(io::stderr(), "qvd-init: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs as the first process of a machine whose port is `port`, until it is
/// told to stop. Says whether the machine became another meanwhile: a clone.
pub(crate) fn run_in_machine(
    begin: Instant,
    control: OwnedFd,
    config: InitConfig,
    port: OwnedFd,
) -> Result<bool, String> {
    let mut init = Init::new(begin, control, check(config)?, Some(port))?;
    init.serve();
    Ok(init.cloned)
}

/// What a child of ours is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Child {
    Session(Role),
    /// Gives the head another size.
    Resizer,
    Service(usize),
    /// One of the session's programs, by its place in the list.
    Program(usize),
    Exec(Client),
    /// What carries conversations to and from the host of a machine.
    Carrier,
    /// Nothing depends on how it ends.
    Other,
}

/// A service that is kept running.
#[derive(Debug, Default)]
struct Service {
    argv: Vec<String>,
    failures: u32,
    started: Moment,
    /// When it is to be started; `None` while it runs.
    due: Option<Moment>,
}

/// What a connection is about.
#[derive(Debug)]
enum Purpose {
    Unknown,
    Watch,
    Attach,
    Exec(Exec),
}

#[derive(Debug)]
struct Connection {
    channel: Channel,
    purpose: Purpose,
}

#[derive(Debug)]
struct Init {
    begin: Instant,
    control: OwnedFd,
    signals: SignalFd,
    log: Log,
    env: BTreeMap<String, String>,
    services: Vec<Service>,
    graphical: Option<Graphical>,
    children: BTreeMap<u32, Child>,
    connections: BTreeMap<Client, Connection>,
    next: Client,
    /// The port of a machine; none in a container.
    port: Option<OwnedFd>,
    /// Whether the machine was saved and goes on as another.
    cloned: bool,
    /// Who has everybody else held, and for how long at most.
    held: Option<(Client, Moment, Still)>,
    /// When what is left is killed, once stopping.
    stopping: Option<Moment>,
    done: bool,
}

impl Init {
    fn new(begin: Instant, control: OwnedFd, config: InitConfig, port: Option<OwnedFd>) -> Result<Self, String> {
        let mask = [NixSignal::SIGCHLD, NixSignal::SIGTERM, NixSignal::SIGINT, NixSignal::SIGPWR, NixSignal::SIGHUP];
        let mask: SigSet = mask.into_iter().collect();
        let signals = mask
            .thread_block()
            .and_then(|()| SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK))
            .map_err(|e| format!("cannot receive signals: {e}"))?;
        desktop::prepare_root().map_err(|e| e.to_string())?;
        let mut log = Log::new(std::path::Path::new(desktop::ROOT_DIR).join("log"), begin)
            .map_err(|e| format!("cannot make the log: {e}"))?;
        if let Err(failure) = desktop::machine_id() {
            log.note(&failure.to_string());
        }
        // A machine is told with its place in the network.
        if port.is_none()
            && let Err(failure) = desktop::name_servers(&config.name_servers)
        {
            log.note(&failure.to_string());
        }
        let mut env = config.env;
        env.entry("PATH".to_owned()).or_insert_with(|| PATH.to_owned());
        env.entry("LANG".to_owned()).or_insert_with(|| "C.UTF-8".to_owned());
        let graphical = config.session.map(|session| Graphical::new(session, &env, port.is_some())).transpose()?;
        env.insert("HOME".to_owned(), "/root".to_owned());
        let service = |argv| Service { argv, due: Some(Moment::ZERO), ..Service::default() };
        let mut init = Self {
            begin,
            control,
            port,
            cloned: false,
            signals,
            log,
            env,
            services: config.services.into_iter().map(service).collect(),
            graphical,
            children: BTreeMap::new(),
            connections: BTreeMap::new(),
            next: 0,
            held: None,
            stopping: None,
            done: false,
        };
        init.start_carrier();
        if init.port.is_some() {
            init.make_host_keys();
        }
        Ok(init)
    }

    fn now(&self) -> Moment {
        self.begin.elapsed()
    }

    fn serve(&mut self) {
        while !self.done {
            self.step();
            for source in self.wait() {
                match source {
                    Source::Control => self.accept(),
                    Source::Signals => self.signalled(),
                    Source::Log => self.log.drain(),
                    Source::Watch => self.look(LOOK_AGAIN.1),
                    Source::Connection(id) => self.hear(id),
                }
            }
        }
    }

    /// Does all that is due.
    fn step(&mut self) {
        let now = self.now();
        if let Some(kill_at) = self.stopping {
            if now >= kill_at {
                // The kernel kills what is left when the init ends.
                self.done = true;
            }
            return;
        }
        if let Some((client, until, _)) = self.held {
            // Nothing is started for those who stand still.
            if now < until {
                return;
            }
            self.log.note("the desktop was held for too long");
            self.hung_up(client);
        }
        for index in 0..self.services.len() {
            self.serve_service(index, now);
        }
        match self.graphical.as_ref().map(|graphical| graphical.looks) {
            Some(0) => self.session(None),
            Some(looks) => self.look(looks - 1),
            None => {}
        }
    }

    fn serve_service(&mut self, index: usize, now: Moment) {
        let Some(service) = self.services.get_mut(index) else { return };
        if service.due.is_none_or(|due| now < due) {
            return;
        }
        service.due = None;
        service.started = now;
        let program = Program { argv: &service.argv, env: &self.env, identity: &Identity::root(), terminal: false };
        match graphical::start(&program, &self.log) {
            Ok(pid) => drop(self.children.insert(pid, Child::Service(index))),
            Err(e) => {
                self.log.note(&format!("cannot start a service: {e}"));
                self.service_ended(index, now);
            }
        }
    }

    fn service_ended(&mut self, index: usize, now: Moment) {
        if let Some(service) = self.services.get_mut(index) {
            let (failures, due) = session::restart(service.failures, service.started, now);
            service.failures = failures;
            service.due = Some(due);
        }
    }

    /// How long nothing is due.
    fn patience(&self) -> Option<Timespec> {
        let now = self.now();
        let due = match (self.stopping, &self.held) {
            (Some(kill_at), _) => Some(kill_at),
            (None, Some((_, until, _))) => Some(*until),
            (None, None) => {
                let session = self.graphical.as_ref().and_then(|graphical| {
                    let look = (graphical.looks > 0).then(|| now + LOOK_AGAIN.0);
                    graphical.machine.deadline(now).into_iter().chain(look).min()
                });
                self.services.iter().filter_map(|service| service.due).chain(session).min()
            }
        };
        due.and_then(|due| Timespec::try_from(due.saturating_sub(now)).ok())
    }

    fn wait(&self) -> Vec<Source> {
        let mut sources = vec![Source::Signals, Source::Log];
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&self.log, PollFlags::IN)];
        if let Some(graphical) = &self.graphical {
            sources.push(Source::Watch);
            fds.push(PollFd::new(graphical.desktop.watch(), PollFlags::IN));
        }
        for (&id, connection) in &self.connections {
            sources.push(Source::Connection(id));
            fds.push(PollFd::new(&connection.channel, PollFlags::IN));
        }
        // Last: a new connection's number must not be taken for an old one's.
        if self.connections.len() < MAX_CONNECTIONS {
            sources.push(Source::Control);
            fds.push(PollFd::new(&self.control, PollFlags::IN));
        }
        match rustix::event::poll(&mut fds, self.patience().as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Vec::new(),
            // No memory, for instance. Everything inside ends with the init, so it
            // does not end for that, and does not spin either.
            Err(_) => {
                std::thread::sleep(WAIT_AGAIN);
                return Vec::new();
            }
        }
        let ready = fds.iter().zip(sources).filter(|(fd, _)| !fd.revents().is_empty());
        ready.map(|(_, source)| source).collect()
    }

    fn signalled(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            match i32::try_from(info.ssi_signo).ok().and_then(Signal::from_named_raw) {
                Some(Signal::CHILD) => {}
                Some(Signal::TERM | Signal::INT | Signal::POWER) => self.stop(SIGNAL_GRACE),
                _ => {}
            }
        }
        loop {
            let reaped = reap::reap();
            for (pid, exit) in reaped.ended {
                self.ended(pid, exit);
            }
            if reaped.childless && self.stopping.is_some() {
                self.done = true;
            }
            if !reaped.more {
                return;
            }
        }
    }

    fn ended(&mut self, pid: u32, exit: Exit) {
        match self.children.remove(&pid) {
            Some(Child::Session(role)) => {
                if exit != Exit::Code(0) || role == Role::Agent {
                    self.log.note(&format!("{role:?} ended: {exit:?}"));
                }
                if let Some(graphical) = &mut self.graphical {
                    graphical.pids.remove(&role);
                }
                // What it left behind or took with it counts before its end.
                self.look(0);
                self.session(Some(Event::Ended(role, exit)));
            }
            Some(Child::Service(index)) => {
                self.log.note(&format!("a service ended: {exit:?}"));
                let now = self.now();
                self.service_ended(index, now);
            }
            Some(Child::Program(index)) => self.session(Some(Event::ProgramEnded(index, exit))),
            Some(Child::Exec(id)) => {
                self.let_go(id);
                self.answer(id, &Reply::Exited(exit));
                self.connections.remove(&id);
            }
            Some(Child::Carrier) => {
                if self.stopping.is_none() {
                    self.log.note(&format!("the link to the host ended: {exit:?}"));
                    self.start_carrier();
                }
            }
            Some(Child::Resizer) => self.session(Some(Event::Resized)),
            Some(Child::Other) | None => {}
        }
    }

    /// Asks everything to end, and ends itself when it did or the time is up.
    fn stop(&mut self, grace: Duration) {
        let kill_at = self.now() + grace;
        // Who is held hears no signal.
        self.held = None;
        self.stopping = Some(self.stopping.map_or(kill_at, |before| before.min(kill_at)));
        // As PID 1, this is everything inside but the init itself.
        for signal in [NixSignal::SIGTERM, NixSignal::SIGCONT] {
            if let Err(nix::errno::Errno::ESRCH) = nix::sys::signal::kill(nix::unistd::Pid::from_raw(-1), signal) {
                self.done = true;
            }
        }
    }
}

/// What became readable.
#[derive(Debug, Clone, Copy)]
enum Source {
    Control,
    Signals,
    Log,
    Watch,
    Connection(Client),
}
