//! The loop of PID 1.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    os::fd::{AsFd, OwnedFd},
    process::ExitCode,
    time::{Duration, Instant},
};

use nix::sys::{
    signal::{SigSet, Signal as NixSignal},
    signalfd::{SfdFlags, SignalFd},
};
use qvd_core::DisplayKind;
use qvd_guest::{
    Channel, ExecRequest, Exit, GuestError, InitConfig, Reply, Request, STILL_MAX, SessionState, Stats, VERSION,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    net::SocketFlags,
    process::Signal,
};

use crate::{
    boot, desktop,
    exec::Exec,
    graphical::{self, Graphical},
    log::Log,
    options::{HEAD_DISPLAY, SESSION_DISPLAY},
    reap, session,
    session::{Action, Client, Event, Moment, Role, Session},
    spawn::{self, Identity, Program},
    stats,
    still::Still,
    x11,
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

/// Reads the configuration, wherever the writer left the file's offset.
fn read_config(file: &fs::File) -> Result<InitConfig, String> {
    use std::os::unix::fs::FileExt;
    let length = file.metadata().map_err(|e| format!("cannot read the configuration: {e}"))?.len();
    let length = usize::try_from(length).ok().filter(|&length| length <= qvd_guest::MAX_FRAME);
    let mut bytes = vec![0; length.ok_or("the configuration is too long")?];
    file.read_exact_at(&mut bytes, 0).map_err(|e| format!("cannot read the configuration: {e}"))?;
    parse_config(&bytes)
}

fn parse_config(bytes: &[u8]) -> Result<InitConfig, String> {
    let config: InitConfig =
        serde_json::from_slice(bytes).map_err(|e| format!("cannot understand the configuration: {e}"))?;
    check(config)
}

fn check(config: InitConfig) -> Result<InitConfig, String> {
    if config.version != VERSION {
        return Err(format!("the configuration is of version {}, this init of {VERSION}", config.version));
    }
    let session = config.session.iter().flat_map(|session| session.autostart.iter().chain([&session.command]));
    if config.services.iter().chain(session).any(|argv| argv.first().is_none_or(String::is_empty)) {
        return Err("a program in the configuration has no name".to_owned());
    }
    Ok(config)
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

    /// Has a machine known by keys of its own from now on.
    fn make_host_keys(&mut self) {
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
    fn identify(&mut self, identity: &qvd_guest::Identity) -> Result<(), String> {
        self.cloned = true;
        boot::identify(identity)?;
        self.make_host_keys();
        if let Some(network) = &identity.network {
            let own = ["/proc/self/exe".to_owned()].into_iter().chain(boot::network_arguments(network)?);
            self.run_aside(&own.collect::<Vec<_>>());
        }
        Ok(())
    }

    fn set_clock(&self, time_ns: u64) -> Result<(), String> {
        if self.port.is_none() {
            return Err("a container has the clock of its host".to_owned());
        }
        boot::set_clock(time_ns)
    }

    /// Ends the session's programs and keeps others from starting.
    fn hold(&mut self) -> Result<(), String> {
        if self.port.is_none() {
            return Err("a container cannot become another".to_owned());
        }
        self.session(Some(Event::Hold));
        self.graphical.as_ref().map_or(Ok(()), Graphical::end_programs)
    }

    /// Lets a session begin that was held.
    fn release(&mut self, home: bool) -> Result<(), String> {
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
    fn start_carrier(&mut self) {
        let Some(port) = &self.port else { return };
        let argv = ["/proc/self/exe".to_owned(), boot::CARRY.to_owned()];
        let program = Program { argv: &argv, env: &self.env, identity: &Identity::root(), terminal: false };
        let start = || spawn::spawn(&program, port.try_clone()?.into(), self.log.stdio()?, self.log.stdio()?);
        match start() {
            Ok(pid) => drop(self.children.insert(pid, Child::Carrier)),
            Err(e) => self.log.note(&format!("cannot reach the host: {e}")),
        }
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

    /// Looks at the session's sockets and state; `again` times more if one of
    /// them is not settled.
    fn look(&mut self, again: u32) {
        if let Some(graphical) = &mut self.graphical {
            let seen = graphical.desktop.look();
            graphical.looks = if seen.unsettled { again } else { 0 };
            self.session(Some(Event::Seen(seen)));
        }
    }

    /// Lets the session's machine take note of an event and does what it says.
    fn session(&mut self, event: Option<Event>) {
        let mut events = Vec::from_iter(event);
        loop {
            let now = self.now();
            let mut actions = Vec::new();
            let Some(graphical) = &mut self.graphical else { return };
            for event in events.drain(..) {
                graphical.machine.note(now, event, &mut actions);
            }
            if self.stopping.is_none() && self.held.is_none() {
                graphical.machine.step(now, &mut actions);
            }
            for action in actions {
                events.extend(self.act(action));
            }
            if events.is_empty() {
                return;
            }
        }
    }

    /// Does what the session's machine decided; says what came of it.
    fn act(&mut self, action: Action) -> Option<Event> {
        let graphical = self.graphical.as_mut()?;
        let failure = match action {
            Action::Clear => graphical.desktop.clear().err().map(|failure| failure.to_string()),
            Action::Options(occasion, kind) => {
                graphical.desktop.write_options(occasion, kind).err().map(|failure| failure.to_string())
            }
            Action::Start(role, geometry) => match graphical.start(role, geometry, &self.log) {
                Ok(pid) => {
                    self.children.insert(pid, Child::Session(role));
                    None
                }
                Err(e) => {
                    self.log.note(&format!("cannot start {role:?}: {e}"));
                    return Some(Event::Ended(role, Exit::Code(127)));
                }
            },
            Action::End(role) => graphical.signal(role, Signal::TERM),
            Action::Kill(role) => graphical.signal(role, Signal::KILL),
            Action::Toggle => graphical.signal(Role::Agent, Signal::HUP),
            Action::Resize(geometry) => {
                let argv = [x11::RESIZE.to_owned(), geometry.to_string()];
                match graphical.helper(HEAD_DISPLAY, &argv, &self.log) {
                    Ok(pid) => {
                        self.children.insert(pid, Child::Resizer);
                        None
                    }
                    Err(e) => {
                        self.log.note(&format!("cannot resize the head: {e}"));
                        return Some(Event::Resized);
                    }
                }
            }
            Action::Redraw => match graphical.helper(SESSION_DISPLAY, &[x11::REDRAW.to_owned()], &self.log) {
                Ok(pid) => {
                    self.children.insert(pid, Child::Other);
                    None
                }
                Err(e) => {
                    self.log.note(&format!("cannot have the session drawn again: {e}"));
                    None
                }
            },
            Action::Connect(client, kind) => return Some(self.connect(client, kind)),
            Action::Progress(client, step) => {
                self.answer(client, &Reply::Progress(step.to_owned()));
                None
            }
            Action::Refuse(client, op, reason) => {
                self.refuse(client, op, reason);
                self.connections.remove(&client);
                None
            }
            Action::Autostart => {
                // What a former session left no longer counts.
                for child in self.children.values_mut().filter(|child| matches!(child, Child::Program(_))) {
                    *child = Child::Other;
                }
                (0..graphical.config.autostart.len()).for_each(|index| self.autostart(index));
                None
            }
            Action::AutostartAgain(index) => {
                self.autostart(index);
                None
            }
            Action::Changed => {
                self.broadcast();
                None
            }
        };
        if let Some(failure) = failure {
            self.log.note(&failure);
        }
        None
    }

    /// Starts one of the session's programs.
    fn autostart(&mut self, index: usize) {
        let Some(graphical) = &self.graphical else { return };
        let Some(argv) = graphical.config.autostart.get(index) else { return };
        match graphical.program(argv, &self.log) {
            Ok(pid) => drop(self.children.insert(pid, Child::Program(index))),
            Err(e) => self.log.note(&format!("cannot start `{}`: {e}", argv.join(" "))),
        }
    }

    /// Gives a client its display.
    fn connect(&mut self, client: Client, kind: DisplayKind) -> Event {
        let Some(graphical) = &self.graphical else { return Event::Gone(client) };
        let Ok(stream) = graphical.desktop.connect(kind) else { return Event::NotConnected };
        let Some(connection) = self.connections.get_mut(&client) else { return Event::Gone(client) };
        match connection.channel.send(&Reply::Display, &[stream.as_fd()]) {
            Ok(()) => Event::Connected(client),
            Err(_) => {
                self.connections.remove(&client);
                Event::Gone(client)
            }
        }
    }

    fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // An error is the caller's that is gone, or passes.
        let Ok(socket) = rustix::net::accept_with(&self.control, flags) else { return };
        self.connections.insert(self.next, Connection { channel: Channel::new(socket), purpose: Purpose::Unknown });
        self.next += 1;
    }

    /// Reads what the node says on a connection.
    fn hear(&mut self, id: Client) {
        loop {
            let Some(connection) = self.connections.get_mut(&id) else { return };
            match connection.channel.try_recv::<Request>() {
                Ok(Some((request, fds))) => self.obey(id, request, fds),
                Ok(None) => return,
                Err(_) => return self.hung_up(id),
            }
        }
    }

    fn hung_up(&mut self, id: Client) {
        self.let_go(id);
        let Some(connection) = self.connections.remove(&id) else { return };
        match connection.purpose {
            Purpose::Exec(exec) => {
                self.children.insert(exec.pid(), Child::Other);
                exec.signal(Signal::HUP.as_raw());
            }
            Purpose::Attach => self.session(Some(Event::Gone(id))),
            Purpose::Unknown | Purpose::Watch => {}
        }
    }

    fn obey(&mut self, id: Client, request: Request, fds: Vec<OwnedFd>) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match (request, &connection.purpose) {
            (Request::Resize { rows, columns }, Purpose::Exec(exec)) => exec.resize(rows, columns),
            (Request::Signal { signal }, Purpose::Exec(exec)) => exec.signal(signal),
            (_, Purpose::Exec(_) | Purpose::Attach | Purpose::Watch) => self.hung_up(id),
            (Request::Watch, Purpose::Unknown) => {
                connection.purpose = Purpose::Watch;
                let status = self.status();
                self.answer(id, &status);
            }
            (Request::Stats, Purpose::Unknown) => {
                let stats = self.stats();
                self.answer(id, &Reply::Stats(stats));
            }
            (Request::Attach(kind), Purpose::Unknown) => {
                connection.purpose = Purpose::Attach;
                match (&self.graphical, self.stopping) {
                    (Some(_), None) => self.session(Some(Event::Attach(id, kind))),
                    (None, _) => self.refuse(id, "open the display", "this image has no session"),
                    (_, Some(_)) => self.refuse(id, "open the display", "the desktop is going down"),
                }
            }
            (Request::Exec(_) | Request::ExecStill(_), Purpose::Unknown) if self.held.is_some() => {
                self.refuse(id, "run a program", "everybody stands still while an image is made; try again later");
            }
            (Request::Exec(request), Purpose::Unknown) => self.exec(id, &request, fds),
            (Request::ExecStill(request), Purpose::Unknown) => match self.hold_all(id) {
                Ok(()) => self.exec(id, &request, fds),
                Err(reason) => self.refuse(id, "hold its programs", &reason),
            },
            (Request::Identify(identity), Purpose::Unknown) => {
                if self.port.is_none() {
                    return self.refuse(id, "take another identity", "a container has that of its host");
                }
                match self.identify(&identity) {
                    Ok(()) => self.answer(id, &Reply::Done),
                    Err(reason) => self.refuse(id, "take another identity", &reason),
                }
            }
            (Request::Time { time_ns }, Purpose::Unknown) => match self.set_clock(time_ns) {
                Ok(()) => self.answer(id, &Reply::Done),
                Err(reason) => self.refuse(id, "set the clock", &reason),
            },
            (Request::Hold, Purpose::Unknown) => match self.hold() {
                Ok(()) => self.answer(id, &Reply::Done),
                Err(reason) => self.refuse(id, "hold the session", &reason),
            },
            (Request::Release { home }, Purpose::Unknown) => match self.release(home) {
                Ok(()) => self.answer(id, &Reply::Done),
                Err(reason) => self.refuse(id, "let the session begin", &reason),
            },
            (Request::Stop { grace_ms }, Purpose::Unknown) => {
                self.answer(id, &Reply::Stopping);
                self.stop(Duration::from_millis(grace_ms.into()));
            }
            (Request::Resize { .. } | Request::Signal { .. }, Purpose::Unknown) => {
                self.refuse(id, "reach a program", "none was started on this connection");
            }
        }
    }

    /// Has everybody stand still until the program of this client has ended.
    fn hold_all(&mut self, id: Client) -> Result<(), String> {
        if self.port.is_none() {
            return Err("those of a container are held by its host".to_owned());
        }
        if self.stopping.is_some() {
            return Err("the desktop is going down".to_owned());
        }
        let carriers = self.children.iter().filter(|(_, child)| **child == Child::Carrier);
        let still = Still::begin(&carriers.map(|(pid, _)| *pid).collect::<Vec<_>>()).map_err(|e| e.to_string())?;
        self.held = Some((id, self.now() + STILL_MAX, still));
        Ok(())
    }

    /// Lets everybody go on, if they are held for this client.
    fn let_go(&mut self, id: Client) {
        self.held.take_if(|(client, ..)| *client == id);
    }

    fn exec(&mut self, id: Client, request: &ExecRequest, fds: Vec<OwnedFd>) {
        let session = self.graphical.as_ref().filter(|_| !request.root);
        let (env, identity) = match session {
            Some(graphical) => (&graphical.env, graphical.desktop.user().clone()),
            None => (&self.env, Identity::root()),
        };
        match Exec::start(request, fds, env, &identity) {
            Ok(exec) => self.started(id, exec),
            Err(e) => {
                self.let_go(id);
                self.refuse(id, "run a program", &e.to_string());
            }
        }
    }

    fn started(&mut self, id: Client, exec: Exec) {
        self.children.insert(exec.pid(), Child::Exec(id));
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let fds = Vec::from_iter(exec.terminal());
        let sent = connection.channel.send(&Reply::Started { pid: exec.pid() }, &fds);
        drop(fds);
        connection.purpose = Purpose::Exec(exec);
        if sent.is_err() {
            self.hung_up(id);
        }
    }

    /// Sends a reply; a node that does not read it loses the connection.
    fn answer(&mut self, id: Client, reply: &Reply) {
        if let Some(connection) = self.connections.get_mut(&id)
            && connection.channel.send(reply, &[]).is_err()
            && !matches!(connection.purpose, Purpose::Exec(_) | Purpose::Attach)
        {
            // The others are noticed, with all that hangs on them, when read.
            self.connections.remove(&id);
        }
    }

    fn refuse(&mut self, id: Client, op: &str, reason: &str) {
        self.answer(id, &Reply::Error(GuestError { op: op.to_owned(), reason: reason.to_owned() }));
    }

    fn status(&self) -> Reply {
        let machine = self.graphical.as_ref().map(|graphical| &graphical.machine);
        Reply::Status {
            version: VERSION,
            session: machine.map_or(SessionState::None, Session::state),
            session_ready_ms: machine
                .and_then(Session::ready_at)
                .map(|ready| u32::try_from(ready.as_millis()).unwrap_or(u32::MAX)),
        }
    }

    fn broadcast(&mut self) {
        let status = self.status();
        let watchers = self.connections.iter().filter(|(_, connection)| matches!(connection.purpose, Purpose::Watch));
        for id in watchers.map(|(&id, _)| id).collect::<Vec<_>>() {
            self.answer(id, &status);
        }
    }

    fn stats(&self) -> Stats {
        let pids = stats::processes();
        let desktop = self.graphical.as_ref().map(|graphical| &graphical.desktop);
        let pss = |&pid: &u32| desktop.map_or_else(|| stats::pss(pid), |desktop| desktop.pss(pid));
        Stats {
            pss_bytes: pids.iter().filter_map(pss).fold(0, u64::saturating_add),
            processes: u32::try_from(pids.len()).unwrap_or(u32::MAX),
            clients: self.graphical.as_ref().map_or(0, Graphical::clients),
            streams: qvd_guest::has_streams("/proc/net".as_ref()),
            memory: self.port.as_ref().map(|_| stats::memory()),
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Seek;

    use super::*;

    fn config(services: &[&[&str]], version: u32) -> Vec<u8> {
        let services = services.iter().map(|argv| argv.iter().map(ToString::to_string).collect()).collect();
        serde_json::to_vec(&InitConfig { version, env: BTreeMap::new(), services, session: None }).unwrap()
    }

    #[test]
    fn a_configuration_is_read_wherever_its_offset_is() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&config(&[&["sshd", "-D"]], VERSION)).unwrap();
        assert_eq!(read_config(&file).unwrap().services, [["sshd", "-D"]]);
        file.rewind().unwrap();
        assert_eq!(read_config(&file).unwrap().services.len(), 1);
    }

    #[test]
    fn a_configuration_of_another_version_or_without_a_name_is_refused() {
        assert!(parse_config(&config(&[], VERSION)).is_ok());
        assert!(parse_config(&config(&[], VERSION + 1)).unwrap_err().contains("version"));
        assert!(parse_config(&config(&[&[]], VERSION)).unwrap_err().contains("no name"));
        assert!(parse_config(&config(&[&[""]], VERSION)).is_err());
        assert!(parse_config(b"{}").is_err());
    }

    #[test]
    fn a_configuration_that_is_too_long_is_not_read() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 30).unwrap();
        assert!(read_config(&file).unwrap_err().contains("too long"));
    }
}
