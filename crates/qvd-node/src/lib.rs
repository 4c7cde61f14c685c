//! One host: storage, virtualizers and network composed into desktops.
#![forbid(unsafe_code)]

mod host;

pub use host::{
    Attachment, AttachmentEnd, DesktopStatus, EndReason, ExecSession, ExecStdio, Host, HostError, HostErrorKind,
    ImageSummary, Timings,
};
