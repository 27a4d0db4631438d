//! Both programs, real weights, loopback.

use segue_shared::words;
use segue_tests::programs::{Continuator, ask, command, finish};
use serde_json::Value;

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|e| e["event"].as_str().unwrap()).collect()
}

/// Rebuilds the reply from the events, as a consumer of `--output jsonl` would, and checks it against `end`.
fn check(events: &[Value]) -> String {
    let mut text = String::new();
    let mut last_t = 0.0;
    let mut opener = String::new();
    for event in events {
        let t = event["t_ms"].as_f64().unwrap();
        assert!(t >= last_t, "time goes on");
        last_t = t;
        match event["event"].as_str().unwrap() {
            "opener_word" => text.push_str(event["text"].as_str().unwrap()),
            "opener_committed" => {
                opener = text.clone();
                assert_eq!(event["text"], text.as_str());
                assert_eq!(event["words"], words::count(&text));
            }
            "directive" => text.truncate(event["keep_bytes"].as_u64().unwrap() as usize),
            "continuation" => {
                assert_eq!(event["offset"], text.len(), "offsets join");
                text.push_str(event["text"].as_str().unwrap());
            }
            "end" => {
                assert_eq!(event["text"], text.as_str());
                assert_eq!(event["finish_reason"], "stop");
                assert!(event["timings"]["first_word_ms"].as_f64().unwrap() >= 0.0);
                assert!(event["usage"]["prompt_tokens"].as_u64().unwrap() > 0);
            }
            "heard" => {}
            other => panic!("{other}"),
        }
    }
    assert!(opener == opener.trim_end());
    text
}

#[test]
fn ask_shows_words_then_commit_then_continuation_then_end() {
    let continuator = Continuator::start(&[]);
    for question in [
        "Who painted the Mona Lisa?",
        "How do I make tea?",
        "set an alarm for seven tomorrow morning",
    ] {
        let done = ask(&continuator.url, &[question]);
        assert_eq!(done.code, 0, "{}", done.err);
        let events = done.events();
        let kinds = kinds(&events);
        let committed = kinds.iter().position(|k| *k == "opener_committed").expect("a commit");
        let words = kinds[..committed].iter().filter(|k| **k == "opener_word").count();
        assert!((1..=8).contains(&words), "{kinds:?}");
        assert!(kinds[committed..].iter().all(|k| *k != "opener_word"), "{kinds:?}");
        assert_eq!(kinds.iter().filter(|k| **k == "end").count(), 1);
        assert_eq!(*kinds.last().unwrap(), "end");
        let reply = check(&events);
        assert!(words::count(&reply) >= 2 && !reply.contains("  "), "{reply:?}");
    }
}

#[test]
fn replies_can_be_repeated_with_a_seed_and_shortened() {
    let continuator = Continuator::start(&[]);
    let run = |seed: &str| {
        let done = ask(
            &continuator.url,
            &[
                "--temperature=1.2",
                "--top-p=0.95",
                "--seed",
                seed,
                "Tell me about the sea.",
            ],
        );
        assert_eq!(done.code, 0, "{}", done.err);
        done.events().last().unwrap()["text"].as_str().unwrap().to_owned()
    };
    let (one, again, other) = (run("7"), run("7"), run("8"));
    assert_eq!(one, again);
    assert_ne!(one, other);
    let short = ask(
        &continuator.url,
        &["--max-tokens=2", "--force-opener=The sea is", "Tell me about the sea."],
    );
    let events = short.events();
    let end = events.last().unwrap();
    assert_eq!(
        (end["finish_reason"].as_str(), end["usage"]["generated_tokens"].as_u64()),
        (Some("length"), Some(2))
    );
}

#[test]
fn opener_words_bounds_the_opener() {
    let continuator = Continuator::start(&[]);
    let done = ask(
        &continuator.url,
        &["--opener-words=4", "How do I make a cup of tea with milk?"],
    );
    let events = done.events();
    let committed = events.iter().find(|e| e["event"] == "opener_committed").unwrap();
    assert!(committed["words"].as_u64().unwrap() <= 4, "{committed}");
}

#[test]
fn a_pipe_gets_the_plain_reply() {
    let continuator = Continuator::start(&[]);
    let mut plain = command("edge-agent");
    plain.args([
        "ask",
        "--server",
        &continuator.url,
        "--quiet",
        "--force-opener=To make tea, boil",
        "How do I make tea?",
    ]);
    let done = finish(plain, b"");
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(
        done.out.starts_with("To make tea, boil ") && done.out.ends_with('\n'),
        "{:?}",
        done.out
    );
    assert!(
        !done.out.contains('\u{1b}') && done.out.lines().count() == 1,
        "{:?}",
        done.out
    );
}

#[test]
fn a_chat_remembers_and_reuses_what_was_read() {
    let continuator = Continuator::start(&[]);
    let mut chat = command("edge-agent");
    chat.args(["chat", "--server", &continuator.url, "--output", "jsonl"]);
    let done = finish(chat, "My name is Ada.\n\nWhat is my name?\n\u{ff}\n".as_bytes());
    assert_eq!(done.code, 0, "{}", done.err);
    let events = done.events();
    let ends: Vec<_> = events.iter().filter(|e| e["event"] == "end").collect();
    assert_eq!(ends.len(), 3, "{}", done.out);
    let tokens = |n: usize, what: &str| ends[n]["usage"][what].as_u64().unwrap();
    assert!(
        tokens(1, "prompt_tokens") > tokens(0, "prompt_tokens"),
        "the history is sent"
    );
    // All that the two prompts have in common was in the cache.
    assert!(
        tokens(1, "cached_tokens") > tokens(0, "cached_tokens") + 5,
        "{} {}",
        ends[0],
        ends[1]
    );
}

#[test]
fn invalid_utf8_on_standard_input_is_left_out() {
    let continuator = Continuator::start(&[]);
    let mut chat = command("edge-agent");
    chat.args(["chat", "--server", &continuator.url, "--output", "jsonl"]);
    let done = finish(chat, b"\xff\xfe broken\nthanks!\n");
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(done.err.contains("UTF-8"), "{}", done.err);
    assert_eq!(done.events().iter().filter(|e| e["event"] == "end").count(), 1);
}

#[test]
fn speech_is_paced_and_heard() {
    let continuator = Continuator::start(&[]);
    let done = ask(
        &continuator.url,
        &[
            "--surface=append-only",
            "--wpm=1200",
            "--force-opener=To make tea, boil",
            "How do I make tea?",
        ],
    );
    assert_eq!(done.code, 0, "{}", done.err);
    let events = done.events();
    let text = check(&events);
    let heard: Vec<u64> = events
        .iter()
        .filter(|e| e["event"] == "heard")
        .map(|e| e["bytes"].as_u64().unwrap())
        .collect();
    assert!(heard.windows(2).all(|w| w[0] < w[1]), "{heard:?}");
    assert_eq!(*heard.last().unwrap() as usize, text.len());
}

#[test]
fn words_are_piped_to_a_speech_program() {
    let continuator = Continuator::start(&[]);
    let file = std::env::temp_dir().join(format!("segue-spoken-{}", std::process::id()));
    let speak = format!("--speak=tee {}", file.display());
    let args = [
        "--surface=append-only",
        "--wpm=2000",
        &speak,
        "--force-opener=To make tea, boil",
        "How do I make tea?",
    ];
    let done = ask(&continuator.url, &args);
    assert_eq!(done.code, 0, "{}", done.err);
    let spoken = std::fs::read_to_string(&file).unwrap();
    let text = done.events().last().unwrap()["text"].as_str().unwrap().to_owned();
    assert_eq!(
        spoken.split_whitespace().collect::<Vec<_>>(),
        text.split_whitespace().collect::<Vec<_>>()
    );
    let _ = std::fs::remove_file(file);
    for (args, says) in [
        (
            &["--speak=no-such-program", "--surface=append-only"][..],
            "no-such-program",
        ),
        (&["--speak=tee"][..], "append-only"),
    ] {
        let done = ask(&continuator.url, &[args, &["hi"]].concat());
        assert_eq!(done.code, 64);
        assert!(done.err.contains(says), "{}", done.err);
    }
}
