//! Inputs of several parts: each a letter, its length in two bytes, and itself.

/// Puts parts together.
pub(crate) fn join<'a>(parts: impl IntoIterator<Item = (u8, &'a [u8])>) -> Vec<u8> {
    let mut joined = Vec::new();
    for (kind, part) in parts {
        joined.push(kind);
        joined.extend(u16::try_from(part.len()).expect("parts of seeds are short").to_le_bytes());
        joined.extend(part);
    }
    joined
}

/// Takes them apart; what is left of a cut one is a part too.
pub(crate) fn split(mut joined: &[u8]) -> Vec<(u8, &[u8])> {
    let mut parts = Vec::new();
    while let [kind, low, high, rest @ ..] = joined {
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (part, behind) = rest.split_at(len);
        parts.push((*kind, part));
        joined = behind;
    }
    parts
}

/// The parts of one kind, in their order.
pub(crate) fn of<'a>(parts: &[(u8, &'a [u8])], kind: u8) -> Vec<&'a [u8]> {
    parts.iter().filter(|(of, _)| *of == kind).map(|(_, part)| *part).collect()
}
