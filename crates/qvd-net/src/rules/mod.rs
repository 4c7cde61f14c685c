//! The rule set of a network, as text for `nft`, and the keys of its sets.
//!
//! Three tables of one name. In the *bridge* family: what a desktop may send
//! at all, decided where its frame enters, by its identity first. In the
//! *inet* family: what of that the host takes for itself and what it routes.
//! In the *arp* family, and again in inet: what never passed the bridge.
//!
//! Identities are elements of sets keyed by the port, so that a frame costs
//! the same however many desktops there are, and adding one touches no rule.
//! What is let through is named by what it is, never by what it is not: a match
//! on a field that a cut frame lacks fails, whichever way it is put (Linux
//! `net/netfilter/nft_payload.c`, `nft_payload_eval`), so that a rule which
//! drops what differs would let such a frame by.
//!
//! Of frames to the reserved groups 01:80:c2:00:00:00 to 0f, which a bridge
//! keeps to itself (Linux `net/bridge/br_input.c`, `br_handle_frame`), those to
//! :01 are always dropped and those to :02 meet the input hook. All others meet
//! the prerouting hook because the bridge is told to forward them: only so do
//! those to :0e, for LLDP, meet any hook at all.
//!
//! Of IPv6, what nobody may say for another stands in sets as well: the address
//! that a neighbour message is about and the link address that it tells. A
//! header of extension is followed nowhere: only the one report that a host has
//! to send behind such a header passes, in the one form that it has.

mod bridge;
mod class;
mod inet;
mod keys;

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use qvd_core::Instance;

pub(crate) use self::keys::{
    address_key, dropped_behind_key, dropped_key, identity_key, identity6_key, link_key, mac_of_key, mac_of_way_key,
    mark_of_key, near_key, port_of_key, reporter_key, told_key, v4_of_key, v6_of_key, way_key, way6_key,
};
use crate::{
    Mac, NetConfig, Subnet, Subnet6,
    drops::{DROPPED, SAMPLED},
    elements::Family,
    filter::Notes,
    network::group_of_bridges,
};

/// Set of (index of a port, Ethernet header, source IPv4) of whole headers that go
/// from a port to the gateway: one look tells almost all about almost every packet.
pub(crate) const WAY: &str = "way";
/// The same of IPv6.
pub(crate) const WAY6: &str = "way6";
/// Set of (port, source MAC, IPv4) that may send, or be the sender of ARP.
pub(crate) const IDENTITY: &str = "identity";
/// Set of (port, source MAC, IPv6) that may send, or be what a neighbour message
/// is about.
pub(crate) const IDENTITY6: &str = "identity6";
/// Set of (port, MAC) that a message may tell as its sender's.
pub(crate) const LINK: &str = "link";
/// Set of (port, MAC of the group, multicast group of IPv4) that a port sends to
/// and hears.
pub(crate) const GROUPS: &str = "groups";
/// The same of IPv6.
pub(crate) const GROUPS6: &str = "groups6";
/// Set of the ports that report groups of IPv4.
pub(crate) const REPORTERS: &str = "reporters";
/// Set of (group, address of a desktop that takes part in it).
pub(crate) const TOLD: &str = "told";
/// The same of IPv6.
pub(crate) const TOLD6: &str = "told6";
/// Set of the addresses that the host routes to other networks.
pub(crate) const INTERNET: &str = "internet";
/// The same of IPv6.
pub(crate) const INTERNET6: &str = "internet6";
/// Map from an address to the chain of its policy, for those that may go to some
/// places.
pub(crate) const OUTWARD: &str = "outward_of";
/// The same of IPv6.
pub(crate) const OUTWARD6: &str = "outward6_of";
/// Set of the addresses of these that answers are routed to.
pub(crate) const ANSWERED: &str = "answered";
/// The same of IPv6.
pub(crate) const ANSWERED6: &str = "answered6";
/// Map from an address to the chain of what the host serves it.
pub(crate) const SERVED: &str = "served";
/// The same of IPv6.
pub(crate) const SERVED6: &str = "served6";
/// Set of (group, address) of the desktops that talk with each other.
pub(crate) const NEAR: &str = "near";
/// The same of IPv6.
pub(crate) const NEAR6: &str = "near6";
/// Set of the addresses that others see, and not the host's instead.
pub(crate) const ROUTED: &str = "routed";
/// The same of IPv6.
pub(crate) const ROUTED6: &str = "routed6";
/// Present when this network switched the host's forwarding on, and so has to
/// switch it off again: a note that lives and dies with the table.
pub(crate) const FORWARDING_WAS_OFF: &str = "forwarding_was_off";
/// The same of IPv6.
pub(crate) const FORWARDING6_WAS_OFF: &str = "forwarding6_was_off";

/// Sets whose keys begin with the index of a port's link. Those of a link that is
/// gone are told by the MAC in them.
pub(crate) const WAY_SETS: [(Family, &str); 2] = [(Family::Bridge, WAY), (Family::Bridge, WAY6)];
/// Sets whose keys begin with a port.
pub(crate) const PORT_SETS: [(Family, &str); 6] = [
    (Family::Bridge, IDENTITY),
    (Family::Bridge, IDENTITY6),
    (Family::Bridge, LINK),
    (Family::Bridge, GROUPS),
    (Family::Bridge, GROUPS6),
    (Family::Bridge, REPORTERS),
];
/// Sets whose keys are a desktop's address, or end with it.
pub(crate) const ADDRESS_SETS: [(Family, &str); 14] = [
    (Family::Inet, INTERNET),
    (Family::Inet, INTERNET6),
    (Family::Inet, OUTWARD),
    (Family::Inet, OUTWARD6),
    (Family::Inet, ANSWERED),
    (Family::Inet, ANSWERED6),
    (Family::Inet, SERVED),
    (Family::Inet, SERVED6),
    (Family::Inet, NEAR),
    (Family::Inet, NEAR6),
    (Family::Inet, ROUTED),
    (Family::Inet, ROUTED6),
    (Family::Inet, TOLD),
    (Family::Inet, TOLD6),
];
/// Those of them whose addresses are of IPv6.
pub(crate) const ADDRESS6_SETS: [&str; 7] = [INTERNET6, OUTWARD6, ANSWERED6, SERVED6, NEAR6, ROUTED6, TOLD6];

/// Uplinks narrower than a desktop's link are common (tunnels, clouds) and so
/// are routers that drop the ICMP that says so.
const CLAMP: &str = "tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu";

/// Most elements of a set: sixteen bridges have 4096 ports as they are used, and
/// each has three addresses of IPv6.
const SET_MAX: u32 = 16384;

/// Most that is counted: eight reasons for each port.
const COUNTED_MAX: u32 = 32768;

/// Families that have a table.
const FAMILIES: [&str; 3] = ["bridge", "inet", "arp"];

/// One thing that stops a desktop. Named so that a test can take it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protection {
    /// Only IPv4, IPv6 and ARP, untagged.
    Ethertype,
    /// Source MAC and IPv4 are the port's.
    Identity,
    /// The ARP sender is the port's.
    ArpIdentity,
    /// ARP is about somebody, whose address is there: the last of its fields.
    ArpWhole,
    /// IPv4 goes to the gateway's MAC only.
    ToGateway,
    /// No IPv4 options.
    Options,
    /// No IPv4 fragments.
    Fragments,
    /// No multicast, broadcast, loopback or link-local destinations.
    Destinations,
    /// No DHCP server.
    DhcpServer,
    /// Only TCP, UDP and ICMP.
    Protocols,
    /// Nothing to any multicast MAC reaches the host, the reserved ones
    /// included, that no other rule sees.
    Multicast,
    /// The bridge shows the rules what it would keep to itself.
    ReservedGroups,
    /// Nothing passes from port to port.
    Neighbours,
    /// What comes from a port and not over the bridge does not reach the host:
    /// frames that the bridge lets by, or those of a port that lost its bridge.
    PortAlone,
    /// The host itself answers only to echo requests.
    Host,
    /// No way from desktop to desktop over the gateway.
    Hairpin,
    /// Only allowed desktops are routed.
    Outward,
    /// Only answers are routed back.
    Inward,
    /// The bridge's own flags of the port.
    PortFlags,
    /// Who asks for an address by DHCP asks, and does not answer.
    DhcpPorts,
    /// What it asks is a question over Ethernet.
    DhcpQuestion,
    /// It asks for itself.
    DhcpSelf,
    /// Source MAC and IPv6 are the port's.
    Identity6,
    /// A neighbour message is about the port's own address.
    NdTarget,
    /// It tells the port's own MAC.
    NdLink,
    /// It has one option, and nothing behind it.
    NdWhole,
    /// It comes from this link.
    NdNear,
    /// It comes from no router.
    NdNoRouter,
    /// Packets of IPv6 are at least as long as what they begin with.
    Length6,
    /// No ICMPv6 but errors and echo.
    Icmp6Kinds,
    /// No headers of extension, and no other protocols.
    NextHeaders,
    /// No multicast, loopback or mapped destinations.
    Destinations6,
    /// No DHCPv6 server.
    Dhcp6Server,
    /// Of multicast listener discovery, only reports.
    MldReport,
    /// Of all groups only those of the policy.
    Groups,
    /// Of IGMP, only reports, and of ports that have groups.
    IgmpReport,
    /// What goes to a group comes only to its members.
    Members,
    /// Connections end with their port.
    Flows,
    /// No frame longer than its link.
    Giants,
}

/// What the rules depend on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules<'a> {
    pub(crate) instance: Instance,
    pub(crate) subnet: Subnet,
    pub(crate) subnet6: Option<Subnet6>,
    pub(crate) internet: bool,
    pub(crate) name_server: Option<Ipv4Addr>,
    pub(crate) name_server6: Option<Ipv6Addr>,
    pub(crate) forwarding_was_off: bool,
    pub(crate) forwarding6_was_off: bool,
    /// Group of the kernel's log that samples of what is dropped go to; none, and
    /// none are taken.
    pub(crate) log_group: Option<u16>,
    /// Left out. Only tests leave something out.
    pub(crate) without: &'a [Protection],
}

/// Name of the tables.
pub(crate) fn table_name(instance: Instance) -> String {
    format!("qvd-{instance}")
}

impl<'a> Rules<'a> {
    pub(crate) const fn of(config: &NetConfig, notes: Notes, without: &'a [Protection]) -> Self {
        let NetConfig { instance, subnet, subnet6, internet, name_server, name_server6, .. } = *config;
        let (forwarding_was_off, forwarding6_was_off) = (notes.ipv4, notes.ipv6);
        Self {
            instance,
            subnet,
            subnet6,
            internet,
            name_server,
            name_server6,
            forwarding_was_off,
            forwarding6_was_off,
            log_group: None,
            without,
        }
    }

    fn on(&self, protection: Protection) -> bool {
        !self.without.contains(&protection)
    }

    /// `text` if the protection is in force, else nothing: part of a rule.
    fn part(&self, protection: Protection, text: &'static str) -> &'static str {
        if self.on(protection) { text } else { "" }
    }

    fn name_servers(&self) -> impl Iterator<Item = IpAddr> {
        self.name_server.map(IpAddr::V4).into_iter().chain(self.name_server6.map(IpAddr::V6))
    }

    /// Sets and chain of what is dropped, counted by port and reason. `who` is how
    /// a port is known here, of type `kind`.
    ///
    /// A full set counts no more, and the frame is dropped all the same.
    fn dropped(&self, lines: &mut Lines, who: &str, kind: &str) {
        let set = |name| format!("set {name} {{ type {kind} . mark; flags dynamic; size {COUNTED_MAX}; }}");
        lines.push(set(DROPPED));
        lines.push(set(SAMPLED));
        lines.chain(DROPPED);
        lines.push(format!("add @{DROPPED} {{ {who} . meta mark counter }}"));
        if let Some(group) = self.log_group {
            let some = "limit rate 10/minute burst 2 packets";
            lines.push(format!("add @{SAMPLED} {{ {who} . meta mark {some} }} log group {group} snaplen 64"));
        }
        lines.push("drop");
        lines.end();
    }

    /// The bridges: the first, and all that follow it.
    fn bridges(&self) -> [String; 2] {
        let name = self.instance.bridge_name();
        [format!("\"{name}\""), format!("\"{name}.*\"")]
    }

    /// The group that bridges are in: a number, which is compared quicker than names.
    fn bridges_group(&self) -> String {
        format!("{:#x}", group_of_bridges(self.instance))
    }

    fn ports(&self) -> String {
        format!("\"{}-*\"", self.instance.bridge_name())
    }

    fn gateway_mac(&self) -> Mac {
        Mac::of(self.instance, self.subnet.gateway())
    }

    /// Text that makes the tables instead of those of the same name, elements and
    /// all, whatever those were like. One transaction as well.
    pub(crate) fn render_anew(&self) -> String {
        let table = table_name(self.instance);
        let away = |family| format!("table {family} {table}\ndelete table {family} {table}\n");
        FAMILIES.map(away).concat() + &self.render()
    }

    /// Text that makes the tables, or replaces the rules of existing ones and
    /// keeps the elements: desktops that run stay connected. `nft` carries it
    /// out as one transaction.
    pub(crate) fn render(&self) -> String {
        let table = table_name(self.instance);
        let mut text = String::new();
        for family in FAMILIES {
            // Writing to a String cannot fail.
            let _infallible = writeln!(text, "table {family} {table}\nflush table {family} {table}");
        }
        let _infallible = write!(
            text,
            "table bridge {table} {{\n{}}}\ntable inet {table} {{\n{}}}\ntable arp {table} {{\n{}}}\n",
            self.bridge(),
            self.inet(),
            self.arp()
        );
        text
    }
}

#[derive(Default)]
struct Lines(String);

impl Lines {
    fn push(&mut self, line: impl AsRef<str>) {
        self.0.push_str(line.as_ref());
        self.0.push('\n');
    }

    fn when(&mut self, condition: bool, line: impl AsRef<str>) {
        if condition {
            self.push(line);
        }
    }

    fn base_chain(&mut self, name: &str, hook: &str) {
        self.push(format!("chain {name} {{\ntype filter hook {hook};"));
    }

    fn chain(&mut self, name: &str) {
        self.push(format!("chain {name} {{"));
    }

    fn end(&mut self) {
        self.push("}");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_protection_is_a_line_of_its_own() {
        let subnet = "10.66.0.0/16".parse().unwrap();
        let rules = |without: &[Protection]| {
            let instance = Instance::new(1);
            Rules {
                instance,
                subnet,
                subnet6: Some(Subnet6::default_for(instance)),
                internet: true,
                name_server: None,
                name_server6: None,
                forwarding_was_off: false,
                forwarding6_was_off: false,
                log_group: None,
                without,
            }
            .render()
        };
        let all = rules(&[]);
        for protection in [
            Protection::Ethertype,
            Protection::Identity,
            Protection::ArpIdentity,
            Protection::ToGateway,
            Protection::Options,
            Protection::Fragments,
            Protection::Destinations,
            Protection::DhcpServer,
            Protection::Protocols,
            Protection::Multicast,
            Protection::Neighbours,
            Protection::PortAlone,
            Protection::Host,
            Protection::Hairpin,
            Protection::Outward,
            Protection::Inward,
            Protection::DhcpPorts,
            Protection::DhcpQuestion,
            Protection::DhcpSelf,
            Protection::Identity6,
            Protection::NdTarget,
            Protection::NdLink,
            Protection::NdWhole,
            Protection::NdNear,
            Protection::NdNoRouter,
            Protection::Length6,
            Protection::Icmp6Kinds,
            Protection::NextHeaders,
            Protection::Destinations6,
            Protection::Dhcp6Server,
            Protection::MldReport,
        ] {
            assert_ne!(rules(&[protection]), all, "{protection:?}");
        }
    }
}
