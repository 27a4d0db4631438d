//! The embedded engine under many turns, beside llama.cpp's own `llama-batched-bench` and its server, with the same file and threads.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use segue_shared::proto::{GenerationParameters, Message, Role, StartTurn, Surface, Usage, cloud_frame::Body};
use segue_tests::{
    edge::{Edge, commit, reply},
    llama_server::{LlamaServer, model},
    metrics::percentile,
    programs::{Continuator, machine, root},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    task::JoinSet,
};

const LEVELS: [usize; 4] = [1, 4, 16, 32];
const TOKENS: u32 = 64;
/// Rounds at every level, ours and llama.cpp's in turn; the best of each counts, as the machine may be busy elsewhere.
const ROUNDS: usize = 2;

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn question(text: String, max_tokens: u32) -> StartTurn {
    StartTurn {
        user_text: text,
        parameters: Some(GenerationParameters {
            max_tokens,
            ..GenerationParameters::default()
        }),
        ..StartTurn::default()
    }
}

/// A turn that generates long: when its chunks came, and what it took.
async fn story(edge: &mut Edge, id: u64, text: String, max_tokens: u32) -> (Vec<Instant>, Usage, String) {
    let start = StartTurn {
        turn_id: id,
        ..question(text, max_tokens)
    };
    edge.send(start).await;
    edge.send(commit(id, "")).await;
    let (mut times, mut frames) = (Vec::new(), Vec::new());
    loop {
        let body = edge.next().await;
        match &body {
            Body::Chunk(_) => times.push(Instant::now()),
            Body::EndTurn(end) => {
                let usage = end.usage.unwrap_or_default();
                return (
                    times,
                    usage,
                    reply("", &frames, segue_shared::reply_log::Surface::Revisable),
                );
            }
            other => panic!("{other:?}"),
        }
        frames.push(body);
    }
}

/// Tokens a second of turns while all of them generate, from the times of their tokens.
fn speed(times: &[Vec<Instant>]) -> f64 {
    let from = times.iter().filter_map(|t| t.first()).max().expect("there are turns");
    let to = times.iter().filter_map(|t| t.last()).min().expect("there are turns");
    let tokens = times.iter().flatten().filter(|t| *t > from && *t <= to).count();
    tokens as f64 / to.duration_since(*from).as_secs_f64()
}

/// Tokens a second of `turns` turns.
async fn throughput(url: &str, turns: usize) -> f64 {
    let mut running = JoinSet::new();
    for n in 0..turns {
        let mut edge = Edge::connect(url, Surface::Revisable).await;
        running.spawn(async move {
            let text = format!("{n}: Tell me a very long story about the sea, with many chapters.");
            story(&mut edge, 1, text, TOKENS).await.0
        });
    }
    speed(&running.join_all().await)
}

/// The same of llama.cpp's own server, asked for the same stories over HTTP; `None` where it is not installed.
async fn server(turns: usize) -> Option<f64> {
    let server = tokio::task::spawn_blocking(move || LlamaServer::start(threads(), turns, 8192));
    let server = server.await.expect("it starts")?;
    let address = server
        .url
        .trim_start_matches("http://")
        .trim_end_matches("/v1")
        .to_owned();
    let mut running = JoinSet::new();
    for n in 0..turns {
        running.spawn(streamed(address.clone(), n));
    }
    Some(speed(&running.join_all().await))
}

/// When the tokens of a story came from an OpenAI-compatible server.
async fn streamed(address: String, n: usize) -> Vec<Instant> {
    let text = format!("{n}: Tell me a very long story about the sea, with many chapters.");
    let body = json!({
        "messages": [{ "role": "user", "content": text }], "max_tokens": TOKENS, "temperature": 0.0, "stream": true,
    });
    let body = body.to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let mut stream = TcpStream::connect(&address).await.expect("the server answers");
    stream
        .write_all((head + &body).as_bytes())
        .await
        .expect("it takes requests");
    let mut lines = BufReader::new(stream).lines();
    let mut times = Vec::new();
    while let Ok(Some(line)) = lines.next_line().await {
        let event = line
            .strip_prefix("data: ")
            .and_then(|data| serde_json::from_str::<Value>(data).ok());
        let content = event
            .as_ref()
            .and_then(|event| event["choices"][0]["delta"]["content"].as_str());
        if content.is_some_and(|content| !content.is_empty()) {
            times.push(Instant::now());
        }
    }
    times
}

/// The same of llama.cpp's own bench; `None` where it is not built.
fn batched_bench(turns: usize) -> Option<f64> {
    let bench = root().join(".segue/llama.cpp/0.3.36/bin/llama-batched-bench");
    let threads = threads().to_string();
    let out = Command::new(bench)
        .args([
            "-c",
            "8192",
            "-b",
            "512",
            "-ub",
            "512",
            "-kvu",
            "-npp",
            "32",
            "-ntg",
            &TOKENS.to_string(),
        ])
        .args([
            "-npl",
            &turns.to_string(),
            "-t",
            &threads,
            "-tb",
            &threads,
            "--output-format",
            "jsonl",
            "-m",
        ])
        .arg(model())
        .env("OMP_WAIT_POLICY", "passive")
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let line = text.lines().find(|l| l.starts_with('{'))?;
    serde_json::from_str::<Value>(line).ok()?["speed_tg"].as_f64()
}

fn serve(slots: usize) -> Continuator {
    let slots = slots.to_string();
    Continuator::start(&[
        "--slots",
        &slots,
        "--layout",
        "chat",
        "--no-verify",
        "--context",
        "8192",
    ])
}

async fn levels() {
    println!(
        "\n  {:<10} {:>16} {:>22} {:>8} {:>20} {:>8}",
        "turns", "Segue (tokens/s)", "llama-batched-bench", "ratio", "llama.cpp's server", "ratio"
    );
    for turns in LEVELS {
        let (mut ours, mut theirs, mut served) = (0.0f64, None::<f64>, None::<f64>);
        for _ in 0..ROUNDS {
            let continuator = serve(turns);
            ours = ours.max(throughput(&continuator.url, turns).await);
            drop(continuator);
            let speed = tokio::task::spawn_blocking(move || batched_bench(turns))
                .await
                .expect("it runs");
            theirs = speed.map(|s| s.max(theirs.unwrap_or(0.0)));
            served = server(turns).await.map(|s| s.max(served.unwrap_or(0.0)));
        }
        let beside = |speed: Option<f64>| match speed {
            Some(speed) => (format!("{speed:.1}"), format!("{:.2}", ours / speed)),
            None => ("not there".into(), "-".into()),
        };
        let (theirs, served) = (beside(theirs), beside(served));
        println!(
            "  {turns:<10} {ours:>16.1} {:>22} {:>8} {:>20} {:>8}",
            theirs.0, theirs.1, served.0, served.1
        );
    }
}

/// Keeps `turns` turns running, each begun anew when it ends; returns the gaps between their tokens, with when they ended.
fn crowd(url: &str, turns: usize, until: Instant) -> JoinSet<Vec<(Instant, f64)>> {
    let mut running = JoinSet::new();
    for n in 0..turns {
        let url = url.to_owned();
        running.spawn(async move {
            let mut edge = Edge::connect(&url, Surface::Revisable).await;
            let (mut gaps, mut id) = (Vec::new(), 0);
            // Not all at once: people do not ask in chorus.
            tokio::time::sleep(Duration::from_millis(700) * n as u32).await;
            while Instant::now() < until {
                id += 1;
                let text = format!("{n}.{id}: Tell me a very long story about the sea, with many chapters.");
                let (times, ..) = story(&mut edge, id, text, 200).await;
                gaps.extend(
                    times
                        .windows(2)
                        .map(|w| (w[1], w[1].duration_since(w[0]).as_secs_f64() * 1e3)),
                );
            }
            gaps
        });
    }
    running
}

/// Turns of an edge that says its openers as fast as people read aloud: times from commit to first text.
async fn probe(url: &str, n: u32, until: Instant) -> Vec<f64> {
    let mut edge = Edge::connect(url, Surface::Revisable).await;
    let mut waits = Vec::new();
    let opener = "To make a good cup of tea,";
    for id in 1.. {
        if Instant::now() > until {
            break;
        }
        let start = StartTurn {
            turn_id: id,
            ..question(format!("{n}.{id}. How do I make a cup of tea?"), 8)
        };
        edge.send(start).await;
        let mut at = 0;
        for word in opener.split_inclusive(' ') {
            tokio::time::sleep(Duration::from_millis(300)).await;
            edge.delta(id, at as u32, word).await;
            at += word.len();
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        let committed = Instant::now();
        edge.commit(id, opener).await;
        while !matches!(edge.next().await, Body::Chunk(_)) {}
        waits.push(committed.elapsed().as_secs_f64() * 1e3);
        edge.rest(id).await;
    }
    waits
}

/// Commit to first text among 16 running turns, with the opener said word by word before.
async fn handoff() {
    let continuator = serve(20);
    let until = Instant::now() + Duration::from_secs(60);
    let running = crowd(&continuator.url, 16, until);
    tokio::time::sleep(Duration::from_secs(15)).await;
    let mut probes = JoinSet::new();
    for n in 0..3u32 {
        let url = continuator.url.clone();
        probes.spawn(async move {
            tokio::time::sleep(Duration::from_millis(1100) * n).await;
            probe(&url, n, until - Duration::from_secs(4)).await
        });
    }
    let mut waits: Vec<f64> = probes.join_all().await.into_iter().flatten().collect();
    let mut steps: Vec<f64> = running
        .join_all()
        .await
        .into_iter()
        .flatten()
        .map(|(_, gap)| gap)
        .collect();
    let step = percentile(&mut steps, 0.5);
    println!(
        "\n  commit to first text with 16 turns running ({} turns; a decode step takes {step:.1} ms)",
        waits.len()
    );
    for share in [0.5, 0.95] {
        let wait = percentile(&mut waits, share);
        println!(
            "    p{:<4} {wait:>8.1} ms {:>8.2} decode steps",
            share * 100.0,
            wait / step
        );
    }
}

/// The pace of four running turns while somebody's prompt of 1,000 tokens is read.
async fn long_prompt() {
    let continuator = serve(8);
    let until = Instant::now() + Duration::from_secs(20);
    let running = crowd(&continuator.url, 4, until + Duration::from_secs(15));
    tokio::time::sleep(Duration::from_secs(8)).await;
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    let history = Message {
        role: Role::User.into(),
        text: "the sea is deep and blue and ".repeat(140),
    };
    let begin = Instant::now();
    edge.send(StartTurn {
        turn_id: 1,
        history: vec![history],
        ..question("Why?".into(), 8)
    })
    .await;
    edge.send(commit(1, "")).await;
    while !matches!(edge.next().await, Body::Chunk(_)) {}
    let end = Instant::now();
    let usage = edge
        .rest(1)
        .await
        .into_iter()
        .find_map(|f| if let Body::EndTurn(e) = f { e.usage } else { None });
    let gaps: Vec<(Instant, f64)> = running.join_all().await.into_iter().flatten().collect();
    let mean = |gaps: Vec<f64>| gaps.iter().sum::<f64>() / gaps.len().max(1) as f64;
    let during: Vec<f64> = gaps
        .iter()
        .filter(|(at, _)| *at > begin && *at < end)
        .map(|g| g.1)
        .collect();
    let before: Vec<f64> = gaps
        .iter()
        .filter(|(at, _)| *at < begin && *at > begin - Duration::from_secs(5))
        .map(|g| g.1)
        .collect();
    let (before, mut sorted, during) = (mean(before), during.clone(), mean(during));
    println!(
        "\n  time between two tokens of 4 running turns while a prompt of {} tokens is read (in {:.1} s)",
        usage.map_or(0, |u| u.prompt_tokens),
        (end - begin).as_secs_f64()
    );
    println!(
        "    before {before:.1} ms, during {during:.1} ms (p95 {:.1}): {:+.0} %",
        percentile(&mut sorted, 0.95),
        100.0 * (during / before - 1.0)
    );
}

/// The share of tokens found in the cache, of those that the turn before had left there.
async fn cache() {
    let continuator = serve(4);
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    let mut history: Vec<Message> = Vec::new();
    let (mut hits, mut possible, mut left) = (0, 0, 0);
    for (id, topic) in [
        "tea", "rain", "bread", "cats", "the moon", "trains", "soap", "rivers", "honey", "snow",
    ]
    .iter()
    .enumerate()
    {
        let text = format!("Tell me about {topic}.");
        let start = StartTurn {
            turn_id: id as u64 + 1,
            history: history.clone(),
            ..question(text.clone(), 40)
        };
        edge.send(start).await;
        let opener = format!("Well, {topic}");
        edge.send(commit(id as u64 + 1, &opener)).await;
        let frames = edge.rest(id as u64 + 1).await;
        let Some(Body::EndTurn(end)) = frames.last() else {
            panic!("{frames:?}")
        };
        let usage = end.usage.expect("an end has usage");
        if id > 0 {
            hits += usage.cached_tokens.min(left);
            possible += left;
        }
        left = usage.prompt_tokens + usage.opener_tokens + usage.generated_tokens;
        let said = reply(&opener, &frames, segue_shared::reply_log::Surface::Revisable);
        for (role, text) in [(Role::User, text), (Role::Assistant, said)] {
            history.push(Message {
                role: role.into(),
                text,
            });
        }
    }
    println!(
        "\n  cache hits over a conversation of 10 turns: {hits} of {possible} tokens that were there, {:.1} %",
        100.0 * f64::from(hits) / f64::from(possible)
    );
}

/// Measures the embedded engine.
#[derive(Parser)]
struct Options {
    /// Only these tables.
    #[arg(value_enum)]
    tables: Vec<Table>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Table {
    /// Tokens a second of 1 to 32 turns.
    Levels,
    /// Commit to first text among 16 running turns.
    Handoff,
    /// The pace of running turns while a long prompt is read.
    Prompt,
    /// Cache hits over a conversation.
    Cache,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
async fn main() {
    let only = Options::parse().tables;
    let wanted = |table| only.is_empty() || only.contains(&table);
    println!("machine: {}; {} threads for either engine", machine(), threads());
    if wanted(Table::Levels) {
        levels().await;
    }
    if wanted(Table::Handoff) {
        handoff().await;
    }
    if wanted(Table::Prompt) {
        long_prompt().await;
    }
    if wanted(Table::Cache) {
        cache().await;
    }
}
