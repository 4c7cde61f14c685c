use std::sync::Arc;

use argon2::{
    Argon2,
    password_hash::{self, PasswordHasher, PasswordVerifier},
};
use tokio::sync::Semaphore;

use crate::{ErrorKind, FarmError, Secret};

/// Shortest password, in characters. Source: NIST SP 800-63B, 5.1.1.2.
const MIN_CHARS: usize = 8;

/// Longest password, in bytes: more only helps who wants to keep us busy.
const MAX_BYTES: usize = 1024;

/// Hashes at once. Each takes 19 MiB and a core for tens of milliseconds;
/// more at once would not be faster, and starve the desktops.
const CONCURRENT: usize = 2;

/// Hashes and compares passwords, a few at a time and off the async threads.
#[derive(Debug)]
pub(crate) struct Passwords {
    turns: Arc<Semaphore>,
    /// Compared against when there is no such user, so that the answer takes as long.
    decoy: Arc<str>,
}

impl Passwords {
    pub(crate) fn new() -> Result<Self, FarmError> {
        let decoy = hash("no user has this password").map_err(failed)?;
        Ok(Self { turns: Arc::new(Semaphore::new(CONCURRENT)), decoy: decoy.into() })
    }

    /// Hashes a new password with a salt of its own.
    pub(crate) async fn hash(&self, password: &Secret) -> Result<String, FarmError> {
        let invalid = |what: String| FarmError::with_code(ErrorKind::Invalid, "invalid_password", what);
        if password.expose().chars().count() < MIN_CHARS {
            return Err(invalid(format!("a password must have at least {MIN_CHARS} characters")));
        }
        if password.expose().len() > MAX_BYTES {
            return Err(invalid(format!("a password must have at most {MAX_BYTES} bytes")));
        }
        let password = password.clone();
        self.run(move || hash(password.expose())).await?.map_err(failed)
    }

    /// Whether `password` is the one behind `stored`; `None`, for want of such
    /// a user, costs the same and is never right.
    pub(crate) async fn verify(&self, password: &Secret, stored: Option<String>) -> Result<bool, FarmError> {
        let known = stored.is_some();
        let stored: Arc<str> = stored.map_or_else(|| Arc::clone(&self.decoy), Into::into);
        // An overlong one is wrong whatever it is; the comparison is made all the same.
        let fits = password.expose().len() <= MAX_BYTES;
        let password = if fits { password.clone() } else { Secret::from("") };
        match self.run(move || Argon2::default().verify_password(password.expose().as_bytes(), &*stored)).await? {
            Ok(()) => Ok(known && fits),
            Err(password_hash::Error::PasswordInvalid) => Ok(false),
            Err(e) => Err(failed(e)),
        }
    }

    async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, FarmError> {
        let internal = |source: Box<dyn std::error::Error + Send + Sync>| {
            FarmError::with_code(ErrorKind::Failed, "internal", "cannot check the password").because(source)
        };
        let turn = Arc::clone(&self.turns).acquire_owned().await.map_err(|e| internal(e.into()))?;
        tokio::task::spawn_blocking(move || {
            let result = work();
            drop(turn);
            result
        })
        .await
        .map_err(|e| internal(e.into()))
    }
}

/// Argon2id with the crate's defaults, 19 MiB and two passes: the first choice
/// of the OWASP password storage cheat sheet.
fn hash(password: &str) -> password_hash::Result<String> {
    Argon2::default().hash_password(password.as_bytes()).map(|hash| hash.to_string())
}

fn failed(source: password_hash::Error) -> FarmError {
    FarmError::with_code(ErrorKind::Failed, "internal", "cannot hash the password").because(source)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_same_password_is_stored_differently_each_time_and_both_verify() {
        let passwords = Passwords::new().unwrap();
        let secret = Secret::from("correct horse");
        let (a, b) = (passwords.hash(&secret).await.unwrap(), passwords.hash(&secret).await.unwrap());
        assert_ne!(a, b);
        assert!(a.starts_with("$argon2id$"), "{a}");
        for stored in [a, b] {
            assert!(passwords.verify(&secret, Some(stored.clone())).await.unwrap());
            assert!(!passwords.verify(&Secret::from("correct horsf"), Some(stored)).await.unwrap());
        }
    }

    #[tokio::test]
    async fn nobody_has_the_decoys_password() {
        let passwords = Passwords::new().unwrap();
        assert!(!passwords.verify(&Secret::from("no user has this password"), None).await.unwrap());
    }

    #[tokio::test]
    async fn short_and_huge_passwords_are_refused_with_the_rule() {
        let passwords = Passwords::new().unwrap();
        for bad in ["", "1234567", &"x".repeat(MAX_BYTES + 1)] {
            let error = passwords.hash(&Secret::from(bad)).await.unwrap_err();
            assert_eq!(error.code(), "invalid_password");
        }
        assert!(!passwords.verify(&Secret::from(&*"x".repeat(1 << 20)), None).await.unwrap());
    }
}
