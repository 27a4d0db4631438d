//! The edge against continuators that break off, lie or keep silent.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use segue_shared::proto::{self, Chunk, CloudFrame, EndTurn, edge_frame};
use segue_tests::{
    peer::{Peer, until, welcome},
    programs::{Finished, ask},
};
use tokio::io::AsyncReadExt;
use tonic::Status;

const OPENER: &str = "--force-opener=The sky is";

async fn asked(url: &str) -> Finished {
    let url = url.to_owned();
    let args = [
        OPENER,
        "--offline=never",
        "--resume-within=1s",
        "--stall=500ms",
        "Why is the sky blue?",
    ];
    tokio::task::spawn_blocking(move || ask(&url, &args)).await.unwrap()
}

/// Runs a turn against a peer that answers the first commit with `frames`, and then ends the stream with `last`, as it ends every later one.
async fn turn(frames: Vec<CloudFrame>, last: Option<Status>) -> Finished {
    let first = Arc::new(AtomicBool::new(true));
    let peer = Peer::start(move |mut incoming, out| {
        let (frames, last, first) = (frames.clone(), last.clone(), first.clone());
        async move {
            out.send(Ok(welcome(1).into())).await.unwrap();
            let committed = until(&mut incoming, |f| {
                matches!(f.body, Some(edge_frame::Body::CommitOpener(_)))
            })
            .await;
            if committed.is_none() {
                return;
            }
            for frame in frames.into_iter().filter(|_| first.load(Ordering::SeqCst)) {
                out.send(Ok(frame)).await.unwrap();
            }
            first.store(false, Ordering::SeqCst);
            match last {
                Some(status) => drop(out.send(Err(status)).await),
                // Keep the stream open: the edge must end by itself.
                None => drop(until(&mut incoming, |_| false).await),
            }
        }
    })
    .await;
    asked(&peer.url).await
}

fn chunk(revision: u32, offset: u32, text: &str) -> CloudFrame {
    Chunk {
        turn_id: 1,
        revision,
        offset,
        text: text.into(),
        generated_tokens: 0,
    }
    .into()
}

fn end() -> CloudFrame {
    EndTurn {
        turn_id: 1,
        finish_reason: proto::FinishReason::Stop.into(),
        ..EndTurn::default()
    }
    .into()
}

#[tokio::test]
async fn a_whole_turn() {
    let done = turn(vec![chunk(0, 10, " blue"), chunk(0, 15, "."), end()], None).await;
    assert_eq!(done.code, 0, "{}", done.err);
    assert_eq!(done.events().last().unwrap()["text"], "The sky is blue.");
}

#[tokio::test]
async fn a_stream_cut_in_mid_reply_keeps_what_was_shown() {
    for status in [Status::unavailable("gone"), Status::internal("broken"), Status::ok("")] {
        let done = turn(vec![chunk(0, 10, " blue")], Some(status)).await;
        assert_eq!(done.code, 69, "{done:?}");
        let last = done.events().pop().unwrap();
        assert_eq!(
            (last["event"].as_str(), last["text"].as_str()),
            (Some("error"), Some("The sky is blue"))
        );
        assert!(done.err.contains("continuator"), "{}", done.err);
    }
}

#[tokio::test]
async fn frames_out_of_order_end_the_turn() {
    for (frames, says) in [
        (vec![chunk(0, 12, "ue")], "missing"),
        (vec![chunk(0, 10, " blue"), chunk(0, 10, " blue")], "repeats"),
        (vec![chunk(3, 10, " blue")], "revision"),
        (
            vec![
                proto::Directive {
                    turn_id: 1,
                    revision: 1,
                    kind: Some(proto::directive::Kind::Revise(proto::Revise { keep_bytes: 99 })),
                    reason: 0,
                }
                .into(),
            ],
            "99",
        ),
    ] {
        let done = turn(frames, None).await;
        assert_eq!(done.code, 76, "{done:?}");
        assert!(done.err.contains(says), "{}", done.err);
    }
}

#[tokio::test]
async fn frames_of_older_revisions_and_other_turns_are_dropped() {
    let revise = proto::Directive {
        turn_id: 1,
        revision: 1,
        kind: Some(proto::directive::Kind::Revise(proto::Revise { keep_bytes: 7 })),
        reason: proto::DirectiveReason::UnlikelyWord.into(),
    };
    let other = Chunk {
        turn_id: 9,
        revision: 0,
        offset: 0,
        text: "other".into(),
        generated_tokens: 0,
    };
    let frames = vec![
        chunk(0, 10, " green"),
        revise.into(),
        chunk(0, 16, " grass"),
        other.into(),
        chunk(1, 7, " was blue."),
        end(),
    ];
    let done = turn(frames, None).await;
    assert_eq!(done.code, 0, "{}", done.err);
    assert_eq!(done.events().last().unwrap()["text"], "The sky was blue.");
}

#[tokio::test]
async fn a_failed_turn_says_why() {
    let failed = proto::TurnFailed {
        turn_id: 1,
        error: proto::TurnError::Overloaded.into(),
        message: "too many turns".into(),
        retryable: true,
        retry_after: None,
    };
    let done = turn(vec![failed.into()], None).await;
    assert_eq!(done.code, 69);
    assert!(done.err.contains("too many turns"), "{}", done.err);
    assert_eq!(done.events().last().unwrap()["code"], "overloaded");
}

#[tokio::test]
async fn another_protocol_version() {
    let newer = Peer::start(|_, out| async move { drop(out.send(Ok(welcome(2).into())).await) }).await;
    let refusing = Peer::start(|_, out| async move {
        drop(
            out.send(Err(Status::failed_precondition(
                "this continuator speaks versions 7 to 9",
            )))
            .await,
        );
    })
    .await;
    for (peer, says) in [(newer, "version 2"), (refusing, "7 to 9")] {
        let done = asked(&peer.url).await;
        assert_eq!(done.code, 76, "{done:?}");
        assert!(done.err.contains(says) && done.err.contains("update"), "{}", done.err);
    }
}

#[tokio::test]
async fn a_server_that_is_no_continuator() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        use tokio::io::AsyncWriteExt;
        while let Ok((mut socket, _)) = listener.accept().await {
            let _ = socket.read(&mut [0; 64]).await;
            let _ = socket
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")
                .await;
        }
    });
    let done = asked(&url).await;
    assert!([69, 76].contains(&done.code), "{done:?}");
    assert!(done.err.contains("continuator"), "{}", done.err);
}

#[tokio::test]
async fn a_server_that_says_nothing_is_not_waited_for_forever() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let mut sockets = Vec::new();
        while let Ok((socket, _)) = listener.accept().await {
            sockets.push(socket);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    let done = asked(&url).await;
    assert_eq!(done.code, 69, "{done:?}");
    assert!(done.err.contains("no continuator answered within 1s"), "{}", done.err);
}
