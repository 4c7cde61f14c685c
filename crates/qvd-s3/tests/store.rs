//! Images in a store, beside a real server of the protocol in a process of its
//! own, which keeps what it has in a directory.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use qvd_core::{FlavourName, Tag};
use qvd_s3::{Access, Store};
use qvd_storage::{
    Error, ImageConfig, Repository,
    repository::{CommitId, Destination, Directory, Expect, Move, NewCommit, SigningKey, Source, Transferred, Wanted},
};

const ROOT: &str = "QVD_TEST_S3_ROOT";
const ADDRESS: &str = "s3://images/of/us";
const KEY: (&str, &str) = ("tester", "sesame-open-please");

/// The server: a process that answers until it is killed.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    /// Starts it on a directory, in which each directory is a bucket.
    fn start(root: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "serves", "--ignored", "--nocapture"]).env(ROOT, root);
        let mut child = child.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let port = lines.map_while(Result::ok).find_map(|line| line.split_once("port ")?.1.trim().parse().ok());
        Self { child, port: port.unwrap() }
    }

    fn store(&self) -> Store {
        store(self.port, KEY)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn store(port: u16, key: (&str, &str)) -> Store {
    let mut access = Access::new(key.0, key.1);
    access.endpoint = Some(format!("http://127.0.0.1:{port}"));
    Store::open(ADDRESS, &access).unwrap()
}

#[test]
#[ignore = "it is the server that the other tests run in a process of its own"]
fn serves() {
    let root = PathBuf::from(std::env::var_os(ROOT).unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut service = s3s::service::S3ServiceBuilder::new(s3s_fs::FileSystem::new(root).unwrap());
        service.set_auth(s3s::auth::SimpleAuth::from_single(KEY.0, KEY.1));
        let service = service.build();
        let turn = Arc::new(tokio::sync::Mutex::new(()));
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        println!("port {}", listener.local_addr().unwrap().port());
        std::io::stdout().flush().unwrap();
        let server = hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new());
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let (service, turn) = (service.clone(), Arc::clone(&turn));
            // This server looks at a condition and writes in two steps; others do it in one.
            let in_turn = hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
                let (service, turn) = (service.clone(), Arc::clone(&turn));
                async move {
                    let conditional = request.headers().keys().any(|name| name.as_str().starts_with("if-"));
                    let _turn = if conditional { Some(turn.lock().await) } else { None };
                    hyper::service::Service::call(&service, request).await
                }
            });
            let connection = server.serve_connection(hyper_util::rt::TokioIo::new(socket), in_turn);
            tokio::spawn(connection.into_owned());
        }
    });
}

fn flavour() -> FlavourName {
    "tiny".parse().unwrap()
}

fn wanted() -> Wanted {
    Wanted { flavour: flavour(), tag: None, force: false }
}

/// A repository, the tree that it commits from, and a server without a key's worth of images.
struct World {
    dir: tempfile::TempDir,
    here: Repository,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("source/etc")).unwrap();
        fs::create_dir_all(dir.path().join("buckets/images")).unwrap();
        let here = Repository::open(&dir.path().join("here")).unwrap();
        Self { dir, here }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, content: &[u8]) {
        fs::write(self.at("source").join(name), content).unwrap();
    }

    fn commit(&self, message: &str) -> CommitId {
        let staging = self.here.stage().unwrap();
        let tree = staging.scan(&self.at("source"), &|_| false).unwrap();
        let new = NewCommit {
            config: ImageConfig::plain(flavour()),
            author: "ana".to_owned(),
            message: message.to_owned(),
            time: SystemTime::UNIX_EPOCH,
            recipe: None,
            publish: true,
        };
        self.here.commit_tree(&staging, &tree, new).unwrap()
    }

    fn repository(&self, name: &str) -> Repository {
        Repository::open(&self.at(name)).unwrap()
    }

    /// The file in which the server keeps an object of the bucket.
    fn kept(&self, below: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut todo = vec![self.at("buckets/images/of/us").join(below)];
        while let Some(dir) = todo.pop() {
            for entry in fs::read_dir(dir).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() { todo.push(path) } else { found.push(path) }
            }
        }
        found
    }
}

fn push(from: &Repository, to: &Store) -> Result<Transferred, Error> {
    from.push(to, &wanted(), "ana", &mut |_| {})
}

fn pull(to: &Repository, from: &dyn Source) -> Result<Transferred, Error> {
    to.pull(from, &wanted(), "ben", &mut |_| {})
}

/// Bytes that no compression makes less.
fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(len).collect()
}

#[test]
fn only_what_is_missing_travels_and_arrives_as_it_was() {
    let world = World::new();
    let server = Server::start(&world.at("buckets"));
    let store = server.store();
    for n in 0..100 {
        world.write(&format!("etc/{n}"), format!("file {n}").repeat(100).as_bytes());
    }
    // Longer than a part, and longer than what is fetched at once.
    let large = noise(20 << 20, 7);
    world.write("large", &large);
    let one = world.commit("first");
    let mut steps = Vec::new();
    let done = world.here.push(&store, &wanted(), "ana", &mut |so_far| steps.push(*so_far)).unwrap();
    assert_eq!((done.commits, done.trees, done.objects, done.objects_total), (1, 1, 101, 101));
    assert!(done.wire_bytes > large.len() as u64 && done.wire_bytes < done.bytes, "{done:?}");
    assert!(steps.iter().any(|step| step.objects > 0 && step.objects < step.objects_total), "progress is told");
    assert_eq!(store.tags(&flavour()).unwrap()[&Tag::head()], one);

    world.write("etc/1", b"changed");
    let (key, public, _) = SigningKey::generate().unwrap();
    let two = world.commit("second");
    world.here.sign(two, &key).unwrap();
    let done = push(&world.here, &store).unwrap();
    assert_eq!((done.commits, done.objects), (1, 1), "{done:?}");
    assert!(done.wire_bytes < 16 << 10, "{done:?}");
    assert_eq!(push(&world.here, &store).unwrap().wire_bytes, 0, "nothing changed, nothing is sent");

    assert_eq!(store.flavours().unwrap(), [flavour()]);
    let there = world.repository("there");
    let done = pull(&there, &store).unwrap();
    assert_eq!((done.commits, done.objects), (2, 102));
    assert!(there.fsck(None).unwrap().is_sound());
    assert_eq!(there.tagged(&flavour(), &Tag::head()).unwrap(), Some(two));
    assert_eq!(there.signers(two).unwrap(), [public.id()], "signatures travel");
    let tree = there.tree_of(&there.commit(two).unwrap()).unwrap();
    assert_eq!(tree, world.here.tree_of(&world.here.commit(two).unwrap()).unwrap());
    // One who has the first needs what changed.
    world.write("etc/2", b"changed too");
    world.commit("third");
    push(&world.here, &store).unwrap();
    let done = pull(&there, &store).unwrap();
    assert_eq!((done.commits, done.objects), (1, 1));
    // What is damaged here is mended from there.
    let path = fs::read_dir(there.dir().join("objects")).unwrap().next().unwrap().unwrap().path();
    let path = fs::read_dir(path).unwrap().next().unwrap().unwrap().path();
    fs::remove_file(path).unwrap();
    let checked = there.fsck(Some(&store)).unwrap();
    assert!(checked.problems.iter().all(|problem| problem.repaired) && !checked.problems.is_empty());
    assert!(there.fsck(None).unwrap().is_sound());
}

#[test]
fn what_cannot_be_is_said_with_what_and_where() {
    let world = World::new();
    let server = Server::start(&world.at("buckets"));
    world.write("etc/a", b"a");
    world.write("large", &noise(600 << 10, 9));
    world.commit("first");
    let said = |error: Error| qvd_core::causes(&error).join(": ");
    // A key that the server does not know, and one that is wrong.
    for (key, code) in [((KEY.0, "wrong-secret"), "SignatureDoesNotMatch"), (("nobody", KEY.1), "NotSignedUp")] {
        let text = said(push(&world.here, &store(server.port, key)).unwrap_err());
        assert!(text.contains(code) && !text.contains("wrong-secret") && !text.contains(KEY.1), "{text}");
        let text = said(pull(&world.repository("there"), &store(server.port, key)).unwrap_err());
        assert!(text.contains(code), "{text}");
    }
    let mut access = Access::new(KEY.0, KEY.1);
    access.endpoint = Some(format!("http://127.0.0.1:{}", server.port));
    let absent = Store::open("s3://absent", &access).unwrap();
    let text = said(push(&world.here, &absent).unwrap_err());
    assert!(text.contains("NoSuchBucket") && text.contains("s3://absent"), "{text}");
    for bad in ["s3://", "s3:///x", "s3://a", "https://images", "s3://Im_ages/x", "s3://images/a//b"] {
        assert!(Store::open(bad, &access).is_err(), "{bad}");
    }
    let store = server.store();
    let text = said(pull(&world.repository("there"), &store).unwrap_err());
    assert!(text.contains("tiny"), "{text}");

    // Each object, flipped or cut: it is named, and no tag moves.
    push(&world.here, &store).unwrap();
    for path in world.kept("objects") {
        let sound = fs::read(&path).unwrap();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        let mut flipped = sound.clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 1;
        for damaged in [flipped, sound[..middle].to_vec()] {
            file.set_len(damaged.len() as u64).unwrap();
            file.write_all_at(&damaged, 0).unwrap();
            let dir = tempfile::tempdir_in(world.dir.path()).unwrap();
            let there = Repository::open(&dir.path().join("there")).unwrap();
            let name = path.file_name().unwrap().to_str().unwrap();
            match pull(&there, &store) {
                // A bit that means nothing to who unpacks it: what arrived is what its
                // digest says. What is cut short never is.
                Ok(_) if damaged.len() < sound.len() => panic!("{name} is cut, and nobody noticed"),
                Ok(_) => assert_eq!(there.tags(&flavour()).unwrap(), world.here.tags(&flavour()).unwrap()),
                Err(error) => {
                    let text = said(error);
                    assert!(text.contains(name), "{text} does not name {name}");
                    assert_eq!(there.tags(&flavour()).unwrap().len(), 0);
                }
            }
            assert!(there.fsck(None).unwrap().is_sound());
        }
        file.set_len(sound.len() as u64).unwrap();
        file.write_all_at(&sound, 0).unwrap();
    }
    pull(&world.repository("there"), &store).unwrap();
    // An object that is gone, and a tag that is nonsense.
    let path = world.kept("objects").pop().unwrap();
    fs::remove_file(&path).unwrap();
    let text = said(pull(&world.repository("third"), &store).unwrap_err());
    assert!(text.contains("does not have it"), "{text}");
    fs::write(world.at("buckets/images/of/us/flavours/tiny/tags/head"), r#"{"to":"sha256:../../x"}"#).unwrap();
    let text = said(pull(&world.repository("fourth"), &store).unwrap_err());
    assert!(text.contains("tag `head` of flavour tiny"), "{text}");
}

#[test]
fn of_two_who_move_a_tag_one_succeeds() {
    let world = World::new();
    let server = Server::start(&world.at("buckets"));
    let store = server.store();
    world.write("etc/a", b"a");
    let one = world.commit("first");
    push(&world.here, &store).unwrap();
    let other = world.repository("other");
    pull(&other, &store).unwrap();
    world.write("etc/a", b"b");
    let two = world.commit("second");
    push(&world.here, &store).unwrap();
    // Somebody who saw the first alone, and somebody who has another second.
    let step = |to| Move { from: Some(one), to: Some(to), time_unix_s: 0, who: "ben".into(), why: "mine".into() };
    let error = store.move_tag(&wanted(), &Tag::head(), Expect::At(Some(one)), &step(one)).unwrap_err();
    assert!(matches!(error, Error::TagMoved { .. }), "{error}");
    let text = push(&other, &store).unwrap_err().to_string();
    assert!(text.contains("was not made from"), "{text}");
    assert_eq!(store.tags(&flavour()).unwrap()[&Tag::head()], two);
    // Eight at once: the store lets one of them have it.
    let racers: Vec<_> = (0..8).map(|_| server.store()).collect();
    let won = std::thread::scope(|scope| {
        let race = |store: &Store| store.move_tag(&wanted(), &Tag::head(), Expect::At(Some(two)), &step(one));
        let running: Vec<_> = racers.iter().map(|store| scope.spawn(move || race(store))).collect();
        let ended: Vec<_> = running.into_iter().map(|racer| racer.join().unwrap()).collect();
        for error in ended.iter().filter_map(|ended| ended.as_ref().err()) {
            assert!(matches!(error, Error::TagMoved { .. }), "{error}");
        }
        ended.iter().filter(|ended| ended.is_ok()).count()
    });
    assert_eq!(won, 1);
    let back = Move { from: Some(one), to: Some(two), ..step(two) };
    store.move_tag(&wanted(), &Tag::head(), Expect::At(Some(one)), &back).unwrap();
    // Once it is where that one came from, it goes on from there.
    store.move_tag(&wanted(), &Tag::head(), Expect::At(Some(two)), &step(one)).unwrap();
    push(&other, &store).unwrap();
}

/// Carries bytes between a client and the server, and kills the server when so
/// many have come from the client.
fn cut_after(server: Server, bytes: usize) -> (u16, Arc<AtomicBool>) {
    use std::io::Read;
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let (server_port, server) = (server.port, Arc::new(std::sync::Mutex::new(Some(server))));
    let (seen, dead) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let told = Arc::clone(&dead);
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, seen, server) = (client.unwrap(), Arc::clone(&seen), Arc::clone(&server));
            let Ok(mut there) = std::net::TcpStream::connect(("127.0.0.1", server_port)) else { continue };
            let (mut back_from, mut back_to) = (there.try_clone().unwrap(), client.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ended = std::io::copy(&mut back_from, &mut back_to);
                let _ended = back_to.shutdown(std::net::Shutdown::Both);
            });
            let dead = Arc::clone(&dead);
            std::thread::spawn(move || {
                let mut some = [0; 8192];
                while let Ok(len @ 1..) = client.read(&mut some) {
                    if seen.fetch_add(len, Ordering::Relaxed) + len > bytes {
                        drop(server.lock().unwrap().take());
                        dead.store(true, Ordering::Release);
                    }
                    if there.write_all(&some[..len]).is_err() {
                        break;
                    }
                }
                let _ended = there.shutdown(std::net::Shutdown::Both);
            });
        }
    });
    (port, told)
}

#[test]
fn a_push_goes_on_where_the_server_was_killed() {
    let world = World::new();
    for n in 0..60_u64 {
        world.write(&format!("etc/{n}"), &noise(100 << 10, n + 1));
    }
    let one = world.commit("first");
    // Killed in the middle of six megabytes.
    let (port, dead) = cut_after(Server::start(&world.at("buckets")), 3 << 20);
    let error = push(&world.here, &store(port, KEY)).unwrap_err();
    assert!(dead.load(Ordering::Acquire), "{error}");
    let server = Server::start(&world.at("buckets"));
    let store = server.store();
    assert_eq!(store.flavours().unwrap(), Vec::<FlavourName>::new(), "nothing shows of what is not whole");
    assert!(world.kept("commits").is_empty());
    let brought = world.kept("objects").len() as u64;
    assert!((5..55).contains(&brought), "{brought} objects of 60 had been brought");
    let done = push(&world.here, &store).unwrap();
    assert!(done.objects <= 60 - brought && done.wire_bytes < 5 << 20, "{brought} were there: {done:?}");
    let there = world.repository("there");
    pull(&there, &store).unwrap();
    assert!(there.fsck(None).unwrap().is_sound());
    there.verify(one).unwrap();
    // And a clone of it is what a directory gives.
    let clone = world.repository("clone");
    pull(&clone, &Directory::new(world.repository("here"))).unwrap();
    assert_eq!(clone.tags(&flavour()).unwrap(), there.tags(&flavour()).unwrap());
}
