//! Keys, signatures on commits, and whose are demanded.

use std::{
    fs,
    io::{self, BufRead, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::Context;
use qvd_storage::{
    Repository,
    repository::{Policy, Reference, SigningKey, VerifyingKey},
};
use serde_json::json;

use crate::{output::Output, paths::read_text};

/// Makes a pair of keys.
pub(crate) fn key(file: &Path, output: &Output) -> anyhow::Result<()> {
    let (_, public, secret) = SigningKey::generate()?;
    let mut of_public = file.as_os_str().to_owned();
    of_public.push(".pub");
    let of_public = PathBuf::from(of_public);
    let write = |path: &Path, text: &str, mode| {
        let file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
        file.and_then(|mut file| file.write_all(text.as_bytes()))
            .with_context(|| format!("cannot write `{}`", path.display()))
    };
    write(file, &secret, 0o600)?;
    write(&of_public, &format!("untrusted comment: key {} of qvd\n{}\n", public.id(), public.to_line()), 0o644)?;
    output.result(&json!({ "id": public.id(), "secret": file, "public": of_public }), |_| {
        format!("key {}: keep `{}` secret, give away `{}`", public.id(), file.display(), of_public.display())
    })
}

/// Signs a commit.
pub(crate) fn sign(
    repository: &Repository,
    image: &Reference,
    key: &Path,
    password_stdin: bool,
    output: &Output,
) -> anyhow::Result<()> {
    let sign = || {
        let text = read_text("key", key)?;
        let password = password_stdin
            .then(|| -> io::Result<String> {
                let mut line = String::new();
                io::stdin().lock().read_line(&mut line)?;
                Ok(line.trim_end_matches(['\r', '\n']).to_owned())
            })
            .transpose()?;
        let id = repository.resolve(image)?;
        repository.sign(id, &SigningKey::read(&text, password.as_deref())?)?;
        anyhow::Ok((id, repository.signers(id)?))
    };
    let (id, signers) = sign().with_context(|| format!("cannot sign {image}"))?;
    output.result(&json!({ "id": id, "signers": signers }), |_| format!("{image} is signed by {}", signers.join(", ")))
}

/// Shows or sets whose commits may be used.
pub(crate) fn policy(repository: &Repository, require: &[PathBuf], none: bool, output: &Output) -> anyhow::Result<()> {
    let set = || {
        if none {
            repository.set_policy(None)?;
        } else if !require.is_empty() {
            let read = |file: &PathBuf| {
                let text = read_text("key", file)?;
                VerifyingKey::read(&text).with_context(|| format!("cannot use `{}`", file.display()))
            };
            let keys = require.iter().map(read).collect::<anyhow::Result<Vec<_>>>()?;
            repository.set_policy(Some(&Policy { keys }))?;
        }
        anyhow::Ok(repository.policy()?)
    };
    let policy = set().context("cannot set whose images may be used")?;
    output.result(&policy, |policy| match policy {
        None => "all commits may be used, signed or not".to_owned(),
        Some(policy) => {
            let keys: Vec<String> = policy.keys.iter().map(VerifyingKey::id).collect();
            format!("only commits signed by {} may be used", keys.join(" or "))
        }
    })
}
