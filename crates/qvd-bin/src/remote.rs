//! Commands that the daemon carries out.

use std::{future::Future, path::Path, process::ExitCode, time::Duration};

use anyhow::Context;
use qvd_core::{DesktopId, DesktopState, Limits, NetPolicy, RootPolicy, Virtualizer};
use qvd_farm::{DesktopInfo, OwnedDesktops};
use qvd_gateway::api::{
    Client,
    dto::{AddUser, BuildImage, CreateDesktop, SetPassword},
};
use qvd_node::NewVersion;
use serde_json::json;
use tokio::runtime;

use crate::{
    cli::{Create, Desktop, Image, User},
    exec,
    failure::{Exit, Refusal},
    history::{author, short},
    image,
    output::{Output, age, count, one_line},
    password::{self, Password},
    paths::Paths,
};

/// A client of the daemon at `server`, or of the one of this installation.
pub(crate) fn connect(paths: &Paths, server: Option<&Path>) -> anyhow::Result<Client> {
    let socket = server.map_or_else(|| paths.socket(), Path::to_owned);
    if socket.as_os_str().as_encoded_bytes().starts_with(b"https://") {
        let text = format!("cannot use `{}`: --server takes the path of a unix socket on this host", socket.display());
        return Err(Refusal::new(Exit::Usage, text).into());
    }
    Ok(Client::unix(&socket))
}

/// Runs a command's future to its end.
pub(crate) fn wait<F: Future>(command: F) -> anyhow::Result<F::Output> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    Ok(runtime.block_on(command))
}

/// Carries out a command about images.
pub(crate) async fn image(client: &Client, command: Image, output: &Output) -> anyhow::Result<()> {
    match command {
        Image::Build { recipe, message } => {
            let path = std::path::absolute(&recipe)
                .with_context(|| format!("cannot find the recipe `{}`", recipe.display()))?;
            let build = BuildImage { recipe: path, author: Some(author()), message };
            let progress = output.progress();
            let built = client.build_image(&build, |line| progress.say(line)).await?;
            drop(progress);
            image::show_built(&built, output)
        }
        // Everything else is in `history`.
        _ => image::list(&client.images().await?, output),
    }
}

/// Carries out a command about desktops.
pub(crate) async fn desktop(client: &Client, command: Desktop, output: &Output) -> anyhow::Result<ExitCode> {
    match command {
        Desktop::Create(create) => {
            let desktop = client.create_desktop(&new_desktop(client, create).await?).await?;
            output.result(&desktop, |desktop| desktop.id.to_string())?;
        }
        Desktop::Ls { user } => {
            let desktops = client.desktops(user.as_ref()).await?;
            output.table(&desktops, ["ID", "USER", "NAME", "FLAVOUR", "STATE", "CLIENT"], |info| {
                let DesktopInfo { desktop, status } = info;
                let client = if status.attached { "attached" } else { "" };
                [
                    desktop.id.to_string(),
                    desktop.user.to_string(),
                    desktop.name.clone(),
                    desktop.flavour.to_string(),
                    status.state.to_string(),
                    client.to_owned(),
                ]
            })?;
        }
        Desktop::Show { id } => output.result(&client.desktop(id).await?, details)?,
        Desktop::Stats { id } => output.result(&client.stats(id).await?, |stats| {
            let (mib, processes) = (stats.pss_bytes >> 20, stats.processes);
            format!("desktop {id}: {mib} MiB in {processes} processes, {}", count(stats.clients.into(), "client"))
        })?,
        Desktop::Start { id } => {
            let running = client.desktop(id).await?.status.state == DesktopState::Running;
            let progress = output.progress();
            let timings = client.start(id, |_, text| progress.say(text)).await?;
            drop(progress);
            let session = Duration::from_micros(timings.session_us);
            output.result(&timings, |_| match running {
                true => format!("desktop {id} runs already"),
                false => format!("desktop {id} is ready after {} ms", session.as_millis()),
            })?;
        }
        Desktop::Stop { id } => {
            client.stop(id).await?;
            done(output, id, "stopped")?;
        }
        Desktop::Rm { id } => {
            client.remove_desktop(id).await?;
            done(output, id, "removed")?;
        }
        Desktop::Exec(command) => return exec::run(client, command).await,
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes a version of a running desktop and tells what stayed behind.
pub(crate) async fn commit(client: &Client, id: DesktopId, new: &NewVersion, output: &Output) -> anyhow::Result<()> {
    output.result(&client.commit(id, new).await?, |version| {
        let made = format!(
            "{} {}: {} entries, {} files were read",
            version.flavour,
            short(version.id),
            version.entries,
            version.files_read
        );
        let left = version.left_out.iter().map(|path| format!("  left out: /{}", one_line(&path.to_string_lossy())));
        let more = version.left_out_count.saturating_sub(version.left_out.len() as u64);
        let more = (more > 0).then(|| format!("  and {more} more"));
        std::iter::once(made).chain(left).chain(more).collect::<Vec<_>>().join("\n")
    })
}

fn done(output: &Output, id: DesktopId, what: &str) -> anyhow::Result<()> {
    output.result(&json!({ "id": id, "done": what }), |_| format!("desktop {id} {what}"))
}

/// What the command line leaves out comes from the flavour: a limit that is
/// set changes that limit and no other.
async fn new_desktop(client: &Client, create: Create) -> anyhow::Result<CreateDesktop> {
    let mut new = CreateDesktop::new(Some(create.user), create.flavour);
    if create.limits.over(Limits::default()).is_some() {
        let flavours = client.flavours().await?;
        let flavour = flavours.iter().find(|flavour| flavour.name == new.flavour);
        // The daemon refuses an unknown flavour in its own words.
        new.limits = create.limits.over(flavour.map_or_else(Limits::default, |flavour| flavour.defaults.limits));
    }
    new.name = create.name;
    new.tag = create.tag;
    new.virtualizer = Some(create.virtualizer.into());
    new.root = create.persistent.then_some(RootPolicy::Persistent);
    new.net = match (create.no_network, create.isolated) {
        (true, _) => Some(NetPolicy::none()),
        (_, true) => Some(NetPolicy::host_only()),
        _ => create.net_policy.as_deref().map(crate::up::read_policy).transpose()?,
    };
    new.devices = create.devices.into_iter().collect();
    new.calls = create.calls;
    new.address = create.address;
    Ok(new)
}

const fn kind(virtualizer: Virtualizer) -> &'static str {
    match virtualizer {
        Virtualizer::Qemu => "a virtual machine by QEMU",
        Virtualizer::Libvirt => "a virtual machine by libvirt",
        _ => "a container",
    }
}

fn details(info: &DesktopInfo) -> String {
    let DesktopInfo { desktop, status } = info;
    let network = desktop.net.summary();
    let mut lines = vec![
        ("number", desktop.id.to_string()),
        ("user", desktop.user.to_string()),
        ("name", desktop.name.clone()),
        ("image", format!("{}:{}", desktop.flavour, desktop.tag)),
        ("runs in", kind(desktop.virtualizer).to_owned()),
        ("memory", format!("at most {}", desktop.limits.memory)),
        ("processor", format!("at most {} thousandths of a core", desktop.limits.cpu.0)),
        ("processes", format!("at most {}", desktop.limits.pids)),
        ("network", network),
        ("created", format!("{} ago", age(desktop.created_unix_s))),
        ("state", status.state.to_string()),
        ("client", if status.attached { "attached" } else { "none" }.to_owned()),
    ];
    let devices: Vec<_> = desktop.devices.iter().map(ToString::to_string).collect();
    lines.extend((!devices.is_empty()).then(|| ("devices", devices.join(", "))));
    lines.extend(desktop.calls.map(|calls| ("calls", calls.to_string())));
    lines.extend(desktop.limits.io.map(|io| ("disks", format!("{io} a second"))));
    lines.extend(desktop.address.map(|address| ("address", address.to_string())));
    lines.extend(status.image.map(|commit| ("runs", commit.hex().chars().take(12).collect())));
    lines.extend(status.step.map(|step| ("step", step.text().to_owned())));
    lines.extend(status.lacks_room.then(|| ("waits", "for room on the host's disk".to_owned())));
    lines.extend(status.ended.clone().map(|why| ("ended", one_line(&why))));
    lines.iter().map(|(name, value)| format!("{name:<10} {value}")).collect::<Vec<_>>().join("\n")
}

/// Carries out a command about users.
pub(crate) async fn user(client: &Client, command: User, output: &Output) -> anyhow::Result<()> {
    match command {
        User::Add { name, admin, tenant, password } => {
            let password = password::obtain(&password)?;
            let add = AddUser { name, password: password.secret.clone(), admin, tenant };
            let user = client.add_user(&add).await?;
            let mut json = serde_json::to_value(&user).context("cannot write JSON")?;
            with_password(&mut json, &password);
            output.result(&json, |_| shown(&password, format!("user {} added", user.name)))
        }
        User::Ls => output.table(&client.users().await?, ["NAME", "ROLE", "TENANT", "AGE"], |user| {
            let role = if user.admin { "administrator" } else { "user" };
            [user.name.to_string(), role.to_owned(), user.tenant.to_string(), age(user.created_unix_s)]
        }),
        User::Admin { name, revoke } => {
            client.set_admin(&name, !revoke).await?;
            let role = if revoke { "no longer administers" } else { "administers" };
            output.result(&json!({ "name": name, "admin": !revoke }), |_| format!("user {name} {role} the farm"))
        }
        User::Rm { name, with_desktops } => {
            let desktops = if with_desktops { OwnedDesktops::Remove } else { OwnedDesktops::Refuse };
            client.remove_user(&name, desktops).await?;
            output.result(&json!({ "name": name, "done": "removed" }), |_| format!("user {name} removed"))
        }
        User::Passwd { name, password } => {
            let password = password::obtain(&password)?;
            let set = SetPassword { password: password.secret.clone(), current: None };
            client.set_password(&name, &set).await?;
            let mut json = json!({ "name": name, "done": "password set" });
            with_password(&mut json, &password);
            output.result(&json, |_| shown(&password, format!("password of {name} set")))
        }
    }
}

fn with_password(json: &mut serde_json::Value, password: &Password) {
    if password.generated {
        json["password"] = password.secret.expose().into();
    }
}

fn shown(password: &Password, done: String) -> String {
    if password.generated { format!("{done}\npassword: {}", password.secret.expose()) } else { done }
}
