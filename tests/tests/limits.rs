//! What one edge may not do, and what it costs the others: nothing.

use std::time::Duration;

use segue_shared::{
    client::{Access, ConnectError},
    proto::{self, EdgeFrame, GenerationParameters, Heard, StartTurn, Surface, TurnError, cloud_frame::Body},
    reply_log,
};
use segue_tests::{
    edge::{Edge, commit, reply},
    programs::{Continuator, PATIENCE},
    upstream::{self, Step, Upstream, delta, warms_up},
};
use tonic::Code;

const OPENER: &str = "The capital of Australia";

async fn upstream() -> Upstream {
    Upstream::start(|_, request| {
        if warms_up(request) {
            return vec![Step::Send(upstream::reply(&["x"]))];
        }
        let slow = request["messages"].to_string().contains("slowly");
        let mut steps = vec![Step::Send(upstream::head()), Step::Send(delta(" is Canberra"))];
        if slow {
            steps.push(Step::Hang);
        }
        steps.push(Step::Send(upstream::end("stop")));
        steps
    })
    .await
}

/// A continuator with these limits.
fn limited(upstream: &Upstream, name: &str, limits: &str) -> Continuator {
    let path = std::env::temp_dir().join(format!("segue-limits-{name}-{}.toml", std::process::id()));
    let text = format!(
        "[limits]\n{limits}\n[directives]\nverify = false\n[[backend]]\nkind = \"openai\"\nbase_url = {:?}\nmodel = \"m\"\nmode = \"prefill\"\n",
        upstream.url
    );
    std::fs::write(&path, text).unwrap();
    let continuator = Continuator::start(&["--config", path.to_str().unwrap()]);
    std::fs::remove_file(path).unwrap();
    continuator
}

async fn good_turn(edge: &mut Edge, id: u64) {
    edge.start(id, "What is the capital of Australia?").await;
    edge.commit(id, OPENER).await;
    let frames = edge.rest(id).await;
    assert_eq!(
        reply(OPENER, &frames, reply_log::Surface::Revisable),
        "The capital of Australia is Canberra"
    );
}

async fn failure(edge: &mut Edge) -> proto::TurnFailed {
    match edge.next().await {
        Body::TurnFailed(failed) => failed,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_limited_for_each_device_and_in_all() {
    let upstream = upstream().await;
    let continuator = limited(&upstream, "streams", "streams = 3\nstreams_per_device = 2");
    let connect =
        async |device: &str| Edge::try_connect(&continuator.url, &Access::default(), device, Surface::Revisable).await;
    let mut one = connect("kitchen").await.unwrap();
    let two = connect("kitchen").await.unwrap();
    let refused = connect("kitchen").await.err().expect("a third one is refused");
    assert!(
        matches!(&refused, ConnectError::Refused(_, why) if why.contains("2 streams")),
        "{refused}"
    );
    let mut hall = connect("hall").await.unwrap();
    let refused = connect("cellar").await.err().expect("a fourth one is refused");
    assert!(refused.to_string().contains("3 streams"), "{refused}");
    for edge in [&mut one, &mut hall] {
        good_turn(edge, 1).await;
    }
    drop(two);
    tokio::time::sleep(Duration::from_millis(300)).await;
    good_turn(&mut connect("cellar").await.unwrap(), 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn turns_are_limited_by_rate_with_a_hint() {
    let upstream = upstream().await;
    let continuator = limited(&upstream, "rate", "turns_per_minute = 60");
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    let mut n = 0;
    let hint = loop {
        n += 1;
        edge.start(n, "What is the capital of Australia?").await;
        edge.commit(n, OPENER).await;
        match edge.rest(n).await.pop().unwrap() {
            Body::TurnFailed(failed) => break failed,
            _ => assert!(n < 200, "the limit is never reached"),
        }
    };
    assert!(n > 60, "{n}");
    assert_eq!((hint.error(), hint.retryable), (TurnError::Overloaded, true));
    let wait = proto::std_duration(hint.retry_after).expect("a hint");
    assert!(wait <= Duration::from_secs(1), "{wait:?}");
    // The commit of the turn that was not begun is for no turn.
    assert_eq!(failure(&mut edge).await.error(), TurnError::UnknownTurn);
    tokio::time::sleep(wait).await;
    good_turn(&mut edge, n + 1).await;
    good_turn(&mut Edge::connect(&continuator.url, Surface::Revisable).await, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_all_places_are_taken_running_turns_go_on_and_new_ones_are_turned_away() {
    let upstream = upstream().await;
    let continuator = limited(&upstream, "turns", "turns = 2");
    let mut busy = Edge::connect(&continuator.url, Surface::Revisable).await;
    for id in [1, 2] {
        busy.start(id, "Tell me slowly").await;
        busy.commit(id, OPENER).await;
        assert!(matches!(busy.next().await, Body::Chunk(_)));
    }
    let mut other = Edge::connect(&continuator.url, Surface::Revisable).await;
    other.start(1, "What?").await;
    let failed = failure(&mut other).await;
    assert_eq!((failed.error(), failed.retryable), (TurnError::Overloaded, true));
    assert!(failed.retry_after.is_some());
    busy.send(proto::CancelTurn {
        turn_id: 1,
        heard_bytes: 0,
    })
    .await;
    assert!(matches!(busy.next().await, Body::EndTurn(end) if end.finish_reason() == proto::FinishReason::Cancelled));
    good_turn(&mut other, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_huge_message_ends_its_own_stream_only() {
    let upstream = upstream().await;
    let continuator = limited(&upstream, "huge", "");
    let mut good = Edge::connect(&continuator.url, Surface::Revisable).await;
    let mut bad = Edge::connect(&continuator.url, Surface::Revisable).await;
    bad.start(1, &"x".repeat(100 << 20)).await;
    let status = loop {
        match bad.try_next().await {
            Err(status) => break status,
            Ok(frame) => assert!(frame.is_some(), "the stream ends with a status"),
        }
    };
    assert!(
        matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted),
        "{status:?}"
    );
    good_turn(&mut good, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_heard_than_there_is_fails_the_turn() {
    let upstream = upstream().await;
    let continuator = limited(&upstream, "heard", "");
    let mut edge = Edge::connect(&continuator.url, Surface::AppendOnly).await;
    // Before the commit, which then does not fit.
    edge.start(1, "Tell me slowly").await;
    edge.send(Heard { turn_id: 1, bytes: 99 }).await;
    edge.commit(1, OPENER).await;
    assert_eq!(failure(&mut edge).await.error(), TurnError::InvalidArgument);
    // And after it.
    edge.start(2, "Tell me slowly").await;
    edge.commit(2, OPENER).await;
    assert!(matches!(edge.next().await, Body::Chunk(_)));
    edge.send(Heard { turn_id: 2, bytes: 36 }).await;
    edge.send(Heard { turn_id: 2, bytes: 37 }).await;
    let failed = failure(&mut edge).await;
    assert_eq!(failed.error(), TurnError::InvalidArgument);
    assert!(
        failed.message.contains("37") && failed.message.contains("36"),
        "{}",
        failed.message
    );
    edge.start(3, "What?").await;
    edge.commit(3, OPENER).await;
    assert!(matches!(edge.rest(3).await.last(), Some(Body::EndTurn(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_may_contradict_its_deltas_and_deltas_may_not_follow_it() {
    let upstream = upstream().await;
    let continuator = limited(&upstream, "commit", "");
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    edge.start(1, "What is the capital of Australia?").await;
    edge.delta(1, 0, "Something else").await;
    edge.commit(1, OPENER).await;
    let frames = edge.rest(1).await;
    assert_eq!(
        reply(OPENER, &frames, reply_log::Surface::Revisable),
        "The capital of Australia is Canberra"
    );
    edge.start(2, "Tell me slowly").await;
    edge.commit(2, OPENER).await;
    assert!(matches!(edge.next().await, Body::Chunk(_)));
    edge.delta(2, OPENER.len() as u32, " late").await;
    assert_eq!(failure(&mut edge).await.error(), TurnError::UnexpectedFrame);
    good_turn(&mut edge, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_never_reads_costs_the_others_nothing() {
    // More text than all buffers on the way hold.
    let flood = Upstream::start(|_, request| {
        if warms_up(request) || !request["messages"].to_string().contains("flood") {
            return vec![Step::Send(upstream::reply(&[" is Canberra"]))];
        }
        let mut steps = vec![Step::Send(upstream::head())];
        steps.extend((0..4_000).map(|_| Step::Send(delta(&" word".repeat(1600)))));
        steps.push(Step::Send(upstream::end("stop")));
        steps
    })
    .await;
    let continuator = limited(&flood, "reader", "tokens = 1000000");
    let bad = Edge::connect(&continuator.url, Surface::Revisable).await;
    let start = StartTurn {
        turn_id: 1,
        user_text: "A flood of words".into(),
        parameters: Some(GenerationParameters {
            max_tokens: 1_000_000,
            ..GenerationParameters::default()
        }),
        ..StartTurn::default()
    };
    bad.send(start).await;
    bad.send(EdgeFrame::from(commit(1, OPENER))).await;
    let mut good = Edge::connect(&continuator.url, Surface::Revisable).await;
    for id in 1..=20 {
        good_turn(&mut good, id).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let started = std::time::Instant::now();
    while !continuator.log().contains("took no frame") {
        assert!(
            started.elapsed() < PATIENCE,
            "a reader that never reads is never given up"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // The upstream is not asked to go on for nobody.
    while flood.running() > 0 {
        assert!(started.elapsed() < PATIENCE, "the turn nobody reads goes on for ever");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // It learns why, when it reads at last.
    let mut bad = bad;
    let status = loop {
        match bad.try_next().await {
            Err(status) => break status,
            Ok(frame) => assert!(frame.is_some(), "the stream ends with a status"),
        }
    };
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_limited() {
    let upstream = upstream().await;
    let continuator = limited(&upstream, "connections", "connections = 2");
    let mut one = Edge::connect(&continuator.url, Surface::Revisable).await;
    let two = Edge::connect(&continuator.url, Surface::Revisable).await;
    let three = Edge::try_connect(&continuator.url, &Access::default(), "three", Surface::Revisable).await;
    assert!(three.is_err(), "a third connection is closed");
    good_turn(&mut one, 1).await;
    drop(two);
    let started = std::time::Instant::now();
    let mut again = loop {
        match Edge::try_connect(&continuator.url, &Access::default(), "again", Surface::Revisable).await {
            Ok(edge) => break edge,
            Err(error) => assert!(started.elapsed() < PATIENCE, "the place is never free: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    good_turn(&mut again, 1).await;
}
