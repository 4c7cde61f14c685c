//! The API over a real unix socket, as the commands use it.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::BTreeMap,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use axum::{
    Extension, Router,
    body::Body,
    http::{Method, Request, StatusCode, header},
};
use qvd_core::{Bytes, DesktopId, DesktopState, FlavourName, StartStep, TenantName, UserName};
use qvd_farm::{Database, Farm, FlavourDefaults, OwnedDesktops, Secret, SessionKind};
use qvd_gateway::api::{
    ApiState, Caller, Client, ClientError, ExecOutput, ExecReader, UnixDoor, UnixServeError,
    dto::{AddUser, BuildImage, CreateDesktop, ErrorBody, ErrorInfo, SetPassword},
    router, serve_unix,
};
use qvd_gateway::images;
use qvd_guest::{ExecRequest, Exit};
use qvd_node::{
    HostError, HostErrorKind,
    fake::{FakeHost, Op, Script},
};
use serde_json::json;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::oneshot,
    task::JoinHandle,
};
use tower::ServiceExt;

const PASSWORD: &str = "correct horse";

struct World {
    dir: TempDir,
    host: Arc<FakeHost>,
    farm: Farm,
    client: Client,
    end: oneshot::Sender<()>,
    served: JoinHandle<Result<(), UnixServeError>>,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = Arc::new(FakeHost::new());
        let farm = Farm::open(&Database::File(dir.path().join("qvd.sqlite")), host.clone()).await.unwrap();
        let socket = dir.path().join("qvd.sock");
        let door = UnixDoor::bind(&socket).await.unwrap();
        let (end, ended) = oneshot::channel::<()>();
        let api = router(ApiState { farm: farm.clone() });
        let served = tokio::spawn(door.serve(api, async {
            ended.await.ok();
        }));
        Self { dir, host, farm, client: Client::unix(&socket), end, served }
    }

    async fn with_desktop() -> (Self, DesktopId) {
        let world = Self::new().await;
        world.client.add_user(&add("ada")).await.unwrap();
        let create = CreateDesktop::new(Some(user("ada")), icewm());
        let id = world.client.create_desktop(&create).await.unwrap().id;
        (world, id)
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("qvd.sock")
    }

    /// Asks the router as the HTTPS door would, for this caller or for nobody.
    async fn ask(&self, caller: Option<Caller>, request: Request<Body>) -> (StatusCode, String) {
        let mut api: Router = router(ApiState { farm: self.farm.clone() });
        if let Some(caller) = caller {
            api = api.layer(Extension(caller));
        }
        let response = api.oneshot(request).await.unwrap();
        let status = response.status();
        let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    async fn refusal(&self, caller: Option<Caller>, request: Request<Body>) -> (StatusCode, ErrorInfo) {
        let (status, body) = self.ask(caller, request).await;
        let error = serde_json::from_str::<ErrorBody>(&body).unwrap_or_else(|e| panic!("{e}: {status} {body}")).error;
        assert!(!error.id.is_empty());
        assert!(!error.message.contains('\n'));
        (status, error)
    }
}

fn user(name: &str) -> UserName {
    name.parse().unwrap()
}

fn icewm() -> FlavourName {
    "icewm".parse().unwrap()
}

fn add(name: &str) -> AddUser {
    AddUser { name: user(name), password: Secret::from(PASSWORD), admin: false, tenant: TenantName::default() }
}

fn build(recipe: &str) -> BuildImage {
    BuildImage { recipe: recipe.into(), author: None, message: Some("why".to_owned()) }
}

fn program(tty: Option<(u16, u16)>) -> ExecRequest {
    ExecRequest { argv: vec!["program".into()], env: BTreeMap::new(), root: false, tty }
}

fn request(method: Method, path: &str, body: Option<serde_json::Value>) -> Request<Body> {
    let request = Request::builder().method(method).uri(format!("/api/v1{path}"));
    match body {
        Some(json) => request.header(header::CONTENT_TYPE, "application/json").body(Body::from(json.to_string())),
        None => request.body(Body::empty()),
    }
    .unwrap()
}

/// All that a program said, and how it ended.
async fn to_end(mut reader: ExecReader) -> (Vec<u8>, Vec<u8>, Exit) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        match reader.next().await.unwrap() {
            ExecOutput::Stdout(bytes) => out.extend(bytes),
            ExecOutput::Stderr(bytes) => err.extend(bytes),
            ExecOutput::Exit(exit) => return (out, err, exit),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_desktop_lives_its_whole_life_over_the_socket() {
    let (world, id) = World::with_desktop().await;
    let client = &world.client;
    assert_eq!(client.health().await.unwrap().status, "ok");
    assert!(client.who_am_i().await.unwrap().admin);
    assert_eq!(client.users().await.unwrap().len(), 1);
    assert_eq!(client.flavours().await.unwrap()[0].name, icewm());

    let steps = Mutex::new(Vec::new());
    let timings = client.start(id, |step, _| steps.lock().unwrap().push(step)).await.unwrap();
    assert!(timings.start_us > 0);
    let steps = steps.into_inner().unwrap();
    assert_eq!((steps.first(), steps.last()), (Some(&Some(StartStep::Root)), Some(&Some(StartStep::Session))));
    assert_eq!(client.desktop(id).await.unwrap().status.state, DesktopState::Running);
    client.start(id, |_, _| panic!("it runs already: there is no news")).await.unwrap();
    assert_eq!(client.stats(id).await.unwrap().processes, 9);
    client.stop(id).await.unwrap();
    assert_eq!(client.desktops(None).await.unwrap()[0].status.state, DesktopState::Stopped);

    for admin in [true, false] {
        client.set_admin(&user("ada"), admin).await.unwrap();
        assert_eq!(client.users().await.unwrap()[0].admin, admin);
    }
    assert_eq!(client.set_admin(&user("eve"), true).await.unwrap_err().code(), Some("unknown_user"));
    let refused = client.remove_user(&user("ada"), OwnedDesktops::Refuse).await.unwrap_err();
    assert_eq!(refused.code(), Some("user_has_desktops"));
    client.remove_desktop(id).await.unwrap();
    client.remove_user(&user("ada"), OwnedDesktops::Refuse).await.unwrap();
    assert_eq!(client.desktops(None).await.unwrap(), []);
}

#[tokio::test]
async fn refusals_have_a_code_a_status_and_a_cause() {
    let (world, id) = World::with_desktop().await;
    let client = &world.client;
    let unknown = CreateDesktop::new(Some(user("ada")), "kde".parse().unwrap());
    let error = client.create_desktop(&unknown).await.unwrap_err();
    assert_eq!((error.code(), error.status()), (Some("unknown_flavour"), Some(StatusCode::NOT_FOUND)));
    assert_eq!(error.to_string(), "unknown flavour `kde`; there is `icewm`");

    let address = Some("10.77.0.9".parse().unwrap());
    let create = CreateDesktop { address, ..CreateDesktop::new(Some(user("ada")), icewm()) };
    client.create_desktop(&create).await.unwrap();
    let error = client.create_desktop(&create).await.unwrap_err();
    assert_eq!((error.code(), error.status()), (Some("address_taken"), Some(StatusCode::CONFLICT)));

    let nobodys = client.create_desktop(&CreateDesktop::new(None, icewm())).await.unwrap_err();
    assert_eq!(nobodys.code(), Some("no_user"));
    world.host.fail_next(Op::EnsureRunning, HostError::new(HostErrorKind::Timeout, "no window manager in 30 s"));
    let error = client.start(id, |_, _| {}).await.unwrap_err();
    assert_eq!(error.status(), Some(StatusCode::GATEWAY_TIMEOUT));
    let ClientError::Refused { info, .. } = error else { panic!("{error:?}") };
    assert_eq!(info.cause, ["no window manager in 30 s"]);
}

#[tokio::test]
async fn an_image_is_built_with_news_and_its_flavour_can_be_set_up() {
    let world = World::new().await;
    world.host.add_recipe("/recipes/lxde.toml", "lxde".parse().unwrap());
    let mut lines = Vec::new();
    let image =
        world.client.build_image(&build("/recipes/lxde.toml"), |line| lines.push(line.to_owned())).await.unwrap();
    assert_eq!(lines, ["installing packages", "storing the tree"]);
    assert_eq!(world.client.images().await.unwrap().len(), 2);
    let mut defaults = FlavourDefaults::default();
    defaults.limits.memory = Bytes::mib(300);
    world.client.set_flavour_defaults(&image.flavour, &defaults).await.unwrap();
    let flavours = world.client.flavours().await.unwrap();
    assert_eq!(flavours.iter().find(|f| f.name == image.flavour).unwrap().defaults, defaults);

    let relative = world.client.build_image(&build("lxde.toml"), |_| {}).await.unwrap_err();
    assert_eq!(relative.code(), Some("invalid_path"));
    let absent = world.client.build_image(&build("/recipes/none.toml"), |_| {}).await.unwrap_err();
    assert_eq!((absent.code(), absent.status()), (Some("not_found"), Some(StatusCode::NOT_FOUND)));
}

#[tokio::test]
async fn a_programs_output_and_exit_arrive() {
    let (world, id) = World::with_desktop().await;
    let early = world.client.exec(id, &program(None)).await.unwrap_err();
    assert_eq!((early.status(), early.code()), (Some(StatusCode::CONFLICT), Some("not_running")));
    world.client.start(id, |_, _| {}).await.unwrap();
    for exit in [Exit::Code(0), Exit::Code(7), Exit::Signal(9)] {
        world.host.script(Script::Say { stdout: b"out\n".to_vec(), stderr: b"err\n".to_vec(), exit });
        let (_writer, reader) = world.client.exec(id, &program(None)).await.unwrap();
        assert_eq!(to_end(reader).await, (b"out\n".to_vec(), b"err\n".to_vec(), exit));
    }
}

#[tokio::test]
async fn a_programs_input_comes_back_whole() {
    let (world, id) = World::with_desktop().await;
    world.client.start(id, |_, _| {}).await.unwrap();
    world.host.script(Script::Echo);
    let (mut writer, reader) = world.client.exec(id, &program(None)).await.unwrap();
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[n as usize % 3]).collect();
    let bytes = sent.clone();
    let writing = tokio::spawn(async move {
        writer.stdin(&bytes).await.unwrap();
        writer.end_stdin().await.unwrap();
        writer
    });
    let (out, err, exit) = to_end(reader).await;
    drop(writing.await.unwrap());
    assert!(out == sent, "{} of {} bytes came back", out.len(), sent.len());
    assert_eq!((err, exit), (Vec::new(), Exit::Code(0)));
}

#[tokio::test]
async fn a_terminal_is_resized_and_a_signal_ends_its_program() {
    let (world, id) = World::with_desktop().await;
    world.client.start(id, |_, _| {}).await.unwrap();
    world.host.script(Script::Terminal);
    let (mut writer, reader) = world.client.exec(id, &program(Some((24, 80)))).await.unwrap();
    writer.resize(50, 132).await.unwrap();
    writer.signal(15).await.unwrap();
    assert_eq!(to_end(reader).await, (b"ready\n50x132\n".to_vec(), Vec::new(), Exit::Signal(15)));
}

#[tokio::test]
async fn users_see_and_use_what_is_theirs() {
    let (world, id) = World::with_desktop().await;
    world.client.add_user(&add("eve")).await.unwrap();
    let (ada, eve) = (Some(Caller::User(user("ada"))), Some(Caller::User(user("eve"))));
    let one = format!("/desktops/{id}");
    assert_eq!(world.ask(ada.clone(), request(Method::GET, &one, None)).await.0, StatusCode::OK);
    assert_eq!(world.ask(ada.clone(), request(Method::POST, &format!("{one}/start"), None)).await.0, StatusCode::OK);
    assert_eq!(world.ask(eve.clone(), request(Method::GET, "/desktops?user=ada", None)).await.1, "[]");
    for (method, path) in [
        (Method::GET, one.clone()),
        (Method::POST, format!("{one}/start")),
        (Method::POST, format!("{one}/stop")),
        (Method::GET, format!("{one}/stats")),
        (Method::POST, format!("{one}/exec")),
    ] {
        let (status, error) = world.refusal(eve.clone(), request(method, &path, None)).await;
        assert_eq!((status, error.code.as_str()), (StatusCode::FORBIDDEN, "not_yours"), "{path}");
    }
    assert_eq!(world.refusal(eve, request(Method::GET, "/desktops/99", None)).await.0, StatusCode::NOT_FOUND);
    assert_eq!(world.client.desktop(id).await.unwrap().status.state, DesktopState::Running);
}

#[tokio::test]
async fn what_takes_an_administrator_is_refused_to_users_and_everything_to_nobody() {
    let (world, id) = World::with_desktop().await;
    let ada = Some(Caller::User(user("ada")));
    let one = format!("/desktops/{id}");
    let for_administrators = [
        (Method::GET, "/users", None),
        (Method::POST, "/users", Some(json!({"name": "eve", "password": PASSWORD, "admin": true}))),
        (Method::PATCH, "/users/ada", Some(json!({"admin": true}))),
        (Method::DELETE, "/users/ada?desktops=remove", None),
        (Method::PUT, "/users/eve/password", Some(json!({"password": "battery staple"}))),
        (Method::POST, "/images", Some(json!({"recipe": "/x"}))),
        (Method::GET, "/images/log?image=icewm", None),
        (Method::DELETE, "/images/flavours?flavour=icewm&author=eve", None),
        (Method::POST, "/images/gc", Some(json!({"dry_run": false, "keep_days": 0}))),
        (Method::POST, "/images/import", Some(json!({}))),
        (Method::PUT, "/flavours/icewm/defaults", Some(json!({}))),
        (Method::POST, "/desktops", Some(json!({"flavour": "icewm"}))),
        (Method::PATCH, one.as_str(), Some(json!({"blocked": true}))),
        (Method::DELETE, one.as_str(), None),
        (Method::DELETE, "/sessions/1", None),
    ];
    for (method, path, body) in for_administrators {
        let (status, error) = world.refusal(ada.clone(), request(method.clone(), path, body.clone())).await;
        assert_eq!((status, error.code.as_str()), (StatusCode::FORBIDDEN, "forbidden"), "{method} {path}");
        let (status, error) = world.refusal(None, request(method.clone(), path, body)).await;
        assert_eq!((status, error.code.as_str()), (StatusCode::UNAUTHORIZED, "unauthenticated"), "{method} {path}");
    }
    assert_eq!(world.ask(None, request(Method::GET, "/health", None)).await.0, StatusCode::OK);
    assert_eq!(world.client.users().await.unwrap().len(), 1, "nothing of it happened");
    assert_eq!(world.client.desktops(None).await.unwrap().len(), 1);
}

#[tokio::test]
async fn users_do_not_see_causes_and_are_told_when_to_try_again() {
    let (world, id) = World::with_desktop().await;
    let ada = Some(Caller::User(user("ada")));
    world.host.fail_next(Op::EnsureRunning, HostError::new(HostErrorKind::Failed, "/var/lib/qvd/roots is full"));
    let start = || request(Method::POST, &format!("/desktops/{id}/start"), None);
    let (status, error) = world.refusal(ada.clone(), start()).await;
    assert_eq!((status, error.cause), (StatusCode::INTERNAL_SERVER_ERROR, Vec::<String>::new()));

    let wrong = || {
        let body = json!({"password": "battery staple", "current": "wrong horse"});
        request(Method::PUT, "/users/ada/password", Some(body))
    };
    let error = loop {
        let (status, error) = world.refusal(ada.clone(), wrong()).await;
        if status != StatusCode::UNAUTHORIZED {
            assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
            break error;
        }
    };
    assert!(error.retry_after_s.unwrap() > 0);
}

#[tokio::test]
async fn a_user_changes_the_own_password_by_the_current_one() {
    let (world, _) = World::with_desktop().await;
    let ada = Some(Caller::User(user("ada")));
    let change = |body| request(Method::PUT, "/users/ada/password", Some(body));
    let new = json!({"password": "battery staple"});
    assert_eq!(world.refusal(ada.clone(), change(new)).await.1.code, "wrong_credentials");
    let new = json!({"password": "battery staple", "current": PASSWORD});
    assert_eq!(world.ask(ada, change(new)).await.0, StatusCode::NO_CONTENT);
    let set = SetPassword { password: Secret::from("another staple"), current: None };
    world.client.set_password(&user("ada"), &set).await.unwrap();
    assert!(world.farm.authenticate("ada", &Secret::from("another staple"), None).await.is_ok());
}

#[tokio::test]
async fn sessions_are_listed_and_ended_by_their_user() {
    let (world, _) = World::with_desktop().await;
    let made = world.farm.create_session(&user("ada"), SessionKind::Web).await.unwrap();
    let id = world.client.sessions(None).await.unwrap()[0].id;
    let end = || request(Method::DELETE, &format!("/sessions/{id}"), None);
    assert_eq!(world.ask(Some(Caller::User(user("eve"))), end()).await.0, StatusCode::FORBIDDEN);
    assert_eq!(world.ask(Some(Caller::User(user("ada"))), end()).await.0, StatusCode::NO_CONTENT);
    assert!(world.farm.find_session(&made.token, SessionKind::Web).await.is_err());
    assert_eq!(world.client.end_session(id).await.unwrap_err().code(), Some("unknown_session"));
}

#[tokio::test]
async fn bodies_that_are_wrong_are_refused_in_the_apis_words() {
    let world = World::new().await;
    let admin = || Some(Caller::Admin { user: None });
    let post = |content_type: &str, body: Vec<u8>| {
        Request::post("/api/v1/users").header(header::CONTENT_TYPE, content_type).body(Body::from(body)).unwrap()
    };
    let json = "application/json";
    let name_of_64k = json!({"name": "x".repeat(64 * 1024), "password": PASSWORD}).to_string();
    for (request, status, code) in [
        (post(json, b"{\"name\":".to_vec()), StatusCode::BAD_REQUEST, "invalid_body"),
        (post(json, b"\xff\xfe".to_vec()), StatusCode::BAD_REQUEST, "invalid_body"),
        (
            post(json, b"{\"name\": \"../x\", \"password\": \"12345678\"}".to_vec()),
            StatusCode::BAD_REQUEST,
            "invalid_body",
        ),
        (
            post(json, b"{\"name\": \"x\", \"password\": \"12345678\", \"root\": 1}".to_vec()),
            StatusCode::BAD_REQUEST,
            "invalid_body",
        ),
        (post("text/plain", b"{}".to_vec()), StatusCode::UNSUPPORTED_MEDIA_TYPE, "not_json"),
        (post(json, name_of_64k.into_bytes()), StatusCode::PAYLOAD_TOO_LARGE, "body_too_large"),
        (request(Method::GET, "/desktops/x", None), StatusCode::BAD_REQUEST, "invalid_path"),
        (request(Method::GET, "/desktops/0", None), StatusCode::BAD_REQUEST, "invalid_path"),
        (request(Method::GET, "/desktops?usr=ada", None), StatusCode::BAD_REQUEST, "invalid_query"),
        (request(Method::GET, "/nothing", None), StatusCode::NOT_FOUND, "unknown_path"),
        (request(Method::POST, "/health", None), StatusCode::METHOD_NOT_ALLOWED, "wrong_method"),
    ] {
        let shown = format!("{request:?}");
        let (got, error) = world.refusal(admin(), request).await;
        assert_eq!((got, error.code.as_str()), (status, code), "{shown}");
        assert!(!error.message.contains("12345678"), "{}", error.message);
    }
    assert_eq!(world.client.users().await.unwrap(), []);
}

#[tokio::test]
async fn exec_without_an_upgrade_is_told_which_it_takes() {
    let (world, id) = World::with_desktop().await;
    let mut stream = UnixStream::connect(world.socket()).await.unwrap();
    let request = format!("POST /api/v1/desktops/{id}/exec HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 426 "), "{answer}");
    assert!(answer.to_lowercase().contains("upgrade: qvd-exec/1"), "{answer}");
}

#[tokio::test]
async fn the_socket_is_private_is_not_stolen_and_goes_with_the_daemon() {
    let world = World::new().await;
    let socket = world.socket();
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let second = UnixDoor::bind(&socket).await.unwrap_err();
    assert!(matches!(second, UnixServeError::InUse(_)), "{second}");
    assert!(world.client.health().await.is_ok(), "the first still serves");
    world.end.send(()).unwrap();
    world.served.await.unwrap().unwrap();
    assert!(!socket.exists());
    let error = world.client.health().await.unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error}");
}

#[tokio::test]
async fn a_dead_daemons_socket_is_replaced_and_other_files_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qvd.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let door = UnixDoor::bind(&socket).await.unwrap();
    assert!(UnixStream::connect(&socket).await.is_ok());
    door.serve(Router::new(), async {}).await.unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);

    std::fs::write(&socket, "precious").unwrap();
    let error = serve_unix(&socket, Router::new(), async {}).await.unwrap_err();
    assert!(matches!(error, UnixServeError::NotASocket(_)), "{error}");
    assert_eq!(std::fs::read_to_string(&socket).unwrap(), "precious");
}

#[tokio::test]
async fn a_flavour_that_desktops_follow_stays() {
    let (world, id) = World::with_desktop().await;
    let remove = || images::Remove { flavour: icewm(), author: "root".to_owned() };
    let refusal = |error: ClientError| match error {
        ClientError::Refused { info, .. } => (info.code, info.message),
        other => panic!("{other}"),
    };
    let (code, message) = refusal(world.client.image(&remove(), &mut |_| {}).await.unwrap_err());
    assert_eq!((code.as_str(), message.contains(&format!("desktop {id} follows"))), ("busy", true), "{message}");
    world.client.remove_desktop(id).await.unwrap();
    // Nobody follows it any more; that this host keeps no images is another matter.
    let (code, _) = refusal(world.client.image(&remove(), &mut |_| {}).await.unwrap_err());
    assert_eq!(code, "no_repository");
    world.end.send(()).unwrap();
    world.served.await.unwrap().unwrap();
}
