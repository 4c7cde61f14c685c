//! Random policies and packets: the kernel and the reference agree.

use std::net::{IpAddr, Ipv4Addr};

use proptest::{
    collection::vec,
    prelude::*,
    sample::select,
    test_runner::{Config, TestCaseError, TestRunner},
};
use qvd_core::{NameServers, Neighbours, NetPolicy};

use super::{
    internet::{NAMES, OUTSIDE, OUTSIDE6, UPLINK},
    site::{FAR, FAR6, PROGRAM_PORT, Site, limited, with_names},
    world::{on_a_host, subnet},
};
use crate::Backend;

fn policies() -> impl Strategy<Value = NetPolicy> {
    let words = vec![
        "198.51.100.0/24",
        "198.51.100.2 udp 443",
        "203.0.113.0/28 tcp 1-1024",
        "203.0.113.9 udp 53",
        "0.0.0.0/0 tcp 443",
        "10.66.0.0/16",
        "2001:db8:1::/64",
        "2001:db8::/32 udp 400-500",
        "2001:db8:9::9 tcp 443",
        "198.51.100.53 udp 53",
    ];
    let neighbours = vec![Neighbours::None, Neighbours::Tenant, Neighbours::Group("lab".to_owned())];
    let services = vec!["udp 4000", "udp 3000-5000", "tcp 4000", "udp 53"];
    (
        vec(select(words), 0..4),
        vec(select(services), 0..3),
        select(neighbours),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(destinations, services, neighbours, internet, ours, routed)| NetPolicy {
            internet,
            services: services.iter().map(|word| word.parse().unwrap()).collect(),
            neighbours,
            names: if ours { NameServers::Ours } else { NameServers::Any },
            routed,
            ..limited(&destinations)
        })
}

/// Random policies, random packets: the kernel and the reference agree.
#[test]
fn policies_are_kept_as_the_reference_understands_them() {
    const CASES: u32 = 60;
    on_a_host(|| {
        let tenant = NetPolicy { neighbours: Neighbours::Tenant, ..NetPolicy::host_only() };
        let site = Site::new(with_names(Backend::Nft), NetPolicy::host_only(), tenant);
        let (near, near6) = (site.b.port.address(), site.b.port.ipv6().unwrap());
        let hosts: Vec<IpAddr> = vec![
            OUTSIDE.into(),
            FAR.into(),
            NAMES.into(),
            UPLINK.into(),
            near.into(),
            near6.into(),
            OUTSIDE6.into(),
            FAR6.into(),
            Ipv4Addr::new(10, 66, 0, 99).into(),
        ];
        let ports = vec![53_u16, 400, 443, 853, PROGRAM_PORT];
        let packets = vec((select(hosts), select(vec![1_u8, 6, 17]), select(ports)), 40);
        let site = std::cell::RefCell::new(site);
        let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
        let outcome = TestRunner::new(config).run(&(policies(), packets), |(policy, packets)| {
            let site = &mut *site.borrow_mut();
            site.change(&policy);
            let to_host = [(subnet().gateway().into(), 17, PROGRAM_PORT), (subnet().gateway().into(), 17, 53)];
            for (to, protocol, port) in packets.into_iter().chain(to_host) {
                // A program that is not there hears nothing.
                let (frame, mark) = site.frame(to, protocol, port);
                let arrives = site.arrives(&frame, &mark);
                let decision = site.a.port.explain(&frame);
                let unheard = to == IpAddr::V4(subnet().gateway()) && port == 53 && !arrives;
                if decision.arrives != arrives && !unheard {
                    return Err(TestCaseError::fail(format!("{to} {protocol} {port}: {arrives}, {decision}")));
                }
            }
            Ok(())
        });
        outcome.unwrap_or_else(|error| panic!("{error}"));
    });
}
