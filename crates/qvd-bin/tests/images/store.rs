//! The commands beside a real server of the protocol of S3.

use std::{fs, process::Output, sync::mpsc, thread};

use serde_json::Value;

use crate::{World, first_file, flip};

const KEY: (&str, &str) = ("tester", "sesame-open-please");
const ADDRESS: &str = "s3://images/of/us";

/// Serves a directory, in which each directory is a bucket, until the test ends; the port.
fn serve(world: &World) -> u16 {
    let buckets = world.at("buckets");
    fs::create_dir_all(buckets.join("images")).unwrap();
    let (told, port) = mpsc::channel();
    thread::spawn(move || {
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let mut service = s3s::service::S3ServiceBuilder::new(s3s_fs::FileSystem::new(buckets).unwrap());
            service.set_auth(s3s::auth::SimpleAuth::from_single(KEY.0, KEY.1));
            let service = service.build();
            let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
            told.send(listener.local_addr().unwrap().port()).unwrap();
            let server = hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new());
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let connection = server.serve_connection(hyper_util::rt::TokioIo::new(socket), service.clone());
                tokio::spawn(connection.into_owned());
            }
        });
    });
    port.recv().unwrap()
}

fn run(world: &World, port: u16, secret: &str, args: &[&str]) -> Output {
    let mut command = world.command();
    command.env("AWS_ACCESS_KEY_ID", KEY.0).env("AWS_SECRET_ACCESS_KEY", secret);
    command.env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}"));
    command.arg("--json").arg("image").args(args).output().unwrap()
}

fn json(world: &World, port: u16, args: &[&str]) -> Value {
    let output = run(world, port, KEY.1, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn images_go_to_a_store_and_come_from_it() {
    for world in World::both() {
        let port = serve(&world);
        world.write("tree/etc/motd", "hello\n");
        world.write("tree/usr/tool", &"tool\n".repeat(100_000));
        world.import("first");
        let first = json(&world, port, &["push", ADDRESS, "tiny"]);
        assert_eq!((&first["commits"], &first["objects"]), (&1.into(), &2.into()), "{first}");
        world.write("tree/etc/motd", "good morning\n");
        let two = world.import("second");
        let second = json(&world, port, &["push", ADDRESS, "tiny"]);
        assert_eq!((&second["commits"], &second["objects"]), (&1.into(), &1.into()), "{second}");

        let other = World::without_a_daemon();
        let cloned = json(&other, port, &["clone", ADDRESS]);
        assert_eq!((&cloned[0]["flavour"], &cloned[0]["commits"]), (&"tiny".into(), &2.into()), "{cloned}");
        assert_eq!(other.json(&["log", "tiny"])[0]["id"], two.as_str());
        world.write("tree/etc/motd", "good evening\n");
        let three = world.import("third");
        json(&world, port, &["push", ADDRESS, "tiny:head"]);
        let pulled = json(&other, port, &["pull", ADDRESS, "tiny"]);
        assert_eq!((&pulled["commits"], &pulled["objects"]), (&1.into(), &1.into()), "{pulled}");
        assert_eq!(other.json(&["log", "tiny"])[0]["id"], three.as_str());

        flip(&first_file(&world.at("state/images/objects")));
        let repaired = json(&world, port, &["fsck", "--repair", ADDRESS]);
        assert_eq!(repaired["problems"][0]["repaired"], true, "{repaired}");

        // What is wrong is said, and no key is in it.
        for (secret, args) in [
            ("another-secret-key", ["pull", ADDRESS, "tiny"]),
            (KEY.1, ["pull", "s3://NO", "tiny"]),
            (KEY.1, ["pull", ADDRESS, "nothing"]),
        ] {
            let output = run(&world, port, secret, &args);
            let text = String::from_utf8(output.stderr).unwrap();
            assert!(!output.status.success() && text.contains("cannot pull"), "{text}");
            assert!(!text.contains(secret), "{text}");
        }
        let mut keyless = world.command();
        keyless.env_remove("AWS_ACCESS_KEY_ID").env_remove("AWS_SECRET_ACCESS_KEY").env("HOME", "/nonexistent");
        let output = keyless.args(["image", "push", ADDRESS, "tiny"]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
