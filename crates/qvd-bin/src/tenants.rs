//! What a file says of the tenants of a site.

use std::{collections::BTreeMap, path::Path};

use anyhow::Context as _;
use qvd_core::{NetPolicy, TenantName};
use qvd_net::{SiteRange, Subnet6};
use qvd_node::NodeConfig;
use serde::Deserialize;

use crate::paths::read_text;

/// How many bits the addresses of a tenant share unless the file says so: room
/// for 4093 desktops.
const EACH: u8 = 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// Addresses of all tenants, such as `10.192.0.0/12`.
    range: String,
    /// How many bits the addresses of one share.
    each: Option<u8>,
    /// A /48 of IPv6; one of the installation's own without.
    range6: Option<String>,
    /// Most that the desktops of a tenant may reach.
    #[serde(default)]
    policy: BTreeMap<TenantName, NetPolicy>,
}

/// Takes what `file` says into the settings of a node.
pub(crate) fn read(file: &Path, config: &mut NodeConfig) -> anyhow::Result<()> {
    let cannot = || format!("cannot read the tenants of `{}`", file.display());
    let text = read_text("file of tenants", file)?;
    let (range, policies) = parse(&text, config).with_context(cannot)?;
    (config.tenants.range, config.tenants.policies) = (Some(range), policies);
    Ok(())
}

fn parse(text: &str, config: &NodeConfig) -> anyhow::Result<(SiteRange, BTreeMap<TenantName, NetPolicy>)> {
    let File { range, each, range6, policy } = toml::from_str(text)?;
    let (ipv4, prefix_len) = prefix(&range).with_context(|| format!("`{range}` is no range: write 10.192.0.0/12"))?;
    let ipv6 = match range6 {
        // The installation's own /64 is the first of it.
        None => Subnet6::default_for(config.instance).base(),
        Some(text) => match prefix(&text) {
            Some((base, 48)) => base,
            _ => anyhow::bail!("`{text}` is no range of IPv6: write fd51:5644:1::/48"),
        },
    };
    let range = SiteRange { ipv4, prefix_len, tenant_prefix_len: each.unwrap_or(EACH), ipv6 };
    range.tenants()?;
    Ok((range, policy))
}

fn prefix<A: std::str::FromStr>(text: &str) -> Option<(A, u8)> {
    let (base, length) = text.split_once('/')?;
    Some((base.parse().ok()?, length.parse().ok()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use qvd_core::Instance;

    use super::*;

    fn config() -> NodeConfig {
        NodeConfig::new(Path::new("/none"), Path::new("/none"), "/none".into(), Instance::new(0x1a2b))
    }

    #[test]
    fn a_file_says_what_tenants_get() {
        let text = "range = \"10.192.0.0/12\"\n[policy.lab]\nport = true\nup_kbit_s = 100\n";
        let (range, policies) = parse(text, &config()).unwrap();
        assert_eq!((range.prefix_len, range.tenant_prefix_len, range.tenants().unwrap()), (12, 20, 256));
        assert_eq!(range.ipv6.to_string(), "fd51:5644:1a2b::");
        assert!(policies[&"lab".parse().unwrap()].port);
        let text = "range = \"10.192.0.0/16\"\neach = 24\nrange6 = \"fd00:1:2::/48\"\n";
        let (range, policies) = parse(text, &config()).unwrap();
        assert_eq!((range.tenant_prefix_len, range.ipv6.to_string()), (24, "fd00:1:2::".to_owned()));
        assert!(policies.is_empty());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, named) in [
            ("", "range"),
            ("range = \"10.192.0.0\"", "10.192.0.0"),
            ("range = \"10.192.0.0/12\"\neach = 8", "larger"),
            ("range = \"10.192.0.0/12\"\neach = 30", "32768 tenants"),
            ("range = \"10.192.0.0/12\"\nrange6 = \"fd00::/64\"", "fd00::/64"),
            ("range = \"10.192.0.0/12\"\n[policy.Lab]", "Lab"),
            ("range = \"10.192.0.0/12\"\n[policy.lab]\ninternets = true", "internets"),
        ] {
            let error = format!("{:#}", parse(text, &config()).unwrap_err());
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
