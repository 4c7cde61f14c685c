//! The commands that a machine is driven with. Only what is used, and lenient
//! about what else QEMU says: the schema differs between versions.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::qmp::Command;

/// Declares a command without arguments.
macro_rules! plain {
    ($($(#[$doc:meta])* $name:ident = $wire:literal -> $answer:ty;)+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Serialize)]
        pub struct $name;
        impl Command for $name {
            const NAME: &'static str = $wire;
            type Answer = $answer;
        }
    )+};
}

/// An answer without content.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Done {}

plain! {
    /// Lets the processors run.
    Cont = "cont" -> Done;
    /// Lets the processors stand still.
    Stop = "stop" -> Done;
    /// Presses the power button.
    SystemPowerdown = "system_powerdown" -> Done;
    /// Ends QEMU.
    Quit = "quit" -> Done;
    /// What the machine does.
    QueryStatus = "query-status" -> RunStatus;
    /// How much memory the balloon leaves to the guest.
    QueryBalloon = "query-balloon" -> BalloonInfo;
    /// The number that tells a guest that it is a clone.
    QueryGeneration = "query-vm-generation-id" -> Generation;
    /// How a migration goes.
    QueryMigrate = "query-migrate" -> MigrationInfo;
}

/// See [`QueryStatus`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct RunStatus {
    /// Whether the processors run.
    pub running: bool,
    /// QEMU's word for the state.
    pub status: String,
}

/// See [`QueryGeneration`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Generation {
    /// The number.
    pub guid: String,
}

/// See [`QueryBalloon`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct BalloonInfo {
    /// Bytes that the guest has.
    pub actual: u64,
}

/// See [`QueryMigrate`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct MigrationInfo {
    /// `active`, `completed`, `failed` and others; none before the first.
    pub status: Option<String>,
    /// Why it failed.
    #[serde(rename = "error-desc")]
    pub error: Option<String>,
}

/// Asks the guest's balloon driver to leave this much to the guest.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Balloon {
    /// In bytes.
    pub value: u64,
}
impl Command for Balloon {
    const NAME: &'static str = "balloon";
    type Answer = Done;
}

/// Keeps the descriptor that comes along under a name.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct GetFd<'a> {
    /// The name.
    pub fdname: &'a str,
}
impl Command for GetFd<'_> {
    const NAME: &'static str = "getfd";
    type Answer = Done;
}

/// Turns features of migration on.
#[derive(Debug, Clone, Serialize)]
pub struct MigrateSetCapabilities {
    /// Which.
    pub capabilities: Vec<MigrationCapability>,
}
impl Command for MigrateSetCapabilities {
    const NAME: &'static str = "migrate-set-capabilities";
    type Answer = Done;
}

/// A feature of migration.
#[derive(Debug, Clone, Serialize)]
pub struct MigrationCapability {
    /// Its name.
    pub capability: &'static str,
    /// Whether it is on.
    pub state: bool,
}

/// Writes the machine's state to `uri`.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Migrate<'a> {
    /// `fd:` and the name of a descriptor.
    pub uri: &'a str,
}
impl Command for Migrate<'_> {
    const NAME: &'static str = "migrate";
    type Answer = Done;
}

/// Reads the machine's state from `uri`.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct MigrateIncoming<'a> {
    /// `fd:` and the name of a descriptor.
    pub uri: &'a str,
}
impl Command for MigrateIncoming<'_> {
    const NAME: &'static str = "migrate-incoming";
    type Answer = Done;
}

/// Reads what the guest wrote to a ring buffer.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct RingbufRead<'a> {
    /// Name of the character device.
    pub device: &'a str,
    /// How many bytes at most.
    pub size: u32,
}
impl Command for RingbufRead<'_> {
    const NAME: &'static str = "ringbuf-read";
    type Answer = String;
}

/// Adds a device; its properties are what `-device` takes.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct DeviceAdd(pub Value);
impl Command for DeviceAdd {
    const NAME: &'static str = "device_add";
    type Answer = Done;
}

/// Asks the guest to let go of a device; an event says when it has.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct DeviceDel<'a> {
    /// Its name.
    pub id: &'a str,
}
impl Command for DeviceDel<'_> {
    const NAME: &'static str = "device_del";
    type Answer = Done;
}

/// Adds a network back end; its properties are what `-netdev` takes.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct NetdevAdd(pub Value);
impl Command for NetdevAdd {
    const NAME: &'static str = "netdev_add";
    type Answer = Done;
}

/// Adds a block node; its properties are what `-blockdev` takes.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct BlockdevAdd(pub Value);
impl Command for BlockdevAdd {
    const NAME: &'static str = "blockdev-add";
    type Answer = Done;
}

/// Puts the descriptor that comes along into a set that block nodes open.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct AddFd {
    /// Number of the set.
    #[serde(rename = "fdset-id")]
    pub set: u32,
}
impl Command for AddFd {
    const NAME: &'static str = "add-fd";
    type Answer = Value;
}

/// Writes a picture of the screen.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Screendump<'a> {
    /// Where to.
    pub filename: &'a str,
}
impl Command for Screendump<'_> {
    const NAME: &'static str = "screendump";
    type Answer = Done;
}

/// Closes the descriptors of a set.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct RemoveFd {
    /// Number of the set.
    #[serde(rename = "fdset-id")]
    pub set: u32,
}
impl Command for RemoveFd {
    const NAME: &'static str = "remove-fd";
    type Answer = Done;
}

/// Removes a network back end.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct NetdevDel<'a> {
    /// Its name.
    pub id: &'a str,
}
impl Command for NetdevDel<'_> {
    const NAME: &'static str = "netdev_del";
    type Answer = Done;
}

/// Removes a block node.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct BlockdevDel<'a> {
    /// Its name.
    #[serde(rename = "node-name")]
    pub node: &'a str,
}
impl Command for BlockdevDel<'_> {
    const NAME: &'static str = "blockdev-del";
    type Answer = Done;
}

/// Reads a property of an object.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QomGet<'a> {
    /// Path of the object.
    pub path: &'a str,
    /// The property.
    pub property: &'a str,
}
impl Command for QomGet<'_> {
    const NAME: &'static str = "qom-get";
    type Answer = Value;
}

/// Changes a property of an object.
#[derive(Debug, Clone, Serialize)]
pub struct QomSet<'a> {
    /// Path of the object.
    pub path: &'a str,
    /// The property.
    pub property: &'a str,
    /// What it becomes.
    pub value: Value,
}
impl Command for QomSet<'_> {
    const NAME: &'static str = "qom-set";
    type Answer = Done;
}

/// Makes a block node longer or shorter.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct BlockResize<'a> {
    /// Its name.
    #[serde(rename = "node-name")]
    pub node: &'a str,
    /// Its new length in bytes.
    pub size: u64,
}
impl Command for BlockResize<'_> {
    const NAME: &'static str = "block_resize";
    type Answer = Done;
}

/// Does several things to block nodes at one instant, or none of them.
#[derive(Debug, Clone, Serialize)]
pub struct Transaction {
    /// What.
    pub actions: Vec<Value>,
}
impl Command for Transaction {
    const NAME: &'static str = "transaction";
    type Answer = Done;
}

/// Removes a snapshot inside a qcow2 node.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct SnapshotDelete<'a> {
    /// The node.
    #[serde(rename = "device")]
    pub node: &'a str,
    /// The snapshot.
    pub name: &'a str,
}
impl Command for SnapshotDelete<'_> {
    const NAME: &'static str = "blockdev-snapshot-delete-internal-sync";
    type Answer = Value;
}

/// Lists block nodes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryNodes {
    /// Without what is behind each.
    pub flat: bool,
}
impl Command for QueryNodes {
    const NAME: &'static str = "query-named-block-nodes";
    type Answer = Vec<BlockNode>;
}

/// See [`QueryNodes`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockNode {
    /// Its name.
    #[serde(rename = "node-name")]
    pub name: String,
    /// How it is stored.
    #[serde(rename = "drv")]
    pub driver: String,
}
