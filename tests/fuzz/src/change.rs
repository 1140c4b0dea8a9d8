//! Random changes of an input.

/// The longest input that the engine makes, in bytes.
const INPUT_BYTES: usize = 64 * 1024;

/// The longest run of bytes that one change inserts, copies or removes.
const RUN_BYTES: usize = 64;

/// Values at which integer arithmetic often goes wrong.
const BOUNDARIES: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    u64::MAX,
];

/// Numbers in decimal at which parsers often go wrong.
const DECIMALS: [&str; 10] = [
    "-1",
    "0",
    "00",
    "65536",
    "2147483648",
    "4294967295",
    "4294967296",
    "9223372036854775808",
    "18446744073709551616",
    "1e999",
];

/// A generator of pseudo-random numbers (xorshift64). The same seed gives the same numbers.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Numbers {
        // The multiplication spreads small seeds over all bits. The state must not be 0.
        Numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Returns a number below `limit`, or 0 if `limit` is 0.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from((self.0 >> 11) % limit.max(1) as u64).unwrap_or(0)
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).unwrap_or(0)
    }

    pub(crate) fn choose<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        all.get(self.below(all.len()))
    }
}

/// Returns an input that is made from inputs of the corpus with one to eight random changes.
pub(crate) fn changed(corpus: &[Vec<u8>], numbers: &mut Numbers) -> Vec<u8> {
    let mut input = numbers.choose(corpus).cloned().unwrap_or_default();
    for _ in 0..=numbers.below(8) {
        change(&mut input, corpus, numbers);
    }
    input.truncate(INPUT_BYTES);
    input
}

fn change(input: &mut Vec<u8>, corpus: &[Vec<u8>], numbers: &mut Numbers) {
    let at = numbers.below(input.len() + 1);
    let length = 1 + numbers.below(RUN_BYTES);
    let end = (at + length).min(input.len());
    match numbers.below(11) {
        0 if at < input.len() => input[at] ^= 1 << numbers.below(8),
        1 if at < input.len() => input[at] = numbers.byte(),
        2 => input.truncate(at),
        3 => drop(input.drain(at..end)),
        4 => drop(input.splice(
            at..at,
            (0..length).map(|_| numbers.byte()).collect::<Vec<_>>(),
        )),
        5 => {
            let copy = input[at..end].to_vec();
            let to = numbers.below(input.len() + 1);
            input.splice(to..to, copy);
        }
        6 => {
            let value = numbers.choose(&BOUNDARIES).copied().unwrap_or(0);
            let width = 1 << numbers.below(4);
            let bytes = if numbers.below(2) == 0 {
                value.to_le_bytes()[..width].to_vec()
            } else {
                value.to_be_bytes()[8 - width..].to_vec()
            };
            overwrite(input, at, &bytes);
        }
        7 => replace_number(input, numbers),
        8 | 9 => {
            // A part of another input, for example a token or a whole record.
            let other = numbers.choose(corpus).map_or(&[][..], Vec::as_slice);
            let from = numbers.below(other.len() + 1);
            let to = (from + 1 + numbers.below(4 * RUN_BYTES)).min(other.len());
            let replaced = if numbers.below(2) == 0 { at } else { end };
            input.splice(at..replaced, other[from..to].iter().copied());
        }
        _ => {
            // Repeats one piece often, for example brackets that open a nested object.
            let piece = input[at..end.min(at + 8)].to_vec();
            let repeated = piece.repeat(1 + numbers.below(200));
            input.splice(at..at, repeated);
        }
    }
}

fn overwrite(input: &mut [u8], at: usize, bytes: &[u8]) {
    for (target, byte) in input.iter_mut().skip(at).zip(bytes) {
        *target = *byte;
    }
}

/// Replaces one decimal number of the input with another number.
fn replace_number(input: &mut Vec<u8>, numbers: &mut Numbers) {
    let start = numbers.below(input.len() + 1);
    let Some(first) = (start..input.len()).find(|at| input[*at].is_ascii_digit()) else {
        return;
    };
    let end = (first..input.len())
        .find(|at| !input[*at].is_ascii_digit())
        .unwrap_or(input.len());
    let number = numbers.choose(&DECIMALS).copied().unwrap_or_default();
    input.splice(first..end, number.bytes());
}
