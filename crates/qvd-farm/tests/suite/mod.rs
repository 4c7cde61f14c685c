//! What a farm does, whatever its database: a host in memory, and a database of each test's own.

use std::{
    cell::RefCell,
    collections::HashSet,
    net::IpAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use qvd_core::{
    Bytes, DesktopId, DesktopState, DisplayKind, FlavourName, Geometry, Limits, MilliCpu, NetPolicy, StartStep,
    TenantName, UserName,
};
use qvd_farm::{
    Clock, Database, Desktop, ErrorKind, Farm, FarmError, FlavourDefaults, NewDesktop, OwnedDesktops, Progress, Secret,
    SessionKind,
};
use qvd_guest::ExecRequest;
use qvd_node::{
    EndReason, HostError, HostErrorKind,
    fake::{FakeHost, GREETING, Op},
};
use qvd_storage::Defaults;
use qvd_testkit::Postgres;
use tempfile::TempDir;
use tokio::sync::mpsc;

pub(crate) const PASSWORD: &str = "correct horse";

/// A clock that stands until it is told to go.
#[derive(Debug)]
pub(crate) struct TestClock {
    start: Instant,
    passed: Mutex<Duration>,
}

impl TestClock {
    fn new() -> Self {
        Self { start: Instant::now(), passed: Mutex::default() }
    }

    fn advance(&self, by: Duration) {
        *self.passed.lock().unwrap() += by;
    }
}

impl Clock for TestClock {
    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000) + *self.passed.lock().unwrap()
    }

    fn monotonic(&self) -> Instant {
        self.start + *self.passed.lock().unwrap()
    }
}

thread_local! {
    /// The server that has the databases of this thread's tests; none, and each has a file.
    pub(crate) static SERVER: RefCell<Option<Postgres>> = const { RefCell::new(None) };
}

fn database(dir: &TempDir) -> Database {
    SERVER.with_borrow(|server| match server {
        None => Database::File(dir.path().join("qvd.sqlite")),
        Some(server) => {
            let name = dir.path().file_name().unwrap().to_str().unwrap();
            Database::Postgres(server.database(name).parse().unwrap())
        }
    })
}

pub(crate) struct World {
    pub(crate) dir: TempDir,
    pub(crate) host: Arc<FakeHost>,
    pub(crate) clock: Arc<TestClock>,
    pub(crate) farm: Farm,
}

impl World {
    pub(crate) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (host, clock) = (Arc::new(FakeHost::new()), Arc::new(TestClock::new()));
        let farm = Self::open(&dir, &host, &clock).await;
        Self { dir, host, clock, farm }
    }

    pub(crate) async fn with_user() -> Self {
        let world = Self::new().await;
        world.farm.add_user(&user("ada"), &Secret::from(PASSWORD), false).await.unwrap();
        world
    }

    pub(crate) async fn open(dir: &TempDir, host: &Arc<FakeHost>, clock: &Arc<TestClock>) -> Farm {
        Self::try_open(dir, host, clock).await.unwrap()
    }

    pub(crate) async fn try_open(
        dir: &TempDir,
        host: &Arc<FakeHost>,
        clock: &Arc<TestClock>,
    ) -> Result<Farm, FarmError> {
        let (host, clock) = (Arc::clone(host), Arc::clone(clock));
        Farm::open_with_clock(&database(dir), host, clock).await
    }

    async fn reopen(self) -> Self {
        self.farm.close().await;
        let farm = Self::open(&self.dir, &self.host, &self.clock).await;
        Self { farm, ..self }
    }

    pub(crate) async fn desktop(&self) -> Desktop {
        self.farm.create_desktop(NewDesktop::new(user("ada"), icewm())).await.unwrap()
    }
}

pub(crate) fn user(name: &str) -> UserName {
    name.parse().unwrap()
}

pub(crate) fn icewm() -> FlavourName {
    "icewm".parse().unwrap()
}

fn id(number: u32) -> DesktopId {
    DesktopId::new(number).unwrap()
}

fn unheard() -> mpsc::Sender<Progress> {
    mpsc::channel(1).0
}

fn ip(text: &str) -> Option<IpAddr> {
    Some(text.parse().unwrap())
}

fn browser() -> DisplayKind {
    DisplayKind::Rfb { geometry: Geometry::default() }
}

pub(crate) async fn users_come_and_go() {
    let world = World::with_user().await;
    let taken = world.farm.add_user(&user("ada"), &Secret::from(PASSWORD), true).await.unwrap_err();
    assert_eq!((taken.kind(), taken.code()), (ErrorKind::Conflict, "user_exists"));
    assert!(!world.farm.user(&user("ada")).await.unwrap().admin, "a refused addition changes nothing");
    world.farm.add_user(&user("bob"), &Secret::from(PASSWORD), true).await.unwrap();
    let names: Vec<_> = world.farm.users().await.unwrap().into_iter().map(|u| (u.name.to_string(), u.admin)).collect();
    assert_eq!(names, [("ada".to_owned(), false), ("bob".to_owned(), true)]);
    world.farm.remove_user(&user("bob"), OwnedDesktops::Refuse).await.unwrap();
    let gone = world.farm.remove_user(&user("bob"), OwnedDesktops::Refuse).await.unwrap_err();
    assert_eq!((gone.kind(), gone.code()), (ErrorKind::NotFound, "unknown_user"));
}

/// Whose user somebody is goes with each start to the host, also after a restart.
pub(crate) async fn a_desktop_is_of_its_users_tenant() {
    let world = World::with_user().await;
    let lab: TenantName = "lab".parse().unwrap();
    let eve = world.farm.add_user_of(&lab, &user("eve"), &Secret::from(PASSWORD), false).await.unwrap();
    assert_eq!(eve.tenant, lab);
    let world = world.reopen().await;
    assert_eq!(world.farm.user(&user("eve")).await.unwrap().tenant, lab);
    for (name, tenant) in [("eve", lab), ("ada", TenantName::default())] {
        let desktop = world.farm.create_desktop(NewDesktop::new(user(name), icewm())).await.unwrap();
        world.farm.start(desktop.id, unheard()).await.unwrap();
        assert_eq!(world.host.spec(desktop.id).unwrap().tenant, tenant);
    }
}

pub(crate) async fn a_user_with_desktops_is_removed_only_with_them() {
    let world = World::with_user().await;
    let desktop = world.desktop().await;
    world.farm.start(desktop.id, unheard()).await.unwrap();
    let refused = world.farm.remove_user(&user("ada"), OwnedDesktops::Refuse).await.unwrap_err();
    assert_eq!((refused.kind(), refused.code()), (ErrorKind::Conflict, "user_has_desktops"));
    assert_eq!(world.host.removed(), []);

    world.host.fail_next(Op::Remove, HostError::new(HostErrorKind::Busy, "a mount is busy"));
    let failed = world.farm.remove_user(&user("ada"), OwnedDesktops::Remove).await.unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Busy);
    assert!(world.farm.user(&user("ada")).await.is_ok(), "whose desktop is left stays");

    world.farm.remove_user(&user("ada"), OwnedDesktops::Remove).await.unwrap();
    assert_eq!(world.host.removed(), [desktop.id]);
    assert_eq!(world.farm.desktops(None).await.unwrap(), []);
}

pub(crate) async fn a_wrong_name_and_a_wrong_password_look_alike() {
    let world = World::with_user().await;
    let ada = world.farm.authenticate("ada", &Secret::from(PASSWORD), ip("192.0.2.1")).await.unwrap();
    assert_eq!(ada.name, user("ada"));
    let mut refusals = HashSet::new();
    for (name, password) in [("ada", "wrong horse"), ("nobody", PASSWORD), ("no\nname", PASSWORD), ("", "")] {
        let error = world.farm.authenticate(name, &Secret::from(password), ip("192.0.2.1")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthenticated);
        refusals.insert((error.code(), error.to_string()));
    }
    assert_eq!(refusals.len(), 1, "{refusals:?}");
}

pub(crate) async fn guessing_is_slowed_down_even_for_the_right_password() {
    let world = World::with_user().await;
    let wait = loop {
        match world.farm.authenticate("ada", &Secret::from("wrong horse"), None).await.unwrap_err().kind() {
            ErrorKind::TooMany { retry_after } => break retry_after,
            kind => assert_eq!(kind, ErrorKind::Unauthenticated),
        }
    };
    let refused = world.farm.authenticate("ada", &Secret::from(PASSWORD), None).await.unwrap_err();
    assert_eq!(refused.retry_after(), Some(wait));
    world.clock.advance(wait);
    world.farm.authenticate("ada", &Secret::from(PASSWORD), None).await.unwrap();
}

pub(crate) async fn many_guesses_at_once_are_counted_before_they_are_compared() {
    let world = World::with_user().await;
    let guesses: Vec<_> = (0..12)
        .map(|_| {
            let farm = world.farm.clone();
            tokio::spawn(async move { farm.authenticate("ada", &Secret::from("wrong horse"), None).await })
        })
        .collect();
    let mut compared = 0;
    for guess in guesses {
        let error = guess.await.unwrap().unwrap_err();
        compared += usize::from(error.kind() == ErrorKind::Unauthenticated);
    }
    assert_eq!(compared, 5);
}

pub(crate) async fn a_new_password_ends_the_sessions_and_the_old_password() {
    let world = World::with_user().await;
    let session = world.farm.create_session(&user("ada"), SessionKind::Web).await.unwrap();
    world.farm.set_password(&user("ada"), &Secret::from("battery staple")).await.unwrap();
    let ended = world.farm.find_session(&session.token, SessionKind::Web).await.unwrap_err();
    assert_eq!((ended.kind(), ended.code()), (ErrorKind::Unauthenticated, "session_ended"));
    assert!(world.farm.authenticate("ada", &Secret::from(PASSWORD), None).await.is_err());
    assert!(world.farm.authenticate("ada", &Secret::from("battery staple"), None).await.is_ok());
    let unknown = world.farm.set_password(&user("eve"), &Secret::from("battery staple")).await.unwrap_err();
    assert_eq!(unknown.code(), "unknown_user");
}

pub(crate) async fn sessions_are_found_by_their_token_and_kind_and_end() {
    let world = World::with_user().await;
    let made = world.farm.create_session(&user("ada"), SessionKind::Web).await.unwrap();
    assert_eq!(made.token.expose().len(), 64);
    let found = world.farm.find_session(&made.token, SessionKind::Web).await.unwrap();
    assert_eq!(found.user.name, user("ada"));
    assert!(found.csrf_matches(made.session.csrf_token()));
    assert_ne!(found.csrf_token(), made.token.expose());
    for wrong in ["", "x", &found.csrf_token()[1..], made.token.expose()] {
        assert!(!found.csrf_matches(wrong), "{wrong}");
    }
    assert!(world.farm.find_session(&made.token, SessionKind::Bearer).await.is_err(), "a cookie is no bearer token");
    assert!(world.farm.find_session(&Secret::from("x"), SessionKind::Web).await.is_err());

    let world = world.reopen().await;
    assert!(world.farm.find_session(&made.token, SessionKind::Web).await.is_ok(), "it outlives the daemon");
    world.farm.end_session(&made.token).await.unwrap();
    assert!(world.farm.find_session(&made.token, SessionKind::Web).await.is_err());
    world.farm.end_session(&made.token).await.unwrap();
}

pub(crate) async fn sessions_expire() {
    const HOUR: Duration = Duration::from_secs(3600);
    let world = World::with_user().await;
    let idle = world.farm.create_session(&user("ada"), SessionKind::Web).await.unwrap().token;
    let used = world.farm.create_session(&user("ada"), SessionKind::Web).await.unwrap().token;
    let bearer = world.farm.create_session(&user("ada"), SessionKind::Bearer).await.unwrap().token;
    world.clock.advance(HOUR * 5);
    assert!(world.farm.find_session(&used, SessionKind::Web).await.is_ok());
    world.clock.advance(HOUR * 5);
    assert!(world.farm.find_session(&idle, SessionKind::Web).await.is_err(), "unused for ten hours");
    assert!(world.farm.find_session(&used, SessionKind::Web).await.is_ok(), "used five hours ago");
    assert!(world.farm.find_session(&bearer, SessionKind::Bearer).await.is_ok(), "ten hours old");
    assert_eq!(world.farm.sessions(Some(&user("ada"))).await.unwrap().len(), 2);
    assert_eq!(world.farm.sweep_sessions().await.unwrap(), 1);
    world.clock.advance(HOUR * 7);
    assert!(world.farm.find_session(&used, SessionKind::Web).await.is_ok(), "17 hours old, used again");
    world.clock.advance(HOUR * 7);
    assert!(world.farm.find_session(&used, SessionKind::Web).await.is_err(), "a day is the most");
    assert!(world.farm.find_session(&bearer, SessionKind::Bearer).await.is_err());
    assert_eq!(world.farm.sweep_sessions().await.unwrap(), 2);
}

pub(crate) async fn administrators_come_and_go_and_their_sessions_with_them() {
    let world = World::with_user().await;
    let (ada, kind) = (user("ada"), SessionKind::Admin);
    let refused = world.farm.create_session(&ada, kind).await.unwrap_err();
    assert_eq!((refused.kind(), refused.code()), (ErrorKind::Forbidden, "no_administrator"));
    let unknown = world.farm.set_admin(&user("eve"), true).await.unwrap_err();
    assert_eq!((unknown.kind(), unknown.code()), (ErrorKind::NotFound, "unknown_user"));
    world.farm.set_admin(&ada, true).await.unwrap();
    assert!(world.farm.user(&ada).await.unwrap().admin);

    let web = world.farm.create_session(&ada, SessionKind::Web).await.unwrap().token;
    let session = async || world.farm.create_session(&ada, kind).await.unwrap().token;
    let first = session().await;
    assert_eq!(world.farm.find_session(&first, kind).await.unwrap().user.name, ada);
    assert!(world.farm.find_session(&first, SessionKind::Web).await.is_err(), "it is good for nothing else");
    assert!(world.farm.find_session(&web, kind).await.is_err(), "nothing else does for it");
    world.farm.set_admin(&ada, false).await.unwrap();
    assert!(world.farm.find_session(&first, kind).await.is_err());
    assert!(world.farm.find_session(&web, SessionKind::Web).await.is_ok(), "ada is a user still");
    world.farm.set_admin(&ada, true).await.unwrap();
    assert!(world.farm.find_session(&first, kind).await.is_err(), "what ended does not come back");

    let (idle, used) = (session().await, session().await);
    world.clock.advance(Duration::from_secs(29 * 60));
    assert!(world.farm.find_session(&used, kind).await.is_ok());
    world.clock.advance(Duration::from_secs(2 * 60));
    assert!(world.farm.find_session(&idle, kind).await.is_err(), "unused for half an hour");
    assert!(world.farm.find_session(&used, kind).await.is_ok());
    assert_eq!(world.farm.sweep_sessions().await.unwrap(), 1);
    for _ in 0..22 {
        world.clock.advance(Duration::from_secs(20 * 60));
        assert!(world.farm.find_session(&used, kind).await.is_ok(), "it is in use");
    }
    world.clock.advance(Duration::from_secs(20 * 60));
    assert!(world.farm.find_session(&used, kind).await.is_err(), "eight hours are the most");
}

pub(crate) async fn an_unknown_flavour_is_told_the_known_ones() {
    let world = World::with_user().await;
    world.host.add_image("lxde".parse().unwrap());
    let new = NewDesktop::new(user("ada"), "kde".parse().unwrap());
    let error = world.farm.create_desktop(new).await.unwrap_err();
    assert_eq!((error.kind(), error.code()), (ErrorKind::NotFound, "unknown_flavour"));
    assert_eq!(error.to_string(), "unknown flavour `kde`; there is `icewm`, `lxde`");
}

pub(crate) async fn what_makes_no_sense_is_refused_and_leaves_nothing() {
    let world = World::with_user().await;
    let good = NewDesktop::new(user("ada"), icewm());
    let bad = [
        ("unknown_user", NewDesktop { user: user("eve"), ..good.clone() }),
        ("unknown_tag", NewDesktop { tag: Some("v1".parse().unwrap()), ..good.clone() }),
        ("invalid_name", NewDesktop { name: Some("Not a name".into()), ..good.clone() }),
        ("invalid_name", NewDesktop { name: Some("-x".into()), ..good.clone() }),
        ("invalid_name", NewDesktop { name: Some("a".repeat(64)), ..good.clone() }),
        ("invalid_address", NewDesktop { address: Some("127.0.0.1".parse().unwrap()), ..good.clone() }),
        (
            "invalid_address",
            NewDesktop { address: Some("10.0.0.9".parse().unwrap()), net: Some(NetPolicy::default()), ..good.clone() },
        ),
        (
            "invalid_limits",
            NewDesktop {
                limits: Some(qvd_core::Limits { memory: Bytes::new(0), ..Default::default() }),
                ..good.clone()
            },
        ),
    ];
    for (code, new) in bad {
        assert_eq!(world.farm.create_desktop(new).await.unwrap_err().code(), code);
    }
    assert_eq!(world.farm.desktops(None).await.unwrap(), []);
}

pub(crate) async fn what_a_desktop_has_beside_its_flavour_is_kept() {
    let world = World::with_user().await;
    let plain = world.farm.create_desktop(NewDesktop::new(user("ada"), icewm())).await.unwrap();
    assert_eq!((plain.devices.len(), plain.calls, plain.limits.io), (0, None, None));
    let mut new = NewDesktop::new(user("ada"), icewm());
    new.devices = [qvd_core::Device::Fuse, qvd_core::Device::Camera].into();
    new.calls = Some(qvd_core::Calls::Application);
    new.limits = Some(qvd_core::Limits { io: Some(Bytes::mib(20)), ..Default::default() });
    let made = world.farm.create_desktop(new.clone()).await.unwrap();
    assert_eq!((&made.devices, made.calls, Some(made.limits)), (&new.devices, new.calls, new.limits));
    assert_eq!(world.farm.desktop(made.id).await.unwrap(), made);
    let defaults = FlavourDefaults { limits: made.limits, ..FlavourDefaults::default() };
    world.farm.set_flavour_defaults(&icewm(), defaults.clone()).await.unwrap();
    assert_eq!(world.farm.flavour(&icewm()).await.unwrap().defaults, defaults);
}

pub(crate) async fn a_taken_address_says_by_whom() {
    let world = World::with_user().await;
    let new = NewDesktop { address: Some("10.77.0.9".parse().unwrap()), ..NewDesktop::new(user("ada"), icewm()) };
    let first = world.farm.create_desktop(new.clone()).await.unwrap();
    let error = world.farm.create_desktop(new.clone()).await.unwrap_err();
    assert_eq!((error.kind(), error.code()), (ErrorKind::Conflict, "address_taken"));
    assert_eq!(error.to_string(), format!("address 10.77.0.9 is taken by desktop {}", first.id));
    world.farm.remove_desktop(first.id).await.unwrap();
    assert!(world.farm.create_desktop(new).await.is_ok(), "free again");
}

pub(crate) async fn names_are_host_names_and_unique_for_their_user() {
    let world = World::with_user().await;
    world.host.add_image("lxde_12.1".parse().unwrap());
    world.farm.add_user(&user("bob"), &Secret::from(PASSWORD), false).await.unwrap();
    let (first, second) = (world.desktop().await, world.desktop().await);
    assert_eq!((first.name.as_str(), second.name.as_str()), ("icewm", "icewm-2"));
    let lxde = NewDesktop::new(user("ada"), "lxde_12.1".parse().unwrap());
    assert_eq!(world.farm.create_desktop(lxde).await.unwrap().name, "lxde-12-1");
    let named = NewDesktop { name: Some("icewm".into()), ..NewDesktop::new(user("ada"), icewm()) };
    let error = world.farm.create_desktop(named.clone()).await.unwrap_err();
    assert_eq!(error.code(), "name_taken");
    assert!(world.farm.create_desktop(NewDesktop { user: user("bob"), ..named }).await.is_ok());
    assert_eq!(world.farm.desktop_named(&user("ada"), "icewm-2").await.unwrap(), second);
    assert_eq!(world.farm.desktop_named(&user("bob"), "icewm-2").await.unwrap_err().kind(), ErrorKind::NotFound);
}

pub(crate) async fn numbers_are_never_used_again() {
    let world = World::with_user().await;
    assert_eq!(world.desktop().await.id, id(1));
    assert_eq!(world.desktop().await.id, id(2));
    world.farm.remove_desktop(id(2)).await.unwrap();
    let world = world.reopen().await;
    assert_eq!(world.desktop().await.id, id(3));
}

pub(crate) async fn a_desktop_is_its_users_and_the_refusals_differ() {
    let world = World::with_user().await;
    let desktop = world.desktop().await;
    assert_eq!(world.farm.desktop_of(&user("ada"), desktop.id).await.unwrap(), desktop);
    let foreign = world.farm.desktop_of(&user("eve"), desktop.id).await.unwrap_err();
    assert_eq!((foreign.kind(), foreign.code()), (ErrorKind::Forbidden, "not_yours"));
    let absent = world.farm.desktop_of(&user("ada"), id(9)).await.unwrap_err();
    assert_eq!((absent.kind(), absent.code()), (ErrorKind::NotFound, "unknown_desktop"));
}

pub(crate) async fn flavour_defaults_reach_new_desktops_only_and_survive_a_restart() {
    let world = World::with_user().await;
    let before = world.desktop().await;
    let mut defaults = FlavourDefaults::default();
    defaults.limits.memory = Bytes::mib(256);
    defaults.root = qvd_core::RootPolicy::Persistent;
    defaults.net.internet = false;
    defaults.net.destinations = vec!["192.0.2.0/24 tcp 443".parse().unwrap()];
    world.farm.set_flavour_defaults(&icewm(), defaults.clone()).await.unwrap();
    let world = world.reopen().await;
    assert_eq!(world.farm.flavour(&icewm()).await.unwrap().defaults, defaults);
    let after = world.desktop().await;
    assert_eq!((after.limits, after.root, after.net), (defaults.limits, defaults.root, defaults.net.clone()));
    assert_eq!(world.farm.desktop(before.id).await.unwrap(), before);
    let unknown = world.farm.set_flavour_defaults(&"kde".parse().unwrap(), defaults).await.unwrap_err();
    assert_eq!(unknown.code(), "unknown_flavour");
}

pub(crate) async fn a_recipe_says_what_desktops_get_until_an_administrator_does() {
    let world = World::with_user().await;
    let limits = Limits { memory: Bytes::mib(300), cpu: MilliCpu(700), pids: 99, io: Some(Bytes::mib(20)) };
    let said = Defaults { limits, net: Some(NetPolicy::host_only()), ..Defaults::default() };
    world.host.add_image_with(icewm(), said);
    let desktop = world.desktop().await;
    assert_eq!((desktop.limits, &desktop.net), (limits, &NetPolicy::host_only()));
    let mut defaults = world.farm.flavour(&icewm()).await.unwrap().defaults;
    defaults.net = NetPolicy::none();
    world.farm.set_flavour_defaults(&icewm(), defaults).await.unwrap();
    assert_eq!(world.desktop().await.net, NetPolicy::none());
    world.farm.forget_flavour_defaults(&icewm()).await.unwrap();
    assert_eq!(world.desktop().await.net, NetPolicy::host_only());
    // Of a network it says nothing: then there is one.
    world.host.add_image_with(icewm(), Defaults { limits, ..Defaults::default() });
    assert_eq!(world.desktop().await.net, NetPolicy::internet());
    let unknown = world.farm.forget_flavour_defaults(&"kde".parse().unwrap()).await.unwrap_err();
    assert_eq!(unknown.code(), "unknown_flavour");
}

pub(crate) async fn a_start_passes_the_record_to_the_host_and_the_steps_to_the_caller() {
    let world = World::with_user().await;
    let address = Some("10.77.0.9".parse().unwrap());
    let new = NewDesktop { address, name: Some("desk".into()), ..NewDesktop::new(user("ada"), icewm()) };
    let desktop = world.farm.create_desktop(new).await.unwrap();
    assert_eq!(world.farm.desktop_info(desktop.id).await.unwrap().status.state, DesktopState::Stopped);
    let (progress, mut heard) = mpsc::channel(16);
    let timings = world.farm.start(desktop.id, progress).await.unwrap();
    assert!(timings.session_us > 0);
    let mut steps = Vec::new();
    while let Some(step) = heard.recv().await {
        steps.push(step);
    }
    assert_eq!(steps.first(), Some(&Progress::Step(StartStep::Root)));
    assert_eq!(steps.last(), Some(&Progress::Step(StartStep::Session)));

    let spec = world.host.spec(desktop.id).unwrap();
    assert_eq!((spec.user, spec.hostname.as_str(), spec.address), (user("ada"), "desk", address));
    assert_eq!(spec.image, world.farm.flavour(&icewm()).await.unwrap().digest);
    let infos = world.farm.desktop_infos(Some(&user("ada"))).await.unwrap();
    assert_eq!(infos.iter().map(|info| info.status.state).collect::<Vec<_>>(), [DesktopState::Running]);
    assert_eq!(world.farm.stats(desktop.id).await.unwrap().processes, 9);
    world.farm.stop(desktop.id).await.unwrap();
    world.farm.stop(desktop.id).await.unwrap();
    assert!(world.host.spec(desktop.id).is_none());
    assert!(world.farm.stats(desktop.id).await.is_err());
}

pub(crate) async fn news_that_nobody_takes_holds_nobody_up() {
    let world = World::with_user().await;
    let desktop = world.desktop().await;
    let (progress, _never_read) = mpsc::channel(1);
    world.farm.start(desktop.id, progress).await.unwrap();
}

pub(crate) async fn a_failed_start_keeps_the_kind_and_the_cause() {
    let world = World::with_user().await;
    let desktop = world.desktop().await;
    world
        .host
        .fail_next(Op::EnsureRunning, HostError::new(HostErrorKind::Timeout, "the session was not ready in 30 s"));
    let error = world.farm.start(desktop.id, unheard()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert_eq!(error.to_string(), "cannot start desktop 1");
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(cause, "the session was not ready in 30 s");
}

pub(crate) async fn a_blocked_desktop_is_not_started_nor_opened() {
    let world = World::with_user().await;
    let desktop = world.desktop().await;
    world.farm.set_blocked(desktop.id, true).await.unwrap();
    for error in [
        world.farm.start(desktop.id, unheard()).await.unwrap_err(),
        world.farm.attach(desktop.id, browser(), "test", unheard()).await.unwrap_err(),
    ] {
        assert_eq!((error.kind(), error.code()), (ErrorKind::Forbidden, "desktop_blocked"));
    }
    world.farm.set_blocked(desktop.id, false).await.unwrap();
    world.farm.start(desktop.id, unheard()).await.unwrap();
    assert_eq!(world.farm.set_blocked(id(9), true).await.unwrap_err().kind(), ErrorKind::NotFound);
}

pub(crate) async fn a_click_starts_the_desktop_and_the_second_client_takes_it_over() {
    use std::io::Read;

    let world = World::with_user().await;
    let desktop = world.desktop().await;
    let first = world.farm.attach(desktop.id, browser(), "ada", unheard()).await.unwrap();
    let mut greeting = [0; GREETING.len()];
    first.stream().read_exact(&mut greeting).unwrap();
    assert_eq!(greeting, GREETING);
    assert!(world.farm.desktop_info(desktop.id).await.unwrap().status.attached);
    let second = world.farm.attach(desktop.id, browser(), "ada", unheard()).await.unwrap();
    assert_eq!(first.stream().read(&mut greeting).unwrap(), 0);
    assert_eq!(first.end_reason(), EndReason::TakenOver);
    world.farm.stop(desktop.id).await.unwrap();
    let mut rest = Vec::new();
    second.stream().read_to_end(&mut rest).unwrap();
    assert_eq!(second.end_reason(), EndReason::Stopped);
}

pub(crate) async fn a_program_needs_a_name_and_a_running_desktop() {
    let world = World::with_user().await;
    let desktop = world.desktop().await;
    let mut request = ExecRequest { argv: vec!["true".into()], env: Default::default(), root: false, tty: None };
    assert_eq!(world.farm.exec(desktop.id, request.clone()).await.unwrap_err().code(), "not_running");
    world.farm.start(desktop.id, unheard()).await.unwrap();
    assert!(world.farm.exec(desktop.id, request.clone()).await.is_ok());
    request.argv.clear();
    assert_eq!(world.farm.exec(desktop.id, request).await.unwrap_err().code(), "invalid_command");
}

pub(crate) async fn a_removal_that_failed_is_not_started_again_and_finished_at_the_next_open() {
    let world = World::with_user().await;
    let desktop = world.desktop().await;
    world.host.fail_next(Op::Remove, HostError::new(HostErrorKind::Busy, "a mount is busy"));
    assert_eq!(world.farm.remove_desktop(desktop.id).await.unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(world.farm.start(desktop.id, unheard()).await.unwrap_err().code(), "desktop_removing");
    assert_eq!(world.farm.desktops(None).await.unwrap().len(), 1, "it stays listed");
    let world = world.reopen().await;
    assert_eq!(world.host.removed(), [desktop.id]);
    assert_eq!(world.farm.desktops(None).await.unwrap(), []);
    assert_eq!(world.farm.remove_desktop(desktop.id).await.unwrap_err().code(), "unknown_desktop");
}

pub(crate) async fn a_host_that_still_fails_does_not_keep_the_farm_from_opening() {
    let world = World::with_user().await;
    let desktop = world.desktop().await;
    for _ in 0..2 {
        world.host.fail_next(Op::Remove, HostError::new(HostErrorKind::Busy, "a mount is busy"));
    }
    assert!(world.farm.remove_desktop(desktop.id).await.is_err());
    let world = world.reopen().await;
    assert_eq!(world.farm.desktops(None).await.unwrap().len(), 1);
}

pub(crate) async fn eight_writers_lose_nothing_and_a_restart_finds_all() {
    const WRITERS: u32 = 8;
    const EACH: u32 = 10;
    let world = World::with_user().await;
    let writers: Vec<_> = (0..WRITERS)
        .map(|_| {
            let farm = world.farm.clone();
            tokio::spawn(async move {
                for _ in 0..EACH {
                    farm.create_desktop(NewDesktop::new(user("ada"), icewm())).await.unwrap();
                    farm.create_session(&user("ada"), SessionKind::Bearer).await.unwrap();
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let world = world.reopen().await;
    let desktops = world.farm.desktops(None).await.unwrap();
    let names: HashSet<_> = desktops.iter().map(|d| d.name.clone()).collect();
    assert_eq!(names.len(), usize::try_from(WRITERS * EACH).unwrap());
    let numbers: Vec<_> = desktops.iter().map(|d| d.id.number()).collect();
    assert_eq!(numbers, (1..=WRITERS * EACH).collect::<Vec<_>>());
    assert_eq!(world.farm.sessions(None).await.unwrap().len(), desktops.len());
}

pub(crate) async fn a_start_and_a_removal_at_once_leave_nothing_running() {
    let world = World::with_user().await;
    for _ in 0..20 {
        let desktop = world.desktop().await;
        let (starter, remover) = (world.farm.clone(), world.farm.clone());
        let start = tokio::spawn(async move { starter.start(desktop.id, unheard()).await });
        let remove = tokio::spawn(async move { remover.remove_desktop(desktop.id).await });
        remove.await.unwrap().unwrap();
        // It may have come first or too late; it must not have come after.
        drop(start.await.unwrap());
        assert!(world.host.spec(desktop.id).is_none());
    }
}

/// Calls a macro with the name of each test.
macro_rules! every {
    ($each:ident) => {
        $each! {
            users_come_and_go
            a_desktop_is_of_its_users_tenant
            a_user_with_desktops_is_removed_only_with_them
            a_wrong_name_and_a_wrong_password_look_alike
            guessing_is_slowed_down_even_for_the_right_password
            many_guesses_at_once_are_counted_before_they_are_compared
            a_new_password_ends_the_sessions_and_the_old_password
            sessions_are_found_by_their_token_and_kind_and_end
            sessions_expire
            administrators_come_and_go_and_their_sessions_with_them
            an_unknown_flavour_is_told_the_known_ones
            what_makes_no_sense_is_refused_and_leaves_nothing
            what_a_desktop_has_beside_its_flavour_is_kept
            a_taken_address_says_by_whom
            names_are_host_names_and_unique_for_their_user
            numbers_are_never_used_again
            a_desktop_is_its_users_and_the_refusals_differ
            flavour_defaults_reach_new_desktops_only_and_survive_a_restart
            a_recipe_says_what_desktops_get_until_an_administrator_does
            a_start_passes_the_record_to_the_host_and_the_steps_to_the_caller
            news_that_nobody_takes_holds_nobody_up
            a_failed_start_keeps_the_kind_and_the_cause
            a_blocked_desktop_is_not_started_nor_opened
            a_click_starts_the_desktop_and_the_second_client_takes_it_over
            a_program_needs_a_name_and_a_running_desktop
            a_removal_that_failed_is_not_started_again_and_finished_at_the_next_open
            a_host_that_still_fails_does_not_keep_the_farm_from_opening
            eight_writers_lose_nothing_and_a_restart_finds_all
            a_start_and_a_removal_at_once_leave_nothing_running
        }
    };
}
pub(crate) use every;
