//! The opener policy: which of the μLM's words are said.
//!
//! Four to eight words, ended at a clause boundary where there is one; cut before the first word that the μLM is not sure of, as long as four
//! words stand; silent when it is not sure of them either, or when the cloud is faster. A slow cloud gets a longer opener.

use std::time::Duration;

use crate::ulm::{Stop, text::Word};

/// Fewest words that stand for themselves.
pub const MIN_WORDS: usize = 4;
/// Words that are decided on together, before the first is said: enough to see that the μLM is lost, few enough not to be waited for.
const LOOK_AHEAD: usize = 2;
/// Most words.
pub const MAX_WORDS: usize = 8;

/// What the policy depends on. Log-probabilities are natural.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Most words to say, [`MIN_WORDS`] to [`MAX_WORDS`].
    pub max_words: usize,
    /// A word whose least likely token is below this is not sure.
    pub unsure: f32,
    /// Below this mean over its first two words the μLM keeps silent.
    pub silent: f32,
    /// Words a minute at which the surface takes them: speech, or reading.
    pub words_per_minute: f32,
}

impl Policy {
    /// The usual policy for a surface that takes `words_per_minute`.
    pub fn new(max_words: usize, words_per_minute: f32) -> Self {
        Self {
            max_words: max_words.clamp(MIN_WORDS, MAX_WORDS),
            unsure: -2.5,
            silent: -2.5,
            words_per_minute,
        }
    }

    /// How many words to say at most while the cloud needs `estimate` for its first text: as many as keep the surface busy that long.
    pub fn words_for(&self, estimate: Option<Duration>) -> usize {
        let Some(estimate) = estimate else {
            return self.max_words;
        };
        let words = (estimate.as_secs_f32() * self.words_per_minute / 60.0).ceil() as usize;
        words.clamp(MIN_WORDS, self.max_words)
    }
}

/// Why the opener ended where it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A clause ended.
    Clause,
    /// The next word was not sure.
    Unsure,
    /// As many words as were wanted.
    Length,
    /// The μLM had no more to say.
    Complete,
    /// Silent: it was not sure of its first words.
    Silent,
    /// Silent: the cloud is faster.
    FastCloud,
    /// The words were given on the command line.
    Forced,
}

impl Reason {
    /// Its name in events and spans.
    pub fn name(self) -> &'static str {
        match self {
            Reason::Clause => "clause",
            Reason::Unsure => "unsure",
            Reason::Length => "length",
            Reason::Complete => "complete",
            Reason::Silent => "silent",
            Reason::FastCloud => "fast_cloud",
            Reason::Forced => "forced",
        }
    }
}

/// The finished opener's story.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// Words said.
    pub words: usize,
    /// Why no more.
    pub reason: Reason,
    /// Mean log-probability of the words said; `None` when nothing was said or it is not known.
    pub mean_log_probability: Option<f32>,
}

/// Applies the policy to a stream of words.
#[derive(Clone, Debug)]
pub struct Opener {
    policy: Policy,
    most: usize,
    /// Words that are not said yet.
    held: Vec<Word>,
    said: Vec<f32>,
    /// One of the first four was not sure: four, and no more.
    shaky: bool,
    ended: bool,
}

/// What to do after a word.
#[derive(Clone, Debug, PartialEq)]
pub struct Saying {
    /// Words to say now.
    pub words: Vec<Word>,
    /// The opener ends here.
    pub decision: Option<Decision>,
}

impl Opener {
    /// An opener while the cloud needs `estimate` for its first text.
    pub fn new(policy: Policy, estimate: Option<Duration>) -> Self {
        Self {
            policy,
            most: policy.words_for(estimate),
            held: Vec::new(),
            said: Vec::new(),
            shaky: false,
            ended: false,
        }
    }

    /// Takes the next word.
    pub fn word(&mut self, word: Word) -> Saying {
        if self.ended {
            return Saying {
                words: Vec::new(),
                decision: None,
            };
        }
        if self.said.is_empty() {
            self.held.push(word);
            if self.held.len() < LOOK_AHEAD {
                return Saying {
                    words: Vec::new(),
                    decision: None,
                };
            }
            return self.begin();
        }
        let unsure = word.worst < self.policy.unsure;
        if unsure && self.said.len() >= MIN_WORDS {
            return self.end(Vec::new(), Reason::Unsure);
        }
        self.shaky |= unsure;
        self.say(vec![word])
    }

    /// The μLM ended.
    pub fn end_of_words(&mut self, stop: Stop) -> Saying {
        if self.ended {
            return Saying {
                words: Vec::new(),
                decision: None,
            };
        }
        let reason = if stop == Stop::Complete {
            Reason::Complete
        } else {
            Reason::Length
        };
        let held = std::mem::take(&mut self.held);
        if self.said.is_empty() && (held.is_empty() || mean(&held) < self.policy.silent) {
            return self.end(Vec::new(), Reason::Silent);
        }
        self.end(held, reason)
    }

    /// The first words are there: are they good enough to begin with?
    fn begin(&mut self) -> Saying {
        let held = std::mem::take(&mut self.held);
        if mean(&held) < self.policy.silent {
            return self.end(Vec::new(), Reason::Silent);
        }
        self.shaky = held.iter().any(|word| word.worst < self.policy.unsure);
        self.say(held)
    }

    fn say(&mut self, words: Vec<Word>) -> Saying {
        self.said.extend(words.iter().map(|w| w.log_probability));
        let clause = words.last().is_some_and(|word| ends_clause(&word.text));
        let reason = match () {
            () if self.said.len() < MIN_WORDS => None,
            () if clause => Some(Reason::Clause),
            () if self.said.len() >= self.most => Some(Reason::Length),
            () if self.shaky => Some(Reason::Unsure),
            () => None,
        };
        match reason {
            Some(reason) => {
                let decision = self.decide(reason);
                Saying {
                    words,
                    decision: Some(decision),
                }
            }
            None => Saying { words, decision: None },
        }
    }

    fn end(&mut self, words: Vec<Word>, reason: Reason) -> Saying {
        self.said.extend(words.iter().map(|w| w.log_probability));
        let decision = self.decide(reason);
        Saying {
            words,
            decision: Some(decision),
        }
    }

    fn decide(&mut self, reason: Reason) -> Decision {
        self.ended = true;
        let words = self.said.len();
        let mean = (words > 0).then(|| self.said.iter().sum::<f32>() / words as f32);
        Decision {
            words,
            reason,
            mean_log_probability: mean,
        }
    }
}

fn mean(words: &[Word]) -> f32 {
    words.iter().map(|w| w.log_probability).sum::<f32>() / words.len().max(1) as f32
}

/// Whether a word ends a sentence, in any script's punctuation.
pub fn ends_sentence(word: &str) -> bool {
    bare(word).ends_with(['.', '!', '?', '…', '。', '！', '？', '؟', '।'])
}

/// A word without the quotes and brackets that close after it.
fn bare(word: &str) -> &str {
    word.trim_end()
        .trim_end_matches(['"', '”', '’', '\'', ')', '»', '」', '）'])
}

/// Whether a word ends a clause, in any script's punctuation.
fn ends_clause(word: &str) -> bool {
    bare(word).ends_with([
        '.', ',', ';', ':', '!', '?', '…', '—', '。', '，', '、', '！', '？', '；', '：', '،', '؛', '؟', '।',
    ])
}

#[cfg(test)]
#[path = "opener_tests.rs"]
mod tests;
