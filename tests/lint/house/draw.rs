//! Draws random sentences. A reader who has not seen the code marks each sentence as clear or not
//! clear.

use std::path::Path;

use crate::Result;
use crate::sentences;

/// The number of sentences to draw.
const DRAWN: usize = 50;
/// The number of lines to show below a sentence's comment, text or paragraph.
const LINES_BELOW: usize = 10;

/// Prints random sentences from the files of `checkout`, each with its place and the lines below
/// it. The same seed draws the same sentences from the same checkout.
pub(crate) fn print(checkout: &Path, seed: u64) -> Result {
    let mut all = sentences::of_checkout(checkout)?;
    println!("{} sentences; {DRAWN} drawn with seed {seed}", all.len());
    let mut random = Random(seed);
    for number in 1..=DRAWN.min(all.len()) {
        let sentence = all.swap_remove(random.below(all.len()));
        println!(
            "\n{number:2}. {}:{}\n    {}\n",
            sentence.file,
            sentence.line(),
            sentence.text
        );
        let text = std::fs::read_to_string(checkout.join(&sentence.file))?;
        let shown = sentence.lines.len() + LINES_BELOW;
        for line in text.lines().skip(sentence.lines.start).take(shown) {
            println!("      | {line}");
        }
    }
    Ok(())
}

/// The random number generator SplitMix64, from the paper "Fast Splittable Pseudorandom Number
/// Generators" by Steele, Lea and Flood.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        usize::try_from(mixed % limit as u64).unwrap_or_default()
    }
}
