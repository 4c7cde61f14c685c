//! Rules that are the same whatever ports there are.

use super::{Kind, text::Text};
use crate::DropReason;

/// From desktop to desktop, also of another network: whoever accepts a packet
/// here does so for all, and so no other network's rules see it.
pub(super) const BETWEEN: &str = "-o qvd+";

fn owned<const N: usize>(rules: [&str; N]) -> Vec<String> {
    rules.map(str::to_owned).into()
}

impl Text {
    /// Chains of the same rules whatever ports there are.
    pub(super) fn fixed(&self, kind: Kind) -> Vec<(&'static str, String, Vec<String>)> {
        match kind {
            Kind::Ebtables => self.fixed_ebtables(),
            Kind::Iptables => self.fixed_iptables(),
            Kind::Ip6tables => self.fixed_ip6tables(),
        }
    }

    fn fixed_ebtables(&self) -> Vec<(&'static str, String, Vec<String>)> {
        let (bridge, gateway) = (&self.bridge, self.gateway_mac());
        let ports = format!("{bridge}-+");
        let arp = |to: &str, operation| {
            format!(
                "-p ARP -d {to} --arp-htype 1 --arp-ptype 0x0800 --arp-opcode {operation} --arp-ip-dst ! 0.0.0.0 -j ACCEPT"
            )
        };
        let gateway_text = gateway.to_string();
        let all = "ff:ff:ff:ff:ff:ff";
        let arps = [all, &*gateway_text].iter().flat_map(|to| [1, 2].map(|operation| arp(to, operation))).collect();
        // What the host sends to groups comes to their members alone.
        let multicast = format!("-o {ports} -d 01:00:00:00:00:00/01:00:00:00:00:00");
        let to = vec![
            format!("{multicast} -j {}", self.name("groups")),
            // Questions of the link itself are for all.
            format!("-o {ports} -p IPv6 -d 33:33:00:00:00:01 --ip6-dst ff02::1 -j ACCEPT"),
            format!("-o {ports} -p IPv6 -d 33:33:ff:00:00:00/ff:ff:ff:00:00:00 --ip6-dst ff02::1:ff00:0/104 -j ACCEPT"),
            format!("{multicast} -j DROP"),
        ];
        let group = |mac: &str, to: &str| format!("-p IPv6 -d {mac} --ip6-dst {to} -j ACCEPT");
        let mut fixed = vec![
            ("nat", self.name("hook"), vec![format!("-i {ports} -j {bridge}"), format!("-i {ports} -j DROP")]),
            ("nat", self.name("arp"), arps),
            (
                "nat",
                self.name("ip6"),
                vec![
                    format!("-p IPv6 -d {gateway} --ip6-dst ! ff00::/8 -j ACCEPT"),
                    group("33:33:00:00:00:01", "ff02::1"),
                    group("33:33:00:00:00:02", "ff02::2"),
                    group("33:33:00:00:00:16", "ff02::16"),
                    group("33:33:00:01:00:02", "ff02::1:2"),
                    group("33:33:ff:00:00:00/ff:ff:ff:00:00:00", "ff02::1:ff00:0/104"),
                ],
            ),
            ("filter", self.name("host"), vec![format!("-i {ports} -d 01:80:c2:00:00:00/ff:ff:ff:ff:ff:f0 -j DROP")]),
            ("filter", self.name("route"), vec![format!("-i {ports} -j DROP"), format!("-o {ports} -j DROP")]),
            ("filter", self.name("to"), to),
        ];
        fixed.extend(self.ends(Kind::Ebtables));
        fixed
    }

    /// What both families have alike.
    fn fixed_both(&self, kind: Kind, to_host: Vec<String>) -> Vec<(&'static str, String, Vec<String>)> {
        let (ports, bridges) = (format!("{}-+", self.bridge), self.bridges());
        let past_bridge = || format!("-i {ports} -j DROP");
        let each = |rule: &dyn Fn(&str) -> String| bridges.iter().map(|bridge| rule(bridge)).collect::<Vec<_>>();
        let to = |way: &'static str, part: &str| {
            let chain = self.name(part);
            each(&|bridge| format!("{way} {bridge} -j {chain}"))
        };
        let internet = self.config.internet;
        let (mut desk, mut outward, mut inward) = (Vec::new(), Vec::new(), Vec::new());
        // Of no connection: nothing would translate its address.
        let invalid = || format!("-m conntrack --ctstate INVALID -j {}", self.dropped(DropReason::Policy));
        outward.extend(internet.then(invalid));
        outward.extend(internet.then(|| to("-o", "near")).into_iter().flatten());
        outward.push(format!("{BETWEEN} -j {}", self.dropped(DropReason::Neighbour)));
        if internet {
            desk.push("-m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT".to_owned());
            // See the rules of nft: narrow uplinks whose routers say nothing.
            outward.push("-p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu".to_owned());
            outward.push(format!("-j {}", self.name("out")));
            inward.push(format!("-m conntrack --ctstate ESTABLISHED,RELATED -j {}", self.name("in")));
            // Who gets what is for groups is decided at each port.
            inward.push(format!("-d {} -j ACCEPT", if kind == Kind::Iptables { "224.0.0.0/4" } else { "ff00::/8" }));
        }
        desk.extend(to_host);
        desk.push(format!("-j {}", self.name("served")));
        desk.push(format!("-j {}", self.name("told")));
        desk.push(format!("-j {}", self.dropped(DropReason::Host)));
        outward.push(format!("-j {}", self.dropped(DropReason::Policy)));
        inward.push("-j DROP".to_owned());
        let route = [vec![past_bridge()], to("-i", "outw"), to("-o", "inw")].concat();
        let stopped = each(&|bridge| format!("-i {bridge} -j DROP"));
        let hook = [vec![past_bridge()], each(&|bridge| format!("-i {bridge} -j {}", self.bridge)), stopped].concat();
        let mut fixed = vec![
            ("raw", self.name("hook"), hook),
            ("filter", self.name("desk"), desk),
            ("filter", self.name("outw"), outward),
            ("filter", self.name("inw"), inward),
            ("filter", self.name("host"), [vec![past_bridge()], to("-i", "desk")].concat()),
            ("filter", self.name("route"), route),
        ];
        if internet {
            let within = each(&|bridge| format!("-o {bridge} -j RETURN"));
            fixed.push(("nat", self.name("nat"), [within, vec![format!("-j {}", self.name("masq"))]].concat()));
        }
        let names = self.names(kind);
        fixed.extend((!names.is_empty()).then(|| ("nat", self.name("names"), names)));
        fixed.extend(self.ends(kind));
        fixed
    }

    fn fixed_iptables(&self) -> Vec<(&'static str, String, Vec<String>)> {
        let gateway = self.config.subnet.gateway();
        let mut all = self.fixed_both(Kind::Iptables, vec![format!("-d {gateway} -p icmp --icmp-type 8 -j ACCEPT")]);
        let broadcast = self.config.subnet.broadcast().to_string();
        let nowhere = ["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", &broadcast];
        let mut to: Vec<_> = nowhere.iter().map(|to| format!("-d {to} -j RETURN")).collect();
        to.extend(owned(["-p udp ! --sport 67 -j ACCEPT", "-p tcp -j ACCEPT", "-p icmp -j ACCEPT"]));
        all.push(("raw", self.name("to"), to));
        all
    }

    fn fixed_ip6tables(&self) -> Vec<(&'static str, String, Vec<String>)> {
        let mut host: Vec<_> =
            [135, 136].iter().map(|kind| format!("-p icmpv6 --icmpv6-type {kind} -j ACCEPT")).collect();
        if let Some(subnet6) = self.config.subnet6 {
            for to in [subnet6.gateway(self.config.subnet), self.gateway_mac().link_local()] {
                host.push(format!("-d {to} -p icmpv6 --icmpv6-type 128 -j ACCEPT"));
            }
        }
        let mut all = self.fixed_both(Kind::Ip6tables, host);
        // The word at 4 holds length, first next header and hop limit.
        let to = owned([
            "-d ff00::/8 -j RETURN",
            "-d ::/32 -j RETURN",
            "-p udp ! --sport 547 -m u32 --u32 \"4>>8&0xFF=17 && 4>>16=8:0xFFFF\" -j ACCEPT",
            "-m u32 --u32 \"4>>8&0xFF=6 && 4>>16=20:0xFFFF\" -j ACCEPT",
            "-m u32 --u32 \"4>>8&0xFF=58 && 4>>16=8:0xFFFF && 40>>24=1:4,128:129\" -j ACCEPT",
        ]);
        all.push(("raw", self.name("to"), to));
        all
    }
}
