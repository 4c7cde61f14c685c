//! Rules of one port: who it is, and what it may say.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Kind, text::Text};
use crate::DropReason::{
    Arp, Destination, Dhcp, Ethertype, Fragment, NeighbourMessage, Option, Protocol, SourceAddress, SourceMac,
};
use crate::{
    Mac,
    identity::{Identity, REPORTS},
};

/// An address in four words, as matches of `u32` from `at` on.
fn words(at: usize, address: Ipv6Addr) -> String {
    let words = address.octets();
    let words = words.chunks(4).map(|word| word.iter().fold(0_u32, |sum, &octet| sum << 8 | u32::from(octet)));
    words.enumerate().map(|(n, word)| format!(" && {}=0x{word:08x}", at + 4 * n)).collect()
}

impl Text {
    pub(super) fn port_rules(&self, kind: Kind, identity: &Identity) -> Vec<String> {
        match kind {
            Kind::Ebtables => self.port_ebtables(identity),
            Kind::Iptables => self.port_iptables(identity),
            Kind::Ip6tables => self.port_ip6tables(identity),
        }
    }

    fn port_ebtables(&self, identity: &Identity) -> Vec<String> {
        let mac = identity.mac;
        let senders = || identity.addresses4().chain([Ipv4Addr::UNSPECIFIED]);
        let end = |reason| format!("-j {}", self.dropped(reason));
        let mut rules = vec![format!("-s ! {mac} {}", end(SourceMac))];
        for sender in senders() {
            rules.push(format!("-p ARP --arp-ip-src {sender} --arp-mac-src {mac} -j {}", self.name("arp")));
        }
        // iptables no longer knows which MAC a packet came to.
        let not_by_gateway = || format!("-p IPv4 -d {} --ip-dst 224.0.0.0/4 {}", self.gateway_mac(), end(Destination));
        rules.extend(identity.reports().then(not_by_gateway));
        for own in identity.addresses4() {
            rules.push(format!("-p IPv4 -d {} --ip-src {own} -j ACCEPT", self.gateway_mac()));
        }
        for &group in &identity.groups {
            let (protocol, from, to) = match group {
                IpAddr::V4(_) => ("IPv4", "--ip-src", "--ip-dst"),
                IpAddr::V6(_) => ("IPv6", "--ip6-src", "--ip6-dst"),
            };
            for own in identity.addresses().filter(|own| own.is_ipv4() == group.is_ipv4()) {
                rules.push(format!("-p {protocol} -d {} {from} {own} {to} {group} -j ACCEPT", Mac::of_group(group)));
            }
        }
        for sender in identity.addresses4().filter(|_| identity.reports()) {
            rules.push(format!(
                "-p IPv4 -d {} --ip-src {sender} --ip-dst {REPORTS} --ip-proto igmp -j ACCEPT",
                Mac::of_group(REPORTS.into())
            ));
        }
        for sender in senders() {
            rules.push(format!(
                "-p IPv4 -d ff:ff:ff:ff:ff:ff --ip-src {sender} --ip-dst 255.255.255.255 --ip-proto udp --ip-sport 68 \
                 --ip-dport 67 -j ACCEPT"
            ));
        }
        for sender in identity.senders6() {
            rules.push(format!("-p IPv6 --ip6-src {sender} -j {}", self.name("ip6")));
        }
        // Nothing passes any more; what follows tells why.
        rules.push(format!("-p ARP {}", end(Arp)));
        for sender in senders() {
            let to_all = "-d ff:ff:ff:ff:ff:ff";
            rules.push(format!("-p IPv4 {to_all} --ip-src {sender} --ip-dst 255.255.255.255 {}", end(Dhcp)));
        }
        rules.extend(identity.addresses4().map(|own| format!("-p IPv4 --ip-src {own} {}", end(Destination))));
        rules.push(format!("-p IPv4 {}", end(SourceAddress)));
        rules.extend(identity.addresses6().map(|own| format!("-p IPv6 --ip6-src {own} {}", end(Destination))));
        rules.extend(identity.ipv6.map(|_| format!("-p IPv6 {}", end(SourceAddress))));
        rules.push(end(Ethertype));
        rules
    }

    fn port_iptables(&self, identity: &Identity) -> Vec<String> {
        let [a, b, c, d, e, f] = identity.mac.octets();
        // A request over Ethernet; of the hardware address that follows.
        let question = format!(
            "0>>22&0x3C@8>>8=0x010106 && 0>>22&0x3C@36=0x{a:02x}{b:02x}{c:02x}{d:02x} && 0>>22&0x3C@40>>16=0x{e:02x}{f:02x}"
        );
        let mut rules = Vec::new();
        if identity.reports() {
            // The one packet with an option, a router alert.
            let report = "0>>24=0x46 && 0&0xFFFF=32:0xFFFF && 4&0x3FFF=0 && 20=0x94040000 && 24>>24=0x22";
            rules.push(format!("-d {REPORTS} -p igmp -m ttl --ttl-eq 1 -m u32 --u32 \"{report}\" -j ACCEPT"));
        }
        let end = |what: &str, reason| format!("{what} -j {}", self.dropped(reason));
        // Five words of header; no flag or place of a fragment.
        rules.push(end("-m u32 ! --u32 \"0>>24&0xF=5\"", Option));
        rules.push(end("-m u32 ! --u32 \"4&0x3FFF=0\"", Fragment));
        rules.push(format!("-d 255.255.255.255 -p udp --sport 68 --dport 67 -m u32 --u32 \"{question}\" -j ACCEPT"));
        for own in identity.addresses4() {
            for group in identity.groups.iter().filter(|group| group.is_ipv4()) {
                rules.push(format!("-s {own} -d {group} -p udp ! --sport 67 -j ACCEPT"));
            }
            rules.push(format!("-s {own} -j {}", self.name("to")));
        }
        // Nothing passes any more; what follows tells why.
        rules.push(end("-d 255.255.255.255", Dhcp));
        rules.push(end("-p udp --sport 67", Protocol));
        rules.push(end("-m u32 --u32 \"6&0xFF=1,6,17\"", Destination));
        rules.push(end("", Protocol));
        rules
    }

    fn port_ip6tables(&self, identity: &Identity) -> Vec<String> {
        const SOLICITED: &str = "-d ff02::1:ff00:0/104";
        const ONE_HOST: &str = "! -d ff00::/8";
        let [a, b, c, d, e, f] = identity.mac.octets();
        let rule = |what: &str, u32: &str| format!("{what} -m u32 --u32 \"{u32}\" -j ACCEPT");
        let own_link = |at: usize, kind: u8| {
            format!(" && {at}=0x{kind:02x}01{a:02x}{b:02x} && {}=0x{c:02x}{d:02x}{e:02x}{f:02x}", at + 4)
        };
        let targets: Vec<_> = identity.addresses6().collect();
        let link_local = identity.mac.link_local();
        let report = "4>>16=16:0xFFFF && 4&0xFFFF=0x0001 && 40=0x3a000502 && 44=0x00000100 && 48>>24=143";
        let mut rules = vec![
            rule("-s ::/128 -d ff02::16/128", report),
            rule(&format!("-s {link_local}/128 -d ff02::16/128"), report),
        ];
        // Whether an address is in use, with a nonce or without (RFC 7527).
        for &target in &targets {
            let target = words(48, target);
            let who = format!("-s ::/128 {SOLICITED}");
            rules.push(rule(&who, &format!("4=0x00183aff && 40>>24=135{target}")));
            rules.push(rule(&who, &format!("4=0x00203aff && 40>>24=135{target} && 64>>16=0x0e01")));
        }
        let router = "4=0x00083aff && 40>>24=133";
        rules.push(rule("-s ::/128 -d ff02::2/128", router));
        let end = |what: &str, reason| format!("{what} -j {}", self.dropped(reason));
        rules.push(end("-s ::/128", NeighbourMessage));
        for to in [SOLICITED, ONE_HOST] {
            rules.push(rule(to, "4=0x00183aff && 40>>24=135"));
            rules.push(rule(to, &format!("4=0x00203aff && 40>>24=135{}", own_link(64, 1))));
        }
        for &target in &targets {
            let told = format!("4=0x00203aff && 40>>24=136 && 44>>31=0{}{}", words(48, target), own_link(64, 2));
            rules.extend([ONE_HOST, "-d ff02::1/128"].map(|to| rule(to, &told)));
        }
        rules.push(rule("-d ff02::2/128", router));
        rules.push(rule("-d ff02::2/128", &format!("4=0x00103aff && 40>>24=133{}", own_link(48, 1))));
        rules.push(rule(
            &format!("-s {link_local}/128 -d ff02::1:2/128 -p udp --sport 546 --dport 547"),
            "4>>16=8:0xFFFF && 4>>8&0xFF=17",
        ));
        for own in targets {
            for group in identity.groups.iter().filter(|group| group.is_ipv6()) {
                let whole = "4>>8&0xFF=17 && 4>>16=8:0xFFFF";
                rules.push(rule(&format!("-s {own}/128 -d {group}/128 -p udp ! --sport 547"), whole));
            }
            rules.push(format!("-s {own}/128 -j {}", self.name("to")));
        }
        rules.push(end("-m u32 --u32 \"4>>8&0xFF=58 && 40>>24=133:137\"", NeighbourMessage));
        rules.extend(["-d ff00::/8", "-d ::/32"].map(|to| end(to, Destination)));
        rules.push(end("-m u32 --u32 \"4>>8&0xFF=44\"", Fragment));
        rules.push(end("-m u32 --u32 \"4>>8&0xFF=6,17,58\"", Protocol));
        rules.push(end("", Option));
        rules
    }
}
