//! The continuator as a proxy under load: many edges, each with a turn that an upstream of ours feeds with tokens.
//!
//! Continuator on one core; edges and upstream on another. Every token carries the time at which the upstream wrote it.

use std::{
    process::{Command, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use clap::Parser;
use segue_shared::proto::{GenerationParameters, StartTurn, Surface, cloud_frame::Body};
use segue_tests::{
    edge::Edge,
    metrics::{Memory, percentile},
    programs::{Continuator, cpu, machine, on_core, two_cores},
    upstream,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// How much memory may grow while nothing but time passes.
const GROWTH: u64 = 8 << 20;
/// More tokens than a turn gets in the time.
const MOST: u32 = 1_000_000;

/// Puts a continuator under load, and prints what it takes.
#[derive(Parser)]
struct Options {
    /// Streams, each with a connection of its own.
    #[arg(long, default_value_t = 1500)]
    streams: usize,
    /// Further streams without turns.
    #[arg(long, default_value_t = 0)]
    idle: usize,
    /// Tokens of a turn, after which the stream begins another; 0: one turn as long as it is measured.
    #[arg(long, default_value_t = 0)]
    turn_tokens: usize,
    /// Tokens a second and stream.
    #[arg(long, default_value_t = 20.0)]
    rate: f64,
    /// How long to measure, in seconds.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
}

/// The upstream: a token for every stream once a period, each at a time of its own.
struct Feed {
    born: Instant,
    period: Duration,
    /// Tokens of an answer; 0: until it is told to stop.
    tokens: usize,
    stop: AtomicBool,
    streams: AtomicUsize,
}

impl Feed {
    async fn serve(self: Arc<Self>, listener: TcpListener) {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            connections.spawn(self.clone().answer(stream));
        }
    }

    async fn answer(self: Arc<Self>, mut stream: TcpStream) {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            if buffer[..read].starts_with(b"GET") {
                let _ = stream.write_all(&upstream::whole(200, &[], "{}")).await;
                continue;
            }
            if stream.write_all(&upstream::head()).await.is_err() {
                return;
            }
            // Spread over the period, as turns of different people are.
            let n = self.streams.fetch_add(1, Ordering::SeqCst) as u32;
            let mut next = tokio::time::Instant::now() + self.period * (n % 97) / 97;
            let mut written = 0;
            while !self.stop.load(Ordering::Relaxed) && (self.tokens == 0 || written < self.tokens) {
                written += 1;
                tokio::time::sleep_until(next).await;
                next += self.period;
                let token = upstream::delta(&format!(" {}", self.born.elapsed().as_micros()));
                if stream.write_all(&token).await.is_err() {
                    return;
                }
            }
            let _ = stream.write_all(&upstream::end("stop")).await;
        }
    }
}

/// One edge with a turn: microseconds from the upstream's write to the chunk's arrival, of tokens within the time that is measured, with
/// the second of arrival.
async fn talk(mut edge: Edge, feed: Arc<Feed>, from: Instant) -> Vec<(u16, u32)> {
    let mut delays = Vec::new();
    let mut id = 0;
    while id == 0 || !feed.stop.load(Ordering::Relaxed) {
        id += 1;
        turn(&mut edge, id, &feed, from, &mut delays).await;
    }
    delays
}

async fn turn(edge: &mut Edge, id: u64, feed: &Feed, from: Instant, delays: &mut Vec<(u16, u32)>) {
    edge.send(StartTurn {
        turn_id: id,
        user_text: "Count.".into(),
        parameters: Some(GenerationParameters {
            max_tokens: MOST,
            ..GenerationParameters::default()
        }),
        ..StartTurn::default()
    })
    .await;
    edge.commit(id, "Here are the numbers").await;
    loop {
        match edge.next().await {
            Body::Chunk(chunk) => {
                let now = feed.born.elapsed().as_micros() as u64;
                let sent = chunk
                    .text
                    .split_whitespace()
                    .next_back()
                    .and_then(|t| t.parse::<u64>().ok());
                let second = Instant::now()
                    .checked_duration_since(from)
                    .map(|time| time.as_secs() as u16);
                if let (Some(sent), Some(second)) = (sent, second) {
                    delays.push((second, now.saturating_sub(sent) as u32));
                }
            }
            Body::EndTurn(_) => return,
            other => panic!("{other:?}"),
        }
    }
}

/// CPU seconds that the host has given to other machines while ours wanted them: a delay then says nothing about us.
fn stolen() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks = stat
        .lines()
        .next()
        .and_then(|line| line.split_whitespace().nth(8)?.parse::<f64>().ok());
    ticks.unwrap_or(0.0) / 100.0 // Linux's USER_HZ
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let options = Options::parse();
    let pinned = two_cores();
    if pinned {
        let _ = Command::new("taskset")
            .args(["-pc", "0", &std::process::id().to_string()])
            .output();
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
    let config = std::env::temp_dir().join(format!("segue-load-{}.toml", std::process::id()));
    let text = format!(
        "[directives]\nverify = false\n[limits]\nturn = \"1h\"\nturns = 0\nstreams = 0\nconnections = 0\ntokens = {MOST}\n[[backend]]\nkind = \"openai\"\nbase_url = \"http://{}/v1\"\nmodel = \"m\"\nmode = \"prefill\"\nwarm_up = false\n",
        listener.local_addr().expect("it is bound")
    );
    std::fs::write(&config, text).expect("the temporary folder can be written");
    let feed = Arc::new(Feed {
        born: Instant::now(),
        period: Duration::from_secs_f64(1.0 / options.rate),
        tokens: options.turn_tokens,
        stop: AtomicBool::new(false),
        streams: AtomicUsize::new(0),
    });
    let server = tokio::spawn(feed.clone().serve(listener));
    let path = config.to_str().expect("a path of ours").to_owned();
    let started = tokio::task::spawn_blocking(move || {
        Continuator::start_with(&["--config", &path], |command| {
            if pinned {
                *command = on_core(1, command);
            }
        })
    });
    let continuator = started.await.expect("the continuator starts");
    let memory = || Memory::of(continuator.id());

    let before = memory();
    let mut edges = Vec::new();
    for _ in 0..options.streams {
        edges.push(Edge::connect(&continuator.url, Surface::Revisable).await);
    }
    let mut others = Vec::new();
    for _ in 0..options.idle {
        others.push(Edge::connect(&continuator.url, Surface::Revisable).await);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let idle = memory();
    let from = Instant::now() + Duration::from_secs(5);
    let mut turns = JoinSet::new();
    for edge in edges {
        turns.spawn(talk(edge, feed.clone(), from));
    }
    tokio::time::sleep_until(from.into()).await;
    let (cloud, own) = (continuator.cpu(), cpu(std::process::id()));
    let (early, stolen) = (memory(), stolen());
    let began = Instant::now();
    tokio::time::sleep(Duration::from_secs(options.seconds)).await;
    let took = began.elapsed();
    let (cloud, own) = (continuator.cpu() - cloud, cpu(std::process::id()) - own);
    let (active, stolen) = (memory(), self::stolen() - stolen);
    feed.stop.store(true, Ordering::Relaxed);
    let mut delays: Vec<f64> = Vec::new();
    let mut seconds = vec![Vec::new(); options.seconds as usize];
    while let Some(more) = turns.join_next().await {
        for (second, micros) in more.expect("a turn ends well") {
            delays.push(f64::from(micros) / 1e3);
            if let Some(second) = seconds.get_mut(usize::from(second)) {
                second.push(f64::from(micros) / 1e3);
            }
        }
    }
    let mut each: Vec<f64> = seconds.iter_mut().map(|delays| percentile(delays, 0.99)).collect();
    // Streams without turns were forgotten by nobody.
    for edge in &mut others {
        edge.silence_of(Duration::ZERO).await;
    }
    server.abort();
    let _ = std::fs::remove_file(config);

    println!(
        "machine: {}; {}\n",
        machine(),
        if pinned {
            "continuator on core 1, edges and upstream on core 0"
        } else {
            "not pinned"
        }
    );
    let n = options.streams as f64;
    let rate = delays.len() as f64 / took.as_secs_f64();
    let kib = |later: Memory, earlier: Memory, n: f64| (later.resident as f64 - earlier.resident as f64) / 1024.0 / n;
    if options.idle > 0 {
        println!("  {:<46} {:>10}", "further streams without turns", options.idle);
        println!(
            "  {:<46} {:>10.1}",
            "memory at the start of the time measured (MiB)",
            early.resident as f64 / f64::from(1 << 20)
        );
        println!("  {:<46} {:>10.1}", "growth within it (KiB)", kib(active, early, 1.0));
    }
    println!(
        "  {:<46} {:>10}",
        "streams, each with a connection of its own", options.streams
    );
    println!("  {:<46} {:>10.0}", "tokens a second through the continuator", rate);
    println!(
        "  {:<46} {:>10.1}",
        "CPU of the continuator's core (%)",
        100.0 * cloud / took.as_secs_f64()
    );
    println!(
        "  {:<46} {:>10.1}",
        "CPU of edges and upstream, on theirs (%)",
        100.0 * own / took.as_secs_f64()
    );
    println!(
        "  {:<46} {:>10.1}",
        "CPU a token (us)",
        cloud * 1e6 / took.as_secs_f64() / rate
    );
    println!(
        "  {:<46} {:>10.0}",
        "so that one core carries, in streams",
        took.as_secs_f64() / cloud * n
    );
    for share in [0.5, 0.99, 0.999] {
        let name = format!("upstream's write to edge's read, p{} (ms)", share * 100.0);
        println!("  {name:<46} {:>10.2}", percentile(&mut delays, share));
    }
    println!(
        "  {:<46} {:>10.2}",
        "  p99 of the median second (ms)",
        percentile(&mut each, 0.5)
    );
    println!(
        "  {:<46} {:>10.1}",
        "  time that other machines took of ours (%)",
        100.0 * stolen / took.as_secs_f64()
    );
    println!(
        "  {:<46} {:>10.1}",
        "memory an idle stream (KiB)",
        kib(idle, before, n + options.idle as f64)
    );
    println!(
        "  {:<46} {:>10.1}",
        "memory an active stream (KiB)",
        kib(active, idle, n) + kib(idle, before, n + options.idle as f64)
    );
    if options.idle > 0 && active.resident > early.resident + GROWTH {
        println!("\n  memory is not flat: it grew by more than {} MiB", GROWTH >> 20);
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
