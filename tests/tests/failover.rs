//! Ordered backends: a turn goes on at the next one, and no character is lost or said twice.

use std::{path::PathBuf, time::Duration};

use segue_shared::{
    proto::{Surface, Usage, cloud_frame::Body},
    reply_log,
};
use segue_tests::{
    edge::{Edge, reply},
    programs::Continuator,
    upstream::{self, Step, Upstream, delta, pieces, prefix},
};
use serde_json::Value;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

const OPENER: &str = "The capital of Australia";
const WHOLE: &str =
    "The capital of Australia is Canberra, né \u{201c}Canberry\u{201d}: 東京 is not. So\n\nthere 🎉 it is!";

/// A configuration with these upstreams, best first; the file is removed with the value.
struct Config(PathBuf);

impl Config {
    fn new(name: &str, head: &str, upstreams: &[(&str, &str)]) -> Self {
        let path = std::env::temp_dir().join(format!("segue-failover-{name}-{}.toml", std::process::id()));
        let mut text = format!("{head}\n[limits]\nturns_per_minute = 0\n[directives]\nverify = false\n");
        for (n, (url, more)) in upstreams.iter().enumerate() {
            text += &format!(
                "[[backend]]\nkind = \"openai\"\nname = \"b{n}\"\nbase_url = {url:?}\nmodel = \"m{n}\"\nwarm_up = false\nmode = \"prefill\"\n{more}\n"
            );
        }
        std::fs::write(&path, text).unwrap();
        Self(path)
    }

    fn start(&self) -> Continuator {
        Continuator::start(&["--config", self.0.to_str().unwrap()])
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Continues [`WHOLE`] from wherever it is asked to.
fn rest(request: &Value) -> Vec<&'static str> {
    pieces(
        WHOLE
            .strip_prefix(prefix(request).expect("a prefix"))
            .expect("a prefix of the reply"),
    )
}

fn answer(request: &Value) -> Vec<u8> {
    upstream::reply(&rest(request))
}

async fn turn(edge: &mut Edge, id: u64) -> (String, Option<Usage>) {
    edge.start(id, "What is the capital of Australia?").await;
    edge.commit(id, OPENER).await;
    let frames = edge.rest(id).await;
    let usage = match frames.last() {
        Some(Body::EndTurn(end)) => end.usage,
        Some(Body::TurnFailed(failed)) => panic!("{failed:?}"),
        _ => None,
    };
    (reply(OPENER, &frames, reply_log::Surface::AppendOnly), usage)
}

/// The first upstream breaks off after every byte of its answer in turn, resetting the connection or ending it.
#[tokio::test(flavor = "multi_thread")]
async fn a_reply_survives_its_upstream_dying_at_any_byte() {
    let size = upstream::reply(&pieces(WHOLE.strip_prefix(OPENER).unwrap())).len();
    for reset in [false, true] {
        // Odd requests are answered well, so that the breaker stays closed.
        let first = Upstream::start(move |n, request| {
            let whole = answer(request);
            if n % 2 == 1 {
                return vec![Step::Send(whole)];
            }
            let end = if reset { Step::Reset } else { Step::Wait(Duration::ZERO) };
            vec![Step::Send(whole[..n / 2].to_vec()), end]
        })
        .await;
        let second = Upstream::start(|_, request| vec![Step::Send(answer(request))]).await;
        let config = Config::new(
            if reset { "reset" } else { "end" },
            "",
            &[(&first.url, ""), (&second.url, "")],
        );
        let continuator = config.start();
        let mut edge = Edge::connect(&continuator.url, Surface::AppendOnly).await;
        for n in 0..2 * size {
            let (text, usage) = turn(&mut edge, n as u64 + 1).await;
            assert_eq!(text, WHOLE, "cut after byte {} (reset: {reset})", n / 2);
            assert!(usage.is_some());
        }
        assert_eq!(first.requests().len(), 2 * size, "every turn began there");
        assert!(second.requests().len() > size / 2, "and went on here");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn words_are_whole_where_the_next_one_is_asked_in_words() {
    let text = "The capital of Australia is Canberra and it lies inland.";
    for cut in 0..text.len() - OPENER.len() {
        let first = Upstream::start(move |_, _| {
            vec![
                Step::Send([upstream::head(), delta(&text[OPENER.len()..OPENER.len() + cut])].concat()),
                Step::Reset,
            ]
        })
        .await;
        // It is asked to go on behind the quoted words, which are whole ones.
        let second = Upstream::start(move |_, request| {
            let asked = request["messages"].as_array().unwrap().last().unwrap()["content"]
                .as_str()
                .unwrap()
                .to_owned();
            let said = asked.split_once("words: \"").unwrap().1.split_once("\".").unwrap().0;
            vec![Step::Send(upstream::reply(&pieces(
                text.strip_prefix(said).unwrap().trim_start(),
            )))]
        })
        .await;
        let config = Config::new("words", "", &[(&first.url, "")]);
        let asked = format!(
            "\n[[backend]]\nkind = \"openai\"\nname = \"words\"\nbase_url = {:?}\nmodel = \"m\"\nmode = \"prompt\"\nwarm_up = false",
            second.url
        );
        std::fs::write(&config.0, std::fs::read_to_string(&config.0).unwrap() + &asked).unwrap();
        let continuator = config.start();
        let mut edge = Edge::connect(&continuator.url, Surface::AppendOnly).await;
        assert_eq!(turn(&mut edge, 1).await.0, text, "cut after {cut} bytes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_stalls_and_dead_servers_are_passed_over() {
    let dead = Upstream::dead().await;
    let stalls = || [Step::Send([upstream::head(), delta(" is")].concat()), Step::Hang].to_vec();
    for (name, steps) in [
        ("429", upstream::error(429, &["retry-after: 1"], "slow down")),
        ("500", upstream::error(500, &[], "broken")),
        ("404", upstream::error(404, &[], "no such model")),
        ("stall", stalls()),
        ("silence", vec![Step::Hang]),
        ("dead", Vec::new()),
    ] {
        let first = Upstream::start(move |_, _| steps.clone()).await;
        let second = Upstream::start(|_, request| vec![Step::Send(answer(request))]).await;
        let url = if name == "dead" { &dead } else { &first.url };
        let limits = "stall_timeout = \"150ms\"\nfirst_token_timeout = \"150ms\"";
        let config = Config::new(name, "", &[(url, limits), (&second.url, "")]);
        let continuator = config.start();
        let mut edge = Edge::connect(&continuator.url, Surface::AppendOnly).await;
        for id in 1..3 {
            assert_eq!(turn(&mut edge, id).await.0, WHOLE, "{name}");
        }
        assert!(
            continuator.log().contains("\"b0\""),
            "{name}: it is logged\n{}",
            continuator.log()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_backend_is_left_alone_and_comes_back() {
    let broken = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let state = broken.clone();
    let first = Upstream::start(move |_, request| {
        if state.load(std::sync::atomic::Ordering::SeqCst) {
            return upstream::error(500, &[], "broken");
        }
        vec![Step::Send(answer(request))]
    })
    .await;
    let second = Upstream::start(|_, request| vec![Step::Send(answer(request))]).await;
    let config = Config::new("breaker", "", &[(&first.url, ""), (&second.url, "")]);
    let continuator = config.start();
    let mut edge = Edge::connect(&continuator.url, Surface::AppendOnly).await;
    for id in 1..=10 {
        assert_eq!(turn(&mut edge, id).await.0, WHOLE);
    }
    let asked = first.requests().len();
    assert!(
        (3..10).contains(&asked),
        "after a few failures it was left alone: {asked}"
    );
    broken.store(false, std::sync::atomic::Ordering::SeqCst);
    let mut id = 11;
    while first.requests().len() == asked {
        assert!(id < 500, "it comes back");
        assert_eq!(turn(&mut edge, id).await.0, WHOLE);
        tokio::time::sleep(Duration::from_millis(20)).await;
        id += 1;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_is_asked_when_the_first_token_is_late() {
    let slow = Upstream::start(|_, request| {
        let whole = answer(request);
        vec![Step::Wait(Duration::from_secs(60)), Step::Send(whole)]
    })
    .await;
    let second = Upstream::start(|_, request| vec![Step::Send(answer(request))]).await;
    let config = Config::new(
        "hedge",
        "hedge_after = \"100ms\"",
        &[(&slow.url, ""), (&second.url, "")],
    );
    let continuator = config.start();
    let mut edge = Edge::connect(&continuator.url, Surface::AppendOnly).await;
    for id in 1..4 {
        let (text, usage) = turn(&mut edge, id).await;
        assert_eq!(text, WHOLE);
        assert!(
            usage.unwrap().wasted_tokens >= 30,
            "the loser's prompt was read for nothing"
        );
    }
    assert_eq!((slow.requests().len(), second.requests().len()), (3, 3));
    while slow.abandoned() < 3 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // A first one in time is not raced.
    let quick = Upstream::start(|_, request| vec![Step::Send(answer(request))]).await;
    let config = Config::new("no-hedge", "hedge_after = \"5s\"", &[(&quick.url, ""), (&slow.url, "")]);
    let continuator = config.start();
    let mut edge = Edge::connect(&continuator.url, Surface::AppendOnly).await;
    let (text, usage) = turn(&mut edge, 1).await;
    assert_eq!((text.as_str(), usage.unwrap().wasted_tokens), (WHOLE, 0));
    assert_eq!(slow.requests().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_one_that_runs_along_takes_over_when_the_first_fails() {
    let first = Upstream::start(|_, _| {
        let mut steps = vec![Step::Wait(Duration::from_millis(200))];
        steps.extend(upstream::error(500, &[], "broken"));
        steps
    })
    .await;
    let second = Upstream::start(|_, request| {
        let whole = answer(request);
        vec![Step::Wait(Duration::from_millis(400)), Step::Send(whole)]
    })
    .await;
    let config = Config::new("heir", "hedge_after = \"50ms\"", &[(&first.url, ""), (&second.url, "")]);
    let continuator = config.start();
    let mut edge = Edge::connect(&continuator.url, Surface::AppendOnly).await;
    assert_eq!(turn(&mut edge, 1).await.0, WHOLE);
    assert_eq!((first.requests().len(), second.requests().len()), (1, 1));
}

async fn health(url: &str) -> ServingStatus {
    let channel = tonic::transport::Channel::from_shared(url.to_owned())
        .unwrap()
        .connect()
        .await
        .unwrap();
    let request = HealthCheckRequest {
        service: "segue.v1.ContinuatorService".into(),
    };
    HealthClient::new(channel)
        .check(request)
        .await
        .unwrap()
        .into_inner()
        .status()
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_follows_the_list() {
    let dead = Upstream::dead().await;
    let config = Config::new("ready", "", &[(&dead, "")]);
    let continuator = config.start();
    assert_eq!(health(&continuator.url).await, ServingStatus::NotServing);
    while !continuator.log().contains("does not answer") {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut edge = Edge::connect(&continuator.url, Surface::AppendOnly).await;
    edge.start(1, "Anybody there?").await;
    let Body::TurnFailed(failed) = edge.next().await else {
        panic!("there is no backend")
    };
    assert!(failed.retryable && failed.retry_after.is_some(), "{failed:?}");

    // It comes up at the address where it was expected.
    let address = dead.trim_start_matches("http://").trim_end_matches("/v1");
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let server = tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            let _ = stream
                .write_all(&upstream::whole(200, &["connection: close"], "{}"))
                .await;
        }
    });
    for n in 0.. {
        assert!(n < 400, "it becomes ready");
        if health(&continuator.url).await == ServingStatus::Serving {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    server.abort();
}
