//! Between rows and types. A row that does not fit its type was written by
//! somebody else: that is an error of the store, not of the caller.

use std::{collections::BTreeSet, net::Ipv4Addr, str::FromStr};

use qvd_core::{Bytes, Calls, DesktopId, Device, Limits, MilliCpu, NetPolicy, Virtualizer};

use crate::{Desktop, FarmError, FlavourDefaults, SessionInfo, SessionKind, User, store::Row};

type Result<T> = std::result::Result<T, sqlx::Error>;

fn decode<T, E: std::error::Error + Send + Sync + 'static>(
    column: &'static str,
    value: std::result::Result<T, E>,
) -> Result<T> {
    value.map_err(|source| sqlx::Error::ColumnDecode { index: column.to_owned(), source: Box::new(source) })
}

fn parsed<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(row: &Row, column: &'static str) -> Result<T> {
    decode(column, row.try_get::<&str>(column)?.parse())
}

fn unsigned<T: TryFrom<i64, Error: std::error::Error + Send + Sync + 'static>>(
    row: &Row,
    column: &'static str,
) -> Result<T> {
    decode(column, T::try_from(row.try_get::<i64>(column)?))
}

/// A word of one of our enums, by its serde name.
fn word<T: serde::de::DeserializeOwned>(row: &Row, column: &'static str) -> Result<T> {
    decode(column, serde_json::from_value(serde_json::Value::from(row.try_get::<&str>(column)?)))
}

pub(crate) const fn virtualizer_word(virtualizer: Virtualizer) -> &'static str {
    match virtualizer {
        Virtualizer::Qemu => "qemu",
        Virtualizer::Libvirt => "libvirt",
        _ => "container",
    }
}

/// What a column can hold of a number of bytes: 8 EiB less one, more than any host has.
pub(crate) fn bytes_column(bytes: Bytes) -> i64 {
    i64::try_from(bytes.get()).unwrap_or(i64::MAX)
}

pub(crate) fn user(row: &Row) -> Result<User> {
    Ok(User {
        name: parsed(row, "name")?,
        admin: row.try_get("admin")?,
        tenant: parsed(row, "tenant")?,
        created_unix_s: unsigned(row, "created_unix_s")?,
    })
}

pub(crate) fn limits(row: &Row) -> Result<Limits> {
    Ok(Limits {
        memory: Bytes::new(unsigned(row, "memory_bytes")?),
        cpu: MilliCpu(unsigned(row, "cpu_milli")?),
        pids: unsigned(row, "pids")?,
        io: match row.try_get::<Option<i64>>("io_bytes_per_s")? {
            None => None,
            Some(_) => Some(Bytes::new(unsigned(row, "io_bytes_per_s")?)),
        },
    })
}

fn devices(row: &Row) -> Result<BTreeSet<Device>> {
    let words = row.try_get::<&str>("devices")?.split_ascii_whitespace();
    decode("devices", words.map(str::parse).collect())
}

fn calls(row: &Row) -> Result<Option<Calls>> {
    decode("calls", row.try_get::<Option<&str>>("calls")?.map(str::parse).transpose())
}

/// Kinds of devices, as their column has them.
pub(crate) fn devices_column(devices: &BTreeSet<Device>) -> String {
    devices.iter().map(|device| device.as_str()).collect::<Vec<_>>().join(" ")
}

fn net(row: &Row) -> Result<NetPolicy> {
    let policy: Option<&str> = row.try_get("net_policy")?;
    if let Some(policy) = policy {
        return decode("net_policy", serde_json::from_str(policy));
    }
    let (port, internet) = (row.try_get("net_port")?, row.try_get("net_internet")?);
    Ok(NetPolicy { port, internet, ..NetPolicy::none() })
}

/// The whole policy, as its column has it.
pub(crate) fn net_column(net: &NetPolicy) -> std::result::Result<String, FarmError> {
    let encode =
        |error: serde_json::Error| FarmError::store("write a network policy", sqlx::Error::Encode(error.into()));
    serde_json::to_string(net).map_err(encode)
}

pub(crate) fn flavour_defaults(row: &Row) -> Result<FlavourDefaults> {
    Ok(FlavourDefaults { limits: limits(row)?, root: word(row, "root_policy")?, net: net(row)? })
}

pub(crate) fn desktop_id(row: &Row) -> Result<DesktopId> {
    decode("id", DesktopId::new(unsigned(row, "id")?))
}

pub(crate) fn desktop(row: &Row) -> Result<Desktop> {
    let address: Option<&str> = row.try_get("address")?;
    Ok(Desktop {
        id: desktop_id(row)?,
        user: parsed(row, "user_name")?,
        name: row.try_get("name")?,
        flavour: parsed(row, "flavour")?,
        tag: parsed(row, "tag")?,
        virtualizer: word(row, "virtualizer")?,
        limits: limits(row)?,
        root: word(row, "root_policy")?,
        net: net(row)?,
        devices: devices(row)?,
        calls: calls(row)?,
        address: decode("address", address.map(str::parse::<Ipv4Addr>).transpose())?,
        blocked: row.try_get("blocked")?,
        created_unix_s: unsigned(row, "created_unix_s")?,
    })
}

pub(crate) fn session(row: &Row) -> Result<SessionInfo> {
    Ok(SessionInfo {
        id: row.try_get("id")?,
        user: parsed(row, "user_name")?,
        kind: word::<SessionKind>(row, "kind")?,
        created_unix_s: unsigned(row, "created_unix_s")?,
        last_used_unix_s: unsigned(row, "last_used_unix_s")?,
        expires_unix_s: unsigned(row, "expires_unix_s")?,
    })
}
