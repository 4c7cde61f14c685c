//! What is said on QEMU's control socket: commands, answers, events, refusals.

use std::{io, time::Duration};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// The socket failed.
    #[error("cannot {op} QEMU's control socket")]
    Io {
        /// What was tried.
        op: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// QEMU has ended, or closed the connection.
    #[error("QEMU closed its control socket")]
    Closed,
    /// What came is not QMP.
    #[error("QEMU's control socket said something else than QMP: {0}")]
    Garbage(String),
    /// QEMU refused, in its words.
    #[error("QEMU refused `{command}`: {reason}")]
    Refused {
        /// The command.
        command: &'static str,
        /// What QEMU calls the kind of error.
        class: String,
        /// Why, in QEMU's words.
        reason: String,
    },
    /// Nothing came in time.
    #[error("QEMU did not answer `{command}` within {limit:?}")]
    Timeout {
        /// What was waited for.
        command: &'static str,
        /// How long it could have taken.
        limit: Duration,
    },
}

/// A command, with the type of its answer.
pub trait Command: Serialize {
    /// Its name on the wire.
    const NAME: &'static str;
    /// What QEMU answers. Fields that are not in it are ignored: they differ
    /// between versions.
    type Answer: DeserializeOwned;
}

/// Something that happened to the machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// QEMU's name for it.
    pub name: String,
    /// What it says beside its name.
    pub data: Value,
}

#[derive(Deserialize)]
pub(super) struct Refusal {
    pub(super) class: String,
    pub(super) desc: String,
}

/// A line, sorted by what it can be.
#[derive(Deserialize)]
pub(super) struct Line {
    #[serde(rename = "QMP")]
    pub(super) greeting: Option<Greeting>,
    pub(super) event: Option<String>,
    pub(super) data: Option<Value>,
    pub(super) id: Option<u64>,
    #[serde(default, rename = "return", deserialize_with = "present")]
    pub(super) answer: Option<Value>,
    pub(super) error: Option<Refusal>,
}

/// An answer of `null` is an answer too.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

#[derive(Deserialize)]
pub(super) struct Greeting {
    pub(super) version: GreetingVersion,
}

#[derive(Deserialize)]
pub(super) struct GreetingVersion {
    pub(super) qemu: QemuVersion,
    #[serde(default)]
    pub(super) package: String,
}

/// Version of a QEMU, as it says itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuVersion {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub micro: u32,
    /// What the distribution calls its build.
    #[serde(default)]
    pub package: String,
}

impl QemuVersion {
    /// Before it has said one.
    pub(crate) const fn none() -> Self {
        Self { major: 0, minor: 0, micro: 0, package: String::new() }
    }
}
