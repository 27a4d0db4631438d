//! Text and tokens.

use super::{super::render, Engine};
use crate::backend::{Message, embedded::sequence::Token};

impl Engine<'_> {
    pub(super) fn prompt(&self, history: &[Message], user_text: &str) -> Result<Vec<Token>, String> {
        let render = |messages: &[(&str, String)]| render(self.model, messages);
        let parts = self.layout.prompt(self.system_prompt, history, user_text, &render)?;
        let vocab = self.model.vocab();
        let tokens = parts
            .iter()
            .enumerate()
            .flat_map(|(n, part)| vocab.tokenize(part.text.as_bytes(), n == 0, part.structure));
        let mut tokens: Vec<Token> = tokens.map(|t| t.0).collect();
        if tokens.is_empty() {
            // A prompt must have a last token whose logits begin the reply.
            tokens.push(vocab.bos().0);
        }
        Ok(tokens)
    }

    /// The reply's tokens, each with the byte of the reply text where it ends.
    pub(super) fn reply(&self, text: &str) -> Vec<(Token, usize)> {
        if text.is_empty() {
            return Vec::new();
        }
        let (vocab, lead) = (self.model.vocab(), self.layout.lead());
        let mut end = 0;
        vocab
            .tokenize(format!("{lead}{text}").as_bytes(), false, false)
            .into_iter()
            .map(|token| {
                end += vocab.token_to_piece(token, false, None).len();
                (token.0, end.saturating_sub(lead.len()).min(text.len()))
            })
            .collect()
    }
}
