//! The handoff, measured from outside: the same turns with the prefill overlapping the opener, and one after the other.
//!
//! Each program is pinned to a core of its own where there are two (`taskset`): in reality they run on two machines, and both
//! runtimes spin while they wait.

use std::time::{Duration, Instant};

use segue_shared::proto::{Surface, cloud_frame::Body};
use segue_tests::{
    edge::Edge,
    metrics::percentile,
    programs::{Continuator, command, finish, machine, on_core, two_cores},
};
use serde_json::Value;

/// (question, opener)
const TURNS: [(&str, &str); 6] = [
    ("Who painted the Mona Lisa?", "The Mona Lisa was painted"),
    ("How do I make a cup of tea with milk?", "To make a cup of tea, boil"),
    ("What is the capital of France?", "The capital of France is"),
    ("Why is the sky blue?", "The sky is blue because"),
    ("Set an alarm for seven tomorrow morning.", "Sure, I'll set an alarm"),
    ("How do I boil an egg?", "To boil an egg, put it"),
];
const ROUNDS: usize = 8;
/// How long the edge takes for a word: a fast machine, and a slow device, whose opener outlasts the prefill here.
const FAST: Duration = Duration::from_millis(10);
const SLOW: Duration = Duration::from_millis(80);

fn row(name: &str, times: &mut [f64]) {
    if times.is_empty() {
        println!("  {name:<58} {:>8} {:>8}", "-", "-");
    } else {
        println!(
            "  {name:<58} {:>8.1} {:>8.1}",
            percentile(times, 0.5),
            percentile(times, 0.95)
        );
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let pin = two_cores();
    println!(
        "machine: {}; {}",
        machine(),
        if pin {
            "edge on core 0, continuator on core 1"
        } else {
            "not pinned"
        }
    );
    let args = ["--no-verify", "--threads", "1"];
    let continuator = Continuator::start_with(&args, |command| {
        if pin {
            *command = on_core(1, command);
        }
    });
    let mut edge = Edge::connect(&continuator.url, Surface::Revisable).await;
    let (mut steps, mut times) = (Vec::new(), [Vec::new(), Vec::new(), Vec::new()]);
    let mut id = 0;
    for round in 0..=ROUNDS {
        for (question, opener) in TURNS {
            for (n, (pace, overlap)) in [(SLOW, true), (FAST, true), (FAST, false)].into_iter().enumerate() {
                id += 1;
                // A digit in front makes every prompt new, so that no turn finds another's question in the cache.
                let question = format!("{id}. {question}");
                if overlap {
                    edge.start(id, &question).await;
                }
                let mut at = 0;
                for word in opener.split_inclusive(' ') {
                    tokio::time::sleep(pace).await;
                    if overlap {
                        edge.delta(id, at as u32, word).await;
                    }
                    at += word.len();
                }
                if pace == SLOW {
                    // The μLM looks at the next word before it lets the opener end where it is unsure.
                    tokio::time::sleep(pace).await;
                }
                let committed = Instant::now();
                if !overlap {
                    edge.start(id, &question).await;
                }
                edge.commit(id, opener).await;
                let mut last = None;
                loop {
                    match edge.next().await {
                        Body::Chunk(_) => {
                            let now = Instant::now();
                            match last.replace(now) {
                                None if round > 0 => {
                                    let time = now.duration_since(committed).as_secs_f64() * 1e3;
                                    times[n].push(time)
                                }
                                Some(before) if round > 0 => steps.push(now.duration_since(before).as_secs_f64() * 1e3),
                                _ => {}
                            }
                        }
                        Body::EndTurn(_) => break,
                        other => panic!("{other:?}"),
                    }
                }
            }
        }
    }
    println!("\n  {:<58} {:>8} {:>8}", "handoff (ms)", "p50", "p95");
    row("one decode step", &mut steps);
    row(
        "commit to first text, slow edge (commits 80 ms after a word)",
        &mut times[0],
    );
    row(
        "commit to first text, fast edge (10 ms a word, then at once)",
        &mut times[1],
    );
    row("commit to first text, opener first, then the request", &mut times[2]);
    let ratio = percentile(&mut times[0], 0.5) / percentile(&mut steps, 0.5);
    println!("  where the opener outlasts the prefill, commit to first text is {ratio:.2}x one decode step");

    println!(
        "\n  {:<58} {:>8} {:>8}",
        "edge-agent chat, as a user sees it (ms)", "p50", "p95"
    );
    let mut chat = command("edge-agent");
    if pin {
        chat = on_core(0, &chat);
    }
    chat.args(["chat", "--server", &continuator.url, "--output", "jsonl"]);
    let input: String = TURNS
        .iter()
        .map(|(question, _)| format!("{question}\n"))
        .collect::<String>()
        .repeat(ROUNDS);
    let events = finish(chat, input.as_bytes()).events();
    let ends: Vec<&Value> = events
        .iter()
        .filter(|e| e["event"] == "end")
        .skip(TURNS.len())
        .collect();
    let times = |what: &str| {
        ends.iter()
            .filter_map(|e| e["timings"][what].as_f64())
            .collect::<Vec<_>>()
    };
    row("question to first word", &mut times("first_word_ms"));
    row("question to committed opener", &mut times("opener_committed_ms"));
    row("handoff gap on the screen", &mut times("handoff_gap_ms"));
    row("question to complete reply", &mut times("total_ms"));

    let mut start_up: Vec<f64> = (0..10)
        .map(|_| {
            let mut chat = command("edge-agent");
            chat.args(["chat", "--server", &continuator.url, "--output", "jsonl"]);
            let started = Instant::now();
            finish(chat, b"");
            started.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    row(
        "edge-agent from start to ready (load, warm up, connect) to end",
        &mut start_up,
    );
}
