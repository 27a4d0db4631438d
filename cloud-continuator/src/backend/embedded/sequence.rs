//! What one sequence of the KV cache holds, and what it should hold: pure bookkeeping.

use crate::backend::TokenScore;

/// A token of the large model.
pub type Token = i32;

/// One sequence: a prompt, then the reply's tokens.
///
/// The cache is brought from what it holds (`cached`) to what is wanted (`target`) by cutting it back to their common head and decoding the
/// rest. Opener deltas, commits, directives and generated tokens are all such changes of the target.
#[derive(Debug, Default)]
pub struct Sequence {
    cached: Vec<Token>,
    target: Vec<Token>,
    /// Where the reply's tokens begin in `target`.
    reply_at: usize,
    /// Per reply token that came as text: the byte of the reply text where it ends.
    ends: Vec<usize>,
    /// Per reply token, as far as known.
    scores: Vec<TokenScore>,
    /// Logits after the last token, once the whole target is cached.
    tail: Option<Vec<f32>>,
}

impl Sequence {
    /// Tokens in the cache.
    pub fn cached(&self) -> &[Token] {
        &self.cached
    }

    /// Tokens still to be decoded.
    pub fn pending(&self) -> &[Token] {
        &self.target[self.cached.len()..]
    }

    /// Scores of the reply's tokens; complete when nothing is pending.
    pub fn scores(&self) -> &[TokenScore] {
        &self.scores
    }

    /// Logits after the last token, when everything is cached.
    pub fn tail(&self) -> Option<&[f32]> {
        self.tail.as_deref()
    }

    /// The cache now holds just `tokens` (they were copied from another sequence).
    pub fn seed(&mut self, tokens: &[Token]) {
        *self = Self {
            cached: tokens.to_vec(),
            target: tokens.to_vec(),
            ..Self::default()
        };
    }

    /// How many of `tokens` the cache begins with.
    pub fn common(&self, tokens: &[Token]) -> usize {
        self.cached.iter().zip(tokens).take_while(|(a, b)| a == b).count()
    }

    /// Wants `prompt` and then `reply` (tokens, each with the byte where it ends). Returns how many cached tokens stay: the caller cuts the
    /// cache there.
    pub fn retarget(&mut self, prompt: &[Token], reply: &[(Token, usize)]) -> usize {
        let target: Vec<Token> = prompt.iter().copied().chain(reply.iter().map(|r| r.0)).collect();
        let mut keep = self.common(&target);
        let reply_at = prompt.len();
        // Scores are valid for reply tokens whose whole context stays.
        let unchanged = self.reply_at == reply_at;
        self.scores
            .truncate(if unchanged { keep.saturating_sub(reply_at) } else { 0 });
        // A reply token that was generated, not given, has no score: it is read again.
        keep = keep.min(reply_at + self.scores.len());
        let tail = self.tail.take().filter(|_| keep == self.cached.len());
        (self.target, self.reply_at) = (target, reply_at);
        self.ends = reply.iter().map(|r| r.1).collect();
        match tail {
            Some(tail) if keep == self.target.len() => self.tail = Some(tail),
            Some(tail) => self.score(keep, &tail),
            // The next token's score, or the next token, needs the logits after the last one that stays: decode it again.
            None if keep >= reply_at || keep == self.target.len() => keep = keep.saturating_sub(1),
            None => {}
        }
        self.cached.truncate(keep);
        keep
    }

    /// The cache was lost: everything is pending again.
    pub fn forget(&mut self) {
        self.cached.clear();
        self.tail = None;
        self.scores.clear();
    }

    /// Whether the logits after the token at `index` are needed.
    pub fn needs_logits(&self, index: usize) -> bool {
        index + 1 >= self.reply_at
    }

    /// The next `count` pending tokens were decoded.
    pub fn decoded(&mut self, count: usize) {
        let from = self.cached.len();
        self.cached.extend_from_slice(&self.target[from..from + count]);
    }

    /// The logits after the token at `index` are known.
    pub fn logits(&mut self, index: usize, logits: &[f32]) {
        if index + 1 == self.target.len() {
            self.tail = Some(logits.to_vec());
        } else {
            self.score(index + 1, logits);
        }
    }

    /// Appends a generated token.
    pub fn push(&mut self, token: Token) {
        self.target.push(token);
        self.tail = None;
    }

    fn score(&mut self, index: usize, logits: &[f32]) {
        let Some(n) = index
            .checked_sub(self.reply_at)
            .filter(|n| *n == self.scores.len() && *n < self.ends.len())
        else {
            return;
        };
        let (log_probability, rank) = rate(logits, self.target[index]);
        self.scores.push(TokenScore {
            end: self.ends[n],
            log_probability,
            rank,
        });
    }
}

/// A token's log-probability, and how many tokens are likelier.
pub fn rate(logits: &[f32], token: Token) -> (f32, u32) {
    let own = logits[token as usize];
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|l| (l - top).exp()).sum();
    (own - top - sum.ln(), logits.iter().filter(|l| **l > own).count() as u32)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Logits that depend on everything before them, as a model's do.
    fn logits_after(tokens: &[Token]) -> Vec<f32> {
        let seed = tokens
            .iter()
            .fold(17u64, |h, t| h.wrapping_mul(31).wrapping_add(*t as u64 + 1));
        (0..8u64)
            .map(|n| (seed.wrapping_mul(n + 3) % 97) as f32 / 10.0)
            .collect()
    }

    fn decode(sequence: &mut Sequence, most: usize) {
        let count = sequence.pending().len().min(most);
        let from = sequence.cached().len();
        sequence.decoded(count);
        for index in from..from + count {
            if sequence.needs_logits(index) {
                let logits = logits_after(&sequence.cached()[..=index]);
                sequence.logits(index, &logits);
            }
        }
    }

    proptest! {
        /// Whatever way the target took, scores and tail are those of decoding the final text in one go.
        #[test]
        fn the_way_does_not_matter(
            prompt in prop::collection::vec(0..8i32, 1..6),
            targets in prop::collection::vec((prop::collection::vec(0..4i32, 0..6), 0..4usize, 0..3usize), 1..8),
        ) {
            let reply = |tokens: &[Token]| tokens.iter().enumerate().map(|(n, t)| (*t, n + 1)).collect::<Vec<_>>();
            let mut sequence = Sequence::default();
            for (tokens, most, generated) in &targets {
                let keep = sequence.retarget(&prompt, &reply(tokens));
                prop_assert_eq!(keep, sequence.cached().len());
                decode(&mut sequence, *most);
                for token in 0..*generated {
                    if sequence.tail().is_some() {
                        sequence.push(token as i32);
                        decode(&mut sequence, 1);
                    }
                }
            }
            let last = &targets.last().unwrap().0;
            sequence.retarget(&prompt, &reply(last));
            decode(&mut sequence, usize::MAX);
            let mut whole = Sequence::default();
            whole.retarget(&prompt, &reply(last));
            decode(&mut whole, usize::MAX);
            prop_assert_eq!(sequence.scores().len(), last.len());
            prop_assert_eq!(sequence.scores(), whole.scores());
            prop_assert_eq!(sequence.tail(), whole.tail());
            prop_assert!(sequence.tail().is_some());
        }
    }

    #[test]
    fn rating_is_a_log_softmax() {
        let (log_probability, rank) = rate(&[0.0, 0.0, 0.0, 0.0], 2);
        assert!((log_probability + 4f32.ln()).abs() < 1e-6);
        assert_eq!(rank, 0);
        assert_eq!(rate(&[3.0, 1.0, 2.0], 1).1, 2);
    }
}
