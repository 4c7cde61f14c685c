//! Elements of nf_tables sets over netlink: microseconds where starting `nft`
//! takes ten milliseconds.

use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nftables::{
        DataAttribute, ListAttribute, NfTablesMessage, SetElementAttribute, SetElementList, SetElementMessage,
        TableAttribute, TableMessage,
    },
    none::ControlMessage,
};
use rustix::io::Errno;

use crate::netlink::{Netlink, NetlinkError, Request};

/// Resource id of a batch: whom it is for.
///
/// Source: Linux `include/uapi/linux/netfilter/nfnetlink.h`, `NFNL_SUBSYS_NFTABLES`.
const NFNL_SUBSYS_NFTABLES: u16 = 10;

/// Version of netfilter's header. Source: as above, `NFNETLINK_V0`.
const NFNETLINK_V0: u8 = 0;

/// Where a set is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    Bridge,
    Inet,
    Arp,
}

impl Family {
    const fn protocol(self) -> NetfilterProtoFamily {
        match self {
            Self::Bridge => NetfilterProtoFamily::Bridge,
            Self::Inet => NetfilterProtoFamily::Inet,
            Self::Arp => NetfilterProtoFamily::ARP,
        }
    }
}

/// An element of a set of one of our tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Element {
    pub(crate) family: Family,
    pub(crate) set: &'static str,
    pub(crate) key: Vec<u8>,
}

/// Adds `elements` to `table`, all or none. Those that are there stay.
pub(crate) fn add(netlink: &mut Netlink, table: &str, elements: &[Element]) -> Result<(), NetlinkError> {
    transaction(
        netlink,
        elements.iter().map(|element| {
            let message = list(table, element.set, Some(&element.key));
            Request::new(nf_tables(element.family, NfTablesMessage::NewSetElement(message)), NLM_F_CREATE)
        }),
    )
}

/// Removes `elements` from `table`. What is not there is removed.
pub(crate) fn remove(netlink: &mut Netlink, table: &str, elements: &[Element]) -> Result<(), NetlinkError> {
    let all = |netlink: &mut Netlink, elements: &[Element]| {
        transaction(
            netlink,
            elements.iter().map(|element| {
                let message = list(table, element.set, Some(&element.key));
                Request::new(nf_tables(element.family, NfTablesMessage::DeleteSetElement(message)), 0)
            }),
        )
    };
    match all(netlink, elements) {
        // One is missing, so none was removed: one by one.
        Err(error) if error.is(Errno::NOENT) => elements.iter().try_for_each(|element| {
            all(netlink, std::slice::from_ref(element)).or_else(|e| if e.is(Errno::NOENT) { Ok(()) } else { Err(e) })
        }),
        other => other,
    }
}

/// The first of `elements` that the kernel does not show.
pub(crate) fn missing<'a>(
    netlink: &mut Netlink,
    table: &str,
    elements: &'a [Element],
) -> Result<Option<&'a Element>, NetlinkError> {
    for element in elements {
        let message = list(table, element.set, Some(&element.key));
        let request = Request::new(nf_tables(element.family, NfTablesMessage::GetSetElement(message)), 0);
        let answers = match netlink.batch(vec![request]) {
            Err(error) if error.is(Errno::NOENT) => return Ok(Some(element)),
            other => other?,
        };
        if !answers.iter().flat_map(keys).any(|key| key == element.key) {
            return Ok(Some(element));
        }
    }
    Ok(None)
}

/// The keys of all elements of a set; `None` when there is no such set.
pub(crate) fn all(
    netlink: &mut Netlink,
    table: &str,
    family: Family,
    set: &str,
) -> Result<Option<Vec<Vec<u8>>>, NetlinkError> {
    match netlink.dump(nf_tables(family, NfTablesMessage::GetSetElement(list(table, set, None)))) {
        Ok(answers) => Ok(Some(answers.iter().flat_map(keys).collect())),
        Err(error) if error.is(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes our table of `family` and all in it. What is not there is removed.
pub(crate) fn remove_table(netlink: &mut Netlink, table: &str, family: Family) -> Result<(), NetlinkError> {
    let mut message = TableMessage { attributes: Vec::new() };
    message.attributes.push(TableAttribute::Name(table.to_owned()));
    let request = Request::new(nf_tables(family, NfTablesMessage::DeleteTable(message)), 0);
    transaction(netlink, std::iter::once(request)).or_else(|e| if e.is(Errno::NOENT) { Ok(()) } else { Err(e) })
}

fn transaction(
    netlink: &mut Netlink,
    requests: impl Iterator<Item = Request<NetfilterMessage>>,
) -> Result<(), NetlinkError> {
    let bracket = |message: ControlMessage| {
        let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, NFNETLINK_V0, NFNL_SUBSYS_NFTABLES);
        Request::silent(NetfilterMessage::new(header, message))
    };
    let batch = std::iter::once(bracket(ControlMessage::BatchBegin))
        .chain(requests)
        .chain(std::iter::once(bracket(ControlMessage::BatchEnd)))
        .collect();
    netlink.batch(batch).map(drop)
}

fn nf_tables(family: Family, message: NfTablesMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(family.protocol(), NFNETLINK_V0, 0), message)
}

fn list(table: &str, set: &str, key: Option<&[u8]>) -> SetElementMessage {
    let mut attributes = vec![SetElementList::Table(table.to_owned()), SetElementList::Set(set.to_owned())];
    if let Some(key) = key {
        let element = vec![SetElementAttribute::Key(DataAttribute::Value(key.to_vec()))];
        attributes.push(SetElementList::Elements(vec![ListAttribute::Element(element)]));
    }
    SetElementMessage { attributes }
}

fn keys(message: &NetfilterMessage) -> Vec<Vec<u8>> {
    let NetfilterMessageInner::NfTables(NfTablesMessage::NewSetElement(message)) = &message.inner else {
        return Vec::new();
    };
    let elements = message.attributes.iter().filter_map(|attribute| match attribute {
        SetElementList::Elements(elements) => Some(elements),
        _ => None,
    });
    elements
        .flatten()
        .filter_map(|element| match element {
            ListAttribute::Element(attributes) => attributes.iter().find_map(|attribute| match attribute {
                SetElementAttribute::Key(DataAttribute::Value(key)) => Some(key.clone()),
                _ => None,
            }),
            _ => None,
        })
        .collect()
}
