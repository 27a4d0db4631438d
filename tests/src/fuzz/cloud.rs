//! What the continuator reads: frames of edges, answers of upstreams and of judges, and its operators' files.

use std::{
    pin::Pin,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use cloud_continuator::{
    admission::{self, Admission},
    backend::{
        Backend, Event, Failure, Finish, Info, Input, Request, TokenScore, Turn, Usage,
        openai::{
            stream::{Answer, error},
            text::{Dots, Rejoin, Thoughts},
        },
    },
    backends::Backends,
    config::Settings,
    door::Door,
    judge::ControlLine,
    metrics::Metrics,
    session::{self, Limits, Service},
    tokens::Tokens,
    turn::Judgement,
};
use prost::Message;
use segue_shared::proto::{
    self, CancelTurn, CommitOpener, EdgeFrame, Heard, Hello, OpenerDelta, RefuseDirective, StartTurn,
    commit_opener::Opening,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

use super::{Target, text_pieces};
use crate::programs::root;

pub(super) fn targets() -> Vec<Target> {
    vec![
        control_line(),
        sse(),
        filters(),
        configuration(),
        token_file(),
        frames(),
    ]
}

fn control_line() -> Target {
    Target {
        name: "control_line",
        seeds: [
            "[accept]\n and\0 so on",
            "[revise 3]\0\n blue",
            "**[restart]**\nIt is",
            "`bridge`: sorry",
        ]
        .map(|text| text.as_bytes().to_vec())
        .to_vec(),
        words: &[
            "[",
            "]",
            "revise",
            "99999999999999999999",
            "-1",
            "\0",
            "`",
            "**",
            "ü",
            "\u{fe0f}",
        ],
        share: 130,
        run: Box::new(|input| {
            let (pieces, mut line) = (text_pieces(input), ControlLine::default());
            for (n, piece) in pieces.iter().enumerate() {
                if let Some((control, _)) = line.push(piece, n + 1 == pieces.len()) {
                    let _ = cloud_continuator::judge::verdict(control, "The capital of Australia is Sydney");
                    return;
                }
            }
        }),
    }
}

/// Bytes of an HTTP body, in pieces of some length.
fn sse() -> Target {
    let runtime = runtime();
    let event = |text: &str| format!("data: {text}\n\n").into_bytes();
    let seeds = vec![
        [
            event(r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":"é 東"},"finish_reason":null}]}"#),
            event(r#"{"choices":[{"delta":{"reasoning_content":"hm"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":1}}"#),
            event("[DONE]"),
        ]
        .concat(),
        b": comment\r\nevent: x\r\nid: 1\r\nretry: 5\r\ndata: {\"error\":{\"message\":\"no\",\"code\":429}}\r\n\r\n".to_vec(),
        br#"{"choices":[{"message":{"content":[{"type":"text","text":"a"}]},"finish_reason":"length"}]}"#.to_vec(),
    ];
    Target {
        name: "sse",
        seeds,
        words: &[
            "data:",
            "\n\n",
            "\r",
            "\u{feff}",
            "null",
            "[]",
            "{\"choices\":",
            "\"content\":",
            "event:",
            "id:\0",
            "[DONE]",
        ],
        share: 90,
        run: Box::new(move |input| {
            let size = 1 + input.first().map_or(0, |b| usize::from(*b)) % 40;
            let chunks: Vec<_> = input
                .chunks(size)
                .map(|c| Ok::<_, std::io::Error>(Bytes::copy_from_slice(c)))
                .collect();
            let json = input.first() == Some(&b'{');
            let body = reqwest::Body::wrap_stream(tokio_stream::iter(chunks));
            let kind = if json { "application/json" } else { "text/event-stream" };
            let response = http::Response::builder()
                .header("content-type", kind)
                .body(body)
                .expect("a response");
            runtime.block_on(async {
                let first = tokio::time::Instant::now() + Duration::from_secs(5);
                let Ok(mut answer) = Answer::read(response.into(), first, Duration::from_secs(5)).await else {
                    return;
                };
                for _ in 0..1000 {
                    if !matches!(answer.next().await, Ok(Some(_))) {
                        return;
                    }
                }
            });
            let _ = error(400, None, &String::from_utf8_lossy(input));
        }),
    }
}

fn filters() -> Target {
    Target {
        name: "text_filters",
        seeds: [
            "<think>\0hm</think>\0 It is",
            "…\0 and so\0 on",
            "The capital\0 The capital of\0 is blue",
        ]
        .map(|text| text.as_bytes().to_vec())
        .to_vec(),
        words: &["<think>", "</think>", "<", "…", "...", "\0", " ", "\u{301}", "ﬀ", "İ"],
        share: 100,
        run: Box::new(|input| {
            let mut pieces = text_pieces(input);
            let prefix = pieces.remove(0);
            let (mut thoughts, mut dots, mut follow) = (Thoughts::default(), Dots::default(), Rejoin::follow(&prefix));
            let (said, mut again) = Rejoin::again(&prefix);
            assert!(prefix.starts_with(&said));
            for piece in pieces {
                let text = dots.push(thoughts.push(piece));
                let _ = (follow.push(text.clone()), again.push(text));
            }
            let rest = thoughts.finish() + &dots.finish();
            let _ = (
                follow.push(rest.clone()) + &follow.finish(),
                again.push(rest) + &again.finish(),
            );
        }),
    }
}

fn configuration() -> Target {
    let example = std::fs::read_to_string(root().join("deploy/continuator.toml")).expect("it is in the repository");
    let bare = |text: &str| {
        text.lines()
            .filter(|l| !l.starts_with('#'))
            .map(|l| format!("{l}\n"))
            .collect::<String>()
    };
    let all: String = example
        .lines()
        .map(|l| format!("{}\n", l.strip_prefix("#: ").unwrap_or(l)))
        .collect();
    Target {
        name: "configuration",
        seeds: vec![bare(&example).into_bytes(), bare(&all).into_bytes()],
        words: &[
            "[[backend]]",
            "\"0s\"",
            "inf",
            "nan",
            "'''",
            "kind = \"openai\"",
            "\"99999999999y\"",
            "-0",
        ],
        share: 25,
        run: Box::new(|input| {
            if let Ok(settings) = toml::from_str::<Settings>(&String::from_utf8_lossy(input)) {
                if settings.check().is_ok() {
                    let _ = (settings.limits(), settings.admission(), settings.judgement());
                }
                let _ = toml::to_string(&settings);
            }
        }),
    }
}

fn token_file() -> Target {
    let now = SystemTime::now();
    let mut tokens = Tokens::default();
    let token = tokens
        .issue("kitchen", now, Some(Duration::from_secs(60)))
        .expect("a good name");
    Target {
        name: "tokens",
        seeds: vec![toml::to_string(&tokens).expect("it can be written").into_bytes()],
        words: &[
            "[[token]]",
            "revoked = ",
            "\"9999-12-31T23:59:59Z\"",
            "\"0000-00-00T00:00:00Z\"",
            "sha256 = \"zz\"",
        ],
        share: 60,
        run: Box::new(move |input| {
            let text = String::from_utf8_lossy(input);
            if let Ok(tokens) = toml::from_str::<Tokens>(&text) {
                let _ = (tokens.check(&token, now), tokens.check(&text, now));
                for entry in &tokens.token {
                    let _ = entry.state(now);
                }
            }
        }),
    }
}

/// A backend that answers at once, sometimes with nonsense.
struct Quick(Info);

impl Backend for Quick {
    fn info(&self) -> &Info {
        &self.0
    }

    fn open(&self, _: Request) -> Result<Turn, Failure> {
        let (send, events) = mpsc::channel(256);
        let _ = send.try_send(Event::Prefilled);
        let generation = AtomicU64::new(0);
        let input = move |input: Input| {
            let answers = match input {
                Input::Commit(text) => {
                    let score = TokenScore {
                        end: text.len(),
                        log_probability: if text.len() % 2 == 0 { -20.0 } else { -0.1 },
                        rank: 0,
                    };
                    vec![Event::Scored(vec![score])]
                }
                Input::Generate(text) | Input::Resume(text) | Input::Judge(text) => {
                    let usage = Usage {
                        generation: generation.fetch_add(1, std::sync::atomic::Ordering::Relaxed) as u32,
                        generated: 1,
                        ..Usage::default()
                    };
                    match text.len() % 5 {
                        0 => vec![Event::Failed(Failure::CutOff)],
                        1 => vec![Event::Text(" so".into(), usage)],
                        _ => vec![Event::Text(" it is".into(), usage), Event::Done(Finish::Stop, usage)],
                    }
                }
                Input::Opener(_) | Input::Close => Vec::new(),
            };
            for answer in answers {
                let _ = send.try_send(answer);
            }
            Ok(())
        };
        Ok(Turn::new(input, ReceiverStream::new(events)))
    }

    fn check(&self) -> Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + '_>> {
        Box::pin(async { Ok(()) })
    }
}

/// Frames of an edge, one after the other, each after its length: in any order, with any content.
fn frames() -> Target {
    let ((service, drain), runtime) = (service(), runtime());
    Target {
        name: "frames",
        seeds: vec![
            conversation(proto::Surface::Revisable),
            conversation(proto::Surface::AppendOnly),
        ],
        words: &[
            "\u{8}\u{1}",
            "\u{12}\u{2}",
            "\u{1a}\u{0}",
            "\u{22}\u{4}",
            "\u{2a}\u{4}\u{8}\u{1}\u{10}\u{5}",
            "ü",
        ],
        share: 125,
        run: Box::new(move |input| {
            runtime.block_on(hold(&service, input));
            assert!(!drain.is_closed(), "the continuator goes on");
            assert_eq!(service.admission.in_use(), (0, 0), "all places are given back");
        }),
    }
}

/// A continuator, and what would tell it to drain.
fn service() -> (Arc<Service>, watch::Sender<Option<Duration>>) {
    let info = Info {
        model: "m".into(),
        provider: "p",
        scores: true,
        local: true,
    };
    let (drain, draining) = watch::channel(None);
    let none = admission::Limits {
        streams: 0,
        streams_per_device: 0,
        turns: 0,
        turns_per_minute: 0,
    };
    let service = Service {
        backends: Arc::new(Backends::new(vec![("quick".into(), Arc::new(Quick(info)))])),
        hedge_after: None,
        judgement: Judgement::default(),
        limits: Limits::default(),
        draining,
        first_text_micros: AtomicU64::new(0),
        admission: Admission::new(none),
        metrics: Metrics::default(),
    };
    (Arc::new(service), drain)
}

/// Holds the conversation that `input` says.
async fn hold(service: &Arc<Service>, input: &[u8]) {
    let mut rest = Bytes::copy_from_slice(input);
    let mut frames = Vec::new();
    while !rest.is_empty() {
        match EdgeFrame::decode_length_delimited(&mut rest) {
            Ok(frame) => frames.push(Ok(frame)),
            Err(_) => break,
        }
    }
    let (out, mut sent) = mpsc::channel(64);
    let place = service.admission.stream().expect("there is no limit");
    let caller = Door::default().enter(None, None).expect("nobody is asked");
    // Frames come in pieces, so that answers come between them.
    let frames = tokio_stream::iter(frames).then(async |frame| {
        tokio::task::yield_now().await;
        frame
    });
    let session = session::converse(service.clone(), caller, place, frames, out);
    tokio::select! {
        biased;
        _ = session => {}
        () = async { while sent.recv().await.is_some() {} } => {}
        () = async { for _ in 0..200 { tokio::task::yield_now().await; } } => {}
    }
}

fn conversation(surface: proto::Surface) -> Vec<u8> {
    let hello = Hello {
        min_protocol_version: 1,
        max_protocol_version: 1,
        device_id: "d".into(),
        surface: surface.into(),
        ..Hello::default()
    };
    let start = |turn_id, generated_tokens| StartTurn {
        turn_id,
        user_text: "Why?".into(),
        history: vec![proto::Message {
            role: 1,
            text: "So?".into(),
        }],
        parameters: Some(proto::GenerationParameters {
            temperature: Some(0.5),
            stop: vec!["x".into()],
            ..proto::GenerationParameters::default()
        }),
        deadline: Some(proto::duration(Duration::from_secs(1))),
        generated_tokens,
        ..StartTurn::default()
    };
    let delta = OpenerDelta {
        turn_id: 1,
        offset: 0,
        text: "It is".into(),
    };
    let commit = |turn_id, text: &str, resumed| CommitOpener {
        turn_id,
        opening: Some(Opening::CommittedPrefix(text.into())),
        mean_log_probability: Some(-1.0),
        resumed,
    };
    let frames: Vec<EdgeFrame> = vec![
        hello.into(),
        start(1, 0).into(),
        delta.into(),
        commit(1, "It is blue", false).into(),
        Heard { turn_id: 1, bytes: 5 }.into(),
        RefuseDirective {
            turn_id: 1,
            revision: 1,
            heard_bytes: 5,
        }
        .into(),
        start(2, 160).into(),
        commit(2, "It is blu", true).into(),
        CancelTurn {
            turn_id: 2,
            heard_bytes: 3,
        }
        .into(),
    ];
    frames
        .iter()
        .flat_map(Message::encode_length_delimited_to_vec)
        .collect()
}

fn runtime() -> tokio::runtime::Runtime {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime starts")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_conversations_to_begin_with_are_whole_ones() {
        for surface in [proto::Surface::Revisable, proto::Surface::AppendOnly] {
            let (service, _drain) = service();
            let text = runtime().block_on(async {
                hold(&service, &conversation(surface)).await;
                service.metrics.text(&service.admission)
            });
            assert!(text.contains("segue_turns_total{outcome=\"complete\"}"), "{text}");
            assert!(text.contains("segue_turns_resumed_total 1"), "{text}");
        }
    }
}
