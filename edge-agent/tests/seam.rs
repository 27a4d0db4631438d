//! The seam rule with real tokenizer output: texts in many scripts, cut after any word, the tail streamed as tokens.

use std::path::Path;

use segue_shared::{seam::Seam, words};
use tokenizers::Tokenizer;

const TEXTS: &[&str] = &[
    "The Mona Lisa was painted by Leonardo da Vinci between 1503 and 1519.",
    "It's a well-known fact that you'll need 3.5 litres (about 1 gallon), isn't it?",
    "She said \"hello, there\" and then 'goodbye' - or so I've heard…",
    "Set the alarm for 7:45 a.m., please; it's $5.99 at the shop/store.",
    "Use the file's name: read_me.txt, version 2.0-beta!",
    "Первый спутник был запущен в 1957 году, не так ли?",
    "בירת ישראל היא ירושלים, נכון?",
    "عاصمة مصر هي القاهرة، أليس كذلك؟",
    "東京は日本の首都です。人口は約1400万人。",
    "首都是北京，人口很多！",
    "ประเทศไทยมีกรุงเทพเป็นเมืองหลวง",
    "दिल्ली भारत की राजधानी है।",
    "Das heißt „Grüß Gott“ und kostet 3,50 €.",
    "¿Cómo estás? ¡Muy bien!",
    "I love it 😀 and 👨‍👩‍👧‍👦 too, 👍🏽 really!",
    "Il a dit : « bonjour » à tous !",
    "Cafe\u{301} au lait, naïve façade.",
];

fn tokenizer() -> Tokenizer {
    Tokenizer::from_file(Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tokenizer.json")).unwrap()
}

/// The text of each token, characters that span tokens whole.
fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let ids = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    let mut stream = tokenizer.decode_stream(false);
    ids.iter().filter_map(|id| stream.step(*id).unwrap()).collect()
}

/// `prefix` and a tail that is streamed to the seam token by token.
fn streamed(tokenizer: &Tokenizer, prefix: &str, tail: &str) -> String {
    let mut seam = Seam::new(prefix);
    let mut joined = prefix.to_owned();
    for piece in pieces(tokenizer, tail) {
        joined.push_str(&seam.push(&piece));
    }
    joined.push_str(&seam.finish());
    joined
}

#[test]
fn a_text_cut_after_any_word_is_joined_as_it_was() {
    let tokenizer = tokenizer();
    for text in TEXTS {
        for cut in words::ranges(text)
            .iter()
            .map(|r| r.end)
            .filter(|end| end < &text.len())
        {
            let (prefix, tail) = text.split_at(cut);
            let joined = streamed(&tokenizer, prefix, tail);
            assert_eq!(joined, *text, "cut at {cut}: {prefix:?} + {tail:?}");
        }
    }
}

#[test]
fn a_forgotten_or_doubled_space_is_mended() {
    let tokenizer = tokenizer();
    for text in TEXTS {
        for cut in words::ranges(text)
            .iter()
            .map(|r| r.end)
            .filter(|end| end < &text.len())
        {
            let (prefix, tail) = text.split_at(cut);
            if !tail.starts_with(' ') {
                continue;
            }
            let body = tail.trim_start();
            // Punctuation that stands by itself, as in French or between dashes, reads the same without its space.
            if !body.starts_with(char::is_alphabetic) || prefix.ends_with(char::is_numeric) || prefix.ends_with('«') {
                continue;
            }
            for white in ["", "  ", "   "] {
                let joined = streamed(&tokenizer, prefix, &format!("{white}{body}"));
                assert_eq!(joined, *text, "{prefix:?} + {white:?} + {body:?}");
            }
        }
    }
}

#[test]
fn an_echoed_prefix_is_dropped() {
    let tokenizer = tokenizer();
    for text in TEXTS {
        let ranges = words::ranges(text);
        if ranges.len() < 4 || text.chars().any(words::unspaced) {
            continue;
        }
        let (prefix, _) = text.split_at(ranges[2].end);
        let joined = streamed(&tokenizer, prefix, &text.to_uppercase());
        assert_eq!(joined.to_uppercase(), text.to_uppercase(), "{prefix:?}");
    }
}
