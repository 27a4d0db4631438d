//! The μLM's part of a turn: the opener, or a whole short reply when there is nobody else.

use std::{ops::ControlFlow, time::Duration};

use segue_shared::words;
use tokio::sync::mpsc;

use super::Options;
use crate::{
    opener::{Decision, Opener, Reason, ends_sentence},
    ulm::{Engine, Generate, Step, text::Word},
};

/// Tokens that the μLM may spend on an opener.
const OPENER_TOKENS: usize = 32;
/// Tokens of a reply that the μLM gives alone, and words after which it ends with the sentence. A small model that goes on for longer
/// says less and less.
const ALONE: (usize, usize) = (64, 12);

/// What the μLM says.
#[derive(Debug)]
pub(super) enum Said {
    /// A word, with the white space before it.
    Word(String),
    /// The opener is complete.
    Done(Decision),
    /// The reply that it gave alone is complete.
    AloneDone,
}

/// Starts the opener; its words come through the returned channel, which an opener cannot fill. `estimate` is the cloud's time to its
/// first text, `own` the μLM's to its first word.
pub(super) fn open(
    engine: &Engine,
    question: &str,
    options: &Options,
    estimate: Option<Duration>,
    own: Option<Duration>,
) -> mpsc::Receiver<Said> {
    let forced = options.forced_opener.as_deref().map_or(0, words::count);
    let (say, said) = mpsc::channel((2 * OPENER_TOKENS).max(forced + 1));
    if let Some(forced) = &options.forced_opener {
        for word in split_words(forced) {
            let _ = say.try_send(Said::Word(word));
        }
        let _ = say.try_send(Said::Done(without_model(words::count(forced), Reason::Forced)));
        return said;
    }
    if estimate.zip(own).is_some_and(|(cloud, own)| cloud < own) {
        let _ = say.try_send(Said::Done(without_model(0, Reason::FastCloud)));
        return said;
    }
    let mut opener = Opener::new(options.policy, estimate);
    let request = Generate {
        question: question.to_owned(),
        said: String::new(),
        sampling: options.sampling,
        max_tokens: OPENER_TOKENS,
    };
    let sink = move |step| {
        if say.is_closed() {
            return ControlFlow::Break(()); // the turn is over
        }
        let saying = match step {
            Step::Word(word) => opener.word(word),
            Step::End { stop, .. } => opener.end_of_words(stop),
        };
        for Word { text, .. } in saying.words {
            let _ = say.try_send(Said::Word(text));
        }
        match saying.decision {
            Some(decision) => {
                let _ = say.try_send(Said::Done(decision));
                ControlFlow::Break(())
            }
            None => ControlFlow::Continue(()),
        }
    };
    engine.generate(request, Box::new(sink));
    said
}

fn without_model(words: usize, reason: Reason) -> Decision {
    Decision {
        words,
        reason,
        mean_log_probability: None,
    }
}

/// Goes on from `said` without a continuator, to the end of a sentence or [`ALONE`]'s bound.
pub(super) fn alone(engine: &Engine, question: &str, said: &str, options: &Options) -> mpsc::Receiver<Said> {
    let (say, words) = mpsc::channel(2 * ALONE.0);
    let request = Generate {
        question: question.to_owned(),
        said: said.to_owned(),
        sampling: options.sampling,
        max_tokens: ALONE.0,
    };
    let mut count = words::count(said);
    let sink = move |step| {
        if let Step::Word(Word { text, .. }) = &step {
            count += 1;
            let over = count >= ALONE.1 && ends_sentence(text);
            if say.try_send(Said::Word(text.clone())).is_err() {
                return ControlFlow::Break(()); // the turn is over
            }
            if !over {
                return ControlFlow::Continue(());
            }
        }
        let _ = say.try_send(Said::AloneDone);
        ControlFlow::Break(())
    };
    engine.generate(request, Box::new(sink));
    words
}

/// The words of a text, each with the white space before it; without white space around the whole.
fn split_words(text: &str) -> Vec<String> {
    let mut from = text.len() - text.trim_start().len();
    words::ranges(text)
        .into_iter()
        .map(|range| {
            let word = text[from..range.end].to_owned();
            from = range.end;
            word
        })
        .collect()
}
