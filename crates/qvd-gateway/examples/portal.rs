//! The portal with a host that exists in memory only: for work on its pages.
//!
//! `cargo run -p qvd-gateway --example portal`, then sign in as `ada` with
//! the password `correct horse`, who administers, too. Displays say hello and nothing else.
#![allow(clippy::print_stdout)]

use std::{error::Error, sync::Arc};

use qvd_farm::{Database, Farm, NewDesktop, Progress, Secret};
use qvd_gateway::{ConnectionLimits, Gateway, GatewayConfig, TlsSource};
use qvd_node::fake::FakeHost;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().with_env_filter("info").init();
    let dir = tempfile::tempdir()?;
    let host = Arc::new(FakeHost::new());
    host.add_image("xfce".parse()?);
    let farm = Farm::open(&Database::File(dir.path().join("qvd.sqlite")), host).await?;
    let (ada, password) = ("ada".parse()?, Secret::from("correct horse"));
    farm.add_user(&ada, &password, true).await?;
    for (flavour, name) in [("icewm", "office"), ("xfce", "development"), ("icewm", "accounting")] {
        let new = NewDesktop { name: Some(name.to_owned()), ..NewDesktop::new(ada.clone(), flavour.parse()?) };
        let desktop = farm.create_desktop(new).await?;
        match name {
            "office" => {
                let (progress, _unheard) = tokio::sync::mpsc::channel::<Progress>(1);
                farm.start(desktop.id, progress).await?;
            }
            "accounting" => farm.set_blocked(desktop.id, true).await?,
            _ => {}
        }
    }
    let config = GatewayConfig {
        listen: std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8443".to_owned()).parse()?,
        tls: TlsSource::SelfSigned { directory: dir.path().join("tls") },
        hosts: Vec::new(),
        limits: ConnectionLimits::default(),
    };
    let gateway = Gateway::bind(config, farm).await?;
    println!("https://{}/  user ada, password `correct horse`", gateway.local_addr());
    gateway
        .serve(async {
            if let Err(error) = tokio::signal::ctrl_c().await {
                tracing::error!(%error, "cannot wait for Ctrl+C");
            }
        })
        .await;
    Ok(())
}
