//! What a store of the protocol of S3 answers.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use qvd_s3::{Access, Store};
use qvd_storage::repository::{Destination, Move, Source, Wanted};

use crate::{
    World,
    parts::{join, split},
    world::FLAVOUR,
};

/// A server that answers what an input says. It ends with the process.
pub(crate) struct Server {
    port: u16,
    script: Arc<Mutex<Script>>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("port", &self.port).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Script {
    answers: Vec<(u8, Vec<u8>)>,
    given: HashMap<(u8, u8), usize>,
}

impl Script {
    /// Status and body for a path: each answer says the first letter of the last
    /// name that it is for, and is given once.
    fn answer(&mut self, path: &str) -> (&'static str, Vec<u8>) {
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let kinds =
            [(b't', "/tags/"), (b'c', "/commits/"), (b's', "/signatures/"), (b'e', "/trees/"), (b'o', "/objects/")];
        let kind = kinds.iter().find(|(_, part)| path.contains(part)).map_or(b'?', |(kind, _)| *kind);
        let kind = if query.contains("list-type") { b'l' } else { kind };
        let first = if kind == b'l' { b'*' } else { path.rsplit('/').next().unwrap().bytes().next().unwrap_or(b'*') };
        let given = self.given.entry((kind, first)).or_default();
        let mut answers = self.answers.iter().filter(|(of, answer)| *of == kind && answer.first() == Some(&first));
        let answer = answers.nth(*given);
        *given += 1;
        let refusal = || self.answers.iter().find(|(of, _)| *of == b'x');
        match answer {
            Some((_, answer)) => ("200 OK", answer[1..].to_vec()),
            None => match refusal() {
                Some((_, why)) => ("403 Forbidden", why.clone()),
                None => ("404 Not Found", Vec::new()),
            },
        }
    }
}

impl Server {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let script = Arc::<Mutex<Script>>::default();
        let shared = Arc::clone(&script);
        thread::spawn(move || {
            for connection in listener.incoming() {
                let (connection, script) = (connection.unwrap(), Arc::clone(&shared));
                thread::spawn(move || serve(&connection, &script));
            }
        });
        Self { port, script }
    }

    fn store(&self) -> Store {
        let mut access = Access::new("nobody", "nothing");
        access.endpoint = Some(format!("http://127.0.0.1:{}", self.port));
        Store::open("s3://images", &access).unwrap()
    }
}

/// Answers one request after another, until the other side leaves.
fn serve(connection: &TcpStream, script: &Mutex<Script>) -> Option<()> {
    let mut lines = BufReader::new(connection).lines();
    loop {
        let request = lines.next()?.ok()?;
        while !lines.next()?.ok()?.is_empty() {}
        let mut words = request.split(' ');
        let (method, path) = (words.next()?, words.next()?);
        let (status, body) = script.lock().unwrap().answer(path);
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nETag: \"1\"\r\nLast-Modified: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\n",
            body.len()
        );
        let mut answer = head.into_bytes();
        answer.extend(if method == "HEAD" { &[] } else { body.as_slice() });
        let mut to = connection;
        to.write_all(&answer).ok()?;
    }
}

/// A pull from a store that is not to be trusted, and a look at what it has.
pub(crate) fn store(world: &World, bytes: &[u8]) -> bool {
    let server = world.server();
    let answers: Vec<_> = split(bytes).into_iter().map(|(kind, part)| (kind, part.to_vec())).collect();
    let script = || Script { answers: answers.clone(), given: HashMap::new() };
    let (fresh, store) = (world.fresh(), server.store());
    *server.script.lock().unwrap() = script();
    let wanted = Wanted { flavour: FLAVOUR.parse().unwrap(), tag: None, force: false };
    let taken = fresh.repository.pull(&store, &wanted, "ana", &mut |_| ()).is_ok();
    fresh.expect_sound();
    *server.script.lock().unwrap() = script();
    drop(store.flavours());
    if let Ok(missing) = store.missing(&[world.object]) {
        assert!(missing.iter().all(|id| *id == world.object));
    }
    taken
}

/// What a store with the world's commit answers to a pull; and one that refuses.
pub(crate) fn seeds(world: &World) -> Vec<Vec<u8>> {
    let key = |name: &str| {
        format!(
            "<Contents><Key>flavours/{FLAVOUR}/tags/{name}</Key><LastModified>1970-01-01T00:00:00.000Z</LastModified>\
             <ETag>1</ETag><Size>1</Size></Contents>"
        )
    };
    let list = format!(
        "*<ListBucketResult><IsTruncated>false</IsTruncated>{}{}</ListBucketResult>",
        key("default"),
        key("head")
    );
    let more = "*<ListBucketResult><CommonPrefixes><Prefix>flavours/tiny/</Prefix></CommonPrefixes><IsTruncated>true\
                </IsTruncated><NextContinuationToken>x</NextContinuationToken></ListBucketResult>";
    let last = Move { from: None, to: Some(world.commit), time_unix_s: 1, who: "ana".into(), why: "why".into() };
    let last = serde_json::to_vec(&last).unwrap();
    let of = |name: &str, content: &[u8]| [name.as_bytes().get(..1).unwrap(), content].concat();
    let packed = |content: &[u8]| zstd::encode_all(content, 3).unwrap();

    let commit = world.repository.commit(world.commit).unwrap();
    let tree = world.repository.tree_of(&commit).unwrap();
    let mut parts = vec![(b'l', list.into_bytes()), (b'l', more.as_bytes().to_vec())];
    parts.extend(["default", "head"].map(|tag| (b't', of(tag, &last))));
    parts.push((b'c', of(&world.commit.hex(), &commit.encode().unwrap().1)));
    parts.push((b's', of(&world.commit.hex(), b"[]")));
    let (tree_id, encoded) = tree.encode();
    parts.push((b'e', of(&tree_id.hex(), &packed(&encoded))));
    for (id, _) in tree.objects() {
        let content = zstd::encode_all(world.repository.object(id).unwrap(), 3).unwrap();
        parts.push((b'o', of(&id.hex()[2..], &content)));
    }
    let refusal = b"<Error><Code>AccessDenied</Code><Message>not you</Message></Error>";
    vec![join(parts.iter().map(|(kind, part)| (*kind, part.as_slice()))), join([(b'x', refusal.as_slice())])]
}
