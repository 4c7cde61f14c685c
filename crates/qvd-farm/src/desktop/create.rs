//! A desktop that is new: whether what was asked for makes sense and is free to take.

use std::net::Ipv4Addr;

use qvd_core::{Bytes, Calls, DesktopId, FlavourName, Limits, NetPolicy, Tag, UserName};

use super::NAME_MAX;
use crate::{
    Desktop, ErrorKind, Farm, FarmError, NewDesktop, row,
    store::{Change, query},
};

/// A session reads some ten megabytes of programs before it is up.
const LEAST_IO: Bytes = Bytes::mib(1);

pub(crate) fn check_limits(limits: &Limits) -> Result<(), FarmError> {
    let refuse = |what: String| Err(FarmError::with_code(ErrorKind::Invalid, "invalid_limits", what));
    let least = Limits::LEAST;
    match limits {
        Limits { memory, .. } if *memory < least.memory => refuse(format!(
            "a memory limit of {memory} is too little: no desktop starts with less than {}",
            least.memory
        )),
        Limits { cpu, .. } if cpu.0 < least.cpu.0 => refuse(format!(
            "a processor limit of {} is too little: give at least {} thousandths of a core",
            cpu.0, least.cpu.0
        )),
        Limits { pids, .. } if *pids < least.pids => {
            refuse(format!("a limit of {pids} processes is too little: give at least {}", least.pids))
        }
        Limits { io: Some(io), .. } if *io < LEAST_IO => {
            refuse(format!("a limit of {io} a second is too little: no desktop starts with less than {LEAST_IO}"))
        }
        _ => Ok(()),
    }
}

fn check_name(name: &str) -> Result<(), FarmError> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let good = name.len() <= NAME_MAX
        && name.bytes().all(|b| inner(b) || b == b'-')
        && name.bytes().next().is_some_and(inner)
        && name.bytes().last().is_some_and(inner);
    if good {
        return Ok(());
    }
    let shown: String = name.chars().take(NAME_MAX).flat_map(char::escape_default).collect();
    Err(FarmError::with_code(
        ErrorKind::Invalid,
        "invalid_name",
        format!("`{shown}` is not a desktop name: use up to {NAME_MAX} of a-z 0-9 - and neither start nor end with -"),
    ))
}

/// A name to start from: the flavour's, as a host name.
fn name_of(flavour: &FlavourName) -> String {
    let name = flavour.as_str().replace(['.', '_'], "-");
    name.get(..NAME_MAX).unwrap_or(&name).trim_matches('-').to_owned()
}

/// Fixed addresses must be of a host: the node checks that its bridge has them.
fn check_address(address: Ipv4Addr) -> Result<(), FarmError> {
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() || address.is_broadcast() {
        let what = format!("{address} cannot be the address of a desktop");
        return Err(FarmError::with_code(ErrorKind::Invalid, "invalid_address", what));
    }
    Ok(())
}

/// Whether a desktop can be as it was asked for, whatever others there are.
fn check(new: &NewDesktop, limits: &Limits, net: &NetPolicy) -> Result<(), FarmError> {
    check_limits(limits)?;
    if new.calls == Some(Calls::System) {
        let what = "system calls `system` are for an image's own init: use `desktop` or `application`";
        return Err(FarmError::with_code(ErrorKind::Invalid, "invalid_calls", what));
    }
    if let Some(name) = &new.name {
        check_name(name)?;
    }
    if let Some(address) = new.address {
        check_address(address)?;
        if !net.port {
            let what = format!("a desktop without a port cannot have the address {address}");
            return Err(FarmError::with_code(ErrorKind::Invalid, "invalid_address", what));
        }
    }
    Ok(())
}

impl Farm {
    /// Makes a desktop; nothing of it runs yet.
    ///
    /// # Errors
    /// The user or the flavour does not exist, the name or the address is
    /// taken (the message says by which desktop), or a value makes no sense.
    pub async fn create_desktop(&self, new: NewDesktop) -> Result<Desktop, FarmError> {
        let defaults = self.flavour(&new.flavour).await?.defaults;
        let tag = new.tag.clone().unwrap_or_else(Tag::default_tag);
        self.resolve(&new.flavour, &tag, None).await?;
        let limits = new.limits.unwrap_or(defaults.limits);
        let net = new.net.clone().unwrap_or(defaults.net);
        check(&new, &limits, &net)?;
        self.user(&new.user).await?;
        let created = self.now_unix_s();

        let mut write = self.write().await?;
        let store = |e| FarmError::store("create a desktop", e);
        let name = free_to_take(&mut write, &new).await?;
        let inserted = query(
            "INSERT INTO desktops (user_name, name, flavour, tag, virtualizer, memory_bytes, cpu_milli, pids,
                 root_policy, net_port, net_internet, net_policy, address, created_unix_s, io_bytes_per_s, devices, calls)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)
             RETURNING id, user_name, name, flavour, tag, virtualizer, memory_bytes, cpu_milli, pids, root_policy,
                 io_bytes_per_s, net_port, net_internet, net_policy, devices, calls, address, blocked, created_unix_s",
        )
        .bind(new.user.as_str())
        .bind(name)
        .bind(new.flavour.as_str())
        .bind(tag.as_str())
        .bind(row::virtualizer_word(new.virtualizer.unwrap_or_default()))
        .bind(row::bytes_column(limits.memory))
        .bind(i64::from(limits.cpu.0))
        .bind(i64::from(limits.pids))
        .bind(new.root.unwrap_or(defaults.root).as_str())
        .bind(net.port)
        .bind(net.internet)
        .bind(row::net_column(&net)?)
        .bind(new.address.map(|a| a.to_string()))
        .bind(created)
        .bind(limits.io.map(row::bytes_column))
        .bind(row::devices_column(&new.devices))
        .bind(new.calls.map(|calls| calls.as_str()))
        .fetch_one(&mut write)
        .await
        .and_then(|found| row::desktop(&found));
        let desktop = match inserted {
            // The user was there a moment ago; the foreign key says so no more.
            Err(sqlx::Error::Database(e)) if e.is_foreign_key_violation() => {
                let what = format!("there is no user `{}`", new.user);
                return Err(FarmError::with_code(ErrorKind::NotFound, "unknown_user", what));
            }
            other => other.map_err(store)?,
        };
        write.commit().await?;
        tracing::info!(desktop = %desktop.id, user = %desktop.user, flavour = %desktop.flavour, "desktop created");
        Ok(desktop)
    }
}

async fn holder_of_name(change: &mut Change, user: &UserName, name: &str) -> Result<Option<DesktopId>, sqlx::Error> {
    let found = query("SELECT id FROM desktops WHERE user_name = $1 AND name = $2")
        .bind(user.as_str())
        .bind(name)
        .fetch_optional(&mut *change)
        .await?;
    found.as_ref().map(row::desktop_id).transpose()
}

async fn holder_of_address(change: &mut Change, address: Ipv4Addr) -> Result<Option<DesktopId>, sqlx::Error> {
    let found = query("SELECT id FROM desktops WHERE address = $1")
        .bind(address.to_string())
        .fetch_optional(&mut *change)
        .await?;
    found.as_ref().map(row::desktop_id).transpose()
}

/// The first of `stem`, `stem-2`, `stem-3`, … that this user has not.
async fn free_name(change: &mut Change, user: &UserName, stem: &str) -> Result<String, sqlx::Error> {
    let mut name = stem.to_owned();
    let mut number = 2_u32;
    while holder_of_name(change, user, &name).await?.is_some() {
        let suffix = format!("-{number}");
        let kept = stem.get(..NAME_MAX - suffix.len()).unwrap_or(stem).trim_end_matches('-');
        name = format!("{kept}{suffix}");
        number += 1;
    }
    Ok(name)
}

/// The name that it gets, if nobody has it nor the address.
async fn free_to_take(change: &mut Change, new: &NewDesktop) -> Result<String, FarmError> {
    let store = |e| FarmError::store("create a desktop", e);
    let taken = |code, what| Err(FarmError::with_code(ErrorKind::Conflict, code, what));
    let name = match &new.name {
        Some(name) => {
            if let Some(other) = holder_of_name(change, &new.user, name).await.map_err(store)? {
                let what = format!("user `{}` has a desktop `{name}` already: desktop {other}", new.user);
                return taken("name_taken", what);
            }
            name.clone()
        }
        None => free_name(change, &new.user, &name_of(&new.flavour)).await.map_err(store)?,
    };
    if let Some(address) = new.address
        && let Some(other) = holder_of_address(change, address).await.map_err(store)?
    {
        return taken("address_taken", format!("address {address} is taken by desktop {other}"));
    }
    Ok(name)
}
