//! One host: storage, virtualizers and network composed into desktops.
#![forbid(unsafe_code)]

#[cfg(feature = "fake")]
pub mod fake;
mod host;

pub use host::{
    Attachment, AttachmentEnd, DesktopStatus, EndReason, ExecControl, ExecSession, ExecStdio, Host, HostError,
    HostErrorKind, ImageSummary, Timings,
};
