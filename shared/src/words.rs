//! Words as people count them, in any script.

use unicode_segmentation::UnicodeSegmentation;

/// Whether a script is written without spaces between words (Han, kana, Thai, Lao, Khmer, Myanmar, and full-width forms).
pub fn unspaced(c: char) -> bool {
    matches!(c as u32,
        0x0E00..=0x0EFF | 0x1000..=0x109F | 0x1780..=0x17FF | 0x2E80..=0x2FDF | 0x3000..=0x30FF | 0x31F0..=0x31FF
        | 0x3400..=0x4DBF | 0x4E00..=0x9FFF | 0xF900..=0xFAFF | 0xFE30..=0xFE4F | 0xFF00..=0xFF9F | 0x20000..=0x3FFFF)
}

/// The byte ranges of the words of `text`, without surrounding white space; punctuation belongs to the word it touches. Where a
/// script has no spaces, Unicode's word segmentation (UAX #29) decides.
///
/// Text without any letter or digit has no words.
pub fn ranges(text: &str) -> Vec<std::ops::Range<usize>> {
    let mut found: Vec<std::ops::Range<usize>> = Vec::new();
    let start_of = |part: &str| part.as_ptr() as usize - text.as_ptr() as usize;
    for token in text.split_whitespace() {
        let at = start_of(token);
        if !token.chars().any(unspaced) {
            if token.chars().any(char::is_alphanumeric) {
                found.push(at..at + token.len());
            } else if let Some(last) = found.last_mut() {
                last.end = at + token.len();
            }
            continue;
        }
        let mut first = true;
        for part in token.split_word_bounds() {
            let at = start_of(part);
            if part.chars().any(char::is_alphanumeric) {
                found.push(at..at + part.len());
                first = false;
            } else if let Some(last) = found.last_mut().filter(|_| !first) {
                last.end = at + part.len();
            }
        }
    }
    found
}

/// How many words `text` has.
pub fn count(text: &str) -> usize {
    ranges(text).len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<&str> {
        ranges(text).into_iter().map(|r| &text[r]).collect()
    }

    #[test]
    fn words_are_what_people_count() {
        assert_eq!(
            words("Sure, I'll set an alarm!"),
            ["Sure,", "I'll", "set", "an", "alarm!"]
        );
        assert_eq!(
            words("  It costs 3.14 - or so  "),
            ["It", "costs", "3.14 -", "or", "so"]
        );
        assert_eq!(words("... !?"), [""; 0]);
        assert_eq!(words("你好，世界").concat(), "你好，世界");
        assert_eq!(words("мир שלום привет"), ["мир", "שלום", "привет"]);
        assert_eq!(count(""), 0);
    }
}
