//! The seam: the one rule that joins an opener and its continuation.
//!
//! The opener ends at the end of a word and carries no trailing white space; the continuation carries its own. Models and servers
//! do not always keep to that: they drop the space, double it, or repeat words that were already said. [`Seam`] mends the head of
//! the continuation and lets everything after it through untouched, so that text inside the continuation is never split or glued.
//!
//! What is decided, in this order:
//! 1. **Echo**: a continuation that begins with the whole prefix, or with its last words, loses them (case, spacing and
//!    punctuation may differ).
//! 2. **White space**: exactly one space or line break where the script and the characters on both sides want one, none where they
//!    do not (closing punctuation, contractions, hyphens, scripts without spaces).

use unicode_segmentation::UnicodeSegmentation;

use crate::words::{self, unspaced};

/// Words that people double on purpose; a continuation that begins with one of them again is left alone.
const DOUBLED: &[&str] = &[
    "bye", "ha", "had", "hear", "knock", "more", "night", "no", "now", "ok", "really", "so", "that", "there", "very",
    "wait", "well", "yeah", "yes",
];

/// Joins whole texts; what [`Seam`] does piece by piece.
pub fn join(prefix: &str, continuation: &str) -> String {
    let mut seam = Seam::new(prefix);
    let mut text = prefix.to_owned();
    text.push_str(&seam.push(continuation));
    text.push_str(&seam.finish());
    text
}

/// Joins a stream of text to the prefix that it continues.
///
/// Text is held back only while the head is undecided (usually not past its first word) and, later, while it is white space that
/// may turn out to be the end of the reply.
#[derive(Clone, Debug)]
pub struct Seam {
    prefix: String,
    held: String,
    decided: bool,
}

impl Seam {
    /// A seam after `prefix`, which may be empty.
    pub fn new(prefix: &str) -> Self {
        Self {
            prefix: prefix.to_owned(),
            held: String::new(),
            decided: false,
        }
    }

    /// A seam inside a continuation that another model goes on with: text that follows byte by byte is left as it is. (What came
    /// before never ends with white space, for a seam holds that back.)
    pub fn within() -> Self {
        Self {
            prefix: String::new(),
            held: String::new(),
            decided: true,
        }
    }

    /// Takes the next piece of the continuation and returns what can be shown; the pieces may be cut anywhere between characters.
    pub fn push(&mut self, piece: &str) -> String {
        self.held.push_str(piece);
        if !self.decided {
            match mend(&self.prefix, &self.held, false) {
                Some(head) => {
                    self.held = head;
                    self.decided = true;
                }
                None => return String::new(),
            }
        }
        let end = self.held.trim_end().len();
        let tail = self.held.split_off(end);
        std::mem::replace(&mut self.held, tail)
    }

    /// The continuation is complete: returns what was held back, without trailing white space.
    pub fn finish(&mut self) -> String {
        if !self.decided {
            self.held = mend(&self.prefix, &self.held, true).unwrap_or_default();
            self.decided = true;
        }
        std::mem::take(&mut self.held).trim_end().to_owned()
    }
}

/// The mended head of a continuation, or `None` when more text must be seen first. `last`: there is no more.
fn mend(prefix: &str, text: &str, last: bool) -> Option<String> {
    let rest = match echo(prefix, text, last) {
        Echo::Undecided => return None,
        Echo::Absent => text,
        Echo::Repeats { end } => {
            let rest = &text[end..];
            // What the prefix ends with after its last word is repeated as well, as it is or as other punctuation: "Sure," + "Sure! I will"
            // is "Sure, I will".
            let tail = &prefix[prefix.trim_end_matches(|c: char| !c.is_alphanumeric()).len()..];
            let head = rest.trim_start();
            if tail.trim().is_empty() {
                rest
            } else if let Some(bare) = head.strip_prefix(tail.trim_start()) {
                bare
            } else if !last && tail.trim_start().starts_with(head) {
                return None;
            } else {
                let bare = rest.trim_start_matches(closes);
                if bare.is_empty() && !last {
                    return None;
                }
                bare
            }
        }
    };
    let body = rest.trim_start();
    if body.is_empty() {
        return last.then(String::new);
    }
    let white = &rest[..rest.len() - body.len()];
    let space = space_between(prefix, white, body, last)?;
    Some(format!("{space}{body}"))
}

// === echo ===

enum Echo {
    Undecided,
    Absent,
    /// The first `end` bytes repeat the prefix or its last words.
    Repeats {
        end: usize,
    },
}

/// Letters and digits, case-folded (through upper case, so that "ß" is "ss"), each with the byte where its source character ends.
fn significant(text: &str) -> Vec<(char, usize)> {
    text.char_indices()
        .filter(|(_, c)| c.is_alphanumeric())
        .flat_map(|(i, c)| {
            c.to_uppercase()
                .flat_map(char::to_lowercase)
                .map(move |l| (l, i + c.len_utf8()))
        })
        .collect()
}

fn echo(prefix: &str, text: &str, last: bool) -> Echo {
    let head = text.trim_start();
    // "..." before an echo is a habit of models that are asked for a continuation in words.
    let bare = head
        .trim_start_matches(|c| matches!(c, '.' | '…' | '"' | '*' | '\'') || opens(c))
        .trim_start();
    if bare.is_empty() {
        return if last || prefix.is_empty() {
            Echo::Absent
        } else {
            Echo::Undecided
        };
    }
    if !bare.starts_with(char::is_alphanumeric) {
        return Echo::Absent; // ", of course" begins with punctuation and so with no word of the prefix
    }
    let said = significant(text);
    let ends_word = |end: usize| match text[end..].chars().next() {
        // An apostrophe or a hyphen may go on with the same word: "is" and "isn't", "it" and "it's".
        Some('\'' | '’' | '-') => text[end..]
            .chars()
            .nth(1)
            .map(|d| !d.is_alphanumeric())
            .or(last.then_some(true)),
        Some(c) => Some(!c.is_alphanumeric() || unspaced(c)),
        None => last.then_some(true),
    };
    let all = words::ranges(prefix);
    for (n, word) in all.iter().enumerate() {
        let wanted: Vec<char> = significant(&prefix[word.start..]).into_iter().map(|(c, _)| c).collect();
        if !repeatable(prefix, &all[n..], n == 0) {
            continue;
        }
        let same = said.iter().zip(&wanted).take_while(|((c, _), w)| c == *w).count();
        if same == wanted.len() {
            let end = said[same - 1].1;
            match ends_word(end) {
                Some(true) => return Echo::Repeats { end },
                Some(false) => {}
                None => return Echo::Undecided,
            }
        } else if same == said.len() && !last {
            return Echo::Undecided;
        }
    }
    Echo::Absent
}

/// Whether the last `words` of the prefix, said again at the head of a continuation, would be a defect and not a figure of speech.
fn repeatable(prefix: &str, words: &[std::ops::Range<usize>], whole: bool) -> bool {
    let tail = &prefix[words[0].start..];
    let letters: String = significant(tail).into_iter().map(|(c, _)| c).collect();
    if tail.chars().any(unspaced) {
        // Single characters are doubled in ordinary words.
        return letters.chars().count() >= if whole { 2 } else { 4 };
    }
    if whole && (words.len() > 1 || !DOUBLED.contains(&letters.as_str())) {
        return !letters.chars().all(char::is_numeric);
    }
    match words.len() {
        0 => false,
        // A word that ends a clause is often taken up by the next one: "a cat. Cats", "Is it red, red".
        1 => !letters.chars().all(char::is_numeric) && !DOUBLED.contains(&letters.as_str()) && !tail.ends_with(closes),
        _ => true,
    }
}

// === white space ===

/// Punctuation that stands close to what is before it.
fn closes(c: char) -> bool {
    matches!(
        c,
        '.' | ','
            | ';'
            | ':'
            | '!'
            | '?'
            | '…'
            | ')'
            | ']'
            | '}'
            | '”'
            | '»'
            | '%'
            | '°'
            | '،'
            | '؛'
            | '؟'
            | '۔'
            | '।'
            | '‚'
            | '、'
            | '。'
            | '，'
            | '！'
            | '？'
            | '；'
            | '：'
            | '）'
            | '」'
            | '』'
            | '】'
            | '》'
    )
}

/// Punctuation that stands close to what is after it.
fn opens(c: char) -> bool {
    matches!(
        c,
        '(' | '[' | '{' | '“' | '‘' | '«' | '„' | '¿' | '¡' | '（' | '「' | '『' | '【' | '《'
    )
}

/// The white space that belongs between `prefix` and `body`, given what the model wrote there; `None` when more of `body` is needed.
fn space_between(prefix: &str, white: &str, body: &str, last: bool) -> Option<String> {
    let Some(before) = prefix.chars().next_back() else {
        return Some(String::new());
    };
    if before.is_whitespace() {
        return Some(String::new());
    }
    let first = body.chars().next()?;
    if let Some(line) = white.find('\n') {
        // Line breaks are layout, not spacing; three or more are a mistake.
        let breaks = white[line..].matches('\n').count().min(2);
        let indent = &white[white.rfind('\n').map_or(0, |i| i + 1)..];
        return Some("\n".repeat(breaks) + indent);
    }
    if one_cluster(before, first) {
        return Some(String::new()); // accents, joiners, modifiers: parts of the character before
    }
    if unspaced(before) && (unspaced(first) || closes(first)) {
        return Some(String::new());
    }
    if let Some(narrow) = white.chars().next().filter(|c| matches!(c, '\u{a0}' | '\u{202f}')) {
        return Some(narrow.into()); // French sets its punctuation off with a space that does not break
    }
    let space = if white.is_empty() {
        wants_space(prefix, before, first, body, last)?
    } else {
        keeps_space(prefix, before, first, body, last)?
    };
    Some(if space { " ".into() } else { String::new() })
}

fn one_cluster(before: char, first: char) -> bool {
    !before.is_ascii() | !first.is_ascii() && format!("{before}{first}").graphemes(true).count() == 1
}

/// The model wrote white space: is it right?
fn keeps_space(prefix: &str, before: char, first: char, body: &str, last: bool) -> Option<bool> {
    // Guillemets are set with or without spaces inside; the model knows which language it writes.
    if opens_here(prefix, before) && before != '«' {
        return Some(false);
    }
    if closes(first) || first == '“' && low_quote_open(prefix) {
        // " .NET" and " .5" are words.
        return match body.chars().nth(1) {
            Some(next) => {
                Some(first == '.' && next.is_alphanumeric() || first == ':' && matches!(next, ')' | '(' | '-'))
            }
            None if first == '.' || first == ':' => last.then_some(false),
            None => Some(false),
        };
    }
    Some(match (first, contraction(body, last)) {
        ('\'' | '’', None) => return None,
        ('\'' | '’', Some(true)) => before.is_numeric(),
        ('"', _) => !(open_quote(prefix, '"') && closes(before)),
        _ => !(before == '"' && open_quote(prefix, '"')),
    })
}

/// The model wrote no white space: should it have?
fn wants_space(prefix: &str, before: char, first: char, body: &str, last: bool) -> Option<bool> {
    let second = body.chars().nth(1);
    if unspaced(before) || unspaced(first) || closes(first) {
        return Some(false);
    }
    if opens_here(prefix, before) || matches!(before, '/' | '\\' | '@' | '#' | '_' | '—') || "$£€¥₹".contains(before)
    {
        return Some(before == '—' && spaced_dash(prefix));
    }
    if matches!(before, '-' | '–') {
        return Some(spaced_dash(prefix));
    }
    if matches!(before, '"' | '\'') && open_quote(prefix, before) {
        return Some(false);
    }
    Some(match first {
        '\'' | '’' => !contraction(body, last)?,
        '"' => !open_quote(prefix, '"'),
        '-' | '–' => match second {
            Some(next) => next.is_whitespace(),
            None => return last.then_some(false),
        },
        '—' | '/' | '\\' | '_' | '^' | '\u{200d}' => false,
        '(' => !plural(body, last)?,
        '“' if low_quote_open(prefix) => false,
        _ if opens(first) => true,
        _ if first.is_numeric() => {
            let number = prefix.trim_end_matches(['.', ',', ':']);
            // "3." + "14" and "19" + "84" are one number.
            !(before.is_numeric()
                || matches!(before, '.' | ',' | ':')
                    && number.len() + 1 == prefix.len()
                    && number.ends_with(char::is_numeric))
        }
        _ if first.is_alphabetic() && before.is_numeric() => !ordinal(body, last)?,
        _ => true,
    })
}

/// The prefix ends with a dash that stands as a word of its own.
fn spaced_dash(prefix: &str) -> bool {
    prefix.chars().rev().nth(1).is_none_or(char::is_whitespace)
}

/// Whether a straight quotation mark of this kind is open at the end of the prefix.
fn open_quote(prefix: &str, quote: char) -> bool {
    let mut previous = ' ';
    let mut open = false;
    for c in prefix.chars() {
        // Inside a word an apostrophe is no quotation mark.
        if c == quote && (quote != '\'' || open || previous.is_whitespace() || opens(previous)) {
            open = !open;
        }
        previous = c;
    }
    open
}

/// Whether `before`, the prefix's last character, opens something there: what opens an English “quotation” closes a German „one“.
fn opens_here(prefix: &str, before: char) -> bool {
    let head = &prefix[..prefix.len() - before.len_utf8()];
    opens(before) && !(before == '“' && low_quote_open(head))
}

/// Whether a „low“ quotation mark is open at the end of the prefix.
fn low_quote_open(prefix: &str) -> bool {
    prefix.rfind('„').is_some_and(|at| !prefix[at..].contains(['“', '”']))
}

/// `body` begins with an apostrophe: is it the tail of a contraction? `None`: too short to tell.
fn contraction(body: &str, last: bool) -> Option<bool> {
    matches_head(
        &body.chars().skip(1).collect::<String>(),
        &["s", "t", "re", "ve", "ll", "d", "m", "em", "clock"],
        last,
    )
}

/// `body` begins with "(": is it "(s)" or "(es)"?
fn plural(body: &str, last: bool) -> Option<bool> {
    matches_head(&body[1..], &["s", "es"], last)
        .map(|same| same && body[1..].trim_start_matches(char::is_alphabetic).starts_with(')'))
}

/// `body` follows a digit: is it the ending of an ordinal or a decade?
fn ordinal(body: &str, last: bool) -> Option<bool> {
    matches_head(
        body,
        &[
            "st", "nd", "rd", "th", "s", "am", "pm", "x", "k", "km", "kg", "cm", "mm", "m", "g",
        ],
        last,
    )
}

/// Whether the letters at the head of `text` are one of `endings`; `None` when they may yet become one.
fn matches_head(text: &str, endings: &[&str], last: bool) -> Option<bool> {
    let letters: String = text
        .chars()
        .take_while(|c| c.is_alphabetic())
        .flat_map(char::to_lowercase)
        .collect();
    let complete = last || letters.len() < text.to_lowercase().len();
    if complete || !endings.iter().any(|e| e.starts_with(&letters)) {
        return Some(endings.contains(&letters.as_str()));
    }
    None
}

#[cfg(test)]
#[path = "seam_tests.rs"]
mod tests;
