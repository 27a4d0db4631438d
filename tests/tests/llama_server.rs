//! A real llama.cpp server with the default model as upstream, in both ways of asking.

use segue_shared::{
    proto::{Surface, cloud_frame::Body},
    reply_log, words,
};
use segue_tests::{
    edge::{Edge, reply},
    llama_server::LlamaServer,
    programs::{Continuator, ask},
    upstream,
};

const QUESTION: &str = "What is the capital of France?";

async fn turn(edge: &mut Edge, id: u64, question: &str, opener: &str) -> (String, Vec<Body>) {
    edge.start(id, question).await;
    edge.commit(id, opener).await;
    let frames = edge.rest(id).await;
    (reply(opener, &frames, reply_log::Surface::Revisable), frames)
}

#[tokio::test(flavor = "multi_thread")]
async fn it_continues_openers_by_prefill_and_when_asked_in_words() {
    let Some(server) = LlamaServer::start(2, 2, 4096) else {
        return;
    };
    for mode in ["prefill", "auto", "prompt"] {
        let args = [&upstream::args(&server.url, mode)[..], &["--no-verify"]].concat();
        let continuator = Continuator::start(&args);
        let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
        let (text, frames) = turn(&mut edge, 1, QUESTION, "The capital of France").await;
        assert!(
            text.starts_with("The capital of France") && words::count(&text) > 4,
            "{mode}: {text}"
        );
        assert!(
            !text.contains("  ") && text.matches("The capital of France").count() == 1,
            "{mode}: {text}"
        );
        if mode != "prompt" {
            assert!(text.starts_with("The capital of France is Paris"), "{mode}: {text}");
        }
        let Some(Body::EndTurn(end)) = frames.last() else {
            panic!("{mode}: {frames:?}")
        };
        let usage = end.usage.unwrap();
        assert!(
            usage.prompt_tokens > 20 && usage.generated_tokens > 0,
            "{mode}: {usage:?}"
        );
        let (_, frames) = turn(&mut edge, 2, "What is the capital of Italy?", "The capital of Italy").await;
        let Some(Body::EndTurn(end)) = frames.last() else {
            panic!("{mode}: {frames:?}")
        };
        let cached = end.usage.unwrap().cached_tokens;
        assert!(cached > 0, "{mode}: what two prompts share is read once: {end:?}");
        if mode == "auto" {
            assert!(continuator.log().contains("Prefill(Flags)"), "{}", continuator.log());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pair_talks_through_it() {
    let Some(server) = LlamaServer::start(2, 2, 4096) else {
        return;
    };
    let args = ["--upstream", &server.url, "--upstream-model", "default", "--no-verify"];
    let continuator = Continuator::start(&args);
    let url = continuator.url.clone();
    let done = tokio::task::spawn_blocking(move || ask(&url, &["How do I make tea?"]))
        .await
        .unwrap();
    assert_eq!(done.code, 0, "{}", done.err);
    let events = done.events();
    let end = events.last().unwrap();
    assert_eq!(end["event"], "end");
    assert!(words::count(end["text"].as_str().unwrap()) > 6, "{end}");
}

/// It cuts the reply of a context that is too small, and says both sizes before.
#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_does_not_fit_is_a_typed_error() {
    let Some(server) = LlamaServer::start(2, 1, 512) else {
        return;
    };
    let args = [&upstream::args(&server.url, "prefill")[..], &["--no-verify"]].concat();
    let continuator = Continuator::start(&args);
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    let (_, frames) = turn(&mut edge, 1, &"why ".repeat(900), "Because it").await;
    let Some(Body::TurnFailed(failed)) = frames.last() else {
        panic!("{frames:?}")
    };
    assert_eq!(failed.error(), segue_shared::proto::TurnError::ContextTooSmall);
    assert!(failed.message.contains("512"), "{}", failed.message);
    let (text, _) = turn(&mut edge, 2, QUESTION, "The capital of France").await;
    assert!(text.contains("Paris"), "the next turn goes on: {text}");
}
