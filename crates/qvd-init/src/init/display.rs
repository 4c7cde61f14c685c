//! Carries out what the session decides.

use std::os::fd::AsFd as _;

use qvd_core::DisplayKind;
use qvd_guest::{Exit, Reply};
use rustix::process::Signal;

use super::{Child, Init};
use crate::{
    options::{HEAD_DISPLAY, SESSION_DISPLAY},
    session::{Action, Client, Event, Role},
    x11,
};

impl Init {
    /// Looks at the session's sockets and state; `again` times more if one of
    /// them is not settled.
    pub(super) fn look(&mut self, again: u32) {
        if let Some(graphical) = &mut self.graphical {
            let seen = graphical.desktop.look();
            graphical.looks = if seen.unsettled { again } else { 0 };
            self.session(Some(Event::Seen(seen)));
        }
    }

    /// Lets the session's machine take note of an event and does what it says.
    pub(super) fn session(&mut self, event: Option<Event>) {
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
            if let Some(graphical) = &mut self.graphical {
                graphical.keep_head();
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
}
