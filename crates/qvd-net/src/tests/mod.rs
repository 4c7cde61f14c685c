//! Tests that need root: real links, real rules, raw frames. Everything is in
//! network namespaces of their own, which end with the test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod attacks;
mod bridges;
mod commands_mutation;
mod confinement;
mod drops;
mod flows;
mod frames;
mod groups;
mod guard;
mod inet_mutation;
mod internet;
mod iptables;
mod lifecycle;
mod mtu;
mod mutation;
mod policy;
mod policy_property;
mod property;
mod responder;
mod routers;
mod saved;
mod site;
mod stage;
mod tap;
mod tenants;
mod vectors;
mod world;

use qvd_testkit::Need;

/// What these tests need of a host.
const NEEDS: &[Need] = &[Need::Root, Need::Namespaces, Need::Nftables];
