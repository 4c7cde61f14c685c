//! What travels between repositories.

use std::{
    collections::HashMap,
    io::{self, Cursor, Read, Write},
    sync::{Arc, Mutex},
};

use qvd_storage::repository::{
    Wanted,
    wire::{self, Channel, Question, Remote},
};

use crate::{World, parts::split, world::FLAVOUR};

/// The letter that a question's answers have in an input.
pub(crate) fn letter(question: &[u8]) -> u8 {
    match Question::decode(question) {
        Ok(Question::Flavours) => b'f',
        Ok(Question::Tags(_)) => b't',
        Ok(Question::Commit(_)) => b'c',
        Ok(Question::Signatures(_)) => b's',
        Ok(Question::Tree { .. }) => b'e',
        Ok(Question::Objects(_)) => b'o',
        _ => b'?',
    }
}

/// Another side that answers what an input says, whatever it is asked.
struct Scripted {
    answers: Vec<(u8, Vec<u8>)>,
    given: Mutex<HashMap<u8, usize>>,
}

impl std::fmt::Debug for Scripted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scripted").finish_non_exhaustive()
    }
}

impl Channel for Scripted {
    fn ask(&self, question: &[u8]) -> io::Result<Box<dyn Read + '_>> {
        let kind = letter(question);
        let mut given = self.given.lock().unwrap();
        let next = given.entry(kind).or_default();
        let answer = self.answers.iter().filter(|(of, _)| *of == kind).nth(*next);
        *next += 1;
        match answer {
            Some((_, answer)) => Ok(Box::new(answer.as_slice())),
            None => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }
}

/// A pull from another side that is not to be trusted.
pub(crate) fn pull(world: &World, bytes: &[u8]) -> bool {
    let fresh = world.fresh();
    let answers = split(bytes).into_iter().map(|(kind, part)| (kind, part.to_vec())).collect();
    let remote = Remote::new("hostile", Scripted { answers, given: Mutex::default() });
    let wanted = Wanted { flavour: FLAVOUR.parse().unwrap(), tag: None, force: false };
    let taken = fresh.repository.pull(&remote, &wanted, "ana", &mut |_| ()).is_ok();
    fresh.expect_sound();
    taken
}

/// A connection of which all that comes is there already.
pub(crate) struct Connection {
    comes: Cursor<Vec<u8>>,
    /// What goes, for whoever wants to see it.
    pub(crate) goes: Arc<Mutex<Vec<u8>>>,
}

impl Connection {
    pub(crate) fn new(comes: &[u8]) -> Self {
        Self { comes: Cursor::new(comes.to_vec()), goes: Arc::default() }
    }
}

impl Read for Connection {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.comes.read(to)
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.goes.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What somebody offers who connects to us.
pub(crate) fn receive(world: &World, bytes: &[u8]) -> bool {
    let fresh = world.fresh();
    let connection = Connection::new(bytes);
    let said = Arc::clone(&connection.goes);
    drop(wire::receive(&fresh.repository, Box::new(connection), "hostile", "ana"));
    fresh.expect_sound();
    // The last turn says that all of it is here.
    let said = said.lock().unwrap();
    said.windows(7).any(|window| window == b"\"done\":")
}

/// Questions of somebody who may ask: one as it is, then as they come over a connection.
pub(crate) fn question(world: &World, bytes: &[u8]) -> bool {
    let mut said = Vec::new();
    wire::answer(&world.repository, bytes, &mut said).unwrap();
    // Given or refused.
    assert!(matches!(said.first(), Some(0 | 1)), "{said:?}");
    drop(wire::serve(&world.repository, &mut Connection::new(bytes)));
    Question::decode(bytes).is_ok_and(|question| {
        assert_eq!(Question::decode(&question.encode().unwrap()), Ok(question));
        said.first() == Some(&0)
    })
}

/// Everything that the other side of a whole pull says.
pub(crate) fn recorded(world: &World) -> Vec<u8> {
    #[derive(Debug)]
    struct Recorder<'w> {
        world: &'w World,
        answers: Mutex<Vec<(u8, Vec<u8>)>>,
    }
    impl Channel for &Recorder<'_> {
        fn ask(&self, question: &[u8]) -> io::Result<Box<dyn Read + '_>> {
            let mut answer = Vec::new();
            wire::answer(&self.world.repository, question, &mut answer)?;
            self.answers.lock().unwrap().push((letter(question), answer.clone()));
            Ok(Box::new(Cursor::new(answer)))
        }
    }
    let recorder = Recorder { world, answers: Mutex::default() };
    let wanted = Wanted { flavour: FLAVOUR.parse().unwrap(), tag: None, force: false };
    world.fresh().repository.pull(&Remote::new("here", &recorder), &wanted, "ana", &mut |_| ()).unwrap();
    let answers = recorder.answers.into_inner().unwrap();
    crate::parts::join(answers.iter().map(|(kind, answer)| (*kind, answer.as_slice())))
}

/// The same as messages of a connection that offers.
pub(crate) fn offered(world: &World) -> Vec<u8> {
    let wanted = Wanted { flavour: FLAVOUR.parse().unwrap(), tag: None, force: false };
    let mut said = Vec::new();
    let mut say = |message: &[u8]| {
        said.extend(u32::try_from(message.len()).unwrap().to_le_bytes());
        said.extend(message);
    };
    say(&serde_json::to_vec(&wanted).unwrap());
    let recorded = recorded(world);
    for (_, answer) in split(&recorded) {
        say(answer);
        say(&[]);
    }
    said
}
