//! Commands about what new desktops of a flavour get.

use qvd_core::{FlavourName, RootPolicy};
use qvd_farm::Flavour;
use qvd_gateway::api::Client;

use crate::{
    cli::{self, Roots, SetFlavour},
    failure::{Exit, Refusal},
    output::Output,
    up::read_policy,
};

/// Carries out a command about flavours.
pub(crate) async fn run(client: &Client, command: cli::Flavour, output: &Output) -> anyhow::Result<()> {
    match command {
        cli::Flavour::Ls => output.table(
            &client.flavours().await?,
            ["FLAVOUR", "MEMORY", "CPU", "PROCESSES", "ROOT", "NETWORK"],
            |one| {
                let (limits, defaults) = (one.defaults.limits, &one.defaults);
                let (memory, cpu, pids) =
                    (limits.memory.to_string(), limits.cpu.0.to_string(), limits.pids.to_string());
                [one.name.to_string(), memory, cpu, pids, defaults.root.as_str().to_owned(), defaults.net.summary()]
            },
        ),
        cli::Flavour::Show { flavour } => output.result(&find(client, &flavour).await?, details),
        cli::Flavour::Set(set) => {
            let defaults = changed(client, &set).await?;
            client.set_flavour_defaults(&set.flavour, &defaults.defaults).await?;
            output.result(&defaults, details)
        }
        cli::Flavour::Reset { flavour } => {
            client.forget_flavour_defaults(&flavour).await?;
            output.result(&find(client, &flavour).await?, details)
        }
    }
}

async fn find(client: &Client, name: &FlavourName) -> anyhow::Result<Flavour> {
    let found = client.flavours().await?.into_iter().find(|flavour| flavour.name == *name);
    found.ok_or_else(|| {
        Refusal::new(Exit::NotFound, format!("there is no flavour {name}: `qvd flavour ls` lists them")).into()
    })
}

/// A flavour as it is to be.
async fn changed(client: &Client, set: &SetFlavour) -> anyhow::Result<Flavour> {
    let mut flavour = find(client, &set.flavour).await?;
    let defaults = &mut flavour.defaults;
    defaults.limits = set.limits.over(defaults.limits).unwrap_or(defaults.limits);
    match set.root_policy {
        Some(Roots::Volatile) => defaults.root = RootPolicy::Volatile,
        Some(Roots::Persistent) => defaults.root = RootPolicy::Persistent,
        None => {}
    }
    if let Some(file) = &set.net_policy {
        defaults.net = read_policy(file)?;
    }
    Ok(flavour)
}

fn details(flavour: &Flavour) -> String {
    let (limits, defaults) = (flavour.defaults.limits, &flavour.defaults);
    let mut lines = vec![
        ("flavour", flavour.name.to_string()),
        ("memory", format!("at most {}", limits.memory)),
        ("processor", format!("at most {} thousandths of a core", limits.cpu.0)),
        ("processes", format!("at most {}", limits.pids)),
        ("root", defaults.root.as_str().to_owned()),
        ("network", defaults.net.summary()),
    ];
    lines.extend(limits.io.map(|io| ("disks", format!("{io} a second"))));
    lines.iter().map(|(name, value)| format!("{name:<10} {value}")).collect::<Vec<_>>().join("\n")
}
