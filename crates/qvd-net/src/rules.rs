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

use std::{fmt::Write as _, net::Ipv4Addr};

use qvd_core::Instance;

use crate::{Mac, Subnet};

/// Set of (port, source MAC, source IPv4) that may send.
pub(crate) const IDENTITY: &str = "identity";
/// Set of (port, source MAC, ARP sender MAC, ARP sender IPv4) that may send.
pub(crate) const ARP_IDENTITY: &str = "arp_identity";
/// Set of the addresses that the host routes to other networks.
pub(crate) const INTERNET: &str = "internet";
/// Present when this network switched the host's forwarding on, and so has to
/// switch it off again: a note that lives and dies with the table.
pub(crate) const FORWARDING_WAS_OFF: &str = "forwarding_was_off";

/// Most elements of a set: a bridge has at most 1023 ports (Linux
/// `net/bridge/br_private.h`, `BR_PORT_BITS` 10), and each has two ARP senders.
const SET_MAX: u32 = 4096;

/// Families that have a table.
const FAMILIES: [&str; 3] = ["bridge", "inet", "arp"];

/// One thing that stops a desktop. Named so that a test can take it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protection {
    /// Only IPv4 and ARP, untagged.
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
}

/// What the rules depend on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules<'a> {
    pub(crate) instance: Instance,
    pub(crate) subnet: Subnet,
    pub(crate) internet: bool,
    pub(crate) forwarding_was_off: bool,
    /// Left out. Only tests leave something out.
    pub(crate) without: &'a [Protection],
}

/// Name of the tables.
pub(crate) fn table_name(instance: Instance) -> String {
    format!("qvd-{instance}")
}

impl Rules<'_> {
    fn on(&self, protection: Protection) -> bool {
        !self.without.contains(&protection)
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

    fn bridge(&self) -> String {
        let ports = format!("\"{}-*\"", self.instance.bridge_name());
        let gateway = Mac::of(self.instance, self.subnet.gateway());
        let broadcast = self.subnet.broadcast();
        let set = |name, key| format!("set {name} {{ type {key}; size {SET_MAX}; }}");
        let mut lines = Lines::default();
        lines.push(set(IDENTITY, "ifname . ether_addr . ipv4_addr"));
        lines.push(set(ARP_IDENTITY, "ifname . ether_addr . ether_addr . ipv4_addr"));

        lines.base_chain("from_port", "prerouting priority -300; policy drop");
        lines.push(format!("iifname != {ports} accept"));
        lines.push("ether type vmap { ip : goto from_port_ip, arp : goto from_port_arp }");
        lines.when(!self.on(Protection::Ethertype), "ether type != { ip, arp } accept");
        lines.end();

        lines.chain("from_port_ip");
        let known = if self.on(Protection::Identity) { "iifname . ether saddr . ip saddr @identity " } else { "" };
        lines.push(format!("{known}goto from_port_known"));
        lines.push("drop");
        lines.end();

        lines.chain("from_port_known");
        lines.when(self.on(Protection::ToGateway), format!("ether daddr != {gateway} drop"));
        // The length of the header in 32-bit words.
        lines.when(self.on(Protection::Options), "@nh,4,4 != 5 drop");
        // More fragments, or an offset.
        lines.when(self.on(Protection::Fragments), "ip frag-off & 0x3fff != 0 drop");
        lines.when(
            self.on(Protection::Destinations),
            format!(
                "ip daddr {{ 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, {broadcast}, 224.0.0.0-255.255.255.255 }} drop"
            ),
        );
        // `meta l4proto` and ports are known of whole packets alone: of a
        // length that is true, with a header that is there.
        lines.push(if self.on(Protection::DhcpServer) { "udp sport != 67 accept" } else { "meta l4proto udp accept" });
        lines.push(if self.on(Protection::Protocols) {
            "meta l4proto { icmp, tcp } accept"
        } else {
            "meta l4proto != udp accept"
        });
        lines.push("drop");
        lines.end();

        lines.chain("from_port_arp");
        lines.push(format!(
            "arp htype 1 arp ptype ip arp operation {{ request, reply }} {} {} accept",
            if self.on(Protection::ArpWhole) { "arp daddr ip != 0.0.0.0" } else { "" },
            if self.on(Protection::ArpIdentity) {
                "iifname . ether saddr . arp saddr ether . arp saddr ip @arp_identity"
            } else {
                ""
            }
        ));
        lines.end();

        lines.base_chain("to_host", "input priority -300; policy accept");
        lines.when(
            self.on(Protection::Multicast),
            format!("iifname {ports} ether daddr != {{ {gateway}, ff:ff:ff:ff:ff:ff }} drop"),
        );
        lines.end();

        // `forward` is a word of nft.
        lines.base_chain("to_neighbour", "forward priority -300; policy accept");
        lines.when(self.on(Protection::Neighbours), format!("iifname {ports} drop"));
        lines.when(self.on(Protection::Neighbours), format!("oifname {ports} drop"));
        lines.end();
        lines.0
    }

    fn arp(&self) -> String {
        let ports = format!("\"{}-*\"", self.instance.bridge_name());
        let mut lines = Lines::default();
        lines.base_chain("to_host", "input priority -10; policy accept");
        lines.when(self.on(Protection::PortAlone), format!("iifname {ports} drop"));
        lines.end();
        lines.0
    }

    fn inet(&self) -> String {
        let bridge = format!("\"{}\"", self.instance.bridge_name());
        let ports = format!("\"{}-*\"", self.instance.bridge_name());
        let gateway = self.subnet.gateway();
        let mut lines = Lines::default();
        lines.push(format!("set {INTERNET} {{ type ipv4_addr; size {SET_MAX}; }}"));
        lines.when(self.forwarding_was_off, format!("set {FORWARDING_WAS_OFF} {{ type mark; }}"));

        lines.base_chain("to_host", "input priority -10; policy accept");
        lines.when(self.on(Protection::PortAlone), format!("iifname {ports} drop"));
        lines.push(format!("iifname != {bridge} accept"));
        // Without a way out nothing here asks for connection tracking, which
        // would be switched on for the whole host.
        lines.when(self.internet, "ct state established,related accept");
        lines.push(format!("ip daddr {gateway} icmp type echo-request accept"));
        lines.when(self.on(Protection::Host), "drop");
        lines.end();

        lines.base_chain("routed", "forward priority -10; policy accept");
        lines.when(self.on(Protection::PortAlone), format!("iifname {ports} drop"));
        lines.when(self.on(Protection::Hairpin), format!("iifname {bridge} oifname {bridge} drop"));
        lines.push(format!("iifname {bridge} goto outward"));
        lines.push(format!("oifname {bridge} goto inward"));
        lines.end();

        lines.chain("outward");
        lines.when(self.on(Protection::Outward), format!("ip saddr != @{INTERNET} drop"));
        // Uplinks narrower than a desktop's link are common (tunnels, clouds)
        // and so are routers that drop the ICMP that says so.
        lines.push("tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu");
        lines.push(if self.internet { "meta nfproto ipv4 accept" } else { "drop" });
        lines.push("drop");
        lines.end();

        lines.chain("inward");
        lines.when(self.internet, format!("ct state established,related ip daddr @{INTERNET} accept"));
        lines.when(self.on(Protection::Inward), "drop");
        lines.end();

        if self.internet {
            lines.push("chain masquerade_out {\ntype nat hook postrouting priority 100; policy accept;");
            lines.push(format!("ip saddr @{INTERNET} oifname != {bridge} masquerade"));
            lines.end();
        }
        lines.0
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

/// Part of a set's key. Each is padded to whole 32-bit registers (Linux
/// `include/uapi/linux/netfilter/nf_tables.h`, `NFT_REG32_SIZE`).
pub(crate) fn port_key(link: &str) -> [u8; 16] {
    let mut key = [0; 16];
    // An interface's name has at most 15 bytes; `Instance::link_name` sees to it.
    for (to, from) in key.iter_mut().zip(link.bytes()) {
        *to = from;
    }
    key
}

fn mac_key(mac: Mac) -> [u8; 8] {
    let [a, b, c, d, e, f] = mac.octets();
    [a, b, c, d, e, f, 0, 0]
}

/// Key of [`IDENTITY`].
pub(crate) fn identity_key(link: &str, mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    [&port_key(link)[..], &mac_key(mac), &address.octets()].concat()
}

/// Keys of [`ARP_IDENTITY`]: the port's address, and none, which asks whether
/// an address is in use (RFC 5227).
pub(crate) fn arp_keys(link: &str, mac: Mac, address: Ipv4Addr) -> [Vec<u8>; 2] {
    [address, Ipv4Addr::UNSPECIFIED]
        .map(|sender| [&port_key(link)[..], &mac_key(mac), &mac_key(mac), &sender.octets()].concat())
}

/// Name of the port that a key of [`IDENTITY`] or [`ARP_IDENTITY`] begins with.
pub(crate) fn port_of_key(key: &[u8]) -> Option<&str> {
    let name = key.get(..16)?;
    std::str::from_utf8(name.split(|&b| b == 0).next()?).ok()
}

/// Address that a key of [`IDENTITY`] ends with.
pub(crate) fn address_of_key(key: &[u8]) -> Option<Ipv4Addr> {
    key.last_chunk::<4>().map(|&octets| octets.into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_key_names_its_port_and_address() {
        let instance = Instance::new(0x1a2b);
        let address = Ipv4Addr::new(10, 66, 0, 9);
        let key = identity_key("qvd1a2b-7", Mac::of(instance, address), address);
        assert_eq!(key.len(), 28);
        assert_eq!(port_of_key(&key), Some("qvd1a2b-7"));
        assert_eq!(address_of_key(&key), Some(address));
        assert!(arp_keys("qvd1a2b-7", Mac::of(instance, address), address).iter().all(|key| key.len() == 36));
    }

    #[test]
    fn every_protection_is_a_line_of_its_own() {
        let subnet = "10.66.0.0/16".parse().unwrap();
        let rules = |without: &[Protection]| {
            Rules { instance: Instance::new(1), subnet, internet: true, forwarding_was_off: false, without }.render()
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
        ] {
            assert_ne!(rules(&[protection]), all, "{protection:?}");
        }
    }
}
