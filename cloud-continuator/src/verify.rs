//! The verdict on an opener: would the large model have said this?

use segue_shared::words;

use crate::{
    backend::{Input, TokenScore},
    judge::{self, Control, ControlLine},
};

/// Judges one opener.
pub trait Verifier: Send + Sync {
    /// What the backend is to be asked about a committed opener.
    fn question(&self, opener: &str) -> Input;

    /// Takes the backend's answer, piece by piece, until there is a judgement.
    fn answer(&mut self, opener: &str, answer: Answer<'_>) -> Option<Judged>;
}

/// A piece of a backend's answer.
#[derive(Clone, Copy, Debug)]
pub enum Answer<'a> {
    /// How probable it finds the opener's tokens.
    Scores(&'a [TokenScore]),
    /// Text that it generates.
    Text(&'a str),
    /// It has no more to say.
    End,
}

/// A verifier's result.
#[derive(Clone, Debug, PartialEq)]
pub struct Judged {
    /// The verdict.
    pub verdict: Verdict,
    /// What a judge decided itself, and the text that it went on with accordingly.
    pub spoken: Option<(Control, String)>,
}

/// Which verifier to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// `likelihood` where the backend scores openers (the embedded engine does), else `judge`.
    #[default]
    Auto,
    /// By the large model's log-probabilities of the opener's words; costs nothing, as they are read anyway. Openers are accepted where
    /// the backend does not score them.
    Likelihood,
    /// By asking the large model for a control line; for models that follow instructions well.
    Judge,
}

impl Kind {
    /// What it means for a backend that scores openers, or does not.
    pub fn for_backend(self, scores: bool) -> Self {
        match (self, scores) {
            (Kind::Auto, true) => Kind::Likelihood,
            (Kind::Auto, false) => Kind::Judge,
            (chosen, _) => chosen,
        }
    }

    /// A verifier of this kind.
    pub fn verifier(self, thresholds: Thresholds) -> Box<dyn Verifier> {
        match self {
            Kind::Auto | Kind::Likelihood => Box::new(Likelihood(thresholds)),
            Kind::Judge => Box::new(Judge::default()),
        }
    }
}

/// Compares the opener's log-probabilities with thresholds.
#[derive(Clone, Copy, Debug)]
pub struct Likelihood(pub Thresholds);

impl Verifier for Likelihood {
    fn question(&self, opener: &str) -> Input {
        Input::Commit(opener.to_owned())
    }

    fn answer(&mut self, opener: &str, answer: Answer<'_>) -> Option<Judged> {
        let Answer::Scores(scores) = answer else { return None };
        Some(Judged {
            verdict: likelihood(opener, scores, &self.0),
            spoken: None,
        })
    }
}

/// Reads the control line of a judge's reply.
#[derive(Clone, Debug, Default)]
pub struct Judge(ControlLine);

impl Verifier for Judge {
    fn question(&self, opener: &str) -> Input {
        Input::Judge(opener.to_owned())
    }

    fn answer(&mut self, opener: &str, answer: Answer<'_>) -> Option<Judged> {
        let (control, text) = match answer {
            Answer::Scores(_) => return None,
            Answer::Text(text) => self.0.push(text, false)?,
            Answer::End => self.0.push("", true)?,
        };
        Some(Judged {
            verdict: judge::verdict(control, opener),
            spoken: Some((control, text)),
        })
    }
}

/// When a word counts as wrong. All are natural-log probabilities; the defaults were chosen with `make eval` (see the README's
/// section on directives) so that at most 5 % of good openers are corrected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Thresholds {
    /// A word is wrong when its least likely token is less likely than this.
    pub word: f32,
    /// An opener is wrong as a whole when its tokens' mean is less likely than this.
    pub mean: f32,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self { word: -7.5, mean: -2.8 }
    }
}

/// What the verifier found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// The large model might have said this.
    Accept,
    /// It would not.
    Wrong {
        /// Words before the first wrong one.
        good_words: usize,
        /// Where the last good word ends, in bytes of the opener.
        good_bytes: usize,
        /// It found the opener unlikely as a whole.
        off_topic: bool,
    },
}

/// Judges `opener` by the large model's log-probabilities of its tokens.
pub fn likelihood(opener: &str, scores: &[TokenScore], thresholds: &Thresholds) -> Verdict {
    let words = words::ranges(opener);
    if words.is_empty() || scores.is_empty() {
        return Verdict::Accept;
    }
    let worst = worst_per_word(&words, scores);
    let mean = scores.iter().map(|s| s.log_probability).sum::<f32>() / scores.len() as f32;
    let off_topic = mean < thresholds.mean;
    let first = worst.iter().position(|w| *w < thresholds.word);
    let wrong = match first {
        Some(n) => n,
        // Unlikely all over, no word much more than the others: the least likely one is where it went wrong.
        None if off_topic => (0..worst.len())
            .min_by(|a, b| worst[*a].total_cmp(&worst[*b]))
            .unwrap_or(0),
        None => return Verdict::Accept,
    };
    let good_bytes = wrong.checked_sub(1).map_or(0, |last| words[last].end);
    Verdict::Wrong {
        good_words: wrong,
        good_bytes,
        off_topic,
    }
}

/// Each word's least likely token. A token belongs to the word in which its text ends (or to the last one).
pub fn worst_per_word(words: &[std::ops::Range<usize>], scores: &[TokenScore]) -> Vec<f32> {
    let mut worst = vec![0.0f32; words.len()];
    for score in scores {
        let n = words.iter().position(|w| score.end <= w.end).unwrap_or(words.len() - 1);
        worst[n] = worst[n].min(score.log_probability);
    }
    worst
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(text: &str, values: &[(usize, f32)]) -> Vec<TokenScore> {
        assert_eq!(values.last().unwrap().0, text.len());
        values
            .iter()
            .map(|(end, p)| TokenScore {
                end: *end,
                log_probability: *p,
                rank: 0,
            })
            .collect()
    }

    const T: Thresholds = Thresholds { word: -8.0, mean: -4.0 };

    #[test]
    fn the_first_wrong_word_is_found() {
        let text = "It is Sydney and";
        let good = scores(text, &[(2, -1.0), (5, -1.0), (9, -2.0), (12, -0.1), (16, -3.0)]);
        assert_eq!(likelihood(text, &good, &T), Verdict::Accept);
        let bad = scores(text, &[(2, -1.0), (5, -1.0), (9, -2.0), (12, -9.0), (16, -9.0)]);
        assert_eq!(
            likelihood(text, &bad, &T),
            Verdict::Wrong {
                good_words: 2,
                good_bytes: 5,
                off_topic: true
            }
        );
    }

    #[test]
    fn an_opener_may_be_wrong_as_a_whole() {
        let text = "Blue cats fly";
        let bad = scores(text, &[(4, -5.0), (9, -6.0), (13, -5.0)]);
        assert_eq!(
            likelihood(text, &bad, &T),
            Verdict::Wrong {
                good_words: 1,
                good_bytes: 4,
                off_topic: true
            }
        );
    }

    #[test]
    fn nothing_to_judge_is_accepted() {
        assert_eq!(likelihood("", &[], &T), Verdict::Accept);
        assert_eq!(likelihood("...", &scores("...", &[(3, -30.0)]), &T), Verdict::Accept);
        assert_eq!(likelihood("Yes", &scores("Yes", &[(3, -2.0)]), &T), Verdict::Accept);
        assert_eq!(
            likelihood("Yes", &scores("Yes", &[(3, -20.0)]), &T),
            Verdict::Wrong {
                good_words: 0,
                good_bytes: 0,
                off_topic: true
            }
        );
    }
}
