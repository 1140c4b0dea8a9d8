//! Runs the fuzz target of the SPDY parser as an ordinary test. The inputs are the target's corpus
//! and random changes of the corpus.

use std::path::Path;

use rrun_streams::spdy;

include!("../fuzz/exercise.rs");

/// The number of inputs that the test makes by changing files of the corpus. The test makes the
/// same number of inputs from each file.
const CHANGES: usize = 52_000;

fn corpus() -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/spdy");
    let mut paths: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    paths
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect()
}

/// A generator of pseudo-random numbers that returns the same sequence each time (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit.max(1) as u64).unwrap()
    }
}

#[test]
fn the_corpus_causes_no_panic() {
    let corpus = corpus();
    assert!(corpus.len() >= 8);
    for input in corpus {
        exercise(&input);
    }
}

#[test]
fn random_changes_of_the_corpus_cause_no_panic() {
    let corpus = corpus();
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for input in &corpus {
        for _ in 0..CHANGES.div_ceil(corpus.len()) {
            let mut changed = input.clone();
            for _ in 0..=numbers.below(6) {
                let at = numbers.below(changed.len());
                match numbers.below(5) {
                    0 => changed[at] ^= 1 << numbers.below(8),
                    1 => changed[at] = u8::try_from(numbers.below(256)).unwrap(),
                    2 => changed.truncate(at + 1),
                    3 => {
                        let other = &corpus[numbers.below(corpus.len())];
                        let from = numbers.below(other.len());
                        changed.extend_from_slice(&other[from..]);
                    }
                    _ => {
                        let length = numbers.below(changed.len() - at);
                        changed.drain(at..at + length);
                    }
                }
                if changed.is_empty() {
                    break;
                }
            }
            exercise(&changed);
        }
    }
}
