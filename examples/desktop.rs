//! A complete desktop in a few library calls, without a daemon: an image from
//! a recipe, a confined container on it, its session, a program run inside,
//! and the display that a browser would be given.
//!
//! As root: `cargo run --release --example desktop -- DIRECTORY PATH/TO/qvd-init`
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{collections::BTreeMap, env, error::Error, io::Read as _, path::Path, time::Duration};

use qvd::core::{
    DesktopId, DesktopSpec, DisplayKind, Geometry, Instance, Limits, NetPolicy, RootPolicy, TenantName, Virtualizer,
};
use qvd::node::{ExecRequest, ExecStdio, Host as _, Node, NodeConfig};
use qvd::storage::BuildOptions;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = env::args_os().skip(1);
    let (Some(root), Some(init)) = (args.next(), args.next()) else {
        return Err("usage: desktop DIRECTORY PATH/TO/qvd-init".into());
    };
    let root = Path::new(&root);
    let node = Node::open(NodeConfig::new(root, &root.join("run"), init.into(), Instance::new(0xe8a3)))?;
    let image =
        node.build_image(Path::new("recipes/icewm.toml"), &BuildOptions::default(), &mut |line| println!("  {line}"))?;
    println!("image    {} with {} entries", image.digest, image.entries);

    let desktop = DesktopSpec {
        id: DesktopId::new(1)?,
        user: "alice".parse()?,
        tenant: TenantName::default(),
        hostname: "alice".to_owned(),
        image: image.digest,
        virtualizer: Virtualizer::Container,
        root: RootPolicy::Volatile,
        limits: Limits::default(),
        net: NetPolicy::host_only(),
        devices: std::collections::BTreeSet::new(),
        calls: None,
        address: None,
        home: None,
    };
    let timings = node.ensure_running(&desktop, &mut |step| println!("  {}", step.text()))?;
    println!("running  init after {} us, window manager after {} us", timings.start_us, timings.session_us);

    let argv = ["sh", "-c", "echo $(whoami) on $(hostname)"].map(str::to_owned).to_vec();
    let mut program = node.exec(desktop.id, ExecRequest { argv, env: BTreeMap::new(), root: false, tty: None })?;
    program.control.wait(Duration::from_secs(10))?;
    if let ExecStdio::Pipes { stdout, .. } = program.stdio {
        let mut said = String::new();
        std::fs::File::from(stdout).read_to_string(&mut said)?;
        println!("inside   {}", said.trim());
    }

    let kind = DisplayKind::Rfb { geometry: Geometry::default() };
    let display = node.attach(desktop.id, kind, &mut |step| println!("  {step}"))?;
    let mut greeting = [0; 12];
    display.stream().read_exact(&mut greeting)?;
    println!("display  {}", String::from_utf8_lossy(&greeting).trim());

    node.remove(desktop.id)?;
    node.shut_down(Duration::from_secs(5))?;
    Ok(())
}
