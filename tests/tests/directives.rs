//! The three directives, through both programs and the real model.
//!
//! The default model finds Sydney nearly as likely as Canberra, so its threshold is raised here to catch the word.

use segue_shared::words;
use segue_tests::programs::{Continuator, Finished, ask};
use serde_json::Value;

const OPENER: &str = "The capital of Australia is Sydney and";
const SHARP: &str = "--word-threshold=-0.8";

fn turn(serve: &[&str], args: &[&str]) -> (Vec<Value>, Value, String) {
    let continuator = Continuator::start(&[&[SHARP], serve].concat());
    let force = format!("--force-opener={OPENER}");
    let done: Finished = ask(
        &continuator.url,
        &[args, &[&force, "What is the capital of Australia?"]].concat(),
    );
    assert_eq!(done.code, 0, "{}", done.err);
    let events = done.events();
    let directives: Vec<Value> = events.iter().filter(|e| e["event"] == "directive").cloned().collect();
    assert_eq!(directives.len(), 1, "{}", done.out);
    let text = events.last().unwrap()["text"].as_str().unwrap().to_owned();
    (events, directives[0].clone(), text)
}

#[test]
fn revise_replaces_the_wrong_word_on_a_screen() {
    let (_, directive, text) = turn(&[], &[]);
    assert_eq!(
        (directive["kind"].as_str(), directive["keep_bytes"].as_u64()),
        (Some("revise"), Some(27))
    );
    assert_eq!(directive["removed"], " Sydney and");
    assert!(text.starts_with("The capital of Australia is Canberra"), "{text}");
}

#[test]
fn restart_drops_the_opener() {
    let (_, directive, text) = turn(&["--directives=restart"], &[]);
    assert_eq!(
        (directive["kind"].as_str(), directive["keep_bytes"].as_u64()),
        (Some("restart"), Some(0))
    );
    assert_eq!(directive["removed"], OPENER);
    assert!(text.contains("Canberra") && !text.contains("Sydney"), "{text}");
}

#[test]
fn bridge_repairs_what_cannot_be_taken_back() {
    for (serve, args, tone) in [
        (
            &["--directives=bridge"][..],
            &["--tone=apologetic"][..],
            cloud_continuator::policy::bridges(segue_shared::proto::Tone::Apologetic),
        ),
        (
            &["--directives=bridge", "--tone=playful"][..],
            &[][..],
            cloud_continuator::policy::bridges(segue_shared::proto::Tone::Playful),
        ),
    ] {
        let (events, directive, text) = turn(serve, args);
        assert_eq!(
            (directive["kind"].as_str(), directive["keep_bytes"].as_u64()),
            (Some("bridge"), Some(OPENER.len() as u64))
        );
        let bridge = events.iter().find(|e| e["event"] == "continuation").unwrap()["text"]
            .as_str()
            .unwrap();
        assert!(
            tone.contains(&bridge.trim_start()) && words::count(bridge) <= 12,
            "{bridge}"
        );
        assert!(
            text.starts_with(&format!("{OPENER}{bridge}")) && words::count(&text) > words::count(OPENER) + 6,
            "{text}"
        );
    }
}

/// Speech so fast that the words are heard before the verdict arrives: whatever was decided on the way, nothing heard is taken back.
#[test]
fn a_race_on_speech_ends_in_a_bridge_or_in_time() {
    for wpm in ["2000", "600", "183"] {
        let (events, directive, _) = turn(&[], &["--surface=append-only", &format!("--wpm={wpm}")]);
        let mut heard = 0;
        for event in &events {
            match event["event"].as_str().unwrap() {
                "heard" => heard = event["bytes"].as_u64().unwrap(),
                "directive" => assert!(event["keep_bytes"].as_u64().unwrap() >= heard, "{wpm}: {event}"),
                _ => {}
            }
        }
        assert!(["bridge", "revise", "restart"].contains(&directive["kind"].as_str().unwrap()));
        let text = events.last().unwrap()["text"].as_str().unwrap();
        assert_eq!(heard as usize, text.len(), "all of it is heard in the end");
    }
}

#[test]
fn odd_openers_lose_no_turn() {
    let continuator = Continuator::start(&[]);
    for opener in [
        "Yes",
        "...",
        "Ответ на этот вопрос",
        "首都是",
        "🙂 🙂 🙂 🙂",
        "The the the the",
    ] {
        let done = ask(
            &continuator.url,
            &[&format!("--force-opener={opener}"), "What is the capital of France?"],
        );
        assert_eq!(done.code, 0, "{opener}: {}", done.err);
        assert_eq!(done.events().last().unwrap()["event"], "end");
    }
}

#[test]
fn the_judge_serves_too() {
    let continuator = Continuator::start(&["--verifier=judge"]);
    for opener in [OPENER, "Seventeen purple kangaroos"] {
        let done = ask(
            &continuator.url,
            &[
                &format!("--force-opener={opener}"),
                "--max-tokens=40",
                "What is the capital of Australia?",
            ],
        );
        assert_eq!(done.code, 0, "{}", done.err);
        let text = done.events().last().unwrap()["text"].as_str().unwrap().to_owned();
        assert!(
            !text.contains('[') || !text.contains("accept"),
            "the control line is never shown: {text}"
        );
    }
}
