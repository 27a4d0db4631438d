//! From a verdict to a directive, and the words of a bridge.

use segue_shared::{
    proto::Tone,
    reply_log::{Correction, Surface},
};

use crate::{backend::Message, verify::Verdict};

/// Which directives may be used, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Whether openers are judged at all.
    pub verify: bool,
    /// Whether the tail of an opener may be replaced.
    pub revise: bool,
    /// Whether an opener may be dropped whole.
    pub restart: bool,
    /// Good words that the head must have for the rest to be revised; with fewer there is nothing worth keeping.
    pub head_words: usize,
    /// The manner of bridges, where the turn does not say.
    pub tone: Tone,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            verify: true,
            revise: true,
            restart: true,
            head_words: 2,
            tone: Tone::Neutral,
        }
    }
}

/// The directive for a verdict, or `None` to go on: `revise` if the head is good, else `restart`, else `bridge`; on an append-only surface
/// only what was not `heard` yet (in bytes) may be taken back.
pub fn directive(verdict: Verdict, surface: Surface, heard: usize, settings: &Settings) -> Option<Correction> {
    let Verdict::Wrong {
        good_words, good_bytes, ..
    } = verdict
    else {
        return None;
    };
    let may_keep = |keep: usize| surface == Surface::Revisable || heard <= keep;
    if settings.revise && good_words >= settings.head_words.max(1) && may_keep(good_bytes) {
        Some(Correction::Revise { keep: good_bytes })
    } else if settings.restart && may_keep(0) {
        Some(Correction::Restart)
    } else {
        Some(Correction::Bridge)
    }
}

/// Self-repairs, at most 12 words each. They go on from any words, name no mistake, and leave the sentence open for the answer.
const NEUTRAL: &[&str] = &[
    "— or rather:",
    "— let me put that better:",
    "— actually, let me start again:",
    "— to be more precise:",
    "— let me rephrase that:",
];
const APOLOGETIC: &[&str] = &[
    "— sorry, let me put that right:",
    "— pardon me, let me try that again:",
    "— my apologies, what I mean is this:",
    "— excuse me, let me rephrase:",
    "— sorry, here is what I mean:",
];
const PLAYFUL: &[&str] = &[
    "— oops, my tongue was faster than my brain:",
    "— hold on, second try:",
    "— whoa, wrong turn, here we go:",
    "— hmm, let me rewind the tape:",
    "— wait, plot twist:",
];

/// The set of bridges for a tone.
pub fn bridges(tone: Tone) -> &'static [&'static str] {
    match tone {
        Tone::Unspecified | Tone::Neutral => NEUTRAL,
        Tone::Apologetic => APOLOGETIC,
        Tone::Playful => PLAYFUL,
    }
}

/// The next bridge of a conversation: never the one that it heard last. `turn` spreads the first choice.
pub fn bridge(tone: Tone, history: &[Message], turn: u64) -> &'static str {
    let set = bridges(tone);
    let last = history.iter().rev().filter(|m| m.assistant).find_map(|m| {
        set.iter()
            .enumerate()
            .filter_map(|(n, b)| Some((m.text.rfind(b)?, n)))
            .max()
            .map(|(_, n)| n)
    });
    set[last.map_or(turn as usize, |n| n + 1) % set.len()]
}

#[cfg(test)]
mod tests {
    use segue_shared::words;

    use super::*;

    /// Every verdict x surface x heard x settings, against the rule written the other way round: by what it forbids.
    #[test]
    fn the_whole_table() {
        let opener = 20usize;
        for surface in [Surface::Revisable, Surface::AppendOnly] {
            for heard in 0..=opener {
                for bits in 0..8u8 {
                    for good_words in 0..=8usize {
                        let (revise, restart, off_topic) = (bits & 1 > 0, bits & 2 > 0, bits & 4 > 0);
                        let good_bytes = good_words * 2;
                        let settings = Settings {
                            revise,
                            restart,
                            ..Settings::default()
                        };
                        let verdict = Verdict::Wrong {
                            good_words,
                            good_bytes,
                            off_topic,
                        };
                        let found =
                            directive(verdict, surface, heard, &settings).expect("a wrong opener is never passed over");
                        let kept = found.kept(opener);
                        if surface == Surface::AppendOnly {
                            assert!(kept >= heard, "what was heard is never taken back");
                        }
                        let free = |keep| surface == Surface::Revisable || heard <= keep;
                        let expected = if revise && good_words >= 2 && free(good_bytes) {
                            Correction::Revise { keep: good_bytes }
                        } else if restart && free(0) {
                            Correction::Restart
                        } else {
                            Correction::Bridge
                        };
                        assert_eq!(found, expected);
                        assert_eq!(directive(Verdict::Accept, surface, heard, &settings), None);
                    }
                }
            }
        }
    }

    #[test]
    fn bridges_are_short_and_name_no_mistake() {
        for tone in [Tone::Neutral, Tone::Apologetic, Tone::Playful] {
            assert!(bridges(tone).len() >= 4);
            for bridge in bridges(tone) {
                assert!(words::count(bridge) <= 12, "{bridge}");
                assert!(
                    !["mistake", "incorrect", "error", "false"]
                        .iter()
                        .any(|w| bridge.contains(w)),
                    "{bridge}"
                );
            }
        }
    }

    #[test]
    fn a_bridge_never_comes_twice_in_a_row() {
        for tone in [Tone::Neutral, Tone::Apologetic, Tone::Playful] {
            let mut history: Vec<Message> = Vec::new();
            let mut last = "";
            for turn in 1..30 {
                let next = bridge(tone, &history, turn);
                assert_ne!(next, last);
                last = next;
                history.push(Message {
                    assistant: false,
                    text: "?".into(),
                });
                history.push(Message {
                    assistant: true,
                    text: format!("It is {next} no."),
                });
                // Turns without a bridge in between change nothing.
                history.push(Message {
                    assistant: true,
                    text: "Fine.".into(),
                });
            }
        }
    }
}
