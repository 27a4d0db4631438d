//! Sessions that survive: servers that are killed, drained or stall, people who interrupt, and no server at all.

use std::time::Duration;

use segue_tests::{
    chat::Chat,
    programs::{Continuator, PATIENCE, ask},
    upstream::{self, Step, Upstream, delta, pieces, prefix, warms_up},
};
use serde_json::Value;

const OPENER: &str = "--force-opener=The capital of Australia";
const WHOLE: &str = "The capital of Australia is Canberra, né \u{201c}Canberry\u{201d}: 東京 is not. So there 🎉 it is! And there is so much more to say of it that it takes a while.";
const NOBODY: &str = "http://127.0.0.1:9";

/// An upstream that continues [`WHOLE`] from wherever it is asked to, a word every `pause`.
async fn upstream(pause: Duration) -> Upstream {
    Upstream::start(move |_, request| {
        if warms_up(request) {
            return vec![Step::Send(upstream::reply(&["x"]))];
        }
        let said = prefix(request).unwrap_or_default();
        let rest = WHOLE
            .strip_prefix(said)
            .unwrap_or_else(|| panic!("{said:?} is no beginning"));
        let mut steps = vec![Step::Send(upstream::head())];
        for piece in pieces(rest) {
            steps.extend([Step::Wait(pause), Step::Send(delta(piece))]);
        }
        steps.push(Step::Send(upstream::end("stop")));
        steps
    })
    .await
}

fn continuator(upstream: &Upstream) -> Continuator {
    let args = upstream::args(&upstream.url, "prefill");
    Continuator::start(&[&args[..], &["--no-verify"]].concat())
}

fn last(events: &[Value]) -> &Value {
    events.last().expect("there are events")
}

fn has(events: &[Value], kind: &str) -> bool {
    events.iter().any(|event| event["event"] == kind)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_continuator_costs_a_pause_and_no_word() {
    let upstream = upstream(Duration::from_millis(20)).await;
    let (first, second) = (continuator(&upstream), continuator(&upstream));
    tokio::task::block_in_place(|| {
        let mut chat = Chat::start(&format!("{},{}", first.url, second.url), &[OPENER]);
        chat.say("What is the capital of Australia?");
        chat.until("continuation");
        chat.until("continuation");
        first.signal(9);
        let events = chat.reply();
        assert!(has(&events, "lost") && has(&events, "resumed"), "{events:?}");
        assert_eq!(last(&events)["text"], WHOLE);
        assert_eq!(last(&events)["resumed"], 1);
        // The next turn begins at the one that is left, without a word about the other.
        chat.say("And now?");
        let events = chat.reply();
        assert_eq!(
            (&last(&events)["text"], &last(&events)["resumed"]),
            (&WHOLE.into(), &0.into())
        );
        assert_eq!(chat.end().0.code(), Some(0));
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_continuator_is_found_again() {
    let upstream = upstream(Duration::from_millis(20)).await;
    let first = continuator(&upstream);
    let address = first.url.trim_start_matches("http://").to_owned();
    tokio::task::block_in_place(|| {
        let mut chat = Chat::start(&first.url, &[OPENER]);
        chat.say("What is the capital of Australia?");
        chat.until("continuation");
        drop(first);
        chat.until("lost");
        let args = upstream::args(&upstream.url, "prefill");
        let _again = Continuator::start(&[&args[..], &["--no-verify", "--listen", &address]].concat());
        let events = chat.reply();
        assert_eq!(last(&events)["text"], WHOLE, "{events:?}");
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_that_nobody_goes_on_with_ends_and_stays() {
    let upstream = upstream(Duration::from_millis(20)).await;
    let only = continuator(&upstream);
    tokio::task::block_in_place(|| {
        let mut chat = Chat::start(&only.url, &[OPENER, "--resume-within=1s"]);
        chat.say("What is the capital of Australia?");
        chat.until("continuation");
        drop(only);
        let events = chat.reply();
        let end = last(&events);
        assert_eq!(
            (&end["event"], &end["code"]),
            (&"error".into(), &"connection_lost".into())
        );
        let text = end["text"].as_str().unwrap();
        assert!(WHOLE.starts_with(text) && text.len() > 25, "{text}");
        // The next question is answered alone.
        chat.say("Hello?");
        let events = chat.reply();
        assert_eq!(last(&events)["offline"], true, "{events:?}");
        assert_eq!(chat.end().0.code(), Some(0));
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_continuator_finishes_its_turn_and_gets_no_new_one() {
    let upstream = upstream(Duration::from_millis(20)).await;
    let (first, second) = (continuator(&upstream), continuator(&upstream));
    tokio::task::block_in_place(|| {
        let mut chat = Chat::start(&format!("{},{}", first.url, second.url), &[OPENER]);
        chat.say("What is the capital of Australia?");
        chat.until("continuation");
        first.signal(15);
        let events = chat.reply();
        assert!(!has(&events, "lost"), "{events:?}");
        assert_eq!(
            (&last(&events)["text"], &last(&events)["resumed"]),
            (&WHOLE.into(), &0.into())
        );
        let (status, log) = first.wait();
        assert_eq!(status.code(), Some(0), "{log}");
        chat.say("And now?");
        let events = chat.reply();
        assert_eq!(
            (&last(&events)["text"], &last(&events)["offline"]),
            (&WHOLE.into(), &false.into())
        );
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn told_to_stop_twice_a_continuator_stops_at_once() {
    let upstream = upstream(Duration::from_secs(5)).await;
    let only = continuator(&upstream);
    tokio::task::block_in_place(|| {
        let mut chat = Chat::start(&only.url, &[OPENER]);
        chat.say("What is the capital of Australia?");
        chat.until("opener_committed");
        only.signal(15);
        std::thread::sleep(Duration::from_millis(300));
        only.signal(15);
        let (status, log) = only.wait();
        assert!(log.contains("told to stop again"), "{log}");
        assert_eq!(status.code(), Some(0), "{log}");
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_continuator_that_says_nothing_is_left() {
    let stalled = Upstream::start(|_, request| {
        if warms_up(request) {
            return vec![Step::Send(upstream::reply(&["x"]))];
        }
        vec![Step::Send(upstream::head()), Step::Send(delta(" is")), Step::Hang]
    })
    .await;
    let good = upstream(Duration::from_millis(1)).await;
    let (first, second) = (continuator(&stalled), continuator(&good));
    tokio::task::block_in_place(|| {
        let mut chat = Chat::start(&format!("{},{}", first.url, second.url), &[OPENER, "--stall=700ms"]);
        chat.say("What is the capital of Australia?");
        let events = chat.reply();
        assert!(has(&events, "lost"), "{events:?}");
        assert_eq!(
            (&last(&events)["text"], &last(&events)["resumed"]),
            (&WHOLE.into(), &1.into())
        );
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_question_interrupts_and_the_next_turn_knows_what_was_heard() {
    let upstream = upstream(Duration::from_millis(30)).await;
    let only = continuator(&upstream);
    for surface in ["revisable", "append-only"] {
        let before = upstream.requests().len();
        tokio::task::block_in_place(|| {
            let args = [OPENER, "--barge-in", "--surface", surface, "--wpm=2000"];
            let mut chat = Chat::start(&only.url, &args);
            chat.say("What is the capital of Australia?");
            chat.until("continuation");
            chat.until("continuation");
            chat.say("Stop! What else?");
            let events = chat.reply();
            let heard = last(&events)["text"].as_str().unwrap().to_owned();
            assert_eq!(last(&events)["finish_reason"], "cancelled", "{events:?}");
            assert!(WHOLE.starts_with(&heard) && heard.len() < WHOLE.len(), "{heard}");
            let events = chat.reply();
            assert_eq!(last(&events)["text"], WHOLE, "{events:?}");
            let requests = upstream.requests();
            let second = requests[before..]
                .iter()
                .rfind(|r| !warms_up(r))
                .expect("a second request");
            let messages = second["messages"].as_array().unwrap();
            let said: Vec<&str> = messages[messages.len() - 4..]
                .iter()
                .map(|m| m["content"].as_str().unwrap())
                .collect();
            assert_eq!(
                said[..3],
                ["What is the capital of Australia?", heard.as_str(), "Stop! What else?"]
            );
        });
        // The upstream's work for the first one was really stopped.
        assert!(upstream.abandoned() > 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn told_to_end_the_edge_cancels_and_says_so() {
    let upstream = upstream(Duration::from_millis(50)).await;
    let only = continuator(&upstream);
    for signal in [2, 15] {
        let before = upstream.abandoned();
        tokio::task::block_in_place(|| {
            let mut chat = Chat::start(&only.url, &[OPENER]);
            chat.say("What is the capital of Australia?");
            chat.until("continuation");
            chat.signal(signal);
            assert_eq!(last(&chat.reply())["finish_reason"], "cancelled");
            assert_eq!(
                chat.end().0.code(),
                Some(if signal == 15 { 130 } else { 0 }),
                "signal {signal}"
            );
        });
        let started = std::time::Instant::now();
        while upstream.abandoned() == before {
            assert!(started.elapsed() < PATIENCE, "the upstream is still asked");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // Between replies, it just ends.
        tokio::task::block_in_place(|| {
            let chat = Chat::start(&only.url, &[OPENER]);
            std::thread::sleep(Duration::from_secs(2));
            chat.signal(signal);
            assert_eq!(chat.end().0.code(), Some(0));
        });
    }
}

#[test]
fn without_a_continuator_the_ulm_answers_alone_and_says_so() {
    for (servers, offline) in [
        (NOBODY, "always"),
        (NOBODY, "auto"),
        ("http://127.0.0.1:9,http://127.0.0.1:10", "auto"),
    ] {
        let done = ask(servers, &["--offline", offline, "What is the capital of France?"]);
        assert_eq!(done.code, 0, "{done:?}");
        let events = done.events();
        assert!(has(&events, "offline"), "{events:?}");
        let end = last(&events);
        assert_eq!((&end["event"], &end["offline"]), (&"end".into(), &true.into()));
        let text = end["text"].as_str().unwrap();
        let words = text.split_whitespace().count();
        assert!((2..=64).contains(&words), "{text}");
    }
    let done = ask(NOBODY, &["--offline=never", "What is the capital of France?"]);
    assert_eq!(done.code, 69, "{done:?}");
}

#[test]
fn a_plain_reply_says_that_it_was_given_offline() {
    let mut command = segue_tests::programs::command("edge-agent");
    command.args(["ask", "--server", NOBODY, "--quiet", "What is the capital of France?"]);
    let done = segue_tests::programs::finish(command, b"");
    assert_eq!(done.code, 0, "{done:?}");
    assert!(
        done.out.contains("(offline: the micro language model answered alone"),
        "{}",
        done.out
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_grows_too_old_in_mid_reply_is_opened_again() {
    let upstream = upstream(Duration::from_millis(60)).await;
    let path = std::env::temp_dir().join(format!("segue-lifetime-{}.toml", std::process::id()));
    let text = format!(
        "[limits]\nlifetime = \"1s\"\n[directives]\nverify = false\n[[backend]]\nkind = \"openai\"\nbase_url = {:?}\nmodel = \"m\"\nmode = \"prefill\"\n",
        upstream.url
    );
    std::fs::write(&path, text).unwrap();
    let only = Continuator::start(&["--config", path.to_str().unwrap()]);
    std::fs::remove_file(path).unwrap();
    tokio::task::block_in_place(|| {
        let mut chat = Chat::start(&only.url, &[OPENER]);
        chat.say("What is the capital of Australia?");
        let events = chat.reply();
        assert_eq!(last(&events)["text"], WHOLE, "{events:?}");
        assert!(last(&events)["resumed"].as_u64() > Some(0), "{events:?}");
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn after_the_last_question_the_edge_can_still_be_stopped() {
    let upstream = upstream(Duration::from_secs(2)).await;
    let only = continuator(&upstream);
    tokio::task::block_in_place(|| {
        let mut chat = Chat::start(&only.url, &[OPENER, "--barge-in"]);
        chat.say("What is the capital of Australia?");
        chat.until("opener_committed");
        chat.no_more_questions();
        std::thread::sleep(Duration::from_millis(300));
        chat.signal(15);
        assert_eq!(last(&chat.reply())["finish_reason"], "cancelled");
        assert_eq!(chat.end().0.code(), Some(130));
    });
}
