//! Images over the API: who may, and whose name stands behind what was done.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::Arc;

use axum::{
    Extension,
    body::Body,
    http::{Method, Request, StatusCode, header},
};
use qvd_farm::{Database, Farm};
use qvd_gateway::{
    api::{ApiState, Caller, Client, UnixDoor, router},
    images::{Import, Log, PutTag, Reflog, Show},
};
use qvd_node::fake::FakeHost;
use qvd_storage::Repository;
use serde_json::{Value, json};
use tempfile::TempDir;
use tower::ServiceExt;

struct World {
    dir: TempDir,
    farm: Farm,
}

impl World {
    /// A farm whose host has two versions of a flavour.
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = Arc::new(FakeHost::new());
        host.keep_images_in(Arc::new(Repository::open(&dir.path().join("images")).unwrap()));
        let farm = Farm::open(&Database::File(dir.path().join("qvd.sqlite")), host).await.unwrap();
        Self { dir, farm }
    }

    fn import(&self, message: &str) -> Import {
        let tree = self.dir.path().join("tree");
        std::fs::create_dir_all(&tree).unwrap();
        std::fs::write(tree.join("motd"), message).unwrap();
        Import {
            source: tree,
            flavour: "tiny".parse().unwrap(),
            message: message.to_owned(),
            author: "root@here".to_owned(),
            recipe: None,
            disk: false,
            max_bytes: 1 << 20,
            publish: false,
        }
    }

    /// Asks as the HTTPS door would for a user who administers the farm.
    async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> (StatusCode, Value) {
        let caller = Caller::Admin { user: Some("bob".parse().unwrap()) };
        let request = Request::builder().method(method).uri(format!("/api/v1/images/{path}"));
        let request = request.header(header::CONTENT_TYPE, "application/json");
        let body = body.map_or_else(Body::empty, |json| Body::from(json.to_string()));
        let api = router(ApiState { farm: self.farm.clone() }).layer(Extension(caller));
        let response = api.oneshot(request.body(body).unwrap()).await.unwrap();
        let status = response.status();
        let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        let last = body.split(|byte| *byte == b'\n').rfind(|line| !line.is_empty()).unwrap_or_default();
        (status, serde_json::from_slice(last).unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hosts_administrator_may_name_its_files_and_nobody_else() {
    let world = World::new().await;
    let socket = world.dir.path().join("api.sock");
    let door = UnixDoor::bind(&socket).await.unwrap();
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let served = tokio::spawn(door.serve(router(ApiState { farm: world.farm.clone() }), async {
        ended.await.ok();
    }));
    let client = Client::unix(&socket);
    let mut told = 0;
    let first = client.image(&world.import("first"), |_| told += 1).await.unwrap();
    let second = client.image(&world.import("second"), |_| {}).await.unwrap();
    assert!(told > 0, "a long one says how it goes on");
    let log = client.image(&Log { image: "tiny".parse().unwrap() }, |_| {}).await.unwrap();
    assert_eq!(log.iter().map(|one| one.id).collect::<Vec<_>>(), [second.id, first.id]);
    let shown = client.image(&Show { image: "tiny:default".parse().unwrap() }, |_| {}).await.unwrap();
    assert_eq!((shown.id, shown.commit.message.as_str()), (first.id, "first"));
    // What a path means to a query is only text.
    let odd = client.image(&Log { image: "tiny:a.b".parse().unwrap() }, |_| {}).await.unwrap_err();
    assert_eq!(odd.code(), Some("not_found"), "{odd}");
    end.send(()).unwrap();
    served.await.unwrap().unwrap();

    let host = "/nonexistent";
    let remote = json!({"address": host});
    for (path, body) in [
        ("import", json!({"source": host, "flavour": "f", "message": "", "author": "", "max_bytes": 1})),
        ("export", json!({"image": "tiny", "to": host})),
        ("push", json!({"remote": remote, "image": "tiny", "author": ""})),
        ("pull", json!({"remote": remote, "image": "tiny", "author": ""})),
        ("clone", json!({"remote": remote, "author": ""})),
        ("fsck", json!({"repair": remote})),
    ] {
        let (status, answer) = world.ask(Method::POST, path, Some(body)).await;
        assert_eq!(
            (status, &answer["error"]["code"]),
            (StatusCode::FORBIDDEN, &"forbidden".into()),
            "{path}: {answer}"
        );
    }
    let (status, answer) = world.ask(Method::POST, "fsck", Some(json!({}))).await;
    assert_eq!((status, &answer["event"]), (StatusCode::OK, &"done".into()), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_signed_in_stands_behind_what_was_done() {
    let world = World::new().await;
    let repository = world.farm.repository().unwrap();
    let import = world.import("first");
    let done = tokio::task::spawn_blocking(move || {
        use qvd_gateway::images::ImageCall as _;
        import.carry_out(&repository, &mut |_| {})
    });
    done.await.unwrap().unwrap();
    let put = PutTag {
        flavour: "tiny".parse().unwrap(),
        tag: "good".parse().unwrap(),
        to: None,
        author: "somebody else".to_owned(),
        message: "tried".to_owned(),
        rollout: None,
    };
    let (status, answer) = world.ask(Method::PUT, "tags", Some(serde_json::to_value(&put).unwrap())).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let (_, moves) = world.ask(Method::GET, "reflog?image=tiny%3Agood", None).await;
    assert_eq!((&moves[0]["who"], &moves[0]["why"]), (&"bob".into(), &"tried".into()), "{moves}");
    let asked: Reflog = serde_json::from_value(json!({"image": "tiny:good"})).unwrap();
    assert_eq!(asked.image.to_string(), "tiny:good");
    let revert = json!({"image": "tiny", "author": "somebody else", "message": "back"});
    let (_, made) = world.ask(Method::POST, "revert", Some(revert)).await;
    assert_eq!(made["author"], "bob", "{made}");
    let (status, answer) = world.ask(Method::DELETE, "tags?flavour=tiny&tag=good&author=x", None).await;
    assert_eq!((status, &answer), (StatusCode::OK, &"tiny:good".into()));
    for (method, path, body) in [
        (Method::GET, "log?image=../etc", None),
        (Method::GET, "log", None),
        (Method::GET, "log?image=tiny&more=1", None),
        (Method::POST, "gc", Some(json!({"dry_run": true, "keep_days": -1}))),
    ] {
        let (status, answer) = world.ask(method, path, body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{path}: {answer}");
    }
}
