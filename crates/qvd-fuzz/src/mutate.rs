//! Inputs from inputs.

use rand::{Rng, SeedableRng, rngs::StdRng};

/// Longest input in bytes.
const MAX_BYTES: usize = 64 << 10;
/// Numbers that lengths and offsets go wrong at.
const NUMBERS: [u64; 10] =
    [0, 1, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 0x7fff_ffff_ffff_ffff, u64::MAX];

/// The input of this number: one of the seeds, changed in one to eight places.
/// The same number and seeds give the same input.
#[must_use]
pub fn mutated(seeds: &[Vec<u8>], number: u64) -> Vec<u8> {
    let mut random = StdRng::seed_from_u64(number);
    let mut pick = |from: &[Vec<u8>]| match from.len() {
        0 => Vec::new(),
        len => from.get(random.random_range(0..len)).cloned().unwrap_or_default(),
    };
    let (mut input, other) = (pick(seeds), pick(seeds));
    for _ in 0..random.random_range(1..=8) {
        change(&mut input, &other, &mut random);
    }
    input.truncate(MAX_BYTES);
    input
}

fn change(input: &mut Vec<u8>, other: &[u8], random: &mut StdRng) {
    let at = random.random_range(0..=input.len());
    // Short pieces are likelier: most fields are short.
    let len = 1 << random.random_range(0..10);
    let end = (at + len).min(input.len());
    match random.random_range(0..9) {
        0 => flip(input, at, 1 << random.random_range(0..8)),
        1 => flip(input, at, random.random()),
        2 => drop(input.drain(at..end)),
        3 => {
            let piece = input.get(at..end).unwrap_or_default().to_vec();
            let to = random.random_range(0..=input.len());
            drop(input.splice(to..to, piece));
        }
        4 => {
            let from = random.random_range(0..=other.len());
            let piece = other.get(from..(from + len).min(other.len())).unwrap_or_default().to_vec();
            drop(input.splice(at..end, piece));
        }
        5 => {
            let number = NUMBERS.get(random.random_range(0..NUMBERS.len())).copied().unwrap_or(0);
            let width = 1 << random.random_range(0..4);
            let bytes = if random.random() { number.to_le_bytes() } else { number.to_be_bytes() };
            let bytes = if bytes == number.to_le_bytes() { bytes.get(..width) } else { bytes.get(8 - width..) };
            drop(input.splice(at..(at + width).min(input.len()), bytes.unwrap_or_default().to_vec()));
        }
        // A number that is written in digits.
        6 => {
            if let Some(digits) = input.iter().skip(at).position(u8::is_ascii_digit).map(|skip| at + skip) {
                let end =
                    input.iter().skip(digits).position(|b| !b.is_ascii_digit()).map_or(input.len(), |n| digits + n);
                let number = NUMBERS.get(random.random_range(0..NUMBERS.len())).copied().unwrap_or(0);
                drop(input.splice(digits..end, number.to_string().into_bytes()));
            }
        }
        7 => input.truncate(at),
        _ => drop(input.splice(at..at, vec![random.random(); len])),
    }
}

fn flip(input: &mut [u8], at: usize, bits: u8) {
    if let Some(byte) = input.get_mut(at) {
        *byte ^= bits;
    }
}
