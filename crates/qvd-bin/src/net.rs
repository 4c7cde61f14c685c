//! Networks of desktops: what a port is, what went through it, and what would
//! become of a frame.

use std::io::{BufRead as _, IsTerminal as _, stdin};

use anyhow::{Context as _, bail};
use qvd_core::{DesktopId, DesktopState};
use qvd_gateway::api::{Client, dto::ExplainFrames};
use qvd_node::PortView;
use serde::Serialize;

use crate::{cli::Net, output::Output};

/// A desktop's counters, as the list has them.
#[derive(Debug, Serialize)]
struct Counted {
    desktop: DesktopId,
    port: PortView,
}

pub(crate) async fn run(client: &Client, command: Net, output: &Output) -> anyhow::Result<()> {
    match command {
        Net::Show { id } => output.result(&port(client, id, Vec::new()).await?, details)?,
        Net::Counters { id } => {
            let desktops = match id {
                Some(id) => vec![id],
                None => running(client).await?,
            };
            let mut counted = Vec::new();
            for desktop in desktops {
                // One that has no port has nothing to count.
                if let Some(port) = client.network(desktop, &ExplainFrames::default()).await? {
                    counted.push(Counted { desktop, port });
                }
            }
            output.table(
                &counted,
                ["ID", "PORT", "SENT", "PACKETS", "RECEIVED", "PACKETS", "NOT SENT ON", "DROPPED"],
                |one| {
                    let counters = one.port.counters;
                    [
                        one.desktop.to_string(),
                        one.port.link.clone(),
                        counters.sent_bytes.to_string(),
                        counters.sent_packets.to_string(),
                        counters.received_bytes.to_string(),
                        counters.received_packets.to_string(),
                        counters.received_dropped.to_string(),
                        one.port.drops.values().sum::<u64>().to_string(),
                    ]
                },
            )?;
        }
        Net::Explain { id, frames } => {
            let frames = if frames.is_empty() { read_frames()? } else { frames };
            let explained = port(client, id, frames).await?.explained;
            output.result(&explained, |explained| {
                explained.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
            })?;
        }
    }
    Ok(())
}

async fn port(client: &Client, id: DesktopId, frames: Vec<String>) -> anyhow::Result<PortView> {
    let port = client.network(id, &ExplainFrames::new(frames)).await?;
    port.with_context(|| format!("desktop {id} has no port"))
}

async fn running(client: &Client) -> anyhow::Result<Vec<DesktopId>> {
    let all = client.desktops(None).await?;
    let running = all.into_iter().filter(|info| info.status.state == DesktopState::Running);
    Ok(running.map(|info| info.desktop.id).collect())
}

fn read_frames() -> anyhow::Result<Vec<String>> {
    if stdin().is_terminal() {
        bail!("name a frame, or write one a line to the input");
    }
    let lines = stdin().lock().lines().collect::<Result<Vec<_>, _>>().context("cannot read frames")?;
    Ok(lines.into_iter().filter(|line| !line.trim().is_empty()).collect())
}

fn details(port: &PortView) -> String {
    let ipv6 = port.ipv6.map_or_else(|| "none".to_owned(), |ipv6| ipv6.to_string());
    let counters = port.counters;
    let mut lines = vec![
        ("port", port.link.clone()),
        ("mac", port.mac.to_string()),
        ("ipv4", port.ipv4.to_string()),
        ("ipv6", ipv6),
        ("reaches", port.policy.summary()),
        ("sent", format!("{} bytes in {} packets", counters.sent_bytes, counters.sent_packets)),
        ("received", format!("{} bytes in {} packets", counters.received_bytes, counters.received_packets)),
    ];
    lines.extend(port.drops.iter().map(|(reason, frames)| ("dropped", format!("{frames}: {reason}"))));
    lines.iter().map(|(what, value)| format!("{what:<10}{value}")).collect::<Vec<_>>().join("\n")
}
