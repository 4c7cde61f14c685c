//! Elements of nf_tables sets over netlink: microseconds where starting `nft`
//! takes ten milliseconds.

use std::collections::{BTreeMap, HashMap};

use netlink_packet_core::{DefaultNla, NLA_F_NESTED, NLM_F_CREATE};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nftables::{
        DataAttribute, ListAttribute, NfTablesMessage, SetElementAttribute, SetElementList, SetElementMessage,
        TableAttribute, TableMessage, VerdictAttribute,
    },
    none::ControlMessage,
};
use rustix::io::Errno;

use crate::{
    attributes::{attribute, attributes, nested, put},
    netlink::{Netlink, NetlinkError, Request},
};

/// Resource id of a batch: whom it is for.
///
/// Source: Linux `include/uapi/linux/netfilter/nfnetlink.h`, `NFNL_SUBSYS_NFTABLES`.
const NFNL_SUBSYS_NFTABLES: u16 = 10;

/// Version of netfilter's header. Source: as above, `NFNETLINK_V0`.
pub(crate) const NFNETLINK_V0: u8 = 0;

/// Where a set is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Family {
    Bridge,
    Inet,
    Arp,
}

impl Family {
    pub(crate) const fn protocol(self) -> NetfilterProtoFamily {
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
    /// The chain that decides, if the set is a map to such.
    pub(crate) goto: Option<String>,
}

impl Element {
    /// An element of a set that is no map.
    pub(crate) const fn new(family: Family, set: &'static str, key: Vec<u8>) -> Self {
        Self { family, set, key, goto: None }
    }

    fn is(&self, shown: &Shown) -> bool {
        self.key == shown.key && self.goto == shown.goto
    }

    /// Whether that is the name, with its end, of the chain that decides.
    fn leads_to(&self, chain: Option<&[u8]>) -> bool {
        chain.map(|name| name.strip_suffix(b"\0").unwrap_or(name)) == self.goto.as_deref().map(str::as_bytes)
    }
}

/// Most bytes of elements in one message: the length of a list has 16 bits.
const LIST_MAX: usize = 48 * 1024;

/// What an element takes in a message beside its key, at most.
const ELEMENT_OVERHEAD: usize = 64;

/// `elements` as few messages: each of one set.
fn grouped(elements: &[Element]) -> Vec<(Family, &'static str, Vec<&Element>)> {
    let mut groups: Vec<(Family, &'static str, Vec<&Element>)> = Vec::new();
    let mut open: BTreeMap<(Family, &str), (usize, usize)> = BTreeMap::new();
    for element in elements {
        let length = element.key.len() + ELEMENT_OVERHEAD;
        match open.get_mut(&(element.family, element.set)) {
            Some((place, used)) if *used + length <= LIST_MAX => {
                *used += length;
                if let Some((_, _, group)) = groups.get_mut(*place) {
                    group.push(element);
                }
            }
            _ => {
                open.insert((element.family, element.set), (groups.len(), length));
                groups.push((element.family, element.set, vec![element]));
            }
        }
    }
    groups
}

/// Adds `elements` to `table`, all or none. Those that are there stay.
pub(crate) fn add(netlink: &mut Netlink, table: &str, elements: &[Element]) -> Result<(), NetlinkError> {
    transaction(
        netlink,
        grouped(elements).into_iter().map(|(family, set, group)| {
            let message = list(table, set, &group);
            Request::new(nf_tables(family, NfTablesMessage::NewSetElement(message)), NLM_F_CREATE)
        }),
    )
}

/// Removes `elements` from `table`. What is not there is removed.
pub(crate) fn remove(netlink: &mut Netlink, table: &str, elements: &[Element]) -> Result<(), NetlinkError> {
    let all = |netlink: &mut Netlink, elements: &[Element]| {
        transaction(
            netlink,
            grouped(elements).into_iter().map(|(family, set, group)| {
                let message = list(table, set, &group);
                Request::new(nf_tables(family, NfTablesMessage::DeleteSetElement(message)), 0)
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

/// Most elements that are asked for one by one. The answers to all questions of
/// a batch wait in the socket's buffer, which would run over at some hundreds;
/// and from there on a look at everything is quicker.
const ASK_MAX: usize = 64;

/// The place of the first of `elements` that the kernel does not show.
pub(crate) fn missing(netlink: &mut Netlink, table: &str, elements: &[Element]) -> Result<Option<usize>, NetlinkError> {
    if elements.len() > ASK_MAX {
        return missing_of_many(netlink, table, elements);
    }
    let requests = elements.iter().map(|element| {
        let message = list(table, element.set, &[element]);
        Request::new(nf_tables(element.family, NfTablesMessage::GetSetElement(message)), 0)
    });
    let answers = match netlink.batch(requests.collect()) {
        Err(error) if error.is(Errno::NOENT) => return Ok(Some(error.index)),
        other => other?,
    };
    let shown: Vec<_> = answers.iter().flat_map(shown).collect();
    Ok(elements.iter().position(|element| !shown.iter().any(|shown| element.is(shown))))
}

fn missing_of_many(netlink: &mut Netlink, table: &str, elements: &[Element]) -> Result<Option<usize>, NetlinkError> {
    let mut sets: BTreeMap<(Family, &str), HashMap<&[u8], usize>> = BTreeMap::new();
    for (place, element) in elements.iter().enumerate() {
        sets.entry((element.family, element.set)).or_default().insert(&element.key, place);
    }
    for ((family, set), wanted) in &mut sets {
        for answer in dump(netlink, table, *family, set)?.unwrap_or_default() {
            for (key, goto) in raw_elements(&answer) {
                let is_meant = |place: usize| elements.get(place).is_some_and(|element| element.leads_to(goto));
                if wanted.get(key).is_some_and(|&place| is_meant(place)) {
                    wanted.remove(key);
                }
            }
        }
    }
    Ok(sets.values().flat_map(|wanted| wanted.values().copied()).min())
}

/// The keys of all elements of a set; `None` when there is no such set.
pub(crate) fn all(
    netlink: &mut Netlink,
    table: &str,
    family: Family,
    set: &str,
) -> Result<Option<Vec<Vec<u8>>>, NetlinkError> {
    Ok(all_shown(netlink, table, family, set)?.map(|all| all.into_iter().map(|shown| shown.key).collect()))
}

fn all_shown(
    netlink: &mut Netlink,
    table: &str,
    family: Family,
    set: &str,
) -> Result<Option<Vec<Shown>>, NetlinkError> {
    let own = |(key, goto): (&[u8], Option<&[u8]>)| Shown {
        key: key.to_vec(),
        goto: goto.map(|chain| String::from_utf8_lossy(chain).trim_end_matches('\0').to_owned()),
    };
    let answers = dump(netlink, table, family, set)?;
    Ok(answers.map(|answers| answers.iter().flat_map(|answer| raw_elements(answer)).map(own).collect()))
}

/// A set as the kernel writes it: the crate's parser takes time by the square of a
/// message's length, seconds for the elements of some hundred ports.
fn dump(netlink: &mut Netlink, table: &str, family: Family, set: &str) -> Result<Option<Vec<Vec<u8>>>, NetlinkError> {
    match netlink.dump_raw(nf_tables(family, NfTablesMessage::GetSetElement(list(table, set, &[])))) {
        Ok(answers) => Ok(Some(answers)),
        Err(error) if error.is(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// All elements of a set; none when there is no such set.
pub(crate) fn every(
    netlink: &mut Netlink,
    table: &str,
    family: Family,
    set: &'static str,
) -> Result<Vec<Element>, NetlinkError> {
    let all = all_shown(netlink, table, family, set)?.unwrap_or_default();
    Ok(all.into_iter().map(|Shown { key, goto }| Element { family, set, key, goto }).collect())
}

/// What those of `elements` that there are have counted, in packets.
pub(crate) fn counted(
    netlink: &mut Netlink,
    table: &str,
    elements: &[Element],
) -> Result<Vec<(Vec<u8>, u64)>, NetlinkError> {
    let requests = elements.iter().map(|element| {
        let message = list(table, element.set, &[element]);
        Request::new(nf_tables(element.family, NfTablesMessage::GetSetElement(message)), 0)
    });
    let answers = netlink.batch_raw(requests.collect(), Errno::NOENT)?;
    Ok(answers.iter().flat_map(|answer| raw_counts(answer)).collect())
}

/// The same of all elements of a set.
pub(crate) fn all_counted(
    netlink: &mut Netlink,
    table: &str,
    family: Family,
    set: &str,
) -> Result<Vec<(Vec<u8>, u64)>, NetlinkError> {
    let answers = dump(netlink, table, family, set)?.unwrap_or_default();
    Ok(answers.iter().flat_map(|answer| raw_counts(answer)).collect())
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

fn list(table: &str, set: &str, elements: &[&Element]) -> SetElementMessage {
    let mut attributes = vec![SetElementList::Table(table.to_owned()), SetElementList::Set(set.to_owned())];
    if !elements.is_empty() {
        let mut bytes = Vec::new();
        elements.iter().for_each(|element| describe(&mut bytes, element));
        attributes.push(SetElementList::Other(DefaultNla::new(NLA_F_NESTED | SET_ELEM_LIST_ELEMENTS, bytes)));
    }
    SetElementMessage { attributes }
}

/// Appends an element. By hand: the crate measures every part again on each level
/// above it, which takes twice as long as the kernel needs for all of a message.
fn describe(bytes: &mut Vec<u8>, element: &Element) {
    nested(bytes, LIST_ELEM, |bytes| {
        nested(bytes, SET_ELEM_KEY, |bytes| put(bytes, DATA_VALUE, &element.key));
        if let Some(chain) = &element.goto {
            nested(bytes, SET_ELEM_DATA, |bytes| {
                nested(bytes, DATA_VERDICT, |bytes| {
                    put(bytes, VERDICT_CODE, &NFT_GOTO.to_be_bytes());
                    put(bytes, VERDICT_CHAIN, &[chain.as_bytes(), b"\0"].concat());
                });
            });
        }
    });
}

/// An element as the kernel shows it.
struct Shown {
    key: Vec<u8>,
    goto: Option<String>,
}

/// Source of the numbers, here and below: Linux `include/uapi/linux/netfilter/nf_tables.h`.
const SET_ELEM_LIST_ELEMENTS: u16 = 3;
const LIST_ELEM: u16 = 1;
const SET_ELEM_KEY: u16 = 1;
const SET_ELEM_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
const NFT_GOTO: i32 = -4;

/// What the elements in a message have counted.
fn raw_counts(message: &[u8]) -> Vec<(Vec<u8>, u64)> {
    const SET_ELEM_EXPR: u16 = 7;
    const EXPR_DATA: u16 = 2;
    const COUNTER_PACKETS: u16 = 2;
    let behind_header = message.get(4..).unwrap_or_default();
    let elements = attribute(behind_header, SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
    let element = |element: &[u8]| {
        let key = attribute(attribute(element, SET_ELEM_KEY)?, DATA_VALUE)?.to_vec();
        let counter = attribute(attribute(element, SET_ELEM_EXPR)?, EXPR_DATA)?;
        let packets = attribute(counter, COUNTER_PACKETS)?.first_chunk().map(|&count| u64::from_be_bytes(count))?;
        Some((key, packets))
    };
    attributes(elements).filter_map(|(_, value)| element(value)).collect()
}

/// The elements in a message of the kernel, behind netlink's header: each a key and
/// the name of the chain that it leads to.
fn raw_elements(message: &[u8]) -> impl Iterator<Item = (&[u8], Option<&[u8]>)> {
    let behind_header = message.get(4..).unwrap_or_default();
    let elements = attribute(behind_header, SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
    let element = |element| {
        let key = attribute(attribute(element, SET_ELEM_KEY)?, DATA_VALUE)?;
        let verdict = attribute(element, SET_ELEM_DATA).and_then(|data| attribute(data, DATA_VERDICT));
        Some((key, verdict.and_then(|verdict| attribute(verdict, VERDICT_CHAIN))))
    };
    attributes(elements).filter_map(move |(_, value)| element(value))
}

fn shown(message: &NetfilterMessage) -> Vec<Shown> {
    let NetfilterMessageInner::NfTables(NfTablesMessage::NewSetElement(message)) = &message.inner else {
        return Vec::new();
    };
    let elements = message.attributes.iter().filter_map(|attribute| match attribute {
        SetElementList::Elements(elements) => Some(elements),
        _ => None,
    });
    elements
        .flatten()
        .filter_map(|element| {
            let ListAttribute::Element(attributes) = element else { return None };
            let (mut key, mut goto) = (None, None);
            for attribute in attributes {
                match attribute {
                    SetElementAttribute::Key(DataAttribute::Value(value)) => key = Some(value.clone()),
                    SetElementAttribute::Data(DataAttribute::Verdict(verdict)) => {
                        goto = verdict.iter().find_map(|part| match part {
                            VerdictAttribute::Chain(chain) => Some(chain.clone()),
                            _ => None,
                        });
                    }
                    _ => {}
                }
            }
            Some(Shown { key: key?, goto })
        })
        .collect()
}
