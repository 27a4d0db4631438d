//! Broken inputs at every place that decodes one: bytes that were good once, changed a little, thousands a second.
//!
//! What made a target panic is kept in `tests/corpus/TARGET/` and tried first from then on.

mod cloud;
mod edge;
mod shared;

use std::{
    collections::hash_map::DefaultHasher,
    hash::{Hash, Hasher},
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    time::{Duration, Instant},
};

use crate::programs::root;

/// A place that decodes.
pub struct Target {
    /// What it decodes.
    pub name: &'static str,
    /// Good inputs to begin with.
    pub seeds: Vec<Vec<u8>>,
    /// Words of its language.
    pub words: &'static [&'static str],
    /// Its share of all executions, in thousandths.
    pub share: u64,
    /// Decodes; whatever it returns or refuses is right, unless it panics.
    pub run: Decode,
}

/// Decodes an input and drops what comes of it.
pub type Decode = Box<dyn FnMut(&[u8])>;

/// How it went at a target.
pub struct Result {
    /// Inputs tried.
    pub executions: u64,
    /// Inputs that made it panic.
    pub panics: u64,
    /// Time for all.
    pub time: Duration,
}

/// All targets.
pub fn targets() -> Vec<Target> {
    [shared::targets(), cloud::targets(), edge::targets()]
        .into_iter()
        .flatten()
        .collect()
}

/// Numbers that look random and are the same for the same seed (splitmix64).
pub struct Dice(pub u64);

impl Dice {
    /// A number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit.max(1) as u64) as usize
    }
}

/// Tries the target's corpus, and then `executions` changed inputs.
pub fn run(target: &mut Target, executions: u64, seed: u64) -> Result {
    let started = Instant::now();
    let folder = root().join("tests/corpus").join(target.name);
    let mut inputs = target.seeds.clone();
    for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
        inputs.extend(std::fs::read(entry.path()));
    }
    let mut panics = 0;
    let mut attempt = |input: &[u8]| {
        if catch_unwind(AssertUnwindSafe(|| (target.run)(input))).is_err() {
            panics += 1;
            if panics <= 10 {
                keep(&folder, input);
            }
        }
    };
    inputs.iter().for_each(|input| attempt(input));
    let mut dice = Dice(seed);
    for _ in 0..executions {
        let mut input = inputs[dice.below(inputs.len())].clone();
        for _ in 0..1 + dice.below(6) {
            change(&mut input, &inputs, target.words, &mut dice);
        }
        input.truncate(1 << 16);
        attempt(&input);
    }
    Result {
        executions: executions + inputs.len() as u64,
        panics,
        time: started.elapsed(),
    }
}

fn keep(folder: &PathBuf, input: &[u8]) {
    let mut hasher = DefaultHasher::new();
    input.hash(&mut hasher);
    let path = folder.join(format!("{:016x}", hasher.finish()));
    let kept = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&path, input));
    if let Err(error) = kept {
        panic!("{} cannot be kept: {error}", path.display());
    }
}

/// One change of the kinds that find most: bits, bytes, numbers, pieces left out, doubled, moved, and words of the language.
fn change(input: &mut Vec<u8>, others: &[Vec<u8>], words: &[&str], dice: &mut Dice) {
    let at = dice.below(input.len() + 1);
    let end = (at + 1 + dice.below(16)).min(input.len());
    match dice.below(9) {
        0 if at < input.len() => input[at] ^= 1 << dice.below(8),
        1 if at < input.len() => input[at] = [0, 1, 0x7f, 0x80, 0xff, b'"', b'\n', b'{', b'-'][dice.below(9)],
        2 => input.insert(at, dice.below(256) as u8),
        3 if at < end => drop(input.drain(at..end)),
        4 if at < end => {
            let piece = input[at..end].to_vec();
            input.splice(at..at, piece);
        }
        5 => {
            let other = &others[dice.below(others.len())];
            let from = dice.below(other.len() + 1);
            let until = (from + dice.below(64)).min(other.len());
            input.splice(at..at, other[from..until].iter().copied());
        }
        6 if !words.is_empty() => {
            let word = words[dice.below(words.len())];
            input.splice(at..end.max(at), word.bytes());
        }
        7 => {
            let number = ["0", "-1", "4294967296", "18446744073709551616", "1e400", "NaN", "0.1"][dice.below(7)];
            input.splice(at..at, number.bytes());
        }
        _ => input.truncate(at.max(input.len() / 2)),
    }
}

/// A text out of bytes, in pieces wherever a byte is 0.
fn text_pieces(input: &[u8]) -> Vec<String> {
    input
        .split(|byte| *byte == 0)
        .map(|piece| String::from_utf8_lossy(piece).into_owned())
        .collect()
}
