//! The daemon: everything on one machine.

use std::{
    env, fs,
    future::Future,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use qvd_core::NetPolicy;
use qvd_farm::{Database, Farm, FarmError};
use qvd_gateway::{
    ConnectionLimits, Gateway, GatewayConfig, GatewayError, TlsSource,
    api::{self, ApiState, UnixDoor},
};
use qvd_node::{Node, NodeConfig, Swap};
use sd_notify::NotifyState;
use serde_json::json;
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::{
    cli,
    failure::{Exit, Refusal},
    output::Output,
    paths::{Paths, read_text},
    tenants,
};

/// How long the programs of a desktop have to end by themselves when the
/// daemon takes its desktops with it.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// Runs everything until SIGINT or SIGTERM.
pub(crate) fn run(paths: &Paths, args: &cli::Up, output: &Output) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(Refusal::new(Exit::Unsupported, "cannot run desktops: this takes root").into());
    }
    let init = find_init(args.init.as_deref())?;
    args.memory.check()?;
    args.machines.check()?;
    let (name_server, name_server6) = name_servers(&args.name_server)?;
    let database = database(paths, args)?;
    is_free(args.listen)?;
    qvd_node::raise_limits();
    let runtime = runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;

    let mut config = NodeConfig::new(&paths.root, &paths.run, init, paths.instance);
    config.network.internet = args.internet;
    config.vm = args.machines.config();
    config.memory = args.memory.config();
    (config.network.name_server, config.network.name_server6) = (name_server, name_server6);
    config.network.mtu_octets = args.mtu.unwrap_or(config.network.mtu_octets);
    if let Some(file) = &args.tenant_policy {
        config.tenants.all = read_policy(file)?;
    }
    if let Some(file) = &args.tenants {
        tenants::read(file, &mut config)?;
    }
    let swap = args.zram.map(|most| Swap::open(&paths.run, most)).transpose()?.flatten();
    let node = Node::open(config)?;
    let served = runtime.block_on(serve(Arc::clone(&node), &database, paths, args, output));
    let keep = !args.ephemeral && !node.is_idle();
    // Where no desktop is left, neither is a network for them.
    let ended = if keep { Ok(()) } else { take_down(&node, swap, &paths.run) };
    served.and(ended)
}

/// The name server of each family.
fn name_servers(named: &[IpAddr]) -> Result<(Option<Ipv4Addr>, Option<Ipv6Addr>), Refusal> {
    let (mut ipv4, mut ipv6) = (None, None);
    for server in named {
        let before = match *server {
            IpAddr::V4(server) => ipv4.replace(server).map(IpAddr::V4),
            IpAddr::V6(server) => ipv6.replace(server).map(IpAddr::V6),
        };
        if let Some(before) = before {
            let text = format!("cannot use two name servers of one family: {before} and {server}");
            return Err(Refusal::new(Exit::Usage, text));
        }
    }
    Ok((ipv4, ipv6))
}

/// A network policy in words, as a recipe's `[defaults.net]` has it.
pub(crate) fn read_policy(file: &Path) -> anyhow::Result<NetPolicy> {
    let text = read_text("network policy", file)?;
    toml::from_str(&text).with_context(|| format!("cannot read the network policy `{}`", file.display()))
}

/// Ends every desktop and the network, and removes what is then empty.
fn take_down(node: &Node, swap: Option<Swap>, run: &Path) -> anyhow::Result<()> {
    node.shut_down(STOP_GRACE).context("cannot take everything down")?;
    swap.map_or(Ok(()), |mut swap| swap.close())?;
    let cannot = || format!("cannot remove `{}`", run.display());
    // Not recursive: whatever is still in there is somebody's.
    for entry in fs::read_dir(run).with_context(cannot)? {
        fs::remove_dir(entry.with_context(cannot)?.path()).with_context(cannot)?;
    }
    fs::remove_dir(run).with_context(cannot)
}

/// How often desktops are looked for that run what has expired.
const EXPIRY: Duration = Duration::from_secs(5);

/// Serves until a signal.
async fn serve(
    node: Arc<Node>,
    database: &Database,
    paths: &Paths,
    args: &cli::Up,
    output: &Output,
) -> anyhow::Result<()> {
    let farm = Farm::open(database, node).await?;
    let door = UnixDoor::bind(&paths.socket()).await?;
    let gateway = Gateway::bind(gateway_config(paths, args), farm.clone()).await?;
    let (stop, stopped) = watch::channel(false);
    let signals = signals()?;

    let url = format!("https://{}", reachable(gateway.local_addr()));
    let ready = json!({ "url": url, "socket": paths.socket(), "root": paths.root });
    output.result(&ready, |_| format!("listening on {url}"))?;
    tell_manager(&[NotifyState::Ready, NotifyState::Status(&format!("listening on {url}"))]);

    let until = |mut stopped: watch::Receiver<bool>| async move {
        // A sender that is gone has stopped too.
        drop(stopped.wait_for(|stopped| *stopped).await);
    };
    let router = api::router(ApiState { farm: farm.clone() });
    let expiry = async {
        while tokio::time::timeout(EXPIRY, until(stopped.clone())).await.is_err() {
            if let Err(error) = farm.expire().await {
                tracing::warn!(%error, "cannot see which desktops have expired");
            }
        }
    };
    let ((), closed, (), ()) = tokio::join!(
        gateway.serve(until(stopped.clone())),
        door.serve(router, until(stopped.clone())),
        expiry,
        async {
            tracing::info!(signal = signals.await, "stopping");
            tell_manager(&[NotifyState::Stopping]);
            stop.send_replace(true);
        },
    );
    farm.close().await;
    Ok(closed?)
}

/// Tells whoever manages this service, if anybody does.
fn tell_manager(news: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(news) {
        tracing::warn!(%error, "cannot tell the service manager");
    }
}

fn database(paths: &Paths, args: &cli::Up) -> Result<Database, FarmError> {
    let file = || Ok(Database::File(paths.root.join("qvd.sqlite")));
    args.database.as_ref().map_or_else(file, |url| url.parse().map(Database::Postgres))
}

fn gateway_config(paths: &Paths, args: &cli::Up) -> GatewayConfig {
    let tls = match (&args.tls_cert, &args.tls_key) {
        (Some(certificate), Some(key)) => TlsSource::Files { certificate: certificate.clone(), key: key.clone() },
        _ => TlsSource::SelfSigned { directory: paths.root.join("tls") },
    };
    GatewayConfig { listen: args.listen, tls, hosts: args.host.clone(), limits: ConnectionLimits::default() }
}

/// Resolves to the name of the signal that ends the daemon.
fn signals() -> anyhow::Result<impl Future<Output = &'static str>> {
    let cannot = "cannot watch for signals";
    let mut interrupt = signal(SignalKind::interrupt()).context(cannot)?;
    let mut terminate = signal(SignalKind::terminate()).context(cannot)?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
        }
    })
}

/// Where the init is when it is not beside the program, from the directory of that one.
const INSTALLED_INIT: &str = "../lib/qvd/qvd-init";

/// The static init: the one named, or the one beside this program or where `make install` puts it.
pub(crate) fn find_init(named: Option<&Path>) -> anyhow::Result<PathBuf> {
    let path = match named {
        Some(path) => std::path::absolute(path).context("cannot find the init for desktops")?,
        None => init_of(&env::current_exe().context("cannot find this program")?),
    };
    match fs::metadata(&path) {
        Ok(found) if found.is_file() => Ok(path),
        _ if named.is_some() => {
            let text = format!("cannot find the init for desktops: there is no file `{}`", path.display());
            Err(Refusal::new(Exit::NotFound, text).into())
        }
        _ => {
            let text = format!("cannot find the init for desktops at `{}`: name it with --init", path.display());
            Err(Refusal::new(Exit::Unsupported, text).into())
        }
    }
}

/// The init that belongs to the program at `program`.
fn init_of(program: &Path) -> PathBuf {
    let installed = program.parent().and_then(|dir| dir.join(INSTALLED_INIT).canonicalize().ok());
    let beside = program.with_file_name("qvd-init");
    if beside.is_file() { beside } else { installed.unwrap_or(beside) }
}

/// Refuses a port in use before anything of the host is touched.
fn is_free(listen: SocketAddr) -> Result<(), GatewayError> {
    TcpListener::bind(listen).map(drop).map_err(|source| match source.kind() {
        std::io::ErrorKind::AddrInUse => GatewayError::PortInUse { address: listen, source },
        _ => GatewayError::Listen { address: listen, source },
    })
}

/// An address that a browser can use: a listener on all of them has to name one.
fn reachable(address: SocketAddr) -> SocketAddr {
    if !address.ip().is_unspecified() {
        return address;
    }
    // Connecting a UDP socket sends nothing; it asks the routing table which
    // address of ours leads out. The target is reserved for documentation
    // (RFC 5737).
    let outward = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
        .and_then(|socket| socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).and_then(|()| socket.local_addr()));
    let ip = outward.map_or_else(|_| Ipv4Addr::LOCALHOST.into(), |local| local.ip());
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_init_is_beside_the_program_or_where_it_is_installed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("bin")).unwrap();
        fs::create_dir_all(at("lib/qvd")).unwrap();
        let found = || init_of(&at("bin/qvd"));
        assert_eq!(found(), at("bin/qvd-init"), "what is nowhere is missed beside the program");
        fs::write(at("lib/qvd/qvd-init"), "").unwrap();
        assert_eq!(found(), at("lib/qvd/qvd-init").canonicalize().unwrap());
        fs::write(at("bin/qvd-init"), "").unwrap();
        assert_eq!(found(), at("bin/qvd-init"));
    }

    #[test]
    fn a_port_in_use_is_refused_by_name() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = taken.local_addr().unwrap();
        let error = is_free(address).unwrap_err();
        assert!(matches!(error, GatewayError::PortInUse { .. }), "{error}");
        drop(taken);
        is_free(address).unwrap();
    }

    #[test]
    fn the_address_shown_can_be_connected_to() {
        let all = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 8443));
        assert!(!reachable(all).ip().is_unspecified());
        assert_eq!(reachable(all).port(), 8443);
        let one = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        assert_eq!(reachable(one), one);
    }
}
