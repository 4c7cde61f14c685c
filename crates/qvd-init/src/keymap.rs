//! Keys for letters that a US keyboard lacks.
//!
//! RFB tells which *symbol* was typed, X which *key*. The head's server looks
//! for a key with that symbol, and gives one to a symbol that has none; but
//! the agent takes its keys from the head only once, when it is shown. So the
//! usual letters of Europe get keys before that, and what the head adds later
//! is handed on.

use std::{
    error::Error,
    ops::{Range, RangeInclusive},
};

use x11rb::{
    connection::Connection,
    protocol::xproto::{ConnectionExt as _, GetKeyboardMappingReply, MappingNotifyEvent},
    rust_connection::RustConnection,
};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Keys of the `evdev` key codes that are not on a keyboard but start programs,
/// change the brightness and the like, none of which a browser's user has in a
/// desktop. Between them are keys that stand for modifiers.
///
/// Source: `/usr/share/X11/xkb/keycodes/evdev`.
const SPARE: [RangeInclusive<u8>; 2] = [136..=202, 208..=255];

/// Symbols of each key given away, without and with Shift. The rest of the
/// spare keys stays empty, for the head's server to use.
///
/// Latin-1; the euro sign and typographers' marks; letters of Latin-2 and of
/// Turkish. Source: X11's `keysymdef.h`, by the names that noVNC sends.
#[rustfmt::skip]
const SYMBOLS: [(u32, u32); 82] = [
    (0xe0, 0xc0), (0xe1, 0xc1), (0xe2, 0xc2), (0xe3, 0xc3), (0xe4, 0xc4), (0xe5, 0xc5), (0xe6, 0xc6), (0xe7, 0xc7),
    (0xe8, 0xc8), (0xe9, 0xc9), (0xea, 0xca), (0xeb, 0xcb), (0xec, 0xcc), (0xed, 0xcd), (0xee, 0xce), (0xef, 0xcf),
    (0xf0, 0xd0), (0xf1, 0xd1), (0xf2, 0xd2), (0xf3, 0xd3), (0xf4, 0xd4), (0xf5, 0xd5), (0xf6, 0xd6), (0xf8, 0xd8),
    (0xf9, 0xd9), (0xfa, 0xda), (0xfb, 0xdb), (0xfc, 0xdc), (0xfd, 0xdd), (0xfe, 0xde), (0xdf, 0xff),
    (0x13bd, 0x13bc), (0xa1, 0xbf), (0xa2, 0xa3), (0xa4, 0xa5), (0xa6, 0xa7), (0xa8, 0xaf), (0xa9, 0xae),
    (0xaa, 0xba), (0xab, 0xbb), (0xac, 0xad), (0xb0, 0xb1), (0xb2, 0xb3), (0xb4, 0xb8), (0xb5, 0xb6), (0xb7, 0xb9),
    (0xbc, 0xbd), (0xbe, 0xd7), (0xf7, 0x20ac), (0xad2, 0xad3), (0xad0, 0xad1), (0xafe, 0xafd), (0xaaa, 0xaa9),
    (0xaae, 0xae6), (0x0100_2039, 0x0100_203a), (0xac9, 0xaf1), (0x1b1, 0x1a1), (0x1e6, 0x1c6), (0x1e8, 0x1c8),
    (0x1ef, 0x1cf), (0x1ea, 0x1ca), (0x1ec, 0x1cc), (0x2bb, 0x2ab), (0x2b9, 0x2a9), (0x1b3, 0x1a3), (0x1f1, 0x1d1),
    (0x1f2, 0x1d2), (0x1f5, 0x1d5), (0x1f8, 0x1d8), (0x1b6, 0x1a6), (0x1b9, 0x1a9), (0x1ba, 0x1aa), (0x1bb, 0x1ab),
    (0x1fe, 0x1de), (0x1f9, 0x1d9), (0x1fb, 0x1db), (0x1bc, 0x1ac), (0x1bf, 0x1af), (0x1be, 0x1ae), (0x1e3, 0x1c3),
    (0x1f0, 0x1d0), (0x1b5, 0x1a5),
];

/// Symbols of one key in a core keyboard map.
const WIDTH: usize = 2;

/// Gives the spare keys of a server to [`SYMBOLS`].
pub(crate) fn extend(connection: &RustConnection) -> Outcome<()> {
    let mut symbols = SYMBOLS.iter().flat_map(|&(plain, shifted)| [plain, shifted]);
    for keys in SPARE {
        let count = keys.end() - keys.start() + 1;
        let symbols: Vec<u32> =
            (0..usize::from(count) * WIDTH).map(|_| symbols.next().unwrap_or(x11rb::NO_SYMBOL)).collect();
        connection.change_keyboard_mapping(count, *keys.start(), u8::try_from(WIDTH)?, &symbols)?.check()?;
    }
    Ok(())
}

/// Whether an event is about keys that are handed on.
pub(crate) fn concerns(event: &MappingNotifyEvent) -> bool {
    let last = event.first_keycode.saturating_add(event.count.saturating_sub(1));
    SPARE.iter().any(|keys| event.first_keycode <= *keys.end() && last >= *keys.start())
}

/// Gives the spare keys of `to` the symbols that they have on `from`.
pub(crate) fn hand_on(from: &RustConnection, to: &RustConnection) -> Outcome<()> {
    for keys in SPARE {
        let (first, count) = (*keys.start(), keys.end() - keys.start() + 1);
        let wanted = rows(&from.get_keyboard_mapping(first, count)?.reply()?);
        let present = rows(&to.get_keyboard_mapping(first, count)?.reply()?);
        // Each change makes every program of the session read the map again.
        if let Some(changed) = difference(&wanted, &present) {
            let symbols: Vec<u32> = wanted.get(changed.clone()).unwrap_or_default().concat();
            let (offset, count) = (u8::try_from(changed.start)?, u8::try_from(changed.len())?);
            to.change_keyboard_mapping(count, first + offset, u8::try_from(WIDTH)?, &symbols)?;
        }
    }
    to.flush()?;
    Ok(())
}

/// The first two symbols of each key; more are repetitions of these.
fn rows(map: &GetKeyboardMappingReply) -> Vec<[u32; WIDTH]> {
    let symbol = |row: &[u32], n: usize| row.get(n).copied().unwrap_or(x11rb::NO_SYMBOL);
    let width = usize::from(map.keysyms_per_keycode).max(1);
    map.keysyms.chunks(width).map(|row| [symbol(row, 0), symbol(row, 1)]).collect()
}

/// The smallest range that holds all rows in which two maps differ.
fn difference(one: &[[u32; WIDTH]], other: &[[u32; WIDTH]]) -> Option<Range<usize>> {
    let differs = |&n: &usize| one.get(n) != other.get(n);
    let first = (0..one.len()).find(differs)?;
    let last = (first..one.len()).rfind(differs)?;
    Some(first..last + 1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_symbol_has_a_key_and_some_keys_stay_free() {
        let keys: usize = SPARE.map(Iterator::count).iter().sum();
        // Enough for an alphabet of 32 letters.
        assert!(SYMBOLS.len() + 32 <= keys, "{keys} keys");
        let mut all: Vec<_> = SYMBOLS.iter().flat_map(|&(plain, shifted)| [plain, shifted]).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), SYMBOLS.len() * 2, "a symbol is there twice");
        for letter in "éñßÿ¿Ø".chars() {
            assert!(all.contains(&u32::from(letter)), "{letter}");
        }
    }

    #[test]
    fn only_what_differs_is_handed_on() {
        let map = [[1, 2], [3, 4], [5, 6], [7, 8]];
        assert_eq!(difference(&map, &map), None);
        assert_eq!(difference(&map, &[[1, 2], [0, 4], [5, 6], [7, 0]]), Some(1..4));
        assert_eq!(difference(&map, &[]), Some(0..4));
    }

    #[test]
    fn keys_of_a_keyboard_are_nobodys_concern() {
        let event = |first_keycode, count| MappingNotifyEvent { first_keycode, count, ..Default::default() };
        assert!(!concerns(&event(8, 128)));
        assert!(concerns(&event(8, 248)));
        assert!(concerns(&event(255, 1)));
    }
}
