//! The real continuator against edges that keep to the protocol, and such that do not. Each has a defined answer and costs the others
//! nothing.

use segue_shared::{
    client,
    proto::{
        self, EdgeFrame, Hello, StartTurn, Surface, TurnError, cloud_frame::Body,
        continuator_service_client::ContinuatorServiceClient,
    },
    reply_log,
};
use segue_tests::{
    edge::{Edge, commit, reply},
    programs::Continuator,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

#[track_caller]
fn failed(body: &Body, turn: u64, error: TurnError) {
    match body {
        Body::TurnFailed(f) => assert_eq!((f.turn_id, f.error()), (turn, error), "{}", f.message),
        other => panic!("{other:?}"),
    }
}

/// A turn that must succeed, to show that the stream still serves.
async fn good_turn(edge: &mut Edge, id: u64) -> String {
    edge.start(id, "How do I make tea?").await;
    edge.delta(id, 0, "To make").await;
    edge.delta(id, 7, " tea,").await;
    edge.commit(id, "To make tea,").await;
    let frames = edge.rest(id).await;
    assert!(matches!(frames.last(), Some(Body::EndTurn(_))), "{frames:?}");
    reply("To make tea,", &frames, reply_log::Surface::Revisable)
}

/// Opens a stream by hand and sends one frame; the status it ends with.
async fn first_frame(url: &str, frame: EdgeFrame) -> tonic::Status {
    let channel = client::connect(url, &client::Access::default()).await.unwrap();
    let (out, frames) = tokio::sync::mpsc::channel(4);
    out.send(frame).await.unwrap();
    let mut answer = ContinuatorServiceClient::new(channel)
        .converse(ReceiverStream::new(frames))
        .await
        .unwrap()
        .into_inner();
    answer.message().await.expect_err("the handshake fails")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_handshake() {
    let continuator = Continuator::start(&[]);
    let url = continuator.url.as_str();
    let early = first_frame(
        url,
        StartTurn {
            turn_id: 1,
            user_text: "hi".into(),
            ..StartTurn::default()
        }
        .into(),
    )
    .await;
    assert_eq!(
        (early.code(), early.message().contains("Hello")),
        (Code::InvalidArgument, true)
    );
    let empty = first_frame(url, EdgeFrame { body: None }).await;
    assert_eq!(empty.code(), Code::InvalidArgument);
    let newer = first_frame(
        url,
        Hello {
            min_protocol_version: 90,
            max_protocol_version: 91,
            ..Hello::default()
        }
        .into(),
    )
    .await;
    assert_eq!(
        (newer.code(), newer.message().contains("90 to 91")),
        (Code::FailedPrecondition, true),
        "{newer:?}"
    );
    let long = Hello {
        min_protocol_version: 1,
        max_protocol_version: 1,
        device_id: "x".repeat(129),
        ..Hello::default()
    };
    assert_eq!(first_frame(url, long.into()).await.code(), Code::InvalidArgument);

    let mut edge = Edge::connect(url, Surface::Revisable).await;
    let welcome = edge.welcome();
    let limits = welcome.limits.unwrap();
    assert!(
        welcome.protocol_version == 1 && !welcome.model.is_empty() && limits.max_turns > 0 && limits.idle.is_some()
    );
    let text = good_turn(&mut edge, 1).await;
    assert!(text.len() > "To make tea,".len());
    // What was measured is told to the next edge.
    let later = Edge::connect(url, Surface::Revisable).await;
    assert!(later.welcome().first_token_estimate.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_rules_are_answered_and_the_stream_goes_on() {
    let continuator = Continuator::start(&[]);
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    edge.send(Hello {
        min_protocol_version: 1,
        max_protocol_version: 1,
        ..Hello::default()
    })
    .await;
    failed(&edge.next().await, 0, TurnError::UnexpectedFrame);
    edge.send(EdgeFrame { body: None }).await;
    failed(&edge.next().await, 0, TurnError::InvalidArgument);

    edge.delta(5, 0, "words").await;
    failed(&edge.next().await, 5, TurnError::UnknownTurn);
    edge.commit(5, "words").await;
    failed(&edge.next().await, 5, TurnError::UnknownTurn);
    edge.send(proto::CancelTurn {
        turn_id: 5,
        heard_bytes: 0,
    })
    .await;
    failed(&edge.next().await, 5, TurnError::UnknownTurn);

    good_turn(&mut edge, 10).await;
    edge.start(10, "again").await;
    failed(&edge.next().await, 0, TurnError::InvalidArgument);
    edge.start(3, "back").await;
    failed(&edge.next().await, 0, TurnError::InvalidArgument);

    edge.start(11, "What is this?").await;
    edge.delta(11, 4, "gap").await;
    failed(&edge.next().await, 11, TurnError::InvalidArgument);
    edge.start(12, "What is this?").await;
    edge.commit(12, "It is a test").await;
    edge.delta(12, 0, "late").await;
    failed(edge.rest(12).await.last().unwrap(), 12, TurnError::UnexpectedFrame);
    edge.start(13, "What is this?").await;
    edge.send(proto::CommitOpener {
        turn_id: 13,
        ..proto::CommitOpener::default()
    })
    .await;
    failed(&edge.next().await, 13, TurnError::InvalidArgument);

    edge.start(14, "  ").await;
    failed(&edge.next().await, 14, TurnError::InvalidArgument);
    let parameters = proto::GenerationParameters {
        temperature: Some(f32::NAN),
        ..Default::default()
    };
    edge.send(StartTurn {
        turn_id: 15,
        user_text: "x".into(),
        parameters: Some(parameters),
        ..StartTurn::default()
    })
    .await;
    failed(&edge.next().await, 15, TurnError::InvalidArgument);
    let history = vec![proto::Message {
        role: proto::Role::User.into(),
        text: "x".repeat(200_000),
    }];
    edge.send(StartTurn {
        turn_id: 16,
        user_text: "x".into(),
        history,
        ..StartTurn::default()
    })
    .await;
    failed(&edge.next().await, 16, TurnError::InvalidArgument);
    good_turn(&mut edge, 17).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oversized_frame_ends_its_own_turn_and_a_huge_one_its_own_stream() {
    let continuator = Continuator::start(&[]);
    let mut other = Edge::connect(&continuator.url, Surface::Revisable).await;
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    edge.start(1, &"x".repeat(1 << 20)).await;
    failed(&edge.next().await, 1, TurnError::InvalidArgument);
    good_turn(&mut edge, 2).await;
    edge.start(3, &"x".repeat(8 << 20)).await;
    assert!(edge.try_next().await.is_err(), "the stream ends with a status");
    good_turn(&mut other, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_replaces_its_deltas() {
    let continuator = Continuator::start(&["--no-verify"]);
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    let ask = |id: u64| StartTurn {
        turn_id: id,
        user_text: "Who painted the Mona Lisa?".into(),
        ..StartTurn::default()
    };
    edge.send(ask(1)).await;
    edge.delta(1, 0, "Bananas are").await;
    edge.send(commit(1, "The Mona Lisa was painted")).await;
    let contradicted = reply(
        "The Mona Lisa was painted",
        &edge.rest(1).await,
        reply_log::Surface::Revisable,
    );
    edge.send(ask(2)).await;
    edge.send(commit(2, "The Mona Lisa was painted")).await;
    let plain = reply(
        "The Mona Lisa was painted",
        &edge.rest(2).await,
        reply_log::Surface::Revisable,
    );
    assert_eq!(contradicted, plain);
    // Without an opener the model answers from the beginning.
    edge.send(ask(3)).await;
    edge.commit(3, "").await;
    let whole = reply("", &edge.rest(3).await, reply_log::Surface::Revisable);
    assert!(
        !whole.is_empty() && !whole.starts_with(char::is_whitespace),
        "{whole:?}"
    );
}

/// However the opener arrives, word by word, in one piece or with another turn in between, the reply is the same.
#[tokio::test(flavor = "multi_thread")]
async fn the_way_an_opener_arrives_does_not_change_the_reply() {
    let continuator = Continuator::start(&["--no-verify"]);
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    let opener = "To boil an egg, put it";
    let mut replies = Vec::new();
    for (id, cut) in [(1, 1000), (2, 1), (3, 4), (4, 9)] {
        edge.start(id, "How do I boil an egg?").await;
        let mut at = 0;
        while at < opener.len() {
            let end = (at + cut).min(opener.len());
            edge.delta(id, at as u32, &opener[at..end]).await;
            at = end;
        }
        edge.commit(id, opener).await;
        replies.push(reply(opener, &edge.rest(id).await, reply_log::Surface::Revisable));
    }
    assert!(replies.iter().all(|r| *r == replies[0]), "{replies:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn turns_share_a_stream_and_cancelling_one_leaves_the_others() {
    let continuator = Continuator::start(&["--no-verify"]);
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    for id in 1..=4 {
        edge.start(id, &format!("Tell me {id} things about the sea.")).await;
    }
    for id in 1..=4 {
        edge.commit(id, "The sea is").await;
    }
    edge.send(proto::CancelTurn {
        turn_id: 2,
        heard_bytes: 3,
    })
    .await;
    let (mut ends, mut after_cancel) = (Vec::new(), 0);
    while ends.len() < 4 {
        match edge.next().await {
            Body::EndTurn(end) => ends.push((end.turn_id, end.finish_reason())),
            Body::Chunk(chunk) if ends.iter().any(|e| e.0 == chunk.turn_id) => after_cancel += 1,
            Body::TurnFailed(f) => panic!("{f:?}"),
            _ => {}
        }
    }
    assert_eq!(after_cancel, 0, "nothing comes after a turn's end");
    ends.sort_unstable_by_key(|e| e.0);
    assert_eq!(ends[1], (2, proto::FinishReason::Cancelled));
    assert!(
        [0, 2, 3]
            .iter()
            .all(|n| ends[*n].1 == proto::FinishReason::Stop || ends[*n].1 == proto::FinishReason::Length)
    );
    // A cancel that crosses the end on the way is no error.
    edge.send(proto::CancelTurn {
        turn_id: 3,
        heard_bytes: 3,
    })
    .await;
    edge.silence().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_texts_and_limits_are_kept() {
    let continuator = Continuator::start(&["--no-verify"]);
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    let turn = |id, parameters| StartTurn {
        turn_id: id,
        user_text: "Who painted the Mona Lisa?".into(),
        parameters: Some(parameters),
        ..StartTurn::default()
    };
    edge.send(turn(
        1,
        proto::GenerationParameters {
            stop: vec!["Vinci".into(), "never".into()],
            ..Default::default()
        },
    ))
    .await;
    edge.commit(1, "The Mona Lisa was painted").await;
    let frames = edge.rest(1).await;
    let text = reply("The Mona Lisa was painted", &frames, reply_log::Surface::Revisable);
    assert_eq!(text, "The Mona Lisa was painted by Leonardo da");
    edge.send(turn(
        2,
        proto::GenerationParameters {
            max_tokens: 1,
            ..Default::default()
        },
    ))
    .await;
    edge.commit(2, "The Mona Lisa was painted").await;
    let frames = edge.rest(2).await;
    let Some(Body::EndTurn(end)) = frames.last() else {
        panic!("{frames:?}")
    };
    assert_eq!(
        (end.finish_reason(), end.usage.unwrap().generated_tokens),
        (proto::FinishReason::Length, 1)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection_are_served() {
    let continuator = Continuator::start(&[]);
    let channel = client::connect(&continuator.url, &client::Access::default())
        .await
        .unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let request = tonic_health::pb::HealthCheckRequest {
        service: "segue.v1.ContinuatorService".into(),
    };
    let status = health.check(request).await.unwrap().into_inner().status();
    assert_eq!(status, tonic_health::pb::health_check_response::ServingStatus::Serving);

    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let list = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(tokio_stream::iter([list]))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else {
        panic!("{answer:?}")
    };
    let names: Vec<_> = list.service.into_iter().map(|s| s.name).collect();
    assert!(names.contains(&"segue.v1.ContinuatorService".to_owned()), "{names:?}");
    assert!(names.contains(&"grpc.health.v1.Health".to_owned()), "{names:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_continuator_drains() {
    let continuator = Continuator::start(&["--no-verify"]);
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    edge.start(1, "Tell me about the sea.").await;
    edge.commit(1, "The sea is").await;
    let first = edge.next().await;
    continuator.signal(15);
    let mut frames = vec![first];
    frames.extend(edge.rest(1).await);
    assert!(
        matches!(frames.last(), Some(Body::EndTurn(_))),
        "the running turn is finished: {frames:?}"
    );
    while let Ok(Some(frame)) = edge.try_next().await {
        frames.extend(frame.body);
    }
    assert!(
        frames.iter().any(|f| matches!(f, Body::Drain(_))),
        "the edge is told: {frames:?}"
    );
    drop(edge);
    let (status, log) = continuator.wait();
    assert!(status.success(), "{status}\n{log}");
}

/// Frames of a running turn are still read while the continuator drains; new turns are turned away.
#[tokio::test(flavor = "multi_thread")]
async fn a_draining_continuator_lets_an_uncommitted_turn_finish() {
    let continuator = Continuator::start(&["--no-verify"]);
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    edge.start(1, "Tell me about the sea.").await;
    edge.delta(1, 0, "The sea").await;
    continuator.signal(15);
    while !matches!(edge.next().await, Body::Drain(_)) {}
    edge.start(2, "Too late?").await;
    failed(&edge.next().await, 2, TurnError::Overloaded);
    edge.commit(1, "The sea is").await;
    assert!(matches!(edge.rest(1).await.last(), Some(Body::EndTurn(_))));
    assert!(!matches!(edge.try_next().await, Ok(Some(_))), "then the stream ends");
    drop(edge);
    assert!(continuator.wait().0.success());
}
