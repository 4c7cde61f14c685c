//! Attributes of netlink messages by hand, where the crates know none or take long.

use netlink_packet_core::{NLA_F_NESTED, NlasIterator};

/// What of an attribute's kind is not flags. Source: Linux
/// `include/uapi/linux/netlink.h`, `NLA_TYPE_MASK`.
const NLA_TYPE: u16 = 0x3fff;

/// Length of `struct nlattr`. Source: as above.
const NLA_HEADER_LEN: usize = 4;

/// Appends an attribute.
pub(crate) fn put(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    attribute_of(bytes, kind, |bytes| bytes.extend(value));
}

/// Appends an attribute of attributes.
pub(crate) fn nested(bytes: &mut Vec<u8>, kind: u16, value: impl FnOnce(&mut Vec<u8>)) {
    attribute_of(bytes, NLA_F_NESTED | kind, value);
}

fn attribute_of(bytes: &mut Vec<u8>, kind: u16, value: impl FnOnce(&mut Vec<u8>)) {
    let start = bytes.len();
    bytes.extend([[0; 2], kind.to_ne_bytes()].concat());
    value(bytes);
    // A list is cut before it is longer than that: `LIST_MAX`.
    let length = u16::try_from(bytes.len() - start).unwrap_or(u16::MAX);
    if let Some(place) = bytes.get_mut(start..start + 2) {
        place.copy_from_slice(&length.to_ne_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Kind and value of each attribute.
pub(crate) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes).filter_map(Result::ok).map(|nla| {
        let (kind, length) = (nla.kind() & NLA_TYPE, nla.value_length());
        (kind, nla.into_inner().get(NLA_HEADER_LEN..NLA_HEADER_LEN + length).unwrap_or_default())
    })
}

/// The value of the first attribute of `kind`.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(of, value)| (of == kind).then_some(value))
}
