//! Repositories at the two ends of a connection that may break anywhere.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::SystemTime,
};

use qvd_core::Tag;
use qvd_storage::{
    Repository,
    repository::{
        NewCommit, Wanted,
        wire::{self, Remote, Streams},
    },
};

fn commit(repository: &Repository, files: usize) {
    let source = tempfile::tempdir().unwrap();
    for number in 0..files {
        fs::write(source.path().join(number.to_string()), number.to_string().repeat(5000)).unwrap();
    }
    let staging = repository.stage().unwrap();
    let tree = staging.import(source.path(), 1 << 30).unwrap();
    let config = repository.config_for(&"tiny".parse().unwrap(), &tree).unwrap();
    let new = NewCommit {
        config,
        author: "ada".to_owned(),
        message: String::new(),
        time: SystemTime::now(),
        recipe: None,
        publish: false,
    };
    repository.commit_tree(&staging, &tree, new).unwrap();
}

fn wanted() -> Wanted {
    Wanted { flavour: "tiny".parse().unwrap(), tag: None, force: false }
}

/// Breaks after so many bytes were received.
struct Cut(UnixStream, usize);

impl Read for Cut {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let most = to.len().min(self.1);
        if most == 0 {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let len = self.0.read(&mut to[..most])?;
        self.1 -= len;
        Ok(len)
    }
}

impl Write for Cut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// A channel to `at`, each of whose connections breaks after `bytes`.
fn channel(at: &Path, bytes: usize) -> (Remote<Streams>, Arc<AtomicUsize>) {
    let (at, made) = (at.to_owned(), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&made);
    let open = move || {
        count.fetch_add(1, Ordering::Relaxed);
        let (ours, mut theirs) = UnixStream::pair()?;
        let repository = Repository::open_existing(&at).map_err(io::Error::other)?;
        thread::spawn(move || drop(wire::serve(&repository, &mut theirs)));
        Ok(Box::new(Cut(ours, bytes)) as Box<dyn wire::Stream>)
    };
    (Remote::new("there", Streams::new(open)), made)
}

#[test]
fn connections_are_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let there = Repository::open(&dir.path().join("there")).unwrap();
    let here = Repository::open(&dir.path().join("here")).unwrap();
    for files in 1..20 {
        commit(&there, files);
    }
    let (source, made) = channel(there.dir(), usize::MAX);
    let done = here.pull(&source, &wanted(), "ada", &mut |_| {}).unwrap();
    assert_eq!(done.commits, 19);
    assert!(made.load(Ordering::Relaxed) <= 4, "{made:?}");
    assert!(here.fsck(None).unwrap().problems.is_empty());
}

#[test]
fn a_connection_may_break_anywhere_and_the_next_pull_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let there = Repository::open(&dir.path().join("there")).unwrap();
    commit(&there, 40);
    let here = Repository::open(&dir.path().join("here")).unwrap();
    let mut failed = 0;
    for bytes in (1..).step_by(97) {
        let (source, _) = channel(there.dir(), bytes);
        match here.pull(&source, &wanted(), "ada", &mut |_| {}) {
            Ok(_) => break,
            Err(_) => failed += 1,
        }
        assert_eq!(here.tagged(&wanted().flavour, &Tag::head()).unwrap(), None, "after {bytes} bytes");
        assert!(here.fsck(None).unwrap().problems.is_empty(), "after {bytes} bytes");
    }
    assert!(failed > 5, "{failed}");
    assert!(here.fsck(None).unwrap().problems.is_empty());
    assert!(here.tagged(&wanted().flavour, &Tag::head()).unwrap().is_some());
}

#[test]
fn who_offers_and_breaks_off_moves_no_tag() {
    let dir = tempfile::tempdir().unwrap();
    let here = Repository::open(&dir.path().join("here")).unwrap();
    commit(&here, 40);
    for bytes in (1..3000).step_by(211) {
        let there = Repository::open(&dir.path().join(format!("there-{bytes}"))).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let given = thread::scope(|scope| {
            let receives = scope.spawn(|| wire::receive(&there, Box::new(theirs), "here", "ada"));
            let given = wire::give(&here, Box::new(Cut(ours, bytes)), &wanted(), &mut |_| {});
            drop(receives.join().unwrap());
            given
        });
        let head = there.tagged(&wanted().flavour, &Tag::head()).unwrap();
        // The tags may have moved, and only the word of it not have arrived.
        assert!(given.is_err() || head.is_some(), "after {bytes} bytes");
        assert!(there.fsck(None).unwrap().problems.is_empty(), "after {bytes} bytes");
    }
}

#[test]
fn nonsense_is_refused_with_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    let there = Repository::open(&dir.path().join("there")).unwrap();
    for nonsense in [&b"\xff\xff\xff\xff"[..], b"\x02\0\0\0{}", b"\x05\0\0\0", b"\x01", b"GET / HTTP/1.1\r\n\r\n"] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(nonsense).unwrap();
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        let served = wire::serve(&there, &mut theirs.try_clone().unwrap());
        drop(theirs);
        let mut answer = Vec::new();
        // What it did not read makes the end a reset.
        let read = ours.read_to_end(&mut answer);
        assert!(read.is_ok() || served.is_err());
        assert!(served.is_err() || answer.get(4) == Some(&1), "{nonsense:?} {answer:?}");
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(nonsense).unwrap();
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        drop(wire::receive(&there, Box::new(theirs), "here", "ada"));
        assert!(there.flavours().unwrap().is_empty());
    }
}
