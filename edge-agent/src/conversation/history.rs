//! What was said so far, as the next turn tells it: what was heard, within a budget.

use segue_shared::proto::{Message, Role};

/// The conversation's memory.
///
/// When it grows past its budget, the oldest exchanges (a question and its answer) are left out whole until at most half of the budget is
/// in use. A memory that lost its head a little every turn would have to be read anew by the large model every turn.
#[derive(Debug, Default)]
pub struct History {
    messages: Vec<(Message, usize)>,
}

impl History {
    /// The messages, oldest first.
    pub fn messages(&self) -> Vec<Message> {
        self.messages.iter().map(|(message, _)| message.clone()).collect()
    }

    /// Takes an exchange: what was asked, and what was heard of the answer; `count` counts the tokens of a text.
    pub fn add(&mut self, question: &str, heard: &str, count: impl Fn(&str) -> usize) {
        let mut add = |role: Role, text: &str| {
            let role = role.into();
            self.messages.push((
                Message {
                    role,
                    text: text.to_owned(),
                },
                count(text),
            ));
        };
        add(Role::User, question);
        if !heard.is_empty() {
            add(Role::Assistant, heard);
        }
    }

    /// Leaves out what does not fit into `tokens` tokens and `bytes` bytes.
    pub fn trim(&mut self, tokens: usize, bytes: usize) {
        if self.fits(tokens, bytes) {
            return;
        }
        while !self.messages.is_empty() && !self.fits(tokens / 2, bytes / 2) {
            self.messages.remove(0);
            while self.messages.first().is_some_and(|(m, _)| m.role() == Role::Assistant) {
                self.messages.remove(0);
            }
        }
    }

    fn fits(&self, tokens: usize, bytes: usize) -> bool {
        self.messages.iter().map(|(_, tokens)| tokens).sum::<usize>() <= tokens
            && self.messages.iter().map(|(m, _)| m.text.len()).sum::<usize>() <= bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_newest_exchanges_stay_whole(
            exchanges in prop::collection::vec(("[a-z]{1,20}", "[a-z ]{0,40}"), 0..30), tokens in 0usize..200, bytes in 0usize..400,
        ) {
            let mut history = History::default();
            let mut all = Vec::new();
            for (question, heard) in &exchanges {
                history.add(question, heard, |text| text.len() / 2 + 1);
                all.push(question.clone());
                all.extend((!heard.is_empty()).then(|| heard.clone()));
                history.trim(tokens, bytes);
                prop_assert!(history.fits(tokens, bytes));
            }
            let kept = history.messages();
            prop_assert!(kept.first().is_none_or(|m| m.role() == Role::User));
            let texts: Vec<String> = kept.into_iter().map(|m| m.text).collect();
            prop_assert!(all.ends_with(&texts));
        }
    }

    #[test]
    fn nothing_is_left_out_before_it_must() {
        let mut history = History::default();
        for n in 0..4 {
            history.add(&n.to_string(), "x", |_| 1);
            history.trim(8, 100);
        }
        assert_eq!(history.messages().len(), 8);
        history.add("4", "x", |_| 1);
        history.trim(8, 100);
        assert_eq!(history.messages().len(), 4);
    }
}
