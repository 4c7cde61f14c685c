//! Passwords: from a pipe, from a prompt, or made here. Never an argument.

use std::io::{self, BufRead, IsTerminal, Read, Write};

use anyhow::Context;
use qvd_farm::Secret;
use rand::seq::IndexedRandom;
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

use crate::{
    cli::PasswordSource,
    failure::{Exit, Refusal},
};

/// Longest line read as a password, in bytes: what the gateway accepts is less.
const LINE_MAX: u64 = 4096;

/// Letters and digits that nobody takes for one another when read aloud or
/// copied by hand.
const ALPHABET: &[u8] = b"abcdefghijkmnpqrstuvwxyz23456789";

/// Characters of a password made here: 16 of 32 letters are 80 bits.
const GENERATED_LEN: usize = 16;

/// A password, and whether it was made here, so that it has to be shown.
pub(crate) struct Password {
    pub(crate) secret: Secret,
    pub(crate) generated: bool,
}

/// Gets a password from where the command line says, or by asking.
pub(crate) fn obtain(source: &PasswordSource) -> anyhow::Result<Password> {
    if source.generate {
        return Ok(Password { secret: generate(), generated: true });
    }
    let stdin = io::stdin();
    let secret = if source.password_stdin || !stdin.is_terminal() {
        read_line(&mut stdin.lock())?
    } else {
        let secret = ask("Password: ")?;
        if ask("Again: ")?.expose() != secret.expose() {
            return Err(Refusal::new(Exit::Usage, "cannot take the password: the two differ").into());
        }
        secret
    };
    Ok(Password { secret, generated: false })
}

/// Gets a password that exists, from a pipe or by asking.
pub(crate) fn known(piped: bool) -> anyhow::Result<Secret> {
    if piped { read_line(&mut io::stdin().lock()) } else { ask("Password: ") }
}

pub(crate) fn generate() -> Secret {
    let mut random = rand::rng();
    let letters = (0..GENERATED_LEN).filter_map(|_| ALPHABET.choose(&mut random));
    Secret::new(letters.map(|&letter| char::from(letter)).collect())
}

fn read_line(input: &mut dyn BufRead) -> anyhow::Result<Secret> {
    let mut line = String::new();
    input.take(LINE_MAX).read_line(&mut line).context("cannot read the password from standard input")?;
    line.truncate(line.trim_end_matches(['\r', '\n']).len());
    if line.is_empty() {
        return Err(Refusal::new(Exit::Usage, "cannot take the password: it is empty").into());
    }
    Ok(Secret::new(line))
}

/// Asks on the terminal, which does not show what is typed.
fn ask(prompt: &str) -> anyhow::Result<Secret> {
    let stdin = io::stdin();
    write!(io::stderr(), "{prompt}").context("cannot ask for the password")?;
    let before = tcgetattr(&stdin).context("cannot ask for the password")?;
    let mut hidden = before.clone();
    hidden.local_modes.remove(LocalModes::ECHO);
    hidden.local_modes.insert(LocalModes::ECHONL);
    tcsetattr(&stdin, OptionalActions::Flush, &hidden).context("cannot hide the password")?;
    let line = read_line(&mut stdin.lock());
    tcsetattr(&stdin, OptionalActions::Flush, &before).context("cannot restore the terminal")?;
    line
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_taken_without_its_end() {
        for text in ["pa ss \n", "pa ss \r\n", "pa ss ", "pa ss \nmore\n"] {
            assert_eq!(read_line(&mut text.as_bytes()).unwrap().expose(), "pa ss ", "{text:?}");
        }
        assert!(read_line(&mut "\n".as_bytes()).is_err());
        assert!(read_line(&mut "".as_bytes()).is_err());
    }

    #[test]
    fn generated_passwords_differ() {
        let (one, other) = (generate(), generate());
        assert_eq!(one.expose().len(), GENERATED_LEN);
        assert_ne!(one.expose(), other.expose());
    }
}
