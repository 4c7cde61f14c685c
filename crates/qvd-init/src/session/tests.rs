#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;

use qvd_core::LinkSpeed;

use super::{
    programs::{PAUSE, WORKED, pause},
    *,
};

const ATTACH_DEADLINE: Duration = Duration::from_secs(20);
const TICK: Duration = Duration::from_millis(1);

/// The session's programs, as strict as the real ones: what cannot happen panics.
struct World {
    session: Session,
    now: Moment,
    running: BTreeSet<Role>,
    seen: Seen,
    /// Signals that the agent still ignores.
    deaf: u32,
    /// Whether anybody gets through to the display.
    answers: bool,
    log: Vec<Action>,
}

fn rfb() -> DisplayKind {
    DisplayKind::Rfb { geometry: Geometry::new(1000, 700).unwrap() }
}

fn native() -> DisplayKind {
    DisplayKind::Nx { geometry: Geometry::default(), fullscreen: false, link: LinkSpeed::Adsl }
}

impl World {
    fn new() -> Self {
        Self {
            session: Session::new(Geometry::default(), ATTACH_DEADLINE),
            now: Moment::ZERO,
            running: BTreeSet::new(),
            seen: Seen::default(),
            deaf: 0,
            answers: true,
            log: Vec::new(),
        }
    }

    fn booted() -> Self {
        let mut world = Self::new();
        world.until(|world| world.session.state() == SessionState::Ready);
        world.log.clear();
        world
    }

    /// Sends an event and lets everything that follows from it happen.
    fn happen(&mut self, event: Option<Event>) {
        let mut events = Vec::from_iter(event);
        loop {
            let mut actions = Vec::new();
            for event in events.drain(..) {
                self.session.note(self.now, event, &mut actions);
            }
            self.session.step(self.now, &mut actions);
            for action in actions {
                self.log.push(action);
                events.extend(self.act(action));
            }
            if events.is_empty() {
                return;
            }
        }
    }

    fn end(&mut self, role: Role, exit: Exit) -> Vec<Event> {
        if !self.running.remove(&role) {
            return Vec::new();
        }
        match role {
            Role::Head => self.seen.head_socket = false,
            Role::Proxy if self.seen.agent == AgentState::Running => self.seen.agent = AgentState::Suspended,
            Role::Agent => self.seen = Seen { head_socket: self.seen.head_socket, ..Seen::default() },
            _ => {}
        }
        vec![Event::Seen(self.seen), Event::Ended(role, exit)]
    }

    fn act(&mut self, action: Action) -> Vec<Event> {
        match action {
            Action::Start(role, _) => {
                assert!(self.running.insert(role), "{role:?} runs already: {:?}", self.log);
                match role {
                    Role::Agent => {
                        self.seen.agent = AgentState::Starting;
                        self.seen.listens = true;
                    }
                    Role::Head => self.seen.head_socket = true,
                    Role::Proxy => {
                        assert!(self.seen.listens && self.seen.head_socket, "{:?}", self.log);
                        self.seen.listens = false;
                        self.seen.session_socket = true;
                        self.seen.agent = AgentState::Running;
                    }
                    Role::WindowManager => assert!(self.seen.session_socket),
                    Role::Watch => {
                        self.running.remove(&role);
                        return vec![Event::Seen(self.seen), Event::Ended(role, Exit::Code(0))];
                    }
                    Role::Fit => {}
                }
                vec![Event::Seen(self.seen)]
            }
            Action::End(role) => self.end(role, Exit::Signal(15)),
            Action::Kill(role) => self.end(role, Exit::Signal(9)),
            Action::Toggle if self.deaf > 0 => {
                self.deaf -= 1;
                Vec::new()
            }
            Action::Toggle => {
                assert!(self.running.contains(&Role::Agent));
                (self.seen.agent, self.seen.listens) = match self.seen.agent {
                    AgentState::Running => (AgentState::Suspended, false),
                    AgentState::Suspended => (AgentState::Resuming, true),
                    other => panic!("toggled while {other:?}"),
                };
                vec![Event::Seen(self.seen)]
            }
            Action::Connect(..) if !self.answers => vec![Event::NotConnected],
            Action::Connect(client, DisplayKind::Rfb { .. }) => {
                assert!(self.running.contains(&Role::Head) && self.seen.agent == AgentState::Running);
                vec![Event::Connected(client)]
            }
            Action::Connect(client, _) => {
                assert!(self.seen.listens && !self.running.contains(&Role::Proxy), "{:?}", self.log);
                (self.seen.agent, self.seen.listens) = (AgentState::Running, false);
                vec![Event::Connected(client), Event::Seen(self.seen)]
            }
            Action::Resize(_) => vec![Event::Resized],
            _ => Vec::new(),
        }
    }

    fn until(&mut self, done: impl Fn(&Self) -> bool) {
        for _ in 0..100_000 {
            self.happen(None);
            if done(self) {
                return;
            }
            self.now += TICK;
        }
        panic!("never came: {:?}", self.log);
    }

    fn has(&self, wanted: impl Fn(&Action) -> bool) -> bool {
        self.log.iter().any(wanted)
    }

    fn connected(&self, client: Client) -> bool {
        self.has(|action| matches!(action, Action::Connect(to, _) if *to == client)) && self.session.waiting.is_none()
    }

    fn kill(&mut self, role: Role, exit: Exit) {
        for event in self.end(role, exit) {
            self.happen(Some(event));
        }
    }
}

#[test]
fn a_session_boots_on_a_head_of_its_own() {
    let mut world = World::new();
    world.until(|world| world.session.state() == SessionState::Ready);
    assert!(world.running.is_superset(&BTreeSet::from([Role::Agent, Role::Head, Role::Proxy, Role::WindowManager])));
    assert_eq!(world.log.iter().filter(|action| **action == Action::Autostart).count(), 1);
    assert!(world.session.ready_at().is_some());
    assert!(!world.has(|action| *action == Action::Toggle));
}

#[test]
fn a_browser_gets_the_running_head_at_once_and_at_its_size() {
    let mut world = World::booted();
    world.happen(Some(Event::Attach(1, rfb())));
    assert!(world.connected(1));
    let DisplayKind::Rfb { geometry } = rfb() else { panic!() };
    // In this order: a client that comes before the size is thrown out.
    let mut place = world.log.iter().filter(|action| matches!(action, Action::Resize(_) | Action::Connect(..)));
    assert_eq!(place.next(), Some(&Action::Resize(geometry)));
    assert!(!world.has(|action| matches!(action, Action::Start(..) | Action::Toggle)), "{:?}", world.log);
}

#[test]
fn a_browser_wakes_a_suspended_session() {
    let mut world = World::booted();
    // The head ends when nobody was there for long enough.
    world.kill(Role::Head, Exit::Code(0));
    assert_eq!(world.seen.agent, AgentState::Suspended);
    assert!(!world.running.contains(&Role::Proxy));
    world.log.clear();
    world.happen(Some(Event::Attach(1, rfb())));
    world.until(|world| world.connected(1));
    assert!(world.running.contains(&Role::Fit));
    assert_eq!(world.session.state(), SessionState::Ready);
}

#[test]
fn a_session_roams_from_browser_to_native_client_and_back() {
    let mut world = World::booted();
    world.happen(Some(Event::Attach(1, native())));
    world.until(|world| world.connected(1));
    assert!(world.session.is_native());
    assert!(!world.running.contains(&Role::Head), "a head nobody sees costs memory");
    let options = world
        .log
        .iter()
        .position(|action| *action == Action::Options(crate::options::Occasion::Resume, native()))
        .unwrap();
    let toggle = world.log.iter().position(|action| *action == Action::Toggle).unwrap();
    assert!(options < toggle, "the agent reads its options when it resumes");

    world.log.clear();
    world.happen(Some(Event::Attach(2, rfb())));
    world.until(|world| world.connected(2));
    assert!(!world.session.is_native());
    assert!(world.running.contains(&Role::WindowManager));
    assert!(!world.has(|action| matches!(action, Action::Start(Role::Agent | Role::WindowManager, _))));
}

#[test]
fn a_head_is_needed_until_its_client_has_it() {
    let mut world = World::booted();
    assert!(!world.session.needs_head(), "nobody waits");
    world.happen(Some(Event::Attach(1, native())));
    world.until(|world| world.connected(1));
    assert!(!world.session.needs_head());
    // However long the agent takes to move, and to let anybody in.
    (world.deaf, world.answers) = (3, false);
    world.happen(Some(Event::Attach(2, rfb())));
    world.until(|world| world.session.is_shown());
    assert!(world.session.needs_head());
    world.answers = true;
    world.until(|world| world.connected(2));
    assert!(!world.session.needs_head(), "it is the client that keeps it now");
}

#[test]
fn a_native_client_takes_over_from_another() {
    let mut world = World::booted();
    world.happen(Some(Event::Attach(1, native())));
    world.until(|world| world.connected(1));
    world.log.clear();
    world.happen(Some(Event::Attach(2, native())));
    world.until(|world| world.connected(2));
    assert_eq!(world.log.iter().filter(|action| **action == Action::Toggle).count(), 2);
}

#[test]
fn a_signal_the_agent_ignored_is_sent_again() {
    let mut world = World::booted();
    world.deaf = 3;
    world.happen(Some(Event::Attach(1, native())));
    world.until(|world| world.connected(1));
    assert_eq!(world.log.iter().filter(|action| **action == Action::Toggle).count(), 4);
}

#[test]
fn a_state_file_caught_empty_changes_nothing() {
    let mut world = World::booted();
    world.happen(Some(Event::Seen(Seen { agent: AgentState::Unknown, ..world.seen })));
    assert!(world.log.is_empty(), "{:?}", world.log);
}

#[test]
fn an_agent_on_its_way_down_is_left_alone() {
    let mut world = World::booted();
    world.happen(Some(Event::Seen(Seen { agent: AgentState::Busy, ..world.seen })));
    world.happen(Some(Event::Attach(1, rfb())));
    assert!(!world.has(|action| matches!(action, Action::Toggle | Action::Connect(..))), "{:?}", world.log);
}

#[test]
fn a_display_that_never_opens_is_refused_with_the_step() {
    let mut world = World::booted();
    world.answers = false;
    world.happen(Some(Event::Attach(1, rfb())));
    world.until(|world| world.session.waiting.is_none());
    assert!(world.has(|action| matches!(action, Action::Refuse(1, "open the display", _))), "{:?}", world.log);
    assert!(world.now >= ATTACH_DEADLINE);
}

#[test]
fn the_last_of_two_that_wait_wins() {
    let mut world = World::booted();
    world.answers = false;
    world.happen(Some(Event::Attach(1, rfb())));
    world.happen(Some(Event::Attach(2, rfb())));
    assert!(world.has(|action| matches!(action, Action::Refuse(1, ..))));
    world.answers = true;
    world.until(|world| world.connected(2));
}

#[test]
fn who_left_is_not_waited_for() {
    let mut world = World::booted();
    world.answers = false;
    world.happen(Some(Event::Attach(1, rfb())));
    world.happen(Some(Event::Gone(1)));
    world.log.clear();
    world.now += ATTACH_DEADLINE * 2;
    world.happen(None);
    assert!(world.log.is_empty(), "{:?}", world.log);
}

#[test]
fn a_dead_agent_takes_all_with_it_and_the_session_comes_back() {
    let mut world = World::booted();
    world.kill(Role::Agent, Exit::Signal(11));
    assert_eq!(world.session.state(), SessionState::Restarting);
    assert!(world.running.is_empty(), "{:?}", world.running);
    let died = world.now;
    world.until(|world| world.session.state() == SessionState::Ready);
    assert!(world.now >= died + PAUSE.0);
    assert!(world.has(|action| *action == Action::Clear));
}

#[test]
fn what_a_dead_agent_left_is_not_taken_for_the_next_ones() {
    let mut world = World::booted();
    let before = world.seen;
    world.kill(Role::Agent, Exit::Signal(9));
    world.happen(Some(Event::Seen(before)));
    world.log.clear();
    world.happen(Some(Event::Attach(1, rfb())));
    world.until(|world| world.connected(1));
    assert!(!world.has(|action| *action == Action::Toggle), "it would kill an agent that only starts");
}

#[test]
fn a_crashed_window_manager_is_replaced_and_programs_stay() {
    let mut world = World::booted();
    world.kill(Role::WindowManager, Exit::Signal(11));
    assert_eq!(world.session.state(), SessionState::Restarting);
    world.until(|world| world.session.state() == SessionState::Ready);
    assert!(!world.has(|action| matches!(action, Action::End(Role::Agent) | Action::Autostart)), "{:?}", world.log);
}

#[test]
fn a_program_that_met_a_display_between_two_fronts_is_started_again() {
    let mut world = World::booted();
    world.happen(Some(Event::Attach(1, native())));
    world.happen(Some(Event::ProgramEnded(0, Exit::Code(1))));
    assert!(!world.has(|action| *action == Action::AutostartAgain(0)), "{:?}", world.log);
    world.until(|world| world.connected(1));
    world.until(|world| world.has(|action| *action == Action::AutostartAgain(0)));
}

#[test]
fn a_program_that_does_not_work_or_was_closed_is_left_alone() {
    let mut world = World::booted();
    world.happen(Some(Event::ProgramEnded(0, Exit::Code(0))));
    for _ in 0..10 {
        world.happen(Some(Event::ProgramEnded(1, Exit::Code(1))));
        world.now += Duration::from_secs(1);
        world.happen(None);
    }
    let tries = |index| world.log.iter().filter(|action| **action == Action::AutostartAgain(index)).count();
    assert_eq!((tries(0), tries(1)), (0, 3), "{:?}", world.log);
}

#[test]
fn signing_out_ends_the_whole_session() {
    let mut world = World::booted();
    world.kill(Role::WindowManager, Exit::Code(0));
    assert!(world.has(|action| *action == Action::End(Role::Agent)));
    world.log.clear();
    world.until(|world| world.session.state() == SessionState::Ready);
    assert!(world.has(|action| matches!(action, Action::Start(Role::Agent, _))));
    assert!(world.has(|action| *action == Action::Autostart));
}

#[test]
fn what_dies_again_and_again_is_started_ever_more_rarely() {
    assert_eq!(pause(0), PAUSE.0);
    assert!(pause(3) > pause(2));
    assert_eq!(pause(200), PAUSE.1);
    let (failures, due) = restart(5, Moment::ZERO, WORKED);
    assert_eq!((failures, due), (1, WORKED + PAUSE.0));
}

#[test]
fn whatever_dies_whenever_the_session_comes_back() {
    let roles = [Role::Agent, Role::Head, Role::Proxy, Role::Fit, Role::WindowManager];
    // A fixed walk over deaths, attaches and pauses; World panics on nonsense.
    let mut world = World::booted();
    let mut number = 12_345_u64;
    for client in 0..2000 {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let pick = usize::try_from(number >> 40).unwrap();
        match pick % 8 {
            0..=4 => {
                let exit = if pick & 64 == 0 { Exit::Signal(9) } else { Exit::Code(1) };
                world.kill(roles[pick % 5], exit);
            }
            5 => world.happen(Some(Event::Attach(client, native()))),
            6 => world.happen(Some(Event::Attach(client, rfb()))),
            _ => world.now += Duration::from_millis(number % 3000),
        }
        world.log.clear();
    }
    world.now += PAUSE.1;
    world.until(|world| world.session.state() == SessionState::Ready);
    world.happen(Some(Event::Attach(9999, rfb())));
    world.until(|world| world.connected(9999));
}

#[test]
fn a_held_session_keeps_its_display_and_begins_anew_when_it_is_let() {
    let mut world = World::booted();
    world.happen(Some(Event::Hold));
    assert!(!world.running.contains(&Role::WindowManager));
    let shown_by = world.running.clone();
    world.now += Duration::from_secs(60);
    world.happen(None);
    assert_eq!(world.running, shown_by, "nothing starts while it is held");
    assert!(world.running.contains(&Role::Agent));
    assert_eq!(world.session.state(), SessionState::Starting);
    world.log.clear();
    world.happen(Some(Event::Release));
    world.until(|world| world.session.state() == SessionState::Ready);
    assert!(!world.has(|action| matches!(action, Action::Start(Role::Agent, _))), "{:?}", world.log);
    assert!(world.has(|action| *action == Action::Autostart));
}

#[test]
fn a_held_session_that_nobody_shows_is_shown_before_it_begins() {
    let mut world = World::booted();
    world.happen(Some(Event::Hold));
    world.kill(Role::Head, Exit::Code(0));
    assert_eq!(world.seen.agent, AgentState::Suspended);
    world.happen(Some(Event::Release));
    world.until(|world| world.session.state() == SessionState::Ready && world.seen.agent == AgentState::Running);
    assert!(world.running.contains(&Role::Proxy));
}
