//! The daemon: everything on one machine.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use qvd_farm::Farm;
use qvd_gateway::{
    ConnectionLimits, Gateway, GatewayConfig, TlsSource,
    api::{ApiState, serve_unix},
};
use qvd_node::{Node, NodeConfig};
use serde_json::json;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::{
    cli,
    failure::{Exit, Refusal},
    output::Output,
    paths::Paths,
};

/// How long the programs of a desktop have to end by themselves when the
/// daemon takes its desktops with it.
const STOP_GRACE: Duration = Duration::from_secs(5);
