//! Between text and tokens: the tokenizer, the chat template, and words out of a stream of tokens.

use std::path::Path;

use segue_shared::words;
use tokenizers::Tokenizer;

use super::{LoadError, config::Config};

/// How a model expects a question to be put.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Template {
    /// ChatML, which SmolLM2, MiniMind, Swen and our own μLM use.
    ChatMl,
    /// For models without chat tokens.
    Plain,
}

/// Turns questions into prompts and tokens into text.
#[derive(Clone, Debug)]
pub struct Codec {
    tokenizer: Tokenizer,
    template: Template,
    head: Vec<u32>,
    tail: Vec<u32>,
    end: Vec<u32>,
}

impl Codec {
    /// Loads `tokenizer.json` and checks it against the model.
    ///
    /// # Errors
    /// [`LoadError::Tokenizer`] when it is unreadable or has tokens that the model lacks.
    pub fn load(path: &Path, config: &Config) -> Result<Self, LoadError> {
        let bytes = std::fs::read(path).map_err(|e| LoadError::Tokenizer(e.to_string()))?;
        Self::parse(&bytes, config)
    }

    /// The same from a file's bytes.
    ///
    /// # Errors
    /// As [`Codec::load`].
    pub fn parse(bytes: &[u8], config: &Config) -> Result<Self, LoadError> {
        let bad = |what: String| LoadError::Tokenizer(what);
        // The library panics over some texts that are no JSON.
        serde_json::from_slice::<serde_json::Value>(bytes).map_err(|e| bad(e.to_string()))?;
        let tokenizer = Tokenizer::from_bytes(bytes).map_err(|e| bad(e.to_string()))?;
        let (tokens, rows) = (tokenizer.get_vocab_size(true), config.vocab as usize);
        if tokens > rows {
            return Err(bad(format!(
                "it has {tokens} tokens, but the model only {rows}; it belongs to another model"
            )));
        }
        let template = if tokenizer.token_to_id("<|im_start|>").is_some() {
            Template::ChatMl
        } else {
            Template::Plain
        };
        let (head, tail) = match template {
            Template::ChatMl => ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
            Template::Plain => ("User: ", "\nAssistant:"),
        };
        let encode = |text: &str| {
            tokenizer
                .encode(text, false)
                .map(|e| e.get_ids().to_vec())
                .map_err(|e| bad(e.to_string()))
        };
        let (head, tail) = (encode(head)?, encode(tail)?);
        let mut end: Vec<u32> = config.eos.clone();
        end.extend(
            ["<|im_end|>", "<|endoftext|>", "</s>"]
                .iter()
                .filter_map(|t| tokenizer.token_to_id(t)),
        );
        Ok(Self {
            tokenizer,
            template,
            head,
            tail,
            end,
        })
    }

    /// The prompt that asks `question`, of at most `limit` tokens: the head of a longer question is left out.
    pub fn prompt(&self, question: &str, limit: usize) -> Vec<u32> {
        // Chat tokens that a user types are text, not structure.
        let question = question.replace("<|", "< |");
        let ids = self.encode(&question);
        let room = limit.saturating_sub(self.head.len() + self.tail.len());
        let tail_of_question = &ids[ids.len().saturating_sub(room)..];
        [&self.head, tail_of_question, &self.tail].concat()
    }

    /// The tokens of a text.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let ids = self.tokenizer.encode(text, false);
        ids.map(|e| e.get_ids().to_vec()).unwrap_or_default()
    }

    /// Whether `token` ends a reply.
    pub fn ends(&self, token: u32) -> bool {
        self.end.contains(&token)
    }

    /// The text of `tokens`; a character that is still incomplete at the end is left out.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let text = self.tokenizer.decode(tokens, true).unwrap_or_default();
        let text = text.trim_end_matches('\u{fffd}');
        match self.template {
            Template::ChatMl => text.to_owned(),
            Template::Plain => text.trim_start().to_owned(),
        }
    }
}

/// A word of the opener and how sure the model was of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Word {
    /// The text, with the white space before it (none before the first).
    pub text: String,
    /// Mean natural-log probability of its tokens.
    pub log_probability: f32,
    /// Its least probable token's.
    pub worst: f32,
}

/// Cuts a growing text into words: a word is complete when the next one has begun.
#[derive(Debug, Default)]
pub struct WordCutter {
    emitted: usize,
    scores: Vec<(usize, f32)>,
}

impl WordCutter {
    /// Cuts a text whose first `said` bytes were said already.
    pub fn after(said: usize) -> Self {
        Self {
            emitted: said,
            scores: Vec::new(),
        }
    }

    /// Takes the text so far, after a token of `log_probability`; returns the words that became complete.
    pub fn push(&mut self, text: &str, log_probability: f32) -> Vec<Word> {
        self.scores.push((text.len(), log_probability));
        self.cut(text, false)
    }

    /// The text is complete: returns what is left of it.
    pub fn finish(&mut self, text: &str) -> Vec<Word> {
        self.cut(text, true)
    }

    fn cut(&mut self, text: &str, last: bool) -> Vec<Word> {
        let ranges = words::ranges(&text[self.emitted.min(text.len())..]);
        let complete = if last {
            ranges.len()
        } else {
            ranges.len().saturating_sub(1)
        };
        let base = self.emitted;
        ranges[..complete]
            .iter()
            .map(|range| {
                let (start, end) = (base + range.start, base + range.end);
                let glue = if self.emitted == 0 || start == self.emitted {
                    ""
                } else {
                    " "
                };
                // A token belongs to the word in which its text ends; the last word takes the end-of-reply token's place too.
                let until = self
                    .scores
                    .iter()
                    .take_while(|(at, _)| *at <= end)
                    .count()
                    .max(1)
                    .min(self.scores.len());
                let scores: Vec<f32> = self.scores.drain(..until).map(|(_, s)| s).collect();
                self.emitted = end;
                Word {
                    text: format!("{glue}{}", &text[start..end]),
                    log_probability: scores.iter().sum::<f32>() / scores.len().max(1) as f32,
                    worst: scores.iter().copied().fold(0.0, f32::min),
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(tokens: &[&str]) -> Vec<String> {
        let mut cutter = WordCutter::default();
        let (mut text, mut found) = (String::new(), Vec::new());
        for token in tokens {
            text.push_str(token);
            found.extend(cutter.push(&text, -1.0));
        }
        found.extend(cutter.finish(&text));
        found.into_iter().map(|w| w.text).collect()
    }

    #[test]
    fn words_come_whole_and_with_their_space() {
        assert_eq!(
            cut(&["The", " Mon", "a", " Lisa", ",", " I", "'", "ll"]),
            ["The", " Mona", " Lisa,", " I'll"]
        );
        assert_eq!(
            cut(&["Sure", ",  ", "of", " course", "."]),
            ["Sure,", " of", " course."]
        );
        assert_eq!(cut(&["你好", "，", "世", "界"]).concat(), "你好，世界");
        assert_eq!(cut(&[]), Vec::<String>::new());
        assert_eq!(cut(&["..."]), Vec::<String>::new());
    }

    #[test]
    fn a_word_is_as_sure_as_its_tokens() {
        let mut cutter = WordCutter::default();
        assert!(cutter.push("Can", -1.0).is_empty());
        assert!(cutter.push("Canberra", -3.0).is_empty());
        let words = cutter.push("Canberra is", -0.5);
        assert_eq!((words[0].log_probability, words[0].worst), (-2.0, -3.0));
        assert_eq!(cutter.finish("Canberra is")[0].log_probability, -0.5);
    }
}
