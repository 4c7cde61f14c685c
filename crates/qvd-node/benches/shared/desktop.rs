//! The desktops that are measured.

use qvd_core::{DesktopId, DesktopSpec, Digest, Limits, NetPolicy, RootPolicy, TenantName, Virtualizer};

use crate::Outcome;

/// A container that forgets what it wrote, without a home.
pub(crate) fn spec(image: Digest, number: u32, net: NetPolicy) -> Outcome<DesktopSpec> {
    Ok(DesktopSpec {
        id: DesktopId::new(number)?,
        user: format!("user{number}").parse()?,
        tenant: TenantName::default(),
        hostname: format!("desk-{number}"),
        image,
        virtualizer: Virtualizer::Container,
        root: RootPolicy::Volatile,
        limits: Limits::default(),
        net,
        devices: std::collections::BTreeSet::new(),
        calls: None,
        address: None,
        home: None,
    })
}
