use proptest::prelude::*;

use super::*;

#[test]
fn joins_as_a_writer_would() {
    let cases = [
        // (prefix, continuation, joined)
        (
            "The Mona Lisa was painted",
            " by Leonardo.",
            "The Mona Lisa was painted by Leonardo.",
        ),
        ("thanks.", "And more", "thanks. And more"),
        (
            "Sure, I'll set an alarm",
            "for seven",
            "Sure, I'll set an alarm for seven",
        ),
        ("Sure", ", of course", "Sure, of course"),
        ("Sure", " , of course", "Sure, of course"),
        ("It is", "   blue", "It is blue"),
        ("It is", "\tblue  ", "It is blue"),
        ("", "  Hello", "Hello"),
        ("Hello ", " there", "Hello there"),
        ("that", "'s fine", "that's fine"),
        ("that", "’s fine", "that’s fine"),
        ("he said", "'hello'", "he said 'hello'"),
        ("he said", "\"hello\"", "he said \"hello\""),
        ("he said \"hello", "\" and left", "he said \"hello\" and left"),
        ("he said \"hello\"", "and left", "he said \"hello\" and left"),
        ("he said \"", " hello\"", "he said \"hello\""),
        ("well", "-known", "well-known"),
        ("well-", "known", "well-known"),
        ("so", "- as it were", "so - as it were"),
        ("so -", "as it were", "so - as it were"),
        ("a lot (", "about 3)", "a lot (about 3)"),
        ("a lot", "(about 3)", "a lot (about 3)"),
        ("the word", "(s) you need", "the word(s) you need"),
        ("It costs $", "5", "It costs $5"),
        ("It costs $ 3.", "14", "It costs $ 3.14"),
        ("in 19", "84", "in 1984"),
        ("the 5", "th of May", "the 5th of May"),
        ("the 5", "best", "the 5 best"),
        ("Steps:", "\n\n\n1. Go", "Steps:\n\n1. Go"),
        ("Steps:", " \n  - Go", "Steps:\n  - Go"),
        ("你好", "世界", "你好世界"),
        ("你好", " 世界", "你好世界"),
        ("你好，", " 世界", "你好，世界"),
        ("你好", "，世界", "你好，世界"),
        ("สวัสดี", "ครับ", "สวัสดีครับ"),
        ("שלום", "עולם", "שלום עולם"),
        ("مرحبا", "، كيف", "مرحبا، كيف"),
        ("cafe", "\u{301} noir", "cafe\u{301} noir"),
        ("Nice 👍", "🏽 work", "Nice 👍🏽 work"),
        ("Nice 👍", "Let's go", "Nice 👍 Let's go"),
        ("Great", "🎉", "Great 🎉"),
        ("Vraiment", "\u{a0}!", "Vraiment\u{a0}!"),
        ("use", " .NET", "use .NET"),
        ("Warten Sie „", "bitte“", "Warten Sie „bitte“"),
    ];
    for (prefix, continuation, joined) in cases {
        assert_eq!(join(prefix, continuation), joined, "{prefix:?} + {continuation:?}");
    }
}

#[test]
fn echoes_are_dropped() {
    let cases = [
        (
            "The capital of Australia is",
            "The capital of Australia is Canberra.",
            "The capital of Australia is Canberra.",
        ),
        (
            "The capital of Australia is",
            "the  CAPITAL of australia is  Canberra.",
            "The capital of Australia is Canberra.",
        ),
        (
            "The capital of Australia is",
            " Australia is Canberra.",
            "The capital of Australia is Canberra.",
        ),
        (
            "The capital of Australia is",
            " is Canberra.",
            "The capital of Australia is Canberra.",
        ),
        (
            "The capital of Australia is",
            "... is Canberra.",
            "The capital of Australia is Canberra.",
        ),
        (
            "The capital of Australia is",
            " island life",
            "The capital of Australia is island life",
        ),
        (
            "The capital of Australia is",
            "The capital city",
            "The capital of Australia is The capital city",
        ),
        ("Sure, I'll", "Sure, I’ll do that.", "Sure, I'll do that."),
        ("Sure,", "Sure! I will.", "Sure, I will."),
        ("Sure", "Sure, I will.", "Sure, I will."),
        ("It is", " isn't it", "It is isn't it"),
        ("This is very", " very good", "This is very very good"),
        ("Dial 5", " 5 3", "Dial 5 5 3"),
        ("I like cats", ", cats are great", "I like cats, cats are great"),
        ("我很喜欢苹果", "我很喜欢苹果和梨", "我很喜欢苹果和梨"),
        ("谢", "谢", "谢谢"),
        ("The sky", "The sky", "The sky"),
    ];
    for (prefix, continuation, joined) in cases {
        assert_eq!(join(prefix, continuation), joined, "{prefix:?} + {continuation:?}");
    }
}

#[test]
fn a_plain_continuation_is_shown_without_waiting() {
    let mut seam = Seam::new("The Mona Lisa was painted");
    assert_eq!(seam.push(" by"), " by");
    assert_eq!(seam.push(" Leo"), " Leo");
    assert_eq!(seam.push("nardo"), "nardo");
    assert_eq!(seam.push(".\n"), ".");
    assert_eq!(seam.finish(), "");
}

fn cut(text: &str, cuts: &[usize]) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let mut pieces = vec![String::new()];
    for (i, c) in chars.iter().enumerate() {
        if cuts.contains(&i) {
            pieces.push(String::new());
        }
        pieces.last_mut().unwrap().push(*c);
    }
    pieces
}

const TEXT: &str = "[a-cA-C1 .,'’\"()é世界של👍\n-]{0,14}";

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    /// The pieces in which a continuation arrives never change the result.
    #[test]
    fn cuts_do_not_matter(prefix in TEXT, continuation in TEXT, cuts in prop::collection::vec(0..14usize, 0..6)) {
        let mut seam = Seam::new(&prefix);
        let mut text = prefix.clone();
        for piece in cut(&continuation, &cuts) {
            text.push_str(&seam.push(&piece));
        }
        text.push_str(&seam.finish());
        prop_assert_eq!(text, join(&prefix, &continuation));
    }

    /// The prefix is never changed; of the continuation only white space and an echo at its head are.
    #[test]
    fn nothing_else_changes(prefix in TEXT, continuation in TEXT) {
        let joined = join(&prefix, &continuation);
        prop_assert!(joined.starts_with(&prefix));
        let tail: String = joined[prefix.len()..].split_whitespace().collect();
        let whole: String = continuation.split_whitespace().collect();
        prop_assert!(whole.ends_with(&tail), "{tail:?} of {whole:?}");
    }

    /// Words are never glued and spaces never doubled, whatever white space the model wrote or forgot.
    #[test]
    fn words_stay_words(
        left in prop::collection::vec("[b-d]{1,4}", 1..6),
        right in prop::collection::vec("[e-g]{1,4}", 1..6),
        gap in prop_oneof![Just(""), Just(" "), Just("  "), Just(" \u{2009} ")],
    ) {
        let joined = join(&left.join(" "), &format!("{gap}{}", right.join(" ")));
        prop_assert_eq!(joined, [left, right].concat().join(" "));
    }

    /// A model that repeats the prefix, in other case and spacing, adds nothing by it.
    #[test]
    fn echo_is_dropped(
        words in prop::collection::vec("[b-dé]{2,5}", 2..7),
        more in prop::collection::vec("[e-g]{1,5}", 1..4),
        upper: bool,
        from in 0..6usize,
    ) {
        let from = from.min(words.len() - 2);
        let prefix = words.join(" ");
        let echo = words[from..].join("  ");
        let echo = if upper { echo.to_uppercase() } else { echo };
        let joined = join(&prefix, &format!("{echo} {}", more.join(" ")));
        prop_assert_eq!(joined, format!("{prefix} {}", more.join(" ")));
    }
}
