use proptest::prelude::*;

use super::*;

fn word(text: &str, log_probability: f32) -> Word {
    Word {
        text: text.into(),
        log_probability,
        worst: log_probability,
    }
}

fn run(words: &[(&str, f32)], policy: Policy, estimate: Option<Duration>) -> (String, Decision) {
    let mut opener = Opener::new(policy, estimate);
    let mut said = String::new();
    for (text, p) in words {
        let saying = opener.word(word(text, *p));
        said.extend(saying.words.iter().map(|w| w.text.as_str()));
        if let Some(decision) = saying.decision {
            return (said, decision);
        }
    }
    let saying = opener.end_of_words(Stop::Complete);
    said.extend(saying.words.iter().map(|w| w.text.as_str()));
    (said, saying.decision.expect("the end decides"))
}

fn sure(text: &str) -> Vec<(&str, f32)> {
    text.split_inclusive(' ').map(|w| (w, -0.1)).collect()
}

fn policy() -> Policy {
    Policy::new(8, 183.0)
}

#[test]
fn it_is_cut_before_the_first_unsure_word() {
    let mut words = sure("The capital of Australia is Sydney and has");
    words[5].1 = -4.0;
    let (said, decision) = run(&words, policy(), None);
    assert_eq!(
        (said.trim_end(), decision.reason),
        ("The capital of Australia is", Reason::Unsure)
    );
}

#[test]
fn four_words_stand_even_when_one_is_unsure() {
    let mut words = sure("The capital of Sydney is big");
    words[3].1 = -4.0;
    let (said, decision) = run(&words, policy(), None);
    assert_eq!(
        (said.trim_end(), decision.reason),
        ("The capital of Sydney", Reason::Unsure)
    );
}

#[test]
fn it_is_silent_when_sure_of_nothing() {
    let words: Vec<_> = sure("One two three four five").iter().map(|w| (w.0, -5.0)).collect();
    let (said, decision) = run(&words, policy(), None);
    assert_eq!(
        (said.as_str(), decision),
        (
            "",
            Decision {
                words: 0,
                reason: Reason::Silent,
                mean_log_probability: None
            }
        )
    );
    assert_eq!(run(&[], policy(), None).1.reason, Reason::Silent);
}

#[test]
fn it_ends_with_a_clause_or_a_short_reply() {
    let (said, decision) = run(&sure("Sure, I will set it, and then"), policy(), None);
    assert_eq!(
        (said.trim_end(), decision.reason),
        ("Sure, I will set it,", Reason::Clause)
    );
    let (said, decision) = run(&sure("You're welcome!"), policy(), None);
    assert_eq!(
        (said.as_str(), decision.words, decision.reason),
        ("You're welcome!", 2, Reason::Complete)
    );
}

#[test]
fn a_slow_cloud_gets_a_longer_opener() {
    let words = sure("a b c d e f g h i j k");
    let length = |millis| run(&words, policy(), Some(Duration::from_millis(millis))).1.words;
    assert_eq!((length(10), length(1500), length(1800), length(9000)), (4, 5, 6, 8));
    assert_eq!(run(&words, policy(), None).1.words, 8);
    assert_eq!(run(&words, Policy::new(5, 183.0), None).1.words, 5);
}

proptest! {
    #[test]
    fn there_are_never_more_words_than_wanted(
        words in prop::collection::vec(("[a-z]{1,4}[,.]? ", -6f32..0.0), 0..14),
        most in 0..20usize,
        estimate in prop::option::of(0..5000u64),
    ) {
        let policy = Policy::new(most, 183.0);
        let words: Vec<(&str, f32)> = words.iter().map(|(t, p)| (t.as_str(), *p)).collect();
        let (said, decision) = run(&words, policy, estimate.map(Duration::from_millis));
        prop_assert_eq!(said.split_whitespace().count(), decision.words);
        prop_assert!(decision.words <= policy.max_words);
        prop_assert!(said.is_empty() || decision.words >= words.len().min(MIN_WORDS));
        prop_assert_eq!(decision.mean_log_probability.is_none(), decision.words == 0);
    }
}
