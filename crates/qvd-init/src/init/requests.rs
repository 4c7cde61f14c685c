//! What the node asks, and what it is answered.

use std::{os::fd::OwnedFd, time::Duration};

use qvd_guest::{Channel, ExecRequest, GuestError, Reply, Request, STILL_MAX, SessionState, Stats, VERSION};
use rustix::{net::SocketFlags, process::Signal};

use super::{Child, Connection, Init, Purpose};
use crate::{
    exec::Exec,
    graphical::Graphical,
    session::{Client, Event, Session},
    spawn::Identity,
    stats,
    still::Still,
};

impl Init {
    pub(super) fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // An error is the caller's that is gone, or passes.
        let Ok(socket) = rustix::net::accept_with(&self.control, flags) else { return };
        self.connections.insert(self.next, Connection { channel: Channel::new(socket), purpose: Purpose::Unknown });
        self.next += 1;
    }

    /// Reads what the node says on a connection.
    pub(super) fn hear(&mut self, id: Client) {
        loop {
            let Some(connection) = self.connections.get_mut(&id) else { return };
            match connection.channel.try_recv::<Request>() {
                Ok(Some((request, fds))) => self.obey(id, request, fds),
                Ok(None) => return,
                Err(_) => return self.hung_up(id),
            }
        }
    }

    pub(super) fn hung_up(&mut self, id: Client) {
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
    pub(super) fn let_go(&mut self, id: Client) {
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
    pub(super) fn answer(&mut self, id: Client, reply: &Reply) {
        if let Some(connection) = self.connections.get_mut(&id)
            && connection.channel.send(reply, &[]).is_err()
            && !matches!(connection.purpose, Purpose::Exec(_) | Purpose::Attach)
        {
            // The others are noticed, with all that hangs on them, when read.
            self.connections.remove(&id);
        }
    }

    pub(super) fn refuse(&mut self, id: Client, op: &str, reason: &str) {
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

    pub(super) fn broadcast(&mut self) {
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
}
