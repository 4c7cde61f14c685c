//! What a desktop is asked to be, and what it is at the moment.

use std::{collections::BTreeSet, fmt, net::Ipv4Addr, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize, de};

use crate::{Bytes, DesktopId, Digest, MilliCpu, NetPolicy, TenantName, UserName};

/// How a desktop runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Virtualizer {
    /// Linux namespaces on the host's kernel.
    #[default]
    Container,
    /// A QEMU process driven over QMP.
    Qemu,
    /// A libvirt domain.
    Libvirt,
}

/// What becomes of the root when the desktop stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RootPolicy {
    /// Forgotten at stop; every start begins from the image.
    #[default]
    Volatile,
    /// Kept until the desktop is removed.
    Persistent,
}

impl RootPolicy {
    /// The name in recipes.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Volatile => "volatile",
            Self::Persistent => "persistent",
        }
    }
}

/// A kind of the host's devices that programs of a desktop may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Device {
    /// File systems that programs inside serve.
    Fuse,
    /// Rendering by graphics processors; not their screens.
    Dri,
    /// Sound cards.
    Sound,
    /// Cameras, by Video4Linux.
    Camera,
}

impl Device {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Fuse, Self::Dri, Self::Sound, Self::Camera];

    /// The name in recipes.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fuse => "fuse",
            Self::Dri => "dri",
            Self::Sound => "sound",
            Self::Camera => "camera",
        }
    }
}

/// Why a text names no kind of devices.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a device is one of fuse, dri, sound, camera")]
#[non_exhaustive]
pub struct DeviceError;

impl FromStr for Device {
    type Err = DeviceError;
    fn from_str(text: &str) -> Result<Self, DeviceError> {
        Self::ALL.into_iter().find(|device| device.as_str() == text).ok_or(DeviceError)
    }
}

/// Why a text names no set of system calls.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("system calls are those of desktop, application or system")]
#[non_exhaustive]
pub struct CallsError;

impl FromStr for Calls {
    type Err = CallsError;
    fn from_str(text: &str) -> Result<Self, CallsError> {
        Self::ALL.into_iter().find(|calls| calls.as_str() == text).ok_or(CallsError)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which system calls programs may make: the less the kernel does for them, the
/// fewer of its mistakes they reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Calls {
    /// What whole desktops need, browsers' own sandboxes included.
    #[default]
    Desktop,
    /// What most applications need: no namespaces, no looking into others, no old or
    /// rare ways to talk with one another. A browser would not start in this, or
    /// without its sandbox.
    Application,
    /// What an image's own init and its services need: mounts and namespaces, too.
    System,
}

impl Calls {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Desktop, Self::Application, Self::System];

    /// The name in recipes.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Desktop => "desktop",
            Self::Application => "application",
            Self::System => "system",
        }
    }
}

impl Calls {
    /// Whether they are those of desktops, as usual.
    #[must_use]
    pub fn is_usual(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Calls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a desktop may use of its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Memory of all its processes, page cache included.
    pub memory: Bytes,
    /// Processor time it may use in any period.
    pub cpu: MilliCpu,
    /// Processes and threads at once.
    pub pids: u32,
    /// Most that it may read, and most that it may write, in a second and on each
    /// of the host's disks; `None` is as fast as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io: Option<Bytes>,
}

impl Limits {
    /// The least that an init, an X server and a window manager come up with.
    /// Less would only be found out by a start that does not end.
    pub const LEAST: Self = Self { memory: Bytes::mib(64), cpu: MilliCpu(50), pids: 32, io: None };
}

impl Default for Limits {
    /// 1 GiB, two cores, 1024 processes: a browser with a few pages fits.
    fn default() -> Self {
        Self { memory: Bytes::gib(1), cpu: MilliCpu(2000), pids: 1024, io: None }
    }
}

/// All that a node needs to know to run a desktop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DesktopSpec {
    /// Its number.
    pub id: DesktopId,
    /// The user whose home and session it is.
    pub user: UserName,
    /// Whose addresses it gets, and whose other desktops it may be let talk with.
    #[serde(default)]
    pub tenant: TenantName,
    /// Host name inside.
    pub hostname: String,
    /// Content of the image that its root starts from.
    pub image: Digest,
    /// What runs it.
    pub virtualizer: Virtualizer,
    /// What becomes of its root at stop.
    pub root: RootPolicy,
    /// What it may use.
    pub limits: Limits,
    /// What it may reach.
    pub net: NetPolicy,
    /// Which of the host's devices it has, beside those that its image names.
    #[serde(default)]
    pub devices: BTreeSet<Device>,
    /// Which system calls its programs may make; `None` is what its image says.
    #[serde(default)]
    pub calls: Option<Calls>,
    /// Its address when it has a port; `None` lets the node take a free one.
    pub address: Option<Ipv4Addr>,
    /// Directory of the home on the host; `None` means the node's own store.
    pub home: Option<PathBuf>,
}

/// What a desktop is doing. The names are those of the QVD wire protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DesktopState {
    /// Nothing of it runs.
    Stopped,
    /// Asked to run; not yet ready for connections.
    Starting,
    /// Its session is ready for connections.
    Running,
    /// Asked to stop; something of it may still run.
    Stopping,
    /// Something of it could not be removed; the node keeps trying.
    Zombie,
}

impl DesktopState {
    /// The name on the QVD wire and in the API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Zombie => "zombie",
        }
    }
}

impl fmt::Display for DesktopState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Steps of a start, in order; clients show them while the user waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum StartStep {
    /// Making the writable root on the image.
    Root,
    /// Making the namespaces and limits.
    Confinement,
    /// Making the network port and its rules.
    Port,
    /// Starting the init inside.
    Init,
    /// Waiting for the session's window manager.
    Session,
    /// Preparing the display for this client.
    Display,
}

impl StartStep {
    /// A line for the person who waits.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Root => "Preparing the file system",
            Self::Confinement => "Setting up confinement",
            Self::Port => "Connecting the network",
            Self::Init => "Starting the desktop",
            Self::Session => "Starting the session",
            Self::Display => "Opening the display",
        }
    }
}

/// Width and height of a screen in pixels. Written `1280x800`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    width: u16,
    height: u16,
}

/// Why a text is no geometry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a screen is WIDTHxHEIGHT pixels, from {min} to {max}", min = Geometry::MIN, max = Geometry::MAX)]
#[non_exhaustive]
pub struct GeometryError;

impl Geometry {
    /// Smallest screen that a session still fits on.
    pub const MIN: Self = Self { width: 320, height: 200 };
    /// Largest screen: 4 bytes a pixel, so 64 MiB of the desktop's memory.
    pub const MAX: Self = Self { width: 4096, height: 4096 };

    /// A screen of `width` times `height` pixels.
    ///
    /// # Errors
    /// Outside [`Geometry::MIN`] and [`Geometry::MAX`].
    pub const fn new(width: u16, height: u16) -> Result<Self, GeometryError> {
        if width < Self::MIN.width || height < Self::MIN.height || width > Self::MAX.width || height > Self::MAX.height
        {
            return Err(GeometryError);
        }
        Ok(Self { width, height })
    }
    /// Pixels across.
    #[must_use]
    pub const fn width(self) -> u16 {
        self.width
    }
    /// Pixels down.
    #[must_use]
    pub const fn height(self) -> u16 {
        self.height
    }
}

impl Default for Geometry {
    fn default() -> Self {
        Self { width: 1280, height: 800 }
    }
}

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

impl FromStr for Geometry {
    type Err = GeometryError;
    fn from_str(text: &str) -> Result<Self, GeometryError> {
        let (width, height) = text.split_once('x').ok_or(GeometryError)?;
        let number = |text: &str| text.parse().map_err(|_| GeometryError);
        Self::new(number(width)?, number(height)?)
    }
}

impl Serialize for Geometry {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Geometry {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Speed of the line to a native client; NX chooses its compression by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum LinkSpeed {
    /// Some tens of kbit/s.
    Modem,
    /// 64 kbit/s.
    Isdn,
    /// A few Mbit/s: delta compression and zlib; the best trade for most lines.
    #[default]
    Adsl,
    /// A routed network of a site.
    Wan,
    /// A local network: images are compressed, little else.
    Lan,
    /// The same machine: nothing is compressed.
    Local,
}

impl LinkSpeed {
    /// The word NX uses for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Modem => "modem",
            Self::Isdn => "isdn",
            Self::Adsl => "adsl",
            Self::Wan => "wan",
            Self::Lan => "lan",
            Self::Local => "local",
        }
    }
}

/// What a client speaks, and what it wants of the display.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DisplayKind {
    /// RFB, for a browser: a head inside the desktop renders the session.
    Rfb {
        /// Size of the browser's viewport.
        geometry: Geometry,
    },
    /// NX, for a native client: its `nxproxy` and the session's agent talk.
    Nx {
        /// Size of the session's window or screen.
        geometry: Geometry,
        /// Whether the session fills the client's screen.
        fullscreen: bool,
        /// Speed of the line.
        link: LinkSpeed,
    },
}
