//! The session's programs: what each is, and how it is started.

use std::{collections::BTreeMap, io, os::unix::net::UnixStream, process::Stdio, time::Duration};

use qvd_core::{DisplayKind, Geometry};
use qvd_guest::SessionConfig;
use rustix::{
    io::Errno,
    process::{Pid, Signal},
};

use crate::{
    desktop::{self, Desktop},
    exec,
    log::Log,
    options::{HEAD_DISPLAY, SESSION_DISPLAY},
    session::{Role, Session},
    spawn::{self, Identity, Program},
    stats, x11,
};

/// Shortest life of a head without clients, in seconds: the first one has to
/// last until the session is up.
const MIN_LINGER_S: u32 = 5;
/// The same for the first one in a machine, which an emulator on a busy host may
/// run at a hundredth of the usual speed: a head that ends meanwhile takes the agent
/// along, and all begins again.
const FIRST_IN_MACHINE_S: u32 = 90;

/// After how many connections of nobody the head would take no more. Ours, which
/// keep it from ending, are such.
const NEVER: &str = "1000000000";

/// How often it is looked whether killed programs are gone, and the pause between.
const END_LOOKS: u32 = 200;
const END_LOOK: std::time::Duration = std::time::Duration::from_millis(10);

/// The session with what it is made of.
#[derive(Debug)]
pub(crate) struct Graphical {
    pub machine: Session,
    pub desktop: Desktop,
    pub config: SessionConfig,
    /// Environment of the user's programs.
    pub env: BTreeMap<String, String>,
    /// Environment of the display's programs.
    tuned: BTreeMap<String, String>,
    pub pids: BTreeMap<Role, u32>,
    /// How often to look again at what is unsettled.
    pub looks: u32,
    /// Shortest life of the first head without clients, in seconds.
    first_linger_s: u32,
    /// A connection to the head that nobody uses.
    kept: Option<UnixStream>,
}

/// Starts a program that prints to the log.
pub(crate) fn start(program: &Program<'_>, log: &Log) -> io::Result<u32> {
    spawn::spawn(program, Stdio::null(), log.stdio()?, log.stdio()?)
}

impl Graphical {
    /// Makes the session's places; `in_machine` if they are in one.
    pub(crate) fn new(
        config: SessionConfig,
        base: &BTreeMap<String, String>,
        in_machine: bool,
    ) -> Result<Self, String> {
        let desktop = Desktop::prepare(&config, Identity::of(&config)).map_err(|e| e.to_string())?;
        let mut env = base.clone();
        env.extend([
            ("HOME".to_owned(), config.home.clone()),
            ("USER".to_owned(), config.user.clone()),
            ("LOGNAME".to_owned(), config.user.clone()),
            ("DISPLAY".to_owned(), format!(":{SESSION_DISPLAY}")),
            ("XDG_RUNTIME_DIR".to_owned(), desktop.runtime().display().to_string()),
        ]);
        let mut tuned = env.clone();
        tuned.extend([
            // One arena and an early trim: an X server frees what clients leave.
            ("MALLOC_ARENA_MAX".to_owned(), "1".to_owned()),
            ("MALLOC_TRIM_THRESHOLD_".to_owned(), "65536".to_owned()),
            ("NXAGENT_KEYSTROKEFILE".to_owned(), desktop::keystrokes().display().to_string()),
        ]);
        Ok(Self {
            machine: Session::new(config.geometry, Duration::from_secs(config.attach_within_s.into())),
            desktop,
            config,
            env,
            tuned,
            pids: BTreeMap::new(),
            looks: 0,
            first_linger_s: if in_machine { FIRST_IN_MACHINE_S } else { MIN_LINGER_S },
            kept: None,
        })
    }

    /// Starts one of the session's programs.
    pub(crate) fn start(&mut self, role: Role, geometry: Geometry, log: &Log) -> io::Result<u32> {
        let pid = match role {
            Role::Agent => self.agent(log),
            Role::Head => self.head(geometry, log),
            Role::Proxy => self.proxy(log),
            Role::Fit => self.helper(HEAD_DISPLAY, &[x11::FIT.to_owned()], log),
            Role::Watch => self.helper(SESSION_DISPLAY, &[x11::WATCH.to_owned()], log),
            Role::WindowManager => self.program(&self.config.command, log),
        }?;
        self.pids.insert(role, pid);
        Ok(pid)
    }

    fn run(&self, argv: &[String], env: &BTreeMap<String, String>, log: &Log) -> io::Result<u32> {
        start(&Program { argv, env, identity: self.desktop.user(), terminal: false }, log)
    }

    /// Starts a program of the user's on the session's display.
    pub(crate) fn program(&self, argv: &[String], log: &Log) -> io::Result<u32> {
        self.run(argv, &self.env, log)
    }

    /// Starts a part of this program as the user on a display.
    pub(crate) fn helper(&self, display: u8, argv: &[String], log: &Log) -> io::Result<u32> {
        let mut env = self.env.clone();
        env.insert("DISPLAY".to_owned(), format!(":{display}"));
        let argv: Vec<_> = ["/proc/self/exe".to_owned()].into_iter().chain(argv.iter().cloned()).collect();
        self.run(&argv, &env, log)
    }

    fn agent(&self, log: &Log) -> io::Result<u32> {
        let options = desktop::options_file().display().to_string();
        let mut env = self.tuned.clone();
        env.insert("DISPLAY".to_owned(), format!("nx/nx,options={options}:{SESSION_DISPLAY}"));
        let geometry = self.config.geometry.to_string();
        let display = format!(":{SESSION_DISPLAY}");
        // Its keyboard is the one of whatever shows it, key for key.
        let argv = [
            "nxagent",
            "-D",
            "-options",
            &options,
            "-geometry",
            &geometry,
            "-name",
            "qvd",
            "-ac",
            "-nolisten",
            "tcp",
            "-norootlessexit",
            "-keyboard",
            "clone",
            &display,
        ];
        self.run(&argv.map(str::to_owned), &env, log)
    }

    fn head(&self, geometry: Geometry, log: &Log) -> io::Result<u32> {
        if let Err(failure) = self.desktop.clear_head() {
            return Err(io::Error::other(failure.to_string()));
        }
        let socket = self.desktop.rfb_socket().display().to_string();
        let least = if self.machine.ready_at().is_none() { self.first_linger_s } else { MIN_LINGER_S };
        let (geometry, linger) = (geometry.to_string(), self.config.head_linger_s.max(least).to_string());
        let display = format!(":{HEAD_DISPLAY}");
        // A port below zero listens on none. It ends by itself when nobody was
        // connected for the time given; GLX would cost 10 MiB.
        let argv = [
            "Xvnc",
            &display,
            "-geometry",
            &geometry,
            "-depth",
            "24",
            "-SecurityTypes",
            "None",
            "-rfbport",
            "-1",
            "-rfbunixpath",
            &socket,
            "-rfbunixmode",
            "0600",
            "-NeverShared",
            "-BlacklistThreshold",
            NEVER,
            "-MaxDisconnectionTime",
            &linger,
            "-nolisten",
            "tcp",
            "-extension",
            "GLX",
            "-ac",
            "-noreset",
        ];
        self.run(&argv.map(str::to_owned), &self.tuned, log)
    }

    fn proxy(&self, log: &Log) -> io::Result<u32> {
        let mut env = self.tuned.clone();
        env.insert("DISPLAY".to_owned(), format!(":{HEAD_DISPLAY}"));
        let options = format!(
            "nx/nx,connect=unix:{},root={},session=qvd,id=qvd,retry=5:{SESSION_DISPLAY}",
            self.desktop.nx_socket().display(),
            self.desktop.proxy_root().display()
        );
        self.run(&["nxproxy", "-S", &options].map(str::to_owned), &env, log)
    }

    /// Keeps the head from ending by itself for as long as it is needed, however long it
    /// takes on a busy machine until its client comes: it counts from when nobody is
    /// connected any more.
    pub(crate) fn keep_head(&mut self) {
        if !self.machine.needs_head() {
            self.kept = None;
        } else if self.kept.is_none() {
            // Where it does not listen yet, the next event finds it.
            self.kept = self.desktop.connect(DisplayKind::Rfb { geometry: self.config.geometry }).ok();
        }
    }

    /// Signals a program; says what failed. One that ended already is not ours
    /// to signal: its end is on the way.
    pub(crate) fn signal(&self, role: Role, signal: Signal) -> Option<String> {
        let pid = *self.pids.get(&role)?;
        match exec::group(pid, signal) {
            Ok(()) | Err(Errno::SRCH) => None,
            Err(e) => Some(format!("cannot signal {role:?}: {e}")),
        }
    }

    /// Kills all that the user runs but what shows the session, and waits until it
    /// is gone, for a moment.
    pub(crate) fn end_programs(&self) -> Result<(), String> {
        let uid = self.desktop.user().uid;
        let shows = [Role::Agent, Role::Head, Role::Proxy, Role::Fit];
        let kept: Vec<u32> = shows.iter().filter_map(|role| self.pids.get(role)).copied().collect();
        for _ in 0..END_LOOKS {
            let running = stats::running_as(uid);
            let left: Vec<u32> = running.into_iter().filter(|pid| !kept.contains(pid)).collect();
            if left.is_empty() {
                return Ok(());
            }
            for pid in left.into_iter().filter_map(|pid| Pid::from_raw(pid.cast_signed())) {
                // It may have ended just now.
                let _gone = rustix::process::kill_process(pid, Signal::KILL);
            }
            std::thread::sleep(END_LOOK);
        }
        Err("its programs do not end".to_owned())
    }

    pub(crate) fn clients(&self) -> u32 {
        let heads = stats::clients(&self.desktop.rfb_socket().display().to_string());
        heads.saturating_sub(self.kept.is_some().into()) + u32::from(self.machine.is_native())
    }
}
