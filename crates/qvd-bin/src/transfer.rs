//! Images on their way between repositories: what the command line says of them.

use std::{
    io::{self, IsTerminal},
    path::Path,
};

use anyhow::Context;
use qvd_gateway::images::{self, Clone, Place, Pull, Push, RemoteAccess};
use qvd_storage::repository::{Reference, Transferred};

use crate::{
    cli::{Access, Transfer},
    failure::{Exit, Refusal},
    history::{Images, author, mib},
    output::{Output, count},
    password,
    paths::read_text,
    s3,
};

/// How the repository is reached that a person names, by a directory, its own or
/// an installation's, or by an address.
pub(crate) fn access(text: &Path, access: &Access) -> anyhow::Result<RemoteAccess> {
    let utf8 = || Refusal::new(Exit::Usage, format!("`{}` is no text", text.display()));
    let address = text.to_str().ok_or_else(utf8)?.to_owned();
    let mut remote = RemoteAccess { address, password: None, trusted_pem: None, keys: None };
    match Place::of(&remote.address)? {
        Place::Store(_) => remote.keys = Some(s3::keys_of_caller()?),
        Place::Daemon { .. } => {
            remote.password = Some(password::known(access.password_stdin || !io::stdin().is_terminal())?);
        }
        Place::Directory(path) => {
            let path = std::path::absolute(&path).with_context(|| format!("cannot find `{}`", path.display()))?;
            remote.address = path.into_os_string().into_string().map_err(|_| utf8())?;
        }
        _ => {}
    }
    remote.trusted_pem = access.ca.as_deref().map(|file| read_text("certificate", file)).transpose()?;
    Ok(remote)
}

/// Brings a flavour to another repository.
pub(crate) fn push(
    images: impl FnOnce() -> anyhow::Result<Images>,
    transfer: &Transfer,
    output: &Output,
) -> anyhow::Result<()> {
    let cannot = || format!("cannot push {} to `{}`", transfer.image, transfer.remote.display());
    let push = Push(flavour(transfer).with_context(cannot)?);
    show(&transfer.image, &images()?.call(push, output)?, output)
}

/// Gets a flavour from another repository.
pub(crate) fn pull(
    images: impl FnOnce() -> anyhow::Result<Images>,
    transfer: &Transfer,
    output: &Output,
) -> anyhow::Result<()> {
    let cannot = || format!("cannot pull {} from `{}`", transfer.image, transfer.remote.display());
    let pull = Pull(flavour(transfer).with_context(cannot)?);
    show(&transfer.image, &images()?.call(pull, output)?, output)
}

fn flavour(Transfer { remote, image, force, access }: &Transfer) -> anyhow::Result<images::Transfer> {
    let remote = self::access(remote, access)?;
    Ok(images::Transfer { remote, image: image.clone(), force: *force, author: author() })
}

/// Gets every flavour of another repository.
pub(crate) fn clone(
    images: impl FnOnce() -> anyhow::Result<Images>,
    remote: &Path,
    access: &Access,
    output: &Output,
) -> anyhow::Result<()> {
    let cannot = || format!("cannot clone `{}`", remote.display());
    let clone = Clone { remote: self::access(remote, access).with_context(cannot)?, author: author() };
    output.result(&images()?.call(clone, output)?, |all| {
        all.iter().map(|one| line(&one.flavour, &one.transferred)).collect::<Vec<_>>().join("\n")
    })
}

fn show(image: &Reference, done: &Transferred, output: &Output) -> anyhow::Result<()> {
    output.result(done, |done| line(image, done))
}

fn line(what: &dyn std::fmt::Display, done: &Transferred) -> String {
    let Transferred { commits, objects, bytes, wire_bytes, .. } = done;
    let (commits, objects) = (count(*commits, "commit"), count(*objects, "object"));
    format!("{what}: {commits}, {objects} ({}) in {} of traffic", mib(*bytes), mib(*wire_bytes))
}
