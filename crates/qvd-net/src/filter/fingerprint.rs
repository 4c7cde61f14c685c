//! What the kernel shows of a table's rules, to be compared with what it showed
//! when they had been loaded.

use netlink_packet_core::NlasIterator;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage,
    nftables::{
        ChainAttribute, ChainMessage, NfTablesMessage, RuleAttribute, RuleMessage, TableAttribute, TableMessage,
    },
};

use crate::{
    elements::{Family, NFNETLINK_V0},
    netlink::{Netlink, NetlinkError},
};

/// Length of `struct nfgenmsg`. Source: Linux `include/uapi/linux/netfilter/nfnetlink.h`.
const HEADER_LEN: usize = 4;

/// What changes without anybody changing the rules: how many refer to a chain
/// or a table, and what a chain has counted.
///
/// Source: Linux `include/uapi/linux/netfilter/nf_tables.h`, `NFTA_CHAIN_USE`,
/// `NFTA_CHAIN_COUNTERS`, `NFTA_TABLE_USE`.
const OF_CHAIN: &[u16] = &[6, 8];
const OF_TABLE: &[u16] = &[3];

/// Tables with their flags, chains with their hooks and policies, and rules.
/// Nothing where there is no table.
pub(super) fn fingerprint(netlink: &mut Netlink, table: &str) -> Result<Vec<u8>, NetlinkError> {
    let mut all = Vec::new();
    for family in [Family::Bridge, Family::Inet, Family::Arp] {
        let name = table.to_owned();
        let tables = NfTablesMessage::GetTable(TableMessage { attributes: vec![TableAttribute::Name(name.clone())] });
        let chains = NfTablesMessage::GetChain(ChainMessage { attributes: vec![ChainAttribute::Table(name.clone())] });
        let rules = NfTablesMessage::GetRule(RuleMessage { attributes: vec![RuleAttribute::Table(name.clone())] });
        for (message, changing) in [(tables, OF_TABLE), (chains, OF_CHAIN), (rules, &[][..])] {
            let header = NetfilterHeader::new(family.protocol(), NFNETLINK_V0, 0);
            for shown in netlink.dump_raw(NetfilterMessage::new(header, message))? {
                append(&mut all, &shown, table, changing);
            }
        }
    }
    Ok(all)
}

/// Tables and chains of others are listed too; the first attribute names the
/// table in all three.
fn append(all: &mut Vec<u8>, shown: &[u8], table: &str, changing: &[u16]) {
    let attributes = || NlasIterator::new(shown.get(HEADER_LEN..).unwrap_or_default()).filter_map(Result::ok);
    let ours = attributes().next().is_some_and(|first| first.value().strip_suffix(b"\0") == Some(table.as_bytes()));
    if !ours {
        return;
    }
    for attribute in attributes().filter(|attribute| !changing.contains(&attribute.kind())) {
        all.extend(attribute.kind().to_ne_bytes());
        all.extend(attribute.value());
    }
}
