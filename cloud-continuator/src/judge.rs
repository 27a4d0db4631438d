//! The judge: a verifier for models that only chat. One request asks for a control line first and the text after it, so that the verdict
//! costs no second round trip; the control line never reaches the user.

use segue_shared::words;

use crate::verify::Verdict;

/// Longest head of a reply that can still become a control line, in bytes.
const LONGEST: usize = 48;

/// What a judge was asked for, with the opener in place of `{}`.
const INSTRUCTION: &str = "\n\n(A quick assistant has already begun to answer with these words: \"{}\". Judge them, then go on. \
First write one line with exactly one of these:\n\
[accept] if they are a good beginning of a correct answer\n\
[revise N] if only their first N words are good\n\
[restart] if they do not fit the message at all\n\
[bridge] if they can stay but must be corrected\n\
Then, on the next line, write only the text that follows the words that are kept, and nothing else.)";

/// The user's text, with what the judge is asked.
pub fn ask(user_text: &str, opener: &str) -> String {
    // The opener is the μLM's; a quotation mark in it must not end the quotation.
    format!("{user_text}{}", INSTRUCTION.replace("{}", &opener.replace('"', "'")))
}

/// What the control line said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Accept,
    /// Keep all words and repair them.
    Bridge,
    /// Keep this many words.
    Revise(usize),
    /// Keep none.
    Restart,
}

/// Reads the control line off the head of a streamed reply.
#[derive(Clone, Debug, Default)]
pub struct ControlLine {
    held: String,
}

impl ControlLine {
    /// Takes more text; once it is clear what the head is, returns what it says and the text after it. A reply without a valid control line
    /// counts as accepted, and all of it is text.
    pub fn push(&mut self, text: &str, last: bool) -> Option<(Control, String)> {
        self.held.push_str(text);
        let head = self.held.trim_start();
        let closers = [']', '`', '*', ':', '.'];
        let found = match head
            .strip_prefix(['[', '`', '*'])
            .map(|h| h.trim_start_matches(['[', '*', '`']))
        {
            Some(inner) => match inner.split_once([']', '`', '*']) {
                Some((line, rest)) => Some(match parse(line) {
                    Some(control) => (control, rest.trim_start_matches(closers)),
                    // In brackets it is a control line, whatever it says; in other marks it may be text.
                    None if head.starts_with('[') => (Control::Accept, rest.trim_start_matches(closers)),
                    None => (Control::Accept, head),
                }),
                None if last || inner.len() > LONGEST => Some((Control::Accept, head)),
                None => None,
            },
            None => match head.split_once('\n') {
                Some((line, rest)) => Some(match parse(line) {
                    Some(control) => (control, rest),
                    None => (Control::Accept, head),
                }),
                None if last => Some(parse(head).map_or((Control::Accept, head), |control| (control, ""))),
                None if head.len() > LONGEST || !begins(head) => Some((Control::Accept, head)),
                None => None,
            },
        };
        // The rest of the control line may come with the next piece.
        if found.is_some_and(|(_, rest)| rest.len() < head.len() && rest.trim_matches(['\n', '\r']).is_empty()) && !last
        {
            return None;
        }
        let (control, rest) = found?;
        // The text's own space survives; the line break after the control line does not.
        let rest = if rest.len() == head.len() {
            self.held.as_str()
        } else {
            rest.trim_start_matches(['\n', '\r'])
        };
        let rest = rest.to_owned();
        self.held.clear();
        Some((control, rest))
    }
}

const NAMES: [&str; 4] = ["accept", "bridge", "revise", "restart"];

/// Whether `head` may become one of the bare control words.
fn begins(head: &str) -> bool {
    let head = head.to_lowercase();
    NAMES
        .iter()
        .any(|name| name.starts_with(&head) || head.starts_with(name))
}

fn parse(line: &str) -> Option<Control> {
    let line = line.trim().trim_end_matches(['.', ':', '!']).to_lowercase();
    let mut parts = line.split_whitespace();
    let control = match (parts.next()?, parts.next()) {
        ("accept", None) => Control::Accept,
        ("bridge", None) => Control::Bridge,
        ("restart", None) => Control::Restart,
        ("revise", Some(number)) => Control::Revise(number.parse().ok()?),
        _ => return None,
    };
    parts.next().is_none().then_some(control)
}

/// The verdict that a control line means for an opener. A number of words outside the opener is garbage and counts as accepted.
pub fn verdict(control: Control, opener: &str) -> Verdict {
    let words = words::ranges(opener);
    match control {
        Control::Accept => Verdict::Accept,
        Control::Revise(n) if n >= words.len() => Verdict::Accept,
        Control::Revise(n) => Verdict::Wrong {
            good_words: n,
            good_bytes: n.checked_sub(1).map_or(0, |last| words[last].end),
            off_topic: n == 0,
        },
        Control::Restart | Control::Bridge => Verdict::Wrong {
            good_words: 0,
            good_bytes: 0,
            off_topic: control == Control::Restart,
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(pieces: &[&str]) -> (Control, String) {
        let mut line = ControlLine::default();
        for (n, piece) in pieces.iter().enumerate() {
            if let Some((control, mut rest)) = line.push(piece, false) {
                rest.push_str(&pieces[n + 1..].concat());
                return (control, rest);
            }
        }
        line.push("", true).expect("the end decides")
    }

    #[test]
    fn control_lines() {
        for (text, control, rest) in [
            ("[accept]\n by Leonardo.", Control::Accept, " by Leonardo."),
            ("[revise 3]\n Canberra.", Control::Revise(3), " Canberra."),
            ("  [ RESTART ]\nThe capital", Control::Restart, "The capital"),
            ("**[bridge]**\nor rather", Control::Bridge, "or rather"),
            ("`revise 2`\nx", Control::Revise(2), "x"),
            ("accept\n by", Control::Accept, " by"),
            ("Revise 4.\n by", Control::Revise(4), " by"),
            ("[rewrite 9]\n by", Control::Accept, " by"),
            ("[revise many]\n by", Control::Accept, " by"),
            ("[]\n by", Control::Accept, " by"),
            ("restart", Control::Restart, ""),
            (
                "**Canberra** is the capital.",
                Control::Accept,
                "**Canberra** is the capital.",
            ),
            ("`ls` lists files", Control::Accept, "`ls` lists files"),
            (" by Leonardo da Vinci.", Control::Accept, " by Leonardo da Vinci."),
            (
                "revised editions are better",
                Control::Accept,
                "revised editions are better",
            ),
            (
                "[1] The first of a list that never closes its brackets at all",
                Control::Accept,
                " The first of a list that never closes its brackets at all",
            ),
            ("", Control::Accept, ""),
        ] {
            assert_eq!(read(&[text]), (control, rest.to_owned()), "{text:?}");
        }
    }

    #[test]
    fn the_line_break_after_a_control_line_may_come_later() {
        assert_eq!(
            read(&["[accept", "]", "\n", " by Leonardo"]),
            (Control::Accept, " by Leonardo".into())
        );
        assert_eq!(
            read(&["accept\n", "\n by Leonardo"]),
            (Control::Accept, " by Leonardo".into())
        );
    }

    #[test]
    fn verdicts() {
        let opener = "It is Sydney and";
        assert_eq!(verdict(Control::Accept, opener), Verdict::Accept);
        assert_eq!(
            verdict(Control::Revise(2), opener),
            Verdict::Wrong {
                good_words: 2,
                good_bytes: 5,
                off_topic: false
            }
        );
        assert_eq!(verdict(Control::Revise(99), opener), Verdict::Accept);
        assert_eq!(verdict(Control::Revise(0), opener), verdict(Control::Restart, opener));
    }

    proptest! {
        /// However the reply is cut into pieces, the same is read.
        #[test]
        fn cuts_do_not_matter(text in "(\\[?(accept|bridge|revise 3|restart|x)\\]?\n)?[ a-z\\[\\]\n]{0,30}", cut in 0..40usize) {
            let cut = (0..=text.len()).filter(|n| text.is_char_boundary(*n)).nth(cut).unwrap_or(0);
            prop_assert_eq!(read(&[&text[..cut], &text[cut..]]), read(&[&text]));
        }

        /// Garbage never panics and never loses text that is not a control line.
        #[test]
        fn garbage_is_text(text in "[^\\[`*]{0,60}") {
            let (control, rest) = read(&[&text]);
            prop_assert!(control != Control::Accept || rest == text || parse(text.trim_start().split('\n').next().unwrap()).is_some());
        }
    }
}
