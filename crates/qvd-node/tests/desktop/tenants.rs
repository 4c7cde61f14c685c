//! Tenants: each with addresses of its own that stay, and limits of its own.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
    time::Duration,
};

use qvd_core::{DesktopSpec, NetPolicy, TenantName};
use qvd_net::{SiteRange, Subnet6};
use qvd_node::{Exit, Host as _, HostErrorKind, Node, NodeConfig, Tenants};

use super::{Host, on_a_host, run};

fn tenant(name: &str) -> TenantName {
    name.parse().unwrap()
}

/// Removes what is kept of tenants: the store is also others'.
struct Forgotten<'a>(&'a Path);

impl Drop for Forgotten<'_> {
    fn drop(&mut self) {
        std::fs::remove_dir_all(self.0.join("network")).unwrap();
    }
}

/// A host that gives two tenants a range each, and lets the second's out nowhere.
fn with_tenants(host: &Host) -> NodeConfig {
    let mut config = host.config.clone();
    config.network.internet = true;
    config.network.name_server = Some(Ipv4Addr::new(192, 0, 2, 53));
    config.network.name_server6 = Some(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x53));
    let range = SiteRange {
        ipv4: Ipv4Addr::new(10, 200, 0, 0),
        prefix_len: 23,
        tenant_prefix_len: 24,
        ipv6: Subnet6::default_for(config.instance).base(),
    };
    let mut tenants = Tenants::default();
    tenants.range = Some(range);
    tenants.policies = BTreeMap::from([(tenant("law"), NetPolicy::host_only())]);
    config.tenants = tenants;
    config
}

fn of(host: &Host, number: u32, name: &str) -> DesktopSpec {
    DesktopSpec { tenant: tenant(name), net: NetPolicy::internet(), ..host.spec(number) }
}

/// Whether programs of each have all their memory offered for merging.
fn sharing<const N: usize>(node: &Node, specs: &[DesktopSpec; N]) -> [bool; N] {
    specs
        .each_ref()
        .map(|spec| run(node, spec.id, false, "grep -q 'merge_any: yes' /proc/self/ksm_stat").0 == Exit::Code(0))
}

/// Whether this host's kernel can, and says so.
fn can_share() -> bool {
    std::fs::read_to_string("/proc/self/ksm_stat").is_ok_and(|text| text.contains("ksm_merge_any"))
}

#[test]
fn a_tenants_desktops_have_its_addresses_and_limits_and_keep_them() {
    on_a_host(|host| {
        let config = with_tenants(host);
        let _forgotten = Forgotten(&config.root);
        let node = Node::open(config.clone()).unwrap();
        // The second would get the first's address, had it not been given.
        let specs = [of(host, 1, "lab"), of(host, 254, "lab"), of(host, 2, "law"), host.spec(3)];
        let view = |node: &Node, spec: &DesktopSpec| node.network(spec.id, &[]).unwrap().unwrap();
        let views = specs.each_ref().map(|spec| {
            node.ensure_running(spec, &mut drop).unwrap();
            view(&node, spec)
        });
        let addresses = views.each_ref().map(|view| view.ipv4);
        let part = |address: Ipv4Addr| address.octets()[..3].to_vec();
        assert_eq!(part(addresses[0]), part(addresses[1]));
        assert_ne!(part(addresses[0]), part(addresses[2]));
        assert!(addresses[..3].iter().all(|address| address.octets()[..2] == [10, 200]), "{addresses:?}");
        assert!(config.network.subnet.contains(addresses[3]));
        assert_ne!(addresses[0], addresses[1]);
        // What each may reach is what its tenant allows too.
        assert!(views[0].policy.internet && views[1].policy.internet);
        assert!(views[2].policy.port && !views[2].policy.internet);
        // Who gets out asks its own gateway for names, by IPv6 first.
        let names = |spec: &DesktopSpec| run(&node, spec.id, false, "cat /etc/resolv.conf").1;
        let gateway = Ipv4Addr::new(10, 200, addresses[0].octets()[2], 1);
        let told = names(&specs[0]);
        assert!(told.ends_with(&format!("nameserver {gateway}\n")), "{told}");
        let first = told.lines().nth(1).and_then(|line| line.strip_prefix("nameserver ")?.parse::<Ipv6Addr>().ok());
        assert_eq!(
            first.map(|six| six.segments()[..4].to_vec()),
            views[0].ipv6.map(|six| six.segments()[..4].to_vec())
        );
        assert_eq!(names(&specs[2]), "");

        // One tenant's share equal pages with one another, who came first.
        assert_eq!(sharing(&node, &specs), [true, true, false, false].map(|yes| yes && can_share()));

        // A third tenant finds no addresses, and is told so.
        let error = node.ensure_running(&of(host, 4, "it"), &mut drop).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::Busy, "{error}");
        let causes = qvd_core::causes(&error).join(": ");
        assert!(causes.contains("no subnet is left in 10.200.0.0/23: 2 tenants have one each"), "{causes}");

        // The next node takes over all of it.
        drop(node);
        let node = Node::open(config.clone()).unwrap();
        let again = specs.each_ref().map(|spec| view(&node, spec).ipv4);
        assert_eq!(again, addresses);
        // While any of those is left that shared before, nobody else's do.
        node.stop(specs[0].id, Duration::ZERO).unwrap();
        node.stop(specs[2].id, Duration::ZERO).unwrap();
        node.ensure_running(&specs[2], &mut drop).unwrap();
        assert_eq!(
            sharing(&node, &[&specs[1], &specs[2], &specs[3]].map(Clone::clone)),
            [true, false, false].map(|yes| yes && can_share())
        );
        // Also who was stopped, and comes back in another order.
        specs.iter().for_each(|spec| node.stop(spec.id, Duration::ZERO).unwrap());
        for (spec, address) in specs.iter().zip(addresses).rev() {
            node.ensure_running(spec, &mut drop).unwrap();
            assert_eq!(view(&node, spec).ipv4, address);
        }
        assert_eq!(sharing(&node, &specs), [false, false, false, true].map(|yes| yes && can_share()));
        // Without the range nothing is begun that would lose them.
        drop(node);
        let error = Node::open(host.config.clone()).unwrap_err();
        assert!(error.to_string().contains("their range has to be named"), "{error}");
        let node = Node::open(config.clone()).unwrap();
        specs.iter().for_each(|spec| node.remove(spec.id).unwrap());
        let kept = std::fs::read_to_string(config.root.join("network/addresses.lab")).unwrap();
        assert_eq!(kept, "", "addresses of removed desktops are kept");
        node.shut_down(Duration::ZERO).unwrap();
    });
}
