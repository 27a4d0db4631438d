//! The `openai` backend against servers that behave as real ones do on good and bad days.

use std::time::Duration;

use segue_shared::{
    proto::{Surface, TurnError, TurnFailed, Usage, cloud_frame::Body},
    reply_log,
};
use segue_tests::{
    edge::{Edge, reply},
    programs::Continuator,
    upstream::{self, Step, Upstream, delta, prefix, warms_up},
};
use serde_json::{Value, json};

const OPENER: &str = "The capital of Australia";
const REST: &[&str] = &[" is", " Can", "berra", "."];
const WHOLE: &str = "The capital of Australia is Canberra.";

fn continuator(url: &str, mode: &str, more: &[&str]) -> Continuator {
    let args = [&upstream::args(url, mode)[..], &["--no-verify"]].concat();
    Continuator::start(&[&args[..], more].concat())
}

/// Runs a turn; returns the reply text and its last frame.
async fn turn_of(edge: &mut Edge, id: u64, opener: &str) -> (String, Body) {
    edge.start(id, "What is the capital of Australia?").await;
    edge.commit(id, opener).await;
    let frames = edge.rest(id).await;
    let text = reply(opener, &frames, reply_log::Surface::Revisable);
    (text, frames.last().unwrap().clone())
}

/// The outcome of one turn against an upstream that answers every request but warm-ups with `answer`.
async fn turn(
    mode: &str,
    answer: impl Fn(usize, &Value) -> Vec<Step> + Send + Sync + 'static,
) -> (String, Body, Vec<Value>) {
    let upstream = Upstream::start(move |n, request| {
        if warms_up(request) {
            return vec![Step::Send(upstream::reply(&["x"]))];
        }
        answer(n, request)
    })
    .await;
    let continuator = continuator(&upstream.url, mode, &[]);
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    let (text, last) = turn_of(&mut edge, 1, OPENER).await;
    (text, last, upstream.requests())
}

fn usage(last: &Body) -> Usage {
    match last {
        Body::EndTurn(end) => end.usage.unwrap(),
        other => panic!("{other:?}"),
    }
}

fn failure(last: &Body) -> &TurnFailed {
    match last {
        Body::TurnFailed(failed) => failed,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prefill_sends_the_opener_as_the_last_message() {
    let (text, last, requests) = turn("prefill", |_, _| vec![Step::Send(upstream::reply(REST))]).await;
    assert_eq!(text, WHOLE);
    let generation = requests.last().unwrap();
    assert_eq!(prefix(generation), Some(OPENER));
    assert_eq!(
        (&generation["continue_final_message"], &generation["stream"]),
        (&json!(true), &json!(true))
    );
    let usage = usage(&last);
    assert_eq!(
        (usage.prompt_tokens, usage.cached_tokens, usage.generated_tokens),
        (30, 16, 7)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_warms_the_cache_before_there_is_an_opener() {
    let upstream = Upstream::start(|_, _| vec![Step::Send(upstream::reply(REST))]).await;
    let continuator = continuator(&upstream.url, "prefill", &[]);
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    edge.start(1, "What is the capital of Australia?").await;
    while upstream.requests().is_empty() || upstream.running() > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(warms_up(&upstream.requests()[0]));
    tokio::time::sleep(Duration::from_millis(50)).await;
    edge.commit(1, OPENER).await;
    let last = edge.rest(1).await.pop().unwrap();
    assert_eq!(
        usage(&last).wasted_tokens,
        7,
        "what the warm-up generated is counted apart"
    );
    let requests = upstream.requests();
    let (first, second) = (&requests[0]["messages"], &requests[1]["messages"]);
    let shared = first.as_array().unwrap().len();
    assert_eq!(
        &second.as_array().unwrap()[..shared],
        &first.as_array().unwrap()[..],
        "one prefix for the cache"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn prompt_mode_asks_in_words_and_drops_what_is_repeated() {
    for answer in [
        REST,
        &["The capital", " of Australia", " is Canberra."],
        &["... ", "is Canberra."],
    ] {
        let (text, _, requests) = turn("prompt", move |_, _| vec![Step::Send(upstream::reply(answer))]).await;
        assert_eq!(text, WHOLE, "{answer:?}");
        let generation = requests.last().unwrap();
        assert_eq!(prefix(generation), None);
        assert!(generation["messages"].to_string().contains(OPENER));
        assert!(generation.get("continue_final_message").is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn auto_probes_once_and_finds_servers_that_take_prefill() {
    let upstream = Upstream::start(|_, request| match prefix(request) {
        Some("41, 42, 43,") => vec![Step::Send(upstream::reply(&[" 44", ","]))],
        _ => vec![Step::Send(upstream::reply(REST))],
    })
    .await;
    let continuator = continuator(&upstream.url, "auto", &[]);
    for stream in 0..2 {
        let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
        for id in 1..3 {
            assert_eq!(turn_of(&mut edge, id, OPENER).await.0, WHOLE, "{stream}");
        }
    }
    let requests = upstream.requests();
    let probes = requests.iter().filter(|r| prefix(r) == Some("41, 42, 43,")).count();
    let prefills = requests.iter().filter(|r| prefix(r) == Some(OPENER)).count();
    assert_eq!((probes, prefills), (1, 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn auto_asks_in_words_where_prefill_is_refused_or_ignored() {
    for refuses in [true, false] {
        let upstream = Upstream::start(move |_, request| match prefix(request) {
            Some(_) if refuses => upstream::error(400, &[], "assistant prefill is not supported"),
            Some(_) => vec![Step::Send(upstream::reply(&["Sure! 1, 2, 3"]))],
            None => vec![Step::Send(upstream::reply(REST))],
        })
        .await;
        let continuator = continuator(&upstream.url, "auto", &[]);
        let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
        for id in 1..4 {
            assert_eq!(turn_of(&mut edge, id, OPENER).await.0, WHOLE);
        }
        let with_prefix = upstream.requests().iter().filter(|r| prefix(r).is_some()).count();
        assert!(with_prefix <= 2, "it is remembered: {with_prefix}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn auto_finds_out_when_a_model_upgrade_ends_prefill() {
    let upstream = Upstream::start(|n, request| match prefix(request) {
        Some("41, 42, 43,") if n == 0 => vec![Step::Send(upstream::reply(&["44"]))],
        Some(_) if n > 4 => upstream::error(400, &[], "final message must not be from the assistant"),
        _ => vec![Step::Send(upstream::reply(REST))],
    })
    .await;
    let continuator = continuator(&upstream.url, "auto", &[]);
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    for id in 1..6 {
        assert_eq!(turn_of(&mut edge, id, OPENER).await.0, WHOLE, "no turn notices");
    }
    assert_eq!(prefix(upstream.requests().last().unwrap()), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_may_be_cut_into_any_pieces() {
    // Every byte on its own, with comments, other line ends, and an event over two lines.
    let event = |text: &str, end: &str| {
        let data = json!({"choices": [{"delta": {"content": text}}]}).to_string();
        format!("data: {data}{end}{end}")
    };
    let body = format!(
        ": hello\n\nevent: message\nid: 1\n{}{}: ping\r\n\r\n{}data: {{\"choices\":[{{\"delta\":{{}},\ndata: \"finish_reason\":\"stop\"}}]}}\n\ndata: [DONE]\n\n",
        event(" is café", "\n"),
        event(" 東京", "\r\n"),
        event(" 🎉.", "\n"),
    );
    let (text, ..) = turn("prefill", move |_, _| {
        let mut steps = vec![Step::Send(upstream::head())];
        steps.extend(body.as_bytes().iter().map(|byte| Step::Send(upstream::chunk(&[*byte]))));
        steps.push(Step::Send(b"0\r\n\r\n".to_vec()));
        steps
    })
    .await;
    assert_eq!(text, "The capital of Australia is café 東京 🎉.");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_may_end_without_done_or_come_whole() {
    let finish = upstream::event(&json!({"choices": [{"delta": {}, "finish_reason": "length"}]}));
    let no_done = [upstream::head(), delta(" is Canberra."), finish, b"0\r\n\r\n".to_vec()].concat();
    let no_finish = [
        upstream::head(),
        delta(" is Canberra."),
        upstream::chunk(b"data: [DONE]\n\n"),
        b"0\r\n\r\n".to_vec(),
    ]
    .concat();
    let body = json!({"choices": [{"message": {"role": "assistant", "content": format!("{WHOLE}")}, "finish_reason": "stop"}]});
    let unstreamed = upstream::whole(200, &[], &body.to_string());
    for answer in [no_done, no_finish, unstreamed] {
        let (text, last, _) = turn("prefill", move |_, _| vec![Step::Send(answer.clone())]).await;
        assert_eq!(text, WHOLE);
        assert!(matches!(last, Body::EndTurn(_)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn thinking_never_reaches_the_surface() {
    let thought = |text: &str| upstream::event(&json!({"choices": [{"delta": {"reasoning_content": text}}]}));
    let channel = [
        upstream::head(),
        thought("Hm, the capital"),
        delta(" is Canberra."),
        upstream::end("stop"),
    ]
    .concat();
    let tags = upstream::reply(&["<thi", "nk>Sydney?", " No.</th", "ink>\n\n", " is", " Canberra."]);
    for answer in [channel, tags] {
        let (text, ..) = turn("prefill", move |_, _| vec![Step::Send(answer.clone())]).await;
        assert_eq!(text, WHOLE);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_typed() {
    let stops = |steps: Vec<Step>| move |_: usize, _: &Value| steps.clone();
    let (_, last, _) = turn("prefill", stops(upstream::error(401, &[], "bad key"))).await;
    let failed = failure(&last);
    assert_eq!((failed.error(), failed.retryable), (TurnError::Backend, false));
    assert!(failed.message.contains("401"), "{}", failed.message);

    let (_, last, _) = turn("prefill", stops(upstream::error(429, &["Retry-After: 7"], "slow down"))).await;
    let failed = failure(&last);
    assert_eq!((failed.error(), failed.retryable), (TurnError::Overloaded, true));
    assert_eq!(failed.retry_after.unwrap().seconds, 7);

    let body = r#"{"error":{"code":400,"message":"long","type":"exceed_context_size_error","n_prompt_tokens":900,"n_ctx":512}}"#;
    let (_, last, _) = turn("prefill", stops(vec![Step::Send(upstream::whole(400, &[], body))])).await;
    let failed = failure(&last);
    assert_eq!(failed.error(), TurnError::ContextTooSmall);
    assert!(
        failed.message.contains("900") && failed.message.contains("512"),
        "{}",
        failed.message
    );

    let broken = [
        upstream::head(),
        delta(" is"),
        upstream::event(&json!({"error": {"message": "out of memory", "code": 500}})),
    ]
    .concat();
    let (text, last, _) = turn("prefill", stops(vec![Step::Send(broken)])).await;
    assert!(text.starts_with("The capital of Australia is"));
    assert!(failure(&last).message.contains("out of memory"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stall_and_a_reset_end_a_turn_without_another_backend() {
    let config = std::env::temp_dir().join(format!("segue-stall-{}.toml", std::process::id()));
    for (steps, says) in [
        (
            vec![Step::Send([upstream::head(), delta(" is")].concat()), Step::Hang],
            "sent nothing",
        ),
        (
            vec![Step::Send([upstream::head(), delta(" is")].concat()), Step::Reset],
            "broke off",
        ),
    ] {
        let upstream = Upstream::start(move |_, _| steps.clone()).await;
        let text = format!(
            "[directives]\nverify = false\n[[backend]]\nkind = \"openai\"\nbase_url = {:?}\nmodel = \"m\"\nmode = \"prefill\"\nwarm_up = false\nstall_timeout = \"200ms\"",
            upstream.url
        );
        std::fs::write(&config, text).unwrap();
        let continuator = Continuator::start(&["--config", config.to_str().unwrap()]);
        let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
        let (_, last) = turn_of(&mut edge, 1, OPENER).await;
        let failed = failure(&last);
        assert!(failed.retryable && failed.message.contains(says), "{}", failed.message);
        assert!(upstream.requests().len() <= 8, "tries have an end");
    }
    let _ = std::fs::remove_file(config);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_a_turn_or_hanging_up_cancels_the_request() {
    let upstream = Upstream::start(|_, request| {
        if warms_up(request) {
            return vec![Step::Send(upstream::reply(&["x"]))];
        }
        let mut steps = vec![Step::Send(upstream::head())];
        for _ in 0..2000 {
            steps.extend([Step::Send(delta(" word")), Step::Wait(Duration::from_millis(10))]);
        }
        steps
    })
    .await;
    let continuator = continuator(&upstream.url, "prefill", &[]);
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    edge.start(1, "Tell me a story.").await;
    edge.commit(1, OPENER).await;
    while !matches!(edge.next().await, Body::Chunk(_)) {}
    edge.send(segue_shared::proto::CancelTurn {
        turn_id: 1,
        heard_bytes: 3,
    })
    .await;
    let last = edge.rest(1).await.pop().unwrap();
    assert!(usage(&last).wasted_tokens > 0, "it was paid for");
    until(|| upstream.abandoned() == 1).await;

    edge.start(2, "Tell me a story.").await;
    edge.commit(2, OPENER).await;
    while !matches!(edge.next().await, Body::Chunk(_)) {}
    drop(edge);
    until(|| upstream.abandoned() == 2 && upstream.running() == 0).await;
}

async fn until(done: impl Fn() -> bool) {
    for _ in 0..1000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it does not come");
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_texts_end_a_reply_and_the_request() {
    let upstream = Upstream::start(|_, _| {
        let mut steps = vec![Step::Send(
            [upstream::head(), delta(" is Canberra. EN"), delta("D of story")].concat(),
        )];
        steps.push(Step::Hang);
        steps
    })
    .await;
    let continuator = continuator(&upstream.url, "prefill", &[]);
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    edge.send(segue_shared::proto::StartTurn {
        turn_id: 1,
        user_text: "What is it?".into(),
        parameters: Some(segue_shared::proto::GenerationParameters {
            stop: vec!["END".into()],
            ..Default::default()
        }),
        ..Default::default()
    })
    .await;
    edge.commit(1, OPENER).await;
    let frames = edge.rest(1).await;
    assert_eq!(reply(OPENER, &frames, reply_log::Surface::Revisable), WHOLE);
    until(|| upstream.running() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_judge_is_asked_where_nobody_scores() {
    let upstream = Upstream::start(|_, request| {
        if request.to_string().contains("[accept]") {
            return vec![Step::Send(upstream::reply(&["[revise", " 4]\n", " is", " Canberra."]))];
        }
        vec![Step::Send(upstream::reply(&["x"]))]
    })
    .await;
    let args = upstream::args(&upstream.url, "prefill");
    let continuator = Continuator::start(&args);
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    let (text, last) = turn_of(&mut edge, 1, "The capital of Australia is Sydney").await;
    assert_eq!(text, WHOLE);
    assert!(matches!(last, Body::EndTurn(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_sent_and_never_logged() {
    let upstream = Upstream::start(|_, _| upstream::error(500, &[], "canary-message")).await;
    let key = std::env::temp_dir().join(format!("segue-upstream-key-{}", std::process::id()));
    std::fs::write(&key, "sk-canary-key\n").unwrap();
    let args = [&upstream::args(&upstream.url, "prefill")[..], &["--no-verify"]].concat();
    let args = [&args[..], &["--upstream-key-file", key.to_str().unwrap()]].concat();
    let continuator = Continuator::start_with(&args, |command| {
        command.env("SEGUE_LOG", "trace");
    });
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    let (_, last) = turn_of(&mut edge, 1, OPENER).await;
    assert!(matches!(last, Body::TurnFailed(_)));
    let (headers, _) = upstream.with_headers().pop().unwrap();
    assert!(
        headers
            .iter()
            .any(|h| h.to_lowercase() == "authorization: bearer sk-canary-key"),
        "{headers:?}"
    );
    for secret in ["canary-key", "canary-message", "capital"] {
        assert!(!continuator.log().contains(secret), "{secret} in the log");
    }
    let _ = std::fs::remove_file(key);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_of_the_environment_is_used() {
    let proxy = Upstream::start(|_, _| vec![Step::Send(upstream::reply(REST))]).await;
    let args = [
        &upstream::args("http://llm.invalid:8000/v1", "prefill")[..],
        &["--no-verify"],
    ]
    .concat();
    let continuator = Continuator::start_with(&args, |command| {
        command.env("HTTP_PROXY", proxy.url.trim_end_matches("/v1"));
    });
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    assert_eq!(turn_of(&mut edge, 1, OPENER).await.0, WHOLE);
    let (head, _) = proxy.with_headers().pop().unwrap();
    assert!(
        head[0].contains("http://llm.invalid:8000/v1/chat/completions"),
        "{head:?}"
    );
}
