//! What clients talk to: one TLS listener for the QVD wire protocol, the
//! browser's portal and display, and the REST API.
//!
//! Nothing here decides who may do what: that is the [`qvd_farm::Farm`]'s part.
//! Here is what stands between it and a stranger: deadlines, bounds, parsers,
//! cookies.
//!
//! ```no_run
//! # async fn example(farm: qvd_farm::Farm) -> Result<(), Box<dyn std::error::Error>> {
//! use qvd_gateway::{ConnectionLimits, Gateway, GatewayConfig, TlsSource};
//!
//! let gateway = Gateway::bind(
//!     GatewayConfig {
//!         listen: "0.0.0.0:8443".parse()?,
//!         tls: TlsSource::SelfSigned { directory: "/var/lib/qvd/tls".into() },
//!         hosts: Vec::new(),
//!         limits: ConnectionLimits::default(),
//!     },
//!     farm,
//! )
//! .await?;
//! println!("https://{}", gateway.local_addr());
//! gateway.serve(std::future::pending()).await;
//! # Ok(()) }
//! ```
//!
//! [`api`] has what the REST API answers, and a client of it; [`images`] what is done with images.
#![forbid(unsafe_code)]

pub mod api;
mod config;
mod display;
mod error;
pub mod images;
mod portal;
mod rewind;
mod server;
mod tls;
mod wire;

pub use config::{ConnectionLimits, GatewayConfig, TlsSource};
pub use error::GatewayError;
pub use server::Gateway;

/// Names one request in the log and in what its sender sees.
fn request_id() -> String {
    format!("{:016x}", rand::random::<u64>())
}
